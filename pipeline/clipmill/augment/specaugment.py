"""SpecAugment (Park et al. 2019): stripes of time and of frequency are blanked out."""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill.augment.draw import integers_upto
from clipmill.errors import FeatureError


def specaugment(
    logmel: Tensor,
    u: Tensor,
    time_masks: int = 2,
    time_width: int = 64,
    freq_masks: int = 2,
    freq_width: int = 8,
) -> Tensor:
    """Blank stripes of each clip's log-mel, every clip its own.

    A stripe's width is floor(u (most + 1)), where most is the width given, or the whole axis where that is
    shorter; its start is floor(u' (size - width + 1)). For uniform u every width is as likely, and every
    place where it fits. The defaults are those of PANNs; ERANN's papers state none.

    Stripes take the clip's own mean. The mask stands before the network's BatchNorm, where
    zero is 0 dB and would be the loudest thing in the clip.

    Args:
        logmel: `[B, bins, frames]` floating point, in dB.
        u: `[B, 2 * (time_masks + freq_masks)]` float64, 0 to 1: width and place of each stripe, those of
            time first.
        time_masks: stripes of frames.
        time_width: most frames of each.
        freq_masks: stripes of bins.
        freq_width: most bins of each.

    Returns:
        A masked copy, same shape and dtype.

    Raises:
        FeatureError: `u` is of another shape.
    """
    clips, bins, frames = logmel.shape
    if u.shape != (clips, 2 * (time_masks + freq_masks)):
        raise FeatureError(
            f"u is of shape {tuple(u.shape)}: {clips} clips with {time_masks} + {freq_masks} stripes take "
            f"{(clips, 2 * (time_masks + freq_masks))}"
        )
    frame_mask = _stripes(u[:, : 2 * time_masks], frames, time_width)
    bin_mask = _stripes(u[:, 2 * time_masks :], bins, freq_width)
    mask = frame_mask[:, None, :] | bin_mask[:, :, None]
    return torch.where(mask, logmel.mean((1, 2), keepdim=True), logmel)


def _stripes(u: Tensor, size: int, width: int) -> Tensor:
    """Where the stripes lie on an axis of `size`: bool `[B, size]`; u is `[B, 2 * masks]`."""
    widths = integers_upto(torch.full_like(u[:, 0::2], min(width, size), dtype=torch.int64), u[:, 0::2])
    starts = integers_upto(size - widths, u[:, 1::2])
    axis = torch.arange(size, device=u.device)
    inside = (axis >= starts[..., None]) & (axis < (starts + widths)[..., None])
    return inside.any(1)
