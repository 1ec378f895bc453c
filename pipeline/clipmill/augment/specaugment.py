"""SpecAugment (Park et al. 2019): stripes of time and of frequency are blanked out."""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill.augment.draw import integers_upto


def specaugment(
    logmel: Tensor,
    generator: torch.Generator,
    time_masks: int = 2,
    time_width: int = 64,
    freq_masks: int = 2,
    freq_width: int = 8,
) -> Tensor:
    """Blank random stripes of each clip's log-mel, every clip its own.

    A stripe's width is uniform from 0 to the width given, or to the whole axis where that
    is shorter, and every place where it fits is as likely. The defaults are those of PANNs;
    ERANN's papers state none.

    Stripes take the clip's own mean. The mask stands before the network's BatchNorm, where
    zero is 0 dB and would be the loudest thing in the clip.

    Args:
        logmel: `[B, bins, frames]` floating point, in dB.
        generator: on the device of `logmel`.
        time_masks: stripes of frames.
        time_width: most frames of each.
        freq_masks: stripes of bins.
        freq_width: most bins of each.

    Returns:
        A masked copy, same shape and dtype.
    """
    clips, bins, frames = logmel.shape
    frame_mask = _stripes(clips, frames, time_masks, time_width, generator, logmel.device)
    bin_mask = _stripes(clips, bins, freq_masks, freq_width, generator, logmel.device)
    mask = frame_mask[:, None, :] | bin_mask[:, :, None]
    return torch.where(mask, logmel.mean((1, 2), keepdim=True), logmel)


def _stripes(
    clips: int, size: int, masks: int, width: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Where the stripes lie on an axis of `size`: bool `[clips, size]`."""
    most = torch.full((clips, masks), min(width, size), device=device)
    widths = integers_upto(most, generator)
    starts = integers_upto(size - widths, generator)
    axis = torch.arange(size, device=device)
    inside = (axis >= starts[..., None]) & (axis < (starts + widths)[..., None])
    return inside.any(1)
