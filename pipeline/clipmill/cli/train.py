"""`pipeline train`."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import DONE, FAILED, INTERRUPTED, console

if TYPE_CHECKING:
    import torch

    from clipmill.run.slurm_job import SlurmJob
    from clipmill.shards.read import Shards
    from clipmill.train.crossval import Part
    from clipmill.train.loop import Outcome
    from clipmill.train.plan import Plan
    from clipmill.train.ranks import Ranks


FEATURES = ("logmel", "mfcc", "gfcc", "chroma", "cqt", "tempogram")
MIXUPS = ("none", "standard", "between-class", "between-class-logmel", "standard-features")


def _recipe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One flag for each field of a recipe, by its name; None leaves the recipe's own value."""
    options = [
        click.option("--recipe", "recipe_name", metavar="NAME|FILE",
                     help="Preset, one of `pipeline recipes`, or a .toml file.  [default: by dataset and device]"),
        click.option("--model", metavar="NAME", help="Network, such as erann-1-3."),
        click.option("--feature", type=click.Choice(["auto", *FEATURES]),
                     help="What the network sees; auto: its own, which is the log-mel, or what --features holds."),
        click.option("--steps", type=int, help="Training steps."),
        click.option("--epochs", type=float, help="Instead of steps: passes over the clips to train on."),
        click.option("--batch-size", type=int, help="Clips in each step, of all ranks together."),
        click.option("--accumulate", type=int, help="Parts that a step is put through the network in, to save memory."),
        click.option("--learning-rate", type=float, help="Adam's; the highest one with one-cycle."),
        click.option("--schedule", type=click.Choice(["constant", "one-cycle"]), help="Of the learning rate."),
        click.option("--warmup", type=float, help="Share of the steps in which the rate of one-cycle climbs."),
        click.option("--weight-decay", type=float, help="AdamW's; 0: Adam."),
        click.option("--clip-norm", type=float, help="Most that the norm of the gradients may be; 0: any."),
        click.option("--sampling", type=console.SAMPLING,
                     help="Every clip once an epoch; every class as often (PANNs); rare classes more often (AST); as "
                     "they lie."),
        click.option("--crop-s", type=float, help="Seconds cut from each clip at a random place; 0: whole clips."),
        click.option("--pad-s", type=float, help="Seconds that shorter clips are padded to; 0: to whole seconds."),
        click.option("--mixup", type=click.Choice(MIXUPS),
                     help="How clips are mixed: Table 3's types 1 to 4, or plainly, and features in place of sound."),
        click.option("--specaugment/--no-specaugment", default=None, help="Mask stripes of the log-mel."),
        click.option("--mask-frames", type=int, help="Most frames of a stripe."),
        click.option("--mask-bins", type=int, help="Most bins of a stripe."),
        click.option("--pitch-semitones", type=float, help="Shift each clip's pitch by up to so many; 0: not."),
        click.option("--stretch", type=float, help="Play each clip up to this share faster or slower; 0: not."),
        click.option("--noise-snr-db", type=float, help="Add white noise, at this ratio and above; inf: none."),
        click.option("--ema-decay", type=float, help="Of the average of the weights that is evaluated."),
        click.option("--ema-warmup/--no-ema-warmup", default=None, help="Let the average forget its first steps."),
        click.option("--eval-every", type=int, help="Steps between evaluations on the clips held out."),
        click.option("--patience", type=int, help="Evaluations without a better one that end the run; 0: none do."),
        click.option("--loss", type=click.Choice(["auto", "softmax", "sigmoid"]),
                     help="softmax: one class a clip; sigmoid: any number; auto: by the labels."),
        click.option("--label-smoothing", type=float, help="With softmax: share of each target that all classes get."),
        click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]),
                     help="Of the network; features and loss are in float32. auto: bf16 on CUDA."),
        click.option("--compile/--no-compile", default=None, help="Compile the network by torch.compile."),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


SLURM = ("partition", "time", "mem", "gpus", "nodes", "ranks", "cpus", "extra", "wait")
"""Parameters that go with --engine slurm alone."""


