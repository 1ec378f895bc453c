"""How good the scores are: accuracy, F1, mAP, AUC, d-prime and calibration error, in all and by class.

A class has an AP and an AUC only where the clips hold both it and something else. Classes that have none are
left out of those means, and named.

AP and AUC come from one sort of each class's scores, which scikit-learn sorts and checks several times over:
of AudioSet's 20,371 clips and 527 classes it takes half a minute. The tests hold both to scikit-learn's own.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5
"""From which probability on a clip counts as having a class, where it may have several."""

BINS = 15
"""Bins of equal width for the calibration error, as many as in Guo et al."""

WORST = 6
"""Classes whose calibration is looked at closely: those with the lowest average precision."""


def measure_scores(
    targets: NDArray[np.float32], scores: NDArray[np.float32], labels: list[str], loss: str
) -> dict[str, Any]:
    """Every figure there is, as JSON-able numbers; None where a figure does not exist.

    Args:
        targets: `[clips, classes]`, above 0 where a clip has a class; two classes at least.
        scores: `[clips, classes]`, probabilities, all finite.
        labels: the classes' names.
        loss: "softmax" (a clip has one class: the likeliest is predicted) or "sigmoid" (any
            number: those of at least `THRESHOLD` are; accuracy and confusions then do not exist).

    Returns:
        clips; accuracy; map, auc, f1: unweighted means over the classes that have one (macro F1: a class that
        is predicted and has no clip has an F1 of 0, only one that is neither has none); d_prime: of the mean
        AUC; ece: the expected calibration error, of the predicted classes alone with softmax, of every clip and
        class with sigmoid; classes, classes_scored, classes_left_out; per_class: label, clips, ap, auc, d_prime,
        precision, recall, f1; confusion: `[true][predicted]` counts, or None; reliability: of the `WORST` classes
        label, clips, ap, ece and bins (those that hold a clip, lowest first: mean probability, share of the clips
        that have the class, clips).

    The calibration error is that of C. Guo, G. Pleiss, Y. Sun and K. Q. Weinberger, "On calibration of modern
    neural networks", ICML 2017 (arXiv:1706.04599), Eqs. 2 to 5: ECE = sum over the bins of
    (clips in it / clips) x |share that is true - mean probability|, a bin holding its upper edge.
    """
    from sklearn.metrics import precision_recall_fscore_support  # takes as long to import as torch

    truth = targets > 0
    # A class's column as one piece of memory.
    by_class = list(zip(np.ascontiguousarray(truth.T), np.ascontiguousarray(scores.T), strict=True))
    per_class = [_class_row(label, *column) for label, column in zip(labels, by_class, strict=True)]
    found = precision_recall_fscore_support(
        truth, _predictions(scores, loss), average=None, zero_division=np.nan
    )
    for name, values in zip(("precision", "recall", "f1"), found, strict=False):
        for row, value in zip(per_class, values, strict=True):
            row[name] = None if np.isnan(value) else float(value)
    auc = _mean(row["auc"] for row in per_class)
    single = loss == "softmax"
    hit = truth[np.arange(len(truth)), scores.argmax(1)]
    bins = [_calibration(*column) for column in by_class]
    return {
        "clips": len(truth),
        "accuracy": float(hit.mean()) if single else None,
        "map": _mean(row["ap"] for row in per_class),
        "auc": auc,
        "d_prime": d_prime(auc),
        "f1": _mean(row["f1"] for row in per_class),
        "ece": _ece(_calibration(hit, scores.max(1)) if single else sum(bins, np.zeros((3, BINS)))),
        "classes": len(labels),
        "classes_scored": sum(row["auc"] is not None for row in per_class),
        "classes_left_out": [row["label"] for row in per_class if row["auc"] is None],
        "per_class": per_class,
        "confusion": _confusion(truth, scores) if single else None,
        "reliability": _reliability(per_class, bins),
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
        row["ap"], row["auc"] = _ranked(truth, scores)
        row["d_prime"] = d_prime(row["auc"])
    return row


def _ranked(truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> tuple[float, float]:
    """Average precision and area under the ROC curve of `[clips]`; each distinct score is a threshold."""
    order = np.argsort(scores)[
        ::-1
    ]  # not stable, which is five times as fast: clips of one score count as one
    ranked = scores[order]
    ends = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    hits, taken = np.cumsum(truth[order])[ends], ends + 1  # true ones, and clips, down to each threshold
    new, wrong = np.diff(hits, prepend=0), taken - hits
    ap = (new * hits / taken).sum() / hits[-1]
    # Trapezia: the clips that share a score with a true one count half.
    auc = (np.diff(wrong, prepend=0) * (hits - new / 2)).sum() / (int(hits[-1]) * int(wrong[-1]))
    return float(ap), float(auc)


def _predictions(scores: NDArray[np.float32], loss: str) -> NDArray[np.bool_]:
    if loss == "sigmoid":
        return scores >= THRESHOLD
    predicted = np.zeros(scores.shape, bool)
    predicted[np.arange(len(scores)), scores.argmax(1)] = True
    return predicted


def _confusion(truth: NDArray[np.bool_], scores: NDArray[np.float32]) -> list[list[int]]:
    """A clip of several classes, which `--loss softmax` allows, is right where it is heard as any of them."""
    predicted = scores.argmax(1)
    true = np.where(truth[np.arange(len(truth)), predicted], predicted, truth.argmax(1))
    known = truth.any(1)
    table = np.zeros((truth.shape[1],) * 2, np.int64)
    np.add.at(table, (true[known], predicted[known]), 1)
    found: list[list[int]] = table.tolist()
    return found


def _calibration(truth: NDArray[np.bool_], probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """`[3, BINS]` of `[clips]`: in each bin how many clips, the sum of their probabilities, how many are true."""
    wide = probability.astype(np.float64)
    place = np.clip(np.ceil(wide * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return np.stack([np.bincount(place, weights, BINS) for weights in (np.ones_like(wide), wide, truth)])


def _ece(bins: NDArray[np.float64]) -> float:
    counts, probability, true = bins
    return float(np.abs(true - probability).sum() / counts.sum())


def _reliability(per_class: list[dict[str, Any]], bins: list[NDArray[np.float64]]) -> list[dict[str, Any]]:
    scored = [c for c, row in enumerate(per_class) if row["ap"] is not None]
    worst = sorted(scored, key=lambda c: (per_class[c]["ap"], c))[:WORST]
    return [
        {name: per_class[c][name] for name in ("label", "clips", "ap")}
        | {
            "ece": _ece(bins[c]),
            "bins": [
                {"probability": float(p / n), "share": float(true / n), "clips": int(n)}
                for n, p, true in bins[c].T
                if n
            ],
        }
        for c in worst
    ]


def _mean(values: Any) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
