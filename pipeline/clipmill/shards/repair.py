"""Build broken shards anew, and leave the sound ones alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipmill import tables
from clipmill.errors import ShardError, TableError
from clipmill.run import run_units
from clipmill.shards.account import DATASET_FILE
from clipmill.shards.plan import FORMATS
from clipmill.shards.write import read_record, record_path

ASIDE = "set-aside"
"""The folder, beside the shards, for files that `repair` takes away."""


@dataclass(frozen=True)
class Repaired:
    """What `repair` did, as shards' file names.

    `rebuilt` have the bytes that were recorded again. `other` were rebuilt too, and have not: their
    media or the codecs have changed. `extra` were none of the dataset's, and stand in `set-aside/` now.
    """

    rebuilt: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)


def repair(folder: Path, rebuild: Callable[[dict[str, Any]], dict[str, Any]], jobs: int = 1) -> Repaired:
    """Set aside every shard whose bytes or record are not those that dataset.json lists, and build it anew.

    The tables are put together anew in any case. A broken shard is deleted when the new one has
    the bytes that were recorded, and else stays in `set-aside/`.

    Args:
        folder: of the shards.
        rebuild: given what dataset.json says, builds what is missing there; returns what it says then.
        jobs: worker processes that read the shards.

    Raises:
        ShardError: dataset.json cannot be read, so that nobody knows what should be there.
    """
    try:
        info = tables.read_json(folder / DATASET_FILE, "name", "spec", "shards")
    except TableError as error:
        raise ShardError(
            f"{error}; `pipeline shard` with the settings of these shards writes it anew"
        ) from error
    listed = {entry["shard"]: entry for entry in info["shards"]}
    entries = list(listed.values())
    broken = [
        entries[place]["shard"]
        for place, sound in run_units(_is_sound, [(folder, entry) for entry in entries], jobs)
        if not sound
    ]
    present = {path.name for ext in FORMATS.values() for path in folder.glob(f"*.{ext}")}
    extra = sorted(present - set(listed))
    for name in (*broken, *extra):
        for path in (folder / name, record_path(folder / name)):
            if path.exists():
                (folder / ASIDE).mkdir(exist_ok=True)
                os.replace(path, folder / ASIDE / path.name)
    try:
        after = {entry["shard"]: entry["sha256"] for entry in rebuild(info)["shards"]}
    except BaseException:
        for path in (folder / ASIDE).glob("*"):  # back to where it stood, as far as nothing new stands there
            if path.name not in extra and not (folder / path.name).exists():
                os.replace(path, folder / path.name)
        _tidy(folder)
        raise
    same = sorted(name for name in broken if after.get(name) == listed[name]["sha256"])
    for name in same:
        for path in (folder / ASIDE / name, record_path(folder / ASIDE / name)):
            path.unlink(missing_ok=True)
    _tidy(folder)
    return Repaired(same, sorted(set(broken) - set(same)), extra)


def _tidy(folder: Path) -> None:
    if (folder / ASIDE).is_dir() and not any((folder / ASIDE).iterdir()):
        (folder / ASIDE).rmdir()


def _is_sound(unit: tuple[Path, dict[str, Any]]) -> bool:
    folder, entry = unit
    path = folder / entry["shard"]
    try:
        record = read_record(path)
        return record is not None and record.sha256 == entry["sha256"] == tables.sha256_of(path)[0]
    except (OSError, TableError):
        return False
