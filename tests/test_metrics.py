"""The figures, against slow plain formulas and scikit-learn's, and where they do not exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as sklearn

from clipmill.train.metrics import BINS, WORST, confusions, d_prime, main_figure, measure_scores

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


def slow_ece(truth: np.ndarray, probability: np.ndarray) -> float:
    """Guo et al. 2017, Eq. 3, bin by bin: (m - 1) / M < p <= m / M."""
    total = 0.0
    for m in range(1, BINS + 1):
        held = [k for k, p in enumerate(probability.tolist()) if m - 1 < p * BINS <= m or (m == 1 and p == 0)]
        if held:
            total += len(held) / len(truth) * abs(truth[held].mean() - probability[held].mean(dtype=float))
    return float(total)


def alike(found: float | None, wanted: float | None) -> bool:
    return found == wanted if found is None or wanted is None else math.isclose(found, wanted, abs_tol=1e-9)


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
    predicted = scores >= np.float32(0.5)
    there = [c for c in range(4) if truth[:, c].any() or predicted[:, c].any()]
    assert figures["classes_scored"] == len(scorable)
    assert figures["classes_left_out"] == [LABELS[c] for c in range(4) if c not in scorable]
    aucs = [slow_auc(truth[:, c], scores[:, c]) for c in scorable]
    assert figures["auc"] == (pytest.approx(np.mean(aucs)) if aucs else None)
    aps = [slow_ap(truth[:, c], scores[:, c]) for c in scorable]
    assert figures["map"] == (pytest.approx(np.mean(aps)) if aps else None)
    f1s = [slow_f1(truth[:, c], predicted[:, c]) for c in there]
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
    there = sorted({*truth, *predicted.tolist()})
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


def test_a_class_without_a_clip_costs_what_is_wrongly_taken_for_it():
    scores = np.eye(4, dtype=np.float32)[[0, 2, 1, 2]]
    figures = measure_scores(np.eye(4, dtype=np.float32)[[0, 0, 1, 1]], scores, LABELS, "softmax")
    assert figures["f1"] == pytest.approx(4 / 9), (
        "2/3, 2/3 and 0; the fourth class is neither there nor predicted"
    )
    rows = figures["per_class"]
    assert [row["f1"] for row in rows] == [pytest.approx(2 / 3), pytest.approx(2 / 3), 0.0, None]
    assert (rows[2]["precision"], rows[2]["recall"], rows[3]["precision"]) == (0.0, None, None)


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


# Against scikit-learn

sklearn_is_slow = settings(max_examples=40, deadline=None)


def check_with_sklearn(truth: np.ndarray, scores: np.ndarray, predicted: np.ndarray, figures: dict) -> None:
    aps, aucs = [], []
    for c, row in enumerate(figures["per_class"]):
        ap = auc = None
        if 0 < truth[:, c].sum() < len(truth):
            ap = float(sklearn.average_precision_score(truth[:, c], scores[:, c]))
            auc = float(sklearn.roc_auc_score(truth[:, c], scores[:, c]))
            aps.append(ap)
            aucs.append(auc)
        assert alike(row["ap"], ap)
        assert alike(row["auc"], auc)
        hits = sklearn.precision_recall_fscore_support(
            truth[:, c], predicted[:, c], average="binary", zero_division=np.nan
        )[:3]
        for name, value in zip(("precision", "recall", "f1"), hits, strict=True):
            assert alike(row[name], None if np.isnan(value) else float(value)), name
    # In all: scikit-learn's macro F1, of the classes that any clip has or is taken to have.
    macro = sklearn.f1_score(truth, predicted, average="macro", zero_division=np.nan)
    assert alike(figures["f1"], None if np.isnan(macro) else float(macro))
    assert alike(figures["map"], float(np.mean(aps)) if aps else None)
    assert alike(figures["auc"], float(np.mean(aucs)) if aucs else None)
    assert alike(figures["d_prime"], d_prime(figures["auc"]))


@sklearn_is_slow
@given(tagged())
def test_any_number_of_classes_a_clip_are_scored_as_scikit_learn_does(case):
    """With ties, with classes that nobody or everybody has, and where nothing passes the threshold."""
    targets, scores = case
    for some in (scores, scores / 3):
        figures = measure_scores(targets, some, LABELS, "sigmoid")
        check_with_sklearn(targets > 0, some, some >= np.float32(0.5), figures)
        assert alike(figures["ece"], slow_ece((targets > 0).ravel(), some.ravel()))
        json.dumps(figures, allow_nan=False)


@sklearn_is_slow
@given(tagged(), st.booleans())
def test_one_class_a_clip_is_scored_as_scikit_learn_does(case, same):
    """Ties included, and all clips of one class."""
    loose, scores = case
    truth = loose.argmax(1) * (not same)
    targets = np.eye(4, dtype=np.float32)[truth]
    figures = measure_scores(targets, scores, LABELS, "softmax")
    guess = scores.argmax(1)
    check_with_sklearn(targets > 0, scores, np.eye(4)[guess] > 0, figures)
    assert figures["accuracy"] == pytest.approx(sklearn.accuracy_score(truth, guess))
    assert figures["confusion"] == sklearn.confusion_matrix(truth, guess, labels=range(4)).tolist()
    assert alike(figures["ece"], slow_ece(truth == guess, scores.max(1)))
    json.dumps(figures, allow_nan=False)


@sklearn_is_slow
@given(tagged())
def test_clips_of_several_classes_are_confused_only_where_accuracy_says_so(case):
    """`--loss softmax` takes them: heard as any of its classes, a clip is right; one without a class is in no cell."""
    targets, scores = case
    figures = measure_scores(targets, scores, LABELS, "softmax")
    table = np.array(figures["confusion"])
    assert table.trace() == round(figures["accuracy"] * len(targets))
    assert table.sum() == (targets > 0).any(1).sum()


def test_many_clips_with_many_ties_are_ranked_exactly():
    rng = np.random.default_rng(0)
    targets = (rng.random((20_371, 3)) < [0.5, 0.01, 0.00005]).astype(np.float32)
    scores = (rng.integers(0, 200, targets.shape) / 200 * 0.9 + 0.1 * targets).astype(np.float32)
    figures = measure_scores(targets, scores, LABELS[:3], "sigmoid")
    check_with_sklearn(targets > 0, scores, scores >= np.float32(0.5), figures)


# Calibration


def test_honest_probabilities_have_no_calibration_error_and_sure_mistakes_all_of_it():
    shares = np.repeat([0.1, 0.5, 0.9], 100).astype(np.float32)
    true = np.concatenate([np.arange(100) < 100 * share for share in (0.1, 0.5, 0.9)])
    targets = np.stack([true, ~true], 1).astype(np.float32)
    honest = measure_scores(targets, np.stack([shares, 1 - shares], 1), LABELS[:2], "sigmoid")
    assert honest["ece"] == pytest.approx(0.0, abs=1e-6)
    wrong = measure_scores(targets, 1 - targets, LABELS[:2], "softmax")
    assert wrong["ece"] == 1.0


def test_the_worst_classes_come_with_their_bins():
    rng = np.random.default_rng(1)
    labels = [f"class {n}" for n in range(9)]
    targets = np.eye(9, dtype=np.float32)[rng.integers(0, 8, 200)]  # nothing is of the last class
    scores = rng.random((200, 9)).astype(np.float32)
    figures = measure_scores(targets, scores, labels, "sigmoid")
    rows = {row["label"]: row for row in figures["per_class"]}
    worst = figures["reliability"]
    assert [row["label"] for row in worst] == sorted(labels[:8], key=lambda name: rows[name]["ap"])[:WORST]
    for row in worst:
        c = labels.index(row["label"])
        assert (row["ap"], row["clips"]) == (rows[row["label"]]["ap"], rows[row["label"]]["clips"])
        assert row["ece"] == pytest.approx(slow_ece(targets[:, c] > 0, scores[:, c]))
        assert sum(found["clips"] for found in row["bins"]) == 200
        assert sum(found["clips"] * found["share"] for found in row["bins"]) == pytest.approx(row["clips"])
        means = [found["probability"] for found in row["bins"]]
        assert means == sorted(means)


def test_where_no_class_can_be_ranked_none_is_the_worst():
    figures = measure_scores(np.ones((3, 2), np.float32), np.ones((3, 2), np.float32), LABELS[:2], "sigmoid")
    assert (figures["reliability"], figures["map"], figures["ece"]) == ([], None, 0.0)
