"""AudioSet's lists, read column by column: two million rows, and a Python object for the bad ones alone.

segments   `YTID, start_seconds, end_seconds, "label ids"` under a header of `#` lines (CSV)
events     `YTID_startms  start_seconds  end_seconds  label id` (TSV, the strong labels)

Lists that people have had open in a spreadsheet, cut or joined are common. What can be read without a
guess is read (CRLF, a BOM, blanks, quotes that went where they were not needed); all else is a bad row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill.datasets.bad_rows import (
    EVENT,
    LONGEST_CLIP_S,
    LONGEST_S,
    SEGMENT,
    YTID,
    BadRow,
    bad_event,
    bad_segment,
)
from clipmill.datasets.label_table import LabelTable
from clipmill.datasets.lines import lines_of
from clipmill.errors import TableError

SHOWN = 3
"""How many bad rows an error message spells out."""

_NUMBER = r"\d{1,9}(?:\.\d{1,9})?"
_SEGMENT = rf'^(?P<ytid>{YTID}), ?(?P<start>{_NUMBER}), ?(?P<end>{_NUMBER}), ?(?P<labels>"[^"]*"|/[^",]*)\s*$'
_EVENT = (
    rf"^(?P<ytid>{YTID})_(?P<ms>\d{{1,8}})\t(?P<start>{_NUMBER})\t(?P<end>{_NUMBER})\t(?P<labels>/\S+)\s*$"
)
_NO_ROW = r'^\s*$|^"?#(\s|"?$)|^"?YTID"?,|^segment_id\t'


@dataclass(frozen=True)
class Rows:
    """The good rows of a list as columns, and the bad ones that were passed over.

    `table` has key (`YTID_startms`), ytid, start_s, end_s, labels (names, sorted) and line; for strong
    labels, one row a clip with its events, and no end_s.
    """

    path: Path
    table: pa.Table
    bad: list[BadRow]


def read_segments(path: Path, labels: LabelTable | None, skip_bad_rows: bool = False) -> Rows:
    """Read a list of segments; without `labels`, the label ids are not looked at, and labels are empty.

    Raises:
        TableError: it cannot be read, is no such list, or has bad rows (and `skip_bad_rows` is false).
    """
    rows, stated = _rows(path)
    fields = pc.extract_regex(rows["text"], _SEGMENT)
    start_s, end_s = _seconds(fields, "start"), _seconds(fields, "end")
    good = _true(pc.and_(pc.less(start_s, end_s), pc.less_equal(end_s, LONGEST_S)))
    good &= _true(pc.less_equal(pc.subtract(end_s, start_s), LONGEST_CLIP_S))
    row_of, codes = _label_codes(pc.struct_field(fields, "labels"), labels)
    good[row_of[codes < 0]] = False
    bad = [_half_a_file(stated, rows)] if rows.num_rows < stated else []
    bad += _bad(
        path, rows, good, lambda text, last: bad_segment(text, labels, last), SEGMENT, skip_bad_rows, bad
    )
    table = pa.table(
        {
            "key": _keys(fields, pc.cast(pc.round(pc.multiply(start_s, 1000)), pa.int64())),
            "ytid": pc.struct_field(fields, "ytid"),
            "start_s": start_s,
            "end_s": end_s,
            "line": rows["line"],
        }
    )
    del rows, fields  # a quarter of a gigabyte, for the whole of AudioSet
    if not good.all():
        table = table.filter(pa.array(good))
        kept = good[row_of]
        row_of, codes = (np.cumsum(good) - 1)[row_of[kept]], codes[kept]
    return Rows(path, table.append_column("labels", _names(row_of, codes, len(table), labels)), bad)


def read_events(path: Path, labels: LabelTable, skip_bad_rows: bool = False) -> Rows:
    """Read a list of strong labels: one row for each clip, with its events in order of time.

    Raises:
        TableError: it cannot be read, is no such list, or has bad rows (and `skip_bad_rows` is false).
    """
    rows, _ = _rows(path)
    fields = pc.extract_regex(rows["text"], _EVENT)
    start_s, end_s = _seconds(fields, "start"), _seconds(fields, "end")
    good = _true(pc.and_(pc.less_equal(start_s, end_s), pc.less_equal(end_s, LONGEST_S)))
    row_of, codes = _label_codes(pc.struct_field(fields, "labels"), labels)
    good[row_of[codes < 0]] = False
    bad = _bad(path, rows, good, lambda text, last: bad_event(text, labels, last), EVENT, skip_bad_rows, [])
    ordered, ranks = labels.ranks()
    rank = ranks[codes[good[row_of]]]  # a row holds one label, so these are as many as the good rows
    milliseconds = pc.cast(pc.struct_field(fields, "ms"), pa.int64())
    table = pa.table(
        {
            "key": _keys(fields, milliseconds),
            "ytid": pc.struct_field(fields, "ytid"),
            "clip_s": pc.divide(pc.cast(milliseconds, pa.float64()), 1000),
            "start_s": start_s,
            "end_s": end_s,
            "line": rows["line"],
        }
    ).filter(pa.array(good)).combine_chunks()  # fmt: skip
    return Rows(path, _by_clip(table, rank, ordered), bad)


def _by_clip(table: pa.Table, rank: NDArray[np.integer], names: list[str]) -> pa.Table:
    """One row a clip from one row an event; `rank` is the place of each event's label in `names`."""
    clips = table["key"].combine_chunks().dictionary_encode()
    clip = clips.indices.to_numpy().astype(np.int64)
    starts, ends = table["start_s"].to_numpy(), table["end_s"].to_numpy()
    order = np.lexsort((rank, ends, starts, clip))
    offsets = np.concatenate(([0], np.cumsum(np.bincount(clip, minlength=len(clips.dictionary)))))
    events = pa.StructArray.from_arrays(
        [pa.array(names).take(pa.array(rank[order])), pa.array(starts[order]), pa.array(ends[order])],
        names=["label", "start_s", "end_s"],
    )
    _, first = np.unique(clip, return_index=True)
    heads = table.select(["key", "ytid", "line"]).take(pa.array(first))
    return (
        heads.append_column("start_s", table["clip_s"].take(pa.array(first)))
        .append_column("labels", _lists(clip, rank, len(clips.dictionary), names))
        .append_column("events", pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), events))
    )


