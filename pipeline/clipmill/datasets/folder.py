"""Any folder of sound files, labelled by its subfolders or by a CSV.

Without a CSV, `dog/a.wav` has the label dog, and `train/dog/a.wav` (where every file
stands under a split's name) the split train too. A file in no subfolder has no label.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from clipmill import tables
from clipmill.datasets import Prepared, option
from clipmill.datasets.folds import check_groups
from clipmill.datasets.keys import keys_for
from clipmill.datasets.labels import Columns, Row, read_labels
from clipmill.errors import ConfigError, FetchError, TableError
from clipmill.types import NO_SPLIT, SOUND_SUFFIXES, SPLIT_NAMES, Failure


@dataclass(frozen=True)
class Folder:
    """Any folder of sound files, labelled by subfolder names or by a CSV."""

    name: str = option(help="Name for the dataset.")
    from_dir: Path = option(flag="--from", help="The folder; media stay where they are.")
    labels: Path | None = option(
        None, help="CSV or TSV of labels; without it, subfolder names are the labels."
    )
    file_column: str = option("filename", help="Column of file names, relative to --from.")
    label_column: str = option("label", help="Column of labels.")
    label_separator: str | None = option(None, help="Character between several labels in one cell.")
    fold_column: str | None = option(None, help="Column of cross-validation folds (whole numbers).")
    group_column: str | None = option(None, help="Column of what must not straddle folds.")
    split_column: str | None = option(
        None, help="Column of splits: train, valid or eval (test, val, ... work too)."
    )
    start_column: str | None = option(None, help="Column of where the clip starts in the file, in seconds.")
    end_column: str | None = option(None, help="Column of where the clip ends in the file, in seconds.")
    allow_leak: bool = option(False, help="Let a group stand in several folds or splits.")
    title: str | None = option(
        None, help="For the dataset card: what the collection is called.  [default: --name]"
    )
    description: str | None = option(None, help="For the dataset card: what it is.")
    licence: str | None = option(None, help='For the dataset card: its licence, such as "CC BY 4.0".')
    licence_url: str | None = option(None, help="For the dataset card: where the licence stands.")
    citation: str | None = option(None, help="For the dataset card: what to cite, in BibTeX.")
    homepage: str | None = option(None, help="For the dataset card: where the collection is found.")

    def about(self) -> dict[str, str]:
        """What the shards' dataset card and metadata say of the collection."""
        said = {
            "title": self.title or self.name,
            "description": self.description,
            "licence": self.licence,
            "licence_url": self.licence_url,
            "citation": self.citation,
            "homepage": self.homepage,
        }
        return {name: text or "" for name, text in said.items()}

    def prepare(self, dest: Path) -> Prepared:
        """List the folder's clips; see `Dataset`."""
        root = self.from_dir.resolve()
        if not root.is_dir():
            raise FetchError(f"{self.from_dir}: is no folder")
        if root == dest.resolve():
            raise ConfigError(
                f"--from {self.from_dir}: is the folder that the dataset is written to; choose another --name"
            )
        found, failures = scan(root, but=dest.resolve())
        if self.labels is None:
            return self._by_subfolder(root, found, failures)
        columns = Columns(
            self.file_column, self.label_column, self.fold_column, self.group_column, self.split_column,
            self.start_column, self.end_column, self.label_separator,
        )  # fmt: skip
        prepared = by_labels(root, found, read_labels(self.labels, columns))
        if not self.allow_leak:
            check_groups(prepared.manifest)
        return prepared

    def _by_subfolder(self, root: Path, found: list[str], failures: list[Failure]) -> Prepared:
        for name in ("fold", "group", "split", "start", "end"):
            if getattr(self, f"{name}_column"):
                raise ConfigError(f"--{name}-column needs --labels CSV")
        sources = []
        for source in found:
            if not _named_as_sound(source) and is_text(root / source):
                failures.append(Failure("", source, "fetch", "skipped", "not-audio", "is plain text"))
            else:
                sources.append(source)
        if not sources:
            raise FetchError(f"{self.from_dir}: holds no sound files")
        folders = [source.split("/")[:-1] for source in sources]
        columns: dict[str, Any] = {
            "key": keys_for([(source, None, None) for source in sources]),
            "source": sources,
        }
        sounds = [parts for parts, s in zip(folders, sources, strict=True) if _named_as_sound(s)]
        if sounds and all(len(parts) > 1 and parts[0].lower() in SPLIT_NAMES for parts in sounds):
            columns["split"] = [
                SPLIT_NAMES.get(parts[0].lower() if parts else "", NO_SPLIT) for parts in folders
            ]
            folders = [parts[1:] for parts in folders]
        columns["labels"] = [parts[:1] for parts in folders]
        return Prepared(tables.manifest_table(columns), root, failures)


