"""ERANN: Efficient Residual Audio Neural Networks (Verbitskiy, Berikov and Vyshegorodtsev).

Two names for one network. The journal paper writes `erann-{s_m}-{W}`: s_m is how many of
the first stages shrink time by 4 instead of 2, W widens every layer. The preprint writes
`erann-{t_c}x{t_m}-{W}`, where t_m = 2 ** s_m and t_c is the length in seconds that it was
trained on, which changes nothing here.

The papers' text leaves gaps; what fills them is the one reading that gives the printed
parameter counts to the digit (docs/models.md has the table):

- No convolution has a bias. The shortcut's 1x1 convolution stands only where the size or
  the channels change, reads the block's raw input, and has a BatchNorm of its own.
- Nothing stands between the last block and the pooling. Global pooling is the mean plus
  the maximum over frequency and time together.
- The first block starts with a BatchNorm of one channel, without LeakyReLU. The text says
  that it has neither, while the counts hold the two parameters of that BatchNorm. It is
  applied here: parameters that are counted but never used would be dead weight in every
  checkpoint and break DistributedDataParallel, which waits for their gradients. After the
  BatchNorm over the bins it changes the scale of the input by next to nothing.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import ModelError, Printed, Tagger, check_positive, without_autocast
from clipmill_models.erann_printed import journal_figures, preprint_figures
from clipmill_models.masks import behind_end, check_lengths, own_only

NEGATIVE_SLOPE = 0.01
STAGES = 5

_KERNELS = {1: (3, 3, 1), 2: (3, 3, 1), 4: (6, 5, 2)}
"""Stride -> (kernel of conv1, kernel of conv2, padding of conv2): Eq. 5 of the journal paper."""

_JOURNAL = re.compile(r"erann-([0-3])-([1-9][0-9]{0,3})")
_PREPRINT = re.compile(r"erann-([1-9][0-9]{0,3})x(1|2|4|8|16)-([1-9][0-9]{0,3})")


class AudioResidualBlock(nn.Module):
    """ARB(x, y, c) of the journal's Table 2: a pre-activated block of two convolutions.

    `[B, in_channels, F, T] -> [B, channels, ceil(F / x), T / y]` for strides (x, y), each
    1, 2 or 4. T must be divisible by y = 4, where conv1 rounds down and the shortcut up.

    Args:
        in_channels: channels of the input.
        channels: channels of the output.
        stride: (x, y), for frequency and time.
        first: the network's first block, which begins without LeakyReLU.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: tuple[int, int] = (1, 1), *, first: bool = False
    ) -> None:
        super().__init__()
        k1, k2, padding = zip(*(_KERNELS[axis] for axis in stride), strict=True)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act1: nn.Module = nn.Identity() if first else nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, k1, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act2 = nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, k2, padding=padding, bias=False)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels or stride != (1, 1):
            self.shortcut = _Shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """`[B, in_channels, F, T] -> [B, channels, F', T']`.

        `before` and `after`, int64 `[B]`, say how many of T and of T' are each clip's own;
        what lies behind, the convolutions take for their padding.
        """
        y = self.conv1(own_only(self.act1(self.norm1(x)), before, time=3))
        y = self.conv2(own_only(self.act2(self.norm2(y)), after, time=3))
        return y + self.shortcut(x)


class _Shortcut(nn.Module):
    """Conv2D_RES and its BatchNorm: `[B, in_channels, F, T] -> [B, channels, ceil(F / x), ceil(T / y)]`."""

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution needs no stride of its own, and with one, in channels_last with under 16
        # channels, the backward pass on CPU writes past its buffer and crashes (uxlfoundation/oneDNN#6035).
        return self.norm(self.conv(x[:, :, :: self.stride[0], :: self.stride[1]]))


