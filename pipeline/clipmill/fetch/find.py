"""Media already on disk, found by name: files, members of tars, rows of Parquet files; nothing is decoded here."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill.errors import FetchError
from clipmill.fetch.others import dataset_of
from clipmill.sources import row_parts, tar_part
from clipmill.types import SOUND_SUFFIXES

NAMES = "ID.ext, YID.ext, ID_START.ext, ID_START_END.ext (s or ms), 'Title [ID].ext', Title-ID.ext, KEY.ext"
"""The names that are known, for messages; ID is the video's, of 11 characters."""

KINDS = ("key", "stretch", "start", "id")
"""What a name agrees with, the most telling first: the clip's key; start and end; start alone; the video alone."""

_ID, _TIME = "[A-Za-z0-9_-]{11}", r"\d+(?:\.\d+)?"
# An id may begin with Y or '-' and hold '_': its length alone tells where it ends.
_NAME = rf"^Y?(?P<id>{_ID})(?:[_-](?P<start>{_TIME})(?:[_-](?P<end>{_TIME}))?)?$"
_TITLE = rf"(?s)^.*(?:\[(?P<new>{_ID})\]|-(?P<old>{_ID}))$"

_AT_ONCE = 1 << 18
"""Names looked up together: what is not wanted is dropped before the next are read."""

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z")
_CLOSE_S = 0.0005


@dataclass
class Found:
    """What the folders hold of the clips wanted.

    `media`: a row for each source found: `key`, `source` (absolute; see `clipmill.sources`),
    `kind`, one of `KINDS`, and `turn`: 0 for the source of the most telling name (then the first
    in order), 1 for the one to take if that is unfit, and so on. `seen`: names looked at.
    `duplicates`: clips that several sources could be. `warnings`:
    what could not be read. `barren`: folders that hold nothing wanted.
    """

    media: pa.Table
    seen: int = 0
    duplicates: int = 0
    warnings: list[str] = field(default_factory=list)
    barren: list[str] = field(default_factory=list)


def find_media(dirs: Sequence[Path], wanted: pa.Table) -> Found:
    """Look through each folder once for sources of the wanted clips.

    Args:
        dirs: folders of sound files, of tars of them, and of Parquet files with the columns
            `video_id` and `audio`, however deep; nothing in them is decoded.
        wanted: columns `key`, `start_s`, `end_s` and `group` (the video's id), as in a manifest.

    Raises:
        FetchError: one of `dirs` is no folder.
    """
    for folder in dirs:
        if not folder.is_dir():
            raise FetchError(
                f"--from {folder}: is no folder; name one that holds media, tars or Parquet files"
            )
    wanted = wanted.select(["key", "start_s", "end_s", "group"]).combine_chunks()
    found, parts = Found(_no_candidates()), []
    for folder in dirs if wanted.num_rows else ():
        before, example = found.seen, ""
        matched = 0
        for stems, sources in _batched(_scan(folder.resolve(), found.warnings)):
            found.seen += len(stems)
            example = example or ", ".join(f"{stem!r}" for stem in stems[:3].to_pylist())
            parts.append(_candidates(stems, sources, wanted))
            matched += parts[-1].num_rows
        if not matched:
            said = f"{found.seen - before} names seen, such as {example}" if example else "no sound files"
            found.barren.append(
                f"--from {folder}: holds none of the clips still wanted ({said}); known are {NAMES}"
            )
    found.media, found.duplicates = _in_turn(pa.concat_tables([_no_candidates(), *parts]))
    return found


def _no_candidates() -> pa.Table:
    return pa.table(
        {
            "key": pa.array([], pa.string()),
            "source": pa.array([], pa.string()),
            "rank": pa.array([], pa.int8()),
        }
    )


Names = tuple[pa.Array, pa.Array]
"""Names without their suffix, and the source that each stands for."""


