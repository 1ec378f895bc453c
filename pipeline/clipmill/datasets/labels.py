"""Read a table of labels (CSV or TSV), with the user's own column names, into clips."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipmill.errors import ConfigError, TableError
from clipmill.types import SPLIT_NAMES


@dataclass(frozen=True)
class Columns:
    """The names of the columns that matter; None: there is none."""

    file: str = "filename"
    label: str | None = "label"
    fold: str | None = None
    group: str | None = None
    split: str | None = None
    start: str | None = None
    end: str | None = None
    separator: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a labels file, checked."""

    line: int
    file: str
    labels: tuple[str, ...]
    fold: int | None
    group: str | None
    split: str | None
    start_s: float | None
    end_s: float | None


def read_labels(path: Path, columns: Columns) -> list[Row]:
    """Read and check every line of a labels file.

    Raises:
        ConfigError: a column that was named is not there.
        TableError: the file is unreadable or a line is malformed; names the line, what
            was found and what is expected.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = max("\t;,", key=head.count)
            reader = csv.reader(file, delimiter=delimiter if delimiter in head else ",", strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_columns(path, names, columns)
            lines = ((reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells))
            rows = [_row(path, line, names, cells, columns) for line, cells in lines]
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TableError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    except csv.Error as error:
        raise TableError(f"{path}, line {reader.line_num}: {error}") from error
    if not rows:
        raise TableError(f"{path}: has no rows")
    return rows


def _check_columns(path: Path, names: list[str], columns: Columns) -> None:
    for field, flag in (
        ("file", "--file-column"), ("label", "--label-column"), ("fold", "--fold-column"),
        ("group", "--group-column"), ("split", "--split-column"), ("start", "--start-column"), ("end", "--end-column"),
    ):  # fmt: skip
        column = getattr(columns, field)
        if column is None:
            continue
        if column not in names:
            raise ConfigError(
                f"{path}: has no column {column!r} for {flag}; it has {', '.join(names) or 'none'}"
            )
        if names.count(column) > 1:
            raise TableError(f"{path}: has {names.count(column)} columns {column!r}; expected one for {flag}")


def _row(path: Path, line: int, names: list[str], cells: list[str], columns: Columns) -> Row:
    if len(cells) != len(names):
        found = f"{len(cells)} cells {cells[:6]}"
        raise TableError(f"{path}, line {line}: found {found}, expected {len(names)} as in the header")
    cell = {name: value.strip() for name, value in zip(names, cells, strict=True)}

    def number(column: str | None, kind: type[int] | type[float]) -> Any:
        if column is None or not cell[column]:
            return None
        try:
            value = float(cell[column])
            if not math.isfinite(value) or (kind is int and not (value == int(value) and 0 <= value < 2**31)):
                raise ValueError
        except ValueError:
            wanted = "a whole number from 0 up" if kind is int else "a number of seconds"
            raise TableError(
                f"{path}, line {line}: found {cell[column]!r} in {column!r}, expected {wanted}"
            ) from None
        return kind(value)

    start_s, end_s = number(columns.start, float), number(columns.end, float)
    if (start_s or 0) < 0 or (end_s is not None and not end_s > (start_s or 0)):
        raise TableError(
            f"{path}, line {line}: found a stretch from {start_s} to {end_s} s, expected 0 <= start < end"
        )
    split = cell[columns.split].lower() if columns.split else None
    if split and split not in SPLIT_NAMES:
        raise TableError(
            f"{path}, line {line}: found split {split!r}, expected one of {', '.join(SPLIT_NAMES)}"
        )
    if not cell[columns.file]:
        raise TableError(f"{path}, line {line}: found no file name in {columns.file!r}")
    text = cell[columns.label] if columns.label else ""
    labels = [label.strip() for label in text.split(columns.separator)] if columns.separator else [text]
    return Row(
        line=line,
        file=cell[columns.file],
        labels=tuple(sorted({label for label in labels if label})),
        fold=number(columns.fold, int),
        group=(cell[columns.group] or None) if columns.group else None,
        split=SPLIT_NAMES[split] if split else None,
        start_s=start_s,
        end_s=end_s,
    )
