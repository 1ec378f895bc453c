"""Get what a dataset is made of: plain files as they are, archives downloaded, checked and unpacked."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clipmill import tables
from clipmill.datasets import Dataset, Remote
from clipmill.datasets.archive import MEDIA_FOLDER, Archived
from clipmill.errors import FetchError, TableError
from clipmill.fetch.http import checksum_of, download
from clipmill.fetch.unpack import NOTE_FILE, unpack
from clipmill.fetch.watch import QUIET, Watch

DOWNLOADS_FOLDER = "downloads"

_MEND = (
    "Give the archive itself with --archive FILE, another address with --mirror URL, "
    "or what you unpacked with --from DIR"
)


def provide(dataset: Dataset, folder: Path, watch: Watch = QUIET) -> None:
    """Get what `dataset` needs under its `folder`, before it is prepared; nothing where it needs nothing.

    Plain files come to lie in `folder/downloads`. An archive is unpacked as `folder/media`,
    unless that very archive already is, and then removed if it was downloaded here.

    Raises:
        FetchError: it cannot be had, is not what it should be, or must not be unpacked.
        OSError: the disk is full or cannot be written.
    """
    downloads = folder / DOWNLOADS_FOLDER
    try:
        for remote in getattr(dataset, "needs", ()):
            if isinstance(dataset, Archived):
                _provide_archive(dataset, remote, folder, watch)
            else:
                download(remote, downloads / remote.file, watch=watch, mend=getattr(dataset, "mend", ""))
    finally:
        with suppress(OSError):  # where it is empty
            downloads.rmdir()


def _provide_archive(dataset: Archived, remote: Remote, folder: Path, watch: Watch) -> None:
    media = folder / MEDIA_FOLDER
    unpacked = _checksum_unpacked(media)
    if dataset.archive is not None:
        archive = dataset.archive
        found = _checked(archive, remote, dataset.no_checksum, watch)
        if found == unpacked:
            return
    else:
        if unpacked is not None and (unpacked == remote.checksum or dataset.no_checksum):
            return
        if dataset.no_checksum:
            remote = replace(remote, size=None, checksum=None)
        archive = download(remote, folder / DOWNLOADS_FOLDER / remote.file, watch=watch, mend=_MEND)
        found = remote.checksum or checksum_of(archive, None, watch)
    note = {"archive": archive.name, "checksum": found}
    unpack(archive, media, note=note, check=dataset.root_in, watch=watch)
    if dataset.archive is None and not dataset.keep_archive:
        archive.unlink()


def _checked(archive: Path, remote: Remote, lenient: bool, watch: Watch) -> str:
    """The checksum of the user's own archive.

    Raises:
        FetchError: it is not there, or not the one it should be.
    """
    if not archive.is_file():
        raise FetchError(f"--archive {archive}: is no file")
    found = checksum_of(archive, remote.checksum, watch)
    if remote.checksum is not None and found != remote.checksum:
        size = archive.stat().st_size
        wrong = (
            f"--archive {archive}: has {size} bytes and checksum {found}; "
            f"expected is {remote.file} with {remote.size} bytes and {remote.checksum}"
        )
        if not lenient:
            raise FetchError(f"{wrong}; --no-checksum takes it as it is")
        watch.say(f"{wrong}; taken as it is, as --no-checksum says")
    return found


def _checksum_unpacked(media: Path) -> str | None:
    """The checksum of the archive that was unpacked as `media`; None: none was."""
    try:
        return str(tables.read_json(media / NOTE_FILE, "checksum")["checksum"])
    except TableError:
        return None
