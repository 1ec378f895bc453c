"""The whole fetch stage: get what a dataset is made of, list its clips, get those that are not here, keep account."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import __version__, tables
from clipmill.datasets import Dataset, Prepared
from clipmill.datasets.archive import MEDIA_FOLDER
from clipmill.errors import ConfigError
from clipmill.fetch import archives
from clipmill.fetch.adopt import adopt_media
from clipmill.fetch.fetched import FETCH_FILE, LEDGER_FILE, MANIFEST_FILE, Fetched, folder_of, load
from clipmill.fetch.ledger import Ledger
from clipmill.fetch.lock import Lock
from clipmill.fetch.options import SegmentOptions
from clipmill.fetch.reasons import POLICY
from clipmill.fetch.recheck import forget_gone
from clipmill.fetch.segments import Places, fetch_segments
from clipmill.fetch.watch import QUIET, Watch
from clipmill_manifests import facts

UNFIT_FILE = "unfit.jsonl"
"""What `--from` led to and could not be used."""


def fetch(
    kind: str,
    dataset: Dataset,
    root: Path,
    options: SegmentOptions | None = None,
    lock: Lock | None = None,
    watch: Watch = QUIET,
) -> Fetched:
    """Get `dataset` under `root/<name>`: its media, manifest, ledger and fetch.json.

    Running it again goes on where it was, or lists the media anew.

    Raises:
        FetchError: nothing can be had; `RefusedError`: the site refuses us, try again later.
        ConfigError: the dataset's name or options cannot be.
        TableError: another run is fetching it, or a list is malformed.
    """
    name, folder = dataset.name, folder_of(root, dataset.name)
    new = not folder.exists()
    try:
        with tables.locked(folder):
            must_be_of(kind, dataset, root, name)
            if getattr(dataset, "by_segment", False):
                _by_segment(kind, dataset, folder, options or SegmentOptions(), lock, watch)
            else:
                archives.provide(dataset, folder, watch)
                _at_once(kind, dataset, folder)
    except BaseException:
        if new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return load(root, name)


def must_be_of(kind: str, dataset: Dataset, root: Path, name: str) -> None:
    """Raise where the folder holds another dataset: its account would be lost, or mixed with this one's."""
    path = root / name / FETCH_FILE
    if not path.exists():
        return
    said = tables.read_json(path, "kind", "options")
    was = f"{said['kind']} --strong" if said["options"].get("strong") else said["kind"]
    now = f"{kind} --strong" if getattr(dataset, "strong", False) else kind
    if was != now:
        raise ConfigError(
            f"{root / name}: holds what `pipeline fetch {was}` made; give this one another --name or --root, "
            "or remove that folder"
        )


def _at_once(kind: str, dataset: Dataset, folder: Path) -> None:
    """Write the tables of a dataset whose media are here; fetch.json, which vouches for the others, comes last."""
    prepared = dataset.prepare(folder)
    manifest = _with_sizes(prepared)
    lost = pa.array([f.key for f in prepared.failures if f.key], pa.string())
    had = manifest.filter(pc.invert(pc.is_in(manifest["key"], lost)))
    split_of = zip(*(manifest[column].to_pylist() for column in ("key", "split")), strict=True)
    (folder / FETCH_FILE).unlink(missing_ok=True)
    tables.write_table(folder / MANIFEST_FILE, manifest)
    with Ledger(folder / LEDGER_FILE, write=True) as ledger:
        rows = zip(*(had[column].to_pylist() for column in ("key", "source", "split")), strict=True)
        ledger.replace(rows, prepared.failures, dict(split_of))
    _vouch(kind, dataset, folder, prepared.media_root)


def _by_segment(
    kind: str, dataset: Dataset, folder: Path, options: SegmentOptions, lock: Lock | None, watch: Watch
) -> None:
    """Write the tables before the first clip is asked for: the ledger then fills while the manifest stands."""
    if as_it_is(dataset, folder, options, lock):
        prepared, request = None, ""
    else:
        archives.provide(dataset, folder, watch)
        request = _request(dataset, folder, lock)
        # Two million rows take a while to be listed: not again for the same request.
        prepared = None if _is_last(request, folder) else dataset.prepare(folder)
    places = Places((folder / MEDIA_FOLDER).resolve(), folder / ".parts")
    places.media.mkdir(exist_ok=True)
    with Ledger(folder / LEDGER_FILE, write=True) as ledger:
        if prepared is None:
            manifest = tables.read_table(folder / MANIFEST_FILE, tables.MANIFEST)
        else:
            manifest = wanted(folder, prepared, lock, watch.say)
            # Killed from here on, the next run lists anew; whose the folder is stays known.
            _vouch(kind, dataset, folder, places.media, by_segment=True)
            tables.write_table(folder / MANIFEST_FILE, manifest)
            clips = (manifest[column].to_pylist for column in ("key", "split"))
            ledger.scope(lambda: zip(*(values() for values in clips), strict=True), _name_of(manifest))
            ledger.passed_over(prepared.failures, prepared.lists)
            _vouch(kind, dataset, folder, places.media, by_segment=True, request=request)
        if options.recheck:
            forget_gone(manifest, ledger, places.media, options.jobs, watch)
        if options.from_dirs:
            adopt_media(to_adopt(manifest, ledger), ledger, places.media, options, folder / UNFIT_FILE, watch)
        if not options.offline:
            todo = to_ask(manifest, ledger, options.retry)
            watch.total(f"fetch {dataset.name}", todo.num_rows, "clips")
            fetch_segments(todo, ledger, places, options, watch.update, watch.say)


