"""What the augmentations make of the numbers that they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def integers_upto(high: Tensor, u: Tensor) -> Tensor:
    """floor(u (high + 1)): integers from 0 to `high` inclusive, each as likely where u is uniform.

    Args:
        high: int64 of any shape, 0 or more.
        u: float64 of that shape, 0 to 1; float32 cannot tell apart all the starts in a clip of over 6 minutes.

    Returns:
        int64 of that shape.
    """
    return torch.minimum((u.double() * (high + 1)).long(), high)
