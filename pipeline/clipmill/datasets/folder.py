"""Any folder of sound files, labelled by its subfolders or by a CSV.

Without a CSV, `dog/a.wav` has the label dog, and `train/dog/a.wav` (where every file
stands under a split's name) the split train too. A file in no subfolder has no label.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill import tables
from clipmill.datasets import Prepared, option
from clipmill.datasets.keys import keys_for
from clipmill.datasets.labels import SPLIT_NAMES, Columns, Row, read_labels
from clipmill.errors import ConfigError, FetchError
from clipmill.types import NO_SPLIT, Failure

SOUND_SUFFIXES = frozenset({
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf", ".flac", ".m4a", ".mka",
    ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".mpc", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".spx", ".tta", ".w64",
    ".wav", ".wave", ".webm", ".wma", ".wv",
})  # fmt: skip
"""Files so named are clips whatever their bytes; others too, unless their bytes are plain text."""


@dataclass(frozen=True)
class Folder:
    """Any folder of sound files, labelled by subfolder names or by a CSV."""

    name: str = option(help="Name for the dataset.")
    from_dir: Path = option(flag="--from", help="The folder; media stay where they are.")
    labels: Path | None = option(
        None, help="CSV or TSV of labels; without it, subfolder names are the labels."
    )
    file_column: str = option("filename", help="Column of file names, relative to --from.")
    label_column: str | None = option(None, help="Column of labels.  [default: label, where there is one]")
    label_separator: str | None = option(None, help="Character between several labels in one cell.")
    fold_column: str | None = option(None, help="Column of cross-validation folds (whole numbers).")
    group_column: str | None = option(None, help="Column of what must not straddle folds.")
    split_column: str | None = option(
        None, help="Column of splits: train, valid or eval (test, val, ... work too)."
    )
    start_column: str | None = option(None, help="Column of where the clip starts in the file, in seconds.")
    end_column: str | None = option(None, help="Column of where the clip ends in the file, in seconds.")

    def prepare(self, dest: Path) -> Prepared:
        """List the folder's clips; see `Dataset`."""
        root = self.from_dir.resolve()
        if not root.is_dir():
            raise FetchError(f"{self.from_dir}: is no folder")
        found, failures = scan(root, but=dest.resolve())
        if self.labels is None:
            return self._by_subfolder(root, found, failures)
        rows = read_labels(self.labels, self._columns())
        return by_labels(root, found, rows)

    def _columns(self) -> Columns:
        assert self.labels is not None
        label = self.label_column
        if label is None:
            with open(self.labels, encoding="utf-8-sig", errors="replace") as file:
                label = "label" if "label" in file.readline().replace("\t", ",").strip().split(",") else None
            if label is None:
                raise ConfigError(
                    f"{self.labels}: has no column 'label'; name the one of labels by --label-column"
                )
        return Columns(
            self.file_column, label, self.fold_column, self.group_column, self.split_column,
            self.start_column, self.end_column, self.label_separator,
        )  # fmt: skip

    def _by_subfolder(self, root: Path, found: list[str], failures: list[Failure]) -> Prepared:
        given = [
            name for name in ("label", "fold", "group", "split", "start", "end") if getattr(self, f"{name}_column")
        ]  # fmt: skip
        if given:
            raise ConfigError(f"--{given[0]}-column needs --labels CSV")
        sources = []
        for source in found:
            if Path(source).suffix.lower() not in SOUND_SUFFIXES and is_text(root / source):
                failures.append(Failure("", source, "fetch", "skipped", "not-audio", "is plain text"))
            else:
                sources.append(source)
        if not sources:
            raise FetchError(f"{self.from_dir}: holds no sound files")
        folders = [source.split("/")[:-1] for source in sources]
        columns: dict[str, Any] = {"key": keys_for(sources), "source": sources}
        if all(len(parts) > 1 and parts[0].lower() in SPLIT_NAMES for parts in folders):
            columns["split"] = [SPLIT_NAMES[parts[0].lower()] for parts in folders]
            folders = [parts[1:] for parts in folders]
        columns["labels"] = [parts[:1] for parts in folders]
        return Prepared(tables.manifest_table(columns), root, failures)


def by_labels(root: Path, found: list[str], rows: list[Row]) -> Prepared:
    """The clips that a labels file names; a file that is not there becomes a failure.

    A name is looked for under `root` as it stands, and else by its last part, where
    just one file has it (ESC-50's table names `1-1.wav`, the file is `audio/1-1.wav`).
    """
    present = set(found)
    by_name = defaultdict(list)
    for source in found:
        by_name[source.rpartition("/")[2]].append(source)
    columns: dict[str, list[Any]] = defaultdict(list)
    lost: list[tuple[int, str, str]] = []
    for place, row in enumerate(rows):
        source = os.path.normpath(row.file.replace("\\", "/"))
        if source not in present and not (os.path.isabs(source) and os.path.isfile(source)):
            others = by_name[source.rpartition("/")[2]]
            if len(others) == 1:
                source = others[0]
            elif others:
                where = ", ".join(others[:3])
                lost.append(
                    (
                        place,
                        "ambiguous",
                        f"line {row.line} of the labels; stands in {len(others)} places: {where}",
                    )
                )
            else:
                lost.append(
                    (place, "missing", f"line {row.line} of the labels names it, but there is no such file")
                )
        columns["source"].append(source)
        columns["labels"].append(list(row.labels))
        columns["split"].append(row.split or NO_SPLIT)
        for name in ("start_s", "end_s", "fold", "group"):
            columns[name].append(getattr(row, name))
    # The key comes from the name that the labels use, which is the one their users know.
    columns["key"] = keys_for([row.file for row in rows], columns["start_s"])
    failures = [
        Failure(columns["key"][place], columns["source"][place], "fetch", "failed", reason, message)
        for place, reason, message in lost
    ]
    if len(failures) == len(rows):
        raise FetchError(
            f"{root}: holds none of the {len(rows)} files that the labels name, such as {rows[0].file!r}; "
            "check --from and --file-column"
        )
    return Prepared(tables.manifest_table(dict(columns)), root, failures)


def scan(root: Path, but: Path | None = None) -> tuple[list[str], list[Failure]]:
    """Every file under `root`, as sorted paths relative to it, hidden ones aside; and those no table can hold.

    Links to folders are followed, each folder once.
    """
    found, failures = [], []
    for path in _walk(root, but, set()):
        source = path.relative_to(root).as_posix()
        try:
            source.encode()
            found.append(source)
        except UnicodeEncodeError:
            shown = os.fsencode(source).decode(errors="backslashreplace")
            failures.append(Failure("", shown, "fetch", "skipped", "bad-name", "rename it to have it read"))
    return sorted(found), failures


def _walk(folder: Path, but: Path | None, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if folder.resolve() == but or (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(folder / entry.name, but, seen)
            elif entry.is_file() or entry.is_symlink():
                yield folder / entry.name


def is_text(path: Path) -> bool:
    """Whether a file begins as UTF-8 text without control characters (an empty file does not count)."""
    try:
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
