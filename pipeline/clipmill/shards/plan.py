"""From a manifest to units of work: each unit is one output shard and all that decides its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.audio import DECODERS, ENCODINGS
from clipmill.errors import ConfigError, ShardError

FORMATS = {"webdataset": "tar", "hdf5": "h5"}
"""Shard format -> file name extension."""

DEFAULT_ENCODING = {"webdataset": "flac", "hdf5": "pcm16"}
"""HDF5's readers expect plain int16 in `waveform`."""

MAX_RATE = 384_000
MAX_CLIPS = 1_000_000


@dataclass(frozen=True)
class ShardSpec:
    """Every choice that decides the bytes of the shards, apart from the clips themselves.

    `clips_per_shard` counts clips planned: those that fail leave their shard shorter, so
    that one bad clip never moves another to a different shard. `sample_rate` is in Hz.
    """

    format: str = "webdataset"
    encoding: str = "flac"
    sample_rate: int = 44100
    clips_per_shard: int = 256
    seed: int = 0
    decoder: str = "auto"
    keep_silent: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("format", FORMATS), ("encoding", ENCODINGS), ("decoder", DECODERS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(allowed)}")
        if not 1000 <= self.sample_rate <= MAX_RATE:
            raise ConfigError(f"--sample-rate {self.sample_rate}: allowed are 1000 to {MAX_RATE} Hz")
        if self.encoding == "flac" and self.sample_rate > 65535 and self.sample_rate % 10:
            raise ConfigError(
                f"--sample-rate {self.sample_rate}: above 65535 Hz FLAC holds multiples of 10 alone; "
                "--encoding pcm16 takes any"
            )
        if not 1 <= self.clips_per_shard <= MAX_CLIPS:
            raise ConfigError(f"--clips-per-shard {self.clips_per_shard}: allowed are 1 to {MAX_CLIPS}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed {self.seed}: allowed are 0 to {2**32 - 1}")

    @property
    def folder(self) -> str:
        """The name of the folder that shards of this spec go to by default."""
        return f"{self.format}-{self.encoding}-{self.sample_rate}"


@dataclass(frozen=True)
class Unit:
    """One shard to be built: the argument of a pure function from raw media to bytes.

    `clips` has the manifest's columns; `labels` are all class names, in the order of their ids.
    """

    shard: str
    out: Path
    media_root: Path
    spec: ShardSpec
    labels: tuple[str, ...]
    clips: pa.Table

    @property
    def hash(self) -> str:
        """sha256 over all that decides the shard's bytes: the clips, the labels and the spec."""
        said = {"shard": self.shard, "spec": asdict(self.spec), "labels": self.labels}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        digest.update(json.dumps(self.clips.to_pydict(), sort_keys=True).encode())
        return digest.hexdigest()


def plan(
    name: str, manifest: pa.Table, lost: Sequence[str], media_root: Path, out: Path, spec: ShardSpec
) -> list[Unit]:
    """Divide the manifest's clips, less the keys in `lost`, over shards.

    Split by split, in an order that depends on `spec.seed` alone, `clips_per_shard` at a
    time: equal manifests give equal plans whatever the number of workers.

    Raises:
        ShardError: no clip is left to write.
    """
    if lost:
        manifest = manifest.filter(pc.invert(pc.is_in(manifest["key"], pa.array(lost, pa.string()))))
    if not manifest.num_rows:
        raise ShardError(f"{name}: no clip is left to write; `pipeline fetch` says what was lost and why")
    labels = tuple(all_labels(manifest))
    units = []
    for split in sorted(pc.unique(manifest["split"]).to_pylist()):
        # In one piece: taking rows from a table in many chunks is a hundred times slower.
        part = manifest.filter(pc.equal(manifest["split"], split)).combine_chunks()
        # RandomState's stream is frozen for good; the newer generators' may change with numpy's version.
        order = np.random.RandomState(spec.seed).permutation(part.num_rows)
        for number, first in enumerate(range(0, part.num_rows, spec.clips_per_shard)):
            shard = f"{name}-{split}-{number:06d}.{FORMATS[spec.format]}"
            # Taken, not sliced: a pickled slice would carry the whole table to every worker.
            clips = part.take(order[first : first + spec.clips_per_shard])
            units.append(Unit(shard, out, media_root, spec, labels, clips))
    return units


def all_labels(manifest: pa.Table) -> list[str]:
    """Every class name in the manifest, sorted: a class's id is its place in this list."""
    return sorted(pc.unique(pc.list_flatten(manifest["labels"])).to_pylist())