def _rows(path: Path) -> tuple[pa.Table, int]:
    """The lines that should be rows (text and line), and how many rows the header states (0: it does not)."""
    lines = lines_of(path)
    other = pc.match_substring_regex(lines, _NO_ROW)
    numbers = pa.array(np.arange(1, len(lines) + 1, dtype=np.int32))
    rows = pa.table({"line": numbers, "text": lines}).filter(pc.invert(other))
    if not rows.num_rows:
        raise TableError(f"{path}: holds no rows, only a header; expected one of AudioSet's lists")
    counts = pc.extract_regex(lines.filter(other), r"num_segs=(?P<rows>\d{1,9})")
    return rows, pc.sum(pc.cast(pc.struct_field(counts, "rows"), pa.int64())).as_py() or 0


def _half_a_file(stated: int, rows: pa.Table) -> BadRow:
    return BadRow(
        rows["line"][-1].as_py() + 1,
        f"the list ends after {rows.num_rows} rows where its header states {stated} (num_segs): the rest is lost, or "
        "the list was cut by hand, and then its '# num_ytids=' line must go",
    )


def _bad(
    path: Path,
    rows: pa.Table,
    good: NDArray[np.bool_],
    diagnose: Callable[[str, bool], str],
    expected: str,
    skip: bool,
    before: list[BadRow],
) -> list[BadRow]:
    """What is wrong with each bad row; the first few alone, in the error, unless they are to be skipped."""
    places = np.flatnonzero(~good)
    named = rows.take(pa.array(places if skip else places[:SHOWN])).to_pylist()
    last = rows["line"][-1].as_py()
    bad = [BadRow(row["line"], diagnose(row["text"], row["line"] == last)) for row in named]
    if skip and not good.any():
        raise TableError(f"{path}: all {len(good)} rows are bad; line {bad[0].line}: {bad[0].message}")
    if not skip and (before or len(places)):
        raise malformed(path, before + bad, len(places) + len(before), len(good), expected)
    return bad


def malformed(path: Path, shown: list[BadRow], count: int, rows: int, expected: str) -> TableError:
    """The error for a list with `count` bad rows among its `rows`."""
    told = [f"line {row.line}: {row.message}" for row in shown[:SHOWN]]
    more = [f"and {count - len(told)} more"] if count > len(told) else []
    return TableError(
        "\n  ".join([f"{path}: {count} bad among {rows} rows", *told, *more])
        + f"\nexpected: {expected}\nmend the list, or go on without these rows by --skip-bad-rows"
    )


def _seconds(fields: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pc.cast(pc.struct_field(fields, name), pa.float64())


def _keys(fields: pa.ChunkedArray, milliseconds: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(
        pc.struct_field(fields, "ytid"), pc.cast(milliseconds, pa.string()), "_"
    )


def _true(mask: pa.ChunkedArray) -> NDArray[np.bool_]:
    return pc.fill_null(mask, False).to_numpy().copy()


def _label_codes(
    texts: pa.ChunkedArray, labels: LabelTable | None
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """For each label of each row: the row's number, and the label's place in the table (-1: unknown)."""
    if labels is None:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    lists = pc.split_pattern(pc.utf8_trim(texts, '" '), ",").combine_chunks()
    row_of = pc.list_parent_indices(lists).to_numpy().astype(np.int32)
    codes = pc.index_in(pc.utf8_trim_whitespace(lists.flatten()), value_set=pa.array(list(labels.names)))
    return row_of, pc.fill_null(codes, -1).to_numpy()


def _names(
    row_of: NDArray[np.integer], codes: NDArray[np.integer], rows: int, labels: LabelTable | None
) -> pa.ListArray:
    """The labels of each row by name, sorted, each once."""
    if labels is None:
        return _lists(row_of, codes, rows, [""])
    ordered, ranks = labels.ranks()
    return _lists(row_of, ranks[codes], rows, ordered)


def _lists(
    row_of: NDArray[np.integer], ranks: NDArray[np.integer], rows: int, names: list[str]
) -> pa.ListArray:
    """Lists of names from (row, rank) pairs: sorting the pairs as one number each sorts every list at once."""
    pairs = row_of.astype(np.int64) * len(names) + ranks
    pairs.sort()
    if len(pairs):
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    offsets = np.searchsorted(pairs, np.arange(rows + 1, dtype=np.int64) * len(names)).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(names).take(pa.array((pairs % len(names)).astype(np.int32)))
    )
