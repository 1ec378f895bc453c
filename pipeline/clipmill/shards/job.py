"""The whole shard stage: see what is finished, build the rest, and put the index and the account together."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import RunError, ShardError, TableError
from clipmill.run import Engine, Local, Lost, run_rounds
from clipmill.shards.account import DATASET_FILE, FAILURES_FILE, put_together, read_dataset
from clipmill.shards.metadata import CARD_FILE, CROISSANT_FILE, check_metadata
from clipmill.shards.plan import (
    FORMATS,
    PLAN_FILE,
    Layout,
    ShardSpec,
    Unit,
    difference,
    lay_out,
    plan,
    read_layout,
    wanted,
    write_layout,
)
from clipmill.shards.prepare import Limits
from clipmill.shards.write import build, finished_record, record_path
from clipmill.types import Failure, ShardRecord

Update = Callable[[int, str], None]


def make_shards(
    name: str,
    manifest: pa.Table,
    losses: Iterable[Failure],
    media_root: Path,
    out: Path,
    spec: ShardSpec,
    *,
    about: dict[str, Any] | None = None,
    made_from: dict[str, str] | None = None,
    engine: Engine | None = None,
    limits: Limits | None = None,
    append: bool = False,
    retry: Collection[str] = (),
    overwrite: bool = False,
    mend: Mapping[str, ShardRecord] | None = None,
    update: Update = lambda done, facts: None,
) -> dict[str, Any]:
    """Build all shards of a dataset under `out`, skipping the finished ones; returns dataset.json's contents.

    Shards that cannot be built, because their workers were lost each time or the disk does not
    let us write, cost their clips, which become failures with the reason `not-built`; all else
    is put together, and `stopped` says why. The same command goes on.

    Args:
        name: the dataset's name; shards are called `<name>-<split>-000000.<ext>`.
        manifest: the clips wanted, with the columns of `tables.MANIFEST`.
        losses: what fetching lost or passed over; they keep their outcome in the account.
        media_root: the folder that sources are relative to.
        out: the folder of the shards.
        spec: every choice that decides the bytes.
        about: title, licence, citation and the like, copied into dataset.json.
        made_from: hashes of what `manifest` and `losses` were read from; see `unchanged`.
        engine: where shards are built; this process by default.
        limits: what one clip may cost.
        append: put clips that the shards there were not planned for into new shards, and leave the
            finished ones alone whatever has become of their sources.
        retry: build those finished shards anew that lost clips for one of these reasons.
        overwrite: build every shard anew, instead of keeping the finished ones.
        mend: for `repair`, which holds `out`: leave the finished shards alone, and give these their
            records again, whose shards are sound.
        update: called with (clips done, facts) as shards are finished.

    Raises:
        ShardError: nothing to write, or `out` holds shards of another plan, or files of somebody else.
        TableError: another run is writing to `out`, or the plan there is damaged.
        OSError: the disk is full or does not let us write, not even the account.
    """
    out, media_root = out.resolve(), media_root.resolve()  # as workers elsewhere must have them
    losses = list(losses)
    everything, manifest = manifest, wanted(name, manifest, [loss.key for loss in losses if loss.key])
    with tables.locked(out, again=mend is not None):
        _only_ours(name, out, overwrite)
        before = read_layout(out)
        layout = _layout(name, manifest, out, spec, before, append)
        if mend:
            for unit in plan(_part(layout, mend), manifest, media_root, out):
                tables.write_json(
                    record_path(out / unit.name), asdict(replace(mend[unit.name], unit=unit.hash))
                )
        if append or mend is not None:
            finished = _kept(layout, out, retry)
            left = plan(
                _part(layout, set(_shards(layout)) - set(finished)), manifest, media_root, out, limits
            )
        else:
            units = plan(layout, manifest, media_root, out, limits)
            finished = _finished(units, out, retry)
            left = [unit for unit in units if unit.name not in finished]
        if before is not layout:
            write_layout(out, layout)
        built: dict[str, str] = {}
        room = out / f".{name}-account.tmp"
        stopped, not_built = _build(
            left, engine or Local(), finished, built, update, lambda: _set_aside(room, everything.num_rows)
        )
        # Ours, or left by a run that was killed: nobody else writes here while the folder is held.
        for leftover in out.glob(f".{name}-*.tmp"):
            leftover.unlink(missing_ok=True)
        planned = layout.table["key"].combine_chunks()
        lost_since = pc.is_in(pa.array([loss.key for loss in losses], pa.string()), planned).to_pylist()
        gone_since = pc.invert(pc.is_in(planned, everything["key"].combine_chunks()))
        return put_together(
            out,
            name,
            spec,
            layout.labels,
            {shard: built.get(shard) for shard in _shards(layout) if shard not in not_built},
            # What the finished shards hold is not lost, whatever became of its source.
            [asdict(loss) for loss, here in zip(losses, lost_since, strict=True) if not here]
            + _rows_of(left, not_built),
            everything.num_rows + (pc.sum(gone_since).as_py() or 0),
            about=about or {},
            made_from=made_from or {},
            stopped=stopped,
        )


def unchanged(out: Path, spec: ShardSpec, made_from: dict[str, str]) -> dict[str, Any] | None:
    """dataset.json's contents where all shards are finished, of just this spec and input; else None.

    Looks at the size of every shard and at the bytes of the tables: what takes seconds with two
    million clips, where planning them takes half a minute.
    """
    try:
        said = read_dataset(out)
    except TableError:
        return None
    if (said["spec"], said["made_from"], said["stopped"]) != (asdict(spec), made_from, ""):
        return None
    with os.scandir(out) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    for entry in said["shards"]:
        if sizes.get(entry["shard"]) != entry["bytes"] or record_path(Path(entry["shard"])).name not in sizes:
            return None
    files = said["files"].items()
    whole = all(file in sizes and tables.sha256_of(out / file)[0] == digest for file, digest in files)
    return said if whole and not check_metadata(out, said) else None


def only_ours(out: Path, ours: re.Pattern[str], whose: str) -> list[Path]:
    """The shards in a folder; everything that would be in the way of shards, and is none of ours, is refused.

    Raises:
        ShardError: a file or folder there is called like a shard, a card or a table, and is something else.
    """
    shards = sorted(file for ext in FORMATS.values() for file in out.glob(f"*.{ext}"))
    for path in shards:
        if not path.is_file() or not ours.fullmatch(path.name):
            raise ShardError(
                f"{path}: is no shard of {whose}; move it away, or write somewhere else with --out DIR"
            )
    others = [out / file for file in (DATASET_FILE, CARD_FILE, CROISSANT_FILE) if (out / file).exists()]
    # A plan comes before the first shard, and dataset.json with its card after the last.
    if others and not shards and not (out / PLAN_FILE).exists() and not (out / FAILURES_FILE).exists():
        raise ShardError(
            f"{others[0]}: would be written over, and is no file of shards; write somewhere else with --out DIR"
        )
    return shards


def _only_ours(name: str, out: Path, overwrite: bool) -> None:
    """`only_ours`; with `overwrite` the shards go, with their records and their plan."""
    shards = only_ours(out, re.compile(re.escape(name) + r"-[a-z_]+-\d{6}\.\w+"), name)
    if overwrite:
        for path in (out / PLAN_FILE, *shards, *map(record_path, shards)):
            path.unlink(missing_ok=True)


def _layout(
    name: str, manifest: pa.Table, out: Path, spec: ShardSpec, before: Layout | None, append: bool
) -> Layout:
    """Which clip goes where: as planned before, with the new clips after them, or all anew."""
    if before is None:
        layout = lay_out(name, manifest, spec)
    elif other := difference(before.spec, spec):
        raise ShardError(
            f"{out}: its shards were planned with {other}; --overwrite builds all anew, --out DIR writes somewhere else"
        )
    else:
        layout = _extended(name, manifest, out, spec, before, append)
    present = {path.name for ext in FORMATS.values() for path in out.glob(f"*.{ext}")}
    if strange := sorted(present - set(_shards(layout))):
        raise ShardError(
            f"{out / strange[0]}: was made from another plan; --overwrite builds all shards anew, "
            "--out DIR writes somewhere else"
        )
    return layout


def _shards(layout: Layout) -> list[str]:
    return pc.unique(layout.table["shard"]).to_pylist()


def _part(layout: Layout, shards: Collection[str]) -> Layout:
    some = layout.table.filter(pc.is_in(layout.table["shard"], pa.array(list(shards), pa.string())))
    return replace(layout, table=some)


def _extended(
    name: str, manifest: pa.Table, out: Path, spec: ShardSpec, before: Layout, append: bool
) -> Layout:
    new = manifest.filter(pc.invert(pc.is_in(manifest["key"], before.table["key"].combine_chunks())))
    if not new.num_rows:
        return before
    if not append:
        raise ShardError(
            f"{out}: {new.num_rows} clips, such as {new['key'][0].as_py()}, have come since these shards were planned; "
            "--append adds them as new shards, --overwrite builds all anew, --out DIR writes somewhere else"
        )
    after = lay_out(name, manifest, spec, before)
    if spec.format == "hdf5" and after.labels != before.labels:
        unknown = sorted(set(after.labels) - set(before.labels))
        raise ShardError(
            f"{out}: --append: the new clips have {len(unknown)} classes, such as {unknown[0]!r}, that the targets of "
            "the HDF5 shards there do not; --overwrite builds all anew, --out DIR writes somewhere else"
        )
    return after


def _kept(layout: Layout, out: Path, retry: Collection[str]) -> dict[str, dict[str, int]]:
    """The counts of the shards that are finished; those to be tried again lose their records."""
    finished = {}
    for shard in _shards(layout):
        record = finished_record(out / shard)
        if record is not None and not _again(record, out / shard, retry):
            finished[shard] = record.counts
    return finished


def _finished(units: list[Unit], out: Path, retry: Collection[str]) -> dict[str, dict[str, int]]:
    """`_kept`, of these units; shards made from anything else are refused."""
    finished = {}
    for unit in units:
        # Of each record only the account is kept: the index rows of two million clips would not fit in memory.
        record = finished_record(out / unit.name)
        if record is None:
            continue
        if record.unit != unit.hash:
            raise ShardError(_changed(out / unit.name, record, unit))
        if not _again(record, out / unit.name, retry):
            finished[unit.name] = record.counts
    return finished


def _again(record: ShardRecord, shard: Path, retry: Collection[str]) -> bool:
    again = any(failure["reason"] in retry for failure in record.failures)
    if again:
        record_path(shard).unlink()
    return again


def _changed(path: Path, record: ShardRecord, unit: Unit) -> str:
    now = dict(zip(unit.clips["key"].to_pylist(), unit.clips["source"].to_pylist(), strict=True))
    had = dict(zip(record.index["key"], record.index["source"], strict=True))
    had |= {failure["key"]: failure["source"] for failure in record.failures}
    moved = sorted(key for key, source in had.items() if now.get(key, source) != source)
    what = f" (the source of {moved[0]} is another one)" if moved else ""
    return (
        f"{path}: was made from other clips, or converted: it does not fit the manifest{what}; "
        "--overwrite builds all shards anew, --append leaves this one as it is, --out DIR writes somewhere else"
    )


def _build(
    units: Sequence[Unit],
    engine: Engine,
    finished: dict[str, dict[str, int]],
    built: dict[str, str],
    update: Update,
    set_aside: Callable[[], None],
) -> tuple[str, dict[str, str]]:
    """Build the units; return why that stopped before its end ("": it did not), and what is not built and why.

    `built` gets the hash that each shard was made from; `set_aside` is called before the first.
    """
    done = sum(counts["clips"] for counts in finished.values())
    failed = sum(counts["failed"] for counts in finished.values())
    not_built = {unit.name: "" for unit in units}
    stopped = ""
    update(done, f"failed {failed}")
    try:
        if units:
            set_aside()
        with closing(run_rounds(build, units, engine)) as results:
            for place, result in results:
                if isinstance(result, Lost):
                    not_built[units[place].name] = stopped = result.message
                    continue
                del not_built[units[place].name]
                built[units[place].name] = result.made_from
                done, failed = done + result.counts["clips"], failed + result.counts["failed"]
                update(done, f"failed {failed}")
    except OSError as error:
        stopped = f"{error.filename or units[0].out}: {error.strerror or error}"
    except (RunError, ShardError) as error:
        stopped = str(error)
    for unit in units if stopped else ():  # what was under way then may have come to its end
        record = finished_record(unit.out / unit.name) if unit.name in not_built else None
        if record is not None and record.unit == unit.hash:
            del not_built[unit.name]
    return stopped, {shard: why or stopped for shard, why in not_built.items()}


def _set_aside(room: Path, clips: int) -> None:
    """Take the disk's room for the tables of so many clips, so that shards cannot fill it before the account.

    Raises:
        OSError: there is no such room.
    """
    size = (256 + clips) * 1024  # an index row and its loss take less than 1 KiB
    with open(room, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except (AttributeError, OSError) as error:
            # macOS and some file systems cannot set room aside; there a full disk may cost the account.
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise


def _rows_of(units: Sequence[Unit], not_built: dict[str, str]) -> list[dict[str, Any]]:
    """The clips of shards that are not built, as failures."""
    return [
        asdict(Failure(key, source, "shard", "failed", "not-built", not_built[unit.name]))
        for unit in units
        if unit.name in not_built
        for key, source in zip(unit.clips["key"].to_pylist(), unit.clips["source"].to_pylist(), strict=True)
    ]
