"""AudioSet's labels: ids such as /m/09x0r, and the names that people know them by.

`class_labels_indices.csv` has `index,mid,display_name`; `mid_to_display_name.tsv`, of the strong labels, has
`mid  display_name`.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipmill.datasets.lines import lines_of
from clipmill.errors import ConfigError, TableError


@dataclass(frozen=True)
class LabelTable:
    """The label ids and the name that each goes by."""

    path: Path
    names: dict[str, str]

    def ranks(self) -> tuple[list[str], NDArray[np.int32]]:
        """The names, sorted, and for each id (in the table's order) the place of its name among them."""
        ordered = sorted(set(self.names.values()))
        place = {name: rank for rank, name in enumerate(ordered)}
        return ordered, np.array([place[name] for name in self.names.values()], dtype=np.int32)


def read_label_table(path: Path) -> LabelTable:
    """Read the table of label ids and names.

    Raises:
        TableError: it cannot be read, or is no such table.
    """
    lines = lines_of(path).to_pylist()
    tabs = "\t" in lines[0]
    rows = list(csv.reader(lines, delimiter="\t" if tabs else ","))
    found = [row[-2:] for row in rows if len(row) == 3 - tabs and row[-2].startswith("/")]
    if not found or len([row for row in rows if row]) - len(found) > 1:  # one row may be the header
        raise TableError(
            f"{path}: is no table of labels: {len(found)} of its {len(rows)} rows have a label id; "
            "expected rows index,mid,display_name as in class_labels_indices.csv, or mid and name "
            "with a tab between as in mid_to_display_name.tsv (--label-table)"
        )
    return LabelTable(path, {mid.strip(): name.strip() for mid, name in found})


def matching(texts: Iterable[str], table: LabelTable) -> list[str]:
    """The label names that texts such as 'Dog,Male speech, man speaking,/m/09x0r' stand for.

    Names hold commas themselves, so the longest name that matches is taken each time. Upper and lower
    case are the same.

    Raises:
        ConfigError: a name or id is not in the table; the closest ones are named.
    """
    known = {_plain(word): name for mid, name in table.names.items() for word in (mid, name)}
    found = []
    for text in texts:
        pieces = [piece for piece in text.split(",") if piece.strip()]
        while pieces:
            for count in range(len(pieces), 0, -1):
                name = known.get(_plain(",".join(pieces[:count])))
                if name is not None:
                    found.append(name)
                    del pieces[:count]
                    break
            else:
                near = difflib.get_close_matches(_plain(pieces[0]), known, n=3, cutoff=0.5)
                closest = (
                    f"the closest: {'; '.join(dict.fromkeys(known[word] for word in near))}; " if near else ""
                )
                raise ConfigError(
                    f"unknown label {pieces[0].strip()!r}; {closest}all are in {table.path} "
                    "(--labels and --exclude-labels take names and ids)"
                )
    return list(dict.fromkeys(found))


def _plain(text: str) -> str:
    return ",".join(" ".join(part.split()) for part in text.casefold().split(","))
