"""Availability locks: which clips of a dataset a lab had, with what content, and when.

Two labs that fetch AudioSet in different months hold different clips. A lock is a small text
file to publish beside results: `pipeline fetch --lock` and `pipeline shard --lock` then take
those clips alone, and say which are missing or hold something else.

    # clipmill lock 1 of audioset, as of 2026-11-21, 41000 clips, id 3f2a...
    key,split,sha256
    --PJHxphWEs_30000,balanced_train,9c1d...
"""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from clipmill import tables
from clipmill.audio import content_sha256
from clipmill.errors import ConfigError, DecodeError, TableError
from clipmill.fetch.fetched import LEDGER_FILE, Fetched
from clipmill.fetch.ledger import Ledger
from clipmill.fetch.recheck import gone
from clipmill.run import run_units
from clipmill.sources import opened

_SCHEMA = pa.schema([(name, pa.string()) for name in ("key", "split", "sha256")])
_HEAD = re.compile(
    r"# clipmill lock 1 of (?P<name>[A-Za-z0-9_-]+), as of (?P<as_of>\d{4}-\d\d-\d\d), "
    r"(?P<clips>\d+) clips, id (?P<id>[0-9a-f]{64})\n"
)
_FILES_A_UNIT = 64


@dataclass(frozen=True)
class Lock:
    """The clips that were had: `table` has key, split and sha256 (of the source's content and the stretch of it)."""

    name: str
    as_of: str
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def keys(self) -> pa.Array:
        """Strings `[clips]`, sorted."""
        return self.table["key"].combine_chunks()

    @property
    def splits(self) -> list[str]:
        """The splits that the clips are of."""
        return sorted(pc.unique(self.table["split"]).to_pylist())

    @cached_property
    def id(self) -> str:
        """sha256 over the lines of the clips: two locks of one id hold the same clips with the same content."""
        return hashlib.sha256(_lines(self.table)).hexdigest()

    def without(self, keys: set[str]) -> Lock:
        """The same, less these clips."""
        left = pc.invert(pc.is_in(self.table["key"], pa.array(sorted(keys), pa.string())))
        return Lock(self.name, self.as_of, self.table.filter(left))


@dataclass(frozen=True)
class Difference:
    """How two locks differ: keys that stand in one alone, and keys of other content. Sorted."""

    only_first: list[str]
    only_second: list[str]
    other_content: list[str]
    same: int

    def __bool__(self) -> bool:
        return bool(self.only_first or self.only_second or self.other_content)


def make_lock(
    got: Fetched, jobs: int = 1, update: Callable[[int, str], None] = lambda done, facts: None
) -> tuple[Lock, list[str]]:
    """The lock of all clips that are had now, and the keys of those whose media are gone or unreadable, left out.

    Media whose content the ledger does not know (of datasets that were fetched at once) are
    read, in `jobs` processes; of the others it is seen that they are there.

    Raises:
        TableError: not one clip is had.
    """
    lost = pa.array([loss.key for loss in got.losses], pa.string())
    had = got.manifest.filter(pc.invert(pc.is_in(got.manifest["key"], lost)))
    with Ledger(got.folder / LEDGER_FILE) as ledger:
        rows = ledger.columns("key", "sha256", outcome="had")
    place = pc.index_in(had["key"], pa.array(rows["key"], pa.string())).combine_chunks()
    had = had.append_column("sha256", pa.array(rows["sha256"], pa.string()).take(place))
    known = had["sha256"].is_valid()
    away = set(gone(got.media_root, had.filter(known), jobs, update))
    hashes = _hashes(got.media_root, had.filter(pc.invert(known)), jobs, update)
    contents = [
        None if key in away else content or hashes.get(source)
        for key, source, content in zip(
            *(had[c].to_pylist() for c in ("key", "source", "sha256")), strict=True
        )
    ]
    there = pa.array([content is not None for content in contents], pa.bool_())
    sha256 = _with_stretch(had, contents).filter(there)
    left_out = had["key"].filter(pc.invert(there)).to_pylist()
    if not len(sha256):
        raise TableError(f"{got.name}: not one clip is had, so there is nothing to lock")
    had = had.filter(there)
    table = pa.table({"key": had["key"], "split": had["split"], "sha256": sha256}, _SCHEMA)
    return Lock(got.name, datetime.date.today().isoformat(), table.sort_by("key")), left_out


def known_lock(got: Fetched) -> Lock:
    """The clips that are had, by the ledger alone: no media are looked at."""
    with Ledger(got.folder / LEDGER_FILE) as ledger:
        rows = ledger.columns("key", "split", "sha256", "start_s", "end_s", outcome="had")
    had = pa.table(
        {name: pa.array(rows[name], tables.MANIFEST.field(name).type) for name in ("start_s", "end_s")}
    )
    contents = [content or "" for content in rows["sha256"]]
    table = pa.table(
        {"key": rows["key"], "split": rows["split"], "sha256": _with_stretch(had, contents)}, _SCHEMA
    )
    return Lock(got.name, datetime.date.today().isoformat(), table)


