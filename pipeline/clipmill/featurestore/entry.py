"""An entry of a store: one feature, with one set of settings, of all clips of one set of shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipmill import tables
from clipmill.errors import FeatureError, ShardError, TableError
from clipmill.features import create_feature
from clipmill.features.spec import KEY_DIGITS, FeatureSpec
from clipmill.featurestore.clips import StoredClips
from clipmill.featurestore.files import ENTRY_FILE, TABLE, TABLE_FILE, digest_of, read_sealed
from clipmill.shards.account import DATASET_FILE, FAILURES_FILE, INDEX_FILE, read_dataset
from clipmill.shards.index import Index
from clipmill.shards.places import ShardSet
from clipmill.shards.read import Shards
from clipmill.stores import open_store

FILES = (TABLE_FILE, INDEX_FILE, DATASET_FILE, FAILURES_FILE)
"""The files whose sha256 entry.json has; those of the features themselves stand in their records too."""

_NEEDED = ("spec", "lineage", "about", "finished", "bins", "silence")
_NEEDED_AT_THE_END = ("as_of", "computed", "counts", "statistics", "files", "shards", "root_sha256")


def entry_id(spec: FeatureSpec, dataset: str, root_sha256: str) -> str:
    """The name of an entry's folder: feature, dataset, and a hash of the spec and of the shards' root hash."""
    key = hashlib.sha256(f"{spec.sha256}\n{root_sha256}\n".encode()).hexdigest()[:KEY_DIGITS]
    return f"{spec.feature}-{dataset}-{key}"


def is_entry_id(name: str) -> bool:
    """Whether a folder of that name may be an entry, be it a damaged one; another is none of a store's business."""
    return re.fullmatch(rf"[a-z0-9_]+-.+-[0-9a-f]{{{KEY_DIGITS}}}", name) is not None


def feature_of(id: str) -> str:
    """The feature of the entry of that id."""
    return id.partition("-")[0]


