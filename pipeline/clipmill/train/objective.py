"""What a network is trained towards: one class a clip, or any number."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


def choose_loss(label_counts: NDArray[np.integer], asked: str = "auto") -> str:
    """ "softmax" or "sigmoid" for clips of so many classes each, `[clips]`: sigmoid once any has several."""
    if asked != "auto":
        return asked
    return "sigmoid" if (label_counts > 1).any() else "softmax"


def clip_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch, a scalar, of logits and soft targets `[B, classes]`.

    "softmax" is cross-entropy (targets become shares that sum to 1, of which all classes get the part
    `smoothing` alike: label smoothing, Szegedy et al. 2016); "sigmoid" is binary cross-entropy, the mean over the
    classes too.
    """
    if loss == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets / targets.sum(1, keepdim=True), label_smoothing=smoothing)


def probabilities(logits: Tensor, loss: str) -> Tensor:
    """Logits `[B, classes]` -> 0..1, which with "softmax" sum to 1 for each clip."""
    return logits.sigmoid() if loss == "sigmoid" else logits.softmax(1)