class Erann(Tagger):
    """ERANN of any width and strides: `[B, bins, frames] -> logits [B, classes]`.

    Softmax or sigmoid is the caller's. Any number of bins and of frames will do: time is
    padded to a multiple of `time_stride` (a whole second holds 128 frames, so up to
    s_m = 3 nothing is added to whole seconds). The padding comes after the BatchNorm over
    the bins, where zero is the mean, as it is for the convolutions' own padding; on the
    log-mel itself 0 dB would be loud. `model.to(memory_format=torch.channels_last)` makes
    it faster, on a CPU too.

    With `lengths`, a batch of clips padded to the longest gives, in evaluation mode, what
    each clip gives alone: behind a clip's end every convolution sees its own zero padding,
    and the pooling skips it. Without, the padding takes part in the pooling like any sound.
    In training mode the batch's statistics take the padding in either way.

    Args:
        name: the canonical name, kept as `.name`.
        time_strides: strides over time of stages 1 to 4, each 2 or 4.
        width: W; stage i has 8 * W * 2**i channels.
        num_classes: number of logits.
        in_bins: bins of the input.
    """

    input: ClassVar[str] = "features"
    features: ClassVar[dict[str, Any] | None] = {}
    HEAD: ClassVar[tuple[str, ...]] = ("fc2",)
    PRINTED: ClassVar[tuple[Printed, ...]] = (*journal_figures(), *preprint_figures())
    GRAMMAR: ClassVar[str] = (
        "erann-{s_m}-{W} with s_m 0, 1, 2 or 3 (erann-1-6), or erann-{t_c}x{t_m}-{W} with t_m 1, 2, 4, 8 "
        "or 16 (erann-8x2-6), where W and t_c are whole numbers from 1 to 9999"
    )
    NAMES: ClassVar[tuple[str, ...]] = tuple(
        f"erann-{size}"
        for size in (
            # Journal, Tables 4 and 6; then the preprint's Table 4, whose other tables name the same with another t_c.
            *("0-3", "1-3", "0-4", "1-4", "2-4", "2-5", "0-6", "1-6", "2-6", "3-6"),
            *("8x4-4", "8x4-5", "8x1-6", "8x2-6", "8x4-6", "8x8-6"),
        )
    )

    def __init__(
        self, name: str, time_strides: tuple[int, int, int, int], width: int, num_classes: int, in_bins: int
    ) -> None:
        super().__init__()
        self.name = name
        self.in_bins = in_bins
        self.time_strides = time_strides
        self.time_stride = math.prod(time_strides)
        channels = [8 * width * 2**stage for stage in range(STAGES)]
        self.norm = nn.BatchNorm1d(in_bins)
        self.stages = nn.Sequential(_stage(1, channels[0], (1, 1), first=True))
        for stage in range(1, STAGES):
            self.stages.append(_stage(channels[stage - 1], channels[stage], (2, time_strides[stage - 1])))
        self.fc1 = nn.Linear(channels[-1], channels[-1])
        self.fc2 = nn.Linear(channels[-1], num_classes)
        self.reset_parameters()

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Erann:
        """Build from a lower-case name of either scheme; raises `ModelError` for any other."""
        check_positive("num_classes", num_classes)
        check_positive("in_bins", in_bins)
        if match := _JOURNAL.fullmatch(name):
            fours, width = int(match[1]), int(match[2])
        elif match := _PREPRINT.fullmatch(name):
            # Eq. 2 of the preprint: strides of 2 or 4, never growing, whose product is 16 * t_m.
            fours, width = int(match[2]).bit_length() - 1, int(match[3])
        else:
            raise ModelError(f"no model is called {name!r}: allowed is {cls.GRAMMAR}")
        s1, s2, s3, s4 = (4 if stage < fours else 2 for stage in range(STAGES - 1))
        return cls(name, (s1, s2, s3, s4), width, num_classes, in_bins)

    def reset_parameters(self) -> None:
        """Draw fresh weights.

        Convolutions: He's normal distribution by fan-out, as WideResNet does, whose blocks
        these are; the papers name none. Linear and BatchNorm layers keep torch's defaults.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, NEGATIVE_SLOPE, mode="fan_out")

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of features `[B, bins, frames]` (log-mel in dB, or any scale of it).

        `lengths`, int64 `[B]`, says how many frames are each clip's own, from 1 up.

        Raises:
            ModelError: another shape, other bins than the model was built for, or no frames.
        """
        self.check_input(x)
        frames = x.shape[2]
        x = self.norm(x.to(self.norm.weight.dtype))
        # [B, 1, bins, T], T a multiple of the stride
        x = F.pad(x, (0, -frames % self.time_stride)).unsqueeze(1)
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[0]).clamp(1, frames)
            x = own_only(x, lengths, time=3)
            # A clip alone would be padded to this many frames.
            lengths = (lengths + self.time_stride - 1) // self.time_stride * self.time_stride
        for stage, stride in zip(self.stages, (1, *self.time_strides), strict=True):
            after = None if lengths is None else lengths // stride
            x = stage(x, lengths, after)
            lengths = after
        x = _pool(x, lengths)  # of [B, 128 W, bins / 16, frames / time_stride]
        with without_autocast(x):
            x = self.fc1(x.to(self.fc1.weight.dtype))
            return self.fc2(F.leaky_relu(x, NEGATIVE_SLOPE)).float()


def _pool(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Mean plus maximum over frequency and each clip's own time: `[B, C, F, T] -> [B, C]` float32."""
    if lengths is None:
        return x.mean((2, 3), dtype=torch.float32) + x.amax((2, 3)).float()
    mean = own_only(x, lengths, time=3).sum((2, 3), dtype=torch.float32) / (lengths * x.shape[2])[:, None]
    return mean + x.masked_fill(behind_end(x, lengths, time=3), float("-inf")).amax((2, 3)).float()


class Stage(nn.Sequential):
    """One stage of Table 1: its `AudioResidualBlock`s."""

    def forward(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """`[B, in_channels, F, T] -> [B, channels, F', T']`; see `AudioResidualBlock.forward`."""
        for block in self:
            x = block(x, before, after)
            before = after
        return x


def _stage(
    in_channels: int, channels: int, stride: tuple[int, int], *, first: bool = False, blocks: int = 4
) -> Stage:
    """A block that changes the size, then blocks that keep it."""
    opening = AudioResidualBlock(in_channels, channels, stride, first=first)
    return Stage(opening, *(AudioResidualBlock(channels, channels) for _ in range(blocks - 1)))