def _slurm_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that say where a run is made."""
    for option in reversed((
        click.option("--engine", type=click.Choice(["local", "slurm"]), default="local", show_default=True,
                     help="Train here, or as a Slurm job for each run, put back in line when it is preempted."),
        click.option("--partition", default=None, help="Slurm's partition.  [default: the cluster's]"),
        click.option("--time", metavar="[D-]HH:MM:SS", default=None,
                     help="Slurm's time limit; a job that reaches it goes on in another.  [default: 24:00:00]"),
        click.option("--mem", type=click.IntRange(min=500), metavar="MB", default=None,
                     help="Slurm's memory limit of a node.  [default: the cluster's]"),
        click.option("--gpus", type=click.IntRange(min=0), default=None, help="GPUs of each node.  [default: 1]"),
        click.option("--nodes", type=click.IntRange(min=1), default=None, help="Nodes of each job.  [default: 1]"),
        click.option("--ranks", type=click.IntRange(min=1), default=None,
                     help="Processes on each node.  [default: one for each GPU]"),
        click.option("--cpus", type=click.IntRange(min=1), default=None, help="Cores of each process.  [default: 8]"),
        click.option("--slurm", "extra", metavar="NAME=VALUE", multiple=True,
                     help="More that sbatch is to be told, such as account=x; may be given again."),
        click.option("--wait", is_flag=True, help="Wait until the jobs have ended, and print the figures."),
    )):  # fmt: skip
        function = option(function)
    return function


@click.command("train")
@console.clips_options
@click.option(
    "--fold", type=int, default=None, help="Fold to hold out.  [default: the dataset's split, or lowest fold]"
)
@click.option(
    "--folds",
    metavar="all|K,K,...",
    default=None,
    help="Cross-validate: one run for each of these folds, and their mean.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Make each run so often, with the seeds from --seed on.",
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
@click.option("--resume", is_flag=True, help="Go on with what is in --out, exactly where it was saved last.")
@console.device_option
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of all that is random."
)
@click.option(
    "--split-seed",
    type=click.IntRange(0, 2**63 - 1),
    default=None,
    help="Of the groups held out, where there are no folds and no splits.  [default: --seed]",
)
@console.reading_options
@click.option(
    "--set-weights",
    metavar="W,W,...",
    callback=console.numbers,
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
@click.option("--allow-missing", is_flag=True, help="Let classes be held out that no clip to train on has.")
@click.option("--page/--no-page", default=True, show_default=True, help="Write report.html at the end.")
@click.option("--wandb", "wandb_project", metavar="PROJECT", help="Tell Weights & Biases of the figures too.")
@_recipe_options
@_slurm_options
@click.pass_context
def command(
    context: click.Context,
    where: tuple[str, ...],
    features: Path | None,
    fold: int | None,
    folds: str | None,
    repeats: int,
    out: Path | None,
    init: Path | None,
    resume: bool,
    device: str,
    seed: int,
    split_seed: int | None,
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
    allow_missing: bool,
    page: bool,
    wandb_project: str | None,
    recipe_name: str | None,
    engine: str,
    **fields: Any,
) -> int:
    """Train a tagger on shards and evaluate it on the clips held out.

    SHARDS is a folder, a shard, or a range such as a/b-{000000..000012}.tar, here or at a URL
    such as s3://bucket/folder; ours, or tars and HDF5 files that others made. Given several
    times, all are one collection, or are mixed by --set-weights. The recipe follows from the
    dataset and the device; any part of it can be changed by a flag. Interrupted, killed or
    preempted, the same command with --resume goes on. Started by torchrun, its ranks train
    one network on one GPU each. With --features the clips are those of a feature store, and no
    sound is read.

    \b
    Example:
      pipeline train --shards data/esc10/shards/webdataset-flac-44100 --fold 1
      pipeline train --recipe esc50-scratch --model erann-1-3 --shards SHARDS --folds all --repeats 3
      pipeline train --shards SHARDS --model erann-1-1 --fold 1 --steps 300 --out runs/x
      pipeline train --shards SHARDS --fold 1 --out runs/x --resume
      pipeline train --shards SHARDS --fold 1 --init runs/audioset
      pipeline train --shards SHARDS --fold 1 --where "silent < 0.9 and duration_s >= 1"
      pipeline train --shards s3://bucket/audioset --cache /scratch/cache --workers 8
      pipeline train --shards A --shards B --set-weights 3,1 --fold 1
      pipeline train --shards SHARDS --feature cqt --fold 1
      pipeline train --features STORE --feature cqt --mixup standard-features --fold 1
      pipeline train --shards SHARDS --folds all --engine slurm --partition gpu --gpus 4 --time 12:00:00
      torchrun --nproc-per-node 8 --max-restarts 3 -m clipmill train --shards SHARDS --out runs/x
    """  # fmt: skip
    from clipmill.errors import ConfigError
    from clipmill.train.ranks import joined_ranks, launch

    if fold is not None and folds is not None:
        raise ConfigError("--fold and --folds: allowed is one of them")
    slurm = {name: fields.pop(name) for name in SLURM}
    stray = [
        name for name, value in slurm.items() if value is not None and value is not False and value != ()
    ]
    if engine != "slurm" and stray:
        flag = "slurm" if stray[0] == "extra" else stray[0]
        raise ConfigError(f"--{flag} goes with --engine slurm, not with {engine}")
    asked = {
        "where": where, "features": features, "fold": fold, "folds": folds, "repeats": repeats, "out": out,
        "init": init, "seed": seed,
        "split_seed": seed if split_seed is None else split_seed, "workers": workers, "max_bad": max_bad,
        "check": check, "cache": cache, "read_timeout": read_timeout, "set_weights": set_weights, "access": access,
        "buffer": buffer, "keep": keep, "allow_leak": allow_leak, "allow_missing": allow_missing,
        "recipe_name": recipe_name, "fields": fields,
    }  # fmt: skip
    how = {"log_batches": log_batches, "save_every": save_every, "page": page, "wandb": wandb_project}
    if engine == "slurm":
        return _submit(context, device, asked, resume, slurm)
    with joined_ranks(device) as (ranks, place):
        code = _train(ranks, place, asked, resume, how)
    # torchrun would start what was stopped anew.
    return DONE if code == INTERRUPTED and launch() is not None else code


def _train(ranks: Ranks, place: str, asked: dict[str, Any], resume: bool, how: dict[str, Any]) -> int:
    """Make one run or several; all ranks do this alike, and the first of them speaks."""
    from clipmill.train.crossval import check_free, cross_validate
    from clipmill.train.device import pick_device
    from clipmill.train.ranks import launch, restarts

    plans, folder, single = _all_planned(ranks, pick_device(place), asked)
    with _until_signalled() as stop:
        run = partial(_run, ranks=ranks, stop=stop, resume=resume, how=how)
        if single:
            outcome = run(next(iter(plans.values())), folder)
            if ranks.first and outcome.done:
                _print_run(outcome.best, outcome.last, folder)
            return DONE if outcome.done else INTERRUPTED
        configs = {part: plan.config for part, plan in plans.items()}
        ranks.from_first(
            lambda: check_free(folder, configs, resume=resume, launch=launch(), restarts=restarts())
        )
        summary = cross_validate(
            list(plans), folder, lambda part, place: run(plans[part], place), write=ranks.first
        )
    if ranks.first:
        _print_folds(summary, folder)
        if how["page"]:
            from clipmill.report.folds_page import write_folds_page

            _write_page(folder, lambda: write_folds_page(folder))
    done = {row["run"]: row["done"] for row in summary["runs"]}
    return DONE if all(done[part.name] for part in plans) else INTERRUPTED


def _submit(
    context: click.Context, device: str, asked: dict[str, Any], resume: bool, slurm: dict[str, Any]
) -> int:
    """Plan the runs here, so that what is wrong is told now, and have Slurm make each as a job."""
    import torch

    from clipmill import tables
    from clipmill.errors import ConfigError
    from clipmill.run.slurm_job import SlurmJob
    from clipmill.run.slurm_queue import minutes_of
    from clipmill.train.checkpoint import CROSSVAL, LAST, look_up
    from clipmill.train.crossval import check_free, rows_of, stand, summarise
    from clipmill.train.ranks import Ranks

    gpus = (0 if device == "cpu" else 1) if slurm["gpus"] is None else slurm["gpus"]
    if wrong := [one for one in slurm["extra"] if "=" not in one]:
        raise ConfigError(f"--slurm {wrong[0]}: allowed is NAME=VALUE, such as account=x")
    if not gpus and device != "cpu" and device != "auto":
        raise ConfigError(f"--device {device}: the jobs are to have no GPUs; --gpus N asks for some")
    per_node = slurm["ranks"] or gpus or 1
    among = per_node * (slurm["nodes"] or 1)
    plans, folder, single = _all_planned(Ranks(), torch.device("cuda" if gpus else "cpu"), asked, among)
    job = SlurmJob(
        folder / "slurm",
        slurm["partition"],
        minutes_of(slurm["time"] or "24:00:00"),
        slurm["mem"],
        slurm["nodes"] or 1,
        per_node,
        gpus,
        slurm["cpus"] or 8,
        extra=dict(one.split("=", 1) for one in slurm["extra"]),
    )
    again = console.words_again(
        context,
        ("fold", "folds", "seed", "split_seed", "repeats", "out", "resume", "device", "engine", *SLURM),
    )
    places = {part: _place(folder, part, asked) for part in plans}
    commands = {part: [sys.executable, "-m", "clipmill", "train", *again] for part in plans}
    for part, place in places.items():
        where = ["--device", "cuda" if gpus else "cpu", "--out", str(place), "--resume"]
        commands[part] += [*where, "--seed", str(part.seed), "--split-seed", str(asked["split_seed"])]
        commands[part] += [] if part.fold is None else ["--fold", str(part.fold)]
    if slurm["wait"] and (ids := job.attach(list(commands.values()))):
        console.say(f"what was submitted before has not ended, and is waited for: job {', '.join(ids)}")
        return _waited(job, ids, folder, single)
    job.check_free()
    if not single:
        check_free(folder, {part: plan.config for part, plan in plans.items()}, resume=resume)
    for part, plan in plans.items():  # a job would find it out only when its turn has come
        look_up(places[part], plan.config, resume=resume)
    # What is finished needs no job.
    left = [part for part, plan in plans.items() if not stand(places[part], plan.recipe).get("done")]
    if not left:
        console.say(f"{folder}: all of this is finished already")
        return _told(folder, single)
    ids = job.submit(
        [commands[part] for part in left], f"clipmill-{folder.name}", [places[part] / LAST for part in left]
    )
    if not single:
        tables.write_json(folder / CROSSVAL, summarise(rows_of(folder, plans)))
    for one, part in zip(ids, left, strict=True):
        console.say(f"job {one}: {places[part]}, which says in {job.log(one)} how it goes")
    if slurm["wait"]:
        return _waited(job, ids, folder, single)
    click.echo(f"runs: {folder}; `pipeline report {folder}` shows them, at any time")
    return DONE


def _waited(job: SlurmJob, ids: list[str], folder: Path, single: bool) -> int:
    """Wait for the jobs, and say what became of them; Ctrl-C leaves them running."""
    from clipmill.run.slurm_job import GOING_ON

    with console.progress("training", len(ids), "jobs") as update:

        def show(states: Mapping[str, str]) -> None:
            by_state = Counter(states.values())
            ended = sum(count for state, count in by_state.items() if state not in GOING_ON)
            update(ended, ", ".join(f"{count} {state.lower()}" for state, count in sorted(by_state.items())))

        states = job.wait(ids, show)
    for one, state in states.items():
        if state != "COMPLETED":
            console.say(f"job {one}: {state}: see {job.log(one)}; the same command with --resume tries again")
    _told(folder, single)
    return DONE if set(states.values()) == {"COMPLETED"} else FAILED


def _told(folder: Path, single: bool) -> int:
    """Print the figures of runs that jobs made."""
    from clipmill.train.crossval import refreshed, stand

    if single:
        found = stand(folder)
        _print_run(found.get("best"), found.get("last"), folder)
    else:
        _print_folds(refreshed(folder), folder)
    return DONE


def _all_planned(
    ranks: Ranks, device: torch.device, asked: dict[str, Any], among: int = 0
) -> tuple[dict[Part, Plan], Path, bool]:
    """The plan of each run, for `among` ranks or those there are; their folder, and whether it is that of one alone.

    All are planned before the first is begun: what is wrong with the last fold is told now. The first rank does it
    before the others: it may have to make an index of the shards, and it tells what is wrong.
    """
    plans: dict[Part, Plan] = {}
    ranks.from_first(lambda: plans.update(_plans(device, asked, among or ranks.count, console.say)))
    if not ranks.first:
        plans = _plans(device, asked, among or ranks.count, lambda text: None)
    first = next(iter(plans.values()))
    return plans, asked["out"] or _default_folder(first, asked), _is_single(asked)


def _plans(
    device: torch.device, asked: dict[str, Any], ranks: int, tell: Callable[[str], None]
) -> dict[Part, Plan]:
    """The plan of each run; `tell` hears what a person should know, each thing once."""
    from clipmill.train.crossval import parts_of
    from clipmill.train.split import folds_of

    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:
            tell(text)
        said.add(text)

    shards = console.open_clips(
        asked["where"],
        asked["features"],
        asked["fields"]["feature"],
        asked["cache"],
        asked["read_timeout"],
        tell,
    )
    console.say_of(shards, say)
    folds = [asked["fold"]] if asked["folds"] is None else folds_of(shards, asked["folds"])
    return {
        part: _planned(shards, device, part, asked, ranks, say)
        for part in parts_of(folds, asked["repeats"], asked["seed"])
    }


def _planned(
    shards: Shards,
    device: torch.device,
    part: Part,
    asked: dict[str, Any],
    ranks: int,
    say: Callable[[str], None],
) -> Plan:
    """The plan of one run, and what a person should know of it."""
    from clipmill.loader import Feed
    from clipmill.train.checkpoint import begun
    from clipmill.train.device import default_workers
    from clipmill.train.plan import plan_run
    from clipmill.train.recipes import choose_recipe, describe
    from clipmill.train.transfer import model_of

    init, fields = asked["init"], dict(asked["fields"])
    workers = default_workers(device, far=shards.far) if asked["workers"] is None else asked["workers"]
    feed = Feed(workers, asked["access"], asked["buffer"], asked["max_bad"], asked["check"])
    if init is not None and fields["model"] is None:
        run = None if asked["out"] is None else begun(_place(asked["out"], part, asked))
        fields["model"] = (run or {}).get("model") or model_of(init)
    recipe, why = choose_recipe(
        shards.name, device.type, asked["recipe_name"], init=init is not None, **fields
    )
    plan = plan_run(
        shards, recipe, device, fold=part.fold, seed=part.seed, split_seed=asked["split_seed"], ranks=ranks,
        allow_leak=asked["allow_leak"], allow_missing=asked["allow_missing"], where=asked["keep"], init=init,
        place=lambda plan: _place(asked["out"] or _default_folder(plan, asked), part, asked), feed=feed,
        set_weights=asked["set_weights"],
    )  # fmt: skip
    say(f"{why}\n  {describe(plan.recipe)}, {plan.config['loss']}, on {device}")
    for note in plan.notes:
        say(note)
    return plan


def _run(
    plan: Plan, folder: Path, *, ranks: Ranks, stop: Callable[[], bool], resume: bool, how: dict[str, Any]
) -> Outcome:
    """Make or go on with one run, and its page."""
    from clipmill.train.log import WandB
    from clipmill.train.loop import train

    say = console.say if ranks.first else (lambda text: None)
    sinks = [partial(WandB, how["wandb"], plan.config)] if how["wandb"] else []
    with console.progress("training", plan.recipe.steps, "steps", shown=ranks.first) as update:
        outcome = train(
            plan,
            folder,
            resume=resume,
            log_batches=how["log_batches"],
            save_every=how["save_every"],
            ranks=ranks,
            sinks=sinks,
            say=say,
            update=update,
            stop=stop,
        )
    if not outcome.done:
        say(f"stopped at step {outcome.step} of {plan.recipe.steps}: the same command with --resume goes on")
    elif outcome.step < plan.recipe.steps:
        say(f"ended at step {outcome.step} of {plan.recipe.steps}: --patience {plan.recipe.patience} is lost")
    elif not outcome.ran:
        say(f"{folder}: this run is finished already ({outcome.step} steps); --steps N trains on")
    if ranks.first and how["page"] and outcome.done and outcome.best:
        from clipmill.report.run_page import PAGE

        if outcome.ran or not (folder / PAGE).exists():
            _write_page(folder, partial(_run_page, plan, folder, stop))
    return outcome


def _run_page(plan: Plan, folder: Path, stop: Callable[[], bool]) -> Path:
    """Write the page of a run, for which its clips are scored again; raises Stopped where that is to end."""
    from clipmill.report.run_page import write_run_page
    from clipmill.train.held_out import Stopped

    with console.progress("scoring for the page", len(plan.split.held_out), "clips") as show:

        def update(done: int, facts: str) -> None:
            if stop():
                raise Stopped
            show(done, facts)

        update(0, "")
        return write_run_page(folder, plan.shards, plan.device, feed=plan.feed, update=update)


def _write_page(folder: Path, write: Callable[[], Path]) -> None:
    """Write the page of a run, or of several; what keeps it from being made does not undo them."""
    from clipmill.train.held_out import Stopped

    try:
        console.say(f"page: {write()}")
    except Stopped:
        console.say(f"no page: told to stop, when all else was done; `pipeline report {folder}` makes it")
    except Exception as error:  # a full disk, or memory: whatever it is, what was trained is saved
        console.say(f"no page: {error or type(error).__name__}; `pipeline report {folder}` tries again")


def _is_single(asked: dict[str, Any]) -> bool:
    """Whether one run is asked for, whose folder --out is."""
    return asked["folds"] is None and asked["repeats"] == 1


def _default_folder(plan: Plan, asked: dict[str, Any]) -> Path:
    """Where the runs go, one or several, that are not told where; `plan` is that of any."""
    if _is_single(asked):
        return plan.default_out
    tag = "folds" if asked["folds"] is not None else f"{plan.split.tag}-repeats"
    return plan.named(tag)


def _place(folder: Path, part: Part, asked: dict[str, Any]) -> Path:
    """The folder of one of the runs."""
    return folder if _is_single(asked) else folder / part.name


def _print_run(best: dict[str, Any] | None, last: dict[str, Any] | None, folder: Path) -> None:
    for name, figures in (("best", best), ("last", last)):
        if figures:
            main = figures["main_figure"]
            others = [
                f"{k} {figures[k]:.3f}"
                for k in ("map", "auc", "f1", "loss")
                if k != main and figures[k] is not None
            ]
            value = "none" if figures[main] is None else f"{figures[main]:.3f}"
            click.echo(
                f"{name}: {main} {value} on {figures['clips']} clips at step {figures['step']} ({', '.join(others)})"
            )
    click.echo(f"run: {folder}")


def _print_folds(summary: dict[str, Any], folder: Path) -> None:
    """A row for each run, then the mean and the deviation of the best and of the last evaluations."""
    names = [
        name for name in ("accuracy", "map", "auc", "f1") if any(summary[w][name] is not None for w in _MEANS)
    ]
    rows: list[tuple[str, ...]] = []
    for row in summary["runs"]:
        best, last = row["best"] or {}, row["last"] or {}
        state = "" if row["done"] else f"stopped at step {row['step']}" if row["step"] else "not begun"
        figures = [_number(side.get(name)) for side in (best, last) for name in names]
        rows.append((row["run"], *figures, state))
    for label, which in (("mean", "mean"), ("deviation", "deviation")):
        rows.append(
            (label, *(_number(summary[side + which][name]) for side in ("", "last_") for name in names), "")
        )
    console.print_table("", ("run", *names, *(f"last {name}" for name in names), ""), rows)
    click.echo(f"runs: {folder}")


_MEANS = ("mean", "last_mean")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def _until_signalled() -> Iterator[Callable[[], bool]]:
    """Yield a question: has a Ctrl-C come, or what schedulers send before the end? A second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, _frame: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    told = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in told}
    for number in told:
        signal.signal(number, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
