"""Random draws that the augmentations share."""

from __future__ import annotations

import torch
from torch import Tensor


def integers_upto(high: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform integers from 0 to `high` inclusive, each with a bound of its own.

    Args:
        high: int64 of any shape, 0 or more; on the generator's device.
        generator: where the draws come from.

    Returns:
        int64 of the shape of `high`.
    """
    # float64, because float32 cannot tell apart all the starts in a clip of over 6 minutes.
    uniform = torch.rand(high.shape, generator=generator, device=high.device, dtype=torch.float64)
    return (uniform * (high + 1)).long()
