"""What is measured of every clip, before padding, for the index's quality columns.

Every clip pays for this beside its codecs, so each measure is a few passes of numpy over the samples, and the
loudness filter runs as products of matrices: 0.8 ms in all for five seconds at 44.1 kHz on one core.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SILENCE_DB = -120.0
"""What a level of nothing is written as: under the 16-bit floor of about -96 dB, and a finite number."""

_FULL_SCALE = 32768
_SILENT_S = 0.02
_AUDIBLE = 33  # the least sample that reaches -60 dB re full scale (32.8)

_WINDOW, _WINDOWS = 1024, 64  # samples in a window of the spectrum, and the most of them
_ROUNDING_POWER = 1 / 12  # of the error of rounding to whole samples
_ABOVE_ROUNDING = 10.0  # 10 dB, as a ratio of powers

_GATE_S, _GATE_STEP = 0.4, 0.25  # ITU-R BS.1770's gating block, and its step as a share of it
_OFFSET_LUFS, _ABSOLUTE_LUFS, _RELATIVE_LU = -0.691, -70.0, -10.0
_SHELF_HZ, _SHELF_DB, _SHELF_Q = 1500.0, 4.0, math.sqrt(0.5)
_HIGH_PASS_HZ, _HIGH_PASS_Q = 38.0, 0.5
_AT_ONCE = 1 << 20  # samples: of clips of hours, only so many are in memory as floats
_SETTLED = 1 << 14  # samples after which a filter that started late gives the same
_BLOCK = 32  # samples filtered by one product
_GROUP = 16  # blocks whose states are found by one product
_FORGOTTEN = 1e-12  # the share of a filter's state that no longer counts


def measure(samples: NDArray[np.int16], rate: int) -> dict[str, float | None]:
    """The quality columns of int16 mono `[samples]` at `rate` Hz.

    peak_db, rms_db: in dB re full scale; -120 where there is nothing.
    loudness_lufs: integrated loudness by ITU-R BS.1770-4, to 0.01. None under 0.4 s, where everything is below the
        -70 LUFS gate, and at rates of 3 kHz and less, which cannot hold the filter.
    dc: the mean of the samples, full scale = 1.
    clipped: the share (0..1) of samples at the top or the bottom of the scale, in runs of two and more: a lone one
        is the peak of a clip that was made as loud as can be.
    silent: the share (0..1) of the clip in 20 ms windows in which no sample reaches -60 dB re full scale.
    bandwidth_hz: the highest frequency at which the mean power spectrum stands 10 dB or more above the noise of
        rounding to 16 bits (power 1/12, spread evenly up to rate / 2); 0 where it does nowhere. The mean is over
        at most 64 Hann windows of 1024 samples, spread evenly over what is not silent.
    """
    total = square = 0.0
    for first in range(0, len(samples), _AT_ONCE):
        # Integers in float64: their sum and the sum of their squares are exact, in any order, on any processor.
        wave = samples[first : first + _AT_ONCE].astype(np.float64)
        total, square = total + float(wave.sum()), square + float(wave @ wave)
    count = max(len(samples), 1)
    windows = _Windows.of(samples, max(round(_SILENT_S * rate), 1))
    peak = int(windows.peaks.max(initial=0))
    return {
        "peak_db": _db(peak / _FULL_SCALE),
        "rms_db": _db(math.sqrt(square / count) / _FULL_SCALE),
        "loudness_lufs": _loudness(samples, rate),
        "dc": total / count / _FULL_SCALE,
        "clipped": _at_the_rails(samples) / count if peak >= _FULL_SCALE - 1 else 0.0,
        "silent": int(windows.lengths[windows.peaks < _AUDIBLE].sum()) / count,
        "bandwidth_hz": _bandwidth(samples, rate, windows),
    }


def _db(amplitude: float) -> float:
    return max(20.0 * math.log10(amplitude), SILENCE_DB) if amplitude > 0 else SILENCE_DB


@dataclass(frozen=True)
class _Windows:
    """A clip in windows that follow each other, `[windows]` each: largest magnitudes and lengths in samples."""

    peaks: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, samples: NDArray[np.int16], length: int) -> _Windows:
        """In windows of `length` samples; the last may be shorter."""
        whole = len(samples) - len(samples) % length
        parts = [samples[:whole].reshape(-1, length), samples[None, whole:]]
        # The magnitude of -32768 is no int16.
        peaks = [
            np.maximum(part.max(axis=1).astype(np.int64), -part.min(axis=1).astype(np.int64))
            for part in parts
            if part.size
        ]
        lengths = [np.full(len(part), part.shape[1]) for part in parts if part.size]
        none = np.zeros(0, np.int64)
        return cls(np.concatenate([none, *peaks]), np.concatenate([none, *lengths]))


def _at_the_rails(samples: NDArray[np.int16]) -> int:
    """How many samples stand at the top or bottom of the scale beside another at the same end."""
    count = 0
    for rail in (_FULL_SCALE - 1, -_FULL_SCALE):
        at = samples == rail
        pairs = at[1:] & at[:-1]
        # A run of n has n - 1 pairs; runs are counted by the pairs that none precedes.
        count += int(pairs.sum() + (pairs[1:] & ~pairs[:-1]).sum() + pairs[:1].sum())
    return count


def _bandwidth(samples: NDArray[np.int16], rate: int, windows: _Windows) -> float:
    if not len(samples):
        return 0.0
    length = min(_WINDOW, len(samples))
    middles = np.cumsum(windows.lengths) - windows.lengths // 2
    audible = windows.peaks >= _AUDIBLE
    middles = middles[audible] if audible.any() else middles
    middles = middles[np.linspace(0, len(middles) - 1, min(len(middles), _WINDOWS)).astype(np.int64)]
    starts = np.clip(middles - length // 2, 0, len(samples) - length)
    hann = _hann(length)
    cut = np.lib.stride_tricks.sliding_window_view(samples, length)[starts] * hann
    spectrum = np.fft.rfft(cut, _WINDOW)
    power = (np.square(spectrum.real) + np.square(spectrum.imag)).mean(axis=0)
    above = np.flatnonzero(power >= _ABOVE_ROUNDING * _ROUNDING_POWER * float(hann @ hann))
    return float(above[-1]) * rate / _WINDOW if len(above) else 0.0


@lru_cache(maxsize=4)
def _hann(length: int) -> NDArray[np.float32]:
    return (np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2).astype(np.float32)


def _loudness(samples: NDArray[np.int16], rate: int) -> float | None:
    """Integrated loudness in LUFS by ITU-R BS.1770-4, of one channel: K-weighting, then both gates."""
    count = len(samples)
    if count < _GATE_S * rate or rate <= 2 * _SHELF_HZ:
        return None
    # Of blocks of 400 ms, one every 100 ms; the last reaches up to 50 ms past the end, where there is nothing.
    steps = np.arange(round((count / rate - _GATE_S) / (_GATE_S * _GATE_STEP)) + 1) * _GATE_STEP
    first = (_GATE_S * steps * rate).astype(np.int64)
    last = np.minimum((_GATE_S * (steps + 1) * rate).astype(np.int64), count)
    edges = np.unique(np.concatenate([first, last]))
    energy = np.cumsum([0.0, *_energies(samples, rate, edges.tolist())])
    power = energy[np.searchsorted(edges, last)] - energy[np.searchsorted(edges, first)]
    power /= _GATE_S * rate * _FULL_SCALE**2
    power = power[power >= _power_of(_ABSOLUTE_LUFS)]
    if not len(power):
        return None
    power = power[power > power.mean() * 10 ** (_RELATIVE_LU / 10)]
    return round(_OFFSET_LUFS + 10 * math.log10(power.mean()), 2)


def _energies(samples: NDArray[np.int16], rate: int, edges: list[int]) -> Iterator[float]:
    """The K-weighted energy between each edge and the next."""
    weighted, origin, done = np.zeros(0, np.float32), 0, 0
    for start, end in pairwise(edges):
        if end > done:
            origin, done = max(start - _SETTLED, 0), max(start + _AT_ONCE, end)
            weighted = _k_weighted(samples[origin:done], rate)
        part = weighted[start - origin : end - origin]
        yield float(part @ part)


def _power_of(lufs: float) -> float:
    return float(10 ** ((lufs - _OFFSET_LUFS) / 10))


def _k_weighted(samples: NDArray[np.int16], rate: int) -> NDArray[np.float32]:
    """int16 `[samples]` through BS.1770's K-weighting, as float32 on the same scale, up to the next whole block.

    A recursive filter in blocks. What a block gives is its own samples through a matrix (the impulse response),
    plus what the state at its start still sounds like. A state is what the block before fed in, plus what is left
    of the state before that; this recursion runs over groups of blocks, by doubling the reach at each step.
    """
    filters = _filters(rate)
    groups = -(-len(samples) // (_BLOCK * _GROUP))
    blocks = -(-len(samples) // _BLOCK)
    wave = np.zeros((blocks, _BLOCK), np.float32)
    wave.reshape(-1)[: len(samples)] = samples
    fed = np.zeros((groups * _GROUP, 4), np.float32)
    np.matmul(wave, filters.feed, out=fed[:blocks])
    fed = fed.reshape(groups, _GROUP * 4)
    starts = np.zeros((groups, 4), np.float32)  # the state at the start of each group
    starts[1:] = fed[:-1] @ filters.to_next_group
    for step, decay in enumerate(filters.decays):
        starts[1 << step :] += starts[: -(1 << step)] @ decay
    states = fed @ filters.to_blocks + starts @ filters.from_start
    weighted = wave @ filters.response
    weighted += states.reshape(-1, 4)[:blocks] @ filters.ringing
    return weighted.reshape(-1)


@dataclass(frozen=True)
class _Filters:
    """The K-weighting at one rate, as the float32 matrices of `_k_weighted`."""

    response: NDArray[np.float32]  # [block, block]: samples -> output
    ringing: NDArray[np.float32]  # [4, block]: state at the start -> output
    feed: NDArray[np.float32]  # [block, 4]: samples -> state at the end
    to_blocks: NDArray[
        np.float32
    ]  # [group * 4, group * 4]: what each block fed in -> states at the blocks' starts
    to_next_group: NDArray[np.float32]  # [group * 4, 4]: the same -> state at the group's end
    from_start: NDArray[
        np.float32
    ]  # [4, group * 4]: state at the group's start -> states at the blocks' starts
    decays: list[
        NDArray[np.float32]
    ]  # [4, 4] each: state -> state after 1, 2, 4 ... groups, until it is nothing


@lru_cache(maxsize=8)
def _filters(rate: int) -> _Filters:
    a, b, c, d = _k_weighting(rate)
    power = np.linalg.matrix_power
    block = power(a, _BLOCK)
    response = np.zeros((_BLOCK, _BLOCK))
    impulse = [d, *(c @ power(a, k) @ b for k in range(_BLOCK - 1))]
    for row in range(_BLOCK):
        response[row, row:] = impulse[: _BLOCK - row]
    to_blocks = np.zeros((_GROUP, 4, _GROUP + 1, 4))
    for source in range(_GROUP):
        for target in range(source + 1, _GROUP + 1):
            to_blocks[source, :, target] = power(block, target - source - 1).T
    decays = [power(block, _GROUP).T]
    while np.abs(decays[-1]).max() > _FORGOTTEN:
        decays.append(decays[-1] @ decays[-1])
    return _Filters(
        response=response.astype(np.float32),
        ringing=np.stack([c @ power(a, k) for k in range(_BLOCK)], axis=1).astype(np.float32),
        feed=np.stack([power(a, _BLOCK - 1 - k) @ b for k in range(_BLOCK)]).astype(np.float32),
        to_blocks=to_blocks[:, :, :_GROUP].reshape(_GROUP * 4, _GROUP * 4).astype(np.float32),
        to_next_group=to_blocks[:, :, _GROUP].reshape(_GROUP * 4, 4).astype(np.float32),
        from_start=np.concatenate([power(block, k).T for k in range(_GROUP)], axis=1).astype(np.float32),
        decays=[decay.astype(np.float32) for decay in decays],
    )


def _k_weighting(rate: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """The K-weighting at `rate` Hz as a system of four states: s' = a s + b x, y = c s + d x.

    Two second-order filters by the formulae of R. Bristow-Johnson, as pyloudnorm has them for any rate, one after
    the other: a shelf for the head, and the high-pass "RLB". The states are such that white noise moves all four
    alike: with the high-pass's double pole next to 1, float32 would not do otherwise.
    """
    gain = 10 ** (_SHELF_DB / 40)
    w = 2 * math.pi * _SHELF_HZ / rate
    cos, slope = math.cos(w), 2 * math.sqrt(gain) * math.sin(w) / (2 * _SHELF_Q)
    up, down = gain + 1, gain - 1
    a1, b1, c1, d1 = _second_order(
        [gain * (up + down * cos + slope), -2 * gain * (down + up * cos), gain * (up + down * cos - slope)],
        [up - down * cos + slope, 2 * (down - up * cos), up - down * cos - slope],
    )
    w = 2 * math.pi * _HIGH_PASS_HZ / rate
    cos, alpha = math.cos(w), math.sin(w) / (2 * _HIGH_PASS_Q)
    a2, b2, c2, d2 = _second_order(
        [(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], [1 + alpha, -2 * cos, 1 - alpha]
    )
    a = np.block([[a1, np.zeros((2, 2))], [np.outer(b2, c1), a2]])
    b = np.concatenate([b1, b2 * d1])
    c = np.concatenate([d2 * c1, c2])
    # The states that an impulse passes through, [4, time]; their QR factor is the change of basis.
    passed, later = b[:, None], a
    while np.abs(later).max() > _FORGOTTEN:
        passed, later = np.concatenate([passed, later @ passed], axis=1), later @ later
    basis = np.asarray(np.linalg.qr(passed.T, mode="r")).T
    return np.linalg.solve(basis, a @ basis), np.linalg.solve(basis, b), c @ basis, d1 * d2


def _second_order(
    numerator: list[float], denominator: list[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """A second-order filter as a system of two states (transposed direct form II)."""
    b0, b1, b2 = (value / denominator[0] for value in numerator)
    _, a1, a2 = (value / denominator[0] for value in denominator)
    return (
        np.array([[-a1, 1.0], [-a2, 0.0]]),
        np.array([b1 - a1 * b0, b2 - a2 * b0]),
        np.array([1.0, 0.0]),
        b0,
    )
