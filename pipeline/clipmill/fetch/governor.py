"""The governor: when the next question may be asked, for all workers together.

One rate budget; and when the site wants us gone (a bot check, HTTP 429) or nothing works any
more (clip after clip fails for reasons that are not its own), the whole fleet pauses, longer
each time. After a bounded number of pauses with no answer in between it gives up. Each address
that we ask from (each proxy) has a governor of its own; they share the budget. Pure: both are
told the time, in seconds of any one clock, and sleep never.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime

LONGEST_PAUSE_S = 3600.0
LONGEST_RETRY_AFTER_S = 6 * 3600.0


@dataclass
class Budget:
    """So many questions an hour, evenly spaced; None: as fast as can be."""

    per_hour: float | None = None
    _next: float = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds until the next question may be asked; 0: now."""
        return max(self._next - now, 0.0)

    def asks(self, now: float) -> None:
        """A question is asked now."""
        if self.per_hour:
            # Time that went by unused is not made up for: bursts are what gets one banned.
            self._next = max(self._next, now) + 3600.0 / self.per_hour


@dataclass
class Governor:
    """The pauses of one address. `streak` failures in a row that no clip is to blame for count as a refusal."""

    pause_s: float = 60.0
    max_pauses: int = 6
    streak: int = 12

    pauses: int = 0
    paused_until: float = 0.0
    why: str = ""
    in_a_row: set[int] = field(default_factory=set)
    _paused_at: float = float("-inf")

    def wait_s(self, now: float) -> float:
        """Seconds until the pause is over; 0: there is none."""
        return max(self.paused_until - now, 0.0)

    def answered(self, asked_at: float) -> None:
        """A clip was had, or lost for a reason of its own: the site talks to us."""
        self.in_a_row.clear()
        if asked_at > self._paused_at:
            self.pauses = 0

    def refused(
        self,
        why: str,
        asked_at: float,
        now: float,
        retry_after_s: float | None = None,
        *,
        steady: bool = False,
    ) -> bool:
        """The site refuses all of us: pause the fleet. Returns whether this was news.

        What was asked before the pause began says nothing new, unless it is told to wait longer.
        A `steady` pause is no longer than the first.
        """
        wait_s = min(retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)
        news = asked_at > self._paused_at
        if news:
            wait_s = max(wait_s, min(self.pause_s * (1 if steady else 2**self.pauses), LONGEST_PAUSE_S))
            self.pauses += 1
            self._paused_at = now
            self.in_a_row.clear()
            self.why = why
        self.paused_until = max(self.paused_until, now + wait_s)
        return news

    def failed(self, clip: int, why: str, asked_at: float, now: float, *, steady: bool = False) -> bool:
        """A clip failed for a reason that may not be its own. Returns whether that makes the fleet pause."""
        if asked_at <= self._paused_at:
            return False
        self.in_a_row.add(clip)
        if len(self.in_a_row) < self.streak:
            return False
        return self.refused(
            f"{len(self.in_a_row)} clips in a row failed ({why})", asked_at, now, steady=steady
        )

    @property
    def exhausted(self) -> bool:
        """Whether it has paused as often as it may, and was refused again."""
        return self.pauses > self.max_pauses


def seconds_to_wait(retry_after: str) -> float | None:
    """What a Retry-After header asks for, in seconds from now (RFC 9110, 10.2.3: seconds, or a date); None: nothing."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", retry_after):
        return float(retry_after)
    try:
        until = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=timezone.utc)
    return max((until - datetime.now(timezone.utc)).total_seconds(), 0.0)
