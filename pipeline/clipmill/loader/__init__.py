"""From shards to batches on the device: which clip stands where, reading ahead, damage, sequential streams."""

from __future__ import annotations

from clipmill.loader.batches import Batch, Digest
from clipmill.loader.choose import SAMPLINGS, choose_sampler
from clipmill.loader.damage import MAX_BAD, Bad, Damage, check_bad
from clipmill.loader.feed import ACCESSES, Feed
from clipmill.loader.loader import Loader, WholeClips
from clipmill.loader.sampler import (
    Balanced,
    Mixed,
    Sampler,
    Sequential,
    Shuffled,
    Weighted,
    crop_places,
    draws,
    inverse_frequency,
    rank_positions,
    step_seed,
)
from clipmill.loader.streaming import NO_PROMISE, StreamLoader

__all__ = [
    "ACCESSES",
    "MAX_BAD",
    "NO_PROMISE",
    "SAMPLINGS",
    "Bad",
    "Balanced",
    "Batch",
    "Damage",
    "Digest",
    "Feed",
    "Loader",
    "Mixed",
    "Sampler",
    "Sequential",
    "Shuffled",
    "StreamLoader",
    "Weighted",
    "WholeClips",
    "check_bad",
    "choose_sampler",
    "crop_places",
    "draws",
    "inverse_frequency",
    "rank_positions",
    "step_seed",
]
