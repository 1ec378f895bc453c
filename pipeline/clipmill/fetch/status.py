"""How far a fetch has come, told from its tables alone; it may be running meanwhile."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipmill import tables
from clipmill.errors import FetchError, TableError
from clipmill.fetch.fetched import LEDGER_FILE, MANIFEST_FILE, facts_of
from clipmill.fetch.ledger import Ledger
from clipmill.fetch.reasons import POLICY
from clipmill_manifests import facts


@dataclass(frozen=True)
class SplitStatus:
    """One split: clips wanted, and what they came to; `share_had` of those tried, `papers` the shares of others."""

    split: str
    wanted: int
    had: int
    failed: int
    left: int
    share_had: float | None
    papers: dict[str, float]


@dataclass(frozen=True)
class LabelStatus:
    """One label: clips wanted, and lost of these."""

    label: str
    wanted: int
    lost: int


@dataclass(frozen=True)
class Status:
    """A fetch as it stands: in = had + failed + skipped + left.

    `tried_per_hour` is over the last hour of the last run, `eta_s` what is left at that rate;
    None where no run has lasted long enough to tell. `may_heal` counts the failures that the
    next run tries again. `pausing_s` is how long it will go on pausing. `running`: at this moment.
    """

    name: str
    wanted: int
    had: int
    failed: int
    skipped: int
    left: int
    bytes: int
    reasons: dict[str, int]
    may_heal: int
    tried_per_hour: float | None
    eta_s: float | None
    running: bool
    pausing_s: float
    pausing_why: str
    splits: list[SplitStatus]
    labels: list[LabelStatus]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def status(root: Path, name: str, worst: int = 10) -> Status:
    """Tell how far the fetch of a dataset has come; `worst`: how many of the labels that lost most.

    Raises:
        FetchError: it has not been fetched, or its clips are not fetched one by one.
        TableError: its tables are damaged.
    """
    said = facts_of(root, name)
    if not said["by_segment"]:
        raise FetchError(f"{name}: was fetched all at once; `pipeline datasets` tells what became of it")
    manifest = _columns(root / name / MANIFEST_FILE, "split")
    wanted = {row["values"]: row["counts"] for row in pc.value_counts(manifest["split"]).to_pylist()}
    with Ledger(root / name / LEDGER_FILE) as ledger:
        tally, pace, pauses = ledger.tally(), ledger.pace(), json.loads(ledger.state("pauses") or "{}")
        lost = pa.array(ledger.lost_keys(), pa.string())
    by_split: Counter[tuple[str, str]] = Counter()
    reasons: Counter[str] = Counter()
    for split, outcome, reason, clips, _ in tally:
        by_split[split, outcome] += clips
        if reason:
            reasons[reason] += clips
    # Of several addresses, the first that will ask again.
    pause: dict[str, Any] = {"until": 0.0, "why": ""}
    pause = min(pauses.values(), key=lambda one: float(one["until"]), default=pause)
    about = facts(said["kind"])
    splits = [_split_status(about, split, clips, by_split) for split, clips in sorted(wanted.items())]
    left = sum(split.left for split in splits)
    return Status(
        name=name,
        wanted=manifest.num_rows,
        had=sum(split.had for split in splits),
        failed=sum(split.failed for split in splits),
        skipped=sum(n for (_, outcome), n in by_split.items() if outcome == "skipped"),
        left=left,
        bytes=sum(row[4] for row in tally),
        reasons=dict(reasons.most_common()),
        may_heal=sum(n for reason, n in reasons.items() if POLICY.get(reason, "final") != "final"),
        tried_per_hour=pace[0] if pace else None,
        eta_s=3600 * left / pace[0] if pace and pace[0] else None,
        running=tables.is_locked(root / name),
        pausing_s=max(pause["until"] - time.time(), 0.0) if left else 0.0,
        pausing_why=pause["why"],
        splits=splits,
        labels=_labels_that_lost_most(root / name / MANIFEST_FILE, lost, worst)
        if worst and len(lost)
        else [],
    )


def _split_status(
    about: dict[str, Any], split: str, wanted: int, by_split: Counter[tuple[str, str]]
) -> SplitStatus:
    had, failed = by_split[split, "had"], by_split[split, "failed"]
    papers = {
        name: paper["had"][split] for name, paper in about.get("papers", {}).items() if split in paper["had"]
    }
    return SplitStatus(
        split,
        wanted,
        had,
        failed,
        wanted - had - failed,
        had / (had + failed) if had + failed else None,
        papers,
    )


def _labels_that_lost_most(path: Path, lost: pa.Array, worst: int) -> list[LabelStatus]:
    """The labels that lost the largest share of their clips; the ten added keep rare labels from crowding the list."""
    table = _columns(path, "key", "labels")
    wanted = _count(table["labels"])
    gone = _count(table["labels"].filter(pc.is_in(table["key"], lost)))
    rows = [LabelStatus(label, wanted[label], n) for label, n in gone.items()]
    return sorted(rows, key=lambda row: (-row.lost / (row.wanted + 10), row.label))[:worst]


def _count(labels: pa.ChunkedArray) -> dict[str, int]:
    counted = pc.value_counts(pc.list_flatten(labels))
    return dict(zip(counted.field(0).to_pylist(), counted.field(1).to_pylist(), strict=True))


def _columns(path: Path, *names: str) -> pa.Table:
    try:
        # Labels and splits are few: as dictionaries two million rows of them are counted in no time.
        return pq.read_table(path, columns=list(names), read_dictionary=["split", "labels.list.element"])
    except (OSError, pa.ArrowException, KeyError) as error:
        raise TableError(f"{path}: cannot be read as a manifest: {error}") from error
