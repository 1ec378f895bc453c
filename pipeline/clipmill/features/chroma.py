"""The chromagram: how much of each pitch class sounds, whatever the octave."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipmill.errors import FeatureError
from clipmill.features.feature import Feature, Framing
from clipmill.features.spectrum import PowerSpectrum, RealPowerSpectrum, product

A0_HZ = 27.5
WINDOW_S = 2048 / 22050
"""librosa's: 10.8 Hz from bin to bin, so that semitones from 181 Hz up are a bin apart."""
CENTRE_OCTAVE, OCTAVE_WIDTH = 5.0, 2.0
"""Octaves above A0 that weigh most, and the standard deviation of their Gaussian weights: librosa's."""


@dataclass(frozen=True)
class ChromaSettings:
    """All that determines a chromagram's numbers. What is left None follows from `sample_rate`.

    Attributes:
        sample_rate: of the waveform, in Hz.
        n_chroma: pitch classes in an octave, from C on; a multiple of 12.
        n_fft: samples of the Fourier transform and of its Hann window; by default the power of two that is nearest
            to 93 ms.
    """

    sample_rate: int = 44100
    n_chroma: int = 12
    n_fft: int | None = None

    def resolved(self) -> ChromaSettings:
        """The same with nothing left None; raises `FeatureError` where they cannot be."""
        rate = self.sample_rate
        Framing(rate)  # raises where a rate cannot be
        n_fft = 2 ** round(math.log2(WINDOW_S * rate)) if self.n_fft is None else self.n_fft
        if not 2 <= n_fft <= rate:
            raise FeatureError(f"n_fft is {n_fft}: allowed is 2 to the sample rate, {rate}")
        if self.n_chroma < 12 or self.n_chroma % 12:
            raise FeatureError(f"n_chroma is {self.n_chroma}: allowed are multiples of 12")
        return ChromaSettings(rate, self.n_chroma, n_fft)


class Chroma(Feature):
    """Chromagram: `[B, samples] -> [B, n_chroma, 128 * seconds]`, each frame as a share of its largest.

    `librosa.feature.chroma_stft(tuning=0)`: the power spectrum through `chroma_filters`, divided by the largest value
    of the frame. Frames of silence are 0.

    Takes the fields of `ChromaSettings` as keywords.

    Raises:
        FeatureError: settings that cannot be.
    """

    NAME = "chroma"
    VERSION = 1
    ABOUT = "Chromagram: power in each pitch class, as a share of the frame's largest."
    UNIT = "share"
    SETTINGS = ChromaSettings
    settings: ChromaSettings
    filters: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        s = self.settings
        assert s.n_fft is not None
        self.spectrum = PowerSpectrum(s.n_fft, s.n_fft, Framing(s.sample_rate).hop)
        filters = chroma_filters(s.sample_rate, s.n_fft, s.n_chroma).t()
        self.register_buffer("filters", filters.float().contiguous(), persistent=False)

    @property
    def bins(self) -> int:
        """Pitch classes."""
        return self.settings.n_chroma

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`."""

        framing, samples = Framing(self.settings.sample_rate), wave.shape[1]
        return self.spectrum(wave, framing.reach(samples), framing.frames(samples), self._shares)

    def _shares(self, power: Tensor) -> Tensor:
        return _shares(product(power, self.filters))

    def real(self) -> nn.Module:
        """`RealChroma`."""
        return RealChroma(self)


class RealChroma(nn.Module):
    """`Chroma` without complex numbers: `[B, samples] -> [B, n_chroma, frames]`, float32."""

    filters: Tensor

    def __init__(self, chroma: Chroma) -> None:
        super().__init__()
        n_fft = chroma.spectrum.n_fft
        self.spectrum = RealPowerSpectrum(chroma.settings.sample_rate, n_fft, n_fft)
        self.register_buffer("filters", chroma.filters, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """See the class; `wave` is floating point."""
        return self.spectrum(wave, lambda power: _shares(power @ self.filters))


def _shares(chroma: Tensor) -> Tensor:
    """Of the frame's largest, `[..., n_chroma]`; what is too small to be divided by stays as it is."""
    largest = chroma.amax(-1, keepdim=True)
    return chroma / torch.where(largest < torch.finfo(torch.float32).tiny, 1.0, largest)


def chroma_filters(sample_rate: int, n_fft: int, n_chroma: int) -> Tensor:
    """librosa's: which bins of a Fourier transform are of which pitch class: float64 `[n_chroma, n_fft // 2 + 1]`.

    A bin at pitch `p`, in pitch classes above A0, is of class `c` with `exp(-2 (d / w)^2)`, where `d` is how far `c` is
    from `p` around the octave and `w` how far the next bin is, or 1 where that is less. All a bin's classes together
    are divided by the root of their squares' sum, and weighted by the octave the bin is in.

    Args:
        sample_rate: in Hz.
        n_fft: samples of the Fourier transform.
        n_chroma: pitch classes in an octave; the first one is C.
    """
    hz = torch.arange(1, n_fft // 2 + 2, dtype=torch.float64, device="cpu") * (sample_rate / n_fft)
    pitch = n_chroma * torch.log2(hz / A0_HZ)
    # The bin of 0 Hz has none: it is placed an octave and a half under the next one.
    pitch = torch.cat([pitch[:1] - 1.5 * n_chroma, pitch])
    width = pitch.diff().clamp(min=1)
    pitch = pitch[:-1]
    apart = pitch - torch.arange(n_chroma, dtype=torch.float64, device="cpu")[:, None]
    half = round(n_chroma / 2)
    apart = torch.remainder(apart + half, n_chroma) - half
    filters = torch.exp(-2 * (apart / width) ** 2)
    filters = filters / filters.square().sum(0).sqrt()
    filters = filters * torch.exp(-0.5 * ((pitch / n_chroma - CENTRE_OCTAVE) / OCTAVE_WIDTH) ** 2)
    return filters.roll(-3 * (n_chroma // 12), 0)
