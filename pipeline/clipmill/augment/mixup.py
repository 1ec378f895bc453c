"""Mixup of clips, standard and modified: journal paper, Table 3.

The modified one is between-class learning (Tokozume, Ushiku and Harada, 2018): two clips
are mixed so that both are heard in the ratio of their labels, however loud they were
recorded. Loudness is the A-weighted sound pressure level of the loudest moment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

FLOOR_DB = -80.0
"""Loudness of silence, and the least that the A-weighting takes a frequency down to."""


def mix_standard(x: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard mixup: r x1 + (1 - r) x2, with the labels in the same ratio, r ~ Beta(1, 1).

    Args:
        x: `[B, ...]` floating point.
        targets: `[B, C]` floating point.
        generator: on the device of `x`.

    Returns:
        Both mixed, in their own shapes and dtypes. Partners are a random permutation of
        the batch, so a clip may meet itself and stay as it is.
    """
    partner, r = _draw(x, generator)
    return _blend(x, partner, r, 1.0 - r), _blend(targets, partner, r, 1.0 - r)


def mix_between_class(
    wave: Tensor, targets: Tensor, sample_rate: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Modified mixup: labels in the ratio r ~ Beta(1, 1), signals so that they sound in that ratio.

    Args:
        wave: `[B, samples]` float32 in -1..1.
        targets: `[B, C]` floating point.
        sample_rate: of the waveforms, in Hz.
        generator: on the device of `wave`.

    Returns:
        Both mixed, in their own shapes and dtypes; see `mix_by_loudness`.
    """
    return mix_by_loudness(wave, targets, loudness_db(wave, sample_rate), generator)


def mix_by_loudness(
    x: Tensor, targets: Tensor, gain_db: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Between-class mixing of any signals whose loudness is known.

    With p = 1 / (1 + 10^((G1 - G2) / 20) (1 - r) / r), the mix is
    (p x1 + (1 - p) x2) / sqrt(p^2 + (1 - p)^2): energies add, not amplitudes. A clip that
    meets itself becomes up to sqrt(2) louder, and peaks may pass 1.

    Args:
        x: `[B, ...]` floating point.
        targets: `[B, C]` floating point.
        gain_db: `[B]` float32, the loudness G of each clip in dB, from `loudness_db`.
        generator: on the device of `x`.

    Returns:
        Both mixed, in their own shapes and dtypes.
    """
    partner, r = _draw(x, generator)
    louder = torch.pow(10.0, (gain_db - gain_db[partner]) / 20.0)
    # The paper's p with r multiplied through, so that r = 0 divides by nothing.
    p = r / (r + louder * (1.0 - r))
    norm = torch.sqrt(p.square() + (1.0 - p).square())
    mixed = _blend(x, partner, p / norm, (1.0 - p) / norm)
    return mixed, _blend(targets, partner, r, 1.0 - r)


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


def _draw(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A partner `[B]` int64 and a ratio r `[B]` float32 for each clip; Beta(1, 1) is uniform."""
    partner = torch.randperm(x.shape[0], generator=generator, device=x.device)
    return partner, torch.rand(x.shape[0], generator=generator, device=x.device)


def _blend(x: Tensor, partner: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """own x + other x[partner], with the weights `[B]` applied clip by clip; shape and dtype of `x`."""
    shape = (-1, *[1] * (x.ndim - 1))
    return own.view(shape).to(x.dtype) * x + other.view(shape).to(x.dtype) * x[partner]
