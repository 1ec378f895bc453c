"""Score whole clips with a trained network, and a whole run on the clips it held out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from clipmill.augment import to_float
from clipmill.errors import ShardError, TrainError
from clipmill.loader import Bad, Feed, WholeClips, check_bad
from clipmill.shards.read import Shards
from clipmill.train.checkpoint import Run
from clipmill.train.device import SECONDS_AT_ONCE
from clipmill.train.lengths import check_heard
from clipmill.train.metrics import confusions, main_figure, measure_scores
from clipmill.train.objective import clip_loss, probabilities
from clipmill.train.split import held_out_again, labelled

Update = Callable[[int, str], None]


@dataclass(frozen=True)
class Scored:
    """What a network makes of clips.

    Attributes:
        rows: int64 `[scored]`, the clips that could be read, in the order of the shards.
        scores: float32 `[scored, classes]`, probabilities.
        loss: the mean of a clip.
        unread: the clips that could not be read.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    loss: float
    unread: list[Bad]


@torch.inference_mode()
def score_clips(
    model: nn.Module,
    features: nn.Module,
    shards: Shards,
    loss: str,
    device: torch.device,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> Scored:
    """Score whole clips; `tell` hears of each that cannot be read.

    Clips of one length are scored together, so that none is padded for another's sake.
    `model` must be in evaluation mode.

    Raises:
        ShardError: none of the clips can be read.
        TrainError: the network's answers are not finite.
    """
    most = SECONDS_AT_ONCE[device.type] * shards.sample_rate
    # Whoever asks decides what to do about clips that cannot be read, once all that can be scored is.
    clips = WholeClips(
        shards, most, workers=feed.workers, device=device, max_bad=1.0, check=feed.check, tell=tell
    )
    rows: list[NDArray[np.int64]] = []
    found: list[NDArray[np.float32]] = []
    total, done = 0.0, 0
    with closing(clips.batches()) as batches:
        for batch in batches:
            logits = model(features(to_float(batch.waves))).float()
            rows.append(batch.rows.numpy())
            found.append(probabilities(logits, loss).cpu().numpy())
            total += float(clip_loss(logits, batch.targets, loss)) * len(batch.rows)
            done += len(batch.rows)
            update(done, "")
    if not found:
        raise ShardError(
            f"none of the {len(shards)} clips to score can be read; the first: {clips.damage.found[0]}"
        )
    scores = np.concatenate(found)
    if not np.isfinite(scores).all():
        raise TrainError(
            "the network answers NaN: its training has diverged; begin again with a lower --learning-rate"
        )
    scored = np.concatenate(rows)
    order = np.argsort(scored)
    return Scored(scored[order], scores[order], total / done, clips.damage.found)


def evaluate_run(
    run: Run,
    shards: Shards,
    device: torch.device,
    *,
    fold: int | None = None,
    split: str | None = None,
    where: str | None = None,
    feed: Feed = Feed(),  # noqa: B008 - frozen
    update: Update = lambda done, facts: None,
    tell: Callable[[Bad], None] = lambda bad: None,
) -> dict[str, Any]:
    """Every figure of `measure_scores` for the clips chosen, with `confusions`, `loss` and what was scored.

    The clips are those that the run held out, or those of `fold` and `split` (both: those of both).
    `where` is an expression as `Shards.where` takes it, and leaves only the clips that fulfil it; without
    it, those held out are the ones that fulfil the run's own. `unread` in what comes back counts the clips
    that could not be read, which no figure is of; `tell` hears of each.

    Raises:
        ConfigError: `where` cannot be read.
        ShardError: more clips than `feed.max_bad` allows cannot be read.
        TrainError: the shards do not fit the run, no clip is chosen, or one is longer than the network takes.
    """
    feed.check_fit(shards)
    shards = fitting(run, shards)
    rows, what = choose_clips(run, shards, fold, split, where)
    chosen = shards.take(rows)
    check_heard(run.model, run.features, int(chosen.samples.max()), f"the longest clip of {what}")
    scored = score_clips(run.model, run.features, chosen, run.loss, device, feed, update, tell)
    check_bad(scored.unread, len(chosen), feed.max_bad)
    figures = measure_scores(chosen.targets_of(scored.rows), scored.scores, run.labels, run.loss)
    return {
        "run": str(run.folder),
        "weights": run.weights,
        "model": run.config["model"],
        "shards": shards.place,
        "scored": what,
        "unread": len(scored.unread),
        "unread_clips": [asdict(bad) for bad in scored.unread],
        "loss": scored.loss,
        "main_figure": main_figure(run.loss),
        "confusions": confusions(figures, run.labels),
        **figures,
    }


def fitting(run: Run, shards: Shards) -> Shards:
    """The shards with the run's classes, of which they may have some, in any order.

    Raises:
        TrainError: they have classes that the run does not know, or another sample rate.
    """
    if not set(shards.labels) <= set(run.labels):
        unknown = sorted(set(shards.labels) - set(run.labels))
        lacking = sorted(set(run.labels) - set(shards.labels))
        sides = (("unknown to the run", unknown), ("lacking", lacking))
        parts = [f"{what}: {_few(names)}" for what, names in sides if names]
        raise TrainError(
            f"{shards.place}: its {len(shards.labels)} classes are not the {len(run.labels)} that {run.folder} "
            f"was trained on ({'; '.join(parts)}); give --shards of the same dataset"
        )
    if shards.sample_rate != run.sample_rate:
        raise TrainError(
            f"{shards.place}: is at {shards.sample_rate} Hz, while {run.folder} was trained at {run.sample_rate} Hz; "
            f"make shards with `pipeline shard --sample-rate {run.sample_rate}`"
        )
    return shards.with_labels(run.labels)


def choose_clips(
    run: Run, shards: Shards, fold: int | None, split: str | None, where: str | None = None
) -> tuple[NDArray[np.int64], str]:
    """The rows to score, and what they are in words; raises TrainError when there are none."""
    if fold is None and split is None:
        held = run.config["held_out"]
        same = (shards.root_sha256, shards.some_files) == (run.config["root_sha256"], run.config.get("files"))
        if held["by"] == "groups" and not same:
            raise TrainError(
                f"{shards.place}: {run.folder} held out some groups of other shards; say which clips to score "
                "with --fold or --split (--split all: clips without a split)"
            )
        rows = held_out_again(shards, held["by"], held["value"])
        # A run's figures come again only from the very clips it was measured on.
        where = run.config.get("where") if where is None else where
        return _some(rows, shards, _words(held), where)
    chosen = labelled(shards)
    if fold is not None:
        chosen &= shards.folds == fold
    if split is not None:
        chosen &= shards.in_splits(split)
    what = " and ".join([f"fold {fold}"] * (fold is not None) + [f"split {split}"] * (split is not None))
    return _some(np.flatnonzero(chosen), shards, what, where)


def _some(
    rows: NDArray[np.int64], shards: Shards, what: str, where: str | None
) -> tuple[NDArray[np.int64], str]:
    if len(rows) and where is not None:
        kept = rows[shards.fulfilling(where)[rows]]
        if not len(kept):
            raise TrainError(
                f"{shards.place}: --where {where!r} keeps none of the {len(rows)} clips of {what}"
            )
        rows, what = kept, f"{what} where {where}"
    if len(rows):
        return rows, what
    folds = sorted(set(shards.folds[shards.folds >= 0].tolist()))
    raise TrainError(
        f"{shards.place}: no clip is in {what}; its folds are {', '.join(map(str, folds)) or 'none'} (--fold), "
        f"its splits {', '.join(shards.splits)} (--split)"
    )


def _words(held: dict[str, Any]) -> str:
    return {"fold": f"fold {held['value']}", "split": f"split {held['value']}"}.get(
        held["by"], f"the groups held out by seed {held['value']}"
    )


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
