"""What every feature is: a torch module from waveforms to pictures of 128 frames a second, and its settings."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipmill.errors import FeatureError

FRAMES_PER_S = 128
"""ERANN's frames of every second of audio; a power of two, so that a network's strides divide it."""

LEAST_POWER = torch.finfo(torch.float32).tiny
"""That float32 holds in full."""


@dataclass(frozen=True)
class Framing:
    """Frames of a waveform: one centred on every `hop` samples, 128 of every second begun.

    A hop rounded up runs a little slow (345 samples at 44.1 kHz are 127.8 frames a second), so the last
    frames of long clips lie behind the end of the last second: none up to 5 s at 44.1 kHz, one at 10 s.
    """

    sample_rate: int

    def __post_init__(self) -> None:
        if self.sample_rate < FRAMES_PER_S:
            raise FeatureError(f"sample_rate is {self.sample_rate} Hz: allowed is {FRAMES_PER_S} Hz and more")

    @property
    def hop(self) -> int:
        """Samples from frame to frame: `sample_rate / 128`, rounded up."""
        return -(-self.sample_rate // FRAMES_PER_S)

    def seconds(self, samples: int) -> int:
        """Whole seconds that a waveform of `samples` is padded to."""
        return -(-samples // self.sample_rate)

    def frames(self, samples: int) -> int:
        """Frames that a waveform of `samples` gives."""
        return FRAMES_PER_S * self.seconds(samples)

    def reach(self, samples: int) -> int:
        """Samples of what `padded` makes of a waveform of `samples`."""
        return max(self.seconds(samples) * self.sample_rate, (self.frames(samples) - 1) * self.hop)

    def padded(self, wave: Tensor) -> Tensor:
        """`[B, samples]` with zeros behind, to whole seconds and at least to the last frame's centre."""
        return functional.pad(wave, (0, self.reach(wave.shape[1]) - wave.shape[1]))


class Feature(nn.Module):
    """A feature: `[B, samples] -> [B, bins, frames]`, batched, on the waveform's device, float32 under autocast too.

    A new one is a subclass in a file of its own, a line in `features.FEATURES` and a test. It takes the fields of
    `SETTINGS` as keywords, keeps them resolved in `.settings`, and `type(f)(**f.config)` computes the same numbers.

    Attributes:
        NAME: what it is called in flags, in specs and in a store.
        VERSION: of its code: raised by one whenever the numbers of the same settings change, be it in their last bits.
        ABOUT: what it is, in a sentence, for lists and stores.
        UNIT: of its values.
        SETTINGS: the frozen dataclass of all that determines its numbers.
        settings: those of this one, resolved.

    Raises:
        FeatureError: a keyword that is no setting; settings that cannot be.
    """

    NAME: ClassVar[str]
    VERSION: ClassVar[int]
    ABOUT: ClassVar[str]
    UNIT: ClassVar[str]
    SETTINGS: ClassVar[type[Any]]
    settings: Any

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = _resolved(type(self), settings)

    @property
    @abstractmethod
    def bins(self) -> int:
        """Rows of the picture."""

    @property
    def config(self) -> dict[str, Any]:
        """All that determines the numbers but `VERSION`, as plain JSON values."""
        return asdict(self.settings)

    @property
    def frames_per_s(self) -> int | None:
        """128; None for a log-mel with another network's hop."""
        return FRAMES_PER_S

    def frames(self, samples: int) -> int:
        """Frames that a waveform of `samples` gives: 128 of every second begun."""
        return Framing(self.settings.sample_rate).frames(samples)

    def forward(self, wave: Tensor) -> Tensor:
        """The feature of `wave` `[B, samples]` (floating point, -1..1): float32 `[B, bins, frames]`.

        Raises:
            FeatureError: another shape, no samples, or integer samples.
        """
        check_wave(wave)
        with torch.autocast(wave.device.type, enabled=False):
            return self.extract(wave.float())

    @abstractmethod
    def extract(self, wave: Tensor) -> Tensor:
        """`forward` of a checked float32 waveform, without autocast; contiguous."""

    @abstractmethod
    def real(self) -> nn.Module:
        """The same numbers, up to rounding, without complex ones, which ONNX does not have; open to any length."""


def check_floor(floor: float, least: float) -> None:
    """Raises `FeatureError` for a floor that is lower than `least`: in float32 the logarithm of silence is infinite."""
    if not floor >= least:
        raise FeatureError(f"floor is {floor}: allowed is {least:.2g} and more, which float32 can hold")


def check_wave(wave: Tensor) -> None:
    """Raises `FeatureError` for what is no floating-point `[B, samples]` with at least one sample."""
    if wave.ndim != 2 or wave.shape[1] == 0 or not wave.is_floating_point():
        raise FeatureError(
            f"a waveform is {wave.dtype} of shape {tuple(wave.shape)}: "
            "allowed is floating point in -1..1 of shape [batch, samples]"
        )


def _resolved(kind: type[Feature], given: dict[str, Any]) -> Any:
    """The resolved settings of keywords; raises `FeatureError` naming a keyword that is none."""
    allowed = [field.name for field in fields(kind.SETTINGS)]
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise FeatureError(
            f"{kind.NAME} has no setting {', '.join(unknown)}: allowed are {', '.join(allowed)}"
        )
    for name, value in given.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FeatureError(f"{name} is {value}: allowed is a finite number")
    return kind.SETTINGS(**given).resolved()