def _hashes(
    media_root: Path, clips: pa.Table, jobs: int, update: Callable[[int, str], None]
) -> dict[str, str | None]:
    """Source -> the hash of its content; None where it cannot be read."""
    sources = pc.unique(clips["source"]).to_pylist()
    units = [(media_root, sources[i : i + _FILES_A_UNIT]) for i in range(0, len(sources), _FILES_A_UNIT)]
    hashes: dict[str, str | None] = {}
    for _, found in run_units(_hash_files, units, jobs):
        hashes |= found
        update(len(hashes), "")
    return hashes


def _hash_files(unit: tuple[Path, list[str]]) -> dict[str, str | None]:
    media_root, sources = unit
    return {source: _hash_file(media_root, source) for source in sources}


def _hash_file(media_root: Path, source: str) -> str | None:
    try:
        with opened(media_root, source) as path:
            return content_sha256(path)
    except (DecodeError, OSError):
        return None


def _with_stretch(had: pa.Table, contents: list[str | None]) -> pa.Array:
    """The content's hash; where the clip is a stretch of its source, a hash of that and the stretch."""
    part = pc.or_(had["start_s"].is_valid(), had["end_s"].is_valid())
    for row in pc.indices_nonzero(part).to_pylist():
        stretch = f"{contents[row]} {had['start_s'][row].as_py()} {had['end_s'][row].as_py()}"
        contents[row] = hashlib.sha256(stretch.encode()).hexdigest()
    return pa.array(contents, pa.string())


def write_lock(lock: Lock, path: Path) -> None:
    """Write a lock, gzipped where the name ends in .gz; equal locks of one day give equal bytes."""
    head = f"# clipmill lock 1 of {lock.name}, as of {lock.as_of}, {len(lock)} clips, id {lock.id}\n"
    data = head.encode() + b"key,split,sha256\n" + _lines(lock.table)
    with tables.atomic_write(path) as file:
        file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_lock(path: Path, name: str) -> Lock:
    """Read a lock of the dataset `name`. See `read_any_lock`.

    Raises:
        ConfigError: it is a lock of another dataset.
    """
    lock = read_any_lock(path)
    if lock.name != name:
        raise ConfigError(f"--lock {path}: is a lock of {lock.name}, not of {name}")
    return lock


def read_any_lock(path: Path) -> Lock:
    """Read a lock, and check that it is whole and untouched.

    Raises:
        TableError: the file is missing, no lock, or not what it was when it was written.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TableError(f"{path}: cannot be read as a lock: {error}") from error
    head, _, body = data.partition(b"\n")
    said = _HEAD.fullmatch(head.decode(errors="replace") + "\n")
    if not said:
        raise TableError(f"{path}: is no lock; expected a file that `pipeline lock NAME --out FILE` wrote")
    try:
        options = pyarrow.csv.ConvertOptions(column_types=_SCHEMA)
        table = (
            pyarrow.csv.read_csv(io.BytesIO(body), convert_options=options)
            .select(_SCHEMA.names)
            .cast(_SCHEMA)
        )
    except (pa.ArrowException, KeyError) as error:
        raise TableError(f"{path}: is a damaged lock: {error}") from error
    lock = Lock(said["name"], said["as_of"], table)
    if pc.count_distinct(table["key"]).as_py() != len(lock):
        raise TableError(f"{path}: is a damaged lock: a key stands twice")
    if len(lock) != int(said["clips"]) or lock.id != said["id"]:
        raise TableError(
            f"{path}: is not what was written: its head says {said['clips']} clips with id {said['id'][:12]}, "
            f"it holds {len(lock)} with id {lock.id[:12]}"
        )
    return lock


def compare(first: Lock, second: Lock) -> Difference:
    """What stands in one lock alone, and what has another content in the two."""
    place = pc.index_in(first.keys, second.keys)
    in_both = place.is_valid()
    same = pc.equal(
        first.table["sha256"].combine_chunks().filter(in_both),
        second.table["sha256"].take(place.filter(in_both)),
    )
    both = first.keys.filter(in_both)
    return Difference(
        first.keys.filter(pc.invert(in_both)).to_pylist(),
        second.keys.filter(pc.invert(pc.is_in(second.keys, first.keys))).to_pylist(),
        both.filter(pc.invert(same.combine_chunks())).to_pylist(),
        pc.sum(same).as_py() or 0,
    )


def in_words(lock: Lock, found: Difference) -> str:
    """How far what is here (the second of `found`) is what a lock (its first) names."""
    return (
        f"lock {lock.id[:12]} as of {lock.as_of}: {len(lock)} clips = {found.same} the same + "
        f"{len(found.other_content)} of other content + {len(found.only_first)} not here"
    )


def _lines(table: pa.Table) -> bytes:
    """The clips as CSV without a head; no field needs quoting."""
    rows = pc.binary_join_element_wise(table["key"], table["split"], table["sha256"], ",").combine_chunks()
    if not len(rows):
        return b""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(rows)], rows), "\n")[0]
    return joined.as_py().encode() + b"\n"
