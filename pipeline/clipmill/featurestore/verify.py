"""Check every byte and every count of an entry, and compute some of its features again."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipmill import tables
from clipmill.errors import ClipmillError, ShardError, TableError
from clipmill.featurestore.build import read_record
from clipmill.featurestore.compute import Moments
from clipmill.featurestore.entry import Entry
from clipmill.featurestore.files import ENTRY_FILE, TABLE, TABLE_FILE, digest_of
from clipmill.featurestore.hdf5 import FEATURE, KEY, chunk_places
from clipmill.featurestore.parity import Parity, recompute
from clipmill.run import run_units
from clipmill.shards.account import DATASET_FILE, FAILURES_FILE, INDEX_FILE, read_dataset, root_sha256
from clipmill.shards.read import Shards, rows_by_value
from clipmill.shards.write import record_path

_Update = Callable[[int, str], None]


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: an empty `problems` means that all of it is sound.

    `parity` is None where nothing could be computed again; `notes` say why.
    """

    entry: str
    files: int
    clips: int
    bytes: int
    parity: Parity | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    folder: Path,
    *,
    shards: Shards | None = None,
    sample: int | None = 100,
    device: torch.device | None = None,
    workers: int = 0,
    jobs: int = 1,
    update: _Update = lambda done, facts: None,
) -> Verdict:
    """Check an entry: each file's sha256, each clip's checksum, structure, tables, counts; then compute clips again.

    Args:
        folder: of the entry.
        shards: the sound; by default where it lay when the entry was built, if it still does.
        sample: at least so many clips are computed again, drawn at random, whole batches of them; None: all.
        device: where; by default this machine's CPU.
        workers: threads that read the sound ahead.
        jobs: processes that check files.
        update: called with (clips checked or computed, facts).

    Raises:
        ShardError: `shards` are given, and the entry was computed from others.
    """
    try:
        entry = Entry.open(folder)
        entry.check_finished()
    except (TableError, ShardError) as error:
        return Verdict(folder.name, 0, 0, 0, None, [str(error)])
    if shards is not None:
        entry.check(shards=shards)
    problems, table = _tables(entry)
    listed = entry.info["shards"]
    moments = Moments.none(entry.info["bins"])
    done = 0
    if table is not None:
        rows, none = rows_by_value(table["file"].to_numpy()), np.zeros(0, np.int64)
        said = {name: entry.info[name] for name in ("bins", "spec")}
        work = [(folder, said, one, table.take(rows.get(one["file"], none))) for one in listed]
        found: dict[int, tuple[list[str], Moments]] = {}
        for place, result in run_units(_check_file, work, jobs):
            found[place], done = result, done + listed[place]["clips"]
            update(done, f"problems {len(problems) + sum(len(wrong) for wrong, _ in found.values())}")
        for _, (wrong, part) in sorted(found.items()):
            problems += wrong
            moments = moments.and_those(part)
        if not problems:
            problems += _statistics(entry, moments)
    parity, notes = None, entry.clips.notes if not problems else []
    if not problems and sample != 0:
        try:
            parity = recompute(
                entry,
                shards,
                sample,
                device or torch.device("cpu"),
                workers,
                lambda more, facts: update(done + more, facts),
            )
            problems += parity.problems
        except ClipmillError as error:
            notes.append(f"nothing was computed again: {error}")
    size = sum(one["bytes"] for one in listed)
    return Verdict(entry.id, len(listed), entry.info["counts"]["in"], size, parity, problems, notes)


def _tables(entry: Entry) -> tuple[list[str], pa.Table | None]:
    """What is wrong with the entry beside its files of features; and features.parquet, where it can be read."""
    folder, info, problems = entry.folder, entry.info, []
    for name, digest in info["files"].items():
        if (found := digest_of(folder / name)) != digest:
            problems.append(
                f"{name}: {'is missing' if found is None else 'was changed since it was written'}"
            )
    known = {ENTRY_FILE, *info["files"]}
    known |= {name for one in info["shards"] for name in (one["file"], record_path(Path(one["file"])).name)}
    problems += [
        f"{path.name}: does not belong to the entry; move it away"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in known
    ]
    counts = info["counts"]
    if counts["in"] != counts["written"] + counts["failed"] + counts["skipped"]:
        problems.append(f"{ENTRY_FILE}: counts do not reconcile: {counts}")
    for name in ("written", "failed"):
        if counts[name] != sum(one[name] for one in info["shards"]):
            problems.append(f"{ENTRY_FILE}: counts of {name} are not those of its files")
    entries = [{"sha256": one["sha256"], "shard": one["file"]} for one in info["shards"]]
    if info["root_sha256"] != root_sha256(entries):
        problems.append(f"{ENTRY_FILE}: root_sha256 is not that of its files")
    if problems:  # what follows rests on these
        return problems, _table_or_none(folder)
    table = tables.read_table(folder / TABLE_FILE, TABLE).combine_chunks()
    dataset = read_dataset(folder)
    index = tables.read_table(folder / INDEX_FILE, tables.INDEX)
    if not table["key"].equals(index["key"]):
        problems.append(f"{TABLE_FILE}: its clips are not those of {INDEX_FILE}, in their order")
    if dataset["files"][INDEX_FILE] != info["files"][INDEX_FILE]:
        problems.append(f"{INDEX_FILE}: is not the one that {DATASET_FILE} speaks of")
    if dataset["root_sha256"] != info["lineage"]["root_sha256"]:
        problems.append(f"{DATASET_FILE}: is that of other shards than {ENTRY_FILE} says")
    lost = Counter(row["reason"] for row in tables.read_jsonl(folder / FAILURES_FILE))
    if lost != Counter(counts["reasons"]) or lost != Counter(table["reason"].drop_null().to_pylist()):
        problems.append(f"{FAILURES_FILE}: has not the failures that {ENTRY_FILE} and {TABLE_FILE} have")
    return problems, table


