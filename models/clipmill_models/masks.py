"""Clips of several lengths in one batch: what lies behind a clip's end is set to what it would be without the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill_models.base import ModelError


def check_lengths(lengths: Tensor, clips: int) -> Tensor:
    """`lengths`, which must be whole numbers `[clips]`; raises `ModelError` otherwise. Their values stay unread."""
    if not isinstance(lengths, Tensor):
        raise ModelError(
            f"lengths are a {type(lengths).__name__}: allowed is an int64 tensor of shape ({clips},)"
        )
    if lengths.shape != (clips,) or lengths.dtype not in (torch.int64, torch.int32):
        raise ModelError(
            f"lengths are {lengths.dtype} of shape {tuple(lengths.shape)}: allowed is int64 of shape ({clips},)"
        )
    return lengths


def behind_end(x: Tensor, lengths: Tensor, time: int = 2) -> Tensor:
    """True for the places of `x` `[B, ...]` behind the first `lengths` `[B]` of its axis `time`; 1 on other axes."""
    behind = torch.arange(x.shape[time], device=x.device) >= lengths[:, None]
    return behind.view(x.shape[0], *(x.shape[time] if axis == time else 1 for axis in range(1, x.ndim)))


def own_only(x: Tensor, lengths: Tensor | None, time: int = 2) -> Tensor:
    """`x` `[B, ...]` with zeros behind the first `lengths` `[B]` places of each clip on axis `time`; None: as it is."""
    if lengths is None:
        return x
    return x.masked_fill(behind_end(x, lengths, time), 0)
