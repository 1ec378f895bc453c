"""Mel-frequency cepstral coefficients: the discrete cosine transform of the log-mel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import create_dct

from clipmill.errors import FeatureError
from clipmill.features.feature import Feature
from clipmill.features.logmel import LogMel, LogMelSettings
from clipmill.features.spectrum import product
from clipmill_models.base import without_autocast


@dataclass(frozen=True)
class MfccSettings:
    """All that determines MFCCs' numbers. What is left None follows from `sample_rate`, as in `LogMelSettings`.

    Attributes:
        sample_rate: of the waveform, in Hz.
        n_mfcc: number of coefficients, from the 0th on.
        n_fft: samples of the Fourier transform.
        win_length: samples of the Hann window.
        f_min: lower edge of the lowest mel filter, in Hz.
        f_max: upper edge of the highest one, in Hz.
        n_mels: number of mel filters.
        mel_scale: "slaney" or "htk".
        mel_norm: "slaney" for filters of equal area, None for filters of equal height.
        floor: power below which values are cut off, so that silence is finite.
    """

    sample_rate: int = 44100
    n_mfcc: int = 64
    n_fft: int | None = None
    win_length: int | None = None
    f_min: float = 50.0
    f_max: float = 14000.0
    n_mels: int = 128
    mel_scale: str = "slaney"
    mel_norm: str | None = "slaney"
    floor: float = 1e-10

    def logmel(self) -> dict[str, Any]:
        """The settings of the log-mel."""
        settings = asdict(self)
        settings.pop("n_mfcc")
        return settings

    def resolved(self) -> MfccSettings:
        """The same with nothing left None and `f_max` capped; raises `FeatureError` where they cannot be."""
        if not 1 <= self.n_mfcc <= self.n_mels:
            raise FeatureError(f"n_mfcc is {self.n_mfcc}: allowed is 1 to n_mels, which is {self.n_mels}")
        logmel = asdict(LogMelSettings(**self.logmel()).resolved())
        logmel.pop("hop")
        return MfccSettings(n_mfcc=self.n_mfcc, **logmel)


class Mfcc(Feature):
    """Mel-frequency cepstral coefficients: `[B, samples] -> [B, n_mfcc, 128 * seconds]`.

    The orthonormal DCT-II, along the bands, of the log-mel in dB (Davis and Mermelstein 1980), as
    `librosa.feature.mfcc(S=...)` has it. No range is cut off, nothing is liftered.

    Takes the fields of `MfccSettings` as keywords.

    Raises:
        FeatureError: settings that cannot be; a mel filter that would catch no bin of the Fourier transform.
    """

    NAME = "mfcc"
    VERSION = 1
    ABOUT = "Mel-frequency cepstral coefficients: DCT of the log-mel in dB."
    UNIT = "dB"
    SETTINGS = MfccSettings
    settings: MfccSettings
    dct: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.logmel = LogMel(**self.settings.logmel())
        dct = create_dct(self.settings.n_mfcc, self.settings.n_mels, "ortho")
        self.register_buffer("dct", dct, persistent=False)

    @property
    def bins(self) -> int:
        """Coefficients."""
        return self.settings.n_mfcc

    def extract(self, wave: Tensor) -> Tensor:
        """See `Feature`."""
        samples = wave.shape[1]
        return self.logmel.spectrum(wave, self.logmel.reach(samples), self.frames(samples), self._cepstrum)

    def _cepstrum(self, power: Tensor) -> Tensor:
        return product(self.logmel.decibels(power), self.dct)

    def real(self) -> nn.Module:
        """`RealMfcc`."""
        return RealMfcc(self)


class RealMfcc(nn.Module):
    """`Mfcc` without complex numbers: `[B, samples] -> [B, n_mfcc, frames]`, float32."""

    dct: Tensor

    def __init__(self, mfcc: Mfcc) -> None:
        super().__init__()
        self.logmel = mfcc.logmel.real()
        self.register_buffer("dct", mfcc.dct.t()[..., None].contiguous(), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """See the class; `wave` is floating point."""
        with without_autocast(wave):
            return functional.conv1d(self.logmel(wave), self.dct)