@dataclass(frozen=True)
class Statistics:
    """Of every bin, over all frames of all clips, as stored: float64 `[bins]`, in the feature's unit."""

    frames: int
    mean: NDArray[np.float64]
    std: NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """One entry; `FeatureStore` finds it.

    Attributes:
        folder: its own.
        info: what entry.json says.
    """

    folder: Path
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Entry:
        """Read entry.json.

        Raises:
            TableError: it is missing or damaged, or the folder has the name of another entry.
        """
        if not (folder / ENTRY_FILE).is_file():
            raise TableError(f"{folder}: is no entry of a feature store, for it has no {ENTRY_FILE}")
        info = read_sealed(folder / ENTRY_FILE, *_NEEDED)
        lacking = [name for name in _NEEDED_AT_THE_END if info["finished"] and name not in info]
        if lacking:
            raise TableError(f"{folder / ENTRY_FILE}: is damaged: it lacks {', '.join(lacking)}")
        entry, lineage = cls(folder, info), info["lineage"]
        try:
            own = entry_id(entry.spec, lineage["dataset"], lineage["root_sha256"])
        except TypeError as error:
            raise TableError(
                f"{folder / ENTRY_FILE}: was written by another version of clipmill, whose specs have other fields "
                f"({error}); use that one, or build the feature anew into another store"
            ) from error
        if folder.resolve().name != own:
            raise TableError(f"{folder}: was renamed, for it holds {own}; give it that name again")
        return entry

    @property
    def id(self) -> str:
        """The name of its folder; see `entry_id`."""
        return self.folder.resolve().name

    @property
    def spec(self) -> FeatureSpec:
        """All that determines its numbers."""
        return FeatureSpec(**self.info["spec"])

    @property
    def finished(self) -> bool:
        """Whether all of it was built."""
        return bool(self.info["finished"])

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of each bin.

        Raises:
            ShardError: it is not finished.
        """
        self.check_finished()
        said = self.info["statistics"]
        return Statistics(said["frames"], np.array(said["mean"]), np.array(said["std"]))

    @property
    def clips(self) -> StoredClips:
        """Its clips, to read and to train on.

        Raises:
            ShardError: it is not finished.
            TableError: one of its tables is missing or was changed.
        """
        return StoredClips([self.part])

    @property
    def part(self) -> ShardSet:
        """The same as a set, for `StoredClips` of several."""
        self.check_finished()
        for name, digest in self.info["files"].items():
            if digest_of(self.folder / name) != digest:
                raise TableError(
                    f"{self.folder / name}: is missing or was changed; to mend it: {self.command}"
                )
        dataset = read_dataset(self.folder)
        features = {name: self.info[name] for name in ("spec", "silence", "lineage")}
        info = {**dataset, "notes": self._notes(), "features": features}
        index = Index(self.folder / INDEX_FILE)
        if index.num_rows != tables.check_columns(self.folder / TABLE_FILE, TABLE):
            raise TableError(f"{self.folder}: {INDEX_FILE} and {TABLE_FILE} differ in their rows")
        files = tuple(shard["shard"] for shard in dataset["shards"])
        store = open_store(str(self.folder.resolve()))
        store.close()  # a build may have put other files there since this process opened them
        return ShardSet(store, info, index, files)

    @property
    def words(self) -> str:
        """What tells it from other entries of its feature: "float16, n_mels 64, of esc10 with root_sha256 1a2b3c"."""
        lineage = self.info["lineage"]
        chosen = [f"{name} {value}" for name, value in self._chosen().items()]
        of = f"of {lineage['dataset']} with root_sha256 {lineage['root_sha256'][:KEY_DIGITS]}"
        return ", ".join([self.spec.dtype, *chosen, of])

    @property
    def command(self) -> str:
        """The command that finishes it, and mends what is missing."""
        return self._command_for(self.info["lineage"]["shards"])

    def _command_for(self, place: str) -> str:
        spec = self.spec
        words = ["pipeline", "features", "build", place, "--feature", spec.feature]
        for name, value in self._chosen().items():
            words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        words += ["--dtype", spec.dtype, "--store", str(self.folder.resolve().parent)]
        return shlex.join(words)

    def check(
        self,
        spec: FeatureSpec | None = None,
        shards: Shards | None = None,
        seen: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse what is not of this spec, or of other shards than these; a None is not looked at.

        `seen` is the feature that a network was trained on, as `FrontEnd.config` says it.

        Raises:
            FeatureError: another spec, or not what was seen; names the fields that differ, with both values.
            ShardError: it is not finished, or other shards; says how to compute the feature of theirs.
        """
        self.check_finished()
        if spec is not None and (other := spec.difference(self.spec)):
            raise FeatureError(f"{self.folder}: does not hold the feature asked for: {other}")
        if seen is not None and (other := self.spec.unlike(seen)):
            raise FeatureError(f"{self.folder}: is not what the network was trained on: {other}")
        root = self.info["lineage"]["root_sha256"]
        if shards is not None and shards.root_sha256 != root:
            raise ShardError(
                f"{self.folder}: was computed from other shards: their root_sha256 is {root[:KEY_DIGITS]}, that of "
                f"{shards.place} is {shards.root_sha256[:KEY_DIGITS]}; to compute it of these: "
                f"{self._command_for(shards.place)}"
            )

    def check_finished(self) -> None:
        """Raise ShardError, with the command that finishes it, where not all of it was built."""
        if not self.finished:
            raise ShardError(f"{self.folder}: is not finished; to finish it: {self.command}")

    def _chosen(self) -> dict[str, Any]:
        """The settings that are not what the feature has by itself at this rate."""
        spec = self.spec
        try:
            usual = create_feature(spec.feature, sample_rate=spec.settings["sample_rate"]).config
        except FeatureError:  # one that this clipmill does not have
            usual = {"sample_rate": spec.settings["sample_rate"]}
        return {name: value for name, value in spec.settings.items() if usual.get(name) != value}

    def _notes(self) -> list[str]:
        """What a person should know before its clips are used."""
        sizes = {file.name: file.stat().st_size for file in os.scandir(self.folder) if file.is_file()}
        bad = [shard["file"] for shard in self.info["shards"] if sizes.get(shard["file"]) != shard["bytes"]]
        notes = []
        if bad:
            more = f", and {len(bad) - 1} more files," if len(bad) > 1 else ""
            notes.append(
                f"{self.folder / bad[0]}: is gone or of another size{more}; to mend it: {self.command}"
            )
        if failed := self.info["counts"]["failed"]:
            notes.append(f"{self.folder}: {failed} clips have no feature; {FAILURES_FILE} there says why")
        return notes
