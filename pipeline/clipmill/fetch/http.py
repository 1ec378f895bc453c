"""Download one file over HTTP: resumed where it broke off, from mirrors, and checked before it gets its name.

Beside the file that is wanted lies, until it is whole, `.NAME.<hash of the URL>.part`, and
`...part.json` with what the server said of it. The server's own mark (ETag or Last-Modified)
goes back to it as If-Range, so that the rest of a file that has changed since is never put
behind the beginning of the old one.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import requests
import urllib3

from clipmill import __version__, tables
from clipmill.datasets import Remote
from clipmill.errors import FetchError, TableError
from clipmill.fetch.governor import seconds_to_wait
from clipmill.fetch.watch import QUIET, Watch

BLOCK_BYTES = 1 << 20
_NETWORK_BYTES = 1 << 16  # what a broken connection may lose of what had come
LONGEST_RETRY_AFTER_S = 600.0
"""A server that wants to be left alone for longer is not waited for."""

_PROGRESS_BYTES = 1 << 20
"""A URL that brought this much more than ever before is asked again at once, and it counts as no retry."""


class _Failed(Exception):
    """One URL did not give the file; `final`: asking it again would change nothing."""

    def __init__(self, message: str, *, final: bool = False, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.final, self.retry_after_s = final, retry_after_s


@dataclass(frozen=True)
class _Part:
    """What is there of a file from one URL, and what the server said of it."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else 0

    def said(self) -> dict[str, Any]:
        """`validator` and `size` as the server gave them; nothing where that was never written down."""
        try:
            said: dict[str, Any] = tables.read_json(self.note, "validator", "size")
        except TableError:
            said = {"validator": None, "size": None}
        return said

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def download(
    remote: Remote,
    dest: Path,
    *,
    retries: int = 5,
    timeout_s: float = 30.0,
    pause_s: float = 1.0,
    watch: Watch = QUIET,
    mend: str = "",
) -> Path:
    """Get a file, or find it there already; `dest` never holds anything but the whole of it.

    Each URL is asked in turn, the official one first, and all of them up to `retries` times
    more with a doubling pause from `pause_s`, or as long as a server asks for. `timeout_s` is
    how long a server may say nothing. `mend` ends the error message with what a user can do.

    Raises:
        FetchError: no URL gave a file of the right size and checksum; says what each did.
        OSError: our own disk is full or cannot be written; what has come stays, to go on from.
    """
    if dest.is_file() and _mismatch(dest, remote) is None:
        return dest
    dest.parent.mkdir(parents=True, exist_ok=True)
    urls = list(dict.fromkeys(remote.urls))
    said: dict[str, _Failed] = {}
    due: dict[str, float] = {}
    with requests.Session() as session:
        session.headers.update({"User-Agent": f"clipmill/{__version__}", "Accept-Encoding": "identity"})
        for turn in range(retries + 1):
            for url in [u for u in urls if due.get(u, 0.0) <= time.monotonic()]:
                part = _Part(
                    dest.with_name(f".{dest.name}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.part")
                )
                try:
                    _from_url(session, url, part, replace(remote, file=dest.name), timeout_s, watch)
                except _Failed as failed:
                    said[url] = failed
                    due[url] = time.monotonic() + failed.retry_after_s
                    continue
                os.replace(part.path, dest)
                _sweep(dest)
                return dest
            urls = [u for u in urls if not said[u].final and said[u].retry_after_s <= LONGEST_RETRY_AFTER_S]
            if not urls or turn == retries:
                break
            wait_s = max(min(pause_s * 2**turn, 60.0), min(due[u] for u in urls) - time.monotonic())
            watch.say(f"{dest.name}: {said[urls[0]]}; asking again in {wait_s:.0f} s")
            time.sleep(wait_s)
    what = "\n".join(f"  {url}: {failed}" for url, failed in said.items()) or "  no address is known for it"
    raise FetchError(
        f"{dest.name}: cannot be had:\n{what}\n{mend or f'run it again, or put the file at {dest}'}"
    )


def checksum_of(path: Path, like: str | None, watch: Watch = QUIET) -> str:
    """A file's checksum of the same kind as `like` ("md5:...", "sha256:..."; sha256 where None)."""
    kind = like.partition(":")[0] if like else "sha256"
    digest = hashlib.new(kind, usedforsecurity=False)
    watch.total(f"check {path.name}", max(path.stat().st_size >> 20, 1), "MB")
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            watch.update(file.tell() >> 20, "")
    return f"{kind}:{digest.hexdigest()}"


