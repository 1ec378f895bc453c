"""The log-mel spectrogram: ERANN's, of 128 frames a second at any sample rate, or any other network's."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from clipmill.errors import FeatureError
from clipmill.features.feature import FRAMES_PER_S, LEAST_POWER, Feature, Framing, check_floor
from clipmill.features.spectrum import Filters, PowerSpectrum
from clipmill_models.logmel import RealLogMel


@dataclass(frozen=True)
class LogMelSettings:
    """All that determines a log-mel's numbers. What is left None follows from `sample_rate`.

    Attributes:
        sample_rate: of the waveform, in Hz.
        n_fft: samples of the Fourier transform; by default `win_length`.
        win_length: samples of the Hann window; by default 4 hops, an overlap of 0.75.
        hop: samples from frame to frame; by default `sample_rate / 128`, rounded up, which
            gives 128 frames of every second. Another one gives a frame centred on every hop.
        f_min: lower edge of the lowest mel filter, in Hz.
        f_max: upper edge of the highest one, in Hz; capped at half the sample rate, and
            kept here as capped.
        n_mels: number of mel filters.
        mel_scale: "slaney" or "htk".
        mel_norm: "slaney" for filters of equal area, None for filters of equal height.
        floor: power below which values are cut off, so that silence is finite.
    """

    # Slaney's scale, as librosa and PANNs have it. The window's bins lie 32 Hz apart at every rate, and
    # with 128 filters the HTK scale leaves some without any bin: 1 at 16 kHz, 4 at 8 kHz; Slaney's none.
    sample_rate: int = 44100
    n_fft: int | None = None
    win_length: int | None = None
    hop: int | None = None
    f_min: float = 50.0
    f_max: float = 14000.0
    n_mels: int = 128
    mel_scale: str = "slaney"
    mel_norm: str | None = "slaney"
    floor: float = 1e-10

    def resolved(self) -> LogMelSettings:
        """The same with nothing left None and `f_max` capped; raises `FeatureError` where they cannot be."""
        rate = self.sample_rate
        hop = Framing(rate).hop if self.hop is None else self.hop
        if not 1 <= hop <= rate:
            raise FeatureError(f"hop is {hop}: allowed is 1 to the sample rate, {rate}")
        win_length = 4 * hop if self.win_length is None else self.win_length
        n_fft = win_length if self.n_fft is None else self.n_fft
        if not 2 <= win_length <= n_fft <= rate:
            raise FeatureError(
                f"win_length is {win_length} and n_fft {n_fft}: allowed is 2 <= win_length <= n_fft <= {rate}"
            )
        f_max = min(float(self.f_max), rate / 2)
        if not 0 <= self.f_min < f_max:
            raise FeatureError(f"f_min is {self.f_min} Hz: allowed is 0 up to f_max, which is {f_max} Hz")
        if self.n_mels < 1:
            raise FeatureError(f"n_mels is {self.n_mels}: must be above 0")
        check_floor(self.floor, LEAST_POWER)
        if self.mel_scale not in ("slaney", "htk") or self.mel_norm not in ("slaney", None):
            raise FeatureError(
                f"mel_scale is {self.mel_scale!r} and mel_norm {self.mel_norm!r}: "
                "allowed are 'slaney' or 'htk', and 'slaney' or None"
            )
        return LogMelSettings(
            rate, n_fft, win_length, hop, float(self.f_min), f_max, self.n_mels,
            self.mel_scale, self.mel_norm, self.floor,
        )  # fmt: skip


class LogMel(Feature):
    """Log-mel spectrogram in dB (journal paper, 3.1): `[B, samples] -> [B, n_mels, 128 * seconds]`.

    Seconds are whole; see `Framing`. Frames are centred on their samples, so the last one may look past the
    end, where the waveform is mirrored.

    With another `hop`, as other networks have it, nothing is padded:
    `[B, samples] -> [B, n_mels, samples // hop + 1]`.

    Takes the fields of `LogMelSettings` as keywords; `LogMel(**other.config)` computes the
    same numbers as `other`. Computes in float32 under autocast too.

    Raises:
        FeatureError: settings that cannot be; a filter that would catch no bin of the
            Fourier transform.
    """

    NAME = "logmel"
    VERSION = 1
    ABOUT = "Log-mel spectrogram (journal paper, 3.1): power in mel bands, in dB."
    UNIT = "dB"
    SETTINGS = LogMelSettings
    settings: LogMelSettings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        s = self.settings
        assert s.n_fft is not None
        assert s.win_length is not None
        assert s.hop is not None
        with warnings.catch_warnings():
            # torchaudio warns of empty filters; here they are an error. The filters are its, the transform is not:
            # that takes three times as long.
            warnings.filterwarnings("ignore", message="At least one mel filterbank")
            mel = melscale_fbanks(
                s.n_fft // 2 + 1, s.f_min, s.f_max, s.n_mels, s.sample_rate,
                norm=s.mel_norm, mel_scale=s.mel_scale,
            )  # fmt: skip
        if empty := int((mel.amax(0) == 0).sum()):
            raise FeatureError(
                f"{empty} of {s.n_mels} mel filters catch no bin of n_fft {s.n_fft} "
                f"at {s.sample_rate} Hz: allowed is a larger n_fft, fewer n_mels or a higher rate"
            )
        self.filters = Filters(mel)
        self.spectrum = PowerSpectrum(s.n_fft, s.win_length, s.hop, self.filters.first, self.filters.last)

    @property
    def bins(self) -> int:
        """Mel bands."""
        return self.settings.n_mels

    @property
    def frames_per_s(self) -> int | None:
        """128 where every whole second gives that many frames; None with a hop of another network."""
        return FRAMES_PER_S if self.settings.hop == Framing(self.settings.sample_rate).hop else None

    def frames(self, samples: int) -> int:
        """Frames that a waveform of `samples` gives."""
        assert self.settings.hop is not None
        return super().frames(samples) if self.frames_per_s else samples // self.settings.hop + 1

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`: dB."""
        samples = wave.shape[1]
        return self.spectrum(wave, self.reach(samples), self.frames(samples), self.decibels)

    def reach(self, samples: int) -> int:
        """Samples after zeros behind: to whole seconds where frames are, and else as far as it can be mirrored."""
        if self.frames_per_s is not None:
            return Framing(self.settings.sample_rate).reach(samples)
        return max(samples, self.spectrum.n_fft // 2 + 1 + self.spectrum.n_fft % 2)

    def decibels(self, power: Tensor) -> Tensor:
        """Of the power in mel bands, from that in the spectrum's bins: `[rows, some, bins] -> [rows, some, n_mels]`."""
        return 10.0 * torch.log10(self.filters(power).clamp(min=self.settings.floor))

    def real(self) -> nn.Module:
        """`clipmill_models`' log-mel, which some networks carry inside."""
        return RealLogMel(**self.config, frames_per_s=self.frames_per_s)
