"""The figures, against slow plain formulas, and where they do not exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from clipmill.train.metrics import confusions, d_prime, main_figure, measure_scores

LABELS = ["ant", "bee", "cat", "dog"]


def slow_auc(truth: np.ndarray, scores: np.ndarray) -> float:
    """How often a clip of the class outranks one that is not; a tie counts half."""
    wins = [(p > n) + 0.5 * (p == n) for p in scores[truth] for n in scores[~truth]]
    return float(np.mean(wins))


def slow_ap(truth: np.ndarray, scores: np.ndarray) -> float:
    """Precision at each threshold, weighted by the recall that it adds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall = truth[taken].sum() / truth.sum()
        total += (recall - before) * truth[taken].mean()
        before = recall
    return float(total)


def slow_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    hit, wrong, missed = (truth & predicted).sum(), (~truth & predicted).sum(), (truth & ~predicted).sum()
    return float(2 * hit / (2 * hit + wrong + missed)) if hit else 0.0


@st.composite
def tagged(draw) -> tuple[np.ndarray, np.ndarray]:
    """Targets and scores of a few clips, with ties and with classes that nobody or everybody has."""
    shape = (draw(st.integers(1, 12)), len(LABELS))
    targets = draw(arrays.arrays(np.float32, shape, elements=st.sampled_from([0.0, 1.0])))
    scores = draw(arrays.arrays(np.float32, shape, elements=st.integers(0, 10).map(lambda n: n / 10)))
    return targets, scores


@given(tagged())
def test_every_figure_equals_its_plain_formula(case):
    targets, scores = case
    truth = targets > 0
    figures = measure_scores(targets, scores, LABELS, "sigmoid")
    scorable = [c for c in range(4) if 0 < truth[:, c].sum() < len(truth)]
    there = [c for c in range(4) if truth[:, c].any()]
    assert figures["classes_scored"] == len(scorable)
    assert figures["classes_left_out"] == [LABELS[c] for c in range(4) if c not in scorable]
    aucs = [slow_auc(truth[:, c], scores[:, c]) for c in scorable]
    assert figures["auc"] == (pytest.approx(np.mean(aucs)) if aucs else None)
    aps = [slow_ap(truth[:, c], scores[:, c]) for c in scorable]
    assert figures["map"] == (pytest.approx(np.mean(aps)) if aps else None)
    f1s = [slow_f1(truth[:, c], scores[:, c] >= np.float32(0.5)) for c in there]
    assert figures["f1"] == (pytest.approx(np.mean(f1s)) if f1s else None)
    assert figures["accuracy"] is None
    assert figures["confusion"] is None
    json.dumps(figures, allow_nan=False)


@given(
    arrays.arrays(np.float32, (9, 4), elements=st.floats(0, 1, width=32)),
    st.lists(st.integers(0, 3), min_size=9, max_size=9),
)
def test_one_class_a_clip_is_scored_by_its_likeliest(scores, truth):
    figures = measure_scores(np.eye(4, dtype=np.float32)[truth], scores, LABELS, "softmax")
    predicted = scores.argmax(1)
    assert figures["accuracy"] == pytest.approx(np.mean(predicted == truth))
    assert figures["confusion"] == [
        [sum((t, p) == (true, guess) for t, p in zip(truth, predicted, strict=True)) for guess in range(4)]
        for true in range(4)
    ]
    there = sorted(set(truth))
    f1s = [slow_f1(np.array(truth) == c, predicted == c) for c in there]
    assert figures["f1"] == pytest.approx(np.mean(f1s))
    assert [row["label"] for row in figures["per_class"] if row["f1"] is not None] == [
        LABELS[c] for c in there
    ]


def test_perfect_scores_are_perfect_and_their_d_prime_is_infinite_so_none():
    figures = measure_scores(np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32), LABELS, "softmax")
    assert (figures["accuracy"], figures["map"], figures["auc"], figures["f1"]) == (1.0, 1.0, 1.0, 1.0)
    assert figures["d_prime"] is None
    assert confusions(figures, LABELS) == []


def test_d_prime_of_known_areas():
    """The AUC of two unit normals d apart is Phi(d / sqrt 2); 0.973 is 2.725 in PANNs' tables."""
    assert d_prime(0.5) == pytest.approx(0.0)
    for d in (0.5, 1.0, 2.5):
        assert d_prime(0.5 * (1 + math.erf(d / 2))) == pytest.approx(d)
    assert d_prime(0.973) == pytest.approx(2.725, abs=0.002)
    assert d_prime(1.0) is None
    assert d_prime(0.0) is None
    assert d_prime(None) is None


def test_the_commonest_confusions_come_first_and_ties_in_the_order_of_the_classes():
    truth = [0, 0, 0, 1, 1, 2, 3, 3, 3]
    guess = [1, 1, 0, 0, 1, 3, 2, 2, 2]
    figures = measure_scores(
        np.eye(4, dtype=np.float32)[truth], np.eye(4, dtype=np.float32)[guess], LABELS, "softmax"
    )
    found = [(c["label"], c["predicted"], c["clips"]) for c in confusions(figures, LABELS)]
    assert found == [("dog", "cat", 3), ("ant", "bee", 2), ("bee", "ant", 1), ("cat", "dog", 1)]
    assert len(confusions(figures, LABELS, most=2)) == 2


def test_accuracy_decides_for_one_class_a_clip_and_map_for_many():
    assert (main_figure("softmax"), main_figure("sigmoid")) == ("accuracy", "map")
