"""`pipeline fuse`."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clipmill.cli import DONE, DONE_IN_PART, console

if TYPE_CHECKING:
    from clipmill.train.checkpoint import Described
    from clipmill.train.fuse import Comparison, Row, Ways

TICK = "✓"
METHODS = ("wa", "ds", "murphy", "deng")
SHOWN = ("accuracy", "map", "f1")
"""The figures of the tables; --json and --csv have all."""


@click.command("fuse")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@console.shards_option
@click.option(
    "--method",
    "methods",
    type=click.Choice(METHODS),
    multiple=True,
    help="Weighted average, Dempster-Shafer, or its forms by Murphy and Deng; may be given again.  [default: all]",
)
@console.scored_options
@click.option(
    "--weights",
    metavar="W,W,...",
    callback=console.numbers,
    help="Share of each RUN in the weighted average, such as 3,1.  [default: all alike]",
)
@click.option(
    "--fit-fold",
    type=int,
    default=None,
    metavar="K",
    help="Fit the weights on this fold, from which no run may have learnt.",
)
@click.option(
    "--combinations/--no-combinations",
    "every",
    default=True,
    show_default=True,
    help="Score every combination of the runs, or only all of them together.",
)
@click.option("--allow-leak", is_flag=True, help="Score runs on clips that they learnt from, too.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for the fused model, which predict and evaluate take; with one --method.",
)
@click.option(
    "--csv",
    "table",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    metavar="FILE",
    help="Write the table with all figures as CSV.",
)
@console.device_option
@console.reading_options
@console.json_option
def command(
    runs: tuple[Path, ...], where: tuple[str, ...], methods: tuple[str, ...], fold: int | None, split: str | None,
    keep: str | None, weights: tuple[float, ...] | None, fit_fold: int | None, every: bool, allow_leak: bool,
    out: Path | None, table: Path | None, device: str, workers: int | None, max_bad: float, check: bool,
    cache: Path | None, read_timeout: float, as_json: bool,
) -> int:  # fmt: skip
    """Fuse several runs: score them on the same clips, and every combination of them by each method.

    Each RUN hears the clips through its own front end, so runs of different features and networks go together; their
    classes must be the same. They are scored once, by their best weights, on the clips that they held out. RUN may
    also be the folder of a cross-validation: the runs of each fold and seed are then fused with each other, and the
    figures are means and deviations.

    \b
    Example:
      pipeline fuse runs/logmel runs/mfcc runs/cqt --shards data/esc50/shards/webdataset-flac-44100
      pipeline fuse runs/logmel-folds runs/mfcc-folds --shards SHARDS --csv fused.csv
      pipeline fuse runs/logmel runs/mfcc --shards SHARDS --method wa --fit-fold 2 --out runs/fused
      pipeline predict runs/fused my.wav
    """  # fmt: skip
    from clipmill.errors import ConfigError
    from clipmill.loader import Feed
    from clipmill.shards.read import Shards
    from clipmill.train.checkpoint import CROSSVAL
    from clipmill.train.device import default_workers, pick_device
    from clipmill.train.fuse import Ways, fuse_runs
    from clipmill.train.fused import check_unused, write_fused

    if out is not None:
        if len(methods) != 1:
            raise ConfigError("--out: writes a model of one method; choose it with one --method")
        if folds := [run for run in runs if (run / CROSSVAL).is_file()]:
            raise ConfigError(f"--out: writes a model of single runs, and {folds[0]} is a cross-validation")
        check_unused(out)
        out.mkdir(parents=True, exist_ok=True)
    if table is not None:  # what cannot be written must not be found out after all that scoring
        table.parent.mkdir(parents=True, exist_ok=True)
    ways = Ways(tuple(dict.fromkeys(methods)) or METHODS, weights, fit_fold, every)
    place = pick_device(device)
    shards = Shards.open(where, cache=cache, settings={"timeout_s": read_timeout}, say=console.say)
    console.say_of(shards)
    ahead = default_workers(place, far=shards.far) if workers is None else workers
    with console.watching() as watcher:
        found = fuse_runs(
            runs, shards, place, ways, fold=fold, split=split, where=keep, allow_leak=allow_leak,
            feed=Feed(ahead, max_bad=max_bad, check=check), begin=watcher.begin, update=watcher.update,
            tell=lambda bad: watcher.say(str(bad)),
        )  # fmt: skip
    if as_json:
        console.print_json(_as_json(found))
    else:
        _print(found, ways)
    if table is not None:
        _write_csv(found, table)
        console.say(f"table: {table}")
    if out is not None:
        whole = found.rows[-1]  # all runs together, by the only method
        write_fused(out, found.runs, methods[0], whole.weights, found.held_out)
        console.say(f"fused model: {out}; `pipeline predict {out} FILE` hears with it")
    return DONE_IN_PART if found.unread else DONE


def _as_json(found: Comparison) -> dict[str, Any]:
    names = [str(run.folder) for run in found.runs]
    return {
        "runs": [_about(run) for run in found.runs],
        "accounts": found.accounts,
        "fitted": found.fitted,
        "unread_clips": [asdict(bad) for bad in found.unread],
        "rows": [{**asdict(row), "runs": [names[run] for run in row.runs]} for row in found.rows],
    }


def _about(run: Described) -> dict[str, str]:
    """The name of a run, of its network, and of what that sees."""
    return {"run": str(run.folder), "model": run.config["model"], "feature": run.feature or "waveform"}


def _print(found: Comparison, ways: Ways) -> None:
    """The runs alone, then a table for each figure: a line a combination, ticks for its runs, a column a method."""
    click.echo(_account(found.accounts))
    if found.fitted:
        click.echo(f"weights fitted on {_account([found.fitted])}")
    alone = [row for row in found.rows if row.method is None]
    names = [name for name in SHOWN if any(row.figures[name] is not None for row in alone)]
    whole = None
    if found.fitted or ways.weights:
        whole = next(row.weights for row in reversed(found.rows) if row.weights)
    columns = ["", "run", "model", "feature", *names, *(["weight"] if whole else [])]
    rows = []
    for number, (run, row) in enumerate(zip(found.runs, alone, strict=True)):
        weight = [f"{whole[number]:.3f}"] if whole else []
        rows.append((number + 1, *_about(run).values(), *(_cell(row, name) for name in names), *weight))
    console.print_table("", columns, rows)
    by_combination: dict[tuple[int, ...], dict[str | None, Row]] = {}
    for row in found.rows:
        if row.method is not None:
            by_combination.setdefault(row.runs, {})[row.method] = row
    numbers = range(len(found.runs))
    for name in names:
        click.echo()
        lines = [
            (
                *(_shown(TICK) if run in some else "" for run in numbers),
                *(_cell(by[m], name) for m in ways.methods),
            )
            for some, by in by_combination.items()
        ]
        click.echo(f"{name}, fused")
        console.print_table("", (*(str(run + 1) for run in numbers), *ways.methods), lines)


def _account(accounts: list[dict[str, Any]]) -> str:
    """in = scored + failed."""
    asked, clips = (sum(one[name] for one in accounts) for name in ("asked", "clips"))
    what = accounts[0]["scored"] if len(accounts) == 1 else f"what {len(accounts)} runs of each held out"
    return f"{what}: {asked} in = {clips} scored + {asked - clips} failed"


def _cell(row: Row, name: str) -> str:
    value, deviation = row.figures[name], (row.deviation or {}).get(name)
    told = "-" if value is None else f"{value:.3f}"
    return told if deviation is None else _shown(f"{told} ± {deviation:.3f}")


def _shown(text: str) -> str:
    """The text, or what stands in for it where the terminal's encoding lacks its signs."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.replace(TICK, "x").replace("±", "+-")
    return text


def _write_csv(found: Comparison, path: Path) -> None:
    """A line for each run and for each combination by each method; all figures, and their deviations."""
    from clipmill import tables

    names = list(found.rows[0].figures)
    deviations = [f"{name}_deviation" for name in names] if found.rows[0].deviation else []
    with tables.atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*(str(run.folder) for run in found.runs), "method", "weights", *names, *deviations])
        for row in found.rows:
            ticks = [int(run in row.runs) for run in range(len(found.runs))]
            weights = " ".join(map(str, row.weights or ()))
            deviation = (row.deviation or {}).values()
            writer.writerow([*ticks, row.method or "", weights, *row.figures.values(), *deviation])
