"""The whole shard stage: see what is finished, build the rest, and put the index and the account together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import RunError, ShardError
from clipmill.run import Engine, Local, Lost, run_rounds
from clipmill.shards.account import DATASET_FILE, put_together
from clipmill.shards.metadata import check_metadata
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
from clipmill.shards.write import build, read_record, record_path
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
        append: put clips that the shards there were not planned for into new shards.
        retry: build those finished shards anew that lost clips for one of these reasons.
        overwrite: build every shard anew, instead of keeping the finished ones.
        update: called with (clips done, facts) as shards are finished.

    Raises:
        ShardError: nothing to write, or `out` holds shards of another plan.
        TableError: another run is writing to `out`, or a record there is damaged.
        OSError: the disk is full or does not let us write, not even the account.
    """
    losses = list(losses)
    manifest_of_all, manifest = manifest, wanted(name, manifest, [loss.key for loss in losses if loss.key])
    with tables.locked(out):
        layout = _layout(name, manifest, out, spec, append, overwrite)
        units = plan(layout, manifest, media_root, out, limits)
        finished = _finished(name, units, out, retry)
        left = [unit for unit in units if unit.name not in finished]
        stopped, not_built = _build(left, engine or Local(), finished, update)
        # Ours, or left by a run that was killed: nobody else writes here while the folder is held.
        for leftover in out.glob(f".{name}-*.tmp"):
            leftover.unlink(missing_ok=True)
        return put_together(
            out,
            name,
            spec,
            layout.labels,
            [unit.name for unit in units if unit.name not in not_built],
            [asdict(loss) for loss in losses] + _rows_of(units, not_built),
            manifest_of_all.num_rows,
            about=about or {},
            made_from=made_from or {},
            stopped=stopped,
        )


def unchanged(out: Path, spec: ShardSpec, made_from: dict[str, str]) -> dict[str, Any] | None:
    """dataset.json's contents where all shards are finished, of just this spec and input; else None.

    Looks at the size of every shard and at the bytes of the tables: what takes seconds with two
    million clips, where planning them takes half a minute.
    """
    path = out / DATASET_FILE
    if not path.is_file() or not (out / PLAN_FILE).is_file():
        return None
    said = tables.read_json(path)
    known = {"spec": asdict(spec), "made_from": made_from, "stopped": ""}
    if not isinstance(said, dict) or any(said.get(name) != value for name, value in known.items()):
        return None
    with os.scandir(out) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    for entry in said["shards"]:
        if sizes.get(entry["shard"]) != entry["bytes"] or record_path(Path(entry["shard"])).name not in sizes:
            return None
    files = said["files"].items()
    whole = all(file in sizes and tables.sha256_of(out / file)[0] == digest for file, digest in files)
    return said if whole and not check_metadata(out, said) else None


def _layout(
    name: str, manifest: pa.Table, out: Path, spec: ShardSpec, append: bool, overwrite: bool
) -> Layout:
    """Which clip goes where: as planned before, with the new clips after them, or all anew; kept in `out`.

    Files that are none of this dataset's shards are refused, and with `overwrite` all that are go.
    """
    ours = re.compile(re.escape(name) + r"-[a-z_]+-\d{6}\.\w+")
    shards = sorted(file for ext in FORMATS.values() for file in out.glob(f"*.{ext}"))
    for path in shards:
        if not path.is_file() or not ours.fullmatch(path.name):
            raise ShardError(
                f"{path}: is no shard of {name}; move it away, or write somewhere else with --out DIR"
            )
    if overwrite:
        for path in (out / PLAN_FILE, *shards, *map(record_path, shards)):
            path.unlink(missing_ok=True)
    before = read_layout(out)
    if before is None:
        layout = lay_out(name, manifest, spec)
    elif other := difference(before.spec, spec):
        raise ShardError(
            f"{out}: its shards were planned with {other}; --overwrite builds all anew, --out DIR writes somewhere else"
        )
    else:
        layout = _extended(name, manifest, out, spec, before, append)
    strange = sorted({path.name for path in shards if path.exists()} - set(layout.table["shard"].to_pylist()))
    if strange:
        raise ShardError(
            f"{out / strange[0]}: was made from another plan; --overwrite builds all shards anew, "
            "--out DIR writes somewhere else"
        )
    if before is not layout:
        write_layout(out, layout)
    return layout


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


def _finished(name: str, units: list[Unit], out: Path, retry: Collection[str]) -> dict[str, dict[str, int]]:
    """The counts of the shards that need not be built; those to be tried again lose their records."""
    finished = {}
    for unit in units:
        # Of each record only the account is kept: the index rows of two million clips would not fit in memory.
        record = read_record(out / unit.name)
        if record is None:
            continue
        if record.unit != unit.hash:
            raise ShardError(_changed(out / unit.name, record, unit))
        if any(failure["reason"] in retry for failure in record.failures):
            record_path(out / unit.name).unlink()
        else:
            finished[unit.name] = record.counts
    return finished


def _changed(path: Path, record: ShardRecord, unit: Unit) -> str:
    now = {row["key"]: row for row in unit.clips.to_pylist()}
    had = dict(zip(record.index["key"], record.index["source"], strict=True))
    had |= {failure["key"]: failure["source"] for failure in record.failures}
    moved = sorted(key for key, source in had.items() if key in now and now[key]["source"] != source)
    what = f" (the source of {moved[0]} is another one)" if moved else ""
    return (
        f"{path}: was made from other clips: the manifest has changed since{what}; "
        "--overwrite builds all shards anew, --out DIR writes somewhere else"
    )


def _build(
    units: Sequence[Unit], engine: Engine, finished: dict[str, dict[str, int]], update: Update
) -> tuple[str, dict[str, str]]:
    """Build the units; return why that stopped before its end ("": it did not), and what is not built and why."""
    done = sum(counts["clips"] for counts in finished.values())
    failed = sum(counts["failed"] for counts in finished.values())
    not_built = {unit.name: "" for unit in units}
    stopped = ""
    update(done, f"failed {failed}")
    try:
        with closing(run_rounds(build, units, engine)) as results:
            for place, result in results:
                if isinstance(result, Lost):
                    not_built[units[place].name] = stopped = result.message
                    continue
                del not_built[units[place].name]
                done, failed = done + result["clips"], failed + result["failed"]
                update(done, f"failed {failed}")
    except OSError as error:
        stopped = f"{error.filename or units[0].out}: {error.strerror or error}"
    except (RunError, ShardError) as error:
        stopped = str(error)
    return stopped, {shard: why or stopped for shard, why in not_built.items()}


def _rows_of(units: Sequence[Unit], not_built: dict[str, str]) -> list[dict[str, Any]]:
    """The clips of shards that are not built, as failures."""
    return [
        asdict(Failure(key, source, "shard", "failed", "not-built", not_built[unit.name]))
        for unit in units
        if unit.name in not_built
        for key, source in zip(unit.clips["key"].to_pylist(), unit.clips["source"].to_pylist(), strict=True)
    ]
