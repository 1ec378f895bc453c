"""Which clip is asked for next."""

from __future__ import annotations

import heapq
from collections import deque


class Queue:
    """Rows of a table to be asked for: first those whose time has come again, then fresh ones, then those put last."""

    def __init__(self, rows: int) -> None:
        self._rows, self._fresh = rows, 0
        self._again: list[tuple[float, int]] = []
        self._last: deque[int] = deque()

    def __len__(self) -> int:
        return self._rows - self._fresh + len(self._again) + len(self._last)

    def put(self, row: int, at: float) -> None:
        """Ask for a row again, not before `at` (seconds of the clock that `pop` is told)."""
        heapq.heappush(self._again, (at, row))

    def put_last(self, row: int) -> None:
        """Ask for a row again when all others have been."""
        self._last.append(row)

    def wait_s(self, now: float) -> float:
        """Seconds until `pop` has something."""
        if self._fresh < self._rows or self._last:
            return 0.0
        return self._again[0][0] - now if self._again else float("inf")

    def pop(self, now: float) -> int | None:
        """The row whose turn it is; None: none is due."""
        if self._again and self._again[0][0] <= now:
            return heapq.heappop(self._again)[1]
        if self._fresh < self._rows:
            self._fresh += 1
            return self._fresh - 1
        return self._last.popleft() if self._last else None

    @property
    def asked_again(self) -> list[int]:
        """All rows that wait and were asked for before."""
        return [*self._last, *(row for _, row in self._again)]

    def tried(self) -> list[int] | None:
        """All rows that wait, where none of them is fresh."""
        return None if self._fresh < self._rows else self.asked_again
