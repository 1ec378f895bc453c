"""Clips that cannot be read: told, counted, and too many of them an end with a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clipmill.errors import ShardError

MAX_BAD = 0.01
"""Share of the clips that may be unreadable, unless told otherwise."""


@dataclass(frozen=True)
class Bad:
    """A clip that could not be read.

    Attributes:
        key: the clip's.
        shard: path or URL of its shard.
        reason: one of `clipmill.types.REASONS`.
        message: what went wrong, in words.
        instead: key of the clip that stands in for it; None where none does.
    """

    key: str
    shard: str
    reason: str
    message: str
    instead: str | None = None

    def __str__(self) -> str:
        stand_in = f"; {self.instead} stands in for it" if self.instead else ""
        return f"{self.shard}: clip {self.key} cannot be read: {self.reason}: {self.message}{stand_in}"


class Damage:
    """The account of unreadable clips: each counts once, however often it is met.

    Args:
        clips: how many there are to read.
        max_bad: share of them that may be unreadable.
        tell: called with each bad clip, each time it is met.
    """

    def __init__(
        self, clips: int, max_bad: float = MAX_BAD, tell: Callable[[Bad], None] = lambda bad: None
    ) -> None:
        self._clips, self._max_bad, self._tell = clips, max_bad, tell
        self._found: dict[tuple[str, str], Bad] = {}

    @property
    def found(self) -> list[Bad]:
        """The bad clips met so far, each once."""
        return list(self._found.values())

    def note(self, bads: Iterable[Bad]) -> None:
        """Take in bad clips.

        Raises:
            ShardError: they are more than `max_bad` allows.
        """
        for bad in bads:
            self._tell(bad)
            self._found.setdefault((bad.shard, bad.key), bad)
            if len(self._found) > self._max_bad * self._clips:
                first = next(iter(self._found.values()))
                raise ShardError(
                    f"{len(self._found)} of {self._clips} clips cannot be read, more than --max-bad {self._max_bad:g} "
                    f"allows; the first: {first}. `pipeline verify` names all damage, a higher --max-bad goes on "
                    "without them"
                )
