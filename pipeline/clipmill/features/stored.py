"""The front end of clips whose feature was computed before: it only turns it the way that networks look at it."""

from __future__ import annotations

from torch import Tensor, nn

from clipmill.features.feature import FRAMES_PER_S, Feature


class StoredFrontEnd(nn.Module):
    """Stored features as a network takes them, on the device: `[B, frames, bins]` -> `[B, bins, frames]`.

    Stands where `FrontEnd` stands for sound; what is a sample there is a frame here.

    Args:
        feature: the module that computed them.
        silence: what it makes of silence, `[bins]`.

    Attributes:
        sample_rate: frames a second.
    """

    sample_rate = FRAMES_PER_S
    silence: Tensor

    def __init__(self, feature: Feature, silence: Tensor) -> None:
        super().__init__()
        self.feature = feature
        self.register_buffer("silence", silence)

    def places(self, samples: int) -> int:
        """Frames of so many frames."""
        return samples

    def padded(self, stored: Tensor, places: int) -> Tensor:
        """`[B, frames, bins]` with silence behind, up to so many frames."""
        room = stored.new_empty((len(stored), places, stored.shape[2]))
        room[:, : stored.shape[1]] = stored
        room[:, stored.shape[1] :] = self.silence
        return room

    def forward(self, stored: Tensor) -> Tensor:
        """float16 or float32 `[B, frames, bins]` -> float32 `[B, bins, frames]`."""
        return stored.float().transpose(1, 2).contiguous()
