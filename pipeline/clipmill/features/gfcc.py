"""Gammatone-frequency cepstral coefficients: the discrete cosine transform of the cube roots of a cochlea's powers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.functional import create_dct

from clipmill.errors import FeatureError
from clipmill.features.feature import Feature, Framing
from clipmill.features.spectrum import PowerSpectrum, RealPowerSpectrum, product

EAR_Q, MIN_BANDWIDTH_HZ = 9.26449, 24.7
"""A filter's equivalent rectangular bandwidth is `f / EAR_Q + MIN_BANDWIDTH_HZ` (Glasberg and Moore 1990)."""


@dataclass(frozen=True)
class GfccSettings:
    """All that determines GFCCs' numbers. What is left None follows from the others.

    Attributes:
        sample_rate: of the waveform, in Hz.
        n_gfcc: number of coefficients, from the 0th on.
        n_filters: number of gammatone filters.
        win_length: samples of the Hann window; by default 4 hops, as the log-mel's.
        n_fft: samples of the Fourier transform; by default the power of two, at least `win_length`, that gives the
            lowest filter's bandwidth two bins.
        f_min: centre of the lowest filter, in Hz.
        f_max: where the next filter above the highest one would be centred, in Hz; capped at half the sample rate,
            and kept here as capped.
    """

    sample_rate: int = 44100
    n_gfcc: int = 64
    n_filters: int = 128
    win_length: int | None = None
    n_fft: int | None = None
    f_min: float = 50.0
    f_max: float = 14000.0

    def resolved(self) -> GfccSettings:
        """The same with nothing left None and `f_max` capped; raises `FeatureError` where they cannot be."""
        rate = self.sample_rate
        win_length = 4 * Framing(rate).hop if self.win_length is None else self.win_length
        f_max = min(float(self.f_max), rate / 2)
        if not 0 <= self.f_min < f_max:
            raise FeatureError(f"f_min is {self.f_min} Hz: allowed is 0 up to f_max, which is {f_max} Hz")
        n_fft = self.n_fft
        if n_fft is None:
            least = max(win_length, 2 * rate / (self.f_min / EAR_Q + MIN_BANDWIDTH_HZ))
            n_fft = 2 ** math.ceil(math.log2(least))
        if not 2 <= win_length <= n_fft <= rate:
            raise FeatureError(
                f"win_length is {win_length} and n_fft {n_fft}: allowed is 2 <= win_length <= n_fft <= {rate}"
            )
        if not 1 <= self.n_gfcc <= self.n_filters:
            raise FeatureError(
                f"n_gfcc is {self.n_gfcc}: allowed is 1 to n_filters, which is {self.n_filters}"
            )
        return GfccSettings(rate, self.n_gfcc, self.n_filters, win_length, n_fft, float(self.f_min), f_max)


class Gfcc(Feature):
    """Gammatone-frequency cepstral coefficients: `[B, samples] -> [B, n_gfcc, 128 * seconds]`.

    The orthonormal DCT-II, along the filters, of the cube root of the power in each; no pre-emphasis, no lifter. The
    power spectrum is divided by `n_fft`, and weighted by the filters' amplitude responses, as spafe and Ellis do it.

    Takes the fields of `GfccSettings` as keywords.

    Raises:
        FeatureError: settings that cannot be.
    """

    NAME = "gfcc"
    VERSION = 1
    ABOUT = (
        "Gammatone-frequency cepstral coefficients: DCT of the cube roots of the powers in gammatone filters."
    )
    UNIT = "cube root of power"
    SETTINGS = GfccSettings
    settings: GfccSettings
    filters: Tensor
    dct: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        s = self.settings
        assert s.n_fft is not None
        assert s.win_length is not None
        self.spectrum = PowerSpectrum(s.n_fft, s.win_length, Framing(s.sample_rate).hop)
        filters = gammatone_filters(s.sample_rate, s.n_fft, s.n_filters, s.f_min, s.f_max)
        self.register_buffer("filters", (filters.t() / s.n_fft).float().contiguous(), persistent=False)
        dct = create_dct(s.n_gfcc, s.n_filters, "ortho")
        self.register_buffer("dct", dct, persistent=False)

    @property
    def bins(self) -> int:
        """Coefficients."""
        return self.settings.n_gfcc

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`."""
        framing, samples = Framing(self.settings.sample_rate), wave.shape[1]
        return self.spectrum(wave, framing.reach(samples), framing.frames(samples), self._cepstrum)

    def _cepstrum(self, power: Tensor) -> Tensor:
        return product(_cube_root(product(power, self.filters)), self.dct)

    def real(self) -> nn.Module:
        """`RealGfcc`."""
        return RealGfcc(self)


class RealGfcc(nn.Module):
    """`Gfcc` without complex numbers: `[B, samples] -> [B, n_gfcc, frames]`, float32."""

    filters: Tensor
    dct: Tensor

    def __init__(self, gfcc: Gfcc) -> None:
        super().__init__()
        spectrum = gfcc.spectrum
        self.spectrum = RealPowerSpectrum(gfcc.settings.sample_rate, spectrum.n_fft, spectrum.win_length)
        self.register_buffer("filters", gfcc.filters, persistent=False)
        self.register_buffer("dct", gfcc.dct, persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """See the class; `wave` is floating point."""
        return self.spectrum(wave, lambda power: _cube_root(power @ self.filters) @ self.dct)


def _cube_root(power: Tensor) -> Tensor:
    # Not `pow`, which torch computes otherwise at the ends of what a thread is given.
    return torch.exp(torch.log(power) / 3)


def gammatone_filters(sample_rate: int, n_fft: int, n_filters: int, f_min: float, f_max: float) -> Tensor:
    """Amplitude responses of gammatone filters of the 4th order: float64 `[n_filters, n_fft // 2 + 1]`.

    Slaney (1993, Apple technical report 35) gives each as four digital filters of the 2nd order, with centres evenly
    apart on the ERB scale; Ellis (2009, "Gammatone-like spectrograms") takes their responses at the bins of a Fourier
    transform. Each is 1 at its own centre.

    Args:
        sample_rate: in Hz.
        n_fft: samples of the Fourier transform.
        n_filters: number of filters.
        f_min: centre of the lowest one, in Hz.
        f_max: where the next one above the highest one would be centred, in Hz.
    """
    offset = EAR_Q * MIN_BANDWIDTH_HZ
    steps = torch.arange(n_filters, 0, -1, dtype=torch.float64, device="cpu") / n_filters
    centres = (f_max + offset) * ((f_min + offset) / (f_max + offset)) ** steps - offset
    bandwidths = 1.019 * 2 * math.pi * (centres / EAR_Q + MIN_BANDWIDTH_HZ)
    angles = 2 * math.pi * centres / sample_rate
    radius = torch.exp(-bandwidths / sample_rate)
    wide, narrow = math.sqrt(3 + 2**1.5), math.sqrt(3 - 2**1.5)
    slopes = torch.tensor([wide, -wide, narrow, -narrow], dtype=torch.float64, device="cpu")[:, None]
    zeros = radius * (angles.cos() + slopes * angles.sin())  # [4, filters]
    poles = torch.polar(radius, angles)

    def response(z: Tensor) -> Tensor:
        above = (z - zeros[..., None]).abs().prod(0)
        return above / ((z - poles[:, None]) * (z - poles.conj()[:, None])).abs() ** 4

    bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64, device="cpu") * (2 * math.pi / n_fft)
    of_bins = response(torch.polar(torch.ones_like(bins), bins))
    return of_bins / response(torch.polar(torch.ones_like(angles), angles)[:, None])
