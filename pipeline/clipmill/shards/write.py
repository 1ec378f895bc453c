"""Build one shard: a pure function from raw media to bytes, then a rename, then a record."""

from __future__ import annotations

import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clipmill import tables
from clipmill.errors import ShardError, TableError
from clipmill.shards.formats import WRITERS
from clipmill.shards.plan import ShardSpec, Unit
from clipmill.shards.prepare import Ready, prepare
from clipmill.types import Failure, ShardRecord


def build(unit: Unit) -> dict[str, int]:
    """Build a unit's shard, unless that is done, and return the record's counts.

    Raises:
        ShardError: the folder of the media is not there any more.
        OSError: the disk is full or does not let us write.
    """
    return write_shard(unit.out / unit.name, unit.hash, unit.spec, unit.labels, _prepared(unit))


def _prepared(unit: Unit) -> Iterator[tuple[str, Ready | Failure]]:
    for clip in tables.clips(unit.clips):
        got = prepare(clip, unit.media_root, unit.spec, unit.limits)
        if isinstance(got, Ready):
            yield clip.key, got
        else:
            # A disk that was unmounted must not be written down as so many clips that are missing.
            if got.reason in ("missing", "unreadable") and not unit.media_root.is_dir():
                raise ShardError(f"{unit.media_root}: the folder of the media is not there any more")
            yield clip.key, Failure(clip.key, clip.source, "shard", "failed", got.reason, got.message)


def write_shard(
    target: Path,
    made_from: str,
    spec: ShardSpec,
    labels: tuple[str, ...],
    clips: Iterable[tuple[str, Ready | Failure]],
) -> dict[str, int]:
    """Write a shard under a temporary name, rename it, write its record, return that one's counts.

    Killed at any moment it leaves either nothing under the shard's name, or the whole
    shard; only the record makes it finished. A shard that is finished is left alone.

    Args:
        target: the shard's path.
        made_from: a hash of all that decides its bytes.
        spec: the format, encoding and rate are looked at here; the rest is recorded.
        labels: all class names, in the order of their ids.
        clips: (key, clip) one after the other; taken only where there is something to write.

    Raises:
        OSError: the disk is full or does not let us write; also whatever `clips` raises.
    """
    record = read_record(target)
    if record is not None and record.unit == made_from:
        return record.counts
    # Workers on other machines have the same process numbers.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        index, failures = _write(temporary, target.name, spec, labels, clips)
        digest, size = tables.sha256_of(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    written = len(index["key"])
    counts = {"clips": written + len(failures), "written": written, "failed": len(failures)}
    rows = tables.in_order([asdict(failure) for failure in failures])
    record = ShardRecord(target.name, made_from, asdict(spec), digest, size, counts, index, rows)
    tables.write_json(record_path(target), asdict(record))
    return counts


def record_path(shard: Path) -> Path:
    """Where a shard's record stands: `x-000000.tar` -> `x-000000.json`."""
    return shard.with_suffix(".json")


def read_record(shard: Path) -> ShardRecord | None:
    """The record of a finished shard, or None when there is no record or no shard of its size.

    Raises:
        TableError: the record is damaged.
    """
    path = record_path(shard)
    try:
        if shard.stat().st_size != (said := tables.read_json(path, "size"))["size"]:
            return None
    except FileNotFoundError:
        return None
    except TableError:
        if not path.exists():
            return None
        raise
    try:
        record = ShardRecord(**said)
        rows = {len(record.index[name]) for name in tables.INDEX.names}
        sound = rows == {record.counts["written"]} and len(record.failures) == record.counts["failed"]
    except (TypeError, KeyError) as error:
        raise TableError(
            f"{path}: is no shard's record ({error}); remove it and run `pipeline shard` again"
        ) from error
    if not sound:
        raise TableError(
            f"{path}: its counts and its rows disagree; remove it and run `pipeline shard` again"
        )
    return record


def _write(
    path: Path,
    shard: str,
    spec: ShardSpec,
    labels: tuple[str, ...],
    clips: Iterable[tuple[str, Ready | Failure]],
) -> tuple[dict[str, list[Any]], list[Failure]]:
    """Write every clip that can be had; return the index columns and the failures."""
    writer = WRITERS[spec.format](path, spec.sample_rate, spec.encoding, labels)
    index: dict[str, list[Any]] = defaultdict(list)
    failures = []
    try:
        for key, clip in clips:
            if isinstance(clip, Failure):
                failures.append(clip)
                continue
            writer.add(key, clip.audio, clip.facts)
            for name, value in {**clip.facts, "shard": shard, "row": len(index["row"])}.items():
                index[name].append(value)
    finally:
        places = writer.close()
    index["offset"], index["length"] = [p[0] for p in places], [p[1] for p in places]
    return {name: index[name] for name in tables.INDEX.names}, failures
