"""What fusing runs brings: each run alone, and every combination of them by every method, on the same clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipmill.errors import ConfigError, TrainError
from clipmill.loader import Bad, Feed
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import Described
from clipmill.train.crossval import FIGURES, deviation_of, mean_of
from clipmill.train.fusion import METHODS, equal_weights, fit_weights, fuse_logits
from clipmill.train.metrics import measure_scores
from clipmill.train.objective import clip_loss, probabilities
from clipmill.train.together import (
    SINGLE,
    Chosen,
    Scores,
    Update,
    after,
    check_not_learnt,
    runs_to_fuse,
    same_clips,
    score_together,
)

MOST_COMBINED = 12
"""Runs of which every combination is measured: there are as many as 2 to the power of their number."""


@dataclass(frozen=True)
class Ways:
    """How runs are fused.

    Attributes:
        methods: some of `METHODS`.
        weights: of each run, for "wa": shares, of which a combination takes those of its runs. None: all alike.
        fit_fold: in place of `weights`: those of each combination are fitted on the clips of this fold.
        every: whether every combination is measured; else only all runs together.
    """

    methods: tuple[str, ...] = METHODS
    weights: tuple[float, ...] | None = None
    fit_fold: int | None = None
    every: bool = True

    def check(self, runs: int) -> None:
        """Raise ConfigError where so many runs cannot be fused like this."""
        if self.every and runs > MOST_COMBINED:
            raise ConfigError(
                f"{runs} runs have {2**runs - runs - 1:,} combinations: allowed are up to {MOST_COMBINED} runs, or "
                "--no-combinations for all of them together"
            )
        for flag, given in (("--weights", self.weights), ("--fit-fold", self.fit_fold)):
            if given is not None and "wa" not in self.methods:
                raise ConfigError(f"{flag}: only --method wa has weights")
        if self.weights is None:
            return
        if self.fit_fold is not None:
            raise ConfigError("--weights and --fit-fold: allowed is one of them")
        if len(self.weights) != runs or not all(0 < weight < math.inf for weight in self.weights):
            raise ConfigError(
                f"--weights {','.join(f'{weight:g}' for weight in self.weights)}: allowed is a number above 0 for each "
                f"of the {runs} RUNs; leave a run away that is to have none"
            )

    def combinations(self, runs: int) -> Iterator[tuple[tuple[int, ...], str | None]]:
        """Each run alone, by no method, then each combination by each method, the smallest first."""
        for run in range(runs):
            yield (run,), None
        for size in range(2 if self.every else runs, runs + 1):
            for some in combinations(range(runs), size):
                for method in self.methods:
                    yield some, method


@dataclass(frozen=True)
class Row:
    """One combination of runs by one method, or one run alone.

    Attributes:
        runs: which of them.
        method: one of `METHODS`; None of one run alone.
        weights: of each of them, with "wa".
        figures: `crossval.FIGURES`; of cross-validations their means.
        deviation: of the figures, of a sample; None where there is but one of each.
    """

    runs: tuple[int, ...]
    method: str | None
    weights: tuple[float, ...] | None
    figures: dict[str, float | None]
    deviation: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Comparison:
    """What came of it.

    Attributes:
        runs: those that were fused; of cross-validations their folders, with the config of the first fold's.
        rows: each run alone, then the combinations, the smallest first.
        accounts: `Scores.account`; of cross-validations one for each fold, with its `part`.
        unread: the clips that were left out.
        fitted: `Scores.account` of the clips that weights were fitted on.
        held_out: `held_out` and `where` of config.json, where all runs held out the same clips.
    """

    runs: list[Described]
    rows: list[Row]
    accounts: list[dict[str, Any]]
    unread: list[Bad]
    fitted: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None


def fuse_runs(
    folders: Sequence[Path],
    shards: Shards,
    device: torch.device,
    ways: Ways = Ways(),
    *,
    fold: int | None = None,
    split: str | None = None,
    where: str | None = None,
    allow_leak: bool = False,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    begin: Callable[[str, int, str], None] = lambda what, total, unit: None,
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> Comparison:
    """Score runs on the same clips, each once, and measure every combination of them.

    Args:
        folders: of runs; or of cross-validations of the same folds and seeds: then the runs of one fold and seed are
            fused with each other, and the figures are means over them.
        shards: where the clips are.
        device: where the networks compute.
        ways: how runs are fused.
        fold, split, where: the clips, as `evaluate_run` takes them; by default those that all runs held out.
        allow_leak: score runs on clips that they learnt from, too.
        feed: how clips are read.
        begin: hears of each piece of work: what, how much, and of what.
        update: hears how it goes.
        tell: hears of each clip that cannot be read.

    Raises:
        ConfigError: runs or flags that do not go together, or `where` cannot be read.
        ShardError: more clips than `feed.max_bad` allows cannot be read.
        TrainError: runs that cannot be read, or do not fit each other or the shards; that held out different
            clips, or learnt from those to be scored or fitted on; a network whose answers are not finite.
    """
    ways.check(len(folders))
    parts = runs_to_fuse(folders)
    single = parts.get(SINGLE)
    for flag, value in (("--fit-fold", ways.fit_fold), ("--fold", fold), ("--split", split)):
        if single is None and value is not None:
            raise ConfigError(
                f"{flag}: goes with single runs; those of cross-validations are scored on the fold that each held out"
            )
    feed.check_fit(shards)
    wanted = [_wanted(runs, shards, ways, fold, split, where, allow_leak) for runs in parts.values()]
    begin("scoring", sum(len(folders) * len(one.rows) for sets in wanted for one in sets), "clips")
    scores: list[list[Scores]] = []
    done = 0
    for runs, sets in zip(parts.values(), wanted, strict=True):
        scores.append(score_together(runs, shards, sets, device, feed, after(update, done), tell))
        done += sum(len(folders) * len(one.rows) for one in sets)
    asked = list(ways.combinations(len(folders)))
    begin("fusing", len(asked) * len(parts), "combinations")
    tables: list[list[Row]] = []
    for judged, *fit in scores:
        tables.append([])
        for some, method in asked:
            tables[-1].append(_row(judged, some, method, ways, fit[0] if fit else None))
            update(len(asked) * (len(tables) - 1) + len(tables[-1]), "")
    bads = [bad for sets in scores for one in sets for bad in one.unread]
    if single is None:
        accounts = [{"part": part, **sets[0].account} for part, sets in zip(parts, scores, strict=True)]
        named = [
            replace(run, folder=folder)
            for folder, run in zip(folders, next(iter(parts.values())), strict=True)
        ]
        return Comparison(named, _means(tables), accounts, bads)
    judged, *fit = scores[0]
    fitted = fit[0].account if fit else None
    return Comparison(single, tables[0], [judged.account], bads, fitted, _held_out(single, shards))


def _wanted(
    runs: Sequence[Described],
    shards: Shards,
    ways: Ways,
    fold: int | None,
    split: str | None,
    where: str | None,
    allow_leak: bool,
) -> list[Chosen]:
    """The clips to score, and those to fit weights on, where that is asked for; no run learnt from either."""
    judged = same_clips(runs, shards, fold, split, where)
    if not allow_leak:
        mend = "choose with --fold what no run learnt from, or accept it with --allow-leak"
        check_not_learnt(runs, shards, judged, f", so its figures would flatter it; {mend}")
    if ways.fit_fold is None:
        return [judged]
    fit = same_clips(runs, shards, ways.fit_fold, None, where)
    if both := len(set(fit.rows.tolist()) & set(judged.rows.tolist())):
        raise TrainError(
            f"--fit-fold {ways.fit_fold}: {both} of its {len(fit.rows)} clips are to be scored too, so the weights "
            "would know the answers; choose another fold"
        )
    mend = f'train the runs with `pipeline train --fold K --where "fold != {ways.fit_fold}"`, or choose another fold'
    check_not_learnt(runs, shards, fit, f", so --fit-fold {ways.fit_fold} would favour it; {mend}")
    return [judged, fit]


def _row(scores: Scores, some: tuple[int, ...], method: str | None, ways: Ways, fit: Scores | None) -> Row:
    logits = scores.logits[list(some)]
    if method is None:
        return Row(some, None, None, _figures(scores, logits[0]))
    weights = _weights(some, ways, fit) if method == "wa" else None
    return Row(some, method, weights, _figures(scores, fuse_logits(logits, method, scores.loss, weights)))


def _weights(some: tuple[int, ...], ways: Ways, fit: Scores | None) -> tuple[float, ...]:
    """Those of a combination, which sum to 1."""
    if fit is not None:
        alone = torch.stack([probabilities(fit.logits[run].double(), fit.loss) for run in some])
        return fit_weights(alone, fit.targets, fit.loss)
    if ways.weights is None:
        return equal_weights(len(some))
    own = [ways.weights[run] for run in some]
    return tuple(weight / sum(own) for weight in own)


def _figures(scores: Scores, logits: Tensor) -> dict[str, float | None]:
    """`crossval.FIGURES` of logits `[clips, classes]`."""
    found = probabilities(logits, scores.loss).numpy()
    told = measure_scores(scores.targets.numpy(), found, scores.labels, scores.loss)
    told["loss"] = float(clip_loss(logits, scores.targets, scores.loss))
    return {name: told[name] for name in FIGURES}


def _means(tables: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of one table over those of several."""
    found = []
    for rows in zip(*tables, strict=True):
        figures = [row.figures for row in rows]
        found.append(replace(rows[0], figures=mean_of(figures), deviation=deviation_of(figures)))
    return found


def _held_out(runs: Sequence[Described], shards: Shards) -> dict[str, Any] | None:
    """See `Comparison.held_out`."""
    try:
        same_clips(runs, shards, None, None, None)
    except TrainError:
        return None
    return {name: runs[0].config.get(name) for name in ("held_out", "where")}
