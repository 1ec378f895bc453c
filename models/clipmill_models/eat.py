"""EAT on raw waveforms (Gazneli et al., arXiv 2204.11479), and the same with GMME's downsamplers.

A stack of 1d convolutions shrinks time by 1024 and a transformer reads the rest. Names are
`eat-{s|m}[-gmme-{K}-{C}][-{preset}]`. A preset says how many positions are learned, and
`speech` another rate and depth too:

- `{t}s`: t seconds of 22.05 kHz; `10s` is the default (AudioSet) and left out of `.name`;
- `esc50` and `us8k`: the authors' 112 and 88 tokens of 22.05 kHz, a little over 5 and 4 s;
- `speech`: Speech Commands, 64 tokens of 16 kHz, one Down fewer and half the channels.

The sizes and the order of the layers are those of the authors' code
(Alibaba-MIIL/AudioClassfication), which gives the paper's counts. What is ours:

- Positions are interpolated linearly where a clip has another number of tokens.
- A clip too short for the widest reflection is followed by zeros, whose tokens are dropped.
- Every encoder layer draws its own weights; the authors' begin as copies of one.

`clipmill_models.gmme` says how GMME is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import (
    ModelError,
    Printed,
    Tagger,
    check_positive,
    count_parameters,
    without_autocast,
)
from clipmill_models.gmme import NEGATIVE_SLOPE, TAPS, Down, GatedMiniPatch, Res, convolution
from clipmill_models.masks import check_lengths, own_only

DROPOUT = 0.1
DILATIONS = (1, 3, 9)


@dataclass(frozen=True)
class _Size:
    """Sizes of EAT-S and EAT-M: the authors' README, "Network configuration"."""

    channels: int
    width: int
    hidden: int
    layers: int
    heads: int


@dataclass(frozen=True)
class _Preset:
    """What a preset sets: rate in Hz, factors of the first Downs, learned positions."""

    sample_rate: int
    factors: tuple[int, ...]
    tokens: int


_SIZES = {"s": _Size(16, 128, 512, 4, 8), "m": _Size(32, 256, 2048, 6, 16)}
_PRESETS = {
    "esc50": _Preset(22050, (4, 4, 4, 4), 112),
    "us8k": _Preset(22050, (4, 4, 4, 4), 88),
    "speech": _Preset(16000, (4, 4, 4), 64),
}
_NAME = re.compile(
    r"eat-(?P<size>[sm])(?:-gmme-(?P<k>[1-9][0-9]{0,3})-(?P<c>[1-9][0-9]{0,3}))?"
    r"(?:-(?:(?P<preset>esc50|us8k|speech)|(?P<seconds>[1-9][0-9]{0,2})s))?"
)
_CODE = "counted from the authors' code"
_PAPER = "GMME paper"
_NEAREST = "the paper's text does not settle GMME's sizes; the nearest reading is built"
_GMME = {
    "gmme-32-8": ("17.4 K", "3.23 M", "1.50 M"),
    "gmme-32-16": ("34.9 K", "3.25 M", "1.51 M"),
    "gmme-64-16": ("67.8 K", "3.28 M", "1.54 M"),
}
"""#D-Param, and #T-Param of Tables 1 (which is ESC-50's; UrbanSound8K's would be 0.01 M less) and 2."""


def _exact_figures() -> Iterator[Printed]:
    yield Printed("eat-s", "5,258,463", "parameters", _CODE)
    yield Printed("eat-m", "25,451,951", "parameters", _CODE)
    for name, classes, parameters, downs in (
        ("eat-s-esc50", 50, "5,183,618", "1,969,152"),
        ("eat-s-us8k", 10, "5,175,386", "1,969,152"),
        ("eat-s-speech", 35, "1,971,955", "493,056"),
    ):
        yield Printed(name, parameters, "parameters", _CODE, classes)
        yield Printed(name, downs, "downsampler parameters", _CODE, classes)


