"""An index for shards that others made, tars and HDF5 files: found by one scan, and kept for the next time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.audio import decode
from clipmill.errors import DecodeError, ShardError, TableError
from clipmill.run import run_units
from clipmill.shards.foreign.scan import HDF5_SUFFIXES, Scanned, scan
from clipmill.shards.foreign.table import FOREIGN_INDEX, at_rate, class_names, hash_of, own_keys
from clipmill.shards.index import Index
from clipmill.stores import ReadFailure, Store, cache_folder
from clipmill.types import REASONS

CLASSES_FILE = "classes.txt"
"""Beside the shards, where labels are numbers: the classes' names, one a line, the first for 0."""

_VERSION = 1  # of what is kept; another is made anew
_JOBS = 8  # shards scanned at once: it is mostly waiting
_DECODED_BY_ONE = 100  # clips that are not worth another process
_NAMED = 10  # clips that are left out for one reason
_SAY_EVERY_S = 5.0
_TOLD = 20  # notes of one set


@dataclass(frozen=True)
class Foreign:
    """Shards of others, as the reader needs them.

    index: `FOREIGN_INDEX`, clips in the order of their shards. `samples` is what the reader gives of a clip: mono, at
    the set's rate, with zeros up to the whole second; `duration_s` and `source_rate` are the clip's own. No sha256 is
    known ("") and no quality column (nan, or null), so that `--where` on one of these keeps nothing.
    info: name, labels, spec (sample_rate in Hz, encoding), shards (shard, bytes, written), root_sha256, foreign.
    notes: lines for a person: what was assumed, and what was left out and why.
    passing: whether something was left out that may be there in a minute, so that this is not to be kept.
    """

    index: Index
    info: dict[str, Any]
    notes: tuple[str, ...]
    passing: bool = False


def index_foreign(
    store: Store, names: Sequence[str], *, say: Callable[[str], None] = lambda line: None, jobs: int = _JOBS
) -> Foreign:
    """Index shards that others made, or take what an earlier call kept of the very same files.

    Of the sounds in tars the first bytes are read, where they are FLAC or WAV; others are decoded once, to learn
    their lengths. What is kept stands under `cache_folder()/indexes`.

    Args:
        store: where the shards lie.
        names: their file names: plain tars, and HDF5 files ending in .h5 or .hdf5.
        say: gets a line after each shard.
        jobs: shards scanned at once.

    Raises:
        ShardError: a shard is not there or cannot be read, none of them holds a clip, or HDF5 files differ in their
            sample rates. A damaged shard is a note, unless there is no other.
    """
    beside = [CLASSES_FILE] if store.exists(CLASSES_FILE) else []
    versions = store.versions([*names, *beside])
    said = json.dumps(
        [_VERSION, os.path.abspath(store.place) if store.near else store.place, [*names], versions]
    )
    kept = cache_folder() / "indexes" / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.parquet"
    found = _kept(kept)
    if found is not None:
        return found
    parts = _scan_all(store, names, _classes(store) if beside else (), say, jobs)
    lost = [part for part in parts if part.lost is not None]
    if len(lost) == len(parts):
        what = "; ".join(f"{store.path(part.shard)}: {part.lost}" for part in lost[:3])
        more = f"; and {len(lost) - 3} more like these" if len(lost) > 3 else ""
        raise ShardError(f"{what}{more}; wanted are plain tars or HDF5 files of sounds")
    found = _index(store, parts)
    return found if found.passing else _keep(kept, found)


def _scan_all(
    store: Store, names: Sequence[str], classes: Sequence[str], say: Callable[[str], None], jobs: int
) -> list[Scanned]:
    parts: list[Scanned] = []
    say(f"{store.place}: indexing {len(names)} shards of others, which is kept for the next time")
    clips, ended, told = 0, threading.Event(), time.monotonic()
    pool = ThreadPoolExecutor(jobs, "scan")
    try:
        for part in pool.map(partial(_scan, store, classes, ended), names):
            parts.append(part)
            clips += part.table.num_rows
            if time.monotonic() - told > _SAY_EVERY_S:
                told = time.monotonic()
                say(f"{store.place}: indexed {len(parts)} of {len(names)} shards, {clips} clips so far")
    finally:
        ended.set()  # before the threads are waited for
        pool.shutdown(cancel_futures=True)
    return parts


