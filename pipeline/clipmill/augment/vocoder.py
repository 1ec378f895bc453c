"""A phase vocoder with a rate for each clip of a batch (Flanagan and Golden 1966; Dolson 1986).

The numbers are those of librosa: Hann windows, a hop of a quarter window, frames centred on their samples,
zeros beyond the edges. No loop over clips or frames: frames are gathered, and phases summed by one cumsum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

OVERLAP = 4
"""Windows that cover each sample. The tail of a clip is divided by what they sum to there, as in librosa."""

_TURN = 2**30
"""Phases are added up as whole parts of a turn: exact, however many, and in whatever order a GPU adds;
and the difference of two fits 32 bits."""


def window_samples(sample_rate: int) -> int:
    """Samples of the window: a power of two near 46 ms, 2048 at 44.1 kHz."""
    return 2 ** max(3, round(math.log2(sample_rate * 2048 / 44100)))


def frames_of(wave: Tensor, n_fft: int) -> Tensor:
    """Spectra `[B, samples // hop + 1, n_fft / 2 + 1]` complex64 of `wave` `[B, samples]` float32."""
    padded = functional.pad(wave, (n_fft // 2, n_fft // 2))
    windows = padded.unfold(1, n_fft, n_fft // OVERLAP)
    return torch.fft.rfft(windows * torch.hann_window(n_fft, device=wave.device))


def retime(spectra: Tensor, rates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The frames of each clip heard at its own rate.

    Output frame k stands at time t = k rate, in frames. Its magnitude is that of the frames floor(t) and
    floor(t) + 1, interpolated. From frame to frame its phase moves on by as much as from floor(t) to
    floor(t) + 1: librosa takes the advance that the bin's frequency makes one expect out of that, wraps
    the rest and puts the advance back, which changes whole turns alone.

    Args:
        spectra: `[B, frames, bins]` complex64, from `frames_of`.
        rates: `[B]` float64, above 0; 2 is twice as fast.
        count: how many frames to give.

    Returns:
        `[B, count, bins]` complex64, zero after a clip's end; and which frames stand before that, bool `[B, count]`.
    """
    clips, frames, _ = spectra.shape
    device = spectra.device
    # float64, as in librosa: a time that is off by a rounding is another pair of frames.
    times = torch.arange(count, device=device) * rates.double()[:, None]
    whole = times.floor()
    place = whole.clamp(max=frames).long()
    rows = torch.arange(clips, device=device)[:, None]

    # Two frames of zeros behind the end, for what is interpolated across it and what lies past it.
    levels = functional.pad(spectra.abs(), (0, 0, 0, 2))
    between = (times - whole).float()[..., None]
    levels = torch.lerp(levels[rows, place], levels[rows, place + 1], between)

    # A first frame of zeros, so that the first advance is the first frame's own phase.
    turns = (spectra.angle() * (_TURN / (2 * math.pi))).round().int()
    advances = functional.pad(turns, (0, 0, 1, 2)).diff(dim=1)
    turns = advances[rows, functional.pad(place[:, :-1] + 1, (1, 0))].cumsum(1, dtype=torch.int64)
    turns = turns & (_TURN - 1)
    return torch.polar(levels, turns.float() * (2 * math.pi / _TURN)), times < frames


def overlap_add(spectra: Tensor, live: Tensor, finer: int = 1) -> Tensor:
    """The waveform of windowed frames, sampled `finer` times as finely.

    Args:
        spectra: `[B, frames, bins]` complex64.
        live: which frames count, bool `[B, frames]`.
        finer: samples of the result for each sample of the clip.

    Returns:
        `[B, (frames + 3) hop finer]` float32. The clip begins half a window in: at n_fft / 2 * finer.
    """
    clips, frames, bins = spectra.shape
    n_fft = finer * 2 * (bins - 1)
    window = torch.hann_window(n_fft, device=spectra.device)
    pieces = torch.fft.irfft(spectra, n_fft).mul_(finer * window)
    pieces = pieces.view(clips, frames, OVERLAP, -1)
    squares = window.square().view(OVERLAP, -1)
    wave = pieces.new_zeros(clips, frames + OVERLAP - 1, n_fft // OVERLAP)
    total = torch.zeros_like(wave)
    counted = live[..., None].float()
    for quarter in range(OVERLAP):
        span = slice(quarter, quarter + frames)
        wave[:, span] += pieces[:, :, quarter]
        total[:, span].addcmul_(counted, squares[quarter])
    return wave.div_(total.clamp_(min=1e-8)).flatten(1)


def frame_count(samples: int, n_fft: int) -> int:
    """How many frames reach into the first `samples` samples."""
    return (samples - 1) // (n_fft // OVERLAP) + 1 + OVERLAP // 2
