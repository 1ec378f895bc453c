"""Build broken shards anew, and leave the sound ones alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import ShardError, TableError
from clipmill.run import run_units
from clipmill.shards.account import FAILURES_FILE, INDEX_FILE, read_dataset
from clipmill.shards.plan import FORMATS, PLAN, PLAN_FILE, Layout, ShardSpec, read_layout, write_layout
from clipmill.shards.write import read_record, record_path
from clipmill.types import ShardRecord

ASIDE = "set-aside"
"""The folder, beside the shards, for what `repair` takes away."""

Rebuild = Callable[[dict[str, Any], Mapping[str, ShardRecord]], dict[str, Any]]


@dataclass(frozen=True)
class Repaired:
    """What `repair` did, as shards' file names.

    `rebuilt` have the bytes that were recorded again. `other` were rebuilt too, and have not: their
    media or the codecs have changed. `not_built` could not be built. What stood in the place of these
    two, and the `extra` files that were none of the dataset's, are in `set-aside/`.
    """

    rebuilt: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    not_built: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def repair(folder: Path, rebuild: Rebuild, jobs: int = 1) -> Repaired:
    """Set aside every shard whose bytes are not those that dataset.json lists, and build it anew.

    Shards that have lost only their record get it again. The tables are put together anew in
    any case. A broken shard is deleted when the new one has the bytes that were recorded.

    Args:
        folder: of the shards.
        rebuild: given what dataset.json says, and the records of shards that have none but are sound,
            builds what is missing there; returns what dataset.json says then.
        jobs: worker processes that read the shards.

    Raises:
        ShardError: dataset.json cannot be read, so that nobody knows what should be there.
        TableError: another run is writing there.
    """
    with tables.locked(folder):
        try:
            info = read_dataset(folder)
        except TableError as error:
            raise ShardError(
                f"{error}; `pipeline shard` (or `convert`) with the settings of these shards writes it anew"
            ) from error
        listed = {entry["shard"]: entry for entry in info["shards"]}
        names = list(listed)
        states = {
            names[place]: state
            for place, state in run_units(_state, [(folder, listed[name]) for name in names], jobs)
        }
        layout = _recovered_layout(folder, info)
        again = _recovered_records(folder, info, [n for n in names if states[n] == "no record"], layout)
        broken = [name for name in names if states[name] != "sound" and name not in again]
        planned = set(layout.table["shard"].to_pylist()) | set(listed)
        there = {path.name for ext in FORMATS.values() for path in folder.glob(f"*.{ext}")}
        records = {path.name for path in folder.glob(f"{info['name']}-*.json")}
        stray = records - {record_path(Path(name)).name for name in planned | there}
        extra = sorted((there - planned) | stray)
        moved = {name: _set_aside(folder, name) for name in (*broken, *extra)}
        try:
            after = {entry["shard"]: entry["sha256"] for entry in rebuild(info, again)["shards"]}
        except BaseException:
            for place, back in (pair for pairs in moved.values() for pair in pairs):
                if not os.path.lexists(back):
                    os.replace(place, back)
            _tidy(folder)
            raise
        same = sorted(name for name in broken if after.get(name) == listed[name]["sha256"])
        for place, _ in (pair for name in same for pair in moved[name]):
            if place.is_file() or place.is_symlink():
                place.unlink()
        _tidy(folder)
    return Repaired(
        same,
        sorted(name for name in broken if name in after and name not in same),
        sorted(name for name in broken if name not in after),
        extra,
    )


def _state(unit: tuple[Path, dict[str, Any]]) -> str:
    """How it is with a shard: "sound", "no record" (its bytes are right), or "broken"."""
    folder, entry = unit
    path = folder / entry["shard"]
    try:
        if tables.sha256_of(path)[0] != entry["sha256"]:
            return "broken"
    except OSError:
        return "broken"
    try:
        record = read_record(path)
    except (OSError, TableError):
        record = None
    return "sound" if record is not None and record.sha256 == entry["sha256"] else "no record"


def _recovered_layout(folder: Path, info: dict[str, Any]) -> Layout:
    """The plan, which is written anew from the shards' records where it is damaged or missing.

    Raises:
        ShardError: a record that it takes is lost too.
    """
    path = folder / PLAN_FILE
    spec, labels = ShardSpec(**info["spec"]), tuple(info["labels"])
    try:
        kept = read_layout(folder)
        known = path.is_file() and tables.sha256_of(path)[0] == info["files"][PLAN_FILE]
        listed = {entry["shard"] for entry in info["shards"]}
        # A job that was killed has planned more than dataset.json knows.
        if kept is not None and (
            known or (kept.spec == spec and listed <= set(kept.table["shard"].to_pylist()))
        ):
            return kept
    except TableError:
        pass
    names = [entry["shard"] for entry in info["shards"]]
    try:
        found = {name: tables.read_json(record_path(folder / name), "planned")["planned"] for name in names}
    except TableError as error:
        raise ShardError(
            f"{path}: is damaged, and so is a record that would tell what was planned ({error}); "
            "`pipeline shard --overwrite` builds all anew"
        ) from error
    columns = {
        "key": [key for keys in found.values() for key in keys],
        "shard": [name for name, keys in found.items() for _ in keys],
    }
    layout = Layout(pa.table(columns, schema=PLAN), spec, labels)
    path.unlink(missing_ok=True)
    write_layout(folder, layout)
    return layout


def _recovered_records(
    folder: Path, info: dict[str, Any], shards: list[str], layout: Layout
) -> dict[str, ShardRecord]:
    """The records of shards, as far as they follow from tables that are as they were written; `unit` is empty."""
    try:
        if any(tables.sha256_of(folder / f)[0] != info["files"][f] for f in (INDEX_FILE, FAILURES_FILE)):
            return {}
        index = tables.read_table(folder / INDEX_FILE, tables.INDEX)
        failures = {
            row["key"]: row for row in tables.read_jsonl(folder / FAILURES_FILE) if row["stage"] == "shard"
        }
    except (OSError, TableError):
        return {}
    entries = {entry["shard"]: entry for entry in info["shards"]}
    found = {}
    for shard in shards:
        entry = entries[shard]
        keys = layout.table["key"].filter(pc.equal(layout.table["shard"], shard)).to_pylist()
        rows = index.filter(pc.equal(index["shard"], shard)).sort_by("row").to_pydict()
        counts = {name: entry[name] for name in ("clips", "written", "failed")}
        lost = tables.in_order([failures[key] for key in keys if key in failures])
        if {*rows["key"], *(row["key"] for row in lost)} == set(keys) and len(lost) == entry["failed"]:
            found[shard] = ShardRecord(
                shard, "", info["spec"], entry["sha256"], entry["bytes"], counts, keys, rows, lost
            )
    return found


def _set_aside(folder: Path, name: str) -> list[tuple[Path, Path]]:
    """Move a shard and its record to where nothing stands; returns (where it is now, where it was)."""
    (folder / ASIDE).mkdir(exist_ok=True)
    moved = []
    for path in dict.fromkeys((folder / name, record_path(folder / name))):
        if os.path.lexists(path):
            number = 0
            while os.path.lexists(place := folder / ASIDE / (path.name + (f".{number}" if number else ""))):
                number += 1
            os.replace(path, place)
            moved.append((place, path))
    return moved


def _tidy(folder: Path) -> None:
    if (folder / ASIDE).is_dir() and not any((folder / ASIDE).iterdir()):
        (folder / ASIDE).rmdir()
