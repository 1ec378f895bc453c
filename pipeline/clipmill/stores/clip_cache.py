"""What was read from afar, kept on this machine: one sparse file a shard, each clip's bytes where they lie in it."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import warnings
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from clipmill.stores.store import Descriptor, keep_open

_RECORD = struct.Struct("<QQI")  # offset, length, crc32 of the bytes

_STRIDE = 32
"""Bytes of a shard for each byte of its sums. In a tar at least 1024 lie between the begins of two clips, so that
their records never meet; where they do in other files, one clip is fetched anew."""

_SHARE = 0.9
"""Of the disk's free space, where no limit is given."""


class _Kept(NamedTuple):
    """The two files of one shard, by what reads and writes them."""

    bytes: Descriptor
    sums: Descriptor


class ClipCache:
    """Stretches of files, known by (file, offset, length); many threads and processes may fill one folder at once.

    A record stands in the shard's `.sums` at `offset // 32`: it needs no lock, for it is written after the bytes
    in one piece, and where the two do not agree (torn, flipped, not yet there) the bytes are fetched anew. Where
    the limit or the disk is reached, filling stops for good, with one warning; reading goes on.

    `limit` is in bytes of disk, for all of `folder`; None: nine tenths of what is free when filling begins.
    `part` is the folder within it that is this cache's own.
    """

    def __init__(self, folder: Path, part: str, limit: int | None = None) -> None:
        self._folder, self._limit = folder, limit
        self._budget, self._stopped = 0, False
        self._kept = keep_open(partial(_open, folder / part), files=2)

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
        self._kept.cache_clear()

    def _take_room(self, size: int) -> None:
        """Raise OSError where `size` more bytes do not fit. Others fill the folder too: it is counted now and then."""
        if size > self._budget:
            used = sum(map(_bytes_of, self._folder.rglob("*")))
            if self._limit is None:
                self._limit = used + int(_SHARE * shutil.disk_usage(self._folder).free)
            if size > self._limit - used:
                raise OSError(errno.EDQUOT, f"its limit of {self._limit} bytes is reached")
            self._budget = max((self._limit - used) // 4, size)
        self._budget -= size


def _open(part: Path, shard: str, version: str) -> _Kept:
    folder = part / f"{quote(shard, safe='')}.clips"
    folder.mkdir(parents=True, exist_ok=True)
    kept = _Kept(
        *(Descriptor(folder / name, os.O_RDWR | os.O_CREAT) for name in (version, f"{version}.sums"))
    )
    for old in folder.iterdir():
        if old.name not in (version, f"{version}.sums"):  # of a shard that the server has replaced
            old.unlink(missing_ok=True)
    return kept


def _bytes_of(path: Path) -> int:
    """What a file takes of the disk."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:  # another process found its shard replaced
        return 0
