"""What is measured of every clip, before padding, for the index's quality columns."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

SILENCE_DB = -120.0
"""What a level of nothing is written as: under the 16-bit floor of about -96 dB, and a finite number."""

_BLOCK_S = 0.4  # ITU-R BS.1770's gating block: shorter clips have no integrated loudness


def measure(samples: NDArray[np.int16], rate: int) -> dict[str, float | None]:
    """Peak and RMS in dB re full scale, and integrated loudness in LUFS (ITU-R BS.1770-4, by pyloudnorm).

    Loudness is None under 0.4 s and where everything is below the -70 LUFS gate.
    """
    wave = samples.astype(np.float64) / 32768.0
    peak = float(np.abs(wave).max()) if len(wave) else 0.0
    rms = math.sqrt(float(np.dot(wave, wave)) / len(wave)) if len(wave) else 0.0
    return {"peak_db": _db(peak), "rms_db": _db(rms), "loudness_lufs": _loudness(wave, rate)}


def _loudness(wave: NDArray[np.float64], rate: int) -> float | None:
    if len(wave) < _BLOCK_S * rate:
        return None
    # A level of nothing is log10(0) inside: it comes back as -inf, and that is what is wanted.
    with np.errstate(divide="ignore", invalid="ignore"):
        loudness = float(_meter(rate).integrated_loudness(wave))
    return loudness if math.isfinite(loudness) else None


@lru_cache(maxsize=8)
def _meter(rate: int) -> Any:
    import pyloudnorm

    return pyloudnorm.Meter(rate)


def _db(amplitude: float) -> float:
    return max(20.0 * math.log10(amplitude), SILENCE_DB) if amplitude > 0 else SILENCE_DB