def _batched(scanned: Iterator[Names]) -> Iterator[Names]:
    """Few large batches: a look-up among two million clips costs the same for one name as for many."""
    stems: list[pa.Array] = []
    sources: list[pa.Array] = []
    for some_stems, some_sources in scanned:
        stems.append(some_stems)
        sources.append(some_sources)
        if sum(map(len, stems)) >= _AT_ONCE:
            yield pa.concat_arrays(stems), pa.concat_arrays(sources)
            stems, sources = [], []
    if stems:
        yield pa.concat_arrays(stems), pa.concat_arrays(sources)


def _scan(root: Path, warnings: list[str]) -> Iterator[Names]:
    """Every sound file, tar member and Parquet row below a folder; links to folders are followed, each once."""
    folders, seen = [str(root)], set()
    archives: list[str] = []
    while folders:
        folder = folders.pop()
        stems: list[str] = []
        sources: list[str] = []
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if dataset_of(Path(folder)):
                continue  # its ledger has told what it holds
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    stem, suffix = os.path.splitext(entry.name)
                    suffix = suffix.lower()
                    if suffix in SOUND_SUFFIXES:
                        stems.append(stem)
                        sources.append(entry.path)
                    elif _is_folder(entry):
                        folders.append(entry.path)
                    elif suffix in (".tar", ".parquet"):
                        archives.append(entry.path)
                    elif entry.name.lower().endswith(_COMPRESSED):
                        warnings.append(
                            f"{entry.path}: is compressed, and cannot be read in place; unpack it"
                        )
                    if len(stems) == _AT_ONCE:
                        yield _names(stems, sources, folder, warnings)
                        stems, sources = [], []
        except OSError as error:
            warnings.append(f"{_shown(folder)}: cannot be read: {error.strerror or error}")
        yield _names(stems, sources, folder, warnings)
    for archive in sorted(archives):
        yield from (_tar if archive.lower().endswith(".tar") else _parquet)(archive, warnings)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _shown(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _names(stems: list[str], sources: list[str], place: str, warnings: list[str]) -> Names:
    """As Arrow arrays; names that are no UTF-8 stay out, for no table can hold them."""
    try:
        return pa.array(stems, pa.string()), pa.array(sources, pa.string())
    except UnicodeEncodeError:
        fine = [place for place, source in enumerate(sources) if source.isascii() or _is_utf8(source)]
        warnings.append(
            f"{_shown(place)}: {len(sources) - len(fine)} names are not valid UTF-8, and not read"
        )
        return pa.array([stems[n] for n in fine], pa.string()), pa.array(
            [sources[n] for n in fine], pa.string()
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tar(path: str, warnings: list[str]) -> Iterator[Names]:
    """The sound files in a tar, by one pass over its headers."""
    stems: list[str] = []
    sources: list[str] = []
    trouble = ""
    try:
        size = os.stat(path).st_size
        # Unbuffered: a buffer would read kilobytes of sound with every header.
        with open(path, "rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all, at a kilobyte each
                stem, suffix = os.path.splitext(member.name.rpartition("/")[2])
                whole = member.offset_data + member.size <= size
                if member.isreg() and not member.issparse() and whole and suffix.lower() in SOUND_SUFFIXES:
                    stems.append(stem)
                    sources.append(tar_part(path, member.offset_data, member.size))
                if len(stems) == _AT_ONCE:
                    yield _names(stems, sources, path, warnings)
                    stems, sources = [], []
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                trouble = "it has no end"
    except (tarfile.TarError, OSError) as error:
        trouble = str(error)
    if trouble:
        warnings.append(
            f"{_shown(path)}: is damaged or cut short ({trouble}); what stands before that is used"
        )
    yield _names(stems, sources, path, warnings)


def _parquet(path: str, warnings: list[str]) -> Iterator[Names]:
    """The rows of a Parquet file, by its column of ids alone."""
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            lacking = [name for name in ("video_id", "audio") if name not in schema.names]
            if lacking:
                have = ", ".join(schema.names)
                warnings.append(f"{_shown(path)}: lacks the columns {' and '.join(lacking)}; it has {have}")
                return
            ids = file.read(columns=["video_id"]).column(0).cast(pa.string()).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        warnings.append(f"{_shown(path)}: cannot be read as Parquet: {error}")
        return
    ids = pa.concat_arrays(ids.chunks) if isinstance(ids, pa.ChunkedArray) else ids
    yield ids, row_parts(path, pa.array(range(len(ids)), pa.int64()), "audio")


def _candidates(stems: pa.Array, sources: pa.Array, wanted: pa.Table) -> pa.Table:
    """Key, source and rank (the place in `KINDS`) for each name that could be a wanted clip's."""
    name = pc.extract_regex(stems, _NAME)
    title = pc.extract_regex(stems, _TITLE)
    new, old = (_text(title, part) for part in ("new", "old"))
    table = pa.table({
        "stem": stems,
        "source": sources,
        "id": pc.coalesce(_text(name, "id"), new, old),
        "from": _text(name, "start").cast(pa.float64()),
        "to": _text(name, "end").cast(pa.float64()),
    })  # fmt: skip
    by_key = (
        table.filter(pc.is_in(stems, wanted["key"]))
        .select(["stem", "source"])
        .rename_columns(["key", "source"])
    )
    by_key = by_key.append_column("rank", pa.array([0] * by_key.num_rows, pa.int8()))
    by_id = table.filter(pc.is_in(table["id"], wanted["group"])).join(wanted, "id", "group", "inner")
    start_s = pc.fill_null(by_id["start_s"], 0.0)
    agrees, ends = _agrees(by_id, start_s, 1.0), _agrees(by_id, start_s, 1000.0)
    start, stretch = pc.or_(agrees[0], ends[0]), pc.or_(agrees[1], ends[1])
    bare = pc.is_null(by_id["from"])
    rank = pc.if_else(bare, 3, pc.if_else(stretch, 1, 2)).cast(pa.int8())
    by_id = by_id.append_column("rank", rank).filter(pc.or_(bare, start))
    return pa.concat_tables([by_key, by_id.select(["key", "source", "rank"])])


def _text(match: pa.StructArray, part: str) -> pa.Array:
    """A group of a pattern; null where it took no part in the match."""
    text = pc.struct_field(match, part)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _agrees(
    table: pa.Table, start_s: pa.ChunkedArray, unit: float
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Whether the times in the names, `unit` to a second, are the clip's: its start; its start and end."""

    def close(times: pa.ChunkedArray, wanted_s: pa.ChunkedArray) -> pa.ChunkedArray:
        apart_s = pc.abs(pc.subtract(pc.divide(times, unit), wanted_s))
        return pc.fill_null(pc.less_equal(apart_s, _CLOSE_S), False)

    start = close(table["from"], start_s)
    return start, pc.and_(start, close(table["to"], table["end_s"]))


def _in_turn(candidates: pa.Table) -> tuple[pa.Table, int]:
    """The sources of each key, the best first (its turn is 0), and how many keys have several."""
    table = candidates.group_by(["key", "source"]).aggregate([("rank", "min")])
    table = table.sort_by([("key", "ascending"), ("rank_min", "ascending"), ("source", "ascending")])
    places = np.arange(table.num_rows)
    keys = pc.index_in(table["key"], pc.unique(table["key"])).to_numpy()
    turn = places - np.searchsorted(
        keys, keys
    )  # sorted by key, so a key's first place is where it would be put in
    media = {
        "key": table["key"],
        "source": table["source"],
        "kind": pc.take(pa.array(KINDS), table["rank_min"]) if table.num_rows else pa.array([], pa.string()),
        "turn": pa.array(turn, pa.int32()),
    }
    return pa.table(media), int((turn == 1).sum())
