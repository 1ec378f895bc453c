"""One page on a run: what it was, how it went, what it gets wrong, and the clips to listen to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from clipmill import tables
from clipmill.loader import Bad, Feed
from clipmill.report.charts import Line, charts, line_chart, reliability_diagram
from clipmill.report.clips import LONGEST_S, clip_cards
from clipmill.report.markup import Html, Section, as_utf8, facts, page, section, table, tag
from clipmill.report.own_shards import sound_of
from clipmill.report.run_files import best_step, is_number, part_of, read_metrics
from clipmill.report.sections import (
    FIGURES,
    class_table,
    confusion_section,
    figure_tiles,
    figures_table,
)
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import BEST, CONFIG, METRICS, read_config, read_run
from clipmill.train.evaluate import Evaluation, Update, evaluate_clips

PAGE, EVALUATION = "report.html", "evaluation.json"

HARDEST = 12
"""Clips to listen to, unless told otherwise."""

_COLUMNS = (
    ("ap", "AP"),
    ("auc", "AUC"),
    ("d_prime", "d′"),  # noqa: RUF001 - a prime
    ("precision", "precision"),
    ("recall", "recall"),
    ("f1", "F1"),
)
_BAD_SHOWN = 20


def write_run_page(
    run: Path,
    shards: Shards,
    device: torch.device,
    *,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    hardest: int = HARDEST,
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> Path:
    """Score a run's best weights on the clips it held out, and write report.html and evaluation.json into it.

    The page is one file with everything in it, the sound of the `hardest` clips too. evaluation.json holds
    all that `evaluate_run` gives, `step` (of the best weights) and `hardest` (as `HardClip`). A run without an
    evaluation yet gets a page of what is there, and no evaluation.json. `update` and `tell` are
    those of `evaluate_run`.

    Returns:
        Where the page is.

    Raises:
        ShardError: more clips than `feed.max_bad` allows cannot be read.
        TrainError: no run is there, its files are damaged, or the shards do not fit it.
    """
    config = read_config(run)
    rows, damaged = read_metrics(run / METRICS)
    notes = _notes(config, shards, rows, damaged)
    found: Evaluation | None = None
    step = None
    if (run / BEST).is_file():
        step = best_step(run / BEST)
        found = evaluate_clips(
            read_run(run, device), shards, device, hardest=hardest, feed=feed, update=update, tell=tell
        )
        places = {name: as_utf8(found.figures[name]) for name in ("run", "shards")}
        kept = {**found.figures, **places, "step": step, "hardest": [asdict(clip) for clip in found.hardest]}
        tables.write_json(run / EVALUATION, kept)
    else:
        notes.append(
            f"{BEST} is not there: the run has not been evaluated yet, so that there are no figures; the same "
            "`pipeline train` with --resume goes on"
        )
    with tables.atomic_write(run / PAGE, "w") as file:
        file.write(_page(run, config, rows, notes, shards, found, step))
    return run / PAGE


def is_old(run: Path) -> bool:
    """Whether a run has been evaluated, and its page or evaluation.json is missing or older than its best weights."""
    if not (run / BEST).is_file():
        return False
    made = [(run / name).stat().st_mtime if (run / name).is_file() else 0.0 for name in (PAGE, EVALUATION)]
    return min(made) < (run / BEST).stat().st_mtime


def _page(
    run: Path,
    config: dict[str, Any],
    rows: dict[str, list[dict[str, Any]]],
    notes: list[str],
    shards: Shards,
    found: Evaluation | None,
    step: int | None,
) -> str:
    name = run.resolve().name
    parts = [_figures(rows, found, step), _made_from(config), *_curves(rows, step)]
    if found is not None:
        parts += _what_goes_wrong(found)
        if found.hardest:
            hint = (
                f"The clips of the highest loss; of one longer than {LONGEST_S} s, of which the network heard all, the "
                f"first {LONGEST_S} s are here. A wrong label, a silent or a cut clip is found fastest here."
            )
            parts.append(section("Hardest clips", clip_cards(sound_of(shards), found.hardest), hint=hint))
    parts.append(_unreadable(rows, found))
    about = [
        config.get("model"),
        f"on {config.get('dataset')}",
        f"held out: {_held_out(config, found)}",
        None if found is None else f"{found.figures['clips']} clips scored",
    ]
    tiles = figure_tiles(found.figures, found.figures["main_figure"]) if found else Html()
    header = tag("header", tag("h1", name), tag("p", " · ".join(str(part) for part in about if part)), tiles)
    return page(f"{name}: clipmill run", header, notes, parts)


def _notes(
    config: dict[str, Any], shards: Shards, rows: dict[str, list[dict[str, Any]]], damaged: int
) -> list[str]:
    notes = []
    wanted = part_of(config, "recipe").get("steps")
    reached = max((row["step"] for kind in ("train", "eval") for row in rows[kind]), default=0)
    if not rows["train"]:
        notes.append(f"{METRICS} holds no line of training: there are no curves")
    elif wanted and reached < wanted:
        notes.append(
            f"the run stands at step {reached:.0f} of {wanted}: the same `pipeline train` with --resume goes on"
        )
    if damaged:
        notes.append(f"{damaged} line{'s' * (damaged > 1)} of {METRICS} cannot be read, and are left out")
    if (shards.root_sha256, shards.some_files) != (config.get("root_sha256"), config.get("files")):
        notes.append(
            f"{shards.place}: are not the very shards that the run was trained on ({CONFIG} has another root sha256 "
            "or other files): its figures need not be those of its training"
        )
    return notes


def _figures(rows: dict[str, list[dict[str, Any]]], found: Evaluation | None, step: int | None) -> Section:
    last = rows["eval"][-1] if rows["eval"] else None
    columns = [("best" if step is None else f"best (step {step})", found.figures if found else None)]
    columns.append((f"last (step {last['step']:.0f})" if last else "last", last))
    hint = (
        "Best: the weights of the best of all evaluations, scored again for this page; picked on the very clips "
        "that judge, so they flatter. Last: as the training measured at its last evaluation."
    )
    content = figures_table(columns)
    if found and found.figures["classes_left_out"]:
        left_out = ", ".join(found.figures["classes_left_out"])
        content = Html(
            content + tag("p", f"Left out of mAP and AUC, without clips on both sides: {left_out}")
        )
    return section("Figures", content, hint=hint, half=True)


def _made_from(config: dict[str, Any]) -> Section:
    clips, versions = part_of(config, "clips"), part_of(config, "versions")
    init = config.get("init")
    said = {
        "clips to train on": clips.get("train"),
        "clips held out": clips.get("held_out"),
        "loss": config.get("loss"),
        "where": config.get("where"),
        "seed": config.get("seed"),
        "from the weights of": init.get("from") if isinstance(init, dict) else init,
        "device": config.get("device"),
        "sample rate": f"{config.get('sample_rate')} Hz",
        "shards": ", ".join(map(str, config.get("shards") or [])),
        "root sha256": config.get("root_sha256"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    recipe = part_of(config, "recipe")
    return section(
        "Recipe",
        facts((name, value) for name, value in recipe.items()),
        tag("h3", "and what it was given", style="margin-top:1rem"),
        facts((name, value) for name, value in said.items() if value is not None),
        half=True,
    )


def _curves(rows: dict[str, list[dict[str, Any]]], step: int | None) -> list[Section]:
    def line(name: str, field: str, kind: str = "train") -> Line:
        there = [row for row in rows[kind] if is_number(row.get(field))]
        return Line(name, [row["step"] for row in there], [row[field] for row in there])

    figures = [line(FIGURES[name], name, "eval") for name in ("accuracy", "map", "auc", "f1", "ece")]
    drawn = [
        line_chart("Figures on the clips held out", [one for one in figures if one.steps], mark=step),
        line_chart("Loss", [line("training", "loss"), line("held out", "loss", "eval")], mark=step),
        line_chart("Learning rate", [line("learning rate", "learning_rate")], zero=True),
        line_chart("Clips a second", [line("clips a second", "clips_per_s")], zero=True),
        line_chart("Share of the time spent waiting for data", [line("waiting", "data_wait")], zero=True),
    ]
    if not any(drawn):
        return []
    hint = "The dashed line is the step of the best weights. The training loss is of mixed and masked clips."
    return [section("Curves", charts(drawn), hint=hint if step is not None else None)]


def _what_goes_wrong(found: Evaluation) -> list[Section]:
    figures = found.figures
    labels = [row["label"] for row in figures["per_class"]]
    parts = []
    if figures["confusion"] is not None:
        parts.append(confusion_section(labels, figures["confusion"]))
    hint = "The lowest average precision first; a click on a head sorts by it."
    parts.append(section("Classes", class_table(figures["per_class"], _COLUMNS), hint=hint))
    if figures["reliability"]:
        hint = (
            "Of the classes with the lowest AP: how often a clip has the class, over the probability that it is "
            "given. On the diagonal probabilities are honest; below it the network is too sure. Over all: "
            f"{figures['ece']:.3f} (expected calibration error, 15 bins; Guo et al., ICML 2017)."
        )
        drawn = tag("div", *map(reliability_diagram, figures["reliability"]), class_="diagrams")
        parts.append(section("Reliability", drawn, hint=hint))
    return parts


def _unreadable(rows: dict[str, list[dict[str, Any]]], found: Evaluation | None) -> Section:
    told = [*rows["bad"], *(found.figures["unread_clips"] if found else ())]
    bad = list({(row.get("shard"), row.get("key")): row for row in told}.values())
    title = "Unreadable clips"
    if not bad:
        return section(title, tag("p", "None: every clip could be read."))
    lines = [
        tuple(row.get(name) for name in ("key", "shard", "reason", "message")) for row in bad[:_BAD_SHOWN]
    ]
    more = f" The first {_BAD_SHOWN} of them:" if len(bad) > _BAD_SHOWN else ""
    said = tag("p", f"{len(bad)} clip{'s' * (len(bad) > 1)} could not be read.{more}")
    return section(title, said, table(("clip", "shard", "reason", "what went wrong"), lines, texts=4))


def _held_out(config: dict[str, Any], found: Evaluation | None) -> str:
    if found is not None:
        return str(found.figures["scored"])
    held = part_of(config, "held_out")
    return f"{held.get('by')} {held.get('value')}"