def _mismatch(path: Path, remote: Remote, watch: Watch = QUIET) -> str | None:
    """What is wrong with a file by its size and checksum; None: nothing that we can tell."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"has {size} bytes, expected {remote.size}"
    if remote.checksum is not None:
        found = checksum_of(path, remote.checksum, watch)
        if found != remote.checksum.lower():
            return f"has checksum {found}, expected {remote.checksum}"
    return None


def _sweep(dest: Path) -> None:
    """Remove what is left of other attempts at a file that is now there."""
    ours = re.compile(re.escape(f".{dest.name}.") + r"[0-9a-f]{8}\.part(\.json)?")
    for path in dest.parent.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _from_url(
    session: requests.Session, url: str, part: _Part, remote: Remote, timeout_s: float, watch: Watch
) -> None:
    """Make the part whole and right, going on for as long as the URL gives more than before.

    Raises:
        _Failed: it did not.
    """
    most = part.size
    pieces, again = most > 0, True
    while True:
        try:
            _ask(session, url, part, remote, timeout_s, watch)
            wrong = _mismatch(part.path, remote, watch)
            if wrong is None:
                return
            part.drop()
            if not (pieces and again):
                raise _Failed(wrong, final=True)
            pieces, again, most = False, False, 0  # perhaps put together wrongly: once more, from the start
        except _Failed as failed:  # noqa: PERF203
            if failed.final or failed.retry_after_s or part.size < most + _PROGRESS_BYTES:
                raise
            most, pieces = part.size, True


def _ask(
    session: requests.Session, url: str, part: _Part, remote: Remote, timeout_s: float, watch: Watch
) -> None:
    """One request, from where the part ends; all that comes is kept.

    Raises:
        _Failed: the part is not whole.
    """
    said, have = part.said(), part.size
    whole = remote.size or said["size"]
    if have and have == whole:
        return
    if (whole and have > whole) or not (said["validator"] or remote.checksum):
        have = 0  # nothing would tell whether the rest belongs to this beginning
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and said["validator"]:
        headers["If-Range"] = said["validator"]
    with _told(timeout_s):
        response = session.get(url, headers=headers, stream=True, timeout=timeout_s)
    with response:
        have = _begin(response, have, part, remote)
        said = part.said()
        watch.total(f"download {remote.file}", (said["size"] or remote.size or 0) >> 20, "MB")
        with open(part.path, "r+b" if have else "wb") as file:
            file.truncate(have)
            file.seek(have)
            for block in _blocks(response, timeout_s):
                if not file.tell():
                    _refuse_page(block, response, remote)
                file.write(block)
                watch.update(file.tell() >> 20, url)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if said["size"] and size != said["size"]:
        raise _Failed(f"broke off after {size} of {said['size']} bytes")


def _begin(response: requests.Response, have: int, part: _Part, remote: Remote) -> int:
    """Check what the server answers, write down what it says of the file, and return where it begins."""
    code = response.status_code
    if code == 416:
        part.drop()
        raise _Failed("HTTP 416: the file there is shorter than what had come of it")
    if code not in (200, 206):
        patient = code in (408, 425, 429) or code >= 500
        after_s = (seconds_to_wait(response.headers.get("Retry-After", "")) or 0.0) if patient else 0.0
        asked = f" and asks to wait for {after_s:.0f} s" if after_s else ""
        raise _Failed(f"HTTP {code} {response.reason}{asked}", final=not patient, retry_after_s=after_s)
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    if code == 206:
        stretch = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if stretch is None or int(stretch[1]) != have:
            part.drop()
            raise _Failed(
                f"asked for the bytes from {have}, it sent {response.headers.get('Content-Range')!r}"
            )
        size = int(stretch[2]) if stretch[2] != "*" else (have + size if size is not None else None)
    else:
        have = 0
    if remote.size is not None and size is not None and size != remote.size:
        _refuse_page(b"", response, remote)
        raise _Failed(f"offers a file of {size} bytes, expected {remote.size}", final=True)
    # A weak ETag says that the file means the same, not that its bytes are the same.
    etag = response.headers.get("ETag", "")
    validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    if have and part.said()["validator"] not in (None, validator):
        part.drop()
        raise _Failed("changed while it was being downloaded, and the server did not heed If-Range")
    if not have:
        part.drop()  # before the note: what it says must never be believed of older bytes
    tables.write_json(part.note, {"validator": validator, "size": size})
    return have


def _refuse_page(block: bytes, response: requests.Response, remote: Remote) -> None:
    """Raise where a web page came in place of the file."""
    html = re.match(rb"\s*<(!doctype html|html|head)\b", block[:256], re.IGNORECASE)
    if html or response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Failed(f"sent a web page in place of {remote.file}", final=True)


def _blocks(response: requests.Response, timeout_s: float) -> Iterator[bytes]:
    """The body as it was sent, not decoded: a checksum is of these bytes."""
    with _told(timeout_s):
        stream = response.raw.stream(_NETWORK_BYTES, decode_content=False)
    while True:
        with _told(timeout_s):
            block = next(stream, None)
        if block is None:
            return
        yield block


@contextmanager
def _told(timeout_s: float) -> Iterator[None]:
    """Say what became of a connection, without the libraries' own layers."""
    try:
        yield
    except (requests.Timeout, urllib3.exceptions.TimeoutError) as error:
        raise _Failed(f"said nothing for {timeout_s:g} s") from error
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    ) as error:
        raise _Failed(f"is no address: {error}", final=True) from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise _Failed(f"the connection failed: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """What the system said, below the libraries' own words."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, IncompleteRead):
            return "it broke off before the end that was promised"
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        inner = inner.__cause__ or inner.__context__
    return " ".join(str(error).split())