def _scan(store: Store, classes: Sequence[str], ended: threading.Event, name: str) -> Scanned:
    try:
        with _open(store, name, ended) as file:
            return scan(file, name, classes)
    except OSError as error:
        path = store.path(name)
        raise ShardError(f"{path}: cannot be read: {str(error).removeprefix(f'{path}: ')}") from error


def _open(store: Store, name: str, ended: threading.Event) -> BinaryIO:
    """A shard to be scanned; of a far tar nothing comes but what is asked for, and nothing once `ended` is set."""
    if store.near or name.endswith(HDF5_SUFFIXES):
        return store.open(name)
    return cast("BinaryIO", _Stretches(store, name, ended))


class _Stretches(io.RawIOBase):
    """A far file of which each `read` is one request of just so many bytes."""

    def __init__(self, store: Store, name: str, ended: threading.Event) -> None:
        self._store, self._name, self._size, self._at = store, name, store.size(name), 0
        self._ended = ended

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        self._at = at + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        size = left if size < 0 else min(size, left)
        if self._ended.is_set():
            raise ReadFailure("unreadable", "the scan was ended")
        data = self._store.fetch([(self._name, self._at, size)])[0] if size else b""
        if isinstance(data, ReadFailure):
            raise data
        self._at += size
        return data


def _classes(store: Store) -> list[str]:
    with store.open(CLASSES_FILE) as file:
        return [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]


def _index(store: Store, parts: Sequence[Scanned]) -> Foreign:
    """One index of all that was found."""
    notes = [f"{store.path(part.shard)}: left out: {part.lost}" for part in parts if part.lost is not None]
    notes += _counted(store, parts)
    parts = [part for part in parts if part.lost is None]
    shards = [pa.repeat(part.shard, part.table.num_rows) for part in parts]
    rows = [np.arange(part.table.num_rows, dtype=np.int32) for part in parts]
    clips = pa.concat_tables([part.table for part in parts])
    clips = clips.append_column("shard", pa.chunked_array(shards)).append_column(
        "row", [np.concatenate(rows)]
    )
    clips, lines, passing = _decoded(store, clips)
    if not clips.num_rows:
        raise ShardError(f"{store.place}: none of its sounds can be decoded: {'; '.join(lines)}")
    clips, more = own_keys(clips)
    rate = int(pc.mode(clips["rate"])[0]["mode"].as_py())
    table = at_rate(clips, rate, store.path)
    declared = dict.fromkeys(label for part in parts for label in part.classes)
    labels, table, less = class_names(table, list(declared))
    others = int(pc.sum(pc.not_equal(table["source_rate"], rate)).as_py() or 0)
    if others:
        more.append(
            f"{others} of {table.num_rows} clips are not at {rate} Hz, the commonest rate; they are resampled"
        )
    written = Counter(table["shard"].to_pylist())
    entries = [
        {"shard": part.shard, "bytes": store.size(part.shard), "written": written[part.shard]}
        for part in parts
    ]
    encoding = Counter(table["codec"].to_pylist()).most_common(1)[0][0].removeprefix(".")
    info = {
        "name": os.path.basename(os.path.abspath(store.place) if store.near else store.place),
        "labels": labels,
        "spec": {"sample_rate": rate, "encoding": encoding},
        "shards": entries,
        "root_sha256": hash_of(table),
        "foreign": True,
    }
    return Foreign(Index(table), info, (*notes, *lines, *more, *less), passing)


def _counted(store: Store, parts: Sequence[Scanned]) -> list[str]:
    """The notes of all shards, each thing once, with how often and where first."""
    found: dict[str, tuple[int, str]] = {}
    for part in parts:
        for what, (count, first) in part.notes.items():
            where = first if first == part.shard else f"{part.shard}: {first}"
            before, earliest = found.get(what, (0, where))
            found[what] = before + count, earliest
    lines = [
        f"{store.path(first)}: {what}"
        if count == 1
        else f"{store.place}: {count} times: {what} (first {first})"
        for what, (count, first) in found.items()
    ]
    return lines[:_TOLD] + ([f"{len(lines) - _TOLD} more notes"] if len(lines) > _TOLD else [])