def by_labels(root: Path, found: list[str], rows: list[Row]) -> Prepared:
    """The clips that a labels file names; a file that is not there becomes a failure.

    A bare name that is not in `root` itself is looked for in the folders below, where just
    one may have it (ESC-50's table names `1-1.wav`, the file is `audio/1-1.wav`). Rows of
    the same file and stretch are one clip with all their labels.

    Raises:
        FetchError: none of the files is there.
        TableError: rows of one clip disagree on fold, group or split.
    """
    if not rows:
        raise TableError(f"{root}: the labels name no clips of the kind wanted")
    present = set(found)
    by_name = defaultdict(list)
    for source in found:
        by_name[source.rpartition("/")[2]].append(source)
    clips: dict[tuple[str, float | None, float | None], Row] = {}
    lost: dict[tuple[str, float | None, float | None], tuple[str, str]] = {}
    for row in rows:
        source, reason, message = _found(root, row.file, present, by_name)
        place = (source, row.start_s, row.end_s)
        first = clips.setdefault(place, row)
        if (row.fold, row.group, row.split) != (first.fold, first.group, first.split):
            raise TableError(
                f"line {row.line} of the labels: {row.file!r} stands in line {first.line} too, "
                "with another fold, group or split"
            )
        clips[place] = replace(first, labels=tuple(sorted({*first.labels, *row.labels})))
        if reason:
            lost[place] = reason, f"line {first.line} of the labels{message}"
    if len(lost) == len(clips):
        raise FetchError(
            f"{root}: holds none of the {len(clips)} files that the labels name, such as {rows[0].file!r}; "
            "check --from and the column of file names"
        )
    # The key comes from the name that the labels use, which is the one their users know.
    keys = keys_for([(row.file, row.start_s, row.end_s) for row in clips.values()])
    columns: dict[str, Any] = {"key": keys, "source": [source for source, _, _ in clips]}
    columns["labels"] = [list(row.labels) for row in clips.values()]
    columns["split"] = [row.split or NO_SPLIT for row in clips.values()]
    for name in ("start_s", "end_s", "fold", "group"):
        columns[name] = [getattr(row, name) for row in clips.values()]
    key_of = dict(zip(clips, keys, strict=True))
    failures = [
        Failure(key_of[place], place[0], "fetch", "failed", reason, message)
        for place, (reason, message) in lost.items()
    ]
    return Prepared(tables.manifest_table(columns), root, failures)


def _found(root: Path, name: str, present: set[str], by_name: dict[str, list[str]]) -> tuple[str, str, str]:
    """A file that the labels name, as a source; and, where it cannot be had, the reason and a message."""
    path = os.path.normpath(os.path.join(root, name.replace("\\", "/")))
    source = os.path.relpath(path, root) if Path(path).is_relative_to(root) else path
    if source in present or (os.path.isabs(source) and os.path.isfile(source)):
        return source, "", ""
    others = by_name.get(source, []) if "/" not in source else []
    if len(others) == 1:
        return others[0], "", ""
    if others:
        return source, "ambiguous", f"; stands in {len(others)} places: {', '.join(others[:3])}"
    return source, "missing", " names it, but there is no such file"


def scan(root: Path, but: Path | None = None) -> tuple[list[str], list[Failure]]:
    """Every file under `root`, as sorted paths relative to it; and those whose name no table can hold.

    Hidden files are passed over, and folders that clipmill fetched datasets into. Links to
    folders are followed, each folder once.
    """
    found, failures = [], []

    def ours(folder: str) -> bool:
        return Path(folder).resolve() == but or os.path.isfile(os.path.join(folder, "fetch.json"))

    for one in walk(str(root), ours):
        if one.entry is None:
            raise one.error or OSError(f"{one.path}: cannot be read")
        if not (one.entry.is_symlink() or one.entry.is_file(follow_symlinks=False)):
            continue
        source = Path(one.path).relative_to(root).as_posix()
        try:
            source.encode()
            found.append(source)
        except UnicodeEncodeError:
            shown = os.fsencode(source).decode(errors="backslashreplace")
            failures.append(Failure("", shown, "fetch", "skipped", "bad-name", "rename it to have it read"))
    return sorted(found), failures


class Found(NamedTuple):
    """What `walk` comes to.

    Attributes:
        path: of a file, or of a folder that cannot be read.
        entry: None where it is such a folder.
        error: why the folder cannot be read, or why nobody knows what the entry is: a link in a circle, say.
    """

    path: str
    entry: os.DirEntry[str] | None
    error: OSError | None = None


def walk(
    folder: str,
    passed: Callable[[str], bool] = lambda folder: False,
    seen: set[tuple[int, int]] | None = None,
) -> Iterator[Found]:
    """All that is no folder, at any depth below `folder`, by name; and folders that cannot be read.

    Hidden files are passed over, and folders of which `passed` is true. Links to folders are followed, each
    folder once; `seen` holds those that were.
    """
    seen = set() if seen is None else seen
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen or passed(folder):
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        yield Found(folder, None, error)
        return
    for entry in entries:
        try:
            is_folder = entry.is_dir()
        except OSError as error:
            yield Found(entry.path, entry, error)
            continue
        if is_folder:
            yield from walk(entry.path, passed, seen)
        else:
            yield Found(entry.path, entry)


def _named_as_sound(source: str) -> bool:
    return Path(source).suffix.lower() in SOUND_SUFFIXES


def is_text(path: Path) -> bool:
    """Whether a file begins as UTF-8 text without control characters (an empty file does not count)."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            return False
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or not error.start:  # not merely a character cut in two
            return False
        text = head[: error.start].decode()
    return bool(text) and all(c.isprintable() or c in "\t\r\n\f" for c in text)
