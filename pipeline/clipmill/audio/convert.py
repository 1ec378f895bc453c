"""Rate, length and sample format: the arithmetic between a decoder and an encoder."""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray


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
        result = np.pad(result, (0, count - len(result)))
    return result[:count]


def to_int16(samples: NDArray[np.float32]) -> NDArray[np.int16]:
    """float32 in -1..1 to int16, rounded to nearest and clipped; the exact inverse of int16 / 32768."""
    return np.clip(np.rint(samples * np.float32(32768.0)), -32768, 32767).astype("<i2")


def pad_to_seconds(samples: NDArray[np.int16], rate: int) -> NDArray[np.int16]:
    """Append zeros up to the next whole second (ERANN 3.1); at least one second."""
    seconds = max(-(-len(samples) // rate), 1)
    return np.pad(samples, (0, seconds * rate - len(samples)))