def _decoded(store: Store, clips: pa.Table) -> tuple[pa.Table, list[str], bool]:
    """The clips with rate, channels and frames: by decoding, where no header said. Those that fail are left out.

    Beside them lines for a person, and whether some failed for the store's sake.
    """
    unknown = np.flatnonzero(pc.is_null(clips["frames"]).to_numpy())
    if not len(unknown):
        return clips, [], False
    some = clips.take(pa.array(unknown)).select(["shard", "offset", "length"]).to_pylist()
    units = [some[first : first + _DECODED_BY_ONE] for first in range(0, len(some), _DECODED_BY_ONE)]
    jobs = min(len(units), len(os.sched_getaffinity(0)))
    answers: list[list[tuple[int, int, int] | str]] = [[] for _ in units]
    for place, answer in run_units(partial(_decode_some, store), units, jobs):
        answers[place] = answer
    found = [one for answer in answers for one in answer]
    columns = {
        name: clips[name].to_numpy(zero_copy_only=False).copy() for name in ("rate", "channels", "frames")
    }
    for row, one in zip(unknown.tolist(), found, strict=True):
        if not isinstance(one, str):
            columns["rate"][row], columns["channels"][row], columns["frames"][row] = one
    for name, values in columns.items():
        kind = clips.schema.field(name).type
        clips = clips.set_column(
            clips.column_names.index(name), name, pa.array(values, kind, from_pandas=True)
        )
    lost = [
        (one, clips["key"][row].as_py())
        for row, one in zip(unknown.tolist(), found, strict=True)
        if isinstance(one, str)
    ]
    reasons = Counter(reason for reason, _ in lost)
    lines = [
        f"{store.place}: {count} clips are left out: {reason} ({REASONS[reason]}): "
        + ", ".join([key for why, key in lost if why == reason][:_NAMED])
        + (" ..." if count > _NAMED else "")
        for reason, count in reasons.items()
    ]
    decoded = len(found) - reasons.total()
    if decoded:
        lines.append(
            f"{store.place}: {decoded} clips were decoded once, as their headers do not say how long they are"
        )
    passing = not reasons.keys().isdisjoint(("network", "timeout"))
    return clips.filter(pc.is_valid(clips["frames"])), lines, passing


def _decode_some(store: Store, clips: list[dict[str, Any]]) -> list[tuple[int, int, int] | str]:
    """Rate in Hz, channels and frames of each clip, or the reason why it does not decode."""
    found: list[tuple[int, int, int] | str] = []
    for clip in clips:
        data = store.fetch([(clip["shard"], clip["offset"], clip["length"])])[0]
        if isinstance(data, ReadFailure):
            found.append(data.reason)
            continue
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            try:
                audio = decode(Path(file.name))
                found.append((audio.rate, audio.channels, len(audio.samples)))
            except DecodeError as error:
                found.append(error.reason)
    return found


def _kept(path: Path) -> Foreign | None:
    """What an earlier call kept, where all of it is whole."""
    try:
        said = tables.read_json(path.with_suffix(".json"), "info", "notes", "sha256")
        if said["sha256"] != _seal(path, said["info"], said["notes"]):
            return None
        return Foreign(Index(path, FOREIGN_INDEX), said["info"], tuple(said["notes"]))
    except (OSError, TableError):
        return None


def _keep(path: Path, found: Foreign) -> Foreign:
    try:
        tables.write_table(path, found.index.table())
        seal = _seal(path, found.info, found.notes)
        said = {"info": found.info, "notes": found.notes, "sha256": seal}
        tables.write_json(path.with_suffix(".json"), said)
    except OSError as error:
        why = f"{path.parent}: the index cannot be kept there ({error.strerror}), and is made anew each time"
        return replace(found, notes=(*found.notes, f"{why}; CLIPMILL_CACHE names another folder"))
    return found


def _seal(path: Path, info: dict[str, Any], notes: Sequence[str]) -> str:
    """A hash of all that is kept: neither file is believed without the other."""
    beside = json.dumps([info, list(notes)], sort_keys=True).encode()
    return hashlib.sha256(path.read_bytes() + beside).hexdigest()
