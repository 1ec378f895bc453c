"""What a set of shards holds, in numbers: the facts behind `pipeline inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.shards.read import Shards

NARROW_HZ = 8000
"""Clips with nothing above it are counted, where the sample rate has room for more."""


def summarize(where: str | Path, keep: str | None = None) -> dict[str, Any]:
    """Clips, hours, durations, labels, folds, quality, and what failed and why, as plain values.

    `keep` is an expression as `Shards.where` takes it: all but `shards`, `bytes` and `clips_of`, the
    number of clips before it, then speaks of the clips that it keeps.

    `counts`, `failures` and `root_sha256` are those of the whole dataset, also where only
    some of its shards or clips are asked for (`whole` is then false).

    Durations are in seconds, before and after padding; loudness in LUFS, levels in dB re full scale,
    `dc` re full scale, `clipped` and `silent` are shares of a clip; `quality` counts clips.

    Raises:
        ConfigError: `keep` cannot be read.
        ShardError: there are no shards, or no index, or `keep` keeps no clip.
    """
    shards = everything = Shards.open(where, ours=True)
    if keep is not None:
        shards = everything.where(keep)
    index, info = shards.index, shards.info
    failures = tables.read_jsonl(shards.folder / "failures.jsonl")
    hears_more = shards.sample_rate > 2 * NARROW_HZ
    labels = _tally(pc.list_flatten(index["labels"]))
    padded_s = pc.divide(index["samples"], shards.sample_rate)
    return {
        "name": shards.name,
        "folder": str(shards.folder),
        "about": info["about"],
        "spec": info["spec"],
        "root_sha256": info["root_sha256"],
        "counts": info["counts"],
        "stopped": info["stopped"],
        "whole": shards.whole and keep is None,
        "where": keep,
        "shards": len(shards.files),
        "bytes": sum(entry["bytes"] for entry in info["shards"] if entry["shard"] in shards.files),
        "clips": len(shards),
        "clips_of": len(everything),
        "hours": float(pc.sum(index["duration_s"]).as_py() or 0.0) / 3600,
        "padded_hours": float(pc.sum(padded_s).as_py() or 0) / 3600,
        "duration_s": _spread(index["duration_s"]),
        "padded_seconds": _tally(padded_s),
        "classes": len(shards.labels),
        "labels": {label: labels.get(label, 0) for label in shards.labels},
        "unlabelled": _count(pc.equal(pc.list_value_length(index["labels"]), 0)),
        "splits": _tally(index["split"]),
        "folds": _tally(index["fold"]),
        "groups": pc.count_distinct(index["group"]).as_py(),
        **{name: _spread(index[name]) for name in ("loudness_lufs", "peak_db", "rms_db", "bandwidth_hz")},
        **{name: _spread(index[name], digits=6) for name in ("dc", "clipped", "silent")},
        "quality": {
            "clipped": _count(pc.greater(index["clipped"], 0)),
            "more_than_half_silent": _count(pc.greater(index["silent"], 0.5)),
            "narrow": _count(pc.less(index["bandwidth_hz"], NARROW_HZ)) if hears_more else 0,
        },
        "source_rates": _tally(index["source_rate"]),
        "source_channels": _tally(index["source_channels"]),
        "failures": [
            {k: row[k] for k in ("key", "source", "outcome", "reason", "message")} for row in failures
        ],
    }


def _spread(column: pa.ChunkedArray, digits: int = 3) -> dict[str, float] | None:
    """Least, quartiles, greatest and mean of what is known; None of nothing."""
    values = pc.drop_null(column).to_numpy()
    if not len(values):
        return None
    low, q1, median, q3, high = np.percentile(values, [0, 25, 50, 75, 100])
    mean = values.mean(dtype=np.float64)
    spread = {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "mean": mean}
    return {name: round(float(value), digits) for name, value in spread.items()}


def _tally(column: pa.ChunkedArray) -> dict[str, int]:
    """Value -> how often, in order of value; keys as text, as JSON has them; nulls are not counted."""
    counts = pc.value_counts(pc.drop_null(column)).to_pylist()
    return {str(row["values"]): row["counts"] for row in sorted(counts, key=lambda row: row["values"])}


def _count(condition: pa.ChunkedArray) -> int:
    """How many are true."""
    return pc.sum(condition).as_py() or 0
