"""Several runs on the same clips: which runs go together, on which clips, and what each makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipmill.errors import ConfigError, TrainError
from clipmill.loader import Bad, Feed, check_bad
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import BEST, CONFIG, CROSSVAL, Described, read_config, read_run
from clipmill.train.crossval import runs_of
from clipmill.train.evaluate import choose_clips, fitting, score_clips
from clipmill.train.lengths import check_heard
from clipmill.train.split import few, learnt_from

Update = Callable[[int, str], None]

SINGLE = ""
"""Stands in for the name of a fold where there are none."""

_NEEDED = ("dataset", "features", "held_out", "labels", "loss", "model", "root_sha256", "sample_rate")


@dataclass(frozen=True)
class Chosen:
    """Clips to score: their rows in the shards, int64, and what they are in words."""

    rows: NDArray[np.int64]
    what: str


@dataclass(frozen=True)
class Scores:
    """What n runs make of the same clips, which all of them could read.

    Attributes:
        labels: the classes, in the order of the first run.
        loss: softmax or sigmoid.
        logits: float32 `[n, clips, classes]`.
        targets: float32 `[clips, classes]`.
        what: the clips in words.
        unread: the clips left out, each once.
    """

    labels: list[str]
    loss: str
    logits: Tensor
    targets: Tensor
    what: str
    unread: list[Bad]

    @property
    def account(self) -> dict[str, Any]:
        """What became of the clips: asked = clips + unread."""
        clips, unread = len(self.targets), len(self.unread)
        return {"scored": self.what, "asked": clips + unread, "clips": clips, "unread": unread}


def runs_to_fuse(folders: Sequence[Path]) -> dict[str, list[Described]]:
    """The runs that are fused with each other: of cross-validations those of each fold and seed, by their name.

    Single runs stand under `SINGLE`.

    Raises:
        ConfigError: fewer than two folders, the same one twice, or folders of both kinds.
        TrainError: a folder is no run, or has no best weights yet; cross-validations of other folds or seeds; or
            runs of other classes, another loss or rate.
    """
    if len(folders) < 2:
        raise ConfigError(f"{len(folders)} RUN given: allowed are two or more, or there is nothing to fuse")
    places = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise ConfigError(f"{folder}: is given twice; allowed is each RUN once")
    validations = [folder for folder in folders if (folder / CROSSVAL).is_file()]
    if validations and len(validations) < len(folders):
        single = next(folder for folder in folders if folder not in validations)
        raise ConfigError(
            f"{validations[0]} is a cross-validation, and {single} is not: allowed are RUNs of one kind; the runs of "
            "a cross-validation are the folders in it"
        )
    found = {folder: runs_of(folder) if validations else {SINGLE: folder} for folder in folders}
    first = found[folders[0]]
    for folder, runs in found.items():
        if runs.keys() != first.keys():
            had, has = (few(list(some)) for some in (first, runs))
            raise TrainError(
                f"{folders[0]} has {had}, and {folder} has {has}: allowed are cross-validations of the same folds and "
                "seeds"
            )
    parts = {part: [_described(runs[part]) for runs in found.values()] for part in first}
    _check_alike([run for runs in parts.values() for run in runs])
    return parts


def same_clips(
    runs: Sequence[Described], shards: Shards, fold: int | None, split: str | None, where: str | None
) -> Chosen:
    """The clips that `evaluate.choose_clips` gives for all of the runs.

    Raises:
        ConfigError: `where` cannot be read.
        TrainError: the shards do not fit a run, no clip is chosen, or the runs held out different ones.
    """
    found = [Chosen(*choose_clips(run, fitting(run, shards), fold, split, where)) for run in runs]
    if not all(np.array_equal(found[0].rows, one.rows) for one in found):
        told = "; ".join(
            f"{run.folder}: {one.what} ({len(one.rows)} clips)" for run, one in zip(runs, found, strict=True)
        )
        raise TrainError(
            f"the runs held out different clips: {told}. Allowed are runs that held out the same ones, or --fold K "
            "for a fold that all of them left out"
        )
    return found[0]


def check_not_learnt(runs: Sequence[Described], shards: Shards, chosen: Chosen, mend: str) -> None:
    """Raise TrainError, ending in `mend`, where a run learnt from some of these clips."""
    for run in runs:
        if learnt := int(learnt_from(fitting(run, shards), run.config)[chosen.rows].sum()):
            raise TrainError(
                f"{run.folder}: learnt from {learnt} of the {len(chosen.rows)} clips of {chosen.what}{mend}"
            )


def score_together(
    runs: Sequence[Described],
    shards: Shards,
    wanted: Sequence[Chosen],
    device: torch.device,
    feed: Feed,
    update: Update,
    tell: Callable[[Bad], None],
) -> list[Scores]:
    """Score each set of clips with each run's best weights; a clip that a run cannot read is left out of all.

    One network at a time is in memory. `update` hears of clips, of all runs and sets together, and `tell` of
    each bad clip once.

    Raises:
        ShardError: more clips of a set than `feed.max_bad` allows cannot be read.
        TrainError: a run cannot be read, a clip is longer than its network takes, or its answers are not finite.
    """
    answers: list[list[NDArray[np.float32]]] = [[] for _ in wanted]
    unread: list[dict[tuple[str, str], Bad]] = [{} for _ in wanted]
    labels, done = runs[0].labels, 0
    for one in runs:
        run = read_run(one.folder, device)
        places = [run.labels.index(label) for label in labels]
        for chosen, found, bads in zip(wanted, answers, unread, strict=True):
            clips = fitting(run, shards).take(chosen.rows)
            check_heard(
                run.model, run.features, int(clips.samples.max()), f"the longest clip of {chosen.what}"
            )
            step = after(update, done, run.folder.name)
            try:
                scored = score_clips(
                    run.model, run.features, clips, run.loss, device, feed, step, partial(_hear, bads, tell),
                    answer=lambda logits, loss: logits,
                )  # fmt: skip
            except TrainError as error:
                raise TrainError(f"{run.folder}: {error}") from error
            whole = np.full((len(clips), len(labels)), np.nan, np.float32)
            whole[scored.rows] = scored.scores[:, places]
            found.append(whole)
            done += len(clips)
    together = []
    for chosen, found, bads in zip(wanted, answers, unread, strict=True):
        check_bad(list(bads.values()), len(chosen.rows), feed.max_bad)
        stacked = np.stack(found)
        kept = ~np.isnan(stacked).any((0, 2))
        targets = fitting(runs[0], shards).targets_of(chosen.rows[kept])
        together.append(Scores(
            labels, runs[0].loss, torch.from_numpy(stacked[:, kept]), torch.from_numpy(targets),
            chosen.what, list(bads.values()),
        ))  # fmt: skip
    return together


def after(update: Update, before: int, facts: str = "") -> Update:
    """`update` for work that so much came before; `facts` stand in where none are told."""
    return lambda done, said: update(before + done, said or facts)


def _hear(bads: dict[tuple[str, str], Bad], tell: Callable[[Bad], None], bad: Bad) -> None:
    """Tell of a bad clip when it is met first."""
    if (bad.shard, bad.key) not in bads:
        tell(bad)
    bads[bad.shard, bad.key] = bad


def _described(folder: Path) -> Described:
    run = Described(folder, read_config(folder))
    if lacking := [name for name in _NEEDED if name not in run.config]:
        raise TrainError(f"{folder / CONFIG}: is no run's config: it lacks {', '.join(lacking)}")
    if not (folder / BEST).is_file():
        raise TrainError(f"{folder}: has no {BEST} yet; let it train on with --resume")
    return run


def _check_alike(runs: Sequence[Described]) -> None:
    """Raise TrainError unless all runs are of the same classes, loss and sample rate."""
    first = runs[0]
    for run in runs[1:]:
        sides = (
            (first.folder, set(first.labels) - set(run.labels)),
            (run.folder, set(run.labels) - set(first.labels)),
        )
        if told := [f"only {folder} has {few(sorted(names))}" for folder, names in sides if names]:
            raise TrainError(
                f"{first.folder} and {run.folder} have different classes: {'; '.join(told)}. Allowed are runs of the "
                "same ones, in any order"
            )
        for what, theirs, own in (
            ("--loss", first.loss, run.loss),
            ("a sample rate in Hz of", first.sample_rate, run.sample_rate),
        ):
            if theirs != own:
                raise TrainError(
                    f"{first.folder} was trained with {what} {theirs}, and {run.folder} with {own}: allowed is one"
                )
