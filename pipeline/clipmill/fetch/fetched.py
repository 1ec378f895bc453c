"""A fetched dataset on disk: its manifest, its ledger, and fetch.json, which vouches for the two."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import ConfigError, FetchError
from clipmill.fetch.ledger import Ledger
from clipmill.types import Failure

MANIFEST_FILE, LEDGER_FILE, FETCH_FILE = "manifest.parquet", "ledger.sqlite", "fetch.json"


@dataclass(frozen=True)
class Fetched:
    """A fetched dataset: the clips wanted, where their media is, and what was lost.

    `manifest` holds the clips that fetching has come to; `left` says how many more are wanted
    that it has not. `counts` are the outcomes (in = had + failed + skipped); `about` holds
    title, licence, citation and the like.
    """

    name: str
    kind: str
    folder: Path
    media_root: Path
    manifest: pa.Table
    losses: list[Failure]
    about: dict[str, Any]
    counts: dict[str, int]
    left: int = 0


def folder_of(root: Path, name: str) -> Path:
    """The folder of the dataset called `name`.

    Raises:
        ConfigError: no dataset can be called that.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise ConfigError(f"dataset name {name!r}: allowed are 1 to 60 letters, digits, '_' and '-'")
    return root / name


def facts_of(root: Path, name: str) -> dict[str, Any]:
    """What fetch.json says of a dataset that was fetched under `root`.

    Raises:
        FetchError: it was not.
        TableError: the file is damaged.
    """
    path = folder_of(root, name) / FETCH_FILE
    if not path.is_file():
        have = ", ".join(fetched_names(root)) or "none"
        raise FetchError(
            f"{name!r} has not been fetched under {root} (fetched there: {have}); see `pipeline fetch --help`"
        )
    said = tables.read_json(path, "name", "kind", "media_root", "about", "by_segment")
    if said["by_segment"] and not said.get("request"):
        raise FetchError(f"{name}: the last fetch was ended while it listed the clips; run it again")
    return said


def state_of(root: Path, name: str) -> dict[str, str]:
    """What decides all that `load` gives: each file's sha256, read in seconds where `load` takes half a minute."""
    files = (FETCH_FILE, MANIFEST_FILE, LEDGER_FILE, f"{LEDGER_FILE}-wal")
    paths = [folder_of(root, name) / file for file in files]
    return {path.name: tables.sha256_of(path)[0] for path in paths if path.is_file()}


def load(root: Path, name: str, *, need_media: bool = True) -> Fetched:
    """A dataset that was fetched under `root`; also one that is being fetched, as far as that has come.

    Raises:
        FetchError: it was not; or, with `need_media`, its media are gone.
        TableError: its tables are damaged.
    """
    said = facts_of(root, name)
    folder, media_root = root / name, (root / name / said["media_root"]).resolve()
    if need_media and not media_root.is_dir():
        raise FetchError(
            f"{name}: its media folder {media_root} is not there any more; fetch it again with its new place"
        )
    manifest = tables.read_table(folder / MANIFEST_FILE, tables.MANIFEST)
    with Ledger(folder / LEDGER_FILE) as ledger:
        losses, counts = ledger.losses(), ledger.counts()
        found = known(manifest, ledger) if said["by_segment"] else manifest
    left = manifest.num_rows - found.num_rows
    del manifest
    pa.default_memory_pool().release_unused()  # of two million rows half a gigabyte, which nobody will need again
    return Fetched(said["name"], said["kind"], folder, media_root, found, losses, said["about"], counts, left)


def known(manifest: pa.Table, ledger: Ledger) -> pa.Table:
    """The clips of a manifest that the ledger has an outcome for, with the source, size and stretch that it knows."""
    rows = ledger.table("key", "source", "bytes", "start_s", "end_s")
    place = pc.index_in(manifest["key"], rows["key"].combine_chunks()).combine_chunks()
    there = place.is_valid()
    manifest, place = manifest.filter(there), place.filter(there)
    for name in rows.column_names[1:]:
        field = tables.MANIFEST.field(name)
        column = rows[name].combine_chunks().take(place)
        manifest = manifest.set_column(manifest.schema.get_field_index(name), field, column)
    return manifest


def restricted(got: Fetched, keys: pa.Array, why: str) -> Fetched:
    """The same dataset with these clips alone; one that fetching never came to is a failure with message `why`."""
    manifest = got.manifest.filter(pc.is_in(got.manifest["key"], keys))
    wanted = set(keys.to_pylist())
    losses = [loss for loss in got.losses if loss.key in wanted]
    absent = keys.filter(pc.invert(pc.is_in(keys, manifest["key"].combine_chunks()))).to_pylist()
    losses += [Failure(key, "", "fetch", "failed", "missing", why) for key in absent]
    rest = tables.manifest_table({"key": absent, "source": [""] * len(absent), "labels": [[]] * len(absent)})
    whole = pa.concat_tables([manifest, rest]).sort_by("key")
    counts = {"had": whole.num_rows - len(losses), "failed": 0, "skipped": 0}
    for loss in losses:
        counts[loss.outcome] += 1
    return replace(got, manifest=whole, losses=losses, counts=counts, left=0)


def fetched_names(root: Path) -> list[str]:
    """The datasets fetched under `root`, sorted."""
    return sorted(path.parent.name for path in root.glob(f"*/{FETCH_FILE}"))