def _table_or_none(folder: Path) -> pa.Table | None:
    try:
        return tables.read_table(folder / TABLE_FILE, TABLE)
    except TableError:
        return None


def _check_file(job: tuple[Path, dict[str, Any], dict[str, Any], pa.Table]) -> tuple[list[str], Moments]:
    """One file of features: its bytes, its record, its structure and each clip; and the statistics of what it holds."""
    folder, info, one, table = job
    name, nothing = one["file"], Moments.none(info["bins"])
    path = folder / name
    if not path.is_file():
        return [f"{name}: is missing"], nothing
    problems = []
    digest, size = tables.sha256_of(path)
    if size < one["bytes"]:
        problems.append(f"{name}: is cut short: {size} bytes of {one['bytes']}")
    elif digest != one["sha256"]:
        problems.append(f"{name}: its sha256 is not the one recorded ({size} bytes, recorded {one['bytes']})")
    problems += _check_record(path, one, table)
    try:
        problems += [f"{name}: {what}" for what in _check_structure(path, info, table)]
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        problems.append(f"{name}: cannot be read as HDF5: {error}")
    moments = nothing
    dtype = np.dtype(info["spec"]["dtype"]).newbyteorder("<")
    with open(path, "rb") as file:
        for row in table.filter(table["offset"].is_valid()).to_pylist():
            file.seek(row["offset"])
            data = file.read(row["length"])
            if zlib.crc32(data) != row["crc32"]:
                problems.append(f"{name}: clip {row['key']}'s bytes are not those that were written")
            elif len(data) != row["frames"] * info["bins"] * dtype.itemsize:
                problems.append(f"{name}: clip {row['key']} has not the {row['frames']} frames recorded")
            else:
                values = np.frombuffer(data, dtype).reshape(-1, info["bins"]).astype(np.float64)
                mean = values.mean(0)
                moments = moments.and_those(Moments(len(values), mean, np.square(values - mean).sum(0)))
    return problems, moments


def _check_record(path: Path, one: dict[str, Any], table: pa.Table) -> list[str]:
    record = read_record(path)
    if record is None:
        return [f"{path.name}: has no record {record_path(path).name} that fits it"]
    if record["sha256"] != one["sha256"] or any(
        one[name] != count for name, count in record["counts"].items()
    ):
        return [f"{path.name}: its record and {ENTRY_FILE} disagree"]
    rows = table.select(list(record["clips"])).to_pydict()
    if rows != record["clips"]:
        return [f"{path.name}: its record and {TABLE_FILE} disagree on what it holds"]
    return []


def _check_structure(path: Path, info: dict[str, Any], table: pa.Table) -> Iterator[str]:
    """What an HDF5 reader would see otherwise than the table says; raises what h5py does."""
    import h5py

    there = table.filter(table["offset"].is_valid()).to_pylist()
    with h5py.File(path, "r") as file:
        names = set(file)
        for frames in sorted({row["frames"] for row in there}):
            dataset, keys = file[f"{FEATURE}{frames}"], file[f"{KEY}{frames}"]
            names -= {f"{FEATURE}{frames}", f"{KEY}{frames}"}
            places = dict(zip((key.decode() for key in keys[:]), chunk_places(dataset), strict=True))
            wanted = {row["key"]: row["offset"] for row in there if row["frames"] == frames}
            if places != wanted or dataset.shape != (len(wanted), frames, info["bins"]):
                yield f"{FEATURE}{frames} is not laid out as {TABLE_FILE} says"
            if (
                dataset.dtype != np.dtype(info["spec"]["dtype"])
                or dataset.id.get_create_plist().get_nfilters()
            ):
                yield f"{FEATURE}{frames} is of another number type, or compressed"
        if names:
            yield f"holds {', '.join(sorted(names))} beside what {TABLE_FILE} says"


def _statistics(entry: Entry, moments: Moments) -> list[str]:
    """The statistics in entry.json against those of what the files hold."""
    said = entry.statistics
    found = moments.mean, np.sqrt(moments.squares / max(moments.frames, 1))
    if said.frames != moments.frames or not np.allclose((said.mean, said.std), found, rtol=1e-6, atol=1e-9):
        return [f"{ENTRY_FILE}: its statistics are not those of the values stored"]
    return []
