"""`pipeline evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, DONE_IN_PART, console


@click.command("evaluate")
@click.argument("run", type=click.Path(path_type=Path))
@console.clips_options
@console.scored_options
@console.weights_option
@console.device_option
@console.reading_options
@console.json_option
def command(
    run: Path,
    where: tuple[str, ...],
    features: Path | None,
    fold: int | None,
    split: str | None,
    keep: str | None,
    weights: str,
    device: str,
    workers: int | None,
    max_bad: float,
    check: bool,
    cache: Path | None,
    read_timeout: float,
    as_json: bool,
) -> int:
    """Score a trained run on whole clips: accuracy, mAP, AUC, F1, each class, and what is confused.

    \b
    Example:
      pipeline evaluate runs/x --shards data/esc10/shards/webdataset-flac-44100
      pipeline evaluate runs/x --shards SHARDS --split eval --weights last --json
      pipeline evaluate runs/x --shards SHARDS --where "clipped == 0"
      pipeline evaluate runs/x --features STORE
    """  # fmt: skip
    from clipmill.errors import ConfigError
    from clipmill.loader import Feed
    from clipmill.train.device import default_workers, pick_device
    from clipmill.train.evaluate import choose_clips, evaluate_run
    from clipmill.train.fused import read_tagger

    place = pick_device(device)
    trained = read_tagger(run, place, weights)
    if features is not None and trained.seen is None:
        raise ConfigError(f"--features {features}: {run} hears waveforms; give --shards SHARDS")
    shards = console.open_clips(where, features, trained.feature, cache, read_timeout, seen=trained.seen)
    console.say_of(shards)
    clips = len(choose_clips(trained, shards, fold, split, keep)[0])
    with console.progress("scoring", clips, "clips") as update:
        workers = default_workers(place, far=shards.far) if workers is None else workers
        feed = Feed(workers, max_bad=max_bad, check=check)
        figures = evaluate_run(
            trained, shards, place, fold=fold, split=split, where=keep, feed=feed, update=update,
            tell=lambda bad: console.say(str(bad)),
        )  # fmt: skip
    if learnt := figures["learnt_from"]:
        console.say(
            f"note: {run} learnt from {learnt} of the {clips} clips of {figures['scored']}, so these figures "
            "flatter it; choose others with --fold or --split"
        )
    if as_json:
        console.print_json(figures)
    else:
        _print(figures)
    return DONE_IN_PART if figures["unread"] else DONE


def _print(figures: dict[str, Any]) -> None:
    names = ("accuracy", "map", "auc", "d_prime", "f1", "ece", "loss")
    what = (
        f"{figures['model']}, {figures['weights']} weights, on {figures['scored']} ({figures['clips']} clips)"
    )
    click.echo(what + (f"; {figures['unread']} more could not be read" if figures["unread"] else ""))
    console.print_table("", ("figure", "value"), [(n, _number(figures[n])) for n in names])
    if left_out := figures["classes_left_out"]:
        click.echo(f"left out of map and auc, without clips on both sides: {', '.join(left_out)}")
    columns = ("clips", "ap", "auc", "precision", "recall", "f1")
    rows = [
        (row["label"], row["clips"], *(_number(row[c]) for c in columns[1:])) for row in figures["per_class"]
    ]
    click.echo()
    console.print_table("Classes", ("label", *columns), rows)
    if figures["confusions"]:
        click.echo()
        rows = [(c["label"], c["predicted"], c["clips"]) for c in figures["confusions"]]
        console.print_table("Most confused", ("label", "heard as", "clips"), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
