"""Compute stored features again from the sound, and say whether they are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clipmill.errors import ShardError
from clipmill.features import Feature
from clipmill.featurestore.build import TOO_LARGE, Unit, read_record
from clipmill.featurestore.clips import StoredClips
from clipmill.featurestore.compute import batch_mates, compute, computed_by, exactly
from clipmill.featurestore.entry import Entry
from clipmill.featurestore.job import units_of
from clipmill.loader import Bad
from clipmill.shards.read import Shards

MEAN, MOST, BUT = 2e-5, 1e-3, 1e-3
"""What another kind of device or other versions may differ by, in standard deviations of the feature: in the mean, and
at most, but for one value in a thousand: what is quiet beside something loud is rounded otherwise there."""


@dataclass(frozen=True)
class Parity:
    """How features that were computed again compare with those that are stored.

    Attributes:
        clips: how many were compared.
        device: where they were computed again.
        alike: how many of them had been computed on this kind of device, with these versions.
        equal: share of the values that are the same to the bit, rounded to the number type that is stored.
        mean, most: what values differ by, beyond that rounding, in the feature's unit.
        problems: where that is more than allowed: alike, nothing; else see `allowed`.
        allowed: in words.
    """

    clips: int
    device: str
    alike: int
    equal: float
    mean: float
    most: float
    allowed: str
    problems: list[str] = field(default_factory=list)


def recompute(
    entry: Entry,
    shards: Shards | None,
    sample: int | None,
    device: torch.device,
    workers: int = 0,
    update: Callable[[int, str], None] = lambda done, facts: None,
) -> Parity:
    """Compute at least `sample` clips again, drawn at random, in the batches that they were computed in; None: all.

    Raises:
        ShardError: the sound is not there any more, or is other sound, or cannot be read.
        FeatureError: this clipmill cannot compute the feature as it was.
    """
    feature, clips = entry.spec.create(), entry.clips
    if shards is None:
        shards = Shards.open(entry.info["lineage"]["shards"], ours=True)
        entry.check(shards=shards)
    scale = float(np.sqrt(np.mean(np.square(entry.statistics.std))))
    here, elsewhere = _Tally(0.0), _Tally(MOST * scale)
    ours = computed_by(device)
    units = units_of(shards, entry.folder, entry.spec, str(device), workers)
    with exactly(device):
        for unit, parts in _chosen(units, sample, shards.sample_rate):
            record = read_record(unit.out / unit.name)
            tally = here if record is not None and _alike(record["computed"], ours) else elsewhere
            for rows, again in _again(feature, unit, parts, device):
                tally.add(*_stored(clips, unit.rows[rows], again))
                update(here.clips + elsewhere.clips, "computed again")
    return _parity(entry, device, here, elsewhere, scale)


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two say the same of `computed_by`, whatever clipmill's version: the feature's own code has one."""
    return [one["device"], one["kind"], {**one["versions"], "clipmill": ""}] == [
        other["device"],
        other["kind"],
        {**other["versions"], "clipmill": ""},
    ]


