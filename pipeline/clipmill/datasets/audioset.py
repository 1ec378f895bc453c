"""AudioSet (Gemmeke et al., ICASSP 2017): the official lists of YouTube segments, made into a manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipmill.datasets import Prepared, Remote, option
from clipmill.datasets.bad_rows import BadRow
from clipmill.datasets.label_table import LabelTable, matching, read_label_table
from clipmill.datasets.segment_lists import (
    Rows,
    malformed,
    read_events,
    read_segments,
)
from clipmill.errors import ConfigError, TableError
from clipmill.tables import EVENTS, manifest_table
from clipmill.types import Failure
from clipmill_manifests import facts

SPLITS = ("balanced_train", "unbalanced_train", "eval")
CLIP_S = 10.0
"""Length of a clip of which a list of strong labels states the start alone, in seconds."""

WHOLE = 0.99
"""Share of its published clips under which a list of strong labels, which states no count, is half a file."""

_SEGMENTS = {f"{split}_segments.csv": split for split in SPLITS}
_STRONG = {
    "balanced_train": "audioset_train_strong.tsv",
    "unbalanced_train": "audioset_train_strong.tsv",
    "train": "audioset_train_strong.tsv",
    "eval": "audioset_eval_strong.tsv",
}


@dataclass(frozen=True)
class Audioset:
    """AudioSet: 2.08 million segments of 10 s from YouTube, 527 classes; its lists first, then each segment.

    Without `split`: balanced_train and eval, or with `strong` all three. Label filters keep
    whole clips: one that is kept keeps all its labels. `limit` takes the first of each split in
    the list's order after the filters: the lists are sorted by video id, which says nothing of
    the sound, and a larger trial then begins with the clips of the smaller.
    """

    split: tuple[str, ...] = option(
        (),
        help="A part of AudioSet; repeat for several.  [default: balanced_train and eval; all with --strong]",
        multiple=True,
        choices=SPLITS,
    )
    strong: bool = option(
        False, help="The clips with strong labels alone, their events kept as intervals.", is_flag=True
    )
    labels: tuple[str, ...] = option(
        (), help="Only clips with any of these: names or ids, by commas or repeated.", multiple=True
    )
    exclude_labels: tuple[str, ...] = option(
        (), help="No clips with any of these: names or ids, by commas or repeated.", multiple=True
    )
    limit: int | None = option(None, help="At most this many clips of each split: the first of its list.")
    lists: tuple[Path, ...] = option(
        (),
        flag="--list",
        help="A list of one's own in the official format (.csv; strong labels .tsv), in place of the official; "
        "its split is that of its official name, else --split, else train.",
        multiple=True,
    )
    label_table: Path | None = option(
        None, help="The table of label ids and names, in place of the official one."
    )
    skip_bad_rows: bool = option(
        False, help="Go on without the rows of a list that cannot be read, and count them.", is_flag=True
    )
    called: str | None = option(
        None, flag="--name", help="The dataset's name.  [default: audioset, audioset-strong]"
    )

    by_segment: ClassVar[bool] = True
    mend: ClassVar[str] = (
        "Give the lists that you have with --list FILE, and the table with --label-table FILE"
    )

    @property
    def name(self) -> str:
        """`--name`, or audioset, or audioset-strong."""
        return self.called or ("audioset-strong" if self.strong else "audioset")

    def hints(self) -> list[str]:
        """What a bare `fetch audioset` leaves out, and how to get it."""
        if self.split or self.strong or self.lists:
            return []
        rest = facts("audioset")["splits"]["unbalanced_train"]["clips"]
        return [
            f"this is balanced_train and eval; the other {rest:,} clips: --split unbalanced_train; "
            "those with strong labels: --strong"
        ]

    def for_splits(self, splits: Iterable[str]) -> Audioset:
        """The same, of the official splits among `splits` where neither a split nor a list was asked for."""
        official = tuple(split for split in SPLITS if split in set(splits))
        return self if self.split or self.lists else replace(self, split=official)

    @property
    def needs(self) -> tuple[Remote, ...]:
        """The official lists and label table that were not given.

        Raises:
            ConfigError: the options contradict each other.
        """
        files = [] if self.label_table else [self._official_table]
        files += [file for file, _ in self._wanted if isinstance(file, str)]
        if self.strong and not self._given(".tsv"):
            files += [_STRONG[split] for _, split in self._wanted]
        stated = {fact["file"]: fact for fact in facts("audioset")["files"]}
        return tuple(
            Remote(file, tuple(stated[file]["urls"]), stated[file].get("size"), stated[file].get("checksum"))
            for file in dict.fromkeys(files)
        )

    def prepare(self, dest: Path) -> Prepared:
        """List the segments wanted, from the lists given or those in `dest/downloads`. See `Dataset`."""
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: must be 1 or more")
        downloads = dest / "downloads"
        table = read_label_table(self.label_table or downloads / self._official_table)
        wanted, unwanted = matching(self.labels, table), matching(self.exclude_labels, table)
        parts, bad = self._read(downloads, table)
        clips, twice = _unique(parts, self.skip_bad_rows)
        del parts  # or the whole of AudioSet stands in memory twice
        clips = _limited(_filtered(clips, wanted, unwanted), self.limit)
        rows = clips.num_rows
        manifest = manifest_table(
            {name: clips[name] for name in ("key", "start_s", "end_s", "labels", "split", "events")}
            | {"group": clips["ytid"], "source": pa.repeat("", rows)}
        )
        failures = [
            Failure("", f"{self._said(path)}:{row.line}", "fetch", "skipped", "bad-row", row.message)
            for path, row in bad + twice
        ]
        read = {self._said(Path(file)) for file, _ in self._wanted} | set(map(self._said, self.lists))
        read |= set(_STRONG.values()) if self.strong else set()
        return Prepared(manifest, dest / "media", failures, tuple(sorted(read)))

    def _said(self, path: Path) -> str:
        """What a list is called in the account: its name, or its path where another one has that name."""
        return path.name if [given.name for given in self.lists].count(path.name) < 2 else str(path)

    @property
    def _official_table(self) -> str:
        return "mid_to_display_name.tsv" if self.strong else "class_labels_indices.csv"

    def _given(self, suffix: str) -> list[Path]:
        return [path for path in self.lists if path.suffix == suffix]

    @property
    def _wanted(self) -> list[tuple[str | Path, str]]:
        """The lists whose clips are wanted (an official name, or a path that was given), each with its split."""
        if len({path.resolve() for path in self.lists}) < len(self.lists):
            raise ConfigError("--list: the same file is given twice")
        for path in self.lists:
            if path.suffix not in (".csv", ".tsv"):
                raise ConfigError(f"--list {path}: must end in .csv (segments) or .tsv (strong labels)")
        if self._given(".tsv") and not self.strong:
            raise ConfigError(f"--list {self._given('.tsv')[0]}: a .tsv holds strong labels; add --strong")
        own = self._given(".csv") or self._given(".tsv")
        if own:
            return [(path, self._split_of(path)) for path in own]
        default = SPLITS if self.strong else ("balanced_train", "eval")
        return [(f"{split}_segments.csv", split) for split in dict.fromkeys(self.split or default)]

    def _split_of(self, path: Path) -> str:
        official = _SEGMENTS.get(path.name)
        if path.name == _STRONG["eval"]:
            official = "eval"
        if official and self.split and official not in self.split:
            raise ConfigError(
                f"--list {path}: by its name this is the official list of {official}, and --split says "
                f"{', '.join(self.split)}; rename it, or leave --split out"
            )
        if not official and len(self.split) > 1:
            raise ConfigError(f"--list {path}: of which split is it? --split says {', '.join(self.split)}")
        return official or (self.split[0] if self.split else "train")

    def _read(
        self, downloads: Path, table: LabelTable
    ) -> tuple[list[tuple[Path, pa.Table]], list[tuple[Path, BadRow]]]:
        """Every list's clips, with their split and events, and the rows that were passed over."""
        parts: list[tuple[Path, pa.Table]] = []
        bad: list[tuple[Path, BadRow]] = []
        strong: dict[Path, Rows] = {}

        def events_of(path: Path) -> Rows:
            if path not in strong:
                strong[path] = read_events(path, table, self.skip_bad_rows)
                bad.extend((path, row) for row in strong[path].bad)
                if path.parent == downloads:
                    _must_be_whole(strong[path])
            return strong[path]

        for file, split in self._wanted:
            path = file if isinstance(file, Path) else downloads / file
            if path.suffix == ".tsv":
                clips = events_of(path).table
                clips = clips.append_column("end_s", pc.add(clips["start_s"], CLIP_S))
            else:
                read = read_segments(path, None if self.strong else table, self.skip_bad_rows)
                bad += [(path, row) for row in read.bad]
                clips = read.table
                if self.strong:
                    given = self._given(".tsv") or [downloads / _STRONG[split]]
                    clips = pa.concat_tables(_with_events(clips, events_of(tsv).table) for tsv in given)
                else:
                    clips = clips.append_column("events", pa.nulls(clips.num_rows, EVENTS))
            parts.append((path, clips.append_column("split", pa.repeat(split, clips.num_rows))))
        return parts, bad


