"""Units of work over an engine's workers: every unit comes to an end, whatever becomes of the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

from clipmill.errors import RunError
from clipmill.run.crew import Lost
from clipmill.run.local import Local

_FRUITLESS = 3
"""After so many rounds without a single result units are tried one by one; each may be lost so many times."""

_IN_FLIGHT = 16
"""So many units may have been under way when a worker died."""


class Engine(Protocol):
    """Where units are worked on: processes of this machine, a Dask or Ray cluster, Slurm."""

    def run(
        self, function: Callable[[Any], Any], units: Sequence[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """One round: yield (place in `units`, result) as units are finished, in any order.

        A unit whose worker was lost comes as (place, `Lost`), or not at all. What `function`
        itself raises ends the round and is raised here as it is. Closing the generator ends
        all that was started.
        """
        ...


def run_rounds(
    function: Callable[[Any], Any], units: Sequence[Any], engine: Engine
) -> Generator[tuple[int, Any], None, None]:
    """Call `function` on every unit; yield (place in `units`, result) for each, once, in any order.

    Units whose workers were lost are given again, round after round, and when nothing comes of
    that one by one; those that are lost even so are yielded with a `Lost` that says why. When
    nothing comes of a batch of those either, all that are left are lost with it. `function` may be
    called again on a unit that it has finished, where only the answer was lost.

    Raises:
        what `function` raises: it ends the run, and units in flight are dropped.
    """
    left = list(range(len(units)))
    losses: Counter[int] = Counter()
    fruitless = 0
    while left:
        done, worked = set(), False
        with closing(engine.run(function, [units[place] for place in left])) as found:
            for number, result in found:
                losses[left[number]] += isinstance(result, Lost)
                if not isinstance(result, Lost) or losses[left[number]] == _FRUITLESS:
                    done.add(number)
                    worked |= not isinstance(result, Lost)
                    yield left[number], result
        fruitless = 0 if worked else fruitless + 1
        left = [place for number, place in enumerate(left) if number not in done]
        # One of the first may take down whoever works on it: the others come before it now.
        some = min(_IN_FLIGHT, -(-len(left) // 2))
        left = left[some:] + left[:some]
        if fruitless == _FRUITLESS:
            for place in left[:_IN_FLIGHT]:
                result = _alone(function, units[place], engine)
                worked |= not isinstance(result, Lost)
                yield place, result
            left, fruitless = left[_IN_FLIGHT:], 0
            if not worked:  # it is not the units: no worker lives here
                yield from ((place, result) for place in left)
                return


def _alone(function: Callable[[Any], Any], unit: Any, engine: Engine) -> Any:
    """The result of a unit that nothing else is worked on beside, so that it can take down only itself."""
    why = Lost("tool-error", "each worker process that had it was lost")
    for _ in range(_FRUITLESS):
        with closing(engine.run(function, [unit])) as found:
            for _, result in found:
                if not isinstance(result, Lost):
                    return result
                why = result
    return why


def run_units(
    function: Callable[[Any], Any], units: Sequence[Any], jobs: int
) -> Generator[tuple[int, Any], None, None]:
    """`run_rounds` in `jobs` processes of this machine (1: in this one), for units that are all needed.

    Raises:
        RunError: units are left whose worker processes died each time (killed, or out of memory).
    """
    for place, result in run_rounds(function, units, Local(jobs)):
        if isinstance(result, Lost):
            raise RunError(
                "worker processes were killed or ran out of memory, again and again; what is finished stays "
                "finished: run the same command again, with a smaller --jobs if memory was short"
            )
        yield place, result
