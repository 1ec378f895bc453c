"""Fetch a dataset that is already here, or is made here: list it, and write the manifest and the ledger."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import __version__, tables
from clipmill.datasets import Dataset, Prepared
from clipmill.errors import ConfigError, FetchError
from clipmill.fetch.ledger import Ledger
from clipmill.types import Failure
from clipmill_manifests import facts

MANIFEST_FILE, LEDGER_FILE, FETCH_FILE = "manifest.parquet", "ledger.sqlite", "fetch.json"


@dataclass(frozen=True)
class Fetched:
    """A fetched dataset: the clips wanted, where their media is, and what was lost.

    `about` holds title, licence, citation and the like; `counts` the outcomes
    (in = had + failed + skipped).
    """

    name: str
    kind: str
    folder: Path
    media_root: Path
    manifest: pa.Table
    losses: list[Failure]
    about: dict[str, Any]
    counts: dict[str, int]


def fetch(kind: str, dataset: Dataset, root: Path) -> Fetched:
    """Prepare `dataset` under `root/<name>` and write its manifest, ledger and fetch.json.

    Running it again lists the media anew and replaces the three.

    Raises:
        FetchError: nothing can be had.
        ConfigError: the dataset's name or options cannot be.
        TableError: another run is fetching it.
    """
    name = dataset.name
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise ConfigError(f"dataset name {name!r}: allowed are 1 to 60 letters, digits, '_' and '-'")
    folder = root / name
    new = not folder.exists()
    try:
        with tables.locked(folder):
            _fetch(kind, dataset, folder)
    except BaseException:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return load(root, name)


def _fetch(kind: str, dataset: Dataset, folder: Path) -> None:
    """Prepare the dataset and write its tables; fetch.json, which vouches for the others, goes first and comes last."""
    prepared = dataset.prepare(folder)
    manifest = _with_sizes(prepared)
    lost = pa.array([f.key for f in prepared.failures if f.key], pa.string())
    had = manifest.filter(pc.invert(pc.is_in(manifest["key"], lost)))
    (folder / FETCH_FILE).unlink(missing_ok=True)
    tables.write_table(folder / MANIFEST_FILE, manifest)
    with Ledger(folder / LEDGER_FILE, write=True) as ledger:
        ledger.replace(zip(had["key"].to_pylist(), had["source"].to_pylist(), strict=True), prepared.failures)
    about = {k: v for k, v in facts(kind).items() if isinstance(v, str)}
    options = {f.name: _plain(getattr(dataset, f.name)) for f in fields(dataset)}  # type: ignore[arg-type]
    tables.write_json(
        folder / FETCH_FILE,
        {
            "name": dataset.name,
            "kind": kind,
            "options": options,
            "media_root": str(prepared.media_root.resolve()),
            "about": about,
            "clipmill": __version__,
        },
    )


def _with_sizes(prepared: Prepared) -> pa.Table:
    """The manifest with each source's size in bytes, null where it is not there."""
    sizes = {s: _size(prepared.media_root / s) for s in pc.unique(prepared.manifest["source"]).to_pylist()}
    column = pa.array([sizes[source] for source in prepared.manifest["source"].to_pylist()], pa.int64())
    place = prepared.manifest.schema.get_field_index("bytes")
    return prepared.manifest.set_column(place, tables.MANIFEST.field("bytes"), column)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def load(root: Path, name: str, *, need_media: bool = True) -> Fetched:
    """A dataset that was fetched under `root`.

    Raises:
        FetchError: it was not; or, with `need_media`, its media are gone.
        TableError: its tables are damaged.
    """
    folder = root / name
    if not (folder / FETCH_FILE).is_file():
        have = ", ".join(fetched_names(root)) or "none"
        raise FetchError(
            f"{name!r} has not been fetched under {root} (fetched there: {have}); see `pipeline fetch --help`"
        )
    said = tables.read_json(folder / FETCH_FILE, "name", "kind", "media_root", "about")
    media_root = Path(said["media_root"])
    if need_media and not media_root.is_dir():
        raise FetchError(
            f"{name}: its media folder {media_root} is not there any more; fetch it again with its new place"
        )
    manifest = tables.read_table(folder / MANIFEST_FILE, tables.MANIFEST)
    with Ledger(folder / LEDGER_FILE) as ledger:
        losses, counts = ledger.losses(), ledger.counts()
    return Fetched(name, said["kind"], folder, media_root, manifest, losses, said["about"], counts)


def fetched_names(root: Path) -> list[str]:
    """The datasets fetched under `root`, sorted."""
    return sorted(path.parent.name for path in root.glob(f"*/{FETCH_FILE}"))


def _plain(value: Any) -> Any:
    return str(value.resolve()) if isinstance(value, Path) else value
