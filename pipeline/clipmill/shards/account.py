"""Put a folder of shards together: the index, the failures and dataset.json, from the shards' records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipmill import __version__, tables
from clipmill.audio import codec_versions
from clipmill.errors import ConfigError, ShardError, TableError
from clipmill.shards.croissant import INDEX_FILE
from clipmill.shards.metadata import write_metadata
from clipmill.shards.plan import PLAN_FILE, ShardSpec
from clipmill.shards.write import read_record, record_path

FAILURES_FILE, DATASET_FILE = "failures.jsonl", "dataset.json"

FILES = (INDEX_FILE, FAILURES_FILE, PLAN_FILE)
"""The tables beside the shards whose sha256 dataset.json has."""


def put_together(
    out: Path,
    name: str,
    spec: ShardSpec,
    labels: Sequence[str],
    shards: Mapping[str, str | None],
    failures: Sequence[dict[str, Any]],
    wanted: int,
    **more: Any,
) -> dict[str, Any]:
    """Write index.parquet, the dataset card, failures.jsonl and dataset.json; return what the last one says.

    Where the disk does not let us, `stopped` says so, and there is no dataset.json.

    Args:
        out: the folder.
        name: the dataset's name.
        spec: the settings of all the shards.
        labels: class names, in the order of their ids.
        shards: the file names of those that are finished, in order, and the hash that each was made
            from, where it is to be compared.
        failures: clips lost before, or with shards that are not finished; the records' are added.
        wanted: how many clips were asked for.
        more: further fields of dataset.json.

    Raises:
        ShardError: a shard is not finished, or the account does not reconcile.
        TableError: a record is damaged.
    """
    parts, entries, lost = [tables.INDEX.empty_table()], [], list(failures)
    for shard, made_from in shards.items():
        record = read_record(out / shard)
        if record is None or made_from not in (None, record.unit):
            raise ShardError(
                f"{out / shard}: vanished or changed while the job ran; run the same command again"
            )
        try:
            parts.append(pa.table(record.index, schema=tables.INDEX))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise TableError(
                f"{record_path(out / shard)}: is no shard's record ({error}); remove it and run `pipeline shard` again"
            ) from error
        entries.append(
            {"shard": record.shard, "sha256": record.sha256, "bytes": record.size, **record.counts}
        )
        lost += record.failures
    index, lost = pa.concat_tables(parts), tables.in_order(lost)
    dataset = {
        "name": name,
        "spec": asdict(spec),
        "versions": versions(),
        "counts": _counts(wanted, index.num_rows, lost),
        "labels": list(labels),
        "shards": entries,
        "root_sha256": root_sha256(entries),
        **more,
    }
    try:
        tables.write_table(out / INDEX_FILE, index)
        write_metadata(out, dataset, index)
        tables.write_jsonl(out / FAILURES_FILE, lost)
        dataset["files"] = {file: tables.sha256_of(out / file)[0] for file in FILES}
        tables.write_json(out / DATASET_FILE, dataset)
    except OSError as error:
        (out / DATASET_FILE).unlink(missing_ok=True)  # an older one would speak of other tables
        dataset["stopped"] = f"{error.filename}: {error.strerror}"
    return dataset


def read_dataset(folder: Path) -> dict[str, Any]:
    """What dataset.json says.

    Raises:
        TableError: it is missing or damaged.
    """
    path = folder / DATASET_FILE
    said = tables.read_json(
        path,
        "name",
        "about",
        "spec",
        "counts",
        "labels",
        "shards",
        "root_sha256",
        "files",
        "stopped",
        "made_from",
    )
    try:
        ShardSpec(**said["spec"])
        for entry in said["shards"]:
            _ = [entry[name] for name in ("shard", "sha256", "bytes", "clips", "written", "failed")]
        _ = [said["counts"][name] for name in ("in", "written", "failed", "skipped", "reasons")]
        _ = [said["files"][name] for name in FILES]
        dict(said["about"]), dict(said["made_from"]), str(said["name"])
    except (TypeError, KeyError, ValueError, ConfigError) as error:
        raise TableError(f"{path}: is damaged: {type(error).__name__} {error}") from error
    return said


def _counts(wanted: int, written: int, failures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def root_sha256(shards: Sequence[Mapping[str, Any]]) -> str:
    """One hash for all shards: sha256 over the lines `<sha256>  <file name>`, as sha256sum prints them."""
    lines = (f"{shard['sha256']}  {shard['shard']}\n" for shard in sorted(shards, key=lambda s: s["shard"]))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of everything that decides the bytes."""
    return (
        {"clipmill": __version__} | codec_versions() | {n: version(n) for n in ("h5py", "numpy", "pyarrow")}
    )
