"""Keys for clips whose dataset gives them none: from the source's path, and the stretch of it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

_LONGEST = 80  # a tar member's name has 100 bytes; a hash and an extension must fit too


Place = tuple[str, float | None, float | None]
"""A source's path, and where its clip starts and ends, in seconds."""


def keys_for(places: Sequence[Place]) -> list[str]:
    """A key for each clip: letters, digits, '_' and '-' alone, unique, and independent of the order.

    `dog/a b.wav` becomes `dog_a_b`; a clip that starts at 30 s of `x.wav`, `x_30000` (ms).
    Where several clips come to the same key (ignoring case, for file systems that do),
    or it is too long, each gets a hash of its own path and stretch.
    """
    keys = {
        place: _slug(place[0]) + ("" if place[1] is None else f"_{round(place[1] * 1000)}")
        for place in places
    }
    seen = Counter(key.lower() for key in keys.values())
    for place, key in keys.items():
        if seen[key.lower()] > 1 or len(key) > _LONGEST or not key.strip("_-"):
            keys[place] = f"{key[:_LONGEST]}-{hashlib.sha256(repr(place).encode()).hexdigest()[:8]}"
    return [keys[place] for place in places]


def _slug(path: str) -> str:
    stem = path[: -len(suffix)] if (suffix := _suffix(path)) else path
    return re.sub(r"[^A-Za-z0-9-]+", "_", stem.strip("/"))


def _suffix(path: str) -> str:
    found = re.search(r"(?<=[^/])\.[A-Za-z0-9]{1,5}$", path)
    return found.group() if found else ""
