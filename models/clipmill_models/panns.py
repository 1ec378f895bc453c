"""PANNs: CNN14, ResNet38 and Wavegram-Logmel-CNN (Kong et al. 2020), which the ERANN papers compare with.

Layers, their order, dropout and initialisation are those of the published code and weights
(qiuqiangkong/audioset_tagging_cnn), and so are the names of all parameters and buffers:
a published checkpoint loads by name, without the constants of its own front end, whose
names begin with `spectrogram_extractor.` and `logmel_extractor.`. Convolutions run over
`[B, C, frames, bins]`, in that order, as those weights want it.

Not in here: the sigmoid, and SpecAugment and mixup, which are the training's.

PANNs' "multi-adds" are two operations for each multiply-add, the Fourier transform's
(as a convolution with 1024 taps) among them, and two for every value that BatchNorm puts
out, and that a ReLU or a pooling does where it is a module of its own, as in the blocks of
ResNet38. Counted so, these networks give the three printed figures to the digit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import ModelError, Printed, Tagger, check_positive, without_autocast
from clipmill_models.logmel import RealLogMel, mirror_ends
from clipmill_models.masks import behind_end, check_lengths, own_only
from clipmill_models.wavegram import (
    ConvBlock,
    Wavegram,
    draw_weights,
    halved,
    pad_to,
    prepare_waveform,
    wavegram_frames,
)  # fmt: skip

LEAST = 32
"""Five halvings leave one place of so many frames or bins."""

_LOG_MEL: dict[str, Any] = {
    "sample_rate": 32000, "n_fft": 1024, "win_length": 1024, "hop": 320, "f_min": 50.0, "f_max": 14000.0, "n_mels": 64,
}  # fmt: skip

_TWO_FOR_ONE = "as PANNs prints it: operations, two to a multiply-add, the Fourier transform's among them"
_MULTIPLY_ADDS = "RANN slides, Table XII, after PANNs"


class _Panns(Tagger):
    """What the three share: the first BatchNorm, the pooling and the head; subclasses give `_layers`.

    Any bins from 32 up and any number of frames will do. Under 32 frames are padded with
    zeros behind the first BatchNorm, where zero is the mean; 0 dB would be loud. With
    `lengths`, a padded batch gives in evaluation mode what each clip gives alone; in
    training mode BatchNorm's statistics take the padding in.
    """

    input: ClassVar[str] = "features"
    sample_rate = 32000
    features: ClassVar[dict[str, Any] | None] = _LOG_MEL
    HEAD: ClassVar[tuple[str, ...]] = ("fc_audioset",)

    def __init__(self, num_classes: int, in_bins: int) -> None:
        super().__init__()
        self.name = self.NAMES[0]
        self.in_bins = in_bins
        self.bn0 = nn.BatchNorm1d(in_bins)
        self.fc1 = nn.Linear(2048, 2048)
        self.fc_audioset = nn.Linear(2048, num_classes)

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Tagger:
        """Build from the one name there is, for 32 bins and more; raises `ModelError` for any other."""
        if name not in cls.NAMES:
            raise ModelError(f"no model is called {name!r}: allowed is {cls.GRAMMAR}")
        check_positive("num_classes", num_classes)
        if check_positive("in_bins", in_bins) < LEAST:
            raise ModelError(f"in_bins is {in_bins}: {name} allows any whole number from {LEAST} up")
        return cls(num_classes, in_bins)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of log-mel features `[B, bins, frames]` in dB.

        `lengths`, int64 `[B]`, says how many frames are each clip's own, from 1 up.

        Raises:
            ModelError: another shape, other bins than the model was built for, or no frames.
        """
        self.check_input(x)
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[0]).clamp(1, x.shape[2])
        x = self._image(x, lengths)
        return self._logits(*self._layers(x, None if lengths is None else lengths.clamp(min=LEAST)))

    def _layers(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`[B, 1, T, bins] -> [B, 2048, T // 32, bins // 32]`, and the lengths there."""
        raise NotImplementedError

    def _image(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """Normalised features `[B, bins, T]` as an image `[B, 1, max(T, 32), bins]`, zero where there is no clip."""
        x = own_only(self.bn0(features.to(self.bn0.weight.dtype)), lengths)
        return F.pad(x, (0, pad_to(LEAST, x.shape[2]))).transpose(1, 2)[:, None]

    def _dropout(self, x: Tensor, p: float = 0.2) -> Tensor:
        return F.dropout(x, p, self.training)

    def _logits(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Mean over bins, maximum plus mean over own frames, head: `[B, 2048, T, F] -> [B, classes]` float32."""
        x = self._dropout(x).mean(3, dtype=torch.float32)
        if lengths is None:
            x = x.amax(2) + x.mean(2)
        else:
            mean = own_only(x, lengths).sum(2) / lengths[:, None]
            x = x.masked_fill(behind_end(x, lengths), float("-inf")).amax(2) + mean
        with without_autocast(x):
            x = self._dropout(x, 0.5).to(self.fc1.weight.dtype)
            return self.fc_audioset(F.relu_(self.fc1(x))).float()


class Cnn14(_Panns):
    """CNN14: six blocks of two convolutions. `[B, bins, frames] -> logits [B, classes]`.

    Made for 64 mel bins, 100 frames a second; any bins from 32 up and any number of frames
    will do. Under 32 frames are padded with zeros behind the first BatchNorm. With
    `lengths`, a padded batch gives in evaluation mode what each clip gives alone.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("cnn14",)
    GRAMMAR: ClassVar[str] = "cnn14"
    PRINTED: ClassVar[tuple[Printed, ...]] = (
        # The preprint prints this count for 128 mel bins too, where the network has 128 more.
        Printed("cnn14", "80,753,615", "parameters", "preprint, Table 4"),
        Printed("cnn14", "80.7 M", "parameters", "journal, Table 5", note="80.754, printed cut off"),
        Printed("cnn14", "79.8 M", "parameters", "journal, Table 7", num_classes=50),
        Printed("cnn14", "79.7 M", "parameters", "journal, Table 9", num_classes=8),
        Printed("cnn14", "42.220 G", "multiply-adds", _MULTIPLY_ADDS, note=_TWO_FOR_ONE),
    )
    _JOINED: ClassVar[int] = 64

    def __init__(self, num_classes: int, in_bins: int) -> None:
        super().__init__(num_classes, in_bins)
        self.conv_block1 = ConvBlock(1, 64)
        self.conv_block2 = ConvBlock(self._JOINED, 128)
        self.conv_block3 = ConvBlock(128, 256)
        self.conv_block4 = ConvBlock(256, 512)
        self.conv_block5 = ConvBlock(512, 1024)
        self.conv_block6 = ConvBlock(1024, 2048, (1, 1))
        draw_weights(self)

    def _layers(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._from_block2(self.conv_block1(x, lengths), halved(lengths))

    def _from_block2(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for block in (self.conv_block2, self.conv_block3, self.conv_block4, self.conv_block5):
            x = block(self._dropout(x), lengths)
            lengths = halved(lengths)
        return self.conv_block6(self._dropout(x), lengths), lengths


class BasicBlock(nn.Module):
    """Residual block of ResNet38: `[B, C, T, F] -> [B, channels, T // stride, F // stride]`.

    A stride of 2 is a mean of 2x2 before the first convolution, not a stride of it.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride == 2:
            shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)
            self.downsample = nn.Sequential(nn.AvgPool2d(2), shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`[B, C, T, F] -> [B, channels, T', F']`; frames behind `lengths` `[B]`, of the output, are padding."""
        y = F.avg_pool2d(x, 2) if self.stride == 2 else x
        y = self.relu(self.bn1(self.conv1(own_only(y, lengths))))
        y = F.dropout(y, 0.1, self.training)
        y = self.bn2(self.conv2(own_only(y, lengths)))
        return self.relu(y + self.downsample(x))


class ResNet38(_Panns):
    """ResNet38: 3 + 4 + 6 + 3 residual blocks between two `ConvBlock`s. `[B, bins, frames] -> logits [B, classes]`.

    Made for 64 mel bins, 100 frames a second; any bins from 32 up and any number of frames
    will do. Under 32 frames are padded with zeros behind the first BatchNorm. With
    `lengths`, a padded batch gives in evaluation mode what each clip gives alone.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("resnet38",)
    GRAMMAR: ClassVar[str] = "resnet38"
    PRINTED: ClassVar[tuple[Printed, ...]] = (
        Printed("resnet38", "73,783,247", "parameters", "preprint, Table 4"),
        Printed("resnet38", "48.962 G", "multiply-adds", _MULTIPLY_ADDS, note=_TWO_FOR_ONE),
    )

    def __init__(self, num_classes: int, in_bins: int) -> None:
        super().__init__(num_classes, in_bins)
        self.conv_block1 = ConvBlock(1, 64)
        self.resnet = nn.ModuleDict()
        inputs = 64
        for layer, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
            opening = BasicBlock(inputs, channels, stride=1 if layer == 1 else 2)
            rest = (BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
            self.resnet[f"layer{layer}"] = nn.ModuleList([opening, *rest])
            inputs = channels
        self.conv_block_after1 = ConvBlock(512, 2048, (1, 1))
        draw_weights(self)
        for block in self._blocks():
            # Every block begins as its shortcut, so its convolutions' first gradients are zero.
            nn.init.zeros_(block.bn2.weight)

    def _blocks(self) -> list[BasicBlock]:
        return [module for module in self.resnet.modules() if isinstance(module, BasicBlock)]

    def _layers(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self._dropout(self.conv_block1(x, lengths))
        lengths = halved(lengths)
        for block in self._blocks():
            lengths = halved(lengths) if block.stride == 2 else lengths
            x = block(x, lengths)
        x, lengths = self._dropout(F.avg_pool2d(x, 2)), halved(lengths)
        return self.conv_block_after1(x, lengths), lengths


class WavegramLogmelCnn(Cnn14, Wavegram):
    """Wavegram-Logmel-CNN: CNN14 on a Wavegram and a log-mel side by side. `[B, samples] -> logits [B, classes]`.

    Takes waveforms of 32 kHz; its log-mel (64 bins) is made inside, and its products count
    among the multiply-adds. Any number of samples will do: under 10,240 (0.32 s) are padded
    with zeros. Where the log-mel has a frame more than the Wavegram, it is cut to it: 10 s
    give 500 places of both. With `lengths`, a padded batch gives in evaluation mode what
    each clip gives alone; the log-mel is mirrored at each clip's own end.

    The Wavegram's layers lie at the top, next to the others, as in the published weights.
    """

    input: ClassVar[str] = "waveform"
    features: ClassVar[dict[str, Any] | None] = None
    NAMES: ClassVar[tuple[str, ...]] = ("wavegram-logmel-cnn",)
    GRAMMAR: ClassVar[str] = "wavegram-logmel-cnn"
    PRINTED: ClassVar[tuple[Printed, ...]] = (
        Printed("wavegram-logmel-cnn", "81,065,487", "parameters", "preprint, Table 4"),
        Printed("wavegram-logmel-cnn", "81.1 M", "parameters", "journal, Table 5"),
        Printed("wavegram-logmel-cnn", "53.510 G", "multiply-adds", _MULTIPLY_ADDS, note=_TWO_FOR_ONE),
    )
    _JOINED: ClassVar[int] = 128

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, _LOG_MEL["n_mels"])
        self.in_bins = 0
        self.logmel = RealLogMel(**_LOG_MEL)
        self.pre_block4 = ConvBlock(4, 64, (2, 1))
        draw_weights(self.pre_block4)

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int = 0) -> WavegramLogmelCnn:
        """Build from the one name there is; `in_bins` says nothing. Raises `ModelError` for any other."""
        if name not in cls.NAMES:
            raise ModelError(f"no model is called {name!r}: allowed is {cls.GRAMMAR}")
        return cls(check_positive("num_classes", num_classes))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of waveforms `[B, samples]` in -1..1 at 32 kHz.

        `lengths`, int64 `[B]`, says how many samples are each clip's own, from 1 up.

        Raises:
            ModelError: another shape, or no samples.
        """
        self.check_input(x)
        wave, lengths = prepare_waveform(x, lengths, least=LEAST * self.HOP)
        learnt = Wavegram.forward(self, wave, lengths)
        frames = None if lengths is None else wavegram_frames(lengths)
        # 128 channels become 4 of 32 bins: [B, 4, frames, 32].
        learnt = self.pre_block4(learnt.unflatten(1, (4, 32)).transpose(2, 3), frames)
        hops = None if lengths is None else lengths // self.HOP + 1
        x = self.conv_block1(self._image(self._log_mel(wave, lengths), hops), hops)
        x = torch.cat([x[:, :, : learnt.shape[2]], learnt], 1)
        return self._logits(*self._from_block2(x, halved(frames)))

    def _log_mel(self, wave: Tensor, lengths: Tensor | None) -> Tensor:
        """`[B, samples] -> [B, 64, samples // 320 + 1]`, each clip mirrored at its own end as if it were alone."""
        if lengths is None:
            return self.logmel(wave)
        frames = self.logmel.frames(wave.shape[1])
        return self.logmel(mirror_ends(wave, lengths, self.logmel.n_fft))[..., :frames]
