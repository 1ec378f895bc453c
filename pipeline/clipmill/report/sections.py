"""What the pages of a run and of several runs share: figures, confusions and classes as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clipmill.report.markup import Html, Section, cell, figure_cell, section, table, tag
from clipmill.train.metrics import confusions

FIGURES = {
    "accuracy": "accuracy",
    "map": "mAP",
    "auc": "AUC",
    "d_prime": "d′",  # noqa: RUF001 - a prime
    "f1": "macro F1",
    "ece": "calibration error",
    "loss": "loss",
}
"""The figures of an evaluation, as they are called on a page."""

LARGEST_MATRIX = 50
"""Classes of which a confusion matrix can still be read."""

PAIRS = 20
"""Pairs of classes in the list of what is confused most."""


def figure_tiles(figures: dict[str, Any], main: str, deviation: dict[str, Any] | None = None) -> Html:
    """The figures that exist, large, the one that decides first; with `deviation` as mean ± deviation."""
    tiles = []
    for name in sorted(FIGURES, key=lambda name: name != main):
        if figures.get(name) is not None:
            spread = "" if deviation is None or deviation.get(name) is None else f" ± {deviation[name]:.3f}"
            value = tag("b", f"{figures[name]:.3f}", tag("small", spread) if spread else "")
            tiles.append(
                tag("div", value, tag("span", FIGURES[name]), class_="tile main" if name == main else "tile")
            )
    return tag("div", *tiles, class_="tiles")


def figures_table(columns: Sequence[tuple[str, dict[str, Any] | None]]) -> Html:
    """The figures of several evaluations side by side, each under its title; None has none."""
    names = [name for name in FIGURES if any(_number(figures, name) is not None for _, figures in columns)]
    rows = [
        (FIGURES[name], *(figure_cell(_number(figures, name)) for _, figures in columns)) for name in names
    ]
    clips = [(figures or {}).get("clips") for _, figures in columns]
    if any(clips):
        rows.append(("clips", *map(cell, clips)))
    return table(("figure", *(title for title, _ in columns)), rows)


def confusion_matrix(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """Clips by true class (rows) and class heard (columns), dark where it is most of the row's clips."""
    found = np.asarray(counts)
    if len(labels) > LARGEST_MATRIX:
        return tag(
            "p",
            f"{len(labels)} classes are too many for a matrix that can be read ({LARGEST_MATRIX} at most): "
            "evaluation.json has it, as confusion.",
        )
    heads = [tag("th", tag("span", label), scope="col") for label in labels]
    lines = [tag("tr", tag("th", "true \\ heard as", scope="col"), *heads)]
    body = []
    for t, label in enumerate(labels):
        total = max(int(found[t].sum()), 1)
        cells = [
            _matrix_cell(label, heard, int(found[t, p]), total, right=t == p)
            for p, heard in enumerate(labels)
        ]
        body.append(tag("tr", tag("th", label, scope="row", class_="text"), *cells))
    size = "matrix" if len(labels) <= 12 else "matrix many"
    return tag(
        "div", tag("table", tag("thead", *lines), tag("tbody", *body), class_=size), class_="scroll whole"
    )


def confusion_section(labels: Sequence[str], counts: Sequence[Sequence[int]], hint: str = "") -> Section:
    """The matrix, and beside it the commonest mistakes; `hint` stands before what explains the matrix."""
    pairs = tag("div", tag("h3", "Most confused"), _confused_pairs(labels, counts))
    told = (
        "Rows: what a clip is. Columns: what it was heard as. Blue is right, red is not; the stronger, the more "
        "of its row."
    )
    return section(
        "Confusions",
        tag("div", tag("div", confusion_matrix(labels, counts)), pairs, class_="pair"),
        hint=f"{hint} {told}".strip(),
    )


def class_table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> Html:
    """A line for each class, the lowest average precision first, classes without one last.

    Args:
        rows: of `per_class`, or means of them.
        columns: of the table after label and clips: the field, and what stands over it.
    """
    ordered = sorted(rows, key=lambda row: (row["ap"] is None, row["ap"] or 0.0, row["label"]))
    lines = [
        (
            cell(row["label"], key=row["label"]),
            cell(row["clips"], key=row["clips"]),
            *(figure_cell(row[name], bar=name == "ap") for name, _ in columns),
        )
        for row in ordered
    ]
    return table(("class", "clips", *(title for _, title in columns)), lines, sortable=True)


def _matrix_cell(label: str, heard: str, count: int, total: int, *, right: bool) -> Html:
    if not count:
        return Html("<td></td>")
    share = count / total
    kind = ("right" if right else "miss") + (" full" if share > 0.7 else "")
    told = f"{label} heard as {heard}: {count} of {total}"
    return tag("td", count, class_=kind, style=f"--v:{0.12 + 0.83 * share:.2f}", title=told)


def _number(figures: dict[str, Any] | None, name: str) -> float | None:
    return None if figures is None else figures.get(name)


def _confused_pairs(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """The commonest mistakes, with the share of the true class's clips that they are."""
    totals = dict(zip(labels, np.asarray(counts).sum(1).tolist(), strict=True))
    rows = [
        (
            pair["label"],
            pair["predicted"],
            cell(pair["clips"]),
            cell(f"{pair['clips'] / totals[pair['label']]:.0%}", part=pair["clips"] / totals[pair["label"]]),
        )
        for pair in confusions({"confusion": counts}, list(labels), PAIRS)
    ]
    if not rows:
        return tag("p", "No clip is heard as another class.")
    return table(("true class", "heard as", "clips", "of its clips"), rows, texts=2)
