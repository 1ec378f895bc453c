"""The local engine: joblib's process pool, results as they come."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_WATCH_EVERY_S = 0.5


@dataclass(frozen=True)
class Local:
    """`jobs` processes of this machine; 1: this process itself."""

    jobs: int = 1

    def run(
        self, function: Callable[[Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """See `clipmill.run.Engine`; a worker that dies ends the round."""
        if self.jobs == 1:
            for place, unit in enumerate(units):
                yield place, function(unit)
            return
        from joblib import Parallel, delayed
        from joblib.externals.loky import get_reusable_executor
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        # One unit at a time and few in advance: units are minutes of work, and their arguments are not small.
        pool = Parallel(
            n_jobs=self.jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs"
        )
        call = _Call(function, os.getpid())
        with safe_path():
            try:
                yield from pool(delayed(call)(place, unit) for place, unit in enumerate(units))
            except TerminatedWorkerError:
                return
            finally:
                # Left to itself the pool lives on for minutes, in the way of what comes next.
                get_reusable_executor().shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """Python processes started meanwhile import nothing from the folder they start in, from Python 3.11 on.

    That is the user's current folder, and a `random.py` there would be taken for the real one.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


@dataclass(frozen=True)
class _Call:
    """`function`, in a worker that ends with the process that started it."""

    function: Callable[[Any], Any]
    parent: int

    def __call__(self, place: int, unit: Any) -> tuple[int, Any]:
        _watch(self.parent)
        return place, self.function(unit)


_watched = threading.Event()


def _watch(parent: int) -> None:
    """joblib's workers would wait for work for minutes after their parent was killed, and tell of a Ctrl-C."""
    if not _watched.is_set():
        _watched.set()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY_S)
    os._exit(1)
