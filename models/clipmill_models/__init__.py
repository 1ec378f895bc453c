"""The networks of the papers, by name. Needs torch alone.

    from clipmill_models import create_model
    model = create_model("erann-1-6", num_classes=527)   # [B, 128, frames] -> logits [B, 527]

Names are case-insensitive. A new family is one file and one line in `FAMILIES`.
"""

from __future__ import annotations

from clipmill_models.base import ModelError, Tagger, check_positive, count_parameters, multiply_adds
from clipmill_models.erann import Erann

__all__ = [
    "FAMILIES",
    "Erann",
    "ModelError",
    "Tagger",
    "count_parameters",
    "create_model",
    "list_models",
    "multiply_adds",
]

FAMILIES: dict[str, type[Tagger]] = {
    "erann": Erann,
}
"""What a name begins with, up to its first hyphen -> the family that builds it."""


def list_models() -> list[str]:
    """Canonical names of every configuration that the papers print, family by family."""
    return [name for family in FAMILIES.values() for name in family.NAMES]


def create_model(name: str, num_classes: int, in_bins: int = 128) -> Tagger:
    """Build a network with fresh weights.

    Args:
        name: such as "erann-1-6"; see `list_models` and each family's `GRAMMAR`.
        num_classes: number of logits.
        in_bins: bins of the input features; ignored by networks that take waveforms.

    Returns:
        A network in training mode whose `input` says what it takes. Build it inside
        `torch.device("meta")` to have its shapes without its memory.

    Raises:
        ModelError: (a `ValueError`) the name, `num_classes` or `in_bins` cannot be; the
            text lists what is allowed.
    """
    canonical = str(name).strip().lower()
    family = FAMILIES.get(canonical.partition("-")[0])
    if family is None:
        grammars = "; ".join(known.GRAMMAR for known in FAMILIES.values())
        raise ModelError(f"no model is called {name!r}: allowed is {grammars}")
    check_positive("num_classes", num_classes)
    check_positive("in_bins", in_bins)
    return family.from_name(canonical, num_classes, in_bins)
