"""The clips that a run was trained on, found again by its config.json: their shards of sound, or a feature store."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clipmill.errors import ClipmillError, TrainError
from clipmill.featurestore import Entry, StoredClips
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import read_config


def own_shards(
    run: Path,
    *,
    cache: Path | None = None,
    settings: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Shards:
    """Open the shards that config.json names, where they still are; the rest is as `Shards.open` takes it.

    Of a run from a feature store whose shards of sound are gone, the store's clips.

    Raises:
        TrainError: no run is there, or its shards are not where they were.
    """
    config = read_config(run)
    places = config.get("shards") or []
    files = config.get("files") or [None] * len(places)
    if not places or len(files) != len(places):
        raise TrainError(f"{run}: its config.json does not say where its shards are; give them with --shards")
    wanted = [_range(place, names) for place, names in zip(places, files, strict=True)]
    try:
        return Shards.open(wanted, cache=cache, settings=settings, say=say)
    except (ClipmillError, OSError) as error:
        if config.get("stored"):
            return _stored(run, config["stored"]["place"])
        raise TrainError(
            f"{run}: the shards that it was trained on cannot be opened ({error}); say where they are with --shards"
        ) from error


def sound_of(clips: Shards) -> Shards | None:
    """The shards of sound of these clips, row by row: their own, or where a store's lay when it was computed.

    None where they are not there any more, or are others by now.
    """
    if not isinstance(clips, StoredClips):
        return clips
    try:
        found = Shards.open(clips.sound)
    except (ClipmillError, OSError):
        return None
    return found if found.root_sha256 == clips.root_sha256 and len(found) == len(clips) else None


def _stored(run: Path, place: str) -> Shards:
    try:
        return Entry.open(Path(place)).clips
    except (ClipmillError, OSError) as error:
        raise TrainError(
            f"{run}: neither the shards nor the features that it was trained on can be opened ({error}); say where "
            "the shards are with --shards"
        ) from error


def _range(place: str, names: list[str] | None) -> str:
    """What `--shards` would say of these files of a folder, None for all: one range, for the files are one set."""
    if names is None:
        return place if Path(place).is_dir() else _literal(place)
    chosen = [_literal(name) for name in names]
    return f"{_literal(place).rstrip('/')}/{chosen[0] if len(chosen) == 1 else '{' + ','.join(chosen) + '}'}"


def _literal(text: str) -> str:
    """A name in a range that means just these letters."""
    return re.sub(r"[\\{},]", r"\\\g<0>", text)
