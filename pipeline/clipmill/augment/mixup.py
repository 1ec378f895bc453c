"""Mixup of clips, standard and modified: journal paper, Table 3.

The modified one is between-class learning (Tokozume, Ushiku and Harada, 2018): two clips
are mixed so that both are heard in the ratio of their labels, however loud they were
recorded. Loudness is the A-weighted sound pressure level of the loudest moment.

Each clip is given another one, commonly that of `partners`, and a ratio r; the papers
draw it from Beta(1, 1), which is uniform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

FLOOR_DB = -80.0
"""Loudness of silence, and the least that the A-weighting takes a frequency down to."""


def partners(u: Tensor) -> Tensor:
    """A partner for each clip of a batch, as a permutation: `[B]` float64 -> `[B]` int64.

    For u without ties every permutation is as likely; a clip may be its own partner.
    """
    return torch.argsort(u, stable=True)


def mix_standard(
    x: Tensor, targets: Tensor, other: Tensor, other_targets: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Standard mixup (Zhang et al. 2018): r x1 + (1 - r) x2, with the labels in the same ratio.

    Args:
        x: `[B, ...]` floating point.
        targets: `[B, C]` floating point.
        other: what each clip is mixed with, like `x`.
        other_targets: the labels of that, like `targets`.
        r: `[B]` floating point, 0 to 1: the share of `x`.

    Returns:
        Both mixed, in their own shapes and dtypes.
    """
    return _blend(x, other, r, 1.0 - r), _blend(targets, other_targets, r, 1.0 - r)


def mix_by_loudness(
    x: Tensor,
    targets: Tensor,
    gain_db: Tensor,
    other: Tensor,
    other_targets: Tensor,
    other_gain_db: Tensor,
    r: Tensor,
    *,
    add_energies: bool = True,
) -> tuple[Tensor, Tensor]:
    """Modified mixup: labels in the ratio r, signals so that they sound in that ratio.

    With p = 1 / (1 + 10^((G1 - G2) / 20) (1 - r) / r), the mix is
    (p x1 + (1 - p) x2) / sqrt(p^2 + (1 - p)^2): energies add, not amplitudes. A clip that
    meets itself becomes up to sqrt(2) louder, and peaks may pass 1.

    Without `add_energies` it is p x1 + (1 - p) x2, for log-mels in dB: they are levels, and the root
    would make a quiet clip of -60 dB one of -85. Type 4 of the journal paper's Table 3, "modified mixup
    on the log mel spectrogram", is taken to be this, with p of the waveforms' loudness; the paper
    gives no formula.

    Args:
        x: `[B, ...]` floating point.
        targets: `[B, C]` floating point.
        gain_db: `[B]` float32, the loudness G1 of each clip in dB, from `loudness_db`.
        other: what each clip is mixed with, like `x`.
        other_targets: the labels of that, like `targets`.
        other_gain_db: the loudness G2 of that, like `gain_db`.
        r: `[B]` floating point, 0 to 1: the share of `x`.
        add_energies: whether `x` is a signal, and not levels in dB.

    Returns:
        Both mixed, in their own shapes and dtypes.
    """
    louder = torch.pow(10.0, (gain_db - other_gain_db) / 20.0)
    # The paper's p with r multiplied through, so that r = 0 divides by nothing.
    p = r / (r + louder * (1.0 - r))
    norm = torch.sqrt(p.square() + (1.0 - p).square()) if add_energies else 1.0
    return _blend(x, other, p / norm, (1.0 - p) / norm), _blend(targets, other_targets, r, 1.0 - r)


def loudness_db(wave: Tensor, sample_rate: int) -> Tensor:
    """Loudness of the loudest moment of each clip, in dB: `[B, samples] -> [B]` float32.

    The A-weighted power of Hann windows of 93 ms that overlap by half, the most of them,
    no less than -80 dB (the gain G of between-class learning). Only windows that lie
    wholly inside the clip count; a shorter clip is padded with zeros to one window.

    Args:
        wave: `[B, samples]` floating point in -1..1.
        sample_rate: in Hz.
    """
    window, weight = _loudness_tables(sample_rate, wave.device)
    n_fft = window.shape[0]
    wave = functional.pad(wave.float(), (0, max(0, n_fft - wave.shape[1])))
    spectrum = torch.stft(wave, n_fft, n_fft // 2, window=window, center=False, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)  # [B, bins, windows]
    loudest = (power * weight[:, None]).sum(1).amax(1)
    return 10.0 * torch.log10(loudest.clamp(min=10.0 ** (FLOOR_DB / 10.0)))


def _loudness_tables(sample_rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window `[n_fft]` and A-weighting of power `[n_fft / 2 + 1]`, float32."""
    # The authors' sizes are 4096 at 44.1 kHz and 2048 at 16 kHz; the nearest power of two gives both.
    n_fft = 2 ** round(math.log2(sample_rate * 4096 / 44100))
    frequency_hz = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64, device=device)
    weight = torch.pow(10.0, a_weighting_db(frequency_hz) / 10.0)
    return torch.hann_window(n_fft, device=device), weight.float()


def a_weighting_db(frequency_hz: Tensor) -> Tensor:
    """A-weighting of frequencies in Hz, in dB: 0 at 1 kHz, no less than -80. Any shape, floating point."""
    f2 = frequency_hz.square()
    response = (
        12194.0**2 * f2.square()
        / ((f2 + 20.6**2) * (f2 + 12194.0**2) * torch.sqrt((f2 + 107.7**2) * (f2 + 737.9**2)))
    )  # fmt: skip
    return (2.0 + 20.0 * torch.log10(response)).clamp(min=FLOOR_DB)


def _blend(x: Tensor, other: Tensor, own_share: Tensor, other_share: Tensor) -> Tensor:
    """own_share x + other_share other, with the shares `[B]` applied clip by clip; shape and dtype of `x`."""
    shape = (-1, *[1] * (x.ndim - 1))
    return own_share.view(shape).to(x.dtype) * x + other_share.view(shape).to(x.dtype) * other
