"""What stands where it must not stand twice: groups, exact copies and near copies across folds, splits and datasets.

Fingerprints are made shard by shard, and kept beside the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill import tables
from clipmill.audio.fingerprint import LEAST_WORDS, VERSION, WORDS_PER_S, fingerprint, match
from clipmill.audio.measure import SILENCE_DB
from clipmill.errors import TableError
from clipmill.run import run_units
from clipmill.shards.read import Shards, rows_by_value
from clipmill.types import TRAIN_SPLITS

KEPT = "fingerprints.parquet"

KEPT_SCHEMA = pa.schema(
    [
        pa.field("sha256", pa.string(), nullable=False),  # of the shard
        pa.field("row", pa.int32(), nullable=False),  # position in the shard
        pa.field("version", pa.int32(), nullable=False),
        pa.field("words", pa.large_binary(), nullable=False),  # uint16, little-endian
    ]
)
"""Fingerprints kept beside the shards; a row counts as long as its shard and `VERSION` are the same."""

_CLIPS_AT_ONCE = 1 << 16

Say = Callable[[str], None]
Update = Callable[[int, str], None]


@dataclass(frozen=True)
class Collection:
    """Clips of several folders of shards, each clip once.

    `clips` has, beside columns of the index, `dataset`, `rate` (Hz), `sides` (train for all splits that are
    trained on; null for those that are neither trained on nor scored) and `silent`.
    """

    parts: list[Shards]
    clips: pa.Table
    twice: int  # shards that were given more than once

    @classmethod
    def open(cls, wheres: Sequence[str | Path]) -> Collection:
        """Open folders, shards or ranges, as `Shards.open` takes them.

        Raises:
            ShardError: there are no shards, or no index.
        """
        parts: list[Shards] = []
        seen: set[tuple[Path, str]] = set()
        twice = 0
        for where in wheres:
            shards = Shards.open(where, ours=True)
            folder = shards.folder.resolve()
            files = [name for name in dict.fromkeys(shards.files) if (folder, name) not in seen]
            twice += len(shards.files) - len(files)
            seen.update((folder, name) for name in files)
            index = shards.index.filter(pc.is_in(shards.index["shard"], pa.array(files, pa.string())))
            parts.append(Shards.of(shards.folder, shards.info, index, files))
        return cls(parts, pa.concat_tables([_facts(part) for part in parts]).combine_chunks(), twice)


def _facts(part: Shards) -> pa.Table:
    index = part.index
    sides = pc.if_else(pc.is_in(index["split"], pa.array(TRAIN_SPLITS)), "train", index["split"])
    sides = pc.if_else(
        pc.is_in(sides, pa.array(("train", "valid", "eval"))), sides, pa.scalar(None, pa.string())
    )
    kept = index.select(["key", "shard", "row", "labels", "split", "fold", "group", "sha256"])
    return (
        kept.append_column("dataset", pa.array([part.name] * len(part), pa.string()))
        .append_column("folder", pa.array([str(part.folder)] * len(part), pa.string()))
        .append_column("rate", pa.array(np.full(len(part), part.sample_rate, np.int32)))
        .append_column("side", sides)
        .append_column("silent", pc.less_equal(index["peak_db"], SILENCE_DB))
    )


def find_leaks(
    whole: Collection,
    *,
    exact_only: bool = False,
    jobs: int = 1,
    say: Say = lambda text: None,
    update: Update = lambda done, facts: None,
) -> dict[str, Any]:
    """Everything that stands in more than one fold, split or dataset, as plain values; docs/leaks.md has the fields.

    Args:
        whole: the clips.
        exact_only: look for equal samples alone, and decode nothing.
        jobs: processes that fingerprint.
        say: told what a person should know, such as a folder that cannot be written to.
        update: called with (clips done, facts) while fingerprints are made.

    Raises:
        ShardError: a clip cannot be read.
        RunError: worker processes died.
    """
    if whole.twice:
        say(f"{whole.twice} shards were given more than once, and are looked at once")
    clips = whole.clips
    found: dict[str, Any] = {
        "shards": [
            {"dataset": p.name, "folder": str(p.folder), "shards": len(p.files), "clips": len(p)}
            for p in whole.parts
        ],
        "clips": clips.num_rows,
        "silent": _count(clips["silent"]),
        "groups": _groups(clips),
        "exact": _exact(clips),
        "near": None if exact_only else _near(whole, jobs, say, update),
    }
    sections = [found[name] for name in ("groups", "exact", "near") if found[name] is not None]
    return found | {"leaks": sum(len(section["leaks"]) for section in sections)}


def _groups(clips: pa.Table) -> dict[str, Any]:
    """Groups on several sides: of folds and splits within a dataset, and of datasets.

    A number alone says nothing outside its dataset: two collections may both have a group 7.
    """
    grouped = clips.filter(clips["group"].is_valid())
    places = grouped.group_by(["group", "dataset", "split", "side", "fold"]).aggregate([([], "count_all")])
    names = {
        "fold": places.group_by(["group", "dataset"]).aggregate([("fold", "count_distinct")]),
        "split": places.group_by(["group", "dataset"]).aggregate([("side", "count_distinct")]),
        "dataset": places.filter(pc.invert(pc.match_substring_regex(places["group"], "^[0-9]+$")))
        .group_by(["group"])
        .aggregate([("dataset", "count_distinct")]),
    }
    across: dict[str, list[str]] = {}
    for name, counted in names.items():
        column = counted.column_names[-1]
        for group in pc.unique(counted.filter(pc.greater(counted[column], 1))["group"]).to_pylist():
            across.setdefault(group, []).append(name)
    where: dict[str, list[dict[str, Any]]] = {group: [] for group in across}
    for row in places.filter(pc.is_in(places["group"], pa.array(list(across), pa.string()))).to_pylist():
        where[row["group"]].append(
            {"dataset": row["dataset"], "split": row["split"], "fold": row["fold"], "clips": row["count_all"]}
        )
    leaks: list[dict[str, Any]] = [
        {"group": group, "across": across[group], "where": sorted(where[group], key=_order)}
        for group in sorted(across)
    ]
    return {"clips": grouped.num_rows, "groups": pc.count_distinct(grouped["group"]).as_py(), "leaks": leaks}


def _order(place: dict[str, Any]) -> tuple[Any, ...]:
    return place["dataset"], place["split"], -1 if place["fold"] is None else place["fold"]


def _exact(clips: pa.Table) -> dict[str, Any]:
    """Sets of clips with equal samples at an equal rate."""
    rows = np.flatnonzero(~clips["silent"].to_numpy(zero_copy_only=False))
    numbers = _numbers(clips)[rows]
    again = np.bincount(numbers)[numbers] > 1 if len(numbers) else np.zeros(0, bool)
    rows, numbers = rows[again], numbers[again]
    leaks: list[dict[str, Any]] = []
    harmless: list[dict[str, Any]] = []
    for some in rows_by_value(numbers).values():
        members = clips.take(pa.array(rows[some])).to_pylist()
        across = sorted(_borders(members, members))
        entry = {
            "sha256": members[0]["sha256"],
            "across": across,
            "labels_agree": len({tuple(sorted(member["labels"])) for member in members}) == 1,
            "clips": [_told(member) for member in members],
        }
        (leaks if across else harmless).append(entry)
    return {"clips": clips.num_rows - _count(clips["silent"]), "leaks": leaks, "harmless": harmless}


def _numbers(clips: pa.Table) -> NDArray[np.int64]:
    """For each clip a number: equal for equal samples at an equal rate, counted up in the clips' order."""
    rates = pc.cast(clips["rate"], pa.string())
    names = pc.binary_join_element_wise(clips["sha256"], rates, "/").combine_chunks()
    return names.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _count(truths: Any) -> int:
    return int(pc.sum(truths).as_py() or 0)


