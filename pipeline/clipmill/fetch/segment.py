"""One segment of one video: yt-dlp finds where its sound is, and only that stretch of it is fetched.

yt-dlp's own way to fetch a stretch is a run of ffmpeg, which begins seconds early where the
file has few points to start at, knows no SOCKS proxy, says of every failure "exited with
code 1", and lives on when its worker is killed. So yt-dlp does what it alone can do (find
the audio, speak to the site), and the packets wanted are read through its own connection
and copied as they are: see `clipmill.audio.cut`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmill.audio import CUT_SUFFIXES, Cut, cut
from clipmill.audio.ffmpeg import ffmpeg_program
from clipmill.errors import ConfigError, DecodeError
from clipmill.fetch.check import check_media
from clipmill.fetch.ledger import Outcome
from clipmill.fetch.reasons import classify
from clipmill.fetch.remote import RemoteFile

if TYPE_CHECKING:
    from yt_dlp import YoutubeDL

_OUR_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_OUR_FOLDERS = {errno.ENOTDIR, errno.EXDEV, errno.EMFILE, errno.ENFILE}
_LOG_LINES = 50
_JS_RUNTIMES = ("deno", "node", "bun", "quickjs")


@dataclass(frozen=True, slots=True)
class Ask:
    """One segment wanted: from `start_s` to `end_s` (seconds) of what plays at `url`.

    `stem` is where it goes: relative to `media_root`, without the extension, which the codec
    that arrives decides. `parts` is a folder for this ask alone, on the same file system; it is made and
    removed here, with all that an earlier run left in it.
    """

    key: str
    url: str
    start_s: float
    end_s: float
    media_root: Path
    stem: str
    parts: Path
    cookies: Path | None = None
    cookies_from_browser: str | None = None
    proxy: str | None = None
    socket_timeout_s: float = 20.0
    short_s: float = 0.5
    keep_silent: bool = False


def fetch_segment(ask: Ask) -> Outcome:
    """Fetch one segment, check it, and put it in place; what a site, a network or a file does is an outcome.

    The file holds a little more than the segment, whole packets of the original codec;
    the outcome's `start_s` and `end_s` say where in it the segment lies. Killed at any
    moment, it leaves nothing half-written under `media_root`.

    Raises:
        OSError: our own disk is full, cannot be written, or has something else in the way.
        ConfigError: the cookies cannot be read.
    """
    log: list[str] = []
    try:
        _clear(ask.parts)
        return _fetch(ask, log)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OUR_DISK | _OUR_FOLDERS:
            raise
        reason, message, retry_after_s = classify(error, "\n".join(log))
        return Outcome(ask.key, reason, message, retry_after_s=retry_after_s)
    finally:
        shutil.rmtree(ask.parts, ignore_errors=True)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _fetch(ask: Ask, log: list[str]) -> Outcome:
    ydl = _downloader(ask)
    ydl.params["logger"].lines = log
    info = ydl.extract_info(ask.url, download=False)
    if not info or "entries" in info:
        raise DecodeError("no-audio", "the address leads to a list of videos, not to one")
    if info.get("live_status") in ("is_live", "is_upcoming", "post_live"):
        raise DecodeError("live", f"is a live stream, or was one just now ({info['live_status']})")
    found = _cut_out(ydl, info, ask)
    wanted_s = ask.end_s - ask.start_s
    starts_s, ends_s = round(found.start_s, 6), round(found.start_s + wanted_s, 6)
    checked = check_media(
        found.path, starts_s, ends_s, wanted_s, short_s=ask.short_s, keep_silent=ask.keep_silent
    )
    source = ask.stem + found.path.suffix
    size = _put_in_place(found.path, ask.media_root, ask.stem)
    return Outcome(
        ask.key,
        source=source,
        bytes=size,
        sha256=checked.sha256,
        duration_s=checked.duration_s,
        start_s=starts_s,
        end_s=ends_s,
    )


def _cut_out(ydl: YoutubeDL, info: dict[str, Any], ask: Ask) -> Cut:
    """The segment as a file in `parts`."""
    from yt_dlp.networking import Request

    if info.get("protocol") not in ("http", "https") or info.get("fragments"):
        return cut(_whole(ydl, info, ask.parts), ask.start_s, ask.end_s, ask.parts)
    # YouTube serves nothing for some seconds, as long as an advertisement would last, and refuses who asks before.
    time.sleep(max((info.get("available_at") or 0) - time.time(), 0.0))
    headers = info.get("http_headers") or {}

    def get(more: dict[str, str]) -> Any:
        return ydl.urlopen(Request(info["url"], headers={**headers, **more}))

    with RemoteFile(get, ask.parts / "whole") as remote:
        try:
            found = cut(remote, ask.start_s, ask.end_s, ask.parts)  # type: ignore[arg-type]
        except Exception:
            if remote.error:
                raise remote.error from None
            raise
        if remote.error:
            raise remote.error
    return found


def _whole(ydl: YoutubeDL, info: dict[str, Any], folder: Path) -> Path:
    """What comes in pieces (HLS, DASH) is fetched whole by yt-dlp: it knows no times of them to ask for."""
    path = folder / "whole"
    ydl.dl(str(path), info)
    if not path.is_file():
        raise DecodeError("empty", "yt-dlp fetched nothing, and did not say why")
    return path


def _put_in_place(arrived: Path, media_root: Path, stem: str) -> int:
    """Move a checked file to where it goes, to stay there; returns its size in bytes."""
    place = media_root / (stem + arrived.suffix)
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(arrived, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    os.replace(arrived, place)
    for suffix in CUT_SUFFIXES:
        if suffix != arrived.suffix:
            (media_root / (stem + suffix)).unlink(missing_ok=True)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return size


class _Log:
    """Takes what yt-dlp says; the last lines of it may tell why something failed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def debug(self, message: str) -> None:
        self.lines.append(message)
        del self.lines[:-_LOG_LINES]

    info = warning = error = debug


