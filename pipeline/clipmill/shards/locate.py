"""From what a user calls shards, a folder, a file, a range or a URL, to a set that can be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from braceexpand import braceexpand
from numpy.typing import NDArray

from clipmill.errors import ConfigError, ShardError
from clipmill.shards.account import DATASET_FILE, INDEX_FILE, read_dataset
from clipmill.shards.foreign.indexing import index_foreign
from clipmill.shards.foreign.scan import HDF5_SUFFIXES
from clipmill.shards.index import Index
from clipmill.shards.places import ShardSet
from clipmill.shards.plan import PLAN_FILE
from clipmill.stores import Store, open_store

ENTRY_FILE = "entry.json"
"""What only an entry of a feature store has, beside copies of the tables of shards."""

_ENDINGS = (".tar", *HDF5_SUFFIXES)


def open_set(
    where: str,
    cache: Path | None,
    settings: dict[str, Any] | None,
    ours: bool,
    say: Callable[[str], None],
) -> tuple[ShardSet, NDArray[np.int64]]:
    """One set, and which rows of its index are of the shards asked for; see `Shards.open`."""
    folder, names = _resolve(where)
    store = open_store(folder, cache=cache, settings=settings)
    if store.near and store.exists(ENTRY_FILE):  # feature stores are never far; a far one costs a request
        raise ShardError(
            f"{folder}: holds stored features, and this needs sound: `pipeline features show` says of which shards"
        )
    if not store.exists(DATASET_FILE):
        return _open_foreign(store, names, ours, say)
    info = read_dataset(store.local(DATASET_FILE).parent)
    if not store.exists(INDEX_FILE):
        raise ShardError(
            f"{folder}: its {INDEX_FILE} is missing; `pipeline verify --repair` puts it together"
        )
    index = Index(store.local(INDEX_FILE))
    strange = set(index.label_lists()[2]) - set(info["labels"])
    if strange:
        raise ShardError(
            f"{folder}: index.parquet has the label {min(strange)!r}, which dataset.json does not"
        )
    if store.near and not ours:
        info = {**info, "notes": _changed(store, info["shards"], names)}
    known = [shard["shard"] for shard in info["shards"]]
    if names is None:
        return ShardSet(store, info, index, tuple(known)), np.arange(index.num_rows)
    if unknown := sorted(set(names) - set(known)):
        raise ShardError(f"{store.path(unknown[0])}: is not in the index beside it ({len(known)} shards)")
    rows = np.flatnonzero(pc.is_in(index["shard"], pa.array(names)).to_numpy())
    return ShardSet(store, info, index, tuple(names)), rows


def _changed(store: Store, entries: list[dict[str, Any]], names: list[str] | None) -> list[str]:
    """What is to be said of shards that are gone, or of another size than was recorded."""
    wanted = {entry["shard"]: entry["bytes"] for entry in entries if names is None or entry["shard"] in names}
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(store.place) if entry.name in wanted}
    bad = sorted(name for name, size in wanted.items() if sizes.get(name) != size)
    if not bad:
        return []
    found = (
        f"of {sizes[bad[0]]} bytes where {wanted[bad[0]]} are recorded" if bad[0] in sizes else "not there"
    )
    more = f", and {len(bad) - 1} more are gone or of another size" if len(bad) > 1 else ""
    return [f"{store.path(bad[0])}: is {found}{more}; `pipeline verify --repair` mends them"]


def _open_foreign(
    store: Store, names: list[str] | None, ours: bool, say: Callable[[str], None]
) -> tuple[ShardSet, NDArray[np.int64]]:
    """Shards without a dataset.json: others made them, or nothing is there, or ours are not finished."""
    if store.exists(PLAN_FILE):
        raise ShardError(
            f"{store.place}: holds no {DATASET_FILE}; the shard job there has not finished: run it again"
        )
    if names is None:
        names = [name for name in store.names() if name.endswith(_ENDINGS)]
    if not names:
        raise ShardError(
            f"{store.place}: holds no {DATASET_FILE}, and no {' or '.join(_ENDINGS)} either; `pipeline shard` makes one"
        )
    if ours:
        raise ShardError(
            f"{store.place}: holds no {DATASET_FILE}, for others made these shards: they can be trained on, scored and "
            "timed (`pipeline bench loader`), and this command wants what `pipeline shard` makes"
        )
    found = index_foreign(store, names, say=say)
    return (
        ShardSet(store, {**found.info, "notes": list(found.notes)}, found.index, tuple(names)),
        np.arange(found.index.num_rows),
    )


def _resolve(where: str) -> tuple[str, list[str] | None]:
    """The folder of the shards, and the file names asked for (None: all of them)."""
    if not _is_url(where) and Path(where).is_dir():
        return where, None
    if where.startswith(("http://", "https://")) and "?" in where:
        raise ConfigError(
            f"{where}: has a query; allowed are plain addresses, for what lies beside a shard is read too"
        )
    try:
        paths = list(braceexpand(where))
    except ValueError as error:
        raise ShardError(f"{where}: {error}; a range looks like name-{{000000..000012}}.tar") from error
    if _is_url(where) and not any(path.endswith(_ENDINGS) for path in paths):
        if len(paths) > 1:
            raise ShardError(
                f"{where}: names {len(paths)} folders; allowed is one, or a range of shards in one"
            )
        return where, None
    folders, names = zip(*(_split(path) for path in paths), strict=True)
    if len(set(folders)) > 1:
        raise ShardError(f"{where}: names shards in {len(set(folders))} folders; allowed is one")
    for path in paths:
        if not _is_url(path) and not Path(path).is_file():
            raise ShardError(
                f"{path}: no such shard; SHARDS is a folder, a shard, or a range like b-{{000000..000012}}.tar"
            )
        if not path.endswith(_ENDINGS):
            raise ShardError(f"{path}: is no shard; shards end in {', '.join(_ENDINGS)}")
    return folders[0], list(names)


def _split(path: str) -> tuple[str, str]:
    """A path or URL as its folder and its last part."""
    if not _is_url(path):
        return str(Path(path).parent), Path(path).name
    folder, _, name = path.rpartition("/")
    return folder, name


def _is_url(where: str) -> bool:
    return "://" in where