class _Tally:
    """What was compared so far; `limit` is what a value may differ by."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.clips = self.values = self.equal = self.over = 0
        self.total = self.most = 0.0

    def add(self, stored: NDArray[np.floating], again: NDArray[np.float32]) -> None:
        """Compare `[clips, frames, bins]` with the same computed again."""
        apart = np.abs(stored.astype(np.float64) - again)
        if stored.dtype == np.float16:
            apart = np.maximum(apart - np.spacing(np.abs(stored)).astype(np.float64) / 2, 0)
        self.clips += len(stored)
        self.values += apart.size
        self.equal += int((again.astype(stored.dtype) == stored).sum())
        self.over += int((apart > self.limit).sum())
        self.total += float(apart.sum())
        self.most = max(self.most, float(apart.max(initial=0.0)))


def _parity(entry: Entry, device: torch.device, here: _Tally, elsewhere: _Tally, scale: float) -> Parity:
    unit = entry.info["about"]["unit"]
    exact = "the very bits" if entry.spec.dtype == "float32" else "half a unit in float16's last place"
    loose = (
        f"{MEAN * scale:.2g} {unit} in the mean, and {MOST * scale:.2g} but for one value in {1 / BUT:.0f}"
    )
    problems = []
    if here.over:
        problems.append(
            f"{here.over} of {here.values} values are not those that this device computes again; allowed is {exact}"
        )
    if elsewhere.values:
        mean = elsewhere.total / elsewhere.values
        if mean > MEAN * scale or elsewhere.over > BUT * elsewhere.values:
            problems.append(
                f"computed again elsewhere, values differ by {mean:.2g} {unit} in the mean, and {elsewhere.over} of "
                f"{elsewhere.values} by more than {MOST * scale:.2g}; allowed is {loose}"
            )
    values = max(here.values + elsewhere.values, 1)
    return Parity(
        here.clips + elsewhere.clips,
        computed_by(device)["kind"],
        here.clips,
        (here.equal + elsewhere.equal) / values,
        (here.total + elsewhere.total) / values,
        max(here.most, elsewhere.most),
        exact if not elsewhere.values else f"{exact} where the device is alike, else {loose}",
        problems,
    )


def _chosen(
    units: list[Unit], sample: int | None, rate: int
) -> Iterator[tuple[Unit, list[NDArray[np.int64]]]]:
    """The units to look at, and of each the rows to be computed again: such that each batch is as it was."""
    which = np.concatenate([np.full(len(unit.rows), number) for number, unit in enumerate(units)])
    local = np.concatenate([np.arange(len(unit.rows)) for unit in units])
    order = np.random.RandomState(0).permutation(len(which))
    batches: dict[int, list[NDArray[np.int64]]] = {}
    covered: set[tuple[int, int]] = set()
    for place in order:
        number, row = int(which[place]), int(local[place])
        if sample is not None and len(covered) >= sample:
            break
        if (number, row) not in covered:
            mates = batch_mates(units[number].source.samples, row, rate)
            covered |= {(number, int(mate)) for mate in mates}
            batches.setdefault(number, []).append(mates)
    for number, some in sorted(batches.items()):
        unit = units[number]
        lost = _lost(unit)
        whole = [np.sort(np.concatenate(some))]  # one after the other they fall into the same batches again
        yield unit, whole if not len(lost) else [np.setdiff1d(mates, lost) for mates in some]


def _lost(unit: Unit) -> NDArray[np.int64]:
    """The rows of clips that could not be read when the unit was built, and were in no batch."""
    record = read_record(unit.out / unit.name)
    reasons = record["clips"]["reason"] if record is not None else []
    return np.flatnonzero([reason not in (None, TOO_LARGE) for reason in reasons])


def _again(
    feature: Feature, unit: Unit, parts: list[NDArray[np.int64]], device: torch.device
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows of the unit, and their features `[clips, frames, bins]`."""

    def tell(bad: Bad) -> None:
        raise ShardError(str(bad))

    for part in parts:
        for made in compute(feature, unit.source.take(part), "float32", device, unit.workers, tell):
            yield part[made.rows], made.values


def _stored(
    clips: StoredClips, rows: NDArray[np.int64], again: NDArray[np.float32]
) -> tuple[NDArray[np.floating], NDArray[np.float32]]:
    """What is stored of these rows, and what was computed again of the same: less those that could not be stored."""
    room = np.empty(again.shape, clips.dtype)
    unread = clips.read_into(rows, room)
    if other := [one for one in unread if one.reason != TOO_LARGE]:
        raise ShardError(f"{other[0].shard}: clip {other[0].key} cannot be read: {other[0].message}")
    kept = np.setdiff1d(np.arange(len(rows)), [one.place for one in unread])
    return room[kept], again[kept]
