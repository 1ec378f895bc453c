"""Samplers by name, made for the clips that they are to choose from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipmill.errors import ConfigError
from clipmill.loader.sampler import (
    Balanced,
    Mixed,
    Sampler,
    Sequential,
    Shuffled,
    Weighted,
    inverse_frequency,
)
from clipmill.shards.read import Shards

SAMPLINGS = ("shuffled", "balanced", "weighted", "sequential")
"""shuffled: every clip once an epoch. balanced: every class as often, as in PANNs. weighted: rare classes' clips
more often, as in AST. sequential: as the index has them."""


def choose_sampler(
    shards: Shards, sampling: str, seed: int, set_weights: Sequence[float] | None = None
) -> Sampler:
    """The sampler called `sampling` over these clips.

    `set_weights`, one for each of `shards.sets`, says what share of the clips comes from each, which then
    has a sampler of its own; without them all clips are one set.

    Raises:
        ConfigError: no such sampling, weights that cannot be, or a set without clips.
    """
    if sampling not in SAMPLINGS:
        raise ConfigError(f"--sampling {sampling}: allowed are {', '.join(SAMPLINGS)}")
    if set_weights is None:
        return _one(shards, sampling, seed)
    if len(set_weights) != len(shards.sets):
        raise ConfigError(
            f"--set-weights: {len(set_weights)} for {len(shards.sets)} sets of shards; allowed is one for each --shards"
        )
    rows_of = [np.flatnonzero(shards.set_of == number) for number in range(len(shards.sets))]
    for part, rows in zip(shards.sets, rows_of, strict=True):
        if not len(rows):
            raise ConfigError(
                f"{part.store.place}: no clip of it is to train on; leave it and its --set-weights out"
            )
    parts = [_one(shards.take(rows), sampling, seed + number) for number, rows in enumerate(rows_of)]
    return Mixed.of(parts, rows_of, set_weights, seed)


def _one(shards: Shards, sampling: str, seed: int) -> Sampler:
    if sampling == "balanced":
        return Balanced.of(*shards.label_ids, seed)
    if sampling == "weighted":
        return Weighted.of(inverse_frequency(*shards.label_ids), seed)
    return Shuffled(len(shards), seed) if sampling == "shuffled" else Sequential(len(shards))