def _must_be_whole(strong: Rows) -> None:
    stated = {fact["file"]: fact.get("clips", 0) for fact in facts("audioset")["files"]}[strong.path.name]
    if strong.table.num_rows < WHOLE * stated:
        raise TableError(
            f"{strong.path}: holds {strong.table.num_rows} clips where {stated} were published: it is half a file. "
            "Delete it and fetch again, or give what you have by --list"
        )


def _with_events(clips: pa.Table, strong: pa.Table) -> pa.Table:
    """The clips that stand in a list of strong labels, with its labels and events."""
    place = pc.index_in(clips["key"], value_set=strong["key"].combine_chunks())
    found = pc.is_valid(place)
    events = strong.select(["labels", "events"]).take(place.filter(found))
    clips = clips.drop_columns("labels").filter(found)
    return clips.append_column("labels", events["labels"]).append_column("events", events["events"])


def _unique(parts: list[tuple[Path, pa.Table]], skip: bool) -> tuple[pa.Table, list[tuple[Path, BadRow]]]:
    """All clips as one table, each key once; where a key stands twice, the first stands.

    Raises:
        TableError: a key stands twice (and `skip` is false).
    """
    columns = ["key", "ytid", "start_s", "end_s", "labels", "events", "split", "line"]
    clips = pa.concat_tables(table.select(columns) for _, table in parts).combine_chunks()
    if pc.count_distinct(clips["key"]).as_py() == clips.num_rows:
        return clips, []
    codes = clips["key"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first, back = np.unique(codes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[back] != np.arange(len(codes)))
    ends = np.cumsum([table.num_rows for _, table in parts])

    def place(row: int) -> tuple[Path, int]:
        return parts[int(np.searchsorted(ends, row, side="right"))][0], clips["line"][row].as_py()

    def told(row: int) -> tuple[Path, BadRow]:
        (path, line), (other, earlier) = place(row), place(int(first[back[row]]))
        where = f"line {earlier}" if path == other else f"{other}, line {earlier}"
        return path, BadRow(line, f"{clips['key'][row].as_py()!r} stands already in {where}")

    twice = [told(int(row)) for row in (again if skip else again[:3])]
    if not skip:
        raise malformed(
            twice[0][0], [row for _, row in twice], len(again), clips.num_rows, "each segment once"
        )
    return clips.take(pa.array(np.sort(first))), twice


def _filtered(clips: pa.Table, wanted: list[str], unwanted: list[str]) -> pa.Table:
    """The clips with any of the wanted labels and none of the unwanted."""
    for names, keep in ((wanted, True), (unwanted, False)):
        if names:
            labels: Any = clips["labels"].combine_chunks()
            has = np.zeros(clips.num_rows, dtype=bool)
            hits = pc.is_in(labels.flatten(), value_set=pa.array(names))
            has[pc.list_parent_indices(labels).filter(hits).to_numpy()] = True
            clips = clips.filter(pa.array(has == keep))
    if not clips.num_rows:
        raise ConfigError(
            "no clip is left: the lists have none with the labels of --labels and without those of "
            "--exclude-labels (and, with --strong, with strong labels)"
        )
    return clips


def _limited(clips: pa.Table, limit: int | None) -> pa.Table:
    """The first `limit` clips of each split, in the order of the lists."""
    if limit is None:
        return clips
    first = partial(pc.index_in, value_set=pc.unique(clips["split"]))
    split = first(clips["split"]).to_numpy()
    kept = [np.flatnonzero(split == code)[:limit] for code in np.unique(split)]
    return clips.take(pa.array(np.sort(np.concatenate(kept))))
