"""One folder that fsspec knows, as coroutines on its loop: which files there are, what each is, stretches of them."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from clipmill.errors import ConfigError
from clipmill.stores.store import ReadFailure

AT_ONCE = 64
"""Requests that one process has under way to one folder; more wait for their turn."""

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp", "https": "aiohttp", "gs": "gcsfs", "gcs": "gcsfs"}
"""What fsspec needs for a protocol."""

_CLOSE_S = 5.0
_VERSIONS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "last_modified", "mtime", "created")
"""What file systems call that which changes with a file, best first."""


class Stat(NamedTuple):
    """Bytes of a file, and a text that changes when the file does."""

    size: int
    version: str


def check_protocol(url: str) -> None:
    """Raise ConfigError where fsspec does not know the URL's protocol, or the package for it is not installed."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        mend = f"`pip install {PACKAGES[protocol]}`" if protocol in PACKAGES else str(error)
        raise ConfigError(f"{url}: the package that reads {protocol}:// is not installed; {mend}") from error
    except ValueError as error:
        raise ConfigError(
            f"{url}: fsspec knows no protocol {protocol}://; allowed are a folder, {', '.join(PACKAGES)}, "
            "and what else `fsspec.available_protocols()` lists"
        ) from error


class Transport:
    """One folder, in one process.

    Attributes:
        loop: the event loop that its coroutines must run on.
        at_once: held by each request while it is under way.
    """

    def __init__(self, place: str, settings: dict[str, Any]) -> None:
        import fsspec
        import fsspec.asyn

        self.fs, root = fsspec.core.url_to_fs(place, **self._options(place.partition("://")[0], settings))
        self.root = root.rstrip("/")
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1  # tries are counted in one place, not in three
        self.loop = fsspec.asyn.get_loop()
        self.at_once = asyncio.Semaphore(AT_ONCE)

    @staticmethod
    def _options(protocol: str, settings: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if PACKAGES.get(protocol) == "s3fs":
            options["config_kwargs"] = {"max_pool_connections": AT_ONCE, "retries": {"max_attempts": 0}}
        if PACKAGES.get(protocol) == "aiohttp":
            options["client_kwargs"] = {"trust_env": True}  # proxies, as requests and S3 heed them
        for name, value in settings.items():
            options[name] = {**options[name], **value} if isinstance(options.get(name), dict) else value
        return options

    async def prepare(self) -> None:
        """Make the client, once; for S3 that is half a second of computing, which no server is to blame for."""
        if hasattr(self.fs, "set_session"):
            await self.fs.set_session()

    async def stat(self, name: str) -> Stat:
        """Size and version of a file; raises what the file system does."""
        found = await self._call("info", f"{self.root}/{name}")
        if found["type"] != "file" or found.get("size") is None:
            raise FileNotFoundError(f"a {found['type']} without a size")
        mark = next((found[key] for key in _VERSIONS if found.get(key)), "")
        return _stat(found["size"], mark)

    async def cat(self, name: str, offset: int, length: int) -> bytes:
        """A stretch of a file, cut off where the file ends; raises what the file system does."""
        try:
            found = await self._call("cat_file", f"{self.root}/{name}", start=offset, end=offset + length)
        except OSError as error:
            if _status(error) == 416:  # all of it lies behind the file's end
                return b""
            raise
        if len(found) > length:
            raise _no_ranges()
        return found

    async def names(self) -> list[str]:
        """Names of the files directly in the folder; raises what the file system does."""
        found = await self._call("ls", self.root, detail=True)
        start = f"{self.root}/"
        names = (entry["name"].removeprefix(start) for entry in found if entry["type"] == "file")
        return sorted(name for name in names if name and "/" not in name)

    def close(self) -> None:
        """Close the connections: fsspec itself would when the garbage collector comes by."""
        for session in (getattr(self.fs, name, None) for name in ("_session", "_s3")):
            if session is not None:
                asyncio.run_coroutine_threadsafe(session.close(), self.loop).result(_CLOSE_S)

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if self.fs.async_impl:
            return await getattr(self.fs, f"_{method}")(*args, **kwargs)
        return await asyncio.to_thread(getattr(self.fs, method), *args, **kwargs)


class Http(Transport):
    """A folder of a web server. fsspec's own `_info` calls every failure "not found", and its `_cat_file` takes
    a whole shard for an answer, so this asks itself, by fsspec's session."""

    def __init__(self, place: str, settings: dict[str, Any]) -> None:
        super().__init__(place, settings)
        self._marks: dict[str, str] = {}

    async def stat(self, name: str) -> Stat:
        """See `Transport`: by a request for the first byte, whose answer says of how many it is one."""
        async with await self._get(name, 0, 1) as answer:
            if answer.status == 416:  # an empty file has no first byte
                return _stat(0, "")
            answer.raise_for_status()
            whole = answer.headers.get("Content-Range", "").rpartition("/")[2]
            size = answer.content_length if answer.status == 200 else int(whole) if whole.isdigit() else None
            if size is None:
                raise ReadFailure("unreadable", "the server does not say how long it is")
            return _stat(size, next((answer.headers[key] for key in _VERSIONS if key in answer.headers), ""))

    async def cat(self, name: str, offset: int, length: int) -> bytes:
        """See `Transport`; an answer with the whole file is right only where that was asked for."""
        async with await self._get(name, offset, length) as answer:
            if answer.status == 416:
                return b""
            answer.raise_for_status()
            if answer.status != 206 and (offset, length) != (0, answer.content_length):
                raise _no_ranges()
            mark = next((answer.headers[key] for key in _VERSIONS if key in answer.headers), "")
            if self._marks.setdefault(name, mark) != mark:
                raise ReadFailure("corrupt", "was replaced on the server since it was first read")
            return await answer.read()

    async def names(self) -> list[str]:
        """See `Transport`: what the links of the folder's page name."""
        start = f"{self.root}/"
        found = {link.removeprefix(start) for link in await self._call("ls", start, detail=False)}
        return sorted(unquote(name) for name in found if name and not set("/?#") & set(name))

    async def _get(self, name: str, offset: int, length: int) -> Any:
        session = await self.fs.set_session()
        ask = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        given = {**self.fs.kwargs, "headers": {**self.fs.kwargs.get("headers", {}), **ask}}
        return await session.get(self.fs.encode_url(f"{self.root}/{quote(name)}"), **given)


def connect(place: str, settings: dict[str, Any]) -> Transport:
    """The transport for a URL; nothing is asked yet."""
    return (Http if place.startswith(("http://", "https://")) else Transport)(place, settings)


def failure_of(error: Exception, path: str) -> ReadFailure:
    """What an exception of any file system comes to."""
    if isinstance(error, ReadFailure):
        return ReadFailure(error.reason, f"{path}: {error}")
    status, kinds = _status(error), type(error).__mro__
    said = f"HTTP {status}" if status else str(error) or type(error).__name__
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return ReadFailure("missing", f"{path}: is not there")
    if status in (401, 403) or isinstance(error, PermissionError) or "Credentials" in kinds[0].__name__:
        return ReadFailure(
            "forbidden", f"{path}: the server refuses it ({said}); credentials come from the environment"
        )
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in kinds[0].__name__:
        return ReadFailure("timeout", f"{path}: took longer than the time limit")
    theirs = any(
        kind.__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore") for kind in kinds
    )
    passing = (
        status in (408, 429) or status >= 500 if status else theirs or isinstance(error, ConnectionError)
    )
    return ReadFailure("network" if passing else "unreadable", f"{path}: {said}")


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of aiohttp, botocore (by way of s3fs), gcsfs or adlfs."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    # Only the error's own: within a connection that broke off, aiohttp has a "400" that no server sent.
    numbers = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((number for number in numbers if isinstance(number, int)), None)


def _stat(size: int, mark: object) -> Stat:
    return Stat(int(size), hashlib.sha256(f"{size} {mark}".encode()).hexdigest()[:16])


def _no_ranges() -> ReadFailure:
    return ReadFailure(
        "unreadable",
        "the server sends the whole file where a part was asked for; copy the shards to this machine",
    )
