"""Temporal cropping (journal paper, 4.1): a random window of every clip."""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill.augment.draw import integers_upto


def crop(wave: Tensor, lengths: Tensor, samples: int, u: Tensor, needed: Tensor | None = None) -> Tensor:
    """A window of `samples` from a place inside each clip.

    With room = max(0, length - needed) it starts at floor(u (room + 1)): for uniform u every
    place where what is needed of the window fits is as likely. A clip shorter than that starts at its
    beginning; where it ends, zeros follow.

    Args:
        wave: `[B, S]`, int16 or floating point; what lies past a clip's length is ignored.
        lengths: `[B]` int64, samples of each clip, at most S.
        samples: length of the window, in samples.
        u: `[B]` float64, 0 to 1.
        needed: `[B]` int64, how much of the window must be sound where the clip has it; by default all.

    Returns:
        `[B, samples]` of the dtype of `wave`.
    """
    starts = integers_upto((lengths - (samples if needed is None else needed)).clamp(min=0), u)
    places = starts[:, None] + torch.arange(samples, device=wave.device)
    windows = wave.gather(1, places.clamp(max=wave.shape[1] - 1))
    return windows.masked_fill(places >= lengths[:, None], 0)


def to_float(pcm: Tensor) -> Tensor:
    """int16 samples as float32 in -1..1: divided by 32768, exactly; float16 and float32 are no samples. Any shape."""
    return pcm.float() if pcm.is_floating_point() else pcm.to(torch.float32) / 32768.0
