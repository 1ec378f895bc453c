"""`pipeline train`."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from clipmill.cli import DONE, INTERRUPTED, console


def _weights(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}: allowed are numbers with commas between, such as 3,1") from None


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of a recipe, by its name; None leaves the recipe's own value."""
    options = [
        click.option("--recipe", "recipe_name", metavar="NAME", help="Preset.  [default: by dataset and device]"),
        click.option("--model", metavar="NAME", help="Network, such as erann-1-3."),
        click.option("--steps", type=int, help="Training steps."),
        click.option("--batch-size", type=int, help="Clips in each step."),
        click.option("--learning-rate", type=float, help="Adam's; the highest one with one-cycle."),
        click.option("--schedule", type=click.Choice(["constant", "one-cycle"]), help="Of the learning rate."),
        click.option(
            "--sampling",
            type=console.SAMPLING,
            help="Every clip once an epoch; every class as often (PANNs); rare classes more often (AST); as they lie.",
        ),
        click.option("--crop-s", type=float, help="Seconds cut from each clip at a random place; 0: whole clips."),
        click.option("--mixup", type=click.Choice(["none", "standard", "between-class"]), help="How clips are mixed."),
        click.option("--specaugment/--no-specaugment", default=None, help="Mask stripes of the log-mel."),
        click.option("--ema-decay", type=float, help="Of the average of the weights that is evaluated."),
        click.option("--ema-warmup/--no-ema-warmup", default=None, help="Let the average forget its first steps."),
        click.option("--eval-every", type=int, help="Steps between evaluations on the clips held out."),
        click.option(
            "--loss",
            type=click.Choice(["auto", "softmax", "sigmoid"]),
            help="softmax: one class a clip; sigmoid: any number; auto: by the labels.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command("train")
@console.shards_option
@click.option(
    "--fold", type=int, default=None, help="Fold to hold out.  [default: the dataset's split, or lowest fold]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder of the run.  [default: runs/DATASET-MODEL-foldK]",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    default=None,
    metavar="RUN|FILE",
    help="Start from the weights of another run, of a .safetensors or of a .pt file; other classes get a fresh head.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, exactly where it was saved last.")
@console.device_option
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all that is random."
)
@console.reading_options
@click.option(
    "--set-weights",
    metavar="W,W,...",
    callback=_weights,
    help="Share of the clips from each --shards, such as 3,1.  [default: all clips as one set]",
)
@console.access_option
@click.option(
    "--buffer",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Clips that --access stream shuffles among.",
)
@click.option(
    "--log-batches", is_flag=True, help="Write hashes of each step's clips and samples to batches.jsonl."
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=None,
    help="Steps between saves, beside those at evaluations.",
)
@click.option(
    "--where",
    "keep",
    metavar="EXPRESSION",
    help="Learn from and hold out only clips that fulfil this, such as 'silent < 0.9 and duration_s >= 1'.",
)
@click.option("--allow-leak", is_flag=True, help="Let a group stand on both sides of the split.")
@_recipe_options
def command(
    where: tuple[str, ...],
    fold: int | None,
    out: Path | None,
    init: Path | None,
    resume: bool,
    device: str,
    seed: int,
    workers: int | None,
    max_bad: float,
    check: bool,
    cache: Path | None,
    read_timeout: float,
    set_weights: tuple[float, ...] | None,
    access: str,
    buffer: int,
    log_batches: bool,
    save_every: int | None,
    keep: str | None,
    allow_leak: bool,
    recipe_name: str | None,
    **fields: Any,
) -> int:
    """Train a tagger on shards and evaluate it on the clips held out.

    SHARDS is a folder, a shard, or a range such as a/b-{000000..000012}.tar, here or at a URL
    such as s3://bucket/folder; ours, or tars and HDF5 files that others made. Given several
    times, all are one collection, or are mixed by --set-weights. The recipe follows from the
    dataset and the device; any part of it can be changed by a flag. Interrupted or killed,
    the same command with --resume goes on.

    \b
    Example:
      pipeline train --shards data/esc10/shards/webdataset-flac-44100 --fold 1
      pipeline train --shards SHARDS --model erann-1-1 --fold 1 --steps 300 --out runs/x
      pipeline train --shards SHARDS --fold 1 --out runs/x --resume
      pipeline train --shards SHARDS --fold 1 --init runs/audioset --learning-rate 1e-4 --steps 2000
      pipeline train --shards SHARDS --fold 1 --where "silent < 0.9 and duration_s >= 1"
      pipeline train --shards s3://bucket/audioset --cache /scratch/cache --sampling balanced --workers 8
      pipeline train --shards A --shards B --set-weights 3,1 --fold 1
    """  # fmt: skip
    from clipmill.loader import Feed
    from clipmill.shards.read import Shards
    from clipmill.train.device import default_workers, pick_device
    from clipmill.train.loop import plan_run, train
    from clipmill.train.recipes import choose_recipe, describe
    from clipmill.train.transfer import model_of

    place = pick_device(device)
    shards = Shards.open(where, cache=cache, settings={"timeout_s": read_timeout}, say=console.say)
    console.say_of(shards)
    feed = Feed(
        default_workers(place, far=shards.far) if workers is None else workers, access, buffer, max_bad, check
    )
    if init is not None and fields["model"] is None:
        fields["model"] = model_of(init)
    recipe, why = choose_recipe(shards.name, place.type, recipe_name, **fields)
    plan = plan_run(
        shards, recipe, place, fold=fold, seed=seed, allow_leak=allow_leak, where=keep, init=init, feed=feed,
        set_weights=set_weights,
    )  # fmt: skip
    folder = out or plan.default_out
    console.say(f"{why}\n  {describe(recipe)}, {plan.config['loss']}, on {place}")
    for note in plan.notes:
        console.say(note)
    with console.progress("training", recipe.steps, "steps") as update, _until_signalled() as stop:
        outcome = train(
            plan,
            folder,
            resume=resume,
            log_batches=log_batches,
            save_every=save_every,
            say=console.say,
            update=update,
            stop=stop,
        )
    if not outcome.done:
        console.say(
            f"stopped at step {outcome.step} of {recipe.steps}: the same command with --resume goes on"
        )
        return INTERRUPTED
    if not outcome.ran:
        console.say(f"{folder}: this run is finished already ({outcome.step} steps); --steps N trains on")
    for line in _summary(outcome.best, outcome.last):
        click.echo(line)
    click.echo(f"run: {folder}")
    return DONE


def _summary(best: dict[str, Any] | None, last: dict[str, Any] | None) -> Iterator[str]:
    for name, figures in (("best", best), ("last", last)):
        if figures:
            main = figures["main_figure"]
            others = [
                f"{k} {figures[k]:.3f}"
                for k in ("map", "auc", "f1", "loss")
                if k != main and figures[k] is not None
            ]
            value = "none" if figures[main] is None else f"{figures[main]:.3f}"
            yield f"{name}: {main} {value} on {figures['clips']} clips at step {figures['step']} ({', '.join(others)})"


@contextmanager
def _until_signalled() -> Iterator[Callable[[], bool]]:
    """Yield a question: has a Ctrl-C or a SIGTERM come? A second Ctrl-C ends at once, as ever."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