def as_it_is(dataset: Dataset, folder: Path, options: SegmentOptions, lock: Lock | None) -> bool:
    """Whether the clips wanted stay those of the last request: --retry and --recheck name none of their own."""
    chosen = [f for f in fields(dataset) if f.name not in ("called", "strong")]  # type: ignore[arg-type]
    bare = all(getattr(dataset, f.name) == f.default for f in chosen)
    asked = bare and lock is None and bool(options.retry or options.recheck)
    return asked and _is_whole(folder) and bool(tables.read_json(folder / FETCH_FILE).get("request"))


def _is_last(request: str, folder: Path) -> bool:
    return _is_whole(folder) and tables.read_json(folder / FETCH_FILE).get("request") == request


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (FETCH_FILE, MANIFEST_FILE, LEDGER_FILE))


def _request(dataset: Dataset, folder: Path, lock: Lock | None) -> str:
    """A hash of all that decides which clips are wanted: the options, and the lists by their size and time."""
    values = [getattr(dataset, f.name) for f in fields(dataset)]  # type: ignore[arg-type]
    named = [one for value in values for one in (value if isinstance(value, tuple) else (value,))]
    paths = {path.resolve() for path in named if isinstance(path, Path)}
    paths |= {folder / archives.DOWNLOADS_FOLDER / remote.file for remote in getattr(dataset, "needs", ())}
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(paths) if p.is_file()]
    said = [__version__, _options(dataset), files, lock.id if lock else None]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _vouch(
    kind: str,
    dataset: Dataset,
    folder: Path,
    media_root: Path,
    *,
    by_segment: bool = False,
    request: str | None = None,
) -> None:
    about = {k: v for k, v in facts(kind).items() if isinstance(v, str)}
    about |= getattr(dataset, "about", dict)()
    inside = media_root.resolve().is_relative_to(folder.resolve())
    tables.write_json(
        folder / FETCH_FILE,
        {
            "name": dataset.name,
            "kind": kind,
            "options": _options(dataset),
            # Within the dataset's own folder it moves along with it.
            "media_root": os.path.relpath(media_root, folder) if inside else str(media_root.resolve()),
            "about": about,
            "by_segment": by_segment,
            "request": request,
            "clipmill": __version__,
        },
    )


def _options(dataset: Dataset) -> dict[str, Any]:
    return {f.name: _plain(getattr(dataset, f.name)) for f in fields(dataset)}  # type: ignore[arg-type]


def wanted(folder: Path, prepared: Prepared, lock: Lock | None, say: Callable[[str], None]) -> pa.Table:
    """The clips wanted: those of this request, and of the splits that only earlier requests named.

    Splits add up, so that train and eval can be asked for on different days; asking again for
    a split replaces what was asked of it. With a lock, only the clips that it names.
    """
    manifest = prepared.manifest
    if lock is not None:
        manifest = manifest.filter(pc.is_in(manifest["key"], lock.keys))
        absent = len(lock) - manifest.num_rows
        if not manifest.num_rows:
            raise ConfigError(
                "--lock: none of its clips stands in the lists asked for; see --split and --list"
            )
        say(f"the lock names {len(lock)} clips; {manifest.num_rows} of them stand in the lists asked for")
        if absent:
            say(f"  {absent} do not: are there more to name with --split or --list?")
        return manifest
    path = folder / MANIFEST_FILE
    if not path.exists():
        return manifest
    before = tables.read_table(path, tables.MANIFEST)
    others = before.filter(pc.invert(pc.is_in(before["split"], pc.unique(prepared.manifest["split"]))))
    if not others.num_rows:
        return manifest
    # A video that moved from one split to another between two lists stands where it was asked for last.
    others = others.filter(pc.invert(pc.is_in(others["key"], manifest["key"].combine_chunks())))
    return pa.concat_tables([manifest, others]).sort_by("key")


def to_ask(manifest: pa.Table, ledger: Ledger, retry: tuple[str, ...] = ()) -> pa.Table:
    """The clips to ask for: those never tried, then those whose failure may heal; with `retry`, just its failures."""
    if retry:
        chosen = None if "all" in retry else retry
        return manifest.filter(pc.is_in(manifest["key"], pa.array(ledger.lost_keys(chosen), pa.string())))
    tried = ledger.table("key")["key"].combine_chunks()
    healing = [reason for reason, policy in POLICY.items() if policy != "final"]
    fresh = manifest.filter(pc.invert(pc.is_in(manifest["key"], tried)))
    again = manifest.filter(pc.is_in(manifest["key"], pa.array(ledger.lost_keys(healing), pa.string())))
    return pa.concat_tables([fresh, again]).combine_chunks()


def to_adopt(manifest: pa.Table, ledger: Ledger) -> pa.Table:
    """The clips that media already here may serve: all that are not had."""
    had = ledger.table("key", outcome="had")["key"].combine_chunks()
    return manifest.filter(pc.invert(pc.is_in(manifest["key"], had))).combine_chunks()


def _name_of(manifest: pa.Table) -> str:
    """A hash of the manifest's keys and splits."""
    rows = pc.binary_join_element_wise(manifest["key"], manifest["split"], " ").combine_chunks()
    lines = pc.binary_join(pa.ListArray.from_arrays([0, len(rows)], rows), "\n")
    return hashlib.sha256(lines[0].as_buffer()).hexdigest()


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


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return str(value.resolve()) if isinstance(value, Path) else value
