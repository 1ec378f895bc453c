"""From a manifest to units of work: each unit is one output shard and all that decides its bytes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill import tables
from clipmill.audio import DECODERS, ENCODINGS
from clipmill.errors import ConfigError, ShardError, TableError
from clipmill.shards.prepare import Limits

FORMATS = {"webdataset": "tar", "hdf5": "h5"}
"""Shard format -> file name extension."""

DEFAULT_ENCODING = {"webdataset": "flac", "hdf5": "pcm16"}
"""HDF5's readers expect plain int16 in `waveform`."""

PLAN_FILE = "plan.parquet"

PLAN = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # file name
    ]
)
"""Every clip planned and the shard that it goes to, in the order of shards and of clips in them."""

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

    `name` is the shard's file name; `clips` has the manifest's columns; `labels` are all class
    names, in the order of their ids. `limits` bound what one clip may cost, and `disk` is where the
    media lay when it was planned (see `disk_of`); they decide no bytes.
    """

    name: str
    out: Path
    media_root: Path
    spec: ShardSpec
    labels: tuple[str, ...]
    clips: pa.Table
    limits: Limits = field(default_factory=Limits)
    disk: tuple[str, int] | None = None

    @property
    def hash(self) -> str:
        """sha256 over all that decides the shard's bytes: the clips, the spec, and HDF5's classes."""
        said: dict[str, Any] = {"shard": self.name, "spec": asdict(self.spec)}
        if (
            self.spec.format == "hdf5"
        ):  # tars hold no class ids: other clips' new classes leave them as they are
            said["labels"] = self.labels
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        digest.update(json.dumps(self.clips.to_pydict(), sort_keys=True).encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        # Pickled as it is, a slice of a table carries the whole table to every worker.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.clips.schema) as stream:
            stream.write_table(self.clips)
        return self.__dict__ | {"clips": sink.getvalue().to_pybytes()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, clips=pa.ipc.open_stream(state["clips"]).read_all())


@dataclass(frozen=True)
class Layout:
    """Which clip goes to which shard, and the settings that it was decided for: what `plan.parquet` holds.

    `table` has the columns of `PLAN`; `labels` are all class names of its clips, sorted.
    """

    table: pa.Table
    spec: ShardSpec
    labels: tuple[str, ...]


def lay_out(name: str, manifest: pa.Table, spec: ShardSpec, before: Layout | None = None) -> Layout:
    """Divide a manifest's clips over shards; with `before`, those that it has not, over new shards after its own.

    Split by split, in an order that depends on `spec.seed` alone, `clips_per_shard` at a
    time: equal manifests give equal layouts whatever the number of workers.
    """
    labels = tuple(all_labels(manifest))
    firsts: dict[str, int] = {}
    if before is not None:
        manifest = manifest.filter(pc.invert(pc.is_in(manifest["key"], before.table["key"].combine_chunks())))
        labels = tuple(sorted({*labels, *before.labels}))
        for shard in pc.unique(before.table["shard"]).to_pylist():
            split, number = shard.removeprefix(f"{name}-").partition(".")[0].rsplit("-", 1)
            firsts[split] = max(firsts.get(split, 0), int(number) + 1)
    keys, shards = [], []
    for split in sorted(pc.unique(manifest["split"]).to_pylist()):
        part = manifest["key"].filter(pc.equal(manifest["split"], split)).combine_chunks()
        # RandomState's stream is frozen for good; the newer generators' may change with numpy's version.
        keys.append(part.take(np.random.RandomState(spec.seed).permutation(len(part))))
        names = [
            f"{name}-{split}-{number:06d}.{FORMATS[spec.format]}"
            for number in range(
                firsts.get(split, 0), firsts.get(split, 0) - (-len(part) // spec.clips_per_shard)
            )
        ]
        places = pa.array(np.arange(len(part)) // spec.clips_per_shard)
        shards.append(pa.array(names, pa.string()).take(places))
    table = pa.table([pa.chunked_array(c, pa.string()) for c in (keys, shards)], schema=PLAN)
    if before is not None:
        table = pa.concat_tables([before.table, table])
    return Layout(table, spec, labels)


def plan(
    layout: Layout, manifest: pa.Table, media_root: Path, out: Path, limits: Limits | None = None
) -> list[Unit]:
    """The units of a layout: one for each shard, with the manifest's rows of its clips.

    Raises:
        ShardError: the manifest lacks a clip of the layout.
    """
    if not layout.table.num_rows:
        return []
    rows = pc.index_in(layout.table["key"], manifest["key"].combine_chunks())
    if rows.null_count:
        gone = layout.table["key"].filter(pc.is_null(rows))
        raise ShardError(
            f"{out}: {len(gone)} clips that these shards were planned for, such as {gone[0].as_py()}, are not to be "
            "had any more; --overwrite plans and builds all shards anew, --out DIR writes somewhere else"
        )
    # In one piece: taking rows from a table in many chunks is a hundred times slower.
    clips = manifest.combine_chunks().take(rows.combine_chunks())
    coded = layout.table["shard"].combine_chunks().dictionary_encode()
    numbers, names = coded.indices.to_numpy(), coded.dictionary.to_pylist()
    limits, disk = limits or Limits(), disk_of(media_root) if media_root.exists() else None
    firsts = np.flatnonzero(np.concatenate([[True], np.diff(numbers) != 0]))
    ends = np.append(firsts[1:], len(numbers))
    return [
        Unit(
            names[numbers[a]],
            out,
            media_root,
            layout.spec,
            layout.labels,
            clips.slice(a, b - a),
            limits,
            disk,
        )
        for a, b in zip(firsts.tolist(), ends.tolist(), strict=True)
    ]


def disk_of(folder: Path) -> tuple[str, int]:
    """The machine, and its number of the disk that the folder is on: another one, once that is unmounted."""
    return os.uname().nodename, folder.stat().st_dev


def wanted(name: str, manifest: pa.Table, lost: Sequence[str]) -> pa.Table:
    """The manifest without the clips in `lost`.

    Raises:
        ShardError: no clip is left to write.
    """
    if lost:
        manifest = manifest.filter(pc.invert(pc.is_in(manifest["key"], pa.array(lost, pa.string()))))
    if not manifest.num_rows:
        raise ShardError(f"{name}: no clip is left to write; `pipeline fetch` says what was lost and why")
    return manifest


def write_layout(out: Path, layout: Layout) -> None:
    """Keep a layout in `plan.parquet`."""
    about = {"spec": json.dumps(asdict(layout.spec)), "labels": json.dumps(layout.labels)}
    tables.write_table(out / PLAN_FILE, layout.table.replace_schema_metadata(about))


def read_layout(out: Path) -> Layout | None:
    """The layout of the shards in a folder; None where there is none.

    Raises:
        TableError: it is damaged.
    """
    path = out / PLAN_FILE
    if not path.exists():
        return None
    table = tables.read_table(path, PLAN)
    try:
        about = pq.read_schema(path).metadata
        spec, labels = json.loads(about[b"spec"]), json.loads(about[b"labels"])
        return Layout(table, ShardSpec(**spec), tuple(labels))
    except (TypeError, KeyError, ValueError, ConfigError) as error:
        raise TableError(f"{path}: is no plan of shards ({error}); --overwrite builds all anew") from error


def difference(before: ShardSpec, now: ShardSpec) -> str:
    """In words, in which settings two specs differ; empty where in none."""
    was, fields = asdict(before), asdict(now)
    return ", ".join(f"{k} {was[k]!r} (now {fields[k]!r})" for k in fields if was[k] != fields[k])


def all_labels(manifest: pa.Table) -> list[str]:
    """Every class name in the manifest, sorted: a class's id is its place in this list."""
    return sorted(pc.unique(pc.list_flatten(manifest["labels"])).to_pylist())
