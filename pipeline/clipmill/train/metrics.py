"""How good the scores are: accuracy, F1, mAP, AUC and d-prime, in all and by class, with scikit-learn.

A class can only be scored where the clips hold both it and something else. Classes that
cannot be are left out of the means, and named.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

THRESHOLD = 0.5
"""From which probability on a clip counts as having a class, where it may have several."""


def measure_scores(
    targets: NDArray[np.float32], scores: NDArray[np.float32], labels: list[str], loss: str
) -> dict[str, Any]:
    """Every figure there is, as JSON-able numbers; None where a figure does not exist.

    Args:
        targets: `[clips, classes]`, above 0 where a clip has a class.
        scores: `[clips, classes]`, probabilities, all finite.
        labels: the classes' names.
        loss: "softmax" (a clip has one class: the likeliest is predicted) or "sigmoid" (any
            number: those of at least `THRESHOLD` are; accuracy and confusions then do not exist).

    Returns:
        clips; accuracy; map, auc, f1: unweighted means over the classes; d_prime: of the mean
        AUC; classes, classes_scored, classes_left_out; per_class: label, clips, ap, auc,
        d_prime, precision, recall, f1; confusion: `[true][predicted]` counts, or None.
    """
    truth = targets > 0
    per_class = [_class_row(label, truth[:, c], scores[:, c]) for c, label in enumerate(labels)]
    predicted = _predictions(scores, loss)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predicted, average=None, zero_division=0.0
    )
    for c, row in enumerate(per_class):
        if row["clips"]:
            row |= {"precision": float(precision[c]), "recall": float(recall[c]), "f1": float(f1[c])}
    auc = _mean(row["auc"] for row in per_class)
    single = loss == "softmax"
    return {
        "clips": len(truth),
        "accuracy": float(truth[np.arange(len(truth)), scores.argmax(1)].mean()) if single else None,
        "map": _mean(row["ap"] for row in per_class),
        "auc": auc,
        "d_prime": d_prime(auc),
        "f1": _mean(row["f1"] for row in per_class),
        "classes": len(labels),
        "classes_scored": sum(row["auc"] is not None for row in per_class),
        "classes_left_out": [row["label"] for row in per_class if row["auc"] is None],
        "per_class": per_class,
        "confusion": _confusion(truth, scores) if single else None,
    }


def main_figure(loss: str) -> str:
    """The figure that decides which weights are best: accuracy, or mAP where clips have several classes."""
    return "accuracy" if loss == "softmax" else "map"


def confusions(figures: dict[str, Any], labels: list[str], most: int = 5) -> list[dict[str, Any]]:
    """The commonest mistakes, worst first: label, predicted, clips; ties in the order of the classes."""
    table = np.array(figures["confusion"] if figures["confusion"] is not None else np.zeros((0, 0), int))
    wrong = [(int(table[t, p]), t, p) for t, p in zip(*np.nonzero(table), strict=True) if t != p]
    wrong.sort(key=lambda cell: (-cell[0], cell[1], cell[2]))
    return [{"label": labels[t], "predicted": labels[p], "clips": n} for n, t, p in wrong[:most]]


def d_prime(auc: float | None) -> float | None:
    """sqrt(2) * Phi^-1(AUC), the separation of two unit normals; None where it would be infinite."""
    if auc is None or not 0 < auc < 1:
        return None
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _class_row(label: str, truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("label", "clips", "ap", "auc", "d_prime", "precision", "recall", "f1")
    )
    row |= {"label": label, "clips": int(truth.sum())}
    if 0 < row["clips"] < len(truth):
        row["ap"] = float(average_precision_score(truth, scores))
        row["auc"] = float(roc_auc_score(truth, scores))
        row["d_prime"] = d_prime(row["auc"])
    return row


def _predictions(scores: NDArray[np.float32], loss: str) -> NDArray[np.bool_]:
    if loss == "sigmoid":
        return scores >= THRESHOLD
    predicted = np.zeros(scores.shape, bool)
    predicted[np.arange(len(scores)), scores.argmax(1)] = True
    return predicted


def _confusion(truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> list[list[int]]:
    table = confusion_matrix(truth.argmax(1), scores.argmax(1), labels=range(truth.shape[1]))
    return table.tolist()


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
