"""Rate, length and sample format: the arithmetic between a decoder and an encoder."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import soxr
from numpy.typing import NDArray

_BLOCK = 1 << 20  # samples
Sample = TypeVar("Sample", np.int16, np.float32)


def resample(samples: NDArray[np.float32], rate_from: int, rate_to: int) -> NDArray[np.float32]:
    """Resample `[samples]` from one rate to another (Hz) by soxr's HQ recipe.

    The result has exactly ceil(samples * rate_to / rate_from) samples, so that a clip
    of whole seconds stays one: soxr's own count can differ by one.
    """
    if rate_from == rate_to:
        return samples
    count = -(-len(samples) * rate_to // rate_from)
    result: NDArray[np.float32] = soxr.resample(samples, rate_from, rate_to, quality="HQ")
    if len(result) < count:
        result = _with_zeros(result, count)
    return result[:count]


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """float32 in -1..1 to int16, rounded to nearest and clipped; the exact inverse of int16 / 32768."""
    result = np.empty(len(samples), "<i2")
    for start in range(0, len(samples), _BLOCK):  # a copy of an hour as float32 would be 600 MB
        scaled = samples[start : start + _BLOCK] * np.float32(32768.0)
        np.rint(scaled, out=scaled)
        np.clip(scaled, -32768, 32767, out=scaled)
        result[start : start + _BLOCK] = scaled
    return result


def pad_to_seconds(samples: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    """Append zeros up to the next whole second (ERANN 3.1), at least one; the same array where none are needed."""
    count = max(-(-len(samples) // rate), 1) * rate
    return samples if len(samples) == count else _with_zeros(samples, count)


def _with_zeros(samples: NDArray[Sample], count: int) -> NDArray[Sample]:
    """`[samples]` with zeros at its end, `[count]`."""
    padded = np.zeros(count, samples.dtype)
    padded[: len(samples)] = samples
    return padded
