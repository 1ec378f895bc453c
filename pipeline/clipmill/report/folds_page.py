"""One page on several runs, as cross-validation leaves them: how the figures spread, and what all get wrong."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from urllib.parse import quote

import numpy as np

from clipmill import tables
from clipmill.errors import TableError
from clipmill.report.clips import clip_table
from clipmill.report.markup import Section, cell, figure_cell, page, section, table, tag
from clipmill.report.run_page import EVALUATION, PAGE
from clipmill.report.sections import (
    FIGURES,
    class_table,
    confusion_section,
    figure_tiles,
    figures_table,
)
from clipmill.train.crossval import refreshed

HARDEST = 40
"""Clips in the list of the hardest ones of all runs."""

_MEANS = ("ap", "auc", "precision", "recall", "f1")


def write_folds_page(folder: Path) -> Path:
    """Write report.html into a folder of runs, from its crossval.json and the runs' evaluation.json.

    Confusions are summed over the runs and classes are averaged, as far as the runs have an evaluation.json, which
    `write_run_page` writes, of the same classes. What is missing is said on the page.

    Returns:
        Where the page is.

    Raises:
        TrainError: no crossval.json is there, or it is damaged.
    """
    told = refreshed(folder)
    evaluations = {run["run"]: _evaluation(folder / run["run"]) for run in told["runs"]}
    with tables.atomic_write(folder / PAGE, "w") as file:
        file.write(_page(folder, told, {name: found for name, found in evaluations.items() if found}))
    return folder / PAGE


def _page(folder: Path, told: dict[str, Any], evaluations: dict[str, dict[str, Any]]) -> str:
    runs, main = told["runs"], told["main_figure"]
    name = folder.resolve().name
    notes = []
    if unfinished := [run["run"] for run in runs if not run.get("done")]:
        notes.append(
            f"not finished yet: {', '.join(unfinished)}; the same `pipeline train` with --resume goes on"
        )
    if lacking := [run["run"] for run in runs if run["run"] not in evaluations]:
        notes.append(
            f"without an {EVALUATION}, and so not in the sums and means of classes below: {', '.join(lacking)}; "
            "`pipeline report` writes it for each run that has been evaluated"
        )
    parts = [_figures(told), _runs(folder, runs, main)]
    pooled = list(evaluations.values())
    classes = [[row["label"] for row in found["per_class"]] for found in pooled]
    if pooled and all(labels == classes[0] for labels in classes):
        parts += _over_runs(classes[0], pooled)
    elif pooled:
        notes.append("the runs have different classes: nothing is summed over them")
    if clips := _hardest(evaluations):
        hint = "Of all runs; the page of a run has the sound of its own."
        parts.append(section("Hardest clips", clip_table(clips), hint=hint))
    about = f"{len(runs)} runs, {sum(bool(run.get('done')) for run in runs)} of them done"
    tiles = figure_tiles(told.get("mean") or {}, main or "", told.get("deviation"))
    header = tag(
        "header", tag("h1", name), tag("p", f"{about} · mean ± deviation of the runs' best figures"), tiles
    )
    return page(f"{name}: clipmill runs", header, notes, parts)


def _figures(told: dict[str, Any]) -> Section:
    names = {
        "mean": "mean, best",
        "deviation": "deviation",
        "last_mean": "mean, last",
        "last_deviation": "deviation",
    }
    hint = (
        "Over the runs. Best: of each run's best evaluation, picked on the very clips that judge, so that it flatters. "
        "Last: of each run's last one."
    )
    return section(
        "Figures", figures_table([(title, told.get(name)) for name, title in names.items()]), hint=hint
    )


def _runs(folder: Path, runs: Sequence[dict[str, Any]], main: str | None) -> Section:
    others = [
        name for name in FIGURES if name != main and any(name in (run.get("best") or {}) for run in runs)
    ]
    title = FIGURES.get(main or "", "figure")  # before any run is evaluated none is the main one
    lines = []
    for run in runs:
        best, last = run.get("best") or {}, run.get("last") or {}
        there = (folder / run["run"] / PAGE).is_file()
        link = tag("a", run["run"], href=f"{quote(os.fsencode(run['run']))}/{PAGE}") if there else run["run"]
        lines.append((
            cell(link, key=run["run"]),
            cell(run.get("fold"), key=run.get("fold")),
            cell(run.get("seed"), key=run.get("seed")),
            cell("yes" if run.get("done") else "no"),
            cell(best.get("step"), key=best.get("step")),
            figure_cell(best.get(main or ""), bar=True),
            figure_cell(last.get(main or "")),
            *(figure_cell(best.get(name)) for name in others),
        ))  # fmt: skip
    columns = ("run", "fold", "seed", "done", "best step", f"best {title}", f"last {title}")
    heads = (*columns, *(FIGURES[name] for name in others))
    return section("Runs", table(heads, lines, sortable=True), hint="A run's name leads to its own page.")


def _over_runs(labels: list[str], pooled: list[dict[str, Any]]) -> list[Section]:
    parts = []
    if all(found["confusion"] is not None for found in pooled):
        counts = np.sum([found["confusion"] for found in pooled], axis=0).tolist()
        parts.append(confusion_section(labels, counts, f"Sum over {len(pooled)} runs."))
    rows = []
    for c, label in enumerate(labels):
        found = [evaluation["per_class"][c] for evaluation in pooled]
        row = {"label": label, "clips": sum(one["clips"] for one in found)}
        row |= {name: _mean([one[name] for one in found]) for name in _MEANS}
        rows.append(row | {"spread": _spread([one["ap"] for one in found])})
    columns = (
        ("ap", "AP"), ("spread", "its deviation"), ("auc", "AUC"), ("precision", "precision"), ("recall", "recall"),
        ("f1", "F1"),
    )  # fmt: skip
    hint = f"Means over {len(pooled)} runs, of those where a figure exists; clips are summed. The lowest AP first."
    parts.append(section("Classes", class_table(rows, columns), hint=hint))
    return parts


def _hardest(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    clips = [
        {**clip, "run": name} for name, found in evaluations.items() for clip in found.get("hardest", [])
    ]
    return sorted(clips, key=lambda clip: -clip["loss"])[:HARDEST]


def _evaluation(run: Path) -> dict[str, Any] | None:
    """A run's evaluation.json; None where there is none, or none that can be read."""
    try:
        found: dict[str, Any] = tables.read_json(run / EVALUATION, "per_class", "confusion")
    except TableError:
        return None
    return found


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _spread(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return stdev(there) if len(there) > 1 else None
