"""Which clip stands where in training: pure functions of (seed, position), so a run's state is one integer.

Positions count from 0 over all epochs; epoch e holds the positions e * n to (e + 1) * n - 1,
each clip once. Step s takes the positions s * batch_size to (s + 1) * batch_size - 1: a batch
may straddle two epochs, so no clip is ever dropped and no batch is ever short.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_ORDER, _NOISE = 0, 1
"""What a random stream is for: streams of different uses never meet, whatever their seed and count."""


@lru_cache(maxsize=2)
def epoch_permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of `n` clips in one epoch: int64 `[n]`, read-only.

    A stable sort of raw Philox words rather than `Generator.permutation`: NumPy promises that
    its bit generators keep their streams from version to version, and not that its
    distributions do. 2 M clips take a second; the two epochs that a batch can straddle are kept.
    """
    words = np.random.Philox(np.random.SeedSequence([_ORDER, seed, epoch])).random_raw(n)
    order = np.argsort(words, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def rows_at(seed: int, positions: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The clips, of 0 to n - 1, that stand at these global positions: int64, as long as `positions`."""
    epochs, places = np.divmod(positions, n)
    rows = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        rows[here] = epoch_permutation(seed, int(epoch), n)[places[here]]
    return rows


def step_rows(seed: int, step: int, batch_size: int, n: int) -> NDArray[np.int64]:
    """The clips of one training step: int64 `[batch_size]`."""
    return rows_at(seed, np.arange(step * batch_size, (step + 1) * batch_size), n)


def step_seed(seed: int, step: int) -> int:
    """Seed of everything random in one step (crop, mix, mask, dropout): 0 to 2**63 - 1."""
    words = np.random.SeedSequence([_NOISE, seed, step]).generate_state(1, np.uint64)
    return int(words[0]) >> 1
