"""Compute the features of one shard: a pure function from sound to bytes, then a rename, then a record."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
import zlib
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill import tables
from clipmill.errors import ConfigError, FeatureError, ShardError, TableError
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore.compute import AT_ONCE_S, Moments, compute, computed_by, exactly
from clipmill.featurestore.files import read_sealed, write_sealed
from clipmill.featurestore.hdf5 import FeatureFile
from clipmill.loader import Bad
from clipmill.shards.read import Shards
from clipmill.shards.write import record_path
from clipmill.types import Failure

TOO_LARGE = "out-of-range"
"""The reason of a clip whose feature has a value that its number type cannot hold."""

_OF_THE_STORE = ("missing", "unreadable", "forbidden", "network", "timeout")
"""Reasons that are no clip's: the shard is not to be had, which must not be written down as so many clips."""

_FIELDS = ("made_from", "sha256", "bytes", "counts", "computed", "clips", "failures", "moments")


@dataclass(frozen=True)
class Unit:
    """One shard whose features are to be computed.

    Attributes:
        name: of the file to be written.
        out: the entry's folder.
        source: the shard's clips, in the order of the index.
        rows: int64 `[clips]`, where they stand in it.
        source_sha256: of the shard.
        spec: of the feature.
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one; decides no more than last bits.
        workers: threads that read ahead.
    """

    name: str
    out: Path
    source: Shards
    rows: NDArray[np.int64]
    source_sha256: str
    spec: FeatureSpec
    device: str
    workers: int

    @property
    def hash(self) -> str:
        """sha256 over all that decides the numbers: the spec, the shard, and which clips of it."""
        said = [self.spec.sha256, self.source_sha256, self.source.columns["key"].to_pylist()]
        return hashlib.sha256(json.dumps([self.name, *said]).encode()).hexdigest()


class Built(NamedTuple):
    """A finished file: the counts of its record."""

    counts: dict[str, int]


def build(unit: Unit) -> Built:
    """Compute a unit's features and write its file, unless that is done.

    Killed at any moment it leaves either nothing under the file's name, or the whole file; only the record makes it
    finished.

    Raises:
        ShardError: the shard is not to be had any more.
        FeatureError: this clipmill cannot compute such a feature.
        OSError: the disk is full, or does not let us write.
    """
    target = unit.out / unit.name
    record = finished(unit)
    if record is not None:
        return Built(record["counts"])
    # Workers on other machines have the same process numbers.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        record = _write(unit, temporary)
        record["sha256"], record["bytes"] = tables.sha256_of(temporary)
        record_path(target).unlink(missing_ok=True)  # that of a file which was damaged
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(target)
        raise
    finally:
        unit.source.close()
    write_sealed(record_path(target), record)
    return Built(record["counts"])


def finished(unit: Unit) -> dict[str, Any] | None:
    """The record of a unit's file; None where there is none of just this unit, or no file of its size."""
    record = read_record(unit.out / unit.name)
    return record if record is not None and record["made_from"] == unit.hash else None


def read_record(file: Path) -> dict[str, Any] | None:
    """The record of a file of features; None where it is missing or damaged, or the file is not of its size."""
    try:
        record = read_sealed(record_path(file), *_FIELDS)
        return record if file.stat().st_size == record["bytes"] else None
    except (OSError, TableError):
        return None


def moments_of(record: dict[str, Any]) -> Moments:
    """The statistics in a record."""
    said = record["moments"]
    return Moments(said["frames"], np.array(said["mean"]), np.array(said["squares"]))


def device_of(name: str) -> torch.device:
    """The device of that name on the machine that this runs on; raises ConfigError where it has none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(
            f"--device {name}: there is no CUDA device on {platform.node()}; --device auto takes what is"
        )
    return torch.device(name)


def _write(unit: Unit, path: Path) -> dict[str, Any]:
    """Write the file; returns its record, but for the file's own hash and size."""
    feature, device, dtype = unit.spec.create(), device_of(unit.device), unit.spec.dtype
    keys: list[str] = unit.source.columns["key"].to_pylist()
    lost: dict[str, tuple[str, str]] = {}

    def tell(bad: Bad) -> None:
        if bad.reason in _OF_THE_STORE:
            raise ShardError(f"{bad.shard}: cannot be read ({bad.reason}: {bad.message})")
        lost[bad.key] = bad.reason, bad.message

    checksums: dict[str, int] = {}
    moments = Moments.none(feature.bins)
    file = FeatureFile(path, unit.spec, feature.UNIT, feature.bins)
    try:
        computing = compute(feature, unit.source, dtype, device, unit.workers, tell)
        with exactly(device), closing(computing):
            for made in computing:
                moments = moments.and_those(made.moments)
                names = [keys[row] for row in made.rows]
                held = np.flatnonzero(made.held)
                if len(held):
                    file.add([names[place] for place in held], made.values[held])
                checksums |= {names[place]: zlib.crc32(made.values[place]) for place in held}
                for place in np.flatnonzero(~made.held):
                    lost[names[place]] = (
                        TOO_LARGE,
                        f"a value of its {unit.spec.feature} is not finite as {dtype}",
                    )
    except torch.OutOfMemoryError as error:
        raise FeatureError(
            f"{unit.name}: {unit.spec.feature} of {AT_ONCE_S} s of sound, or of its longest clip, does not fit the "
            f"memory of {device}; --device cpu computes it"
        ) from error
    finally:
        places = file.close()
    frames = [feature.frames(int(samples)) for samples in unit.source.samples]
    width = feature.bins * np.dtype(dtype).itemsize
    sources = dict(zip(keys, unit.source.columns["source"].to_pylist(), strict=True))
    failures = [Failure(key, sources[key], "features", "failed", *why) for key, why in lost.items()]
    return {
        "file": unit.name,
        "made_from": unit.hash,
        "counts": {"clips": len(keys), "written": len(places), "failed": len(failures)},
        "computed": computed_by(device),
        "clips": {
            "key": keys,
            "offset": [places.get(key) for key in keys],
            "length": [width * count if key in places else None for key, count in zip(keys, frames, strict=True)],
            "frames": frames,
            "crc32": [checksums.get(key) for key in keys],
            "reason": [lost[key][0] if key in lost else None for key in keys],
        },
        "failures": tables.in_order([asdict(failure) for failure in failures]),
        "moments": {"frames": moments.frames, "mean": moments.mean.tolist(), "squares": moments.squares.tolist()},
    }  # fmt: skip
