"""The sound files that a user means by files, folders and lists of them, found while they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clipmill.datasets.folder import Found, walk
from clipmill.errors import ConfigError
from clipmill.types import SOUND_SUFFIXES


@dataclass(frozen=True)
class Source:
    """A sound file by the name it is told by; or, with a `reason` and a `message`, why there is none."""

    name: str
    path: Path
    reason: str | None = None
    message: str | None = None


def find_sources(inputs: Iterable[str]) -> Iterator[Source]:
    """Each file as it is named, and each folder's sound files, in the order of the inputs.

    Below a folder, files and folders come sorted by name; what is hidden is left out, and links to
    folders are followed, each once. A folder without sound, or that cannot be read, is a failed source;
    a link that leads nowhere is one that fails when it is opened.
    """
    for name in inputs:
        if not os.path.isdir(name):
            yield Source(name, Path(name))
            continue
        found = False
        for one in walk(name):
            if source := _source(one):
                found = True
                yield source
        if not found:
            said = "the folder holds no sound files (.wav, .flac, .mp3 and the like)"
            yield Source(name, Path(name), "missing", said)


def _source(one: Found) -> Source | None:
    """What a folder holds as a source; None where its name is not that of sound."""
    if one.entry is None:
        why = one.error and (one.error.strerror or one.error)
        return Source(one.path, Path(one.path), "unreadable", f"the folder cannot be read: {why}")
    # Whatever cannot be looked at may be sound, or a folder with sound: it fails when it is opened.
    if one.error is None and os.path.splitext(one.path)[1].lower() not in SOUND_SUFFIXES:
        return None
    return Source(one.path, Path(one.path))


def read_list(file: BinaryIO, name: str) -> Iterator[str]:
    """The paths in a list, one a line; empty lines are passed over.

    Raises:
        ConfigError: the list holds a NUL byte, which no path does.
    """
    for number, line in enumerate(file, 1):
        if b"\0" in line:
            raise ConfigError(
                f"--files-from {name}: line {number} holds a NUL byte; give one path a line, as `find -print` does "
                "(not -print0)"
            )
        if path := line.rstrip(b"\r\n"):
            yield os.fsdecode(path)
