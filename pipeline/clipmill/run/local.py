"""The local engine: joblib's process pool, results as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from clipmill.errors import RunError

Unit = TypeVar("Unit")
Result = TypeVar("Result")


def run_units(function: Callable[[Unit], Result], units: Iterable[Unit], jobs: int) -> Iterator[Result]:
    """Call `function` on every unit in `jobs` processes (1: in this one); yield results in any order.

    An error in a unit ends the run and is raised here; units in flight are dropped.

    Raises:
        RunError: a worker process died (killed, or out of memory).
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    # One unit at a time and few in advance: units are minutes of work, and their arguments are not small.
    pool = Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs")
    try:
        yield from pool(delayed(function)(unit) for unit in units)
    except TerminatedWorkerError as error:
        raise RunError(
            "a worker process was killed, or ran out of memory; what is finished stays finished: "
            "run the same command again, with a smaller --jobs if memory was short"
        ) from error
    finally:
        if jobs > 1:
            # Left to itself the pool lives on for minutes, in the way of what comes next.
            get_reusable_executor().shutdown(wait=True, kill_workers=True)
