"""Shards of one format to shards of another: the same clips, samples and facts, sample for sample."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill import tables
from clipmill.errors import ConfigError, ShardError
from clipmill.run import Engine, Local, Lost, run_rounds
from clipmill.shards.account import FAILURES_FILE, put_together
from clipmill.shards.formats import WRITERS
from clipmill.shards.job import only_ours
from clipmill.shards.plan import DEFAULT_ENCODING, FORMATS, PLAN, Layout, ShardSpec, read_layout, write_layout
from clipmill.shards.prepare import Ready
from clipmill.shards.read import Shards, rows_by_value
from clipmill.shards.write import Built, finished_record, record_path, write_shard


@dataclass(frozen=True)
class _Unit:
    """One shard to be converted; `source` holds its clips, in the order they stand there."""

    name: str
    out: Path
    source: Shards
    source_sha256: str
    spec: ShardSpec
    labels: tuple[str, ...]

    @property
    def hash(self) -> str:
        said = {
            "shard": self.name, "converted_from": self.source_sha256, "spec": asdict(self.spec), "labels": self.labels,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def convert(
    where: str | Path,
    out: Path,
    format: str,
    encoding: str | None = None,
    *,
    engine: Engine | None = None,
    overwrite: bool = False,
    update: Callable[[int, str], None] = lambda done, facts: None,
) -> dict[str, Any]:
    """Convert a folder of shards; returns what dataset.json says of the new ones.

    Every clip's samples are checked against their sha256 on the way. Finished shards are kept, as
    `make_shards` keeps them.

    Args:
        where: the folder of the shards.
        out: the folder of the new shards.
        format: "webdataset" or "hdf5".
        encoding: "flac" or "pcm16"; None: what is usual in the format.
        engine: where shards are converted; this process by default.
        overwrite: convert every shard anew.
        update: called with (clips done, facts) as shards are finished.

    Raises:
        ConfigError: `out` is the folder of the shards, or the format or encoding is unknown.
        ShardError: a clip cannot be read, is damaged, or `out` holds other shards.
        TableError: another run is writing to `out`.
        OSError: the disk is full or does not let us write.
        RunError: worker processes were lost, again and again.
    """
    out = out.resolve()  # as workers elsewhere must have it
    source = Shards.open(Path(where).resolve() if Path(where).exists() else where, ours=True)
    if not source.whole:
        raise ConfigError(f"{where}: some shards of {source.folder}; allowed is the whole folder")
    if out.resolve() == source.folder.resolve():
        raise ConfigError(f"--out {out}: is the folder of the shards to be converted")
    if len(source) != source.info["counts"]["written"]:
        raise ShardError(
            f"{source.folder}: its index has {len(source)} of {source.info['counts']['written']} clips; "
            "`pipeline verify --repair` mends it"
        )
    if source.info["stopped"]:
        raise ShardError(f"{source.folder}: not all of its shards are built ({source.info['stopped']})")
    spec = replace(
        ShardSpec(**source.info["spec"]), format=format, encoding=encoding or DEFAULT_ENCODING[format]
    )
    units = _units(source, out, spec)
    with tables.locked(out, again=True):
        finished = _finished(units, out, overwrite)
        write_layout(out, _layout(source, spec))
        done = sum(finished.values())
        left = [unit for unit in units if unit.name not in finished]
        update(done, "")
        with closing(run_rounds(_convert, left, engine or Local())) as results:
            for place, result in results:
                if isinstance(result, Lost):
                    raise ShardError(
                        f"{out / left[place].name}: {result.message}; run the same command again"
                    )
                done += result.counts["written"]
                update(done, "")
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        counts = source.info["counts"]
        lost = tables.read_jsonl(source.folder / FAILURES_FILE)
        return put_together(
            out,
            source.name,
            spec,
            source.labels,
            {unit.name: unit.hash for unit in units},
            lost,
            counts["in"] - sum(1 for row in lost if not row["key"]),
            about=source.info["about"],
            made_from={
                "converted_from": os.path.relpath(source.folder.resolve(), out.resolve()),
                "root_sha256": source.info["root_sha256"],
            },
            stopped="",
        )


def _units(source: Shards, out: Path, spec: ShardSpec) -> list[_Unit]:
    rows = rows_by_value(source.index["shard"].to_numpy())
    places = source.index["row"].to_numpy()
    units = []
    for entry in source.info["shards"]:
        mine = rows.get(entry["shard"], np.zeros(0, np.int64))
        part = source.take(mine[np.argsort(places[mine], kind="stable")]).light()
        name = f"{Path(entry['shard']).stem}.{FORMATS[spec.format]}"
        units.append(_Unit(name, out, part, entry["sha256"], spec, tuple(source.labels)))
    return units


def _finished(units: list[_Unit], out: Path, overwrite: bool) -> dict[str, int]:
    """How many clips each shard has that need not be converted; those of other shards are refused."""
    planned = {unit.name: unit for unit in units}
    stems = "|".join(sorted({re.escape(re.sub(r"-\d{6}\.\w+$", "", name)) for name in planned}))
    finished = {}
    for path in only_ours(out, re.compile(rf"(?:{stems})-\d{{6}}\.\w+"), "these"):
        if overwrite:
            path.unlink()
            record_path(path).unlink(missing_ok=True)
            continue
        unit, record = planned.get(path.name), finished_record(path)
        if unit is None or (record is not None and record.unit != unit.hash):
            raise ShardError(
                f"{path}: was not made from these shards with these settings; --overwrite converts all anew, "
                "--out DIR writes somewhere else"
            )
        if record is not None:
            finished[path.name] = record.counts["written"]
    return finished


def _layout(source: Shards, spec: ShardSpec) -> Layout:
    """The plan of the shards to be converted, for their new names."""
    extension = FORMATS[spec.format]
    before = read_layout(source.folder)
    table = source.index.select(PLAN.names) if before is None else before.table
    names = pc.replace_substring_regex(table["shard"], r"\.\w+$", f".{extension}")
    table = pa.table([table["key"], names], schema=PLAN)
    return Layout(table, spec, tuple(source.labels))


def _convert(unit: _Unit) -> Built:
    try:
        return write_shard(unit.out / unit.name, unit.hash, unit.spec, unit.labels, _clips(unit))
    finally:
        unit.source.close()


def _clips(unit: _Unit) -> Iterator[tuple[str, Ready]]:
    spec, source = unit.spec, unit.source
    keys, hashes = source.index["key"].to_pylist(), source.index["sha256"].to_pylist()
    for row, (key, digest) in enumerate(zip(keys, hashes, strict=True)):
        samples = source.read(row)
        if hashlib.sha256(samples.data).hexdigest() != digest:
            shard = source.index["shard"][row].as_py()
            raise ShardError(
                f"{source.folder / shard}: clip {key}'s samples are not those recorded; "
                "`pipeline verify --repair` mends that"
            )
        audio = WRITERS[spec.format].encoded(samples, spec.sample_rate, spec.encoding)
        yield key, Ready(audio, source.facts(row))
