"""Wavegram, a time-frequency picture that is learnt from the waveform (Kong et al. 2020, PANNs), and ERANN on it.

With it, the blocks that all of PANNs' networks are made of.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import ModelError, Tagger, check_positive
from clipmill_models.erann import Erann
from clipmill_models.masks import check_lengths, own_only


class Wavegram(nn.Module):
    """Wavegram of PANNs: `[B, samples] -> [B, 128, frames]`, a frame for every 320 samples.

    A convolution with a stride of 5, then three blocks that each keep the maximum of 4
    places; 64, 64, 128 and 128 channels. Layers are named as in PANNs' checkpoints. Of
    samples that fill no whole frame, those behind the last are dropped.
    """

    CHANNELS: ClassVar[int] = 128
    HOP: ClassVar[int] = 320

    def __init__(self) -> None:
        super().__init__()
        self.pre_conv0 = nn.Conv1d(1, 64, 11, stride=5, padding=5, bias=False)
        self.pre_bn0 = nn.BatchNorm1d(64)
        self.pre_block1 = ConvPreWavBlock(64, 64)
        self.pre_block2 = ConvPreWavBlock(64, 128)
        self.pre_block3 = ConvPreWavBlock(128, self.CHANNELS)
        draw_weights(self)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Wavegram `[B, 128, frames]` of waveforms `[B, samples]` of at least 316 samples.

        With `lengths` (int64 `[B]`, samples), the first `wavegram_frames(lengths)` frames of
        a clip are, in evaluation mode, those that the clip gives alone.
        """
        x = own_only(x[:, None].to(self.pre_conv0.weight.dtype), lengths)
        x = F.relu_(self.pre_bn0(self.pre_conv0(x)))
        lengths = None if lengths is None else (lengths + 4) // 5
        for block in (self.pre_block1, self.pre_block2, self.pre_block3):
            x = block(x, lengths)
            lengths = None if lengths is None else lengths // 4
        return x


def wavegram_frames(samples: Tensor) -> Tensor:
    """Frames that clips of so many `samples` give: int64 `[B] -> [B]`."""
    return (samples + 4) // 5 // 64


class ConvPreWavBlock(nn.Module):
    """Two convolutions over time, the second dilated, and a maximum of 4: `[B, C, T] -> [B, out_channels, T // 4]`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv1d(out_channels, out_channels, 3, padding=2, dilation=2, bias=False)
        self.bn1 = nn.BatchNorm1d(out_channels)
        self.bn2 = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`[B, C, T] -> [B, out_channels, T // 4]`; places behind `lengths` `[B]` are taken for padding."""
        x = F.relu_(self.bn1(self.conv1(own_only(x, lengths))))
        x = F.relu_(self.bn2(self.conv2(own_only(x, lengths))))
        # The same pooling in 1d would bind the length when torch traces it.
        return F.max_pool2d(x[:, :, None], (1, 4))[:, :, 0]


class ConvBlock(nn.Module):
    """Two 3x3 convolutions and a mean: `[B, C, T, F] -> [B, out_channels, T // p, F // q]` for pool (p, q)."""

    def __init__(self, in_channels: int, out_channels: int, pool: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`[B, C, T, F] -> [B, out_channels, T // p, F // q]`; frames behind `lengths` `[B]` are taken for padding."""
        x = F.relu_(self.bn1(self.conv1(own_only(x, lengths))))
        x = F.relu_(self.bn2(self.conv2(own_only(x, lengths))))
        return x if self.pool == (1, 1) else F.avg_pool2d(x, self.pool)


class WavegramErann(Tagger):
    """ERANN that reads a Wavegram in place of a log-mel: `[B, samples] -> logits [B, classes]`.

    The Wavegram's 128 channels are taken for the 128 bins. At 40,960 Hz it gives 128 frames of
    every whole second, as many as any other feature. The authors' slides tried it (RANN with
    Wavegram); their sizes and their rate of it are not in the text: these are PANNs' sizes.

    With `lengths`, a padded batch gives in evaluation mode what each clip gives alone.
    Waveforms of under 320 samples, one frame, are padded with zeros.
    """

    input: ClassVar[str] = "waveform"
    sample_rate = 128 * Wavegram.HOP
    HEAD: ClassVar[tuple[str, ...]] = ("erann.fc2",)
    NAMES: ClassVar[tuple[str, ...]] = ("wavegram-erann-2-5", "wavegram-erann-1-6")
    GRAMMAR: ClassVar[str] = "wavegram- and after it the name of an ERANN (wavegram-erann-1-6)"

    def __init__(self, name: str, erann: Erann) -> None:
        super().__init__()
        self.name = name
        self.wavegram = Wavegram()
        self.erann = erann

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int = 0) -> WavegramErann:
        """Build from a lower-case name; `in_bins` says nothing. Raises `ModelError` for any other name."""
        check_positive("num_classes", num_classes)
        try:
            erann = Erann.from_name(name.removeprefix("wavegram-"), num_classes, Wavegram.CHANNELS)
        except ModelError as error:
            allowed = f"wavegram- and after it {Erann.GRAMMAR}"
            raise ModelError(f"no model is called {name!r}: allowed is {allowed}") from error
        return cls(name, erann)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of waveforms `[B, samples]` in -1..1 at 40,960 Hz.

        Raises:
            ModelError: another shape, or no samples.
        """
        self.check_input(x)
        x, lengths = prepare_waveform(x, lengths, least=Wavegram.HOP)
        picture = self.wavegram(x, lengths)
        return self.erann(picture, None if lengths is None else wavegram_frames(lengths))


def prepare_waveform(x: Tensor, lengths: Tensor | None, least: int) -> tuple[Tensor, Tensor | None]:
    """Silence waveforms `[B, samples]` behind `lengths`, and pad them with zeros to `least` samples.

    Returns:
        The waveforms, float32, and their lengths, both of at least `least`.

    Raises:
        ModelError: wrong lengths.
    """
    x = x.float()
    if lengths is not None:
        lengths = check_lengths(lengths, x.shape[0]).clamp(1, x.shape[1])
        x = own_only(x, lengths, time=1)
        lengths = lengths.clamp(min=least)
    return F.pad(x, (0, pad_to(least, x.shape[1]))), lengths


def halved(lengths: Tensor | None) -> Tensor | None:
    """Lengths behind a pooling by 2."""
    return None if lengths is None else lengths // 2


def pad_to(least: int, places: int) -> int:
    """How many places are missing to `least`; never below 0. Open to sizes that are symbols in an export."""
    missing: Any = torch.sym_max(least - places, 0)
    return missing


def draw_weights(model: nn.Module) -> None:
    """PANNs' fresh weights: Xavier's uniform distribution for convolutions and linear layers, biases of 0."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
