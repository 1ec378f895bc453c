"""The constant-Q transform: how loud each note is, every one heard through a window of as many of its own periods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipmill.errors import FeatureError
from clipmill.features.feature import FRAMES_PER_S, LEAST_POWER, Feature, Framing, check_floor
from clipmill.features.spectrum import in_parts, real_padded
from clipmill_models.base import without_autocast

HANN_BANDWIDTH = 1.5
"""Of a Hann window's spectrum, in parts of 1 / its length."""

LONGEST_S = 4.0
"""A filter may last. What is computed for a second of sound reaches as far to either side of it as half the longest."""

NEGLIGIBLE = 1e-7
"""Of a filter's spectrum, as a share of its peak: -140 dB, where float32 ends."""

LEAST_ROWS = 64
"""Of the spectrum that are multiplied at once: torch has another way for smaller products, which rounds otherwise."""


@dataclass(frozen=True)
class CqtSettings:
    """All that determines a constant-Q transform's numbers. What is left None follows from the others.

    Attributes:
        sample_rate: of the waveform, in Hz.
        f_min: centre of the lowest bin, in Hz; by default C1.
        n_bins: number of bins; by default as many whole octaves as fit under half the sample rate.
        bins_per_octave: of them to each doubling of the frequency.
        floor: magnitude below which values are cut off, so that silence is finite.
    """

    sample_rate: int = 44100
    f_min: float = 32.70319566257483
    n_bins: int | None = None
    bins_per_octave: int = 12
    floor: float = 1e-5

    @property
    def quality(self) -> float:
        """Periods of its own frequency in each filter, Q: librosa's."""
        apart = 2 ** (2 / self.bins_per_octave)
        return (apart + 1) / (apart - 1)

    @property
    def frequencies(self) -> Tensor:
        """Of the bins' centres, in Hz: float64 `[n_bins]`."""
        assert self.n_bins is not None
        steps = torch.arange(self.n_bins, dtype=torch.float64, device="cpu")
        return self.f_min * 2 ** (steps / self.bins_per_octave)

    @property
    def halves(self) -> Tensor:
        """Samples of half of each filter, in whole ones: int64 `[n_bins]`."""
        return (self.quality * self.sample_rate / self.frequencies / 2).long()

    def resolved(self) -> CqtSettings:
        """The same with nothing left None; raises `FeatureError` where they cannot be."""
        rate, per_octave = self.sample_rate, self.bins_per_octave
        Framing(rate)  # raises where a rate cannot be
        if per_octave < 1:
            raise FeatureError(f"bins_per_octave is {per_octave}: must be above 0")
        check_floor(self.floor, math.sqrt(LEAST_POWER))
        if not self.f_min > 0 or self.quality / self.f_min > LONGEST_S:
            raise FeatureError(
                f"f_min is {self.f_min} Hz: allowed is {self.quality / LONGEST_S:.1f} Hz and more where "
                f"bins_per_octave is {per_octave}, for filters of up to {LONGEST_S:.0f} s"
            )
        # The highest centre whose filter ends under the Nyquist frequency.
        highest = rate / 2 / (1 + HANN_BANDWIDTH / 2 / self.quality)
        most = math.floor(per_octave * math.log2(highest / self.f_min)) + 1
        n_bins = most // per_octave * per_octave if self.n_bins is None else self.n_bins
        if not 1 <= n_bins <= most:
            raise FeatureError(
                f"n_bins is {n_bins}: allowed is 1 to {max(most, 0)}, which fit between f_min, {self.f_min} Hz, "
                f"and half of {rate} Hz"
            )
        return CqtSettings(rate, float(self.f_min), n_bins, per_octave, self.floor)


