"""The networks of the papers, by name. Needs torch alone.

    from clipmill_models import create_model
    model = create_model("erann-1-6", num_classes=527)   # [B, 128, frames] -> logits [B, 527]

Names are case-insensitive. A new family is one file and one line in `FAMILIES`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipmill_models.ast import Ast
from clipmill_models.base import (
    ModelError,
    PassedOver,
    Printed,
    Tagger,
    check_positive,
    count_parameters,
    multiply_adds,
)
from clipmill_models.eat import Eat
from clipmill_models.erann import Erann
from clipmill_models.panns import Cnn14, ResNet38, WavegramLogmelCnn
from clipmill_models.wavegram import WavegramErann

__all__ = [
    "FAMILIES",
    "Ast",
    "Cnn14",
    "Eat",
    "Erann",
    "ModelError",
    "Printed",
    "ResNet38",
    "Tagger",
    "WavegramErann",
    "WavegramLogmelCnn",
    "count_parameters",
    "create_model",
    "family_of",
    "list_models",
    "multiply_adds",
    "outline_model",
]

FAMILIES: dict[str, type[Tagger]] = {
    "erann-": Erann,
    "wavegram-erann-": WavegramErann,
    "cnn14": Cnn14,
    "resnet38": ResNet38,
    "wavegram-logmel-cnn": WavegramLogmelCnn,
    "ast": Ast,
    "eat-": Eat,
}
"""What a name begins with -> the family that builds it; where several fit, the longest."""


def list_models() -> list[str]:
    """Canonical names of every configuration that the papers print, family by family."""
    return [name for family in FAMILIES.values() for name in family.NAMES]


def family_of(name: str) -> type[Tagger]:
    """The family that builds the network called `name`; raises `ModelError` listing all names where none does."""
    canonical = str(name).strip().lower()
    prefix = max((key for key in FAMILIES if canonical.startswith(key)), key=len, default=None)
    if prefix is None:
        grammars = "; ".join(known.GRAMMAR for known in FAMILIES.values())
        raise ModelError(f"no model is called {name!r}: allowed is {grammars}")
    return FAMILIES[prefix]


def create_model(name: str, num_classes: int, in_bins: int | None = None) -> Tagger:
    """Build a network with fresh weights.

    Args:
        name: such as "erann-1-6"; see `list_models` and each family's `GRAMMAR`.
        num_classes: number of logits.
        in_bins: bins of the input features, by default what the family is made for (128 for
            ERANN); ignored by networks that take waveforms.

    Returns:
        A network in training mode whose `input` says what it takes.

    Raises:
        ModelError: (a `ValueError`) the name, `num_classes` or `in_bins` cannot be; the
            text lists what is allowed.
    """
    family = family_of(name)
    check_positive("num_classes", num_classes)
    if family.input == "waveform":
        in_bins = 0
    elif in_bins is None:
        in_bins = (family.features or {}).get("n_mels", 128)
    else:
        check_positive("in_bins", in_bins)
    return family.from_name(str(name).strip().lower(), num_classes, in_bins)


def outline_model(name: str, num_classes: int, in_bins: int | None = None) -> Tagger:
    """`create_model` on the meta device: the shapes of a network at once, without its memory and its weights."""
    with torch.device("meta"), PassedOver(_DRAWS):
        return create_model(name, num_classes, in_bins)


# Drawing weights takes seconds on the meta device and comes to nothing; the last one stands in truncated normals.
_DRAWS = {Tensor.normal_, Tensor.uniform_, Tensor.erfinv_}
