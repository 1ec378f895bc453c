"""Fusing the probabilities of several networks: textbook evidence, the general theory, and what must always hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as sklearn
from torch import Tensor

from clipmill.cli import fuse as fuse_cli
from clipmill.errors import ConfigError
from clipmill.train.fusion import (
    METHODS,
    credibilities,
    deng,
    ds,
    equal_weights,
    fit_weights,
    fuse,
    log_loss,
    murphy,
    wa,
)
from clipmill.train.objective import clip_loss, probabilities

EVIDENCE = ("ds", "murphy", "deng")
RULES: dict[str, Callable[[Tensor], Tensor]] = {"ds": ds, "murphy": murphy, "deng": deng}


def evidence(*bodies: list[float]) -> Tensor:
    """One case: `[n, hypotheses]`."""
    return torch.tensor(bodies, dtype=torch.float64)


# The general theory, slow and plain: masses of sets of hypotheses

Body = dict[frozenset[int], float]


def dempster(one: Body, other: Body) -> Body:
    """Shafer 1976: what the sets have in common gets the product; the conflict is left out."""
    found: Body = {}
    for a, p in one.items():
        for b, q in other.items():
            if a & b:
                found[a & b] = found.get(a & b, 0.0) + p * q
    return {a: mass / sum(found.values()) for a, mass in found.items()}


def jousselme(one: Body, other: Body, hypotheses: int) -> float:
    """Jousselme et al. 2001, Eq. 11: over all subsets, D(A, B) = |A and B| / |A or B|."""
    subsets = [
        frozenset(some)
        for some in chain.from_iterable(combinations(range(hypotheses), k) for k in range(1, hypotheses + 1))
    ]
    matrix = np.array([[len(a & b) / len(a | b) for b in subsets] for a in subsets])
    difference = np.array([one.get(a, 0.0) - other.get(a, 0.0) for a in subsets])
    return math.sqrt(max(0.0, 0.5 * difference @ matrix @ difference))


def mean_body(bodies: list[Body], weights: list[float]) -> Body:
    found: Body = {}
    for body, weight in zip(bodies, weights, strict=True):
        for a, mass in body.items():
            found[a] = found.get(a, 0.0) + weight * mass
    return found


def plain_deng(bodies: list[Body], hypotheses: int) -> Body:
    support = [
        sum(1 - jousselme(one, other, hypotheses) for other in bodies if other is not one) for one in bodies
    ]
    mean = mean_body(bodies, [s / sum(support) for s in support])
    return reduce(dempster, [mean] * len(bodies))


PLAIN: dict[str, Callable[[list[Body], int], Body]] = {
    "ds": lambda bodies, _: reduce(dempster, bodies),
    "murphy": lambda bodies, _: reduce(
        dempster, [mean_body(bodies, [1 / len(bodies)] * len(bodies))] * len(bodies)
    ),
    "deng": plain_deng,
}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.integers(2, 4), st.data())
def test_on_single_hypotheses_the_general_theory_says_the_same(sources, hypotheses, data):
    raw = data.draw(arrays.arrays(np.float64, (sources, hypotheses), elements=st.floats(0.01, 1)))
    masses = raw / raw.sum(1, keepdims=True)
    bodies = [{frozenset([h]): float(row[h]) for h in range(hypotheses)} for row in masses]
    for name, plain in PLAIN.items():
        wanted = plain(bodies, hypotheses)
        found = RULES[name](torch.from_numpy(masses))
        assert found.tolist() == pytest.approx([wanted[frozenset([h])] for h in range(hypotheses)], abs=1e-9)


# Textbook evidence


def test_zadehs_paradox_what_both_hold_unlikely_is_certain_by_dempster_and_not_by_murphy_and_deng():
    doctors = evidence([0.99, 0.01, 0], [0, 0.01, 0.99])
    assert ds(doctors).tolist() == pytest.approx([0, 1, 0], abs=1e-7)
    wanted = [0.495**2 / (2 * 0.495**2 + 0.01**2), 0.01**2 / (2 * 0.495**2 + 0.01**2)]
    for rule in (murphy, deng):
        assert rule(doctors).tolist() == pytest.approx([*wanted, wanted[0]])


def test_two_doctors_who_agree_but_for_a_doubt_are_certain():
    assert ds(evidence([0.99, 0.01, 0], [0.99, 0, 0.01])).tolist() == pytest.approx([1, 0, 0], abs=1e-7)


SENSORS = [[0.5, 0.2, 0.3], [0, 0.9, 0.1], [0.55, 0.1, 0.35], [0.55, 0.1, 0.35], [0.55, 0.1, 0.35]]
"""The five bodies of evidence of Deng et al. 2004, of which the second is wrong."""


@pytest.mark.parametrize(
    ("count", "by_dempster", "by_murphy"),
    [
        (2, [0, 0.8571, 0.1429], [0.1543, 0.7469, 0.0988]),
        (3, [0, 0.6316, 0.3684], [0.3500, 0.5224, 0.1276]),
        (4, [0, 0.3288, 0.6712], [0.6027, 0.2627, 0.1346]),
        (5, [0, 0.1228, 0.8772], [0.7958, 0.0932, 0.1110]),
    ],
)
def test_the_bodies_of_evidence_of_deng_2004_by_dempster_and_by_murphy(count, by_dempster, by_murphy):
    bodies = evidence(*SENSORS[:count])
    assert ds(bodies).tolist() == pytest.approx(by_dempster, abs=5e-5)
    assert murphy(bodies).tolist() == pytest.approx(by_murphy, abs=5e-5)


def test_the_bodies_of_evidence_of_deng_2004_by_deng():
    """Of two, both are believed alike; of five, the wrong one is hardly believed."""
    assert deng(evidence(*SENSORS[:2])).tolist() == pytest.approx([0.1543, 0.7469, 0.0988], abs=5e-5)
    assert deng(evidence(*SENSORS)).tolist() == pytest.approx([0.8909, 0.0086, 0.1005], abs=5e-5)


def test_three_sensors_for_one_of_two_are_a_product_of_odds():
    assert ds(evidence([0.6, 0.4], [0.7, 0.3], [0.8, 0.2])).tolist() == pytest.approx([14 / 15, 1 / 15])


PARADOXES = {
    "complete conflict": ([1, 0, 0], [0, 1, 0], [0.8, 0.1, 0.1], [0.8, 0.1, 0.1]),
    "0 trust": ([0.5, 0.2, 0.3], [0.5, 0.2, 0.3], [0, 0.9, 0.1], [0.5, 0.2, 0.3]),
    "1 trust": ([0.9, 0.1, 0], [0, 0.1, 0.9], [0.1, 0.15, 0.75], [0.1, 0.15, 0.75]),
    "high conflict": (
        [0.7, 0.1, 0.1, 0, 0.1],
        [0, 0.5, 0.2, 0.1, 0.2],
        [0.6, 0.1, 0.15, 0, 0.15],
        [0.55, 0.1, 0.1, 0.15, 0.1],
        [0.6, 0.1, 0.2, 0, 0.1],
    ),
}
"""Bodies of evidence that Dempster's rule does badly on; those of the paper that the slides take their fusion from
(Li et al. 2017)."""


@pytest.mark.parametrize(
    ("name", "conflict", "by_dempster"),
    [
        ("0 trust", 0.9901, [0, 8 / 11, 3 / 11]),
        ("1 trust", 0.9998, [0, 1, 0]),
        ("high conflict", 0.9999, [0, 5 / 14, 6 / 14, 0, 3 / 14]),
    ],
)
def test_the_paradoxes_of_conflicting_evidence_one_zero_vetoes_by_dempster(name, conflict, by_dempster):
    bodies = evidence(*PARADOXES[name])
    assert float(1 - bodies.prod(0).sum()) == pytest.approx(conflict, abs=5e-5)
    assert ds(bodies).tolist() == pytest.approx(by_dempster, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "likeliest"), [("complete conflict", 0), ("0 trust", 0), ("1 trust", 2), ("high conflict", 0)]
)
def test_in_the_paradoxes_deng_sides_with_the_majority_and_more_firmly_than_murphy(name, likeliest):
    bodies = evidence(*PARADOXES[name])
    assert int(deng(bodies).argmax()) == likeliest
    assert float(deng(bodies)[likeliest]) > float(murphy(bodies)[likeliest])
    believed = credibilities(bodies)
    # The one that contradicts the others is believed least.
    assert (
        int(believed.argmin())
        == {"complete conflict": 1, "0 trust": 2, "1 trust": 0, "high conflict": 1}[name]
    )


def test_credibilities_by_hand():
    """Distances 1/2, 1/2 and 0: the first is supported by 1, the others by 3/2 each."""
    believed = credibilities(evidence([1, 0], [0.5, 0.5], [0.5, 0.5]))
    assert believed.tolist() == pytest.approx([1 / 4, 3 / 8, 3 / 8])


# What must always hold


@st.composite
def cases(draw, most: int = 6) -> Tensor:
    """`[n, clips, classes]` that sum to 1: certain, contradictory and impossible ones among them, and ties."""
    shape = draw(st.tuples(st.integers(1, most), st.integers(1, 3), st.integers(2, 5)))
    elements = st.sampled_from([0.0, 0.0, 1.0, 1e-300, 0.001]) | st.floats(0, 1)
    raw = draw(arrays.arrays(np.float64, shape, elements=elements))
    raw[raw.sum(2) == 0] = np.eye(shape[2])[0]
    return torch.from_numpy(raw / raw.sum(2, keepdims=True))


many = settings(max_examples=40, deadline=None)


@many
@given(cases(), st.sampled_from(METHODS), st.sampled_from(["softmax", "sigmoid"]))
def test_what_comes_out_is_probabilities_whatever_goes_in(case, method, loss):
    fused = fuse(case, method, loss)
    assert fused.shape == case.shape[1:]
    assert fused.dtype == torch.float64
    assert bool(((fused >= 0) & (fused <= 1 + 1e-12)).all())
    if loss == "softmax":
        torch.testing.assert_close(fused.sum(1), torch.ones(len(fused), dtype=torch.float64))


@many
@given(cases(), st.sampled_from(METHODS), st.sampled_from(["softmax", "sigmoid"]), st.randoms())
def test_the_order_of_the_sources_and_of_the_classes_does_not_matter(case, method, loss, random):
    order, classes = (random.sample(range(size), size) for size in (len(case), case.shape[2]))
    weights = [random.random() + 0.1 for _ in order] if method == "wa" else None
    shares = None if weights is None else [w / sum(weights) for w in weights]
    turned = None if shares is None else [shares[place] for place in order]
    straight = fuse(case, method, loss, shares)
    torch.testing.assert_close(fuse(case[order], method, loss, turned), straight, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        fuse(case[:, :, classes], method, loss, shares), straight[:, classes], atol=1e-6, rtol=0
    )


@many
@given(cases(most=1), st.integers(2, 5), st.sampled_from(["softmax", "sigmoid"]))
def test_one_source_comes_back_and_so_does_the_average_of_the_same_many_times(case, times, loss):
    for method in METHODS:
        torch.testing.assert_close(fuse(case, method, loss), case[0], atol=1e-9, rtol=0)
    same = case.expand(times, -1, -1)
    torch.testing.assert_close(fuse(same, "wa", loss), case[0], atol=1e-12, rtol=0)
    for method in ("murphy", "deng"):  # no conflict to be careful of
        torch.testing.assert_close(fuse(same, method, loss), fuse(same, "ds", loss), atol=1e-9, rtol=0)


@many
@given(cases(), st.sampled_from(METHODS), st.sampled_from(["softmax", "sigmoid"]))
def test_a_clip_is_fused_as_it_would_be_alone_and_with_sigmoid_so_is_a_class(case, method, loss):
    fused = fuse(case, method, loss)
    for clip in range(case.shape[1]):
        alone = fuse(case[:, clip : clip + 1], method, loss)
        torch.testing.assert_close(fused[clip : clip + 1], alone, atol=1e-12, rtol=0)
    if loss == "sigmoid":
        present = torch.stack([case[:, :, 0], 1 - case[:, :, 0]], -1)  # one class, as two hypotheses
        torch.testing.assert_close(fused[:, 0], fuse(present, method, "softmax")[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_sources_that_are_certain_of_different_classes_give_those_alike_and_no_other(method):
    certain = torch.eye(4, dtype=torch.float64)[:3, None]
    assert fuse(certain, method, "softmax").tolist() == [pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-9)]
    assert fuse(certain[:2], method, "sigmoid")[0, :2].tolist() == pytest.approx([0.5, 0.5], abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_one_sources_zero_does_not_veto_what_all_others_are_sure_of(method):
    sure = [0.999, 0.001 - 1e-6, 1e-6]
    bodies = evidence([0, 0.5, 0.5], *[sure] * 8)
    assert int(fuse(bodies[:, None], method, "softmax").argmax()) == 0


def test_a_thousand_sources_are_no_more_than_one_can_count():
    weak = torch.tensor([[0.51, 0.49]], dtype=torch.float64).expand(1000, 1, 2)
    assert fuse(weak, "ds", "softmax")[0, 0] == pytest.approx(1.0)
    assert fuse(weak, "wa", "softmax")[0, 0] == pytest.approx(0.51)


def test_what_cannot_be_fused_is_refused():
    case = evidence([0.5, 0.5], [0.1, 0.9])[:, None]
    with pytest.raises(ConfigError, match="--method max: allowed are wa, ds, murphy, deng"):
        fuse(case, "max", "softmax")
    with pytest.raises(ConfigError, match="--method ds: has no weights; --method wa does"):
        fuse(case, "ds", "softmax", (0.5, 0.5))
    for weights in ([0.5, 0.6], [1.5, -0.5], [1.0], [math.nan, 1.0], [0.2, 0.3, 0.5]):
        with pytest.raises(
            ConfigError, match=r"of 2 sources: allowed is one of 0 or more for each, which sum to 1"
        ):
            wa(case, torch.tensor(weights))
    assert fuse_cli.METHODS == METHODS


# Log loss, and weights that make it least


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_log_loss_is_that_of_training_and_scikit_learns(loss):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=rng, dtype=torch.float64)
    targets = torch.eye(4)[[0, 1, 2, 3, 0, 1]]
    targets[0, 2] = float(loss == "sigmoid")
    shares = probabilities(logits, loss)
    each = log_loss(shares, targets, loss)
    for clip in range(6):
        wanted = clip_loss(logits[clip : clip + 1], targets[clip : clip + 1].double(), loss)
        assert float(each[clip]) == pytest.approx(float(wanted))
    if loss == "softmax":
        assert float(each.mean()) == pytest.approx(sklearn.log_loss(targets.argmax(1), shares))
    certain_and_wrong = log_loss(torch.eye(4, dtype=torch.float64)[:1], torch.eye(4)[1:2], loss)
    assert bool(torch.isfinite(certain_and_wrong).all())


def answers(sources: int, clips: int, classes: int, loss: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise of n sources, float64 `[n, clips, classes]`, and targets."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(sources, clips, classes, generator=rng, dtype=torch.float64)
    targets = torch.eye(classes)[torch.randint(classes, (clips,), generator=rng)]
    if loss == "sigmoid":
        targets = torch.maximum(targets, (torch.rand(targets.shape, generator=rng) < 0.2).float())
    return logits.softmax(2) if loss == "softmax" else logits.sigmoid(), targets


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_one_good_source_among_noise_gets_the_weight(loss):
    noise, targets = answers(5, 300, 6, loss)
    noise[3] = 0.85 * targets + 0.15 / 6 if loss == "softmax" else 0.1 + 0.8 * targets
    weights = fit_weights(noise, targets, loss)
    assert weights[3] > 0.97
    assert sum(weights) == pytest.approx(1.0)
    assert weights == fit_weights(noise, targets, loss), "the same each time"


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_no_other_weights_do_better(loss):
    """Three sources, each good at other clips; all weights in steps of 0.02 are tried."""
    case, targets = answers(3, 60, 4, loss, seed=1)
    for source in range(3):
        some = slice(source * 10, source * 10 + 10 * (source + 1))
        case[source, some] = 0.6 * targets[some] + 0.4 * case[source, some]
    found = fit_weights(case, targets, loss)
    reached = float(log_loss(fuse(case, "wa", loss, found), targets, loss).mean())
    grid = [(i / 50, j / 50, (50 - i - j) / 50) for i in range(51) for j in range(51 - i)]
    best = min(grid, key=lambda w: float(log_loss(fuse(case, "wa", loss, w), targets, loss).mean()))
    assert reached <= float(log_loss(fuse(case, "wa", loss, best), targets, loss).mean()) + 1e-9
    assert found == pytest.approx(best, abs=0.021)


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(["softmax", "sigmoid"]), st.data())
def test_fitted_weights_are_never_worse_than_equal_ones(case, loss, data):
    clips, classes = case.shape[1:]
    truth = data.draw(st.lists(st.integers(0, classes - 1), min_size=clips, max_size=clips))
    targets = torch.eye(classes)[truth]
    found = fit_weights(case, targets, loss)
    assert min(found) >= 0
    assert sum(found) == pytest.approx(1.0)
    fitted, equal = (
        float(log_loss(fuse(case, "wa", loss, weights), targets, loss).mean())
        for weights in (found, equal_weights(len(case)))
    )
    assert fitted <= equal
