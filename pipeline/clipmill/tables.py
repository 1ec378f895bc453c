"""The manifest and the index: Arrow tables kept in Parquet, with JSON Lines beside them.

manifest   the clips wanted; one row a clip, written by fetch.
index      the clips that the shards hold; one row a clip, written by shard.

Tables stay columnar: AudioSet has 2.08 M rows, and a Python object for each would
cost gigabytes. Only the worker that builds one shard turns its own rows into `Clip`s.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill.errors import TableError
from clipmill.types import NO_SPLIT, SPLITS, Clip

EVENTS = pa.list_(pa.struct([("label", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]))
"""What sounds when in a clip: seconds from the clip's start."""

MANIFEST = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("fold", pa.int32()),
        pa.field("group", pa.string()),
        pa.field("bytes", pa.int64()),  # size of the source when it was fetched
        pa.field("events", EVENTS),  # null where the dataset has none
    ]
)

INDEX = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),  # file name, in the index's own folder
        pa.field("row", pa.int32(), nullable=False),  # position in the shard
        pa.field("offset", pa.int64()),  # bytes from the start of the shard to the audio
        pa.field("length", pa.int64()),  # bytes of the audio
        pa.field("samples", pa.int64(), nullable=False),  # after padding: a whole number of seconds
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("fold", pa.int32()),
        pa.field("group", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("sha256", pa.string(), nullable=False),  # of the int16 little-endian samples
        pa.field("duration_s", pa.float64(), nullable=False),  # before padding
        pa.field("source_rate", pa.int32(), nullable=False),  # Hz
        pa.field("source_channels", pa.int32(), nullable=False),
        pa.field("peak_db", pa.float32(), nullable=False),  # dB re full scale
        pa.field("rms_db", pa.float32(), nullable=False),  # dB re full scale, before padding
        pa.field("loudness_lufs", pa.float32()),  # ITU-R BS.1770; null under 0.4 s or below the gate
        pa.field("dc", pa.float32(), nullable=False),  # mean of the samples, full scale = 1
        pa.field("clipped", pa.float32(), nullable=False),  # share of samples, 0..1
        pa.field("silent", pa.float32(), nullable=False),  # share of its time, 0..1
        pa.field(
            "bandwidth_hz", pa.float32(), nullable=False
        ),  # up to where there is more than the noise of 16 bits
        pa.field("events", EVENTS),
    ]
)


_held: set[Path] = set()


