"""The evaluations of a run: its averaged weights on the clips held out, shared by the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from clipmill.loader import Bad, Feed
from clipmill.shards.read import Shards
from clipmill.train.evaluate import Scored, score_clips
from clipmill.train.metrics import main_figure, measure_scores
from clipmill.train.ranks import Ranks


class Stopped(Exception):
    """The run was told to stop in the midst of an evaluation."""


def score_held_out(
    model: nn.Module,
    features: nn.Module,
    held_out: Shards,
    config: dict[str, Any],
    device: torch.device,
    feed: Feed,
    ranks: Ranks,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], list[Bad]]:
    """Score the clips held out, each rank its part of them.

    Returns:
        The figures of `measure_scores` without its tables, with `main_figure`, `loss` and `unread`; and the clips
        that could not be read. The same on all ranks.

    Raises:
        Stopped: on all ranks, where `stop` said so on any.
        ShardError: none of a rank's clips can be read.
        TrainError: the network's answers are not finite.
    """
    rows = np.arange(len(held_out))[ranks.rank :: ranks.count]
    part = _unless_stopped(model, features, held_out.take(rows), config["loss"], device, feed, stop)
    parts = ranks.gathered(part)
    if any(one is None for one in parts):
        raise Stopped
    scored = [one for one in parts if isinstance(one, Scored)]
    # The clips in the order of the shards, so that the figures do not know of ranks.
    places = np.concatenate([one.rows * ranks.count + rank for rank, one in enumerate(scored)])
    order = np.argsort(places)
    targets = held_out.targets_of(places[order])
    scores = np.concatenate([one.scores for one in scored])[order]
    unread = [bad for one in scored for bad in one.unread]
    figures = ranks.from_first(lambda: measure_scores(targets, scores, held_out.labels, config["loss"]))
    short = {name: value for name, value in figures.items() if not isinstance(value, list)}
    loss = sum(one.loss * len(one.rows) for one in scored) / len(places)
    return {"main_figure": main_figure(config["loss"]), "loss": loss, "unread": len(unread), **short}, unread


def main_value(figures: dict[str, Any]) -> float:
    """The figure that decides which weights are best; -1 where it does not exist."""
    value = figures[figures["main_figure"]]
    return -1.0 if value is None else float(value)


def _unless_stopped(
    model: nn.Module,
    features: nn.Module,
    clips: Shards,
    loss: str,
    device: torch.device,
    feed: Feed,
    stop: Callable[[], bool],
) -> Scored | None:
    """What `score_clips` makes of the clips, of which there may be none; None where it was stopped."""
    if not len(clips):
        nothing = np.zeros(0, np.float32)
        return Scored(np.zeros(0, np.int64), np.zeros((0, len(clips.labels)), np.float32), nothing, 0.0, [])

    def update(done: int, facts: str) -> None:
        if stop():
            raise Stopped

    try:
        return score_clips(model, features, clips, loss, device, feed, update)
    except Stopped:
        return None
