"""EAT's convolutional blocks: Res, the anti-aliased Down, and GMME in its place.

GMME, the gated multi mini-patch extractor (He et al., HSCMA 2024), stands in for the last two
Downs. Its paper gives neither code nor sizes enough: read to the letter, with one input channel
and C channels a branch, both blocks together have 4.4 K parameters at K = 32, C = 8, where 17.4 K
are printed. No such reading gives all the printed counts. From K = 32 to 64 at C = 16 they grow
by 32.8 to 33.0 K, and kernels of K x 4 taps grow by multiples of 1.024 K while channels come in
multiples of C / 2: the nearest is 32.768 K. Of the readings tried that the paper's equations allow,
the nearest is built, with 64KC + 140C + 2 for both blocks: 17,506, 35,010 and 67,778, where
17.4, 34.9 and 67.8 K are printed. It assumes:

- the input is an image of one channel, f bins by t frames, and s is 2;
- the gated branches have 4C channels and the global one half of that, as printed;
- kernels are K x 4, 4 x K and 4 x 4, which zeros around the image fit to the stride of 2
  exactly where K is even; behind an odd last frame stands one more;
- no convolution has a bias, and BatchNorm follows those of the branches, as in EAT's own
  blocks (the paper names none);
- PReLU has a slope for each channel in the branches, and one for the feature map;
- the pointwise convolution gives 4 channels of f / 2 bins, which are laid end to end as 2f.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEGATIVE_SLOPE = 0.2
TAPS = 15
STRIDE = 2


class Res(nn.Module):
    """Residual block that mixes channels and time apart: `[B, C, T] -> [B, C, T]`, T from 7 `dilation` + 1 up."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.shortcut = nn.Conv1d(channels, channels, 1)
        self.channels = nn.Sequential(
            convolution(channels, channels, 1),
            nn.BatchNorm1d(channels),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )
        self.time = nn.Sequential(
            convolution(channels, channels, TAPS, dilation=dilation, groups=channels),
            nn.BatchNorm1d(channels),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T] -> [B, C, T]`."""
        return self.shortcut(x) + self.channels(x) + self.time(x)


class Down(nn.Module):
    """Anti-aliased downsampling: `[B, channels, T] -> [B, 2 channels, ceil(T / factor)]`.

    A convolution without stride, then a fixed triangular blur with it (Zhang, ICML 2019).
    """

    blur: Tensor

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = convolution(channels, 2 * channels, factor + 1)
        self.norm = nn.BatchNorm1d(2 * channels)
        rise = torch.arange(1.0, factor + 2)
        triangle = torch.cat([rise, rise[:-1].flip(0)]) / (factor + 1) ** 2
        self.register_buffer("blur", triangle.repeat(2 * channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[B, channels, T] -> [B, 2 channels, ceil(T / factor)]`; T from `factor` + 1 up."""
        x = F.leaky_relu(self.norm(self.conv(x)), NEGATIVE_SLOPE, inplace=True)
        x = F.pad(x, (self.factor, self.factor), "reflect")
        return F.conv1d(x, self.blur, stride=self.factor, groups=x.shape[1])


def convolution(
    in_channels: int, channels: int, kernel: int, *, dilation: int = 1, groups: int = 1
) -> nn.Conv1d:
    """A convolution without bias that keeps the length, `[B, in_channels, T] -> [B, channels, T]`.

    It reflects at both ends; `kernel` is odd, and T more than half of it times `dilation`.
    """
    reach = dilation * (kernel // 2)
    return nn.Conv1d(
        in_channels,
        channels,
        kernel,
        padding=reach,
        dilation=dilation,
        groups=groups,
        bias=False,
        padding_mode="reflect",
    )


class GatedMiniPatch(nn.Module):
    """GMME: `[B, f, t] -> [B, 2f, ceil(t / 2)]`, for an even f; its size does not depend on f.

    Args:
        kernel: K, the longer side of the gated branches' kernels; even.
        channels: C, a quarter of the gated branches' channels.
    """

    def __init__(self, kernel: int, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.frequency = _branch(wide, (kernel, 2 * STRIDE))
        self.time = _branch(wide, (2 * STRIDE, kernel))
        self.overall = _branch(wide // 2, (2 * STRIDE, 2 * STRIDE))
        self.act = nn.PReLU()
        self.mix = nn.Conv2d(wide // 2, 2 * STRIDE, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, f, t] -> [B, 2f, ceil(t / 2)]`: Equations 1 to 5."""
        image = F.pad(x, (0, 1)).unsqueeze(1)
        gate_t, feature_t = self.time(image).chunk(2, 1)
        gate_f, feature_f = self.frequency(image).chunk(2, 1)
        gate = torch.sigmoid(gate_t) * torch.sigmoid(gate_f)
        feature = self.act(feature_t * feature_f)
        return self.mix(self.overall(image) + gate * feature).flatten(1, 2)


def _branch(channels: int, kernel: tuple[int, int]) -> nn.Sequential:
    """One of Eq. 1: `[B, 1, f, t + 1] -> [B, channels, f / 2, ceil(t / 2)]`."""
    padding = (kernel[0] // 2 - 1, kernel[1] // 2 - 1)
    convolution = nn.Conv2d(1, channels, kernel, STRIDE, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.PReLU(channels))