def _gmme_figures() -> Iterator[Printed]:
    slip = "a slip: the paper's own section 4.3 says 1969 K"
    for name, classes in (("eat-s-esc50", 50), ("eat-s-us8k", 10)):
        yield Printed(name, "5.18 M", "parameters", f"{_PAPER}, Table 1", classes)
        yield Printed(name, "1961.1 K", "downsampler parameters", f"{_PAPER}, Table 1", classes, note=slip)
    yield Printed("eat-s-esc50", "1969 K", "downsampler parameters", f"{_PAPER}, section 4.3", 50)
    yield Printed("eat-s-speech", "1.97 M", "parameters", f"{_PAPER}, Table 2", 35)
    yield Printed("eat-s-speech", "493.1 K", "downsampler parameters", f"{_PAPER}, Table 2", 35)
    for gmme, (downs, esc50, speech) in _GMME.items():
        note = "" if gmme == "gmme-64-16" else _NEAREST
        cut = "1.4789 M + 67.8 K is 1.5467 M: printed cut off" if speech == "1.54 M" else ""
        for preset, classes, table in (("esc50", 50, 1), ("us8k", 10, 1), ("speech", 35, 2)):
            source = f"{_PAPER}, Table {table}"
            yield Printed(
                f"eat-s-{gmme}-{preset}", downs, "downsampler parameters", source, classes, note=note
            )
        yield Printed(f"eat-s-{gmme}-esc50", esc50, "parameters", f"{_PAPER}, Table 1", 50)
        yield Printed(f"eat-s-{gmme}-speech", speech, "parameters", f"{_PAPER}, Table 2", 35, note=cut)


