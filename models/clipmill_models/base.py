"""What every family of networks shares: its contract, its error, and how sizes are counted."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A model's name, size or input that cannot be; the text lists what is allowed."""


class Tagger(nn.Module):
    """A network from one kind of input to logits; the base of every family.

    A family is one subclass and one line in `clipmill_models.FAMILIES`. It declares what
    it takes (`input`), which names it answers to (`NAMES`, `GRAMMAR`) and how to build
    one from its name (`from_name`).

    Attributes:
        input: "features" for `[B, bins, frames]`, "waveform" for `[B, samples]`.
        NAMES: the canonical names of the papers' own configurations.
        GRAMMAR: every name that is allowed, in one line for error messages.
        name: the canonical name that this one was built by.
    """

    input: ClassVar[str]
    NAMES: ClassVar[tuple[str, ...]]
    GRAMMAR: ClassVar[str]
    name: str

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Tagger:
        """Build the network called `name` (lower case); raises `ModelError` where there is none."""
        raise NotImplementedError


def check_positive(what: str, value: Any) -> int:
    """`value` as an int of at least 1; raises `ModelError` naming `what` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{what} is {value!r}: allowed is any whole number from 1 up")
    return value


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters, as the papers print it (buffers are not counted)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass of one clip, as the papers count them.

    That is, over the layers that the pass reaches: the weights of a convolution times its
    output positions, and the weights of everything else (Linear, BatchNorm) once. Biases,
    activations, pooling and additions are free.

    Args:
        model: any network; its mode, weights and device are left as they are.
        input_shape: shape of one clip without the batch, such as `(128, 1280)` for 128
            bins of 10 s.

    Nothing is computed: the pass runs on the meta device.
    """
    total = 0

    def add(layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            # A convolution's output is [B, channels, *positions]; its weights run once at each position.
            is_conv = isinstance(layer, nn.Conv1d | nn.Conv2d)
            total += weight.numel() * (math.prod(output.shape[2:]) if is_conv else 1)

    handles = [layer.register_forward_hook(add) for layer in model.modules() if not list(layer.children())]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad():
            # Two clips, because BatchNorm in training mode refuses one clip of one position.
            torch.func.functional_call(model, on_meta, (torch.empty(2, *input_shape, device="meta"),))
    finally:
        for handle in handles:
            handle.remove()
    return total
