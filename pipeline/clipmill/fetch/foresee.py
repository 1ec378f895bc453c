"""What a fetch would do, without doing it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.datasets import Dataset
from clipmill.fetch import archives
from clipmill.fetch.adopt import candidates
from clipmill.fetch.fetched import LEDGER_FILE, MANIFEST_FILE, folder_of
from clipmill.fetch.job import as_it_is, must_be_of, to_adopt, to_ask, wanted
from clipmill.fetch.ledger import Ledger
from clipmill.fetch.lock import Lock
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.watch import QUIET, Watch

_BYTES_A_SECOND = 16_000.0
"""Of Opus as YouTube sends it, about; used until there are clips to measure."""


@dataclass(frozen=True)
class Plan:
    """What a fetch would do: clips, hours, bytes on disk (an estimate).

    `per_hour` is the budget, or what the last run came to where that was less; None: not known.
    """

    wanted: int
    had: int
    adopt: int
    ask: int
    per_hour: float | None
    hours: float | None
    bytes: int
    free_bytes: int


def foresee(
    kind: str,
    dataset: Dataset,
    root: Path,
    options: SegmentOptions,
    lock: Lock | None = None,
    watch: Watch = QUIET,
) -> Plan:
    """Say what `fetch` would do, of a dataset that is fetched clip by clip; gets its lists, and writes nothing else.

    Raises:
        As `fetch` does.
    """
    folder = folder_of(root, dataset.name)
    must_be_of(kind, dataset, root, dataset.name)
    if as_it_is(dataset, folder, options, lock):
        manifest = tables.read_table(folder / MANIFEST_FILE, tables.MANIFEST)
    else:
        archives.provide(dataset, folder, watch)
        manifest = wanted(folder, dataset.prepare(folder), lock, watch.say)
    with tempfile.TemporaryDirectory() as scratch:
        there = (folder / LEDGER_FILE).exists()
        with Ledger((folder if there else Path(scratch)) / LEDGER_FILE, write=not there) as ledger:
            had = ledger.columns("key", "bytes", outcome="had")
            aside = pa.array(ledger.had_aside(), pa.string())
            pace, ask, adopt = ledger.pace(), to_ask(manifest, ledger, options.retry), 0
            ask = ask.filter(pc.invert(pc.is_in(ask["key"], aside)))
            if options.from_dirs:
                here = pc.unique(candidates(options.from_dirs, to_adopt(manifest, ledger))[0]["key"])
                adopt, ask = len(here), ask.filter(pc.invert(pc.is_in(ask["key"], here)))
    seconds = pc.sum(pc.subtract(ask["end_s"], ask["start_s"])).as_py() or 0.0
    had_seconds = 10.0 * len(had["key"])
    each_s = sum(size or 0 for size in had["bytes"]) / had_seconds if had_seconds else _BYTES_A_SECOND
    paces = [rate for rate in (options.per_hour, pace[0] if pace else None) if rate]
    per_hour = min(paces, default=None)
    asks = 0 if options.offline else ask.num_rows
    return Plan(
        wanted=manifest.num_rows,
        had=pc.sum(
            pc.is_in(manifest["key"], pa.array([*had["key"], *aside.to_pylist()], pa.string()))
        ).as_py()
        or 0,
        adopt=adopt,
        ask=asks,
        per_hour=per_hour,
        hours=asks / per_hour if per_hour else None,
        bytes=round(seconds * each_s) if asks else 0,
        free_bytes=shutil.disk_usage(_existing(folder)).free,
    )


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.resolve().parents) if place.exists())
