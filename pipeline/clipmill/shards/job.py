"""The whole shard stage: see what is finished, build the rest, and put the index and the account together."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill import __version__, tables
from clipmill.audio import codec_versions
from clipmill.errors import ShardError
from clipmill.run import run_units
from clipmill.shards.plan import FORMATS, ShardSpec, Unit, plan
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
    jobs: int = 1,
    overwrite: bool = False,
    update: Update = lambda done, facts: None,
) -> dict[str, Any]:
    """Build all shards of a dataset under `out`, skipping the finished ones; returns dataset.json's contents.

    Args:
        name: the dataset's name; shards are called `<name>-<split>-000000.<ext>`.
        manifest: the clips wanted, with the columns of `tables.MANIFEST`.
        losses: what fetching lost or passed over; they keep their outcome in the account.
        media_root: the folder that sources are relative to.
        out: the folder of the shards.
        spec: every choice that decides the bytes.
        about: title, licence, citation and the like, copied into dataset.json.
        jobs: worker processes.
        overwrite: build every shard anew, instead of keeping the finished ones.
        update: called with (clips done, facts) as shards are finished.

    Raises:
        ShardError: nothing to write, or `out` holds shards of another plan.
        TableError: another run is writing to `out`, or a record there is damaged.
        OSError: the disk is full or does not let us write.
    """
    losses = list(losses)
    units = plan(name, manifest, [loss.key for loss in losses if loss.key], media_root, out, spec)
    with tables.locked(out):
        finished = _finished(name, units, out, spec, overwrite)
        done = sum(r.counts["clips"] for r in finished.values())
        failed = sum(r.counts["failed"] for r in finished.values())
        update(done, f"failed {failed}")
        # Of each record only the account is kept: the index rows of two million clips would not fit in memory.
        try:
            for record in run_units(build, [u for u in units if u.shard not in finished], jobs):
                done, failed = done + record.counts["clips"], failed + record.counts["failed"]
                update(done, f"failed {failed}")
        finally:
            # Ours, or left by a run that was killed: nobody else writes here while the folder is held.
            for leftover in out.glob(f".{name}-*.tmp"):
                leftover.unlink(missing_ok=True)
        return _put_together(name, units, manifest.num_rows, losses, out, spec, about or {})


def _finished(
    name: str, units: list[Unit], out: Path, spec: ShardSpec, overwrite: bool
) -> dict[str, ShardRecord]:
    """The records of the shards that need not be built.

    Shards of another plan, and files that are none of ours, are refused. With `overwrite`
    all shards of this dataset go, so that every one is built anew; never anything else.
    """
    planned = {unit.shard: unit for unit in units}
    ours = re.compile(re.escape(name) + r"-[a-z_]+-\d{6}\.\w+")
    finished = {}
    for path in sorted(file for ext in FORMATS.values() for file in out.glob(f"*.{ext}")):
        if not path.is_file() or not ours.fullmatch(path.name):
            raise ShardError(
                f"{path}: is no shard of {name}; move it away, or write somewhere else with --out DIR"
            )
        if overwrite:
            record_path(path).unlink(missing_ok=True)
            path.unlink()
            continue
        record = read_record(path)
        unit = planned.get(path.name)
        if record is not None and unit is not None and record.unit == unit.hash:
            finished[path.name] = record
        elif record is not None or unit is None:
            why = _difference(record, spec) if record else "another plan"
            raise ShardError(
                f"{path}: was made from {why}; --overwrite builds all shards anew, --out DIR writes somewhere else"
            )
    return finished


def _difference(record: ShardRecord, spec: ShardSpec) -> str:
    now = asdict(spec)
    fields = [f"{k} {record.spec[k]!r} (now {now[k]!r})" for k in now if record.spec.get(k) != now[k]]
    return ", ".join(fields) if fields else "other clips (the manifest has changed since)"


def _put_together(
    name: str,
    units: list[Unit],
    wanted: int,
    losses: list[Failure],
    out: Path,
    spec: ShardSpec,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write index.parquet, failures.jsonl and dataset.json from the records; check that counts reconcile."""
    parts, shards, failures = [], [], [asdict(loss) for loss in losses]
    for unit in units:
        record = read_record(out / unit.shard)
        if record is None:
            raise ShardError(
                f"{out / unit.shard}: vanished or changed while the job ran; run the same command again"
            )
        parts.append(pa.table(record.index, schema=tables.INDEX))
        shards.append({"shard": record.shard, "sha256": record.sha256, "bytes": record.size, **record.counts})
        failures += record.failures
    index = pa.concat_tables(parts)
    failures = tables.in_order(failures)
    counts = _counts(wanted, index.num_rows, failures)
    tables.write_table(out / "index.parquet", index)
    tables.write_jsonl(out / "failures.jsonl", failures)
    dataset = {
        "name": name,
        "about": about,
        "spec": asdict(spec),
        "versions": versions(),
        "counts": counts,
        "labels": list(units[0].labels),
        "shards": shards,
        "root_sha256": root_sha256(shards),
    }
    tables.write_json(out / "dataset.json", dataset)
    return dataset


def _counts(wanted: int, written: int, failures: list[dict[str, Any]]) -> dict[str, Any]:
    """The account: in = written + failed + skipped, where in counts the clips wanted and the files passed over."""
    outcomes = Counter(row["outcome"] for row in failures)
    passed_over = sum(1 for row in failures if not row["key"])
    counts: dict[str, Any] = {
        "in": wanted + passed_over,
        "written": written,
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "reasons": dict(sorted(Counter(row["reason"] for row in failures).items())),
    }
    if counts["in"] != counts["written"] + counts["failed"] + counts["skipped"]:
        raise ShardError(f"the account does not reconcile: {counts}; please report this")
    return counts


def root_sha256(shards: list[dict[str, Any]]) -> str:
    """One hash for all shards: sha256 over the lines `<sha256>  <file name>`, as sha256sum prints them."""
    lines = (f"{shard['sha256']}  {shard['shard']}\n" for shard in sorted(shards, key=lambda s: s["shard"]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of everything that decides the bytes."""
    return (
        {"clipmill": __version__} | codec_versions() | {n: version(n) for n in ("h5py", "numpy", "pyarrow")}
    )
