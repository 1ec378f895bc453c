"""The files of an entry: their names, the table of clips, and JSON that notices when a byte of it was changed.

logmel-esc10-1a2b3c4d5e6f/
    entry.json             spec, lineage, documentation, counts, statistics; says whether it is finished
    index.parquet          copies of the shards': labels, folds, groups, splits, quality columns
    dataset.json
    esc10-all-000000.h5    the features of one shard's clips
    esc10-all-000000.json  its record; a file without one is not finished
    features.parquet       one row a clip: where its feature lies
    failures.jsonl         one row for each clip without a feature
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill import tables
from clipmill.errors import TableError
from clipmill.shards.locate import ENTRY_FILE

__all__ = ["ENTRY_FILE", "TABLE", "TABLE_FILE", "digest_of", "read_sealed", "write_sealed"]

TABLE_FILE = "features.parquet"

TABLE = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("file", pa.string(), nullable=False),  # name, in the entry's folder
        pa.field("offset", pa.int64()),  # bytes from the start of the file; null: it has no feature
        pa.field("length", pa.int64()),  # bytes
        pa.field("frames", pa.int64(), nullable=False),  # that its samples give
        pa.field("crc32", pa.uint32()),  # of its bytes
        pa.field("reason", pa.string()),  # why it has no feature: a key of types.REASONS
    ]
)
"""features.parquet: one row a clip, in the order of index.parquet."""

_SEAL = "seal"


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with a hash of all it says, atomically."""
    tables.write_json(path, {**value, _SEAL: _seal(value)})


def read_sealed(path: Path, *needed: str) -> dict[str, Any]:
    """Read what `write_sealed` wrote, with these fields.

    Raises:
        TableError: it is missing, unreadable, lacks a field, or was changed since.
    """
    said = tables.read_json(path, _SEAL, *needed)
    if said.pop(_SEAL) != _seal(said):
        raise TableError(f"{path}: is damaged: it does not say what was written there")
    return dict(said)


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """A file's sha256 in hex; None where it cannot be read."""
    try:
        return tables.sha256_of(path)[0]
    except OSError:
        return None
