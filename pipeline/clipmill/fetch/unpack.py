"""Unpack a zip or a tar that a stranger made: all of it, or nothing.

Only regular files and folders are taken. A member that would land anywhere else, a link, a
device, a name that stands twice, an encrypted or a damaged member end it, and so does more
than an archive of this size can hold; nothing of it then stays.
"""

from __future__ import annotations

import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, Any

from clipmill import tables
from clipmill.errors import FetchError
from clipmill.fetch.http import BLOCK_BYTES
from clipmill.fetch.watch import QUIET, Watch

NOTE_FILE = ".unpacked.json"
"""In the folder: what was unpacked there. A folder without it is not one of ours, or not whole."""

MAX_MEMBERS = 2_000_000
MAX_RATIO = 100
"""No recording packs to a hundredth; digital silence does, which the free bytes below are for."""

_FREE_BYTES = 64 << 20
_MAX_HEADER_BYTES = 1 << 20
_READ_WHOLE = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Members that are about other members: tarfile reads them into memory."""


@dataclass
class _Budget:
    """What an archive may still unpack to."""

    members: int
    bytes: int
    most: int

    def take(self, size: int = 0, members: int = 0) -> None:
        self.bytes -= size
        self.members -= members
        if self.bytes < 0:
            raise FetchError(f"unpacks to more than {self.most} bytes, too much for an archive of its size")
        if self.members < 0:
            raise FetchError(f"holds more than {MAX_MEMBERS} files")


def unpack(
    archive: Path,
    dest: Path,
    *,
    max_bytes: int | None = None,
    note: dict[str, Any] | None = None,
    check: Callable[[Path], object] = lambda folder: None,
    watch: Watch = QUIET,
) -> Path:
    """Unpack `archive` as the folder `dest`, in the place of what was there.

    It is unpacked beside `dest` and renamed at the end, so `dest` is whole or untouched;
    what a killed run left is removed by the next. `max_bytes`: the most that may come out
    (a hundred times the archive's own size, where None). `note` is kept in `dest` as
    `NOTE_FILE`. `check` is given the whole of it before it takes its place, and raises what
    is wrong with it. Members that only a Mac's Finder wants are left out.

    Raises:
        FetchError: the archive is damaged, encrypted, no zip or tar, or does what none should.
        OSError: the disk is full or cannot be written.
    """
    size = archive.stat().st_size
    most = max_bytes if max_bytes is not None else _FREE_BYTES + MAX_RATIO * size
    fresh, stale = dest.with_name(f".{dest.name}.unpacking"), dest.with_name(f".{dest.name}.old")
    for folder in (fresh, stale):
        shutil.rmtree(folder, ignore_errors=True)
    fresh.mkdir(parents=True)
    watch.total(f"unpack {archive.name}", max(size >> 20, 1), "MB")
    try:
        with open(archive, "rb") as file, _told(archive):
            taken = _zip if file.read(4) in (b"PK\x03\x04", b"PK\x05\x06") else _tar
            file.seek(0)
            taken(file, fresh, _Budget(MAX_MEMBERS, most, most), watch)
            if not any(fresh.iterdir()):
                raise FetchError("holds no files")
        check(fresh)
        tables.write_json(fresh / NOTE_FILE, note or {})
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if dest.exists():
        dest.rename(stale)
    fresh.rename(dest)
    shutil.rmtree(stale, ignore_errors=True)
    return dest


@contextmanager
def _told(archive: Path) -> Iterator[None]:
    """Name the archive in what is wrong with it."""
    try:
        yield
    except FetchError as error:
        raise FetchError(f"{archive}: {error}; nothing of it was unpacked") from None
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        LZMAError,
        EOFError,
        NotImplementedError,
        RecursionError,
        ValueError,
        OverflowError,
    ) as error:
        why = (str(error) or "it ends too soon").splitlines()[0].rstrip(":")
        raise FetchError(
            f"{archive}: is damaged, or no zip or tar: {why}; nothing of it was unpacked"
        ) from error


class _Header(tarfile.TarInfo):
    """Tar headers, with the two checks that tarfile does not make."""

    ended = False

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse a header; note the end mark, and refuse a header that would fill the memory."""
        try:
            made = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            cls.ended = True
            raise
        if made.size < 0:
            raise FetchError(f"holds a member of {made.size} bytes")
        if made.size > _MAX_HEADER_BYTES and made.type in _READ_WHOLE:
            raise FetchError(f"holds a header of {made.size} bytes")
        return made


def _tar(file: IO[bytes], into: Path, budget: _Budget, watch: Watch) -> None:
    # A class of its own for each archive: `ended` is told of this one alone.
    header = type("_OneHeader", (_Header,), {})
    with tarfile.open(fileobj=file, mode="r:*", tarinfo=header) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
            if member.size < 0 or member.issparse():  # a size can be told anew by an extended header
                raise FetchError(f"{member.name!r} is sparse, or of negative size")
            budget.take(member.size, members=1)
            path = _place(member.name)
            if path is None:
                continue
            if member.isdir():
                _make_folder(into, path)
            elif member.isreg():
                source = tar.extractfile(member)
                assert source is not None
                _write(source, into, path, member.size, None)
            else:
                kind = "a link" if member.issym() or member.islnk() else "a device, pipe or the like"
                raise FetchError(f"{member.name!r} is {kind}, and only files and folders are unpacked")
            watch.update(file.tell() >> 20, "")
        if not header.ended:  # type: ignore[attr-defined]
            raise FetchError("is damaged: it ends, or cannot be read, before its end mark")


def _zip(file: IO[bytes], into: Path, budget: _Budget, watch: Watch) -> None:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            budget.take(members=1)
            path = _place(member.filename)
            if path is None:
                continue
            mode = member.external_attr >> 16
            if member.flag_bits & 0x1:
                raise FetchError(f"{member.filename!r} is encrypted; unpack it yourself and give --from DIR")
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "a link" if stat.S_ISLNK(mode) else "a device, pipe or the like"
                raise FetchError(f"{member.filename!r} is {kind}, and only files and folders are unpacked")
            if member.is_dir():
                _make_folder(into, path)
                continue
            with archive.open(member) as source:
                _write(source, into, path, member.file_size, budget)
            watch.update(file.tell() >> 20, "")


def _place(name: str) -> PurePosixPath | None:
    """Where a member goes, below the folder; None: it is not wanted.

    Raises:
        FetchError: it would lead out.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise FetchError(f"{name!r} would be written outside its folder")
    junk = any(part in ("__MACOSX", ".DS_Store") or part.startswith("._") for part in path.parts)
    return None if junk or not path.parts else path


def _make_folder(into: Path, path: PurePosixPath) -> None:
    try:
        (into / path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FetchError(f"{str(path)!r} is a folder in it, and a file too") from None


def _write(source: IO[bytes], into: Path, path: PurePosixPath, size: int, budget: _Budget | None) -> None:
    _make_folder(into, path.parent)
    written = 0
    try:
        with open(into / path, "xb") as file:
            while block := source.read(BLOCK_BYTES):
                if budget is not None:
                    budget.take(len(block))
                written += file.write(block)
    except FileExistsError:
        raise FetchError(f"{str(path)!r} stands in it twice, or differs in case alone from another") from None
    if written != size:
        raise FetchError(f"is damaged: {str(path)!r} holds {written} of {size} bytes")
