"""Work done ahead of time by threads, handed over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Results that wait beside those that the threads work on."""


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item, in order, worked out ahead by `workers` threads; 0: when it is asked for.

    Threads, not processes: what takes time here, reading and decoding, lets go of Python's lock. So
    nothing is copied between processes, and nothing is left behind when one is killed. Closing the
    generator ends the threads, after what each is at.

    Raises:
        what `work` raises, in the item's turn.
    """
    if not workers:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, "clipmill-loader")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) >= workers + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
