"""Several runs of one recipe: a fold held out in each, and all of it repeated with other seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
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

_NAME = re.compile(r"(?:fold(\d+)-)?seed(\d+)")  # see `Part.name`

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
        `main_figure`; `runs`, with those that other calls made in OUT: run, fold, seed, done, step, and the
        figures of the best and the last evaluation;
        `mean` and `deviation` (of a sample; None of one run) over the runs of the figures of the best
        evaluations, `last_mean` and `last_deviation` of the last ones; `by_seed`: the mean of each repeat.
    """
    made: dict[str, dict[str, Any]] = {}

    def summed() -> dict[str, Any]:
        summary = summarise([{**row, **made.get(row["run"], {})} for row in rows_of(out, parts)])
        if write:
            tables.write_json(out / CROSSVAL, summary)
        return summary

    summary = summed()  # before the first is made: so the folder says what it is
    for part in parts:
        outcome = run(part, out / part.name)
        made[part.name] = {name: getattr(outcome, name) for name in ("done", "step", "best", "last")}
        summary = summed()
        if not outcome.done:
            break
    return summary


def rows_of(out: Path, parts: Iterable[Part]) -> list[dict[str, Any]]:
    """What is known of these runs, and of those that stand beside them in the folder, made by other calls."""
    nothing: dict[str, Any] = {"done": False, "step": 0, "best": None, "last": None}
    every = sorted({*parts, *_parts_in(out)}, key=lambda part: (part.seed, part.fold or 0))
    return [
        {"run": part.name, "fold": part.fold, "seed": part.seed, **nothing, **stand(out / part.name)}
        for part in every
    ]


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
    out: Path,
    configs: Mapping[Part, dict[str, Any]],
    *,
    resume: bool,
    launch: str | None = None,
    restarts: int = 0,
) -> None:
    """See that runs can be made in a folder or gone on with, and that one mean can be over all that it will hold.

    Args:
        out: the folder.
        configs: what config.json is to say of each run.
        resume: see `checkpoint.start_or_resume`.
        launch: the same.
        restarts: the same.

    Raises:
        TrainError: it is no folder for several runs, some of them are there already and are not to be gone on with,
            or one that is there was begun otherwise.
    """
    for name, what in ((checkpoint.CONFIG, "a single run"), (checkpoint.FUSION, "a fused model")):
        if (out / name).exists():
            raise TrainError(f"{out}: holds {what} ({name}); several runs take another --out")
    there = [
        part.name
        for part in configs
        if (out / part.name / checkpoint.CONFIG).exists()
        and not checkpoint.goes_on(out / part.name, resume=resume, launch=launch, restarts=restarts)
    ]
    if there:
        raise TrainError(
            f"{out}: already holds {len(there)} of these {len(configs)} runs; --resume goes on with them, another "
            "--out starts new ones"
        )
    _check_alike(out, configs)


def _check_alike(out: Path, configs: Mapping[Part, dict[str, Any]]) -> None:
    """Raise TrainError where a run that stands in the folder was begun otherwise than those that are to be made."""
    begun = {part: config for part in _parts_in(out) if (config := checkpoint.begun(out / part.name))}
    new = next((part for part in configs if part not in begun), next(iter(configs)))
    now = configs[new]
    for part, was in begun.items():
        unlike = checkpoint.differing(_shared(part, was), _shared(new, now))
        if part not in configs and not _as_long(was, now):
            unlike.append(f"steps was {was['recipe']['steps']}, now {now['recipe']['steps']}")
        if unlike:
            raise TrainError(
                f"{out / part.name}: this run was begun otherwise: {'; '.join(unlike)}. The mean is over all runs of "
                "a folder: give the same flags (--steps may grow where --folds, --repeats and --seed name this run "
                "too), or choose another --out"
            )


def _shared(part: Part, config: dict[str, Any]) -> dict[str, Any]:
    """A run's config without what differs from run to run."""
    by_fold = {} if part.fold is None else {"held_out": {"by": "fold", "value": "each"}}
    return {**config, "seed": "each", "clips": "each", **by_fold}


def _as_long(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs make as many steps, or, but for the rounding to a step, as many passes over their clips."""
    steps, others = one["recipe"]["steps"], other["recipe"]["steps"]
    clips, theirs = one["clips"]["train"], other["clips"]["train"]
    return bool(steps == others or abs(steps * theirs - others * clips) < max(clips, theirs))


def _parts_in(out: Path) -> list[Part]:
    """The runs that stand in a folder, by the names of theirs."""
    found = (_NAME.fullmatch(path.parent.name) for path in out.glob(f"*/{checkpoint.CONFIG}"))
    return [Part(None if name[1] is None else int(name[1]), int(name[2])) for name in found if name]


def _over(
    figures: list[dict[str, Any]], take: Callable[[list[float]], float | None]
) -> dict[str, float | None]:
    """What `take` makes of each figure that all evaluations have."""
    values = {name: [one[name] for one in figures if one.get(name) is not None] for name in FIGURES}
    return {
        name: take(found) if found and len(found) == len(figures) else None for name, found in values.items()
    }
