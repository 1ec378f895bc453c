"""A local media server that can do what real ones do wrong.

`Misbehaving()` serves media under `/watch/ID.EXT`: any path is fine until it is told otherwise.

    with Misbehaving() as server:
        server.behave("AbC.webm", Status(429, {"Retry-After": "7"}))
        server.behave("xyz.webm", Status(500), times=2)      # then fine
        server.url("AbC.webm")                               # http://127.0.0.1:PORT/watch/AbC.webm
        server.template                                      # the same with {id}, for --url-template
        server.asked("AbC.webm")                             # the requests for it so far
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import numpy as np

from clipmill.audio.media import encode_media

TYPES = {
    "webm": "audio/webm",
    "m4a": "audio/mp4",
    "mp4": "video/mp4",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
    "flac": "audio/flac",
    "html": "text/html; charset=utf-8",
    "m3u8": "application/vnd.apple.mpegurl",
}


@dataclass(frozen=True)
class Fine:
    """Serves the media, with Range or (a server of the plainest sort) without."""

    ranges: bool = True


@dataclass(frozen=True)
class Status:
    """Answers with a status, and these headers."""

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Body:
    """Serves these bytes, whole, as `type`; `says` is the length it states where that is not the true one."""

    data: bytes
    type: str = "audio/webm"
    says: int | None = None
    ranges: bool = True


@dataclass(frozen=True)
class Reset:
    """Sends so many bytes of the media, then resets the connection."""

    after_bytes: int = 2000


@dataclass(frozen=True)
class Stall:
    """Sends so many bytes of the media, then nothing, and keeps the connection open."""

    after_bytes: int = 2000


@dataclass(frozen=True)
class Short:
    """Promises the whole media, sends so many bytes, and closes the connection."""

    after_bytes: int = 2000


Behaviour = Fine | Status | Body | Reset | Stall | Short


@dataclass(frozen=True)
class Request:
    """One request as it came: `name` is the path after /watch/, `at` seconds since 1970."""

    name: str
    at: float
    range: str | None
    headers: dict[str, str]


def chirps(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Band-limited noise, float32 `[channels, samples]`: no stretch of it is like another."""
    rng = np.random.default_rng(seed)
    count = round(seconds * rate)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hz = np.fft.rfftfreq(count, 1 / rate)
    spectrum[(hz < 200) | (hz > 6000)] = 0
    mono = np.fft.irfft(spectrum, count)
    mono *= 0.3 / np.abs(mono).max()
    return np.stack([mono * gain for gain in np.linspace(1.0, 0.5, channels)]).astype(np.float32)


@cache
def webm(seconds: float = 12.0, rate: int = 48_000, level: float = 1.0) -> bytes:
    """Opus in WebM, as YouTube serves it."""
    return encode_media(chirps(seconds, rate) * np.float32(level), rate, "webm", "libopus")


class Misbehaving(ThreadingHTTPServer):
    """See the module; `media` is what a fine path serves. Requests are kept in `requests`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, media: bytes | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.media = webm() if media is None else media
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._behaviours: dict[str, tuple[Behaviour, int | None]] = {}
        self._turns: dict[str, tuple[int, Behaviour]] = {}
        self._default: Behaviour = Fine()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Misbehaving:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def template(self) -> str:
        return f"{self.root}/watch/{{id}}.webm"

    def url(self, name: str) -> str:
        return f"{self.root}/watch/{name}"

    def behave(self, name: str | None, behaviour: Behaviour, times: int | None = None) -> None:
        """From now on (or for so many requests, and then fine again) `name` is served like this; None: every other."""
        with self._lock:
            if name is None:
                self._default = behaviour
            else:
                self._turns.pop(name, None)
                self._behaviours[name] = (behaviour, times)

    def behave_from(self, name: str, behaviour: Behaviour, request: int) -> None:
        """`name` is fine until its request of that number (1 is the first), and from then on served like this."""
        with self._lock:
            self._turns[name] = (request, behaviour)

    def asked(self, name: str) -> list[Request]:
        """The requests for `name` so far."""
        with self._lock:
            return [request for request in self.requests if request.name == name]

    def next_behaviour(self, request: Request) -> Behaviour:
        """What this request gets."""
        with self._lock:
            self.requests.append(request)
            first, turned = self._turns.get(request.name, (0, None))
            if turned and sum(earlier.name == request.name for earlier in self.requests) >= first:
                return turned
            behaviour, times = self._behaviours.get(request.name, (self._default, None))
            if times is not None and times <= 1:
                del self._behaviours[request.name]
            elif times is not None:
                self._behaviours[request.name] = (behaviour, times - 1)
            return behaviour

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Misbehaving
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).removeprefix("/watch/")
        headers = dict(self.headers.items())
        behaviour = self.server.next_behaviour(Request(name, time.time(), headers.get("Range"), headers))
        kind = TYPES.get(name.rpartition(".")[2], "audio/webm")
        media = self.server.media
        actions: dict[type, Callable[[], None]] = {
            Fine: lambda: self._send(media, kind, ranges=getattr(behaviour, "ranges", True)),
            Status: lambda: self._refuse(behaviour),  # type: ignore[arg-type]
            Body: lambda: self._body(behaviour),  # type: ignore[arg-type]
            Reset: lambda: self._break_off(kind, behaviour.after_bytes, self._reset),  # type: ignore[union-attr]
            Short: lambda: self._break_off(kind, behaviour.after_bytes, lambda: None),  # type: ignore[union-attr]
            Stall: lambda: self._break_off(kind, behaviour.after_bytes, self.server.closing.wait),  # type: ignore[union-attr]
        }
        actions[type(behaviour)]()

    do_HEAD = do_GET

    def _refuse(self, status: Status) -> None:
        body = f"<html><body>{status.code}</body></html>".encode()
        self.send_response(status.code)
        for header, value in {"Content-Type": "text/html", **status.headers}.items():
            self.send_header(header, value)
        self._finish(body, len(body))

    def _body(self, body: Body) -> None:
        if body.says is None:
            self._send(body.data, body.type, body.ranges)
            return
        self.send_response(200)
        self.send_header("Content-Type", body.type)
        self._finish(body.data, body.says)
        self.close_connection = True

    def _send(self, data: bytes, kind: str, ranges: bool = True) -> None:
        part = self._part(data, kind, ranges)
        self._finish(part, len(part))

    def _part(self, data: bytes, kind: str, ranges: bool = True) -> bytes:
        """Begin the answer, and return what of the data was asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if ranges else None
        if asked is None:
            self.send_response(200)
            part = data
        elif int(asked[1]) >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            part = b""
        else:
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            part = data[first : last + 1]
        self.send_header("Content-Type", kind)
        if ranges:
            self.send_header("Accept-Ranges", "bytes")
        return part

    def _finish(self, body: bytes, says: int) -> None:
        self.send_header("Content-Length", str(says))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _break_off(self, kind: str, after_bytes: int, then: Callable[[], object]) -> None:
        part = self._part(self.server.media, kind)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[:after_bytes])
        self.wfile.flush()
        then()
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
