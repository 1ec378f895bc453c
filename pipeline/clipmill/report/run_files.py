"""What a run's files say of it, as far as they can be read: a run may have been killed at any moment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


def read_metrics(path: Path) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """The lines of metrics.jsonl by their kind, train, eval and bad; and how many cannot be read.

    A run that goes on may have written half of the last one. Without the file there are none.
    """
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": [], "bad": []}
    damaged = 0
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    for line in filter(str.strip, lines):
        row = _row(line)
        if row is None:
            damaged += 1
        elif row["kind"] in rows:
            rows[row["kind"]].append(row)
    return rows, damaged


def part_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of config.json that is an object; an empty one where it is missing or anything else."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def best_step(path: Path) -> int | None:
    """The step of the best weights, which stands in their file's header; None where it does not.

    Whether the weights can be read at all is for `read_run` to say.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if isinstance(row["kind"], str) and is_number(row["step"]) else None
    except (ValueError, KeyError, TypeError):
        return None
