"""Where a clip's bytes are: a file, or a part of an archive that is read in place and never unpacked.

    dog/1.wav                               a file, relative to the dataset's media root
    /data/dog/1.wav                         a file anywhere
    /data/00.tar#bytes=1024+34567           34567 bytes from byte 1024 of a tar: one member's contents
    /data/00.parquet#row=17&column=audio    one row (from 0) of a Parquet column of bytes;
                                            with &bytes=34567, only while it is that long

A column is binary, or a struct whose field `bytes` is. A file that bears the whole of
such a name is that file: what exists wins over what can be read into its name.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmill.errors import DecodeError

if TYPE_CHECKING:
    import pyarrow as pa

_PART = re.compile(r"(.+)#(?:bytes=(\d+)\+(\d+)|row=(\d+)&column=([^#&]+?)(?:&bytes=(\d+))?)", re.DOTALL)
_CACHE_BYTES = 256 << 20
"""Decoded row groups that a process keeps, beside the last: they are read whole, and clips come in any order."""

_AGAIN = "the archive has changed since it was adopted; fetch again with --recheck and --from"


def tar_part(archive: str, offset: int, length: int) -> str:
    """The source that is `length` bytes from byte `offset` of a tar."""
    return f"{archive}#bytes={offset}+{length}"


def row_parts(archive: str, rows: pa.Array, column: str) -> pa.Array:
    """The sources that are these rows (integers) of a Parquet file's column."""
    import pyarrow as pa
    import pyarrow.compute as pc

    before, after = pa.scalar(f"{archive}#row="), pa.scalar(f"&column={column}")
    return pc.binary_join_element_wise(before, rows.cast(pa.string()), after, "")


def sized(source: str, size: int | None) -> str:
    """A source that will be refused when it has another size; tars tell by themselves."""
    row = "#row=" in source and "&bytes=" not in source and size is not None
    return f"{source}&bytes={size}" if row else source


def in_place_order(sources: pa.ChunkedArray) -> pa.Array:
    """The indices that sort sources by archive and then by place in it, so that each is read once and forwards."""
    import pyarrow as pa
    import pyarrow.compute as pc

    place = pc.extract_regex(sources, r"(?s)^(?P<archive>.*)#(?:bytes|row)=(?P<number>\d{1,18})[+&][^#]*$")
    number = pc.cast(pc.struct_field(place, "number"), pa.int64())
    archive = pc.coalesce(pc.struct_field(place, "archive"), sources)
    order = [("archive", "ascending"), ("number", "ascending")]
    return pc.sort_indices(pa.table({"archive": archive, "number": number}), order)


@contextmanager
def opened(media_root: Path, source: str) -> Iterator[Path]:
    """A path that every decoder can open, as long as the context lasts.

    A file is its own path, there or not. A part of an archive is put into an anonymous file
    in memory, which other processes of this user can open too.

    Raises:
        DecodeError: of a part: missing, where the archive is not there; unreadable, where it
            cannot be read, is shorter than the part, or holds something else now.
    """
    part = _parsed(media_root, source)
    if part is None:
        yield media_root / source
        return
    descriptor = os.memfd_create("clip")
    path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(_contents(*part))
        yield path
    except DecodeError as error:
        # The path in memory is another one each time, and tells a reader nothing.
        raise DecodeError(error.reason, str(error).replace(str(path), source)) from error
    finally:
        os.close(descriptor)


def is_there(media_root: Path, source: str, size: int | None) -> bool:
    """Whether a source still is what it was, as far as its size tells.

    A file must have `size` bytes (None: any); a part of a tar, its header before it; a row of
    a Parquet file that many bytes, for which its row group is read.
    """
    part = _parsed(media_root, source)
    try:
        if part is None:
            found = (media_root / source).stat().st_size
            return size is None or found == size
        archive, match = part
        if match[2]:
            offset, length = int(match[2]), int(match[3])
            with open(archive, "rb") as file:
                file.seek(max(offset - tarfile.BLOCKSIZE, 0))
                head = file.read(tarfile.BLOCKSIZE)
            return _header_length(head) == length and archive.stat().st_size >= offset + length
        if size is None:
            return int(match[4]) < (_row_ends(archive) or [0])[-1]
        return len(_row(archive, int(match[4]), match[5])) == size
    except (OSError, DecodeError):
        return False


def _parsed(media_root: Path, source: str) -> tuple[Path, re.Match[str]] | None:
    match = _PART.fullmatch(source)
    if match is None or (media_root / source).exists():
        return None
    return media_root / match[1], match