def _downloader(ask: Ask) -> YoutubeDL:
    """One for each way to the site, kept by the worker: it holds connections, cookies and YouTube's player."""
    changed = None
    if ask.cookies:
        try:
            changed = ask.cookies.stat().st_mtime_ns
        except OSError as error:
            raise _no_cookies(ask.cookies, error.strerror or str(error)) from None
    return _made(ask.cookies, changed, ask.cookies_from_browser, ask.proxy, ask.socket_timeout_s)


@lru_cache(maxsize=8)
def _made(
    cookies: Path | None, changed: int | None, browser: str | None, proxy: str | None, socket_timeout_s: float
) -> YoutubeDL:
    """A quiet yt-dlp that tries once, keeps no files, and leaves the user's cookies as they are."""
    from yt_dlp import YoutubeDL
    from yt_dlp.utils import YoutubeDLError

    params = {
        "format": "bestaudio/best",
        "noplaylist": True,
        "logger": _Log(),
        "quiet": True,
        "noprogress": True,
        "color": {"stdout": "no_color", "stderr": "no_color"},
        "cachedir": False,
        "retries": 0,
        "fragment_retries": 0,
        "extractor_retries": 1,
        "skip_unavailable_fragments": False,
        "fixup": "never",
        "updatetime": False,
        "overwrites": True,
        "socket_timeout": socket_timeout_s,
        "js_runtimes": {name: {} for name in _JS_RUNTIMES},
        "ffmpeg_location": ffmpeg_program(),
        **({"proxy": proxy} if proxy else {}),
        **({"cookiesfrombrowser": _browser(browser)} if browser else {}),
    }
    given = cookies or browser
    if not given:
        return YoutubeDL(params)
    try:
        if cookies:
            # As text in memory: yt-dlp writes a file of cookies back, and many workers share this one.
            params["cookiefile"] = io.StringIO(cookies.read_text(encoding="utf-8"))
        with contextlib.redirect_stderr(io.StringIO()):  # of a line it cannot read it prints the secret
            ydl = YoutubeDL(params)
            found = len(ydl.cookiejar)
    except (YoutubeDLError, OSError, UnicodeDecodeError) as error:
        said = re.sub(r"<_io\.StringIO.*?>", "it", " ".join(str(error).split())).removeprefix("ERROR: ")
        raise _no_cookies(given, said) from error
    if not found:
        raise _no_cookies(given, "there are none")
    return ydl


def _no_cookies(given: Path | str, said: str) -> ConfigError:
    return ConfigError(
        f"{given}: cookies cannot be had there: {said}; --cookies takes a file in Netscape's format, "
        "--cookies-from-browser a browser's name"
    )


def _browser(stated: str) -> tuple[str, str | None, str | None, str | None]:
    """BROWSER[+KEYRING][:PROFILE][::CONTAINER], as yt-dlp's own command takes it."""
    rest, _, container = stated.partition("::")
    rest, _, profile = rest.partition(":")
    name, _, keyring = rest.partition("+")
    return name.lower(), profile or None, keyring.upper() or None, container or None
