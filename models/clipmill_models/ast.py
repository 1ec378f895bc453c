"""AST: the Audio Spectrogram Transformer (Gong, Chung and Glass 2021), which the ERANN papers compare with.

The encoder is the one of the library `transformers`, which the extra `clipmill[ast]` brings.
It is a Vision Transformer (12 layers of width 768, 12 heads) over patches of 16 x 16 bins and
frames that overlap by 6, with a class token and a distillation token, whose mean the head reads.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmill_models.base import ModelError, Printed, Tagger, check_positive, without_autocast
from clipmill_models.masks import check_lengths

BINS = 128
FRAMES = {"ast": 1024, "ast-512": 512}
"""Name -> frames that the network takes: AST's settings for AudioSet and for ESC-50."""

MEAN, DOUBLE_STD = -4.2677393, 2 * 4.5689974
"""AST's statistics of AudioSet's features, in natural logarithm: it takes (x - mean) / (2 std)."""

NEPERS_PER_DB = math.log(10) / 10
"""Of power: ln(p) = this * 10 log10(p)."""


class Ast(Tagger):
    """AST without its ImageNet weights: `[B, 128, frames] -> logits [B, classes]`.

    The positions are learned, so the number of frames is fixed: 1024 for "ast" (clips up to
    10.23 s), 512 for "ast-512" (5.11 s; AST has it on ESC-50). Fewer are padded at the end as
    AST does it: with zeros in the logarithm, before the features are standardised. More are an
    error. With `lengths`, frames behind a clip's own are replaced by that padding: in a padded
    batch each clip is exactly what it is alone.

    The front end is clipmill's log-mel with Kaldi's sizes (25 ms windows, a frame every 10 ms,
    filters of equal height from 20 Hz, Kaldi's floor). Kaldi's own filter bank, which AST hears,
    has other numbers: it emphasises high frequencies first (x[n] - 0.97 x[n-1]), takes each
    frame's mean off, centres no frame on the clip's ends, and spaces its filters by the HTK
    scale, where one of the 128 would catch no bin here. On sound effects ours lie 1.1 above in
    natural logarithm on average: 6 in the lowest bin, 0 half-way, -1 at the top. A network
    trained here learns them; weights that were trained on Kaldi's would hear them as coloured.

    Args:
        name: a key of `FRAMES`, kept as `.name`.
        num_classes: number of logits.

    Raises:
        ModelError: no such name, or `transformers` is not there.
    """

    input: ClassVar[str] = "features"
    sample_rate = 16000
    features: ClassVar[dict[str, Any] | None] = {
        "sample_rate": 16000,
        "n_fft": 512,
        "win_length": 400,
        "hop": 160,
        "f_min": 20.0,
        "f_max": 8000.0,
        "n_mels": BINS,
        "mel_norm": None,
        "floor": 2.0**-23,
    }
    in_bins = BINS
    longest: int
    GRAMMAR: ClassVar[str] = "ast (1024 frames, for 10 s) or ast-512 (512 frames, for 5 s)"
    NAMES: ClassVar[tuple[str, ...]] = tuple(FRAMES)
    HEAD: ClassVar[tuple[str, ...]] = ("head_norm", "fc")
    PRINTED: ClassVar[tuple[Printed, ...]] = (
        Printed(
            "ast", "88.1 M", "parameters", "journal, Tables 4 and 5",
            note="the original carries two unused ImageNet heads of 1000 classes, 1,538,000 parameters more",
        ),
        Printed(
            "ast-512", "87.3 M", "parameters", "journal, Tables 6 and 7", num_classes=50, seconds=5.0,
            note="the original carries two unused ImageNet heads of 1000 classes, 1,538,000 parameters more",
        ),
        Printed(
            "ast", "49", "audios/s, B=1", "journal, Table 4",
            note="on a V100, where Table 4 has it out of memory at B=32; AST's own code runs in float16 there",
        ),
        Printed(
            "ast-512", "176", "audios/s, B=32", "journal, Table 6", num_classes=50, seconds=5.0,
            note="on a V100, of 5 s clips; AST's own code runs in float16 there",
        ),
    )  # fmt: skip

    def __init__(self, name: str, num_classes: int) -> None:
        super().__init__()
        if name not in FRAMES:
            raise ModelError(f"no model is called {name!r}: allowed is {self.GRAMMAR}")
        try:
            from transformers import ASTConfig, ASTModel
        except ImportError as error:
            raise ModelError(
                f"{name} needs the library transformers ({error}): pip install 'clipmill[ast]'"
            ) from error
        self.name = name
        self.longest = FRAMES[name]
        config = ASTConfig(max_length=self.longest, num_mel_bins=BINS, attn_implementation="sdpa")
        self.encoder = ASTModel(config)
        self.head_norm = nn.LayerNorm(config.hidden_size)
        self.fc = nn.Linear(config.hidden_size, num_classes)
        self.reset_parameters()

    @classmethod
    def from_name(cls, name: str, num_classes: int, in_bins: int) -> Ast:
        """Build the network called `name`; raises `ModelError` where there is none, and for other bins than 128."""
        check_positive("num_classes", num_classes)
        if in_bins != BINS:
            raise ModelError(
                f"in_bins is {in_bins!r}: allowed is {BINS}, which {name}'s positions are made for"
            )
        return cls(name, num_classes)

    def reset_parameters(self) -> None:
        """Draw the tokens and positions as AST does; the library zeroes them, and keeps its own elsewhere.

        Two tokens that begin alike, at positions that begin alike, would stay alike for ever.
        """
        embeddings = self.encoder.embeddings
        for token in (embeddings.cls_token, embeddings.distillation_token, embeddings.position_embeddings):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits `[B, classes]`, float32, of features `[B, 128, frames]` in dB.

        `lengths`, int64 `[B]`, says how many frames are each clip's own.

        Raises:
            ModelError: another shape, other bins than 128, or more frames than the network takes.
        """
        self.check_input(x)
        frames = x.shape[2]
        if lengths is not None:
            own = torch.arange(frames, device=x.device) < check_lengths(lengths, x.shape[0])[:, None]
            x = torch.where(own[:, None], x, 0.0)
        x = F.pad(x.float(), (0, self.longest - frames))
        x = (x * NEPERS_PER_DB - MEAN) / DOUBLE_STD
        dtype = self.fc.weight.dtype
        x = self.encoder(x.mT.to(dtype)).pooler_output
        with without_autocast(x):
            return self.fc(self.head_norm(x.to(dtype))).float()
