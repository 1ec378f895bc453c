"""Whether media that were had are still there: nothing looks at a million files unless it is asked to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from clipmill.fetch.ledger import Ledger
from clipmill.fetch.watch import Watch
from clipmill.run import run_units
from clipmill.sources import in_place_order, is_there

_AT_ONCE = 2000


def gone(
    media_root: Path, had: pa.Table, jobs: int, update: Callable[[int, str], None] = lambda done, facts: None
) -> list[str]:
    """The keys of `had` (key, source, bytes) whose source is not there any more, or has another size."""
    had = had.select(["key", "source", "bytes"]).combine_chunks()
    order = in_place_order(had["source"])
    # Taken, not sliced: a pickled slice would carry the whole table to every worker.
    units = [
        (media_root, had.take(order[first : first + _AT_ONCE])) for first in range(0, had.num_rows, _AT_ONCE)
    ]
    lost: list[str] = []
    for done, (_, keys) in enumerate(run_units(_look, units, jobs), 1):
        lost += keys
        update(min(done * _AT_ONCE, had.num_rows), f"gone {len(lost)}")
    return sorted(lost)


def _look(unit: tuple[Path, pa.Table]) -> list[str]:
    media_root, rows = unit
    return [row["key"] for row in rows.to_pylist() if not is_there(media_root, row["source"], row["bytes"])]


def forget_gone(manifest: pa.Table, ledger: Ledger, media_root: Path, jobs: int, watch: Watch) -> None:
    """Take back, as never asked for, the clips that were had and whose media are gone or changed; say how many."""
    had = ledger.table("key", "source", "bytes", outcome="had")
    had = had.filter(pc.is_in(had["key"], manifest["key"].combine_chunks()))
    watch.total("recheck", had.num_rows, "files")
    lost = gone(media_root, had, jobs, watch.update)
    ledger.forget(lost)
    watch.say(
        f"of {had.num_rows} clips had, the media of {len(lost)} are gone or changed: they are wanted again"
    )
