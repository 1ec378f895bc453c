"""What every family of networks shares: its contract, its error, printed figures, and how sizes are counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


class ModelError(ValueError):
    """A model's name, size or input that cannot be; the text lists what is allowed."""


@dataclass(frozen=True)
class Printed:
    """A figure that a paper prints of a network.

    Attributes:
        model: the network's canonical name here.
        figure: as printed: "54,532,241", "54.5 M", "17.4 K", "26.21 G" or "108".
        quantity: "parameters", "multiply-adds" (of a clip of `seconds`), "downsampler parameters", or
            "audios/s, B=1" and "audios/s, B=32" (clips of `seconds` a second at a batch size, on a V100).
        source: the paper and its table.
        num_classes: classes of the network that it was printed for.
        seconds: length of the clip, where it matters.
        note: why ours differs, where it does.
    """

    model: str
    figure: str
    quantity: str
    source: str
    num_classes: int = 527
    seconds: float = 10.0
    note: str = ""

    def agrees(self, value: float) -> bool:
        """Whether `value`, rounded as the figure is, is the figure."""
        number, _, unit = self.figure.partition(" ")
        digits = len(number.partition(".")[2])
        scaled = value / {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[unit]
        return f"{scaled:.{digits}f}" == number.replace(",", "")


class Tagger(nn.Module):
    """A network from one kind of input to logits; the base of every family.

    A family is one subclass and one line in `clipmill_models.FAMILIES`. It declares what
    it takes, which names it answers to and how to build one from its name.

    Attributes:
        input: "features" for `[B, bins, frames]`, "waveform" for `[B, samples]` in -1..1.
        sample_rate: Hz that the network is made for; None where any will do.
        features: settings of the log-mel that it is made for, by the names of
            `clipmill.features.LogMelSettings`, in dB; None where it takes waveforms, and
            empty where any will do. `n_mels` gives `in_bins` its default.
        NAMES: the canonical names of the papers' own configurations.
        GRAMMAR: every name that is allowed, in one line for error messages.
        PRINTED: what the papers print of them.
        HEAD: the names of the last layers, which transfer to other classes draws anew.
        name: the canonical name that this one was built by.
        in_bins: bins of the features that this one takes; 0 for waveforms.
        longest: the most frames, or samples, that this one takes; None: any number.
    """

    input: ClassVar[str]
    in_bins: int = 0
    longest: int | None = None
    sample_rate: int | None = None
    features: ClassVar[dict[str, Any] | None] = None
    NAMES: ClassVar[tuple[str, ...]]
    GRAMMAR: ClassVar[str]
    PRINTED: ClassVar[tuple[Printed, ...]] = ()
    HEAD: ClassVar[tuple[str, ...]]
    name: str

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Tagger:
        """Build the network called `name` (lower case); raises `ModelError` where there is none."""
        raise NotImplementedError

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32 under autocast too.

        Args:
            x: features `[B, bins, frames]` or waveforms `[B, samples]`, by `input`.
            lengths: int64 `[B]`, how many of the frames or samples are each clip's own; what
                lies behind them is then not heard, as far as the family's docstring says.
                None: all of them.

        Raises:
            ModelError: an input of another shape than the network takes.
        """
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        """Raise `ModelError` unless `x` is floating point, of a shape and a length that the network takes."""
        features = self.input == "features"
        fits = x.ndim == (3 if features else 2) and (not features or x.shape[1] == self.in_bins)
        most = self.longest
        if fits and x.is_floating_point() and x.shape[-1] >= 1 and (most is None or x.shape[-1] <= most):
            return
        what = f"[batch, {self.in_bins}, frames]" if features else "[batch, samples]"
        unit = "frame" if features else "sample"
        raise ModelError(
            f"{self.name} got {x.dtype} of shape {tuple(x.shape)}: allowed is floating point of shape {what} with "
            + (f"at least 1 {unit}" if most is None else f"1 to {most} {unit}s")
        )

    def input_shape(self, seconds: float) -> tuple[int, ...]:
        """Shape of one clip of so many seconds, without the batch, as the network's own front end gives it.

        `(samples,)` for waveforms, `(bins, frames)` for features: 128 frames of every second
        begun where the family names no hop, else a frame centred on every hop.
        """
        if self.input == "waveform":
            assert self.sample_rate is not None
            return (round(seconds * self.sample_rate),)
        settings = self.features or {}
        if "hop" not in settings:
            return self.in_bins, 128 * math.ceil(seconds)
        return self.in_bins, int(seconds * settings["sample_rate"]) // settings["hop"] + 1


def check_positive(what: str, value: Any) -> int:
    """`value` as an int of at least 1; raises `ModelError` naming `what` otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ModelError(f"{what} is {value!r}: allowed is any whole number from 1 up")
    return int(value)


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast is off on the device of `x`; also for the meta device, which autocast does not know.

    The last layers run in it: bfloat16 logits would tie many clips' scores, and a ranking metric is made of
    their order.
    """
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters, as the papers print it (buffers are not counted)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass of one clip, as the papers count them.

    That is what its convolutions and products of matrices take (attention's among them), and
    the weights of every normalisation layer once. Biases, activations, pooling and additions
    are free.

    Args:
        model: any network; its mode, weights and device are left as they are.
        input_shape: shape of one clip without the batch, such as `(128, 1280)` for 128
            bins of 10 s.

    Nothing is computed: the pass runs on the meta device, in evaluation mode.
    """
    modes = {layer: layer.training for layer in model.modules()}
    norms = [layer for layer in modes if isinstance(layer, _NORMS)]
    once = sum(norm.weight.numel() for norm in norms if isinstance(norm.weight, Tensor))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    model.eval()
    try:
        # With gradients on, torch's transformer layers take their open path; the fused one hides its products.
        with torch.enable_grad(), PassedOver(_FREE), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, on_meta, (torch.empty(1, *input_shape, device="meta"),))
    finally:
        for layer, training in modes.items():
            layer.training = training
    return counter.get_total_flops() // 2 + once


class PassedOver(TorchFunctionMode):
    """A context in which some functions give back their first argument: on the meta device they do but take time."""

    def __init__(self, functions: Collection[Any]) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in self._functions and args:
            return args[0]
        return func(*args, **(kwargs or {}))


# Of all that is free what keeps the shape, and of which the meta device makes more work than of all the rest.
_FREE = {functional.batch_norm, functional.leaky_relu, functional.relu}

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
