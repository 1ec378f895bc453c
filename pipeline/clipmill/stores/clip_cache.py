"""What was read from afar, kept on this machine: one sparse file a shard, each clip's bytes where they lie in it."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from clipmill.stores.store import OPEN_FILES, Descriptor

_RECORD = struct.Struct("<QQI")  # offset, length, crc32 of the bytes

_STRIDE = 32
"""Bytes of a shard for each byte of its sums. In a tar at least 1024 lie between the begins of two clips, so that
their records never meet; where they do in other files, one clip is fetched anew."""

_LEFT = 0.1
"""Of the disk, where no limit is given: so much of it stays free."""


class _Kept(NamedTuple):
    """The two files of one shard, by what reads and writes them."""

    bytes: Descriptor
    sums: Descriptor


class ClipCache:
    """Stretches of files, known by (file, offset, length); many threads and processes may fill one folder at once.

    A record stands in the shard's `.sums` at `offset // 32`: it needs no lock, for it is written after the bytes
    in one piece, and where the two do not agree (torn, flipped, not yet there) the bytes are fetched anew. Where
    the limit or the disk is reached, filling stops for good, with one warning; reading goes on.

    `limit` is in bytes of disk, for all of `folder`; None: until a tenth of the disk is left.
    `part` is the folder within it that is this cache's own.
    """

    def __init__(self, folder: Path, part: str, limit: int | None = None) -> None:
        self._folder, self._limit = folder, limit
        self._budget, self._stopped = 0, False
        self._part = folder / part
        self._ready: set[tuple[str, str]] = set()

    def read(self, shard: str, version: str, offset: int, length: int) -> bytes | None:
        """The bytes, where they are kept and whole."""
        try:
            kept = self._kept(shard, version)
            record = os.pread(kept.sums.number, _RECORD.size, offset // _STRIDE)
            if len(record) < _RECORD.size:
                return None
            *place, crc = _RECORD.unpack(record)
            if place != [offset, length]:
                return None
            data = os.pread(kept.bytes.number, length, offset)
        except OSError:
            return None
        return data if len(data) == length and zlib.crc32(data) == crc else None

    def write(self, shard: str, version: str, offset: int, data: bytes) -> None:
        """Keep the bytes, if there is room."""
        if self._stopped:
            return
        record = _RECORD.pack(offset, len(data), zlib.crc32(data))
        try:
            self._take_room(len(data))
            kept = self._kept(shard, version)
            for file, what, where in ((kept.bytes, data, offset), (kept.sums, record, offset // _STRIDE)):
                if os.pwrite(file.number, what, where) < len(what):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._stopped = True
            warnings.warn(
                f"{self._folder}: the cache is filled no further ({error.strerror}); clips are read all the same",
                RuntimeWarning,
                stacklevel=2,
            )

    def close(self) -> None:
        """Close the files that this process opened."""
        OPEN_FILES.close(os.path.join(self._part, ""))

    def _kept(self, shard: str, version: str) -> _Kept:
        """The two files of a shard; those of versions that the server has replaced go."""
        folder = self._part / f"{quote(shard, safe='')}.clips"
        names = (version, f"{version}.sums")
        if (shard, version) not in self._ready:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                if old.name not in names:
                    old.unlink(missing_ok=True)
            self._ready.add((shard, version))
        return _Kept(*(OPEN_FILES.get(str(folder / name), os.O_RDWR | os.O_CREAT) for name in names))

    def _take_room(self, size: int) -> None:
        """Raise OSError where `size` more bytes do not fit. Others fill the folder too: it is counted now and then."""
        if size > self._budget:
            if self._limit is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                disk = shutil.disk_usage(self._folder)
                left, why = disk.free - int(_LEFT * disk.total), f"less than {_LEFT:.0%} of its disk is free"
            else:
                left = self._limit - sum(map(_bytes_of, self._folder.rglob("*")))
                why = f"its limit of {self._limit} bytes is reached"
            if size > left:
                raise OSError(errno.EDQUOT, why)
            self._budget = max(left // 4, size)
        self._budget -= size


def _bytes_of(path: Path) -> int:
    """What a file takes of the disk."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # another process found its shard replaced
        return 0
