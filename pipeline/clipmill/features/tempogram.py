"""The tempogram: how alike the onsets around a frame are to themselves, a while later."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipmill.errors import FeatureError
from clipmill.features.feature import FRAMES_PER_S, Feature
from clipmill.features.logmel import LogMel, LogMelSettings
from clipmill.features.spectrum import hann, in_parts, turned
from clipmill_models.base import without_autocast


@dataclass(frozen=True)
class TempogramSettings:
    """All that determines a tempogram's numbers. What is left None follows from `sample_rate`, as in `LogMelSettings`.

    Attributes:
        sample_rate: of the waveform, in Hz.
        window_frames: frames of the window in which onsets are compared, and lags, from 0 on.
        top_db: dB under a clip's loudest mel band below which values are cut off.
        n_fft: samples of the Fourier transform and of its Hann window.
        f_min: lower edge of the lowest mel filter, in Hz.
        f_max: upper edge of the highest one, in Hz.
        n_mels: number of mel filters.
    """

    sample_rate: int = 44100
    window_frames: int = 256
    top_db: float = 80.0
    n_fft: int | None = None
    f_min: float = 50.0
    f_max: float = 14000.0
    n_mels: int = 128

    def logmel(self) -> dict[str, Any]:
        """The settings of the log-mel whose rises are onsets."""
        settings = asdict(self)
        del settings["window_frames"], settings["top_db"]
        return {**settings, "win_length": self.n_fft}

    def resolved(self) -> TempogramSettings:
        """The same with nothing left None and `f_max` capped; raises `FeatureError` where they cannot be."""
        if not 2 <= self.window_frames <= 60 * FRAMES_PER_S:
            raise FeatureError(
                f"window_frames is {self.window_frames}: allowed is 2 to {60 * FRAMES_PER_S}, a minute"
            )
        if not self.top_db > 0:
            raise FeatureError(f"top_db is {self.top_db}: must be above 0")
        mel = LogMelSettings(**self.logmel()).resolved()
        return TempogramSettings(
            mel.sample_rate, self.window_frames, float(self.top_db), mel.n_fft, mel.f_min, mel.f_max, mel.n_mels
        )  # fmt: skip


class Tempogram(Feature):
    """Autocorrelation tempogram: `[B, samples] -> [B, window_frames, 128 * seconds]`, bin `l` of a lag of `l` frames.

    Onset strength (`librosa.onset.onset_strength`): the log-mel in dB, cut off `top_db` under the clip's largest value;
    what each band rises by from one frame to the next; the mean over the bands; later by half a window, `n_fft / 2`
    samples in whole frames. Then (`librosa.feature.tempogram`, after Grosche, Mueller and Kurth 2010) the
    autocorrelation in a Hann window about each frame, divided by its largest value; 0 where there are no onsets.

    Takes the fields of `TempogramSettings` as keywords.

    Raises:
        FeatureError: settings that cannot be; a mel filter that would catch no bin of the Fourier transform.
    """

    NAME = "tempogram"
    VERSION = 1
    ABOUT = "Tempogram: autocorrelation of the onset strength around each frame, by lag."
    UNIT = "share"
    SETTINGS = TempogramSettings
    settings: TempogramSettings
    window: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.logmel = LogMel(**self.settings.logmel())
        self.register_buffer("window", hann(self.settings.window_frames), persistent=False)

    @property
    def bins(self) -> int:
        """Lags."""
        return self.settings.window_frames

    @property
    def late(self) -> int:
        """Frames that onsets are late by, beside the one that a rise begins at."""
        return self.logmel.spectrum.n_fft // (2 * self.logmel.spectrum.hop)

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`."""
        length = self.settings.window_frames
        onsets = onset_strength(self.logmel.extract(wave), self.settings.top_db, self.late)
        frames = onsets.shape[1]

        def windows(onsets: Tensor) -> Tensor:
            return ramped(onsets, length).unfold(1, length, 1)[:, :frames]

        return in_parts(onsets, windows, frames, 2 * length, self._autocorrelation)

    def _autocorrelation(self, windows: Tensor) -> Tensor:
        """`[rows, frames, window_frames] -> [rows, lags, frames]`, of each window as a share of its largest."""
        length = windows.shape[2]
        size = 2 ** math.ceil(math.log2(2 * length - 1))  # so that no lag meets its end's beginning
        spectrum = torch.view_as_real(torch.fft.rfft(windows * self.window, size)).square()
        power = spectrum[..., 0] + spectrum[..., 1]
        return _shares(torch.fft.irfft(power, size)[..., :length], 2).transpose(1, 2)

    def real(self) -> nn.Module:
        """`RealTempogram`."""
        return RealTempogram(self)


class RealTempogram(nn.Module):
    """`Tempogram` without complex numbers: `[B, samples] -> [B, window_frames, frames]`, float32."""

    forth: Tensor
    back: Tensor

    def __init__(self, tempogram: Tempogram) -> None:
        super().__init__()
        self.logmel = tempogram.logmel.real()
        self.top_db, self.late = tempogram.settings.top_db, tempogram.late
        length = tempogram.settings.window_frames
        self.length = length
        # All 2 n frequencies come in pairs that are alike, but the first and the one in the middle.
        forth = turned(length + 1, length, 2 * length) * tempogram.window[:, None]
        self.register_buffer("forth", forth.permute(2, 0, 1).flatten(0, 1)[:, None], persistent=False)
        back = turned(length, length + 1, 2 * length)[..., 0] / length
        back[:, 0] /= 2
        back[:, -1] /= 2
        self.register_buffer("back", back[..., None], persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """See the class; `wave` is floating point."""
        with without_autocast(wave):
            onsets = onset_strength(self.logmel(wave), self.top_db, self.late)
            padded = ramped(onsets, self.length)
            real, imaginary = functional.conv1d(padded[:, None], self.forth).chunk(2, 1)
            power = (real.square() + imaginary.square())[..., : onsets.shape[1]]
            return _shares(functional.conv1d(power, self.back), 1)


def onset_strength(logmel: Tensor, top_db: float, late: int) -> Tensor:
    """`[B, n_mels, frames]` in dB -> how much each clip's bands rise on average, `late` frames late: `[B, frames]`."""
    heard = torch.maximum(logmel, logmel.amax((1, 2), keepdim=True) - top_db)
    rises = heard.diff(dim=2).clamp(min=0).mean(1)
    return functional.pad(rises, (1 + late, 0))[:, : logmel.shape[2]]


def ramped(onsets: Tensor, length: int) -> Tensor:
    """`[B, frames]` with half a window of `length` on either side, in which it falls to 0."""
    half = length // 2
    ramp = torch.arange(half, dtype=torch.float32, device=onsets.device) / half
    return torch.cat([onsets[:, :1] * ramp, onsets, onsets[:, -1:] * ramp.flip(0)], 1)


def _shares(values: Tensor, dim: int) -> Tensor:
    """Of the largest along an axis; what is too small to be divided by stays as it is."""
    largest = values.abs().amax(dim, keepdim=True)
    return values / torch.where(largest < torch.finfo(torch.float32).tiny, 1.0, largest)
