"""The files of a far folder: many stretches at once within a time limit, whole copies, a cache on this machine."""

from __future__ import annotations

import asyncio
import glob
import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote
from weakref import WeakSet

from clipmill.errors import ShardError
from clipmill.stores.clip_cache import ClipCache
from clipmill.stores.store import ReadFailure, cache_folder, short
from clipmill.stores.transport import Stat, Transport, connect, failure_of
from clipmill.tables import atomic_write

TIMEOUT_S = 30.0
"""Within this a stretch's bytes must come, all tries together. One try has half of it, so that a connection that
went dead costs a clip nothing but time."""

PAUSES_S = (0.1, 0.5)
"""Before the second and the third try."""

_PIECE = 2 << 20  # bytes of a copy in one request
_PIECES = 4  # of them under way at once
_BLOCK = 256 << 10  # bytes that an open file asks for at once
_BLOCKS = 32  # of them that an open file keeps

_T = TypeVar("_T")


class FarStore:
    """The files of a URL that fsspec knows; see `Store` and `open_store`."""

    near = False

    def __init__(self, place: str, cache: Path | None, settings: dict[str, Any]) -> None:
        self.place = place
        self._given = cache, settings
        folder = hashlib.sha256(place.encode()).hexdigest()[:16]
        self._copies = (cache or cache_folder()) / "copies" / folder
        self._settings = dict(settings)
        self._timeout_s = float(self._settings.pop("timeout_s", TIMEOUT_S))
        limit = self._settings.pop("cache_bytes", None)
        self._cache = ClipCache(cache / "clips", folder, limit) if cache else None
        self.keeps = cache is not None
        self._versions: dict[str, str] = {}
        self._transport: Transport | None = None
        self._lock = threading.Lock()
        _stores.add(self)

    def __reduce__(self) -> tuple[type[FarStore], tuple[Any, ...]]:
        return FarStore, (self.place, *self._given)

    def path(self, name: str) -> str:
        """See `Store`."""
        return f"{self.place}/{name}"

    def names(self) -> list[str]:
        """See `Store`."""
        found = self._ask("names", [()])[0]
        if isinstance(found, ReadFailure) or (not found and self.place.startswith("http")):
            why = found if isinstance(found, ReadFailure) else f"{self.place}: its page names no files"
            raise ShardError(f"{why}; name the shards, as in {self.place}/name-{{000000..000012}}.tar")
        return found

    def exists(self, name: str) -> bool:
        """See `Store`."""
        found = self._stats([name])[0]
        if isinstance(found, ReadFailure) and found.reason != "missing":
            raise ShardError(str(found))
        return isinstance(found, Stat)

    def size(self, name: str) -> int:
        """See `Store`."""
        return _sure(self._stats([name])[0]).size

    def versions(self, names: Sequence[str]) -> list[str]:
        """See `Store`."""
        return [_sure(stat).version for stat in self._stats(names)]

    def local(self, name: str) -> Path:
        """See `Store`."""
        stat = _sure(self._stats([name])[0])
        # Under its own name, which readers go by; but an index may come from anyone: no name leads out of the folder.
        path = self._copies / stat.version / quote(name, safe="")
        if not path.is_file():
            try:
                self._copy(name, stat, path)
            except OSError as error:
                raise ShardError(
                    f"{path}: no copy of {self.path(name)} can be made there ({error.strerror}); "
                    f"{'--cache' if self.keeps else 'CLIPMILL_CACHE'} names another folder"
                ) from error
            for old in self._copies.glob(f"*/{glob.escape(path.name)}"):
                if old != path:
                    old.unlink(missing_ok=True)
        return path

    def open(self, name: str) -> BinaryIO:
        """See `Store`."""

        def read(offset: int, length: int) -> bytes:
            found = self._stretches([(name, offset, length)])[0]
            if isinstance(found, ReadFailure):
                raise found
            return found

        stat = self._stats([name])[0]
        if isinstance(stat, ReadFailure):
            raise stat
        return io.BufferedReader(_FarFile(stat.size, read))

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Not for far stores: `fetch` has many stretches under way at once."""
        raise NotImplementedError(f"{self.path(name)}: fetch it")

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | ReadFailure]:
        """See `Store`. What the cache has is not asked for; which version of a file counts is asked once a process."""
        if self._cache is None:
            return self._stretches(wanted)
        gone = self._find_versions({name for name, _, _ in wanted})
        found: list[bytes | ReadFailure | None] = [
            gone.get(name) or self._cache.read(name, self._versions[name], offset, length)
            for name, offset, length in wanted
        ]
        missing = [place for place, data in enumerate(found) if data is None]
        for place, data in zip(missing, self._stretches([wanted[at] for at in missing]), strict=True):
            found[place] = data
            if isinstance(data, bytes):
                name, offset, _ = wanted[place]
                self._cache.write(name, self._versions[name], offset, data)
        return [data for data in found if data is not None]

    def close(self) -> None:
        """See `Store`."""
        with self._lock:
            transport, self._transport = self._transport, None
        if transport:
            transport.close()
        if self._cache:
            self._cache.close()

    def _find_versions(self, names: set[str]) -> dict[str, ReadFailure]:
        """See to it that each name has its version; returns those that cannot."""
        new = sorted(names - self._versions.keys())
        stats = dict(zip(new, self._stats(new), strict=True))
        self._versions |= {name: stat.version for name, stat in stats.items() if isinstance(stat, Stat)}
        return {name: stat for name, stat in stats.items() if isinstance(stat, ReadFailure)}

    def _copy(self, name: str, stat: Stat, path: Path) -> None:
        with atomic_write(path) as file:
            parts = [(name, start, min(_PIECE, stat.size - start)) for start in range(0, stat.size, _PIECE)]
            for first in range(0, len(parts), _PIECES):
                for data in self._stretches(parts[first : first + _PIECES]):
                    file.write(_sure(data))
            if self._stats([name]) != [stat]:
                raise ShardError(
                    f"{self.path(name)}: was replaced while it was read; the same command reads it anew"
                )

    def _stats(self, names: Sequence[str]) -> list[Stat | ReadFailure]:
        return self._ask("stat", [(name,) for name in names])

    def _stretches(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | ReadFailure]:
        return [
            short(self.path(name), offset, length, len(data))
            if isinstance(data, bytes) and len(data) < length
            else data
            for (name, offset, length), data in zip(wanted, self._ask("cat", wanted), strict=True)
        ]

    def _ask(self, method: str, asks: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The transport's answers, or a ReadFailure for each that did not come; all are under way at once."""
        transport = self._connected()

        async def together() -> list[Any]:
            return await asyncio.gather(*(self._answer(transport, method, ask) for ask in asks))

        return asyncio.run_coroutine_threadsafe(together(), transport.loop).result()

    async def _answer(self, transport: Transport, method: str, ask: tuple[Any, ...]) -> Any:
        """One answer, within the time limit; what may pass is asked again."""
        path = self.path(ask[0]) if ask else self.place
        failure: ReadFailure | None = None

        async def tries() -> Any:
            nonlocal failure
            for pause_s in (*PAUSES_S, None):
                try:
                    return await asyncio.wait_for(getattr(transport, method)(*ask), self._timeout_s / 2)
                except Exception as error:
                    failure = failure_of(error, path)
                if pause_s is None or failure.reason not in ("network", "timeout"):
                    break
                await asyncio.sleep(pause_s)
            return failure

        async with transport.at_once:  # waiting for one's turn is not the server's fault
            try:
                await asyncio.wait_for(transport.prepare(), TIMEOUT_S)
                return await asyncio.wait_for(tries(), self._timeout_s)
            except Exception as error:
                return failure or failure_of(error, path)

    def _connected(self) -> Transport:
        with self._lock:
            if self._transport is None:
                try:
                    self._transport = connect(self.place, self._settings)
                except OSError as error:
                    raise ShardError(str(failure_of(error, self.place))) from error
            return self._transport


class _FarFile(io.RawIOBase):
    """A far file of `size` bytes to seek and read in; `read` gives the bytes from an offset on, of a length."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._at = size, 0
        self._block = lru_cache(_BLOCKS)(lambda start: read(start, min(_BLOCK, size - start)))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        within = self._at % _BLOCK
        part = self._block(self._at - within)[within : within + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _sure(found: _T | ReadFailure) -> _T:
    if isinstance(found, ReadFailure):
        raise ShardError(str(found)) from found
    return found


_stores: WeakSet[FarStore] = WeakSet()
_inherited: list[Transport | None] = []


def _after_fork() -> None:
    for store in _stores:
        # Kept for good: letting go of it would close connections that the parent still reads from, for both
        # processes' event loops share one epoll.
        _inherited.append(store._transport)
        store._transport, store._lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