def _borders(some: list[dict[str, Any]], others: list[dict[str, Any]]) -> set[str]:
    """Which borders lie between any clip of the one list and any of the other."""
    kinds = [
        {(clip["dataset"], clip["fold"], clip["side"]): clip for clip in clips}.values()
        for clips in (some, others)
    ]
    return {name for one in kinds[0] for other in kinds[1] for name in _border(one, other)}


def _border(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Which borders lie between two clips: the dataset, or fold and split within one."""
    if one["dataset"] != other["dataset"]:
        return {"dataset"}
    return {
        name
        for name, column in (("fold", "fold"), ("split", "side"))
        if None not in (one[column], other[column]) and one[column] != other[column]
    }


def _told(clip: dict[str, Any]) -> dict[str, Any]:
    return {name: clip[name] for name in ("dataset", "key", "shard", "split", "fold", "group", "labels")}


def _near(whole: Collection, jobs: int, say: Say, update: Update) -> dict[str, Any]:
    """Pairs of clips with one recording in them whose samples differ."""
    prints, reused, done = [], 0, 0
    for part in whole.parts:
        kept = _Kept(part, say)
        reused += kept.clips
        done += kept.clips
        update(done, f"kept from before {reused}")
        for clips in kept.make(jobs):
            done += clips
            update(done, f"kept from before {reused}")
        prints.append(kept.of_index())
    numbers = _numbers(whole.clips)
    words, starts, usable = _joined(pa.concat_arrays(prints))
    # Equal samples have equal words: the first clip that has them stands for all.
    first = np.unique(numbers, return_index=True)[1]
    chosen = first[usable[first]]
    copies = match(*_chosen(words, starts, chosen))
    members = rows_by_value(numbers) if len(copies.one) else {}
    leaks: list[dict[str, Any]] = []
    harmless: list[dict[str, Any]] = []
    for one, other, shift, errors, count in zip(
        copies.one, copies.other, copies.shift, copies.errors, copies.words, strict=True
    ):
        some, others = (
            whole.clips.take(pa.array(members[numbers[chosen[which]]])).to_pylist() for which in (one, other)
        )
        across = sorted(_borders(some, others))
        pair = next(
            ((a, b) for a in some for b in others if not across or across[0] in _border(a, b)),
            (some[0], others[0]),
        )
        entry = {
            "across": across,
            "similarity": round(1 - float(errors), 3),
            "offset_s": round(float(shift) / WORDS_PER_S, 3),
            "overlap_s": round(float(count) / WORDS_PER_S, 3),
            "same_group": pair[0]["group"] is not None and pair[0]["group"] == pair[1]["group"],
            "labels_agree": sorted(pair[0]["labels"]) == sorted(pair[1]["labels"]),
            "clips": [_told(clip) for clip in pair],
        }
        (leaks if across else harmless).append(entry)
    unusable = np.flatnonzero(~usable & ~whole.clips["silent"].to_numpy(zero_copy_only=False))
    return {
        "fingerprinted": int(usable.sum()),
        "reused": reused,
        "not_fingerprinted": [_told(clip) for clip in whole.clips.take(pa.array(unusable)).to_pylist()],
        "crowded_keys": copies.crowded,
        "leaks": leaks,
        "harmless": harmless,
    }


def _joined(prints: pa.LargeBinaryArray) -> tuple[NDArray[np.uint16], NDArray[np.int64], NDArray[np.bool_]]:
    """All words, where each clip's begin (one more at the end), and which clips have enough to be compared."""
    _, offsets, data = prints.buffers()
    starts = np.frombuffer(offsets, np.int64)[prints.offset : prints.offset + len(prints) + 1] // 2
    words = np.frombuffer(data or b"", "<u2")
    usable = np.zeros(len(prints), bool)
    for at in range(0, len(prints), _CLIPS_AT_ONCE):
        begins = starts[at : at + _CLIPS_AT_ONCE + 1]
        told = np.concatenate([[0], np.cumsum(words[begins[0] : begins[-1]] != 0)])
        usable[at : at + _CLIPS_AT_ONCE] = np.diff(told[begins - begins[0]]) >= LEAST_WORDS
    return words, starts, usable


def _chosen(
    words: NDArray[np.uint16], starts: NDArray[np.int64], rows: NDArray[np.int64]
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The words of the clips in `rows` (ascending), one after the other, and where each begins."""
    lengths = np.diff(starts)
    wanted = np.zeros(len(lengths), bool)
    wanted[rows] = True
    begins = np.concatenate([[0], np.cumsum(lengths[rows])])
    return words[starts[0] : starts[-1]][np.repeat(wanted, lengths)], begins


class _Kept:
    """The fingerprints of a folder's shards: those kept in it, and those that are made now."""

    def __init__(self, part: Shards, say: Say) -> None:
        self._part, self._say = part, say
        self._path = part.folder / KEPT
        entries = {entry["shard"]: entry for entry in part.info["shards"]}
        kept = self._read()
        rows = rows_by_value(kept["sha256"].to_numpy())
        # Of every shard of the folder, so that none is lost where only some are asked for.
        self._tables = {
            name: kept.take(pa.array(rows[entry["sha256"]])).sort_by("row")
            for name, entry in entries.items()
            if len(rows.get(entry["sha256"], ())) == entry["written"] > 0
        }
        self._sha256 = {name: entry["sha256"] for name, entry in entries.items()}
        self._rows = rows_by_value(part.index["shard"].to_numpy())
        self.clips = sum(len(rows) for name, rows in self._rows.items() if name in self._tables)

    def _read(self) -> pa.Table:
        try:
            kept = (
                tables.read_table(self._path, KEPT_SCHEMA)
                if self._path.exists()
                else KEPT_SCHEMA.empty_table()
            )
        except TableError as error:
            self._say(f"{error}; its fingerprints are made anew")
            kept = KEPT_SCHEMA.empty_table()
        return kept.filter(pc.equal(kept["version"], VERSION))

    def make(self, jobs: int) -> Iterator[int]:
        """Fingerprint the shards that have none kept; yields the clips of each, and keeps all at the end."""
        missing = [name for name in self._rows if name not in self._tables]
        units = [self._part.take(self._rows[name]).light() for name in missing]
        try:
            for place, words in run_units(_fingerprint_shard, units, jobs):
                name = missing[place]
                self._tables[name] = pa.table(
                    {
                        "sha256": [self._sha256[name]] * len(words),
                        "row": pa.array(range(len(words)), pa.int32()),
                        "version": pa.array([VERSION] * len(words), pa.int32()),
                        "words": words,
                    },
                    schema=KEPT_SCHEMA,
                )
                yield len(words)
        finally:
            if any(name in self._tables for name in missing):
                self._write()

    def _write(self) -> None:
        try:
            tables.write_table(
                self._path, pa.concat_tables(self._tables[name] for name in sorted(self._tables))
            )
        except OSError as error:
            self._say(
                f"{self._path}: cannot be written ({error.strerror or error}); the fingerprints are not kept, "
                "and the next run makes them anew"
            )

    def of_index(self) -> pa.LargeBinaryArray:
        """The words of each clip, in the index's order."""
        parts, places = [pa.array([], pa.large_binary())], [np.zeros(0, np.int64)]
        for name, rows in self._rows.items():
            words = self._tables[name]["words"].take(self._part.index["row"].take(pa.array(rows)))
            parts.append(words.combine_chunks())
            places.append(rows)
        return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(places))))


def _fingerprint_shard(part: Shards) -> list[bytes]:
    """The words of one shard's clips, by their row in it."""
    order = np.argsort(part.index["row"].to_numpy())
    ends = np.ceil(part.index["duration_s"].to_numpy() * part.sample_rate).astype(np.int64)
    try:
        return [
            fingerprint(part.read(row)[: ends[row]], part.sample_rate).astype("<u2").tobytes()
            for row in order
        ]
    finally:
        part.close()
