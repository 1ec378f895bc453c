"""What a set of shards holds, in numbers: the facts behind `pipeline inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from clipmill import tables
from clipmill.shards.read import Shards


def summarize(where: str | Path) -> dict[str, Any]:
    """Clips, hours, durations, labels, folds, loudness, and what failed and why, as plain values.

    `counts`, `failures` and `root_sha256` are those of the whole dataset, also where only
    some of its shards are asked for (`whole` is then false).

    Durations are in seconds, before and after padding; loudness in LUFS, levels in dB re full scale.

    Raises:
        ShardError: there are no shards, or no index.
    """
    shards = Shards.open(where)
    index, info = shards.index, shards.info
    failures = tables.read_jsonl(shards.folder / "failures.jsonl")
    labels = Counter(pc.list_flatten(index["labels"]).to_pylist())
    unlabelled = pc.sum(pc.equal(pc.list_value_length(index["labels"]), 0)).as_py() or 0
    padded_s = shards.samples / shards.sample_rate
    return {
        "name": shards.name,
        "folder": str(shards.folder),
        "about": info["about"],
        "spec": info["spec"],
        "root_sha256": info["root_sha256"],
        "counts": info["counts"],
        "whole": shards.whole,
        "shards": len(shards.files),
        "bytes": sum(entry["bytes"] for entry in info["shards"] if entry["shard"] in shards.files),
        "clips": len(shards),
        "hours": float(pc.sum(index["duration_s"]).as_py() or 0.0) / 3600,
        "padded_hours": float(padded_s.sum()) / 3600,
        "duration_s": _spread(index["duration_s"].to_numpy()),
        "padded_seconds": _tally(padded_s.astype(int).tolist()),
        "classes": len(shards.labels),
        "labels": {label: labels.get(label, 0) for label in shards.labels},
        "unlabelled": unlabelled,
        "splits": _tally(index["split"].to_pylist()),
        "folds": _tally(fold for fold in index["fold"].to_pylist() if fold is not None),
        "groups": pc.count_distinct(index["group"]).as_py(),
        "loudness_lufs": _spread(pc.drop_null(index["loudness_lufs"]).to_numpy()),
        "peak_db": _spread(index["peak_db"].to_numpy()),
        "rms_db": _spread(index["rms_db"].to_numpy()),
        "source_rates": _tally(index["source_rate"].to_pylist()),
        "source_channels": _tally(index["source_channels"].to_pylist()),
        "failures": [
            {k: row[k] for k in ("key", "source", "outcome", "reason", "message")} for row in failures
        ],
    }


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Least, quartiles, greatest and mean; None of nothing."""
    if not len(values):
        return None
    low, q1, median, q3, high = np.percentile(values, [0, 25, 50, 75, 100])
    spread = {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "mean": float(values.mean())}
    return {name: round(float(value), 3) for name, value in spread.items()}


def _tally(values: Any) -> dict[str, int]:
    """Value -> how often, in order of value; keys as text, as JSON has them."""
    return {str(value): count for value, count in sorted(Counter(values).items())}
