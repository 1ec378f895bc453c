"""The bytes of shards: the files of one folder on this machine, or of one that fsspec knows (S3, HTTP, GCS, ...)."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from clipmill.errors import ShardError

MOST_OPEN = 512
"""Shards that a process keeps open; never more than half of what it may open at all."""


class ReadFailure(OSError):
    """Bytes that cannot be had: handed back in place of them, or raised where there is one answer only.

    `reason` is a key of `clipmill.types.REASONS`: "missing", "forbidden", "unreadable", "network",
    "timeout", or "corrupt" where the file ends too early.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ReadFailure], tuple[str, str]]:
        """Pickle both arguments, so that it crosses process borders."""
        return type(self), (self.reason, str(self))


class Store(Protocol):
    """The files of one folder. Cheap to pickle and to fork, and for many threads at once: what is opened belongs
    to a process, and is opened when it is first needed."""

    @property
    def place(self) -> str:
        """The folder or URL, without a slash at its end."""

    @property
    def near(self) -> bool:
        """Whether it is a folder of this machine's."""

    @property
    def keeps(self) -> bool:
        """Whether a cache keeps what `fetch` brings, for just the same stretch."""

    def path(self, name: str) -> str:
        """Where a file lies, for messages."""

    def names(self) -> list[str]:
        """Names of the files directly in it, sorted. Raises ShardError where they cannot be listed."""

    def exists(self, name: str) -> bool:
        """Whether a file is there. Raises ShardError where that cannot be found out."""

    def size(self, name: str) -> int:
        """Bytes of a file. Raises ShardError where it is not there, or does not say."""

    def versions(self, names: Sequence[str]) -> list[str]:
        """For each file a short text that changes when the file does. Raises ShardError as `size` does."""

    def local(self, name: str) -> Path:
        """A whole file on this machine: itself, or a copy that is made anew when the file changes.

        Raises ShardError where it is not there or does not come whole.
        """

    def open(self, name: str) -> BinaryIO:
        """A whole file to read and seek in. Raises ReadFailure, which is an OSError, and so does reading it."""

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """Fill at most 1024 buffers with what lies from byte `offset` on; for near stores. Returns the bytes
        read, fewer than fit where the file ends. Raises ReadFailure."""

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | ReadFailure]:
        """The bytes of each (name, offset, length), or why they cannot be had; raises nothing for one of them."""

    def close(self) -> None:
        """Close what this process opened; it is opened again when it is needed."""


def open_store(where: str, *, cache: Path | None = None, settings: dict[str, Any] | None = None) -> Store:
    """The files of a local folder, or of a URL such as s3://bucket/prefix, https://host/path or gs://bucket/prefix.

    Nothing is looked up yet. `cache` is a folder that keeps what `fetch` brings from afar. `settings` are for far
    stores: `timeout_s`, within which a clip's bytes must come, all tries together (30); `cache_bytes`, the most that
    `cache` may hold (all but the last tenth of its disk); all others go to fsspec's file system, as `endpoint_url`
    does to s3fs.

    Raises:
        ConfigError: fsspec does not know the protocol, or the package for it is not installed.
    """
    where = where.removeprefix("file://")
    if "://" not in where:
        return NearStore(where.rstrip("/") or "/")
    from clipmill.stores.far import FarStore
    from clipmill.stores.transport import check_protocol

    check_protocol(where)
    return FarStore(where.rstrip("/"), cache, settings or {})


