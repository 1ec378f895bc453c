"""Clips that cannot be read: told, counted, and too many of them an end with a clear error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clipmill.errors import ShardError
from clipmill.shards.reader import Unread

MAX_BAD = 0.01
"""Share of the clips that may be unreadable, unless told otherwise."""


STORE_REASONS = frozenset({"network", "timeout", "forbidden"})
"""Reasons that are the store's, and no clip's."""


@dataclass(frozen=True)
class Bad:
    """A clip that could not be read.

    Attributes:
        key: the clip's.
        shard: path or URL of its shard.
        reason: one of `clipmill.types.REASONS`.
        message: what went wrong, in words.
        instead: key of the clip that stands in for it; None where none does.
        step: of training, from 1, that it was to be in; None where that is not known.
    """

    key: str
    shard: str
    reason: str
    message: str
    instead: str | None = None
    step: int | None = None

    @classmethod
    def of(cls, unread: Unread, instead: str | None = None, step: int | None = None) -> Bad:
        """From what the reader says."""
        return cls(unread.key, unread.shard, unread.reason, unread.message, instead, step)

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
            check_bad(self.found, self._clips, self._max_bad)


def check_bad(found: Sequence[Bad], clips: int, max_bad: float) -> None:
    """Raise ShardError where so many of `clips` are more than `max_bad` allows; one clip alone is, unless it is 0."""
    if len(found) > (max(1, max_bad * clips) if max_bad else 0):
        raise ShardError(
            f"{len(found)} of {clips} clips cannot be read, more than --max-bad {max_bad:g} allows; the first: "
            f"{found[0]}. {mend(found[0])}, a higher --max-bad goes on without them"
        )


def mend(bad: Bad | Unread) -> str:
    """What helps against damage of this kind."""
    if bad.reason in STORE_REASONS:
        return "A longer --read-timeout, or the same command with --resume when the store answers again, may help"
    return "`pipeline verify` names all damage of shards that `pipeline shard` made"
