"""A stretch of a file as a file of its own, for decoders that take open files."""

from __future__ import annotations

import io
import os
from typing import Any


class Part(io.RawIOBase):
    """A stretch of an open file as a file of its own, from byte `start` up to `end`."""

    def __init__(self, raw: Any, start: int, end: int) -> None:
        super().__init__()
        self._raw, self._start, self._end, self._at = raw, start, end, 0

    def readinto(self, buffer: Any) -> int:
        """Read what is left, up to the buffer's size."""
        first = self._start + self._at
        data = os.pread(self._raw.fileno(), min(len(buffer), max(self._end - first, 0)), first)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte of the part."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._end - self._start}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        """Byte of the part that is read next."""
        return self._at