class Cqt(Feature):
    """Constant-Q transform in dB: `[B, samples] -> [B, n_bins, 128 * seconds]`; `20 log10 max(|C|, floor)`.

    `librosa.cqt(tuning=0, sparsity=0)`: a bin's filter is a Hann window of `quality` periods, divided by the sum of its
    values, times a complex sinusoid; what comes out is multiplied by the root of its length. Around the waveform is
    silence.

    The filters run over stretches of `size` hops, which give the 128 frames of one second each and reach `before` hops
    to either side of them, as far as the longest filter. A stretch's Fourier transform is multiplied by the filters'
    spectra, and folded onto `size` places, which is what taking every `hop`-th sample comes to; the inverse transform
    of those gives just the frames. So long filters cost no more than short ones, and a frame depends on no other
    clip, nor on how long its own is.

    In float32, what lies 120 dB under the loudest sound within a stretch is noise.

    Takes the fields of `CqtSettings` as keywords.

    Raises:
        FeatureError: settings that cannot be.
    """

    NAME = "cqt"
    VERSION = 1
    ABOUT = "Constant-Q transform: magnitude at each note, in dB."
    UNIT = "dB"
    SETTINGS = CqtSettings
    settings: CqtSettings
    turns: Tensor
    shifts: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.hop = Framing(self.settings.sample_rate).hop
        self.before = -(-int(self.settings.halves.max()) // self.hop)
        self.size = _smooth(FRAMES_PER_S + 2 * self.before)
        self._set_turns()
        self._set_spectra()

    @property
    def bins(self) -> int:
        """Notes."""
        assert self.settings.n_bins is not None
        return self.settings.n_bins

    def _set_turns(self) -> None:
        """What stands between the two steps of the Fourier transform (Cooley and Tukey 1965), and behind them.

        Its bin `k` of `size * hop` is `row * size + column`, in rows from `-(hop // 2)` on. Transforms of `size`, over
        samples that lie a hop apart, give columns; columns above `size / 2` mirror others. Transforms of `hop` give
        rows. All is moved by half a sample: there are the middles of the filters, and so their spectra are real.
        """
        hop, middle = self.hop, self.hop // 2
        columns = torch.arange(self.size // 2 + 1, device="cpu")[:, None]
        places = torch.arange(hop, device="cpu")
        turns = columns * (0.5 - places.double()) / (hop * self.size) + middle * places % hop / hop
        self.register_buffer("turns", _cosines_and_sines(turns), persistent=False)
        self.register_buffer("shifts", _cosines_and_sines((places - middle) / (2 * hop)), persistent=False)

    def _set_spectra(self) -> None:
        """The filters' spectra, in groups of those that hear about as many rows: `[columns, rows, 2 * filters]`."""
        hop, middle = self.hop, self.hop // 2
        # A Hann window's spectrum falls off as 1 / (pi d^3) of its peak, at `d` parts of 1 / its length.
        reach = (math.pi * NEGLIGIBLE) ** (-1 / 3) / self.settings.quality
        heard = self.settings.frequencies * (1 + reach) * hop / self.settings.sample_rate
        rows = heard.clamp(min=LEAST_ROWS).log2().ceil().exp2().long().clamp(max=middle)
        columns = torch.arange(self.size // 2 + 1, device="cpu")[:, None]
        self._groups = []
        for count in rows.unique().tolist():
            low, high = middle - count, min(middle + count + 1, hop)
            k = (torch.arange(low, high, device="cpu") - middle) * self.size + columns
            spectra = filter_spectra(self.settings, rows == count, k / (hop * self.size)) / hop
            spectra = spectra.permute(2, 3, 0, 1).flatten(2).float()
            self.register_buffer(f"spectra{count}", spectra.contiguous(), persistent=False)
            self._groups.append((f"spectra{count}", low, high))

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`: dB."""
        seconds = Framing(self.settings.sample_rate).seconds(wave.shape[1])
        samples, step, before = self.size * self.hop, FRAMES_PER_S * self.hop, self.before * self.hop
        behind = (seconds - 1) * step + samples - before - wave.shape[1]

        def stretches(wave: Tensor) -> Tensor:
            return functional.pad(wave, (before, behind)).unfold(1, samples, step)

        return in_parts(wave, stretches, seconds, samples, self._notes, multiple=1)

    def _notes(self, stretches: Tensor) -> Tensor:
        """`[rows, seconds, size * hop] -> [rows, bins, 128 * seconds]`."""
        rows, seconds = stretches.shape[:2]
        if rows * seconds == 1:  # alone, its products would be of another kind, which rounds otherwise
            return self._notes(stretches.expand(2, -1, -1))[:1]
        x = torch.fft.rfft(stretches.reshape(rows * seconds, self.size, self.hop), dim=1)
        x = torch.fft.fft(torch.complex(*_times(x, self.turns)))
        # A product of real matrices for each column: [columns, 2 * stretches, rows] @ [columns, rows, 2 * filters].
        x = torch.cat(_times(x, self.shifts)).transpose(0, 1)
        heard = [torch.bmm(x[..., low:high], getattr(self, name)) for name, low, high in self._groups]
        x = torch.cat(heard, 2).unflatten(2, (self.bins, 2)).permute(1, 2, 3, 0)
        real, imaginary = x.chunk(2)  # [stretches, bins, 2, columns]
        # The second of each two by -i, which its spectrum lacks.
        real, imaginary = (
            torch.stack([real[:, :, 0], imaginary[:, :, 1]], 2),
            torch.stack([imaginary[:, :, 0], -real[:, :, 1]], 2),
        )
        parts = torch.fft.irfft(torch.complex(real, imaginary), self.size).square()
        power = (parts[:, :, 0] + parts[:, :, 1])[..., self.before : self.before + FRAMES_PER_S]
        return _decibels(power, self.settings.floor).unflatten(0, (rows, seconds)).transpose(1, 2).flatten(2)

    def real(self) -> nn.Module:
        """`RealCqt`."""
        return RealCqt(self.settings)


class RealCqt(nn.Module):
    """`Cqt` without complex numbers: `[B, samples] -> [B, n_bins, frames]`, float32.

    It is the filters themselves, over whole hops: a convolution whose channels are the samples of a hop.
    """

    def __init__(self, settings: CqtSettings) -> None:
        super().__init__()
        self.sample_rate, self.floor = settings.sample_rate, settings.floor
        self.hop = Framing(settings.sample_rate).hop
        # To either side, in powers of two.
        hops = (settings.halves / self.hop).ceil().log2().ceil().exp2().long()
        self.before = int(hops.max())
        self._groups = []
        for count in hops.unique().tolist()[::-1]:  # from the lowest notes to the highest
            taps = filter_taps(settings, hops == count, count * self.hop)
            taps = taps.flatten(0, 1).unflatten(1, (2 * count, self.hop)).transpose(1, 2).float()
            self.register_buffer(f"taps{count}", taps.contiguous(), persistent=False)
            self._groups.append((f"taps{count}", count))

    def forward(self, wave: Tensor) -> Tensor:
        """See the class; `wave` is floating point."""
        with without_autocast(wave):
            x, frames = real_padded(wave.float(), self.sample_rate)
            behind = (frames + self.before - 1) * self.hop
            x = functional.pad(x, (self.before * self.hop, behind - x.shape[1]))
            x = x.unfold(1, self.hop, self.hop).transpose(1, 2)  # [B, hop, before + frames + before - 1]
            parts = []
            for name, count in self._groups:
                first = self.before - count
                heard = x[..., first : first + frames + 2 * count - 1]
                parts.append(functional.conv1d(heard, getattr(self, name)))
            power = torch.cat(parts, 1).square().unflatten(1, (-1, 2)).sum(2)
            return _decibels(power, self.floor)


def filter_spectra(settings: CqtSettings, which: Tensor, cycles: Tensor) -> Tensor:
    """Spectra of filters' real and imaginary parts, about their middles: float64 `[filters, 2, *cycles.shape]`.

    The second is divided by -i: both are real. `which` of the filters is bool `[n_bins]`, `cycles` frequencies in
    cycles a sample. In closed form: a sum of `cos(a u)` over the window's samples `u` is a quotient of sines
    (Dirichlet's kernel), and a Hann window is three such sums.
    """
    half, centre, gain = (
        value[which].view(-1, *[1] * cycles.ndim)
        for value in (settings.halves, settings.frequencies / settings.sample_rate, _gains(settings))
    )
    length = 2 * half + 1

    def dirichlet(turns: Tensor) -> Tensor:
        below = torch.sin(math.pi * turns)
        return torch.where(below.abs() < 1e-12, 2.0 * half, torch.sin(2 * math.pi * half * turns) / below)

    def seen_from(turns: Tensor) -> Tensor:
        sides = dirichlet(turns - 1 / length) + dirichlet(turns + 1 / length)
        return gain * (dirichlet(turns) / 2 + sides / 4)

    ahead, behind = seen_from(centre - cycles), seen_from(centre + cycles)
    return torch.stack([ahead + behind, ahead - behind], 1) / 2


def filter_taps(settings: CqtSettings, which: Tensor, reach: int) -> Tensor:
    """The filters themselves, real and imaginary parts: float64 `[filters, 2, 2 * reach]`.

    What each is multiplied with begins `reach` samples before the frame. As librosa's, a filter has an odd number of
    taps, of which the first is 0, so that its middle lies half a sample behind the frame's.
    """
    half, centre, gain = (
        value[which, None]
        for value in (settings.halves, settings.frequencies / settings.sample_rate, _gains(settings))
    )
    places = torch.arange(-reach, reach, dtype=torch.float64, device="cpu") - 0.5
    window = (0.5 + 0.5 * torch.cos(2 * math.pi * places / (2 * half + 1))) * (places.abs() < half)
    angles = 2 * math.pi * centre * places
    return torch.stack([angles.cos(), angles.sin()], 1) * (gain * window)[:, None]


def _gains(settings: CqtSettings) -> Tensor:
    """The root of a filter's length, over the sum of its window."""
    length = settings.quality * settings.sample_rate / settings.frequencies
    return length.sqrt() / (settings.halves + 0.5)


def _cosines_and_sines(turns: Tensor) -> Tensor:
    """Of so many turns: float32 `[2, ...]`."""
    angles = 2 * math.pi * turns.double()
    return torch.stack([angles.cos(), angles.sin()]).float()


def _times(numbers: Tensor, phasors: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of complex numbers times `phasors`, `[2, ...]`.

    In steps that have one result each: torch rounds a complex product otherwise at the ends of what a thread is given.
    """
    cosines, sines = phasors
    real, imaginary = numbers.real, numbers.imag
    return real * cosines - imaginary * sines, real * sines + imaginary * cosines


def _decibels(power: Tensor, floor: float) -> Tensor:
    """20 log10 max(magnitude, floor)."""
    return 10 * torch.log10(power.clamp(min=floor**2))


def _smooth(least: int) -> int:
    """The smallest even number from `least` on without other factors than 2, 3 and 5, which transforms are quick at."""
    size = least + least % 2
    while 30**16 % size:
        size += 2
    return size
