"""The exponential moving average of a network's weights, which is what gets evaluated (journal, Eq. 6)."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay rate of the update after step `step` (from 0).

    The paper's is constant. With decay 0.999 the fresh weights then still make up a third of
    the average after 1,000 steps: nothing, in 20k steps, but all of a short run. The warm-up
    min(decay, (1 + t) / (10 + t)) forgets them at once, and equals the paper from step 8,990 on.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


class Ema:
    """An averaged copy of a network, in evaluation mode, on the same device.

    Not `torch.optim.swa_utils.AveragedModel`: that one starts from the weights after the first
    step where Eq. 6 starts from the fresh ones, counts its updates in a tensor, and would make
    every step wait for the device to read it.

    Attributes:
        module: the averaged network. Its buffers are averaged too, for batch norm's statistics
            belong to the weights that made them; integer buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float, *, warmup: bool) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        # Found once: a network of hundreds of tensors is otherwise asked for them at every step.
        ours, theirs = self.module.state_dict(), model.state_dict()
        pairs = [(ours[name], theirs[name]) for name in ours]
        self._floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step` (from 0); those of the very tensors that the network began with."""
        average = get_ema_multi_avg_fn(decay_at(step, self.decay, self.warmup))
        average([own for own, _ in self._floats], [other for _, other in self._floats], None)
        if self._counts:
            torch._foreach_copy_([own for own, _ in self._counts], [other for _, other in self._counts])
