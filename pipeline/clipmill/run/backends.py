"""What the engines that come in through joblib's backends share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from typing import Any


def streamed(
    backend: Any, workers: int, ahead: int, function: Callable[[Any], Any], units: Sequence[Any]
) -> Generator[tuple[int, Any], None, None]:
    """Yield (place in `units`, result) as joblib's backend has them; `ahead` units are given in advance."""
    from joblib import Parallel, delayed

    pool = Parallel(
        n_jobs=workers,
        backend=backend,
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch=ahead,
    )
    # Each in a tuple: joblib's Dask backend would leave a bare unit with one worker, to be lost with it.
    results = pool(delayed(_call)(function, job) for job in enumerate(units))
    try:
        # `yield from` would close them before the warning is silenced.
        for result in results:  # noqa: UP028
            yield result
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # not everything was done, when we are stopped
            results.close()


def _call(function: Callable[[Any], Any], job: tuple[int, Any]) -> tuple[int, Any]:
    place, unit = job
    return place, function(unit)