def _contents(archive: Path, part: re.Match[str]) -> memoryview:
    """The bytes of a part."""
    try:
        if part[2]:
            return _member(archive, int(part[2]), int(part[3]))
        value = _row(archive, int(part[4]), part[5])
        if part[6] and len(value) != int(part[6]):
            raise DecodeError(
                "unreadable", f"{archive}: row {part[4]} has {len(value)} bytes, not {part[6]}: {_AGAIN}"
            )
        return value
    except FileNotFoundError:
        raise DecodeError("missing", f"{archive}: no such file") from None
    except OSError as error:
        raise DecodeError("unreadable", f"{archive}: {error.strerror or error}") from error


def _member(archive: Path, offset: int, length: int) -> memoryview:
    """A tar member's contents; the header before them must still say their length."""
    with open(archive, "rb") as file:
        file.seek(max(offset - tarfile.BLOCKSIZE, 0))
        data = memoryview(file.read(tarfile.BLOCKSIZE + length))
    if _header_length(bytes(data[: tarfile.BLOCKSIZE])) != length:
        raise DecodeError("unreadable", f"{archive}: no member of {length} bytes at byte {offset}: {_AGAIN}")
    found = len(data) - tarfile.BLOCKSIZE
    if found < length:
        raise DecodeError(
            "unreadable", f"{archive}: {length} bytes from byte {offset} wanted, {found} there: {_AGAIN}"
        )
    return data[tarfile.BLOCKSIZE :]


def _header_length(block: bytes) -> int | None:
    """The length of the member whose header this is; None: it is none."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None


_groups: OrderedDict[tuple[Any, ...], pa.ChunkedArray] = OrderedDict()
_bounds: OrderedDict[tuple[Any, ...], list[int]] = OrderedDict()


def _row(archive: Path, row: int, column: str) -> memoryview:
    """The bytes in a row of a Parquet column, by way of the row groups kept."""
    import pyarrow as pa

    try:
        ends = _row_ends(archive)
        group = next((place for place, end in enumerate(ends) if row < end), None)
        if group is None:
            raise DecodeError(
                "unreadable", f"{archive}: row {row} wanted, {ends[-1] if ends else 0} there: {_AGAIN}"
            )
        values = _row_group(archive, (*_state_of(archive), group, column))
        value = values[row - (ends[group - 1] if group else 0)]
    except (pa.ArrowException, KeyError) as error:
        text = str(error).strip("'")
        raise DecodeError("unreadable", f"{archive}: cannot be read as Parquet: {text}") from error
    if not value.is_valid:
        raise DecodeError("missing", f"{archive}: row {row} holds no bytes in column {column!r}")
    return memoryview(value.as_buffer())


def _kept(cache: OrderedDict[Any, Any], name: Any, make: Any, most: int) -> Any:
    if name not in cache:
        cache[name] = make()
    cache.move_to_end(name)
    while len(cache) > most:
        cache.popitem(last=False)
    return cache[name]


def _state_of(archive: Path) -> tuple[str, int, int]:
    status = archive.stat()
    return str(archive), status.st_mtime_ns, status.st_size


def _row_ends(archive: Path) -> list[int]:
    """How many rows there are up to the end of each row group, from the cache or read now.

    Raises:
        DecodeError: the file is no Parquet.
    """
    return _kept(_bounds, _state_of(archive), lambda: _read_row_ends(archive), 64)


def _read_row_ends(archive: Path) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = pq.read_metadata(archive)
    except pa.ArrowException as error:
        raise DecodeError("unreadable", f"{archive}: cannot be read as Parquet: {error}") from error
    ends = [0]
    for group in range(facts.num_row_groups):
        ends.append(ends[-1] + facts.row_group(group).num_rows)
    return ends[1:]


def _row_group(archive: Path, name: tuple[Any, ...]) -> pa.ChunkedArray:
    """A row group of one column as binary, from the cache or read now; the oldest make room."""
    if name not in _groups:
        _groups[name] = _read_row_group(archive, *name[-2:])
        while len(_groups) > 1 and sum(group.nbytes for group in _groups.values()) > _CACHE_BYTES:
            _groups.popitem(last=False)
    _groups.move_to_end(name)
    return _groups[name]


def _read_row_group(archive: Path, group: int, column: str) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    # Not mapped into memory: a file cut short under a map ends the whole process.
    with pq.ParquetFile(archive, pre_buffer=False) as file:
        kind = file.schema_arrow.field(column).type
        struct = pa.types.is_struct(kind)
        read = f"{column}.bytes" if struct else column
        values = file.read_row_group(group, columns=[read], use_threads=False).column(column)
    if struct:
        values = pc.struct_field(values, "bytes")
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        raise DecodeError("unreadable", f"{archive}: column {column!r} holds {kind}; bytes are needed")
    return values
