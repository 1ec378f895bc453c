"""Build one shard: a pure function from raw media to bytes, then a rename, then a record."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipmill import tables
from clipmill.audio import measure, prepare_clip
from clipmill.errors import DecodeError, TableError
from clipmill.shards.formats import WRITERS
from clipmill.shards.plan import ShardSpec, Unit
from clipmill.sources import opened
from clipmill.types import Clip, Failure, ShardRecord


def build(unit: Unit) -> ShardRecord:
    """Build a unit's shard under a temporary name, rename it, write `<shard>.json`, return what that says.

    Killed at any moment it leaves either nothing under the shard's name, or the whole
    shard; only the record makes it finished.

    Raises:
        OSError: the disk is full or does not let us write.
    """
    target = unit.out / unit.shard
    temporary = target.with_name(f".{unit.shard}.{os.getpid()}.tmp")
    try:
        index, failures = _write(temporary, unit)
        digest, size = tables.sha256_of(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    clips = unit.clips.num_rows
    counts = {"clips": clips, "written": clips - len(failures), "failed": len(failures)}
    rows = tables.in_order([asdict(failure) for failure in failures])
    record = ShardRecord(unit.shard, unit.hash, asdict(unit.spec), digest, size, counts, index, rows)
    tables.write_json(record_path(target), asdict(record))
    return record


def record_path(shard: Path) -> Path:
    """Where a shard's record stands: `x-000000.tar` -> `x-000000.json`."""
    return shard.with_suffix(".json")


def read_record(shard: Path) -> ShardRecord | None:
    """The record of a finished shard, or None when there is no record or no shard of its size."""
    path = record_path(shard)
    if not path.exists():
        return None
    try:
        record = ShardRecord(**tables.read_json(path))
        rows = pa.table(record.index, schema=tables.INDEX).num_rows
        sound = rows == record.counts["written"] and len(record.failures) == record.counts["failed"]
    except (TypeError, KeyError, pa.ArrowException) as error:
        raise TableError(
            f"{path}: is no shard's record ({error}); remove it and run `pipeline shard` again"
        ) from error
    if not sound:
        raise TableError(
            f"{path}: its counts and its rows disagree; remove it and run `pipeline shard` again"
        )
    return record if shard.is_file() and shard.stat().st_size == record.size else None


def _write(path: Path, unit: Unit) -> tuple[dict[str, list[Any]], list[Failure]]:
    """Write every clip that can be had; return the index columns and the failures."""
    spec = unit.spec
    writer = WRITERS[spec.format](path, spec.sample_rate, spec.encoding, unit.labels)
    index: dict[str, list[Any]] = defaultdict(list)
    failures = []
    try:
        for clip in tables.clips(unit.clips):
            try:
                samples, row = _ready(clip, unit.media_root, spec)
            except (DecodeError, MemoryError) as error:
                reason = error.reason if isinstance(error, DecodeError) else "corrupt"
                message = str(error) or "needs more memory than there is"
                failures.append(Failure(clip.key, clip.source, "shard", "failed", reason, message))
                continue
            writer.add(clip.key, samples, row)
            for name, value in {**row, "shard": unit.shard, "row": len(index["row"])}.items():
                index[name].append(value)
    finally:
        places = writer.close()
    index["offset"], index["length"] = [p[0] for p in places], [p[1] for p in places]
    return {name: index[name] for name in tables.INDEX.names}, failures


def _ready(clip: Clip, media_root: Path, spec: ShardSpec) -> tuple[np.ndarray, dict[str, Any]]:
    """One clip's int16 samples, padded, and its facts: the index columns that do not depend on the shard."""
    with opened(media_root, clip.source) as path:
        ready = prepare_clip(path, spec.sample_rate, clip.start_s, clip.end_s, decoder=spec.decoder)
    content = ready.samples[: ready.content]
    if not content.any() and not spec.keep_silent:
        raise DecodeError(
            "silent",
            f"nothing in {ready.duration_s:.2f} s reaches the last of 16 bits; --keep-silent keeps such clips",
        )
    facts = asdict(clip)
    del facts["bytes"]  # it says whether the source has changed, and nothing of the clip
    row = facts | {
        "labels": list(clip.labels),
        "samples": len(ready.samples),
        "sha256": hashlib.sha256(ready.samples.tobytes()).hexdigest(),
        "duration_s": ready.duration_s,
        "source_rate": ready.source_rate,
        "source_channels": ready.source_channels,
        **measure(content, spec.sample_rate),
    }
    return ready.samples, row
