"""What stands between the shards' sound and a network: resampling where it wants another rate, and a feature."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.transforms import Resample

from clipmill.errors import FeatureError
from clipmill.features.feature import Feature, check_wave
from clipmill.features.registry import create_feature
from clipmill_models import Tagger

MOST_STEPS = 2**24
"""Of a pair of rates, both divided by what they share: their product is about the resampling filters' size."""


class FrontEnd(nn.Module):
    """Sound as a network takes it, batched and on the device: `[B, samples]` -> features or waveforms.

    Args:
        sample_rate: of the sound that comes in, in Hz.
        resample_to: Hz that the network is made for; None where it is the same.
        feature: what `FrontEnd.config` says of one: its "name", its "settings" and its "version" where the numbers must
            be those of that version of its code; None for networks on waveforms.
        least_s: seconds that shorter sound is padded to with zeros.

    Attributes:
        feature: the module, at the rate after resampling; None for networks on waveforms.

    Raises:
        FeatureError: settings that cannot be, or another version of the feature's code.
    """

    def __init__(
        self,
        sample_rate: int,
        resample_to: int | None = None,
        feature: dict[str, Any] | None = None,
        least_s: float = 0.0,
    ) -> None:
        super().__init__()
        rate = resample_to or sample_rate
        self.sample_rate, self.resample_to, self.least_s = sample_rate, resample_to, least_s
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
        self.feature = None if feature is None else _feature(rate, **feature)

    @classmethod
    def of(
        cls, network: Tagger, sample_rate: int, feature: Feature | None = None, least_s: float = 0.0
    ) -> FrontEnd:
        """The front end that a network is made for, from sound of `sample_rate` Hz.

        `feature` is what the network shall see, where it leaves that open; by default the log-mel. `least_s`: see the
        class.

        Raises:
            FeatureError: the network takes waveforms, or a log-mel of its own, or a feature of other bins.
        """
        wanted = network.sample_rate if network.sample_rate != sample_rate else None
        if feature is not None:
            _check_taken(network, feature)
            return cls(sample_rate, wanted, _said(feature), least_s)
        if network.input == "waveform":
            return cls(sample_rate, wanted, None, least_s)
        settings = {k: v for k, v in (network.features or {}).items() if k != "sample_rate"}
        logmel = {"name": "logmel", "settings": {**settings, "n_mels": network.in_bins}}
        return cls(sample_rate, wanted, logmel, least_s)

    @property
    def config(self) -> dict[str, Any]:
        """All that determines the numbers, as plain JSON values; restore with `FrontEnd(**config)`."""
        return {
            "sample_rate": self.sample_rate,
            "resample_to": self.resample_to,
            "feature": None if self.feature is None else _said(self.feature),
            "least_s": self.least_s,
        }

    @property
    def least(self) -> int:
        """Samples that shorter sound is padded to with zeros."""
        return round(self.least_s * self.sample_rate)

    @property
    def bins(self) -> int | None:
        """Bins of the feature; None for waveforms."""
        return None if self.feature is None else self.feature.bins

    def places(self, samples: int) -> int:
        """Frames, or samples at the network's rate, that sound of so many samples gives."""
        samples = max(samples, self.least)
        if self.resample_to is not None:
            samples = -(-samples * self.resample_to // self.sample_rate)
        return samples if self.feature is None else self.feature.frames(samples)

    def padded(self, waves: Tensor, places: int) -> Tensor:
        """`[B, samples]` with zeros behind, up to so many samples."""
        return functional.pad(waves, (0, places - waves.shape[1]))

    def forward(self, wave: Tensor) -> Tensor:
        """Float32 `[B, samples]` in -1..1 -> the feature `[B, bins, frames]`, or sound at the network's rate.

        Computes in float32 under autocast too.

        Raises:
            FeatureError: another shape, no samples, or integer samples.
        """
        check_wave(wave)
        if wave.shape[1] < self.least:
            wave = self.padded(wave, self.least)
        if self.resample is not None:
            with torch.autocast(wave.device.type, enabled=False):
                wave = self.resample(wave)
        return wave if self.feature is None else self.feature(wave)


def _said(feature: Feature) -> dict[str, Any]:
    return {"name": feature.NAME, "version": feature.VERSION, "settings": feature.config}


def _feature(
    rate: int, name: str, settings: dict[str, Any] | None = None, version: int | None = None
) -> Feature:
    """The feature that `FrontEnd.config` tells of, of sound at `rate` Hz."""
    settings = settings or {}
    if settings.get("sample_rate", rate) != rate:
        raise FeatureError(f"{name} is of {settings['sample_rate']} Hz: allowed is {rate}, the sound's")
    feature = create_feature(name, **{**settings, "sample_rate": rate})
    if version not in (None, feature.VERSION):
        raise FeatureError(
            f"{name} was computed by version {version} of its code, and this clipmill has version {feature.VERSION}, "
            "whose numbers differ: install the clipmill that made it, or make it anew"
        )
    return feature


def _check_taken(network: Tagger, feature: Feature) -> None:
    """Raise FeatureError where the network does not take the feature."""
    if network.input == "waveform":
        raise FeatureError(
            f"{network.name} takes waveforms, not a feature such as {feature.NAME}: give it sound, "
            "by --shards and without --feature"
        )
    if network.features:
        told = ", ".join(f"{name} {value}" for name, value in network.features.items())
        raise FeatureError(f"{network.name} takes its own log-mel ({told}), not {feature.NAME}")
    if network.in_bins != feature.bins:
        raise FeatureError(
            f"{network.name} was built for {network.in_bins} bins: {feature.NAME} has {feature.bins}"
        )
