"""Build one shard: a pure function from raw media to bytes, then a rename, then a record."""

from __future__ import annotations

import errno
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from clipmill import tables
from clipmill.errors import ShardError, TableError
from clipmill.shards.formats import WRITERS
from clipmill.shards.plan import ShardSpec, Unit, disk_of
from clipmill.shards.prepare import Ready, prepare
from clipmill.types import Clip, Failure, ShardRecord

_DISK_GONE = (errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV)
"""What a disk of the network answers when it is not there."""


class Built(NamedTuple):
    """A finished shard: the hash of all that it was made from, and its record's counts."""

    made_from: str
    counts: dict[str, int]


def build(unit: Unit) -> Built:
    """Build a unit's shard, unless that is done.

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
            if got.reason in ("missing", "unreadable"):
                _check_media(unit, clip)
            yield clip.key, Failure(clip.key, clip.source, "shard", "failed", got.reason, got.message)


def _check_media(unit: Unit, clip: Clip) -> None:
    """Raise ShardError where a whole disk is gone: that must not be written down as so many clips that are missing."""
    root = unit.media_root
    try:
        os.stat(root / clip.source)
    except OSError as error:
        if error.errno in _DISK_GONE:
            raise ShardError(
                f"{root / clip.source}: the disk of the media does not answer ({error.strerror})"
            ) from error
    try:
        elsewhere = unit.disk is not None and unit.disk != disk_of(root)
        empty = next(os.scandir(root), None) is None
    except OSError as error:
        raise ShardError(
            f"{root}: the folder of the media is not there any more ({error.strerror})"
        ) from error
    if empty or elsewhere:
        raise ShardError(f"{root}: the disk of the media is not mounted there any more")


def write_shard(
    target: Path,
    made_from: str,
    spec: ShardSpec,
    labels: tuple[str, ...],
    clips: Iterable[tuple[str, Ready | Failure]],
) -> Built:
    """Write a shard under a temporary name, rename it, write its record.

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
    record = finished_record(target)
    if record is not None and record.unit == made_from:
        return Built(made_from, record.counts)
    # Workers on other machines have the same process numbers.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        planned, index, failures = _write(temporary, target.name, spec, labels, clips)
        digest, size = tables.sha256_of(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    written = len(index["key"])
    counts = {"clips": written + len(failures), "written": written, "failed": len(failures)}
    rows = tables.in_order([asdict(failure) for failure in failures])
    record = ShardRecord(target.name, made_from, asdict(spec), digest, size, counts, planned, index, rows)
    tables.write_json(record_path(target), asdict(record))
    return Built(made_from, counts)


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
        sound = sound and len(record.planned) == record.counts["clips"]
    except (TypeError, KeyError) as error:
        raise TableError(
            f"{path}: is no shard's record ({error}); remove it and run `pipeline shard` again"
        ) from error
    if not sound:
        raise TableError(
            f"{path}: its counts and its rows disagree; remove it and run `pipeline shard` again"
        )
    return record


def finished_record(shard: Path) -> ShardRecord | None:
    """The record of a finished shard; None also where it is damaged: the shard is then built anew."""
    try:
        return read_record(shard)
    except TableError:
        return None


def _write(
    path: Path,
    shard: str,
    spec: ShardSpec,
    labels: tuple[str, ...],
    clips: Iterable[tuple[str, Ready | Failure]],
) -> tuple[list[str], dict[str, list[Any]], list[Failure]]:
    """Write every clip that can be had; return the keys of all clips, the index columns and the failures."""
    writer = WRITERS[spec.format](path, spec.sample_rate, spec.encoding, labels)
    index: dict[str, list[Any]] = defaultdict(list)
    planned, failures = [], []
    try:
        for key, clip in clips:
            planned.append(key)
            if isinstance(clip, Failure):
                failures.append(clip)
                continue
            writer.add(key, clip.audio, clip.facts)
            for name, value in {**clip.facts, "shard": shard, "row": len(index["row"])}.items():
                index[name].append(value)
    finally:
        places = writer.close()
    index["offset"], index["length"] = [p[0] for p in places], [p[1] for p in places]
    return planned, {name: index[name] for name in tables.INDEX.names}, failures