class Encoder(nn.Module):
    """One post-norm transformer layer: `[B, N, width] -> [B, N, width]`."""

    def __init__(self, size: _Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm1 = nn.LayerNorm(size.width)
        self.linear1 = nn.Linear(size.width, size.hidden)
        self.linear2 = nn.Linear(size.hidden, size.width)
        self.norm2 = nn.LayerNorm(size.width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`[B, N, width] -> [B, N, width]`; `mask` is bool `[B, 1, 1, N]`, true where a token is heard."""
        x = self.norm1(x + self.dropout(self._attend(x, mask)))
        hidden = self.dropout(F.gelu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))  # [B, N, 3, heads, width / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = DROPOUT if self.training else 0.0
        heard = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        return self.out(heard.transpose(1, 2).flatten(2))


class Eat(Tagger):
    """EAT-S or EAT-M, with their own downsamplers or GMME's: `[B, samples] -> logits [B, classes]`.

    Any number of samples from 1 up will do. With `lengths`, what lies behind a clip's end is
    taken as zeros, its tokens are not attended to, and the clip's positions are those that it
    has alone. So nothing behind the end is heard. A clip in a padded batch still differs a little
    from the same clip alone: near its end the convolutions see zeros, where alone they see the clip
    reflected, which reaches the tokens of the last 3.4 s (1.2 s for `speech`, and more with
    GMME's long kernels). In training BatchNorm's statistics hold the padding too.

    Args:
        name: the canonical name, kept as `.name`.
        size: EAT-S's or EAT-M's sizes.
        preset: rate, factors and learned positions.
        gmme: (K, C) of GMME in place of the last two Downs; None for these.
        num_classes: number of logits.
    """

    input: ClassVar[str] = "waveform"
    HEAD: ClassVar[tuple[str, ...]] = ("fc",)
    GRAMMAR: ClassVar[str] = (
        "eat-{s|m}[-gmme-{K}-{C}][-{preset}] with K an even number from 2 to 9998, C a whole number from 1 to 9999, "
        "and preset esc50, us8k, speech or {t}s for t seconds, 1 to 999 (eat-s, eat-s-gmme-32-8-esc50, eat-m-5s)"
    )
    NAMES: ClassVar[tuple[str, ...]] = (
        *("eat-s", "eat-m", "eat-s-esc50", "eat-s-us8k", "eat-s-speech"),
        *(f"eat-s-{gmme}-{preset}" for preset in _PRESETS for gmme in _GMME),
    )
    PRINTED: ClassVar[tuple[Printed, ...]] = (*_exact_figures(), *_gmme_figures())
    sample_rate: int = 22050

    def __init__(
        self, name: str, size: _Size, preset: _Preset, gmme: tuple[int, int] | None, num_classes: int
    ) -> None:
        super().__init__()
        self.name = name
        self.sample_rate = preset.sample_rate
        self.stride = 4 * math.prod(preset.factors)
        self.shortest = TAPS // 2 * DILATIONS[-1] * (self.stride // 2) + 1
        channels = size.channels
        self.stem = nn.Sequential(
            convolution(1, channels, 7), nn.BatchNorm1d(channels), nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True)
        )
        self.blocks = nn.Sequential()
        for index, factor in enumerate(preset.factors):
            self.blocks.append(Down(channels, factor))
            channels *= 2
            if index % 2 == 0:
                self.blocks.append(Res(channels, 1))
        self.mixers = nn.ModuleList()
        self.downs = nn.ModuleList()
        for _ in range(2):
            self.mixers.append(nn.Sequential(*(Res(channels, dilation) for dilation in DILATIONS)))
            self.downs.append(GatedMiniPatch(*gmme) if gmme else Down(channels, 2))
            channels *= 2
        self.project = nn.Conv1d(channels, size.width, 1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.positions = nn.Parameter(torch.zeros(1 + preset.tokens, size.width))
        self.layers = nn.ModuleList(Encoder(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.fc = nn.Linear(size.width, num_classes)
        self.reset_parameters()

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Eat:
        """Build from a lower-case name; `in_bins` means nothing here. Raises `ModelError` for any other name."""
        check_positive("num_classes", num_classes)
        match = _NAME.fullmatch(name)
        if match is None or int(match["k"] or 2) % 2:
            raise ModelError(f"no model is called {name!r}: allowed is {cls.GRAMMAR}")
        preset = _PRESETS.get(match["preset"] or "") or _whole_seconds(int(match["seconds"] or 10))
        gmme = (int(match["k"]), int(match["c"])) if match["k"] else None
        canonical = name.removesuffix("-10s")
        return cls(canonical, _SIZES[match["size"]], preset, gmme, num_classes)

    def reset_parameters(self) -> None:
        """Draw fresh weights, as the authors' code does.

        Convolutions over time: normal, deviation 0.02. All biases, the class token and the
        positions: zero. The attention's first Linear: Xavier's uniform. The others keep torch's
        default, and so do GMME's convolutions, which that code would leave as they are.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Conv1d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, Encoder):
                nn.init.xavier_uniform_(module.qkv.weight)

    def downsampler_parameters(self) -> int:
        """Parameters of the last two downsamplers together, which GMME replaces: the paper's #D-Param."""
        return count_parameters(self.downs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of waveforms `[B, samples]` at `sample_rate`, in -1..1.

        Args:
            x: waveforms, floating point; cast to the weights' dtype.
            lengths: int64 `[B]`, each clip's own samples, at most those of `x`; None: all of them.

        Raises:
            ModelError: another shape, no samples, or whole numbers.
        """
        self.check_input(x)
        samples = x.shape[1]
        tokens = (samples + self.stride - 1) // self.stride  # ONNX rounds negative quotients up
        own: Tensor | int = tokens
        mask = None
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[0]).clamp(0, samples)
            x = own_only(x, lengths, time=1)
            own = ((lengths + self.stride - 1) // self.stride)[:, None]
            # The class token stands first, so that a clip without samples still attends to something.
            mask = (torch.arange(1 + tokens, device=x.device) <= own)[:, None, None]
        # Unlike max, sym_max leaves the length open when the network is exported for any of them.
        short: Any = torch.sym_max(self.shortest - samples, 0)
        x = F.pad(x, (0, short)).to(self.fc.weight.dtype)
        x = self._tokens(x)[:, :tokens] + self._positions(tokens, own)
        x = torch.cat([(self.cls_token + self.positions[0]).expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x[:, 0])
        with without_autocast(x):
            return self.fc(x.to(self.fc.weight.dtype)).float()

    def _tokens(self, x: Tensor) -> Tensor:
        """Waveforms `[B, samples]`, from `shortest` up, to `[B, ceil(samples / stride), width]`."""
        x = self.blocks(self.stem(x.unsqueeze(1)))
        for mixer, down in zip(self.mixers, self.downs, strict=True):
            x = down(mixer(x))
        return self.project(x).transpose(1, 2)

    def _positions(self, tokens: int, own: Tensor | int) -> Tensor:
        """The learned positions stretched over `own` tokens: `[tokens, width]`; for `[B, 1]` of them `[B, ...]`."""
        table = self.positions[1:]
        last = table.shape[0] - 1
        centres = torch.arange(tokens, device=table.device, dtype=torch.float32) + 0.5
        if isinstance(own, Tensor):
            own = own.clamp(min=1)
        at = (centres * (last + 1) / own - 0.5).clamp(0, last)
        low = at.long()
        weight = (at - low).unsqueeze(-1).to(table.dtype)
        return torch.lerp(table[low], table[(low + 1).clamp(max=last)], weight)


def _whole_seconds(seconds: int) -> _Preset:
    return _Preset(22050, (4, 4, 4, 4), -(-22050 * seconds // 1024))
