"""Check every byte and every count of a folder of shards against what its tables say."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import ShardError, TableError
from clipmill.run import run_units
from clipmill.shards.account import FAILURES_FILE, root_sha256
from clipmill.shards.metadata import check_metadata
from clipmill.shards.plan import FORMATS, PLAN_FILE, ShardSpec, difference, read_layout
from clipmill.shards.read import Shards, rows_by_value
from clipmill.shards.write import read_record, record_path


@dataclass(frozen=True)
class Verdict:
    """What `verify` found: an empty `problems` means that all of it is sound.

    `root_sha256` is None where only some of the shards were looked at.
    """

    shards: int
    clips: int
    bytes: int
    root_sha256: str | None
    problems: list[str] = field(default_factory=list)


def verify(
    where: str | Path, jobs: int = 1, update: Callable[[int, str], None] = lambda done, facts: None
) -> Verdict:
    """Check the shards' sha256, every clip's sha256 and length, every count, and the root hash.

    Raises:
        ShardError: there are no shards, or no index.
    """
    shards = Shards.open(where, ours=True)
    listed = {entry["shard"]: entry for entry in shards.info["shards"]}
    asked = sorted(shards.files)
    rows = rows_by_value(shards.index["shard"].to_numpy())
    jobs_to_do = [
        (shards.take(rows.get(name, np.zeros(0, np.int64))).light(), listed[name]) for name in asked
    ]
    problems: list[str] = []
    for done, (_, found) in enumerate(run_units(_check_shard, jobs_to_do, jobs), 1):
        problems += found
        update(done, f"problems {len(problems)}")
    if shards.whole:
        problems += _check_account(shards, listed)
    total = sum(listed[name]["bytes"] for name in asked)
    root = shards.info["root_sha256"] if shards.whole else None
    return Verdict(len(asked), len(shards), total, root, sorted(problems))


def _check_shard(job: tuple[Shards, dict[str, Any]]) -> list[str]:
    """One shard: its file, its record, and every clip that the index says it holds."""
    part, entry = job
    name = entry["shard"]
    path = part.folder / name
    if not path.is_file():
        return [f"{name}: is missing"]
    problems = []
    digest, size = tables.sha256_of(path)
    if size < entry["bytes"]:
        problems.append(f"{name}: is cut short: {size} bytes of {entry['bytes']}")
    elif digest != entry["sha256"]:
        problems.append(
            f"{name}: its sha256 is not the one recorded ({size} bytes, recorded {entry['bytes']})"
        )
    problems += _check_record(path, entry, part)
    if len(part) != entry["written"]:
        problems.append(f"{name}: index.parquet has {len(part)} clips of it, recorded are {entry['written']}")
    keys, hashes = part.index["key"].to_pylist(), part.index["sha256"].to_pylist()
    for row, (key, expected) in enumerate(zip(keys, hashes, strict=True)):
        try:
            samples = part.read(row)
        except ShardError as error:
            problems.append(f"{name}: {str(error).partition(': ')[2].partition('; `pipeline')[0]}")
            continue
        if hashlib.sha256(samples.tobytes()).hexdigest() != expected:
            problems.append(f"{name}: clip {key}'s samples are not those recorded")
        if len(samples) % part.sample_rate:
            problems.append(f"{name}: clip {key} is no whole number of seconds long")
    part.close()
    return problems


def _check_record(path: Path, entry: dict[str, Any], part: Shards) -> list[str]:
    try:
        record = read_record(path)
    except TableError as error:
        return [f"{path.name}: its record cannot be read: {error}"]
    if record is None:
        return [f"{path.name}: has no record {record_path(path).name} that fits its size"]
    if record.sha256 != entry["sha256"] or record.counts["written"] != entry["written"]:
        return [f"{path.name}: its record and dataset.json disagree"]
    if not part.index.sort_by("row").equals(pa.table(record.index, schema=tables.INDEX)):
        return [f"{path.name}: index.parquet and its record disagree on what it holds"]
    return []


def _check_account(shards: Shards, listed: dict[str, Any]) -> list[str]:
    """The folder as a whole: extra files, duplicate keys, counts and the root hash."""
    problems = []
    present = {path.name for ext in FORMATS.values() for path in shards.folder.glob(f"*.{ext}")}
    problems += [
        f"{name}: is in the folder but not in dataset.json" for name in sorted(present - set(listed))
    ]
    keys = pc.value_counts(shards.index["key"].combine_chunks())
    twice = keys.filter(pc.greater(keys.field("counts"), 1)).field("values").to_pylist()
    problems += [f"key {key}: stands more than once in index.parquet" for key in twice[:10]]
    if len(twice) > 10:
        problems.append(f"{len(twice) - 10} more keys stand more than once in index.parquet")
    records = {path.name for path in shards.folder.glob(f"{shards.name}-*.json")}
    stray = records - {record_path(Path(name)).name for name in present | set(listed)}
    problems += [f"{name}: is the record of no shard" for name in sorted(stray)]
    for file, digest in shards.info["files"].items():
        if not (shards.folder / file).is_file():
            problems.append(f"{file}: is missing")
        elif tables.sha256_of(shards.folder / file)[0] != digest:
            problems.append(f"{file}: its sha256 is not the one in dataset.json")
    if shards.info["stopped"]:
        problems.append(f"dataset.json: the job stopped before its end: {shards.info['stopped']}")
    counts = shards.info["counts"]
    if counts["in"] != counts["written"] + counts["failed"] + counts["skipped"]:
        problems.append(f"dataset.json: counts do not reconcile: {counts}")
    if counts["written"] != len(shards):
        problems.append(f"index.parquet: has {len(shards)} clips, dataset.json says {counts['written']}")
    problems += _check_failures(shards.folder, counts)
    problems += _check_plan(shards)
    if root_sha256(shards.info["shards"]) != shards.info["root_sha256"]:
        problems.append("dataset.json: root_sha256 is not that of the shards it lists")
    return problems + check_metadata(shards.folder, shards.info)


def _check_failures(folder: Path, counts: dict[str, Any]) -> list[str]:
    try:
        failures = tables.read_jsonl(folder / FAILURES_FILE)
    except TableError as error:
        return [f"{FAILURES_FILE}: cannot be read: {error}"]
    lost = counts["failed"] + counts["skipped"]
    if len(failures) != lost:
        return [f"{FAILURES_FILE}: has {len(failures)} rows, dataset.json says {lost}"]
    if Counter(row.get("reason") for row in failures) != Counter(counts["reasons"]):
        return [f"{FAILURES_FILE}: has other reasons than dataset.json says"]
    return []


def _check_plan(shards: Shards) -> list[str]:
    """The plan against dataset.json: other settings or classes would make other shards of the same name."""
    try:
        layout = read_layout(shards.folder)
    except TableError as error:
        return [f"{PLAN_FILE}: cannot be read: {error}"]
    if layout is None:
        return []
    problems = []
    if other := difference(layout.spec, ShardSpec(**shards.info["spec"])):
        problems.append(f"dataset.json: its settings are not those of {PLAN_FILE}: {other}")
    if list(layout.labels) != shards.labels:
        problems.append(f"dataset.json: its labels are not those of {PLAN_FILE}")
    return problems
