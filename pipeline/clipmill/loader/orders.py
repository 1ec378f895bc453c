"""Random numbers and orders that are computed, not stored: the same on every platform and with every NumPy.

All arithmetic is of 64-bit words that wrap around, which NumPy's arrays do, and its scalars warn of.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]

ROUNDS = 48
"""Of `permuted`, whose account says why so many."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_11, _27, _30, _31, _32 = map(np.uint64, (11, 27, 30, 31, 32))
_TOP = np.uint64(1 << 63)


def key(seed: int, *counts: ArrayLike) -> Words:
    """A hash of the seed and these non-negative integers, which are broadcast: uint64 `[k]`."""
    state = np.array([seed % 2**64], np.uint64)
    for count in counts:
        state = _mixed(state + _GOLDEN) ^ np.asarray(count).astype(np.uint64)
    return _mixed(state + _GOLDEN)


def uniform(keys: Words) -> NDArray[np.float64]:
    """Each key as a number from 0 to less than 1, in steps of 2**-53."""
    return (keys >> _11).astype(np.float64) * 2.0**-53


def permuted(keys: ArrayLike, places: NDArray[np.int64], n: ArrayLike) -> NDArray[np.int64]:
    """Where each key's shuffle of 0 to n - 1 puts these places: int64; for each key a bijection.

    The swap-or-not shuffle (Hoang, Morris and Rogaway, CRYPTO 2012): it works on any n and costs the same
    for each. A round pairs x with k - x (mod n) and swaps the two or not; k is the round's, and the choice
    the pair's. Each round halves how far one place is from uniform, and nearly so the whole order: the second
    eigenvalue of a round over all n! orders, worked out for n = 4, 5 and 6, is 1/2 + 1/(2n). `ROUNDS` of
    them leave a total variation of 1e-10 at most there. Chi-square tests over all orders of 3 to 5, and of
    1,000 clips' places, neighbours, inversions and fixed points, find fault with 12 rounds, and none with
    16 or more; nor with 24 or more of 2,084,320 clips.

    Args:
        keys: uint64 that look random, as those of `key`. All three are broadcast.
        places: 0 to n - 1.
        n: 1 to 2**32.
    """
    state, counts, x = (np.atleast_1d(values).astype(np.uint64) for values in (keys, n, places))
    for _ in range(ROUNDS):
        state = state + _GOLDEN
        words = _mixed(state)
        partners = ((words >> _32) * counts >> _32) - x
        partners = np.minimum(partners, partners + counts)  # mod n: what fell below 0 wrapped to near 2**64
        swapped = _mixed(np.maximum(x, partners) ^ words) >= _TOP
        x = np.where(swapped, partners, x)
    return x.astype(np.int64)


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): a bijection in which each bit depends on all."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)