def cache_folder() -> Path:
    """Where copies are kept: $CLIPMILL_CACHE, else $XDG_CACHE_HOME/clipmill, else ~/.cache/clipmill."""
    if named := os.environ.get("CLIPMILL_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clipmill"


class Descriptor:
    """An open file; closed when the last who reads from it lets go of it, so never under a reader."""

    number = -1

    def __init__(self, path: str, flags: int) -> None:
        try:
            self.number = os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            OPEN_FILES.close("")  # others in this process have as many as it may
            self.number = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenFiles:
    """The files that this process keeps open, of all stores together: those used last, and half of what it may."""

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[str, int], Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._after_fork)

    def get(self, path: str, flags: int = os.O_RDONLY) -> Descriptor:
        """The file, opened where it is not yet; raises OSError."""
        with self._lock:
            if (path, flags) in self._files:
                self._files.move_to_end((path, flags))
                return self._files[path, flags]
        opened = Descriptor(path, flags)
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = MOST_OPEN if allowed == resource.RLIM_INFINITY else min(MOST_OPEN, allowed // 2)
        with self._lock:
            self._files[path, flags] = opened
            dropped = [self._files.popitem(last=False)[1] for _ in range(len(self._files) - most)]
        del dropped  # closed without the lock
        return opened

    def close(self, folder: str) -> None:
        """Let go of the files under a folder."""
        with self._lock:
            mine = [key for key in self._files if key[0].startswith(folder)]
            dropped = [self._files.pop(key) for key in mine]
        del dropped

    def _after_fork(self) -> None:
        # Positioned reads share no state, so a forked process may use its parent's descriptors; not a lock that
        # another thread held.
        self._lock = threading.Lock()


OPEN_FILES = OpenFiles()


class NearStore:
    """The files of a local folder."""

    near, keeps = True, False

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[type[NearStore], tuple[str]]:
        return NearStore, (self.place,)

    def path(self, name: str) -> str:
        """See `Store`."""
        return os.path.join(self.place, name)

    def names(self) -> list[str]:
        """See `Store`."""
        try:
            with os.scandir(self.place) as entries:
                return sorted(entry.name for entry in entries if entry.is_file())
        except OSError as error:
            raise ShardError(f"{self.place}: is no folder that can be read ({error.strerror})") from error

    def exists(self, name: str) -> bool:
        """See `Store`."""
        return os.path.isfile(self.path(name))

    def size(self, name: str) -> int:
        """See `Store`."""
        return self._stat(name).st_size

    def versions(self, names: Sequence[str]) -> list[str]:
        """See `Store`."""
        return [f"{found.st_size}-{found.st_mtime_ns}" for found in map(self._stat, names)]

    def local(self, name: str) -> Path:
        """See `Store`."""
        self._stat(name)
        return Path(self.path(name))

    def open(self, name: str) -> BinaryIO:
        """See `Store`."""
        try:
            return open(self.path(name), "rb")
        except OSError as error:
            raise self._failure(name, error) from error

    def read_into(self, name: str, offset: int, buffers: Sequence[memoryview]) -> int:
        """See `Store`."""
        try:
            file = OPEN_FILES.get(self.path(name))
            return os.preadv(file.number, buffers, offset)
        except OSError as error:
            raise self._failure(name, error) from error

    def fetch(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | ReadFailure]:
        """See `Store`."""
        return [self._fetch(*one) for one in wanted]

    def close(self) -> None:
        """See `Store`."""
        OPEN_FILES.close(os.path.join(self.place, ""))

    def _fetch(self, name: str, offset: int, length: int) -> bytes | ReadFailure:
        try:
            file = OPEN_FILES.get(self.path(name))
            data = os.pread(file.number, length, offset)
        except OSError as error:
            return self._failure(name, error)
        return data if len(data) == length else short(self.path(name), offset, length, len(data))

    def _stat(self, name: str) -> os.stat_result:
        try:
            return os.stat(self.path(name))
        except OSError as error:
            raise ShardError(str(self._failure(name, error))) from error

    def _failure(self, name: str, error: OSError) -> ReadFailure:
        if isinstance(error, FileNotFoundError):
            return ReadFailure("missing", f"{self.path(name)}: is not there")
        return ReadFailure("unreadable", f"{self.path(name)}: cannot be read ({error.strerror})")


def short(path: str, offset: int, length: int, found: int) -> ReadFailure:
    """What a stretch is that the file ends within."""
    return ReadFailure("corrupt", f"{path}: {found} of {length} bytes are there from byte {offset} on")
