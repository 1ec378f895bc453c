"""The whole of it: see what is finished, compute the rest, and put the entry together."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from clipmill import tables
from clipmill.errors import FeatureError, RunError, ShardError, TableError
from clipmill.features import FRAMES_PER_S, Feature
from clipmill.features.spec import FeatureSpec
from clipmill.featurestore.build import TOO_LARGE, Unit, build, finished, moments_of, read_record
from clipmill.featurestore.compute import Moments, exactly, silence_of
from clipmill.featurestore.entry import FILES, Entry, entry_id
from clipmill.featurestore.files import ENTRY_FILE, TABLE, TABLE_FILE, digest_of, write_sealed
from clipmill.run import Engine, Local, Lost, run_rounds
from clipmill.shards.account import DATASET_FILE, FAILURES_FILE, INDEX_FILE, read_dataset, root_sha256
from clipmill.shards.index import Index
from clipmill.shards.places import ShardSet
from clipmill.shards.read import Shards, rows_by_value
from clipmill.shards.write import record_path
from clipmill.stores import open_store
from clipmill.types import Failure

_COLUMNS = ["key", "shard", "row", "offset", "length", "samples", "labels", "source", "sha256"]
"""Of the index: what reading clips takes, and no more, for it travels to every worker."""


@dataclass(frozen=True)
class Made:
    """What became of an entry.

    Attributes:
        entry: as it is now.
        counts: clips; in = written + failed + skipped, and how many failed for which reason.
        files: how many files were computed now; 0 where all were there.
        stopped: why it ended before its end; "" where it did not.
    """

    entry: Entry
    counts: dict[str, Any]
    files: int
    stopped: str = ""


def entry_folder(store: Path, spec: FeatureSpec, shards: Shards) -> Path:
    """Where the entry of a spec and of these shards stands in a store."""
    return store.resolve() / entry_id(spec, shards.name, shards.root_sha256)


def make_features(
    shards: Shards,
    store: Path,
    feature: Feature,
    dtype: str = "float16",
    *,
    engine: Engine | None = None,
    device: str = "cpu",
    workers: int = 0,
    check: bool = False,
    update: Callable[[int, str], None] = lambda done, facts: None,
) -> Made:
    """Compute a feature of all clips of one set of our shards into a store, skipping the files that are finished.

    An entry that is finished is left alone, but for files that are gone or cut short, and those that lost clips which
    can be read by now. When the disk is full, or workers are lost again and again, what is finished stays finished,
    `stopped` says why, and the same call goes on.

    Args:
        shards: the clips.
        store: its folder.
        feature: the module; at the shards' rate, and of 128 frames a second.
        dtype: one of `spec.DTYPES`.
        engine: where files are computed; this process by default.
        device: see `build.Unit`.
        workers: threads that read ahead, for each file under way.
        check: compare also the sha256 of every file that is there, and compute anew what is damaged.
        update: called with (clips done, facts) as files are finished.

    Raises:
        FeatureError: the feature does not fit the shards, or cannot be kept as this dtype.
        ShardError: the shards are not whole, not ours, or several sets.
        TableError: another run is writing to the entry, or a table of the shards is damaged.
        OSError: the disk is full or does not let us write, not even the plan.
    """
    spec = FeatureSpec.of(feature, shards, dtype)
    _check(shards, feature)
    silence = _silence(spec)
    folder = entry_folder(store, spec, shards)
    with tables.locked(folder):
        before = _before(folder)
        if before is not None and before.finished and not check and _whole(before):
            lost = before.info["counts"]["failed"]
            if not lost or not any(map(_can_more, units_of(shards, folder, spec, device, workers))):
                return Made(before, before.info["counts"], 0)
        entry = _begun(shards, folder, spec, feature, silence)
        units = units_of(shards, folder, spec, device, workers)
        there = {unit.name: counts for unit in units if (counts := _kept(unit, check))}
        left = [unit for unit in units if unit.name not in there]
        stopped, files = _build(left, list(there.values()), engine or Local(), update)
        # Not before: tasks of a driver that was killed may be writing still, and the engine waits for them.
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return _put_together(entry, units, files, stopped)


def _check(shards: Shards, feature: Feature) -> None:
    """Raise where the shards are not all there, or the feature has not 128 frames a second."""
    counts, stopped = shards.info["counts"], shards.info["stopped"]
    if not shards.whole:
        raise ShardError(f"{shards.place}: are some of its shards; allowed is the whole folder")
    if stopped or len(shards) != counts["written"]:
        why = stopped or f"its index has {len(shards)} of {counts['written']} clips"
        raise ShardError(
            f"{shards.place}: is not whole ({why}); `pipeline shard` goes on, `pipeline verify` says more"
        )
    if feature.frames_per_s != FRAMES_PER_S:
        raise FeatureError(
            f"{feature.NAME}: with a hop of {feature.settings.hop} it has not {FRAMES_PER_S} frames a second, which a "
            "store needs; allowed is the hop that it has by itself"
        )


def _before(folder: Path) -> Entry | None:
    """The entry that is there; None where there is none, or its entry.json is damaged, which is then written anew."""
    try:
        return Entry.open(folder)
    except TableError:
        return None


def _whole(entry: Entry) -> bool:
    """Whether the tables and records of a finished entry are as they were written, and its files of their sizes."""
    if any(digest_of(entry.folder / name) != entry.info["files"][name] for name in FILES):
        return False
    return all(read_record(entry.folder / one["file"]) is not None for one in entry.info["shards"])


def _silence(spec: FeatureSpec) -> list[float]:
    """What the feature makes of silence; raises FeatureError where the dtype cannot hold it."""
    with exactly(torch.device("cpu")):
        silence = silence_of(spec.create(), spec.dtype)
    if not all(map(math.isfinite, silence)):
        raise FeatureError(
            f"--dtype {spec.dtype}: cannot hold {spec.feature} of silence; --dtype float32 does"
        )
    return silence


def _begun(shards: Shards, folder: Path, spec: FeatureSpec, feature: Feature, silence: list[float]) -> Entry:
    """Write down what is to be computed, and copy what the clips are known by; readers refuse it until it is finished.

    Raises:
        ShardError: a table of the shards is not the one that was written with them, or they change.
    """
    part, info = shards.sets[0], shards.info
    said = {
        "spec": asdict(spec),
        "lineage": {"dataset": shards.name, "root_sha256": shards.root_sha256, "shards": _place(shards)},
        "about": {"feature": feature.ABOUT, "unit": feature.UNIT, "dataset": info["about"]},
        "bins": feature.bins,
        "frames_per_s": FRAMES_PER_S,
        "silence": silence,
        "finished": False,
    }
    write_sealed(folder / ENTRY_FILE, said)
    for name in (INDEX_FILE, DATASET_FILE):
        source = part.store.local(name)
        if name == INDEX_FILE and digest_of(source) != info["files"][INDEX_FILE]:
            raise ShardError(
                f"{source}: was changed since it was written; `pipeline verify --repair` mends it"
            )
        with open(source, "rb") as file, tables.atomic_write(folder / name) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    if read_dataset(folder)["root_sha256"] != shards.root_sha256:
        raise ShardError(f"{shards.place}: was changed while it was read; run the same command again")
    return Entry(folder, said)


def _place(shards: Shards) -> str:
    return shards.place if shards.far else str(Path(shards.place).resolve())


def units_of(shards: Shards, folder: Path, spec: FeatureSpec, device: str, workers: int) -> list[Unit]:
    """One for each shard, in their order; see `Unit`."""
    part = shards.sets[0]
    index = Index(part.index.table().select(_COLUMNS).combine_chunks())
    info = {name: part.info[name] for name in ("name", "labels", "spec")}
    # Workers may have another current folder.
    store = part.store if shards.far else open_store(_place(shards))
    whole = Shards([ShardSet(store, info, index, part.files)])
    found = rows_by_value(index["shard"].to_numpy())
    units = []
    for shard in part.info["shards"]:
        rows = found.get(shard["shard"], np.zeros(0, np.int64))
        name = f"{Path(shard['shard']).stem}.h5"
        source = whole.take(rows).light()
        units.append(Unit(name, folder, source, rows, shard["sha256"], spec, device, workers))
    return units


def _kept(unit: Unit, check: bool) -> dict[str, int] | None:
    """The counts of a unit whose file is finished; one that is to be computed anew loses its record, and gives None."""
    record = finished(unit)
    if record is None:
        return None
    file = unit.out / unit.name
    if _can_more(unit) or (check and digest_of(file) != record["sha256"]):
        record_path(file).unlink()
        return None
    return dict(record["counts"])


def _can_more(unit: Unit) -> bool:
    """Whether clips that a finished file lost can be read by now, because the shard was mended."""
    record = finished(unit)
    lost = {row["key"] for row in record["failures"] if row["reason"] != TOO_LARGE} if record else set()
    rows = np.flatnonzero(np.isin(unit.source.columns["key"].to_pylist(), sorted(lost)))
    if not len(rows):
        return False
    room = np.empty((len(rows), int(unit.source.samples[rows].max())), np.int16)
    return len(unit.source.read_into(rows, room, check=True)) < len(rows)


def _build(
    left: Sequence[Unit],
    there: Sequence[dict[str, int]],
    engine: Engine,
    update: Callable[[int, str], None],
) -> tuple[str, int]:
    """Build the units that are left; returns why that stopped before its end ("": it did not), and how many were."""
    done, failed = sum(counts["clips"] for counts in there), sum(counts["failed"] for counts in there)
    stopped, files = "", 0
    update(done, f"failed {failed}")
    try:
        with closing(run_rounds(build, left, engine)) as results:
            for _, result in results:
                if isinstance(result, Lost):
                    stopped = result.message
                    continue
                files += 1
                done, failed = done + result.counts["clips"], failed + result.counts["failed"]
                update(done, f"failed {failed}")
    except OSError as error:
        stopped = f"{error.filename or left[0].out}: {error.strerror or error}"
    except (RunError, ShardError) as error:
        stopped = str(error)
    return stopped, files


def _put_together(entry: Entry, units: Sequence[Unit], files: int, stopped: str) -> Made:
    """Write the tables and entry.json, where all units are finished; the account in any case."""
    folder, parts, places = entry.folder, [TABLE.empty_table()], [np.zeros(0, np.int64)]
    moments = Moments.none(entry.info["bins"])
    shards, computed, lost = [], [], []
    for unit in units:
        record = finished(unit)
        if record is None:
            lost += _not_built(unit, stopped)
            continue
        file = pa.array([unit.name] * len(record["clips"]["key"]), pa.string())
        parts.append(pa.table({**record["clips"], "file": file}).select(TABLE.names).cast(TABLE))
        places.append(unit.rows)
        moments = moments.and_those(moments_of(record))
        lost += record["failures"]
        shards.append(
            {"file": unit.name, "sha256": record["sha256"], "bytes": record["bytes"], **record["counts"]}
        )
        if record["computed"] not in computed:
            computed.append(record["computed"])
    counts = {
        "in": sum(len(unit.source) for unit in units),
        "written": sum(shard["written"] for shard in shards),
        "failed": len(lost),
        "skipped": 0,
        "reasons": dict(sorted(Counter(row["reason"] for row in lost).items())),
    }
    if len(shards) < len(units):
        return Made(entry, counts, files, stopped or "files vanished or changed while the job ran")
    try:
        table = pa.concat_tables(parts).combine_chunks().take(np.argsort(np.concatenate(places)))
        tables.write_table(folder / TABLE_FILE, table)
        tables.write_jsonl(folder / FAILURES_FILE, tables.in_order(lost))
        said = {
            **entry.info,
            "finished": True,
            "as_of": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "computed": computed,
            "counts": counts,
            "statistics": {
                "frames": moments.frames,
                "mean": moments.mean.tolist(),
                "std": np.sqrt(moments.squares / max(moments.frames, 1)).tolist(),
            },
            "files": {name: tables.sha256_of(folder / name)[0] for name in FILES},
            "shards": shards,
            "root_sha256": root_sha256([{"sha256": one["sha256"], "shard": one["file"]} for one in shards]),
        }
        write_sealed(folder / ENTRY_FILE, said)
    except OSError as error:
        return Made(entry, counts, files, f"{error.filename}: {error.strerror}")
    return Made(Entry(folder, said), counts, files)


def _not_built(unit: Unit, why: str) -> list[dict[str, Any]]:
    """The clips of a unit without a file, as failures."""
    columns = (unit.source.columns[name].to_pylist() for name in ("key", "source"))
    return [
        asdict(Failure(key, source, "features", "failed", "not-built", why))
        for key, source in zip(*columns, strict=True)
    ]
