"""Clips that another fetch of ours has had, on this machine or a second one: its ledger knows them to the sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.datasets.archive import MEDIA_FOLDER
from clipmill.errors import TableError
from clipmill.fetch.fetched import FETCH_FILE, LEDGER_FILE
from clipmill.fetch.ledger import Ledger

SCHEMA = pa.schema(
    [("key", pa.string()), ("source", pa.string()), ("start_s", pa.float64()), ("end_s", pa.float64())]
)


def dataset_of(folder: Path) -> Path | None:
    """The dataset of ours that a folder is, or is the media of; None where it is neither."""
    for place in (folder, folder.parent) if folder.name == MEDIA_FOLDER else (folder,):
        if (place / LEDGER_FILE).is_file() and (place / FETCH_FILE).is_file():
            return place
    return None


def had_by_others(dirs: Sequence[Path], wanted: pa.Table, warnings: list[str]) -> pa.Table:
    """The clips of `wanted` (column `key`) that fetches in or right under `dirs` had.

    Returns:
        `key`, `source` (absolute), and `start_s`/`end_s`, where in the source the clip lies;
        each clip once, from the first fetch that had it.
    """
    table = SCHEMA.empty_table()
    for folder in _fetches(dirs):
        more = _had(folder, wanted, warnings)
        new = pc.invert(pc.is_in(more["key"], table["key"].combine_chunks()))
        table = pa.concat_tables([table, more.filter(new)])
    return table


def _fetches(dirs: Sequence[Path]) -> list[Path]:
    """The datasets that a user may mean: a dataset's own folder, its media, or the root of several."""
    places = [place for given in dirs for place in (given.resolve(), *sorted(given.resolve().glob("*/")))]
    return list(dict.fromkeys(filter(None, map(dataset_of, places))))


def _had(folder: Path, wanted: pa.Table, warnings: list[str]) -> pa.Table:
    media = folder / MEDIA_FOLDER
    try:
        if not media.is_dir():
            media = folder / tables.read_json(folder / FETCH_FILE, "media_root")["media_root"]
        with Ledger(folder / LEDGER_FILE) as ledger:
            had = ledger.table(*SCHEMA.names, outcome="had").cast(SCHEMA)
    except TableError as error:
        warnings.append(str(error))
        return SCHEMA.empty_table()
    had = had.filter(pc.is_in(had["key"], wanted["key"].combine_chunks()))
    sources = pa.array([str(media / source) for source in had["source"].to_pylist()], pa.string())
    return had.set_column(1, "source", sources)
