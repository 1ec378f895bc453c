"""What stands between the shards' sound and a network: resampling where it wants another rate, and its log-mel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.transforms import Resample

from clipmill.errors import FeatureError
from clipmill.features.logmel import LogMel, check_wave
from clipmill_models import Tagger

MOST_STEPS = 2**24
"""Of a pair of rates, both divided by what they share: their product is about the resampling filters' size."""


class FrontEnd(nn.Module):
    """Sound as a network takes it, batched and on the device: `[B, samples]` -> features or waveforms.

    Args:
        sample_rate: of the sound that comes in, in Hz.
        resample_to: Hz that the network is made for; None where it is the same.
        logmel: settings of `LogMel`, at the rate after resampling; None for networks on waveforms.

    Attributes:
        bins: of the features; None for waveforms.

    Raises:
        FeatureError: settings that cannot be.
    """

    def __init__(
        self, sample_rate: int, resample_to: int | None = None, logmel: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        rate = resample_to or sample_rate
        if logmel is not None and logmel.get("sample_rate", rate) != rate:
            raise FeatureError(
                f"the log-mel is at {logmel['sample_rate']} Hz: allowed is {rate}, the sound's"
            )
        self.sample_rate, self.resample_to = sample_rate, resample_to
        # As sharp as librosa's "kaiser_best": torchaudio's own default lets 2 % of the band fold back.
        self.resample = None
        if resample_to is not None:
            common = math.gcd(sample_rate, resample_to)
            if (sample_rate // common) * (resample_to // common) > MOST_STEPS:
                raise FeatureError(
                    f"sound of {sample_rate} Hz does not go to {resample_to} Hz, with which it shares but {common}: "
                    "allowed are rates that share more, such as 44100; shards are made at any (--sample-rate)"
                )
            self.resample = Resample(
                sample_rate,
                resample_to,
                lowpass_filter_width=64,
                rolloff=0.9475937167399596,
                resampling_method="sinc_interp_kaiser",
                beta=14.769656459379492,
            )
        self.logmel = None if logmel is None else LogMel(**{**logmel, "sample_rate": rate})

    @classmethod
    def of(cls, network: Tagger, sample_rate: int) -> FrontEnd:
        """The front end that a network is made for, from sound of `sample_rate` Hz."""
        wanted, logmel = network.sample_rate, None
        if network.input == "features":
            settings = {k: v for k, v in (network.features or {}).items() if k != "sample_rate"}
            logmel = {**settings, "n_mels": network.in_bins}
        return cls(sample_rate, wanted if wanted != sample_rate else None, logmel)

    @property
    def config(self) -> dict[str, Any]:
        """All that determines the numbers, as plain JSON values; restore with `FrontEnd(**config)`."""
        return {
            "sample_rate": self.sample_rate,
            "resample_to": self.resample_to,
            "logmel": None if self.logmel is None else self.logmel.config,
        }

    @property
    def bins(self) -> int | None:
        """Bins of the features; None for waveforms."""
        return None if self.logmel is None else self.logmel.settings.n_mels

    def places(self, samples: int) -> int:
        """Frames, or samples at the network's rate, that sound of so many samples gives."""
        if self.resample_to is not None:
            samples = -(-samples * self.resample_to // self.sample_rate)
        return samples if self.logmel is None else self.logmel.frames(samples)

    def forward(self, wave: Tensor) -> Tensor:
        """Float32 `[B, samples]` in -1..1 -> log-mel in dB `[B, bins, frames]`, or sound at the network's rate.

        Computes in float32 under autocast too.

        Raises:
            FeatureError: another shape, no samples, or integer samples.
        """
        check_wave(wave)
        if self.resample is not None:
            with torch.autocast(wave.device.type, enabled=False):
                wave = self.resample(wave)
        return wave if self.logmel is None else self.logmel(wave)
