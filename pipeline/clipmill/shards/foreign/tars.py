"""The members of a tar by one pass over its headers, with the first bytes of each.

tarfile does as much in two to three times as long, holds on to every member, and takes damage for the end.
The formats are those of POSIX.1-2001 (ustar and pax) and of GNU tar.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
_WINDOW = 8 * BLOCK
"""Read at once: a small member, the header of the next and its first bytes are one request to a far store."""

_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK = b"L", b"K"  # GNU: data of their own, about the member that follows
_PAX, _PAX_GLOBAL = b"x", b"g"
_SPARSE = b"S"  # GNU: its size is not that of a stretch
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders; their size may say something else
_MOST_EXTRA = 1 << 20  # bytes of a name or of pax records: more is damage


class Member(NamedTuple):
    """A file in a tar: its name, where its contents begin and how many bytes they are, and the first of these."""

    name: str
    offset: int
    size: int
    head: bytes


def members(file: BinaryIO) -> Iterator[Member]:
    """The regular files of a tar, in order; `head` has up to 3.5 KiB of the contents, at least 512 bytes if there.

    Args:
        file: a plain tar, open and able to seek; between members others may read from it.

    Raises:
        tarfile.ReadError: the tar is damaged at this point, or ends without its end mark; what stands
            before came whole.
    """
    end = file.seek(0, os.SEEK_END)
    window = Window(file)
    at, name, size = 0, None, None
    while True:
        block = window.read(at, BLOCK)
        header = _header(block, at)
        if header is None:
            return
        kind, said_name, said_size = header
        start = at + BLOCK
        if kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            if said_size > _MOST_EXTRA or start + said_size > end:
                raise tarfile.ReadError(f"ends within what stands at byte {at}")
            extra = window.read(start, said_size)
            if kind == _LONG_NAME:
                name = extra.rstrip(b"\0")
            elif kind == _PAX:
                name, size = _pax(extra, at, name)
            at = start + _whole(said_size)
            continue
        if kind == _SPARSE:
            raise tarfile.ReadError(f"has a sparse member at byte {at}")
        name = said_name if name is None else name
        length = 0 if kind in _NO_DATA else said_size if size is None else size
        if start + length > end:
            raise tarfile.ReadError(
                f"is cut short: {_text(name)} has {length} bytes, {max(end - start, 0)} are there"
            )
        if kind in _REGULAR and not name.endswith(b"/"):
            yield Member(_text(name), start, length, window.read(start, min(length, BLOCK), length))
        at, name, size = start + _whole(length), None, None


class Window:
    """Reads of a file that lie close together, of which several are answered by one."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at, self._data = file, 0, b""

    def read(self, at: int, needed: int, wanted: int | None = None) -> bytes:
        """`needed` bytes from `at` on, fewer at the file's end; up to `wanted` where they are there already."""
        start = at - self._at
        if start < 0 or start + needed > len(self._data):
            self._file.seek(at)
            self._at, self._data, start = at, self._file.read(max(needed, _WINDOW)), 0
        return self._data[start : start + (needed if wanted is None else wanted)]


def _header(block: bytes, at: int) -> tuple[bytes, bytes, int] | None:
    """A header's type, name and size; None where the tar ends in order."""
    if len(block) < BLOCK:
        raise tarfile.ReadError(f"ends at byte {at + len(block)} without the mark of a tar's end")
    if block[0] == 0 and block.count(0) == BLOCK:
        return None
    try:
        stated = int(block[148:156].strip(b" \0"), 8)
        size = _number(block[124:136])
    except ValueError:
        stated, size = -1, -1
    # The checksum counts its own field as eight spaces.
    if size < 0 or stated != sum(block) - sum(block[148:156]) + 8 * 0x20:
        raise tarfile.ReadError(f"has no header of a member at byte {at}")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return block[156:157], name, size


def _number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary for 8 GiB and more."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax(records: bytes, at: int, name: bytes | None) -> tuple[bytes | None, int | None]:
    """The name and the size that pax records give the next member: lines of `length key=value`."""
    size = None
    try:
        while records.strip(b"\0"):
            length = int(records[: records.index(b" ")])
            key, _, value = records[records.index(b" ") + 1 : length - 1].partition(b"=")
            if length < 5 or records[length - 1 : length] != b"\n":
                raise ValueError
            if key == b"path":
                name = value
            elif key == b"size":
                size = int(value)
                if size < 0:
                    raise ValueError
            records = records[length:]
    except ValueError:
        raise tarfile.ReadError(f"has pax records that cannot be read at byte {at}") from None
    return name, size


def _whole(size: int) -> int:
    """Bytes that `size` bytes take in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")