@contextmanager
def locked(folder: Path, *, again: bool = False) -> Iterator[None]:
    """Hold a folder for one writer, until the process ends at the latest.

    `again`: this may happen within another `locked` of the same folder.

    Raises:
        TableError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if again and folder.resolve() in _held:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    held = _lock(descriptor)
    if not held:  # once more: whoever merely looks whether it is held holds it for an instant
        time.sleep(0.05)
        held = _lock(descriptor)
    if not held:
        os.close(descriptor)
        raise TableError(f"{folder}: another run is writing there; wait for it, or write somewhere else")
    _held.add(folder.resolve())
    try:
        yield
    finally:
        _held.discard(folder.resolve())
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # some network file systems have no locks; what is written is still whole or not there
    return True


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder by `locked` now."""
    try:
        with locked(folder):
            return False
    except TableError:
        return True


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a whole file or nothing: a temporary name, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Workers on other machines have the same process numbers.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys and a last newline, atomically: equal values, equal bytes."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path, *needed: str) -> Any:
    """Read a JSON file; with `needed`, one that is an object with these fields.

    Raises:
        TableError: the file is missing, unreadable, not JSON, or lacks a field.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read as JSON: {error}") from error
    lacking = [name for name in needed if not isinstance(value, dict) or name not in value]
    if lacking:
        raise TableError(f"{path}: is damaged: it lacks {', '.join(lacking)}")
    return value


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object a line, keys sorted, atomically."""
    with atomic_write(path, "w") as file:
        for row in rows:
            file.write(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object a line.

    Raises:
        TableError: the file is missing, unreadable, or a line is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: cannot be read as JSON Lines: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise TableError(f"{path}: cannot be read: every line must be a JSON object")
    return rows


def sha256_of(path: Path) -> tuple[str, int]:
    """A file's sha256 as hex, and its size in bytes, flushed to disk first."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest(), file.tell()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as Parquet, atomically."""
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")


def check_columns(path: Path, schema: pa.Schema) -> int:
    """How many rows a Parquet table has, which must have the columns of `schema`; none is read.

    Raises:
        TableError: the file is missing, not Parquet, or lacks a column.
    """
    try:
        with pq.ParquetFile(path) as file:
            names, rows = file.schema_arrow.names, int(file.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"{path}: cannot be read as a Parquet table: {error}") from error
    lacking = [name for name in schema.names if name not in names]
    if lacking:
        raise TableError(f"{path}: lacks the columns {', '.join(lacking)}; it has {', '.join(names)}")
    return rows


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema` from a Parquet table; those of a dictionary type are decoded no further.

    Raises:
        TableError: the file is missing, not Parquet, or its columns are not those.
    """
    check_columns(path, schema)
    coded = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    try:
        # Not pq.read_table, which imports pyarrow.dataset: a fifth of a second in every command.
        with pq.ParquetFile(path, read_dictionary=coded) as file:
            table = file.read(columns=schema.names)
    except (OSError, pa.ArrowException) as error:
        raise TableError(f"{path}: cannot be read as a Parquet table: {error}") from error
    try:
        return table.select(schema.names).cast(schema)
    except ValueError as error:  # of another type, or null where nothing may be
        raise TableError(f"{path}: has a column that cannot be: {error}") from error


def read_batches(path: Path, schema: pa.Schema, rows: int = 1 << 17) -> Iterator[pa.Table]:
    """The same, so many rows at a time, for columns that are much larger than what is made of them."""
    check_columns(path, schema)
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(rows, columns=schema.names):
                yield pa.Table.from_batches([batch]).select(schema.names).cast(schema)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise TableError(f"{path}: cannot be read as a Parquet table: {error}") from error


def manifest_table(columns: dict[str, Any]) -> pa.Table:
    """Build and check a manifest from columns (lists or Arrow arrays); absent ones are filled.

    `key`, `source` and `labels` are needed. The rows are sorted by key, so that equal
    clips give equal manifests whatever order they were found in.

    Raises:
        TableError: a key stands twice or is no valid key, or a split is unknown.
    """
    rows = len(columns["key"])
    filled = {
        field.name: columns[field.name]
        if field.name in columns
        else pa.array([NO_SPLIT] * rows)
        if field.name == "split"
        else pa.nulls(rows, field.type)
        for field in MANIFEST
    }
    table = pa.table(filled, schema=MANIFEST).sort_by("key")
    check_manifest(table)
    return table


def check_manifest(table: pa.Table) -> None:
    """Raise TableError unless every key is valid and unique and every split is known."""
    keys = table["key"]
    bad = table.filter(pc.invert(pc.match_substring_regex(keys, "^[A-Za-z0-9_-]{1,90}$")))
    if bad.num_rows:
        raise TableError(
            f"key {bad['key'][0].as_py()!r} of {bad['source'][0].as_py()!r} is no valid key: "
            "1 to 90 letters, digits, '_' and '-' (dots would end the key in a WebDataset)"
        )
    counts = pc.value_counts(keys)
    if len(counts) != table.num_rows:
        twice = [c["values"].as_py() for c in counts if c["counts"].as_py() > 1][:3]
        raise TableError(f"keys that stand more than once: {', '.join(twice)}")
    unknown = set(pc.unique(table["split"]).to_pylist()) - set(SPLITS)
    if unknown:
        raise TableError(f"unknown split {sorted(map(str, unknown))[0]!r}; allowed: {', '.join(SPLITS)}")


def clips(table: pa.Table) -> list[Clip]:
    """The rows of a (small) manifest slice as `Clip`s."""
    return [
        Clip(**{**row, "labels": tuple(row["labels"]), "events": row["events"] and tuple(row["events"])})
        for row in table.to_pylist()
    ]


def in_order(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of failures by key, then source: the order they are written in, whoever lost them first."""
    return sorted(failures, key=lambda row: (row["key"], row["source"]))
