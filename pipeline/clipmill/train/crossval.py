"""Several runs of one recipe: a fold held out in each, and all of it repeated with other seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from clipmill import tables
from clipmill.errors import ConfigError, TableError, TrainError
from clipmill.train import checkpoint
from clipmill.train.checkpoint import CROSSVAL
from clipmill.train.loop import Outcome, is_over
from clipmill.train.recipes import Recipe

FIGURES = ("accuracy", "map", "auc", "d_prime", "f1", "ece", "loss")


@dataclass(frozen=True)
class Part:
    """One of the runs: the fold that it holds out, None for the dataset's own split, and its seed."""

    fold: int | None
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"fold{self.fold}-seed{self.seed}" if self.fold is not None else f"seed{self.seed}"


def parts_of(folds: Iterable[int | None], repeats: int, seed: int) -> list[Part]:
    """All folds with the first seed, then all with the next."""
    return [Part(fold, seed + repeat) for repeat in range(repeats) for fold in folds]


def cross_validate(
    parts: list[Part], out: Path, run: Callable[[Part, Path], Outcome], *, write: bool = True
) -> dict[str, Any]:
    """Make the runs one after the other, until one is stopped; what is known so far is in OUT/crossval.json.

    Args:
        parts: the runs.
        out: a folder that gets one for each of them.
        run: makes or goes on with one in its folder.
        write: whether crossval.json is written: by the first rank alone.

    Returns:
        `main_figure`; `runs`: run, fold, seed, done, step, and the figures of the best and the last evaluation;
        `mean` and `deviation` (of a sample; None of one run) over the runs of the figures of the best
        evaluations, `last_mean` and `last_deviation` of the last ones; `by_seed`: the mean of each repeat.
    """
    rows = [{**row, **stand(out / row["run"])} for row in unmade(parts)]

    def summed() -> dict[str, Any]:
        summary = summarise(rows)
        if write:
            tables.write_json(out / CROSSVAL, summary)
        return summary

    summary = summed()  # before the first is made: so the folder says what it is
    for row, part in zip(rows, parts, strict=True):
        outcome = run(part, out / part.name)
        row |= {"done": outcome.done, "step": outcome.step, "best": outcome.best, "last": outcome.last}
        summary = summed()
        if not outcome.done:
            break
    return summary


def unmade(parts: list[Part]) -> list[dict[str, Any]]:
    """The rows of runs that nothing is known of yet."""
    nothing: dict[str, Any] = {"done": False, "step": 0, "best": None, "last": None}
    return [{"run": part.name, "fold": part.fold, "seed": part.seed, **nothing} for part in parts]


def refreshed(folder: Path) -> dict[str, Any]:
    """What crossval.json says, brought up to what the runs are at now, for jobs may have made them; and written.

    Raises:
        TrainError: there is none, or it is damaged.
    """
    try:
        told = tables.read_json(folder / CROSSVAL, "main_figure", "runs")
        rows = [{**row, **stand(folder / row["run"])} for row in told["runs"]]
    except (TableError, TypeError, KeyError) as error:
        raise TrainError(
            f"{folder / CROSSVAL}: cannot be read ({error}); the same `pipeline train` makes it again"
        ) from error
    summary = summarise(rows)
    if summary != told:
        tables.write_json(folder / CROSSVAL, summary)
    return summary


def stand(run: Path, recipe: Recipe | None = None) -> dict[str, Any]:
    """Where a run stands, by its own files; nothing where they cannot be read.

    Whether it is done is judged by its recipe, or by that which it is to go on with.
    """
    try:
        state = checkpoint.read_last(run)
        recipe = recipe or Recipe(**checkpoint.read_config(run)["recipe"])
    except (TrainError, ConfigError, TypeError, KeyError):
        return {}
    best, last = state["best"], state["last"]
    return {"done": is_over(recipe, best, last), "step": state["step"], "best": best, "last": last}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """See `cross_validate`: over the runs that are done."""
    done = [row for row in rows if row["done"]]
    best, last = ([row[which] for row in done if row[which]] for which in ("best", "last"))
    seeds = sorted({row["seed"] for row in done})
    return {
        "main_figure": best[0]["main_figure"] if best else None,
        "runs": rows,
        "mean": mean_of(best),
        "deviation": deviation_of(best),
        "last_mean": mean_of(last),
        "last_deviation": deviation_of(last),
        "by_seed": [
            {"seed": seed, "mean": mean_of([row["best"] for row in done if row["seed"] == seed])} for seed in seeds
        ],
    }  # fmt: skip


def runs_of(folder: Path) -> dict[str, Path]:
    """The runs that a folder's crossval.json tells of, by `Part.name`; all have been evaluated.

    Raises:
        TrainError: there is none, it is damaged, or a run of it has no best weights yet.
    """
    try:
        told = tables.read_json(folder / CROSSVAL, "runs")
        found = {row["run"]: folder / row["run"] for row in told["runs"]}
    except (TableError, TypeError, KeyError) as error:
        raise TrainError(f"{folder / CROSSVAL}: cannot be read ({error})") from error
    if not found:
        raise TrainError(f"{folder / CROSSVAL}: tells of no runs")
    for run in found.values():
        if not (run / checkpoint.BEST).is_file():
            raise TrainError(
                f"{run}: has no {checkpoint.BEST} yet; the same `pipeline train` with --resume goes on with {folder}"
            )
    return found


def mean_of(figures: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean of each figure that all evaluations have."""
    return _over(figures, mean)


def deviation_of(figures: list[dict[str, Any]]) -> dict[str, float | None]:
    """The deviation of a sample, of each figure that all evaluations have; None of one evaluation."""
    return _over(figures, lambda values: stdev(values) if len(values) > 1 else None)


def check_free(
    out: Path, parts: list[Part], *, resume: bool, launch: str | None = None, restarts: int = 0
) -> None:
    """Raise TrainError where some of the runs are there already, and are not to be gone on with, or `out` is no folder
    for several.

    `launch` and `restarts` as `checkpoint.start_or_resume` takes them: what torchrun began it goes on with.
    """
    for name, what in ((checkpoint.CONFIG, "a single run"), (checkpoint.FUSION, "a fused model")):
        if (out / name).exists():
            raise TrainError(f"{out}: holds {what} ({name}); several runs take another --out")
    there = [
        part.name
        for part in parts
        if (out / part.name / checkpoint.CONFIG).exists()
        and not checkpoint.goes_on(out / part.name, resume=resume, launch=launch, restarts=restarts)
    ]
    if there:
        raise TrainError(
            f"{out}: already holds {len(there)} of these {len(parts)} runs; --resume goes on with them, another --out "
            "starts new ones"
        )


def _over(
    figures: list[dict[str, Any]], take: Callable[[list[float]], float | None]
) -> dict[str, float | None]:
    """What `take` makes of each figure that all evaluations have."""
    values = {name: [one[name] for one in figures if one.get(name) is not None] for name in FIGURES}
    return {
        name: take(found) if found and len(found) == len(figures) else None for name, found in values.items()
    }
