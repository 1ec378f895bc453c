"""What several networks make of the same clips, as one: the weighted average, and Dempster-Shafer evidence fusion.

A network's probabilities are its evidence: a mass for each single class (a singleton), none for sets of classes.
Sums over the subsets of classes, as the general theory has them, are then sums over the classes.

    wa      sum_i w_i m_i, where the weights sum to 1
    ds      m(A) = prod_i m_i(A) / sum_B prod_i m_i(B): Dempster's rule (G. Shafer, "A mathematical theory of
            evidence", 1976)
    murphy  the mean evidence, combined with itself n - 1 times by Dempster's rule (C. K. Murphy, "Combining belief
            functions when evidence conflicts", Decision Support Systems 29, 2000)
    deng    the same with a weighted mean: evidence far from all other counts less (Y. Deng, W. Shi, Z. Zhu and
            Q. Liu, "Combining belief functions based on distance of evidence", Decision Support Systems 38, 2004)

All take float64 `[n, ..., hypotheses]` of n sources, any number of cases between, and give `[..., hypotheses]`.
Where a clip has any number of classes, each class is a question of its own, with two hypotheses: present and absent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from clipmill.errors import ConfigError
from clipmill.train.objective import probabilities

METHODS = ("wa", "ds", "murphy", "deng")

FLOOR = 1e-12
"""The least mass that a product or a logarithm takes: one source's zero does not veto what all others are sure of,
and sources that contradict each other wholly still give an answer."""

_NO_SUPPORT = 1e-9
"""Support, of all sources together, that is no more than rounding."""

_NO_WEIGHT = 1e-9
"""A fitted weight that is no more than rounding."""


def wa(masses: Tensor, weights: Tensor) -> Tensor:
    """The weighted average; `weights` are `[n]`.

    Raises:
        ConfigError: a weight is below 0 or no number, there are not n of them, or they do not sum to 1.
    """
    sound = weights.shape == masses.shape[:1] and bool((weights >= 0).all())
    if not sound or not math.isclose(float(weights.sum()), 1.0, abs_tol=1e-6):
        raise ConfigError(
            f"weights {weights.tolist()} of {len(masses)} sources: allowed is one of 0 or more for each, which sum to 1"
        )
    return torch.tensordot(weights.to(masses), masses, 1)


def ds(masses: Tensor) -> Tensor:
    """Dempster's rule: the product of the masses, and what it lacks to 1 shared out in proportion."""
    return _logs(masses).sum(0).softmax(-1)


def murphy(masses: Tensor) -> Tensor:
    """The mean of the masses, combined with itself n - 1 times."""
    return _combined_with_itself(masses.mean(0), len(masses))


def deng(masses: Tensor) -> Tensor:
    """The mean of the masses, each by its credibility, combined with itself n - 1 times."""
    mean = (credibilities(masses)[..., None] * masses).sum(0)
    return _combined_with_itself(mean, len(masses))


def credibilities(masses: Tensor) -> Tensor:
    """`[n, ...]`: how much each source is believed, which sums to 1 over the sources of each case.

    Sources i and j are sqrt(1/2 (m_i - m_j)^T D (m_i - m_j)) apart, 0 to 1 (A.-L. Jousselme, D. Grenier and
    E. Bosse, "A new distance between two bodies of evidence", Information Fusion 2, 2001); between singletons D is the
    identity. A source's support is the sum, over the others, of 1 less its distance from them; its
    credibility is its share of all support. Where no source has any, all are believed alike.
    """
    support = torch.zeros_like(masses[..., 0])
    for i, j in combinations(range(len(masses)), 2):
        distance = ((masses[i] - masses[j]).square().sum(-1) / 2).sqrt()
        # Rounding makes certain contradictions a little more than 1 apart.
        similarity = (1 - distance).clamp(min=0)
        support[i] += similarity
        support[j] += similarity
    total = support.sum(0)
    return torch.where(total > _NO_SUPPORT, support / total.clamp(min=_NO_SUPPORT), 1 / len(masses))


def fuse(scores: Tensor, method: str, loss: str, weights: Sequence[float] | None = None) -> Tensor:
    """Fuse the probabilities of n sources, float64 `[n, clips, classes]`, to `[clips, classes]`.

    Args:
        scores: the probabilities; with "softmax" they sum to 1 for each clip.
        method: one of `METHODS`.
        loss: "softmax", where a clip's classes are the hypotheses, or "sigmoid", where each class is present or absent.
        weights: of each source, for "wa"; None: all alike. Other methods have none.

    Raises:
        ConfigError: another method, or weights that cannot be.
    """
    rules = {"ds": ds, "murphy": murphy, "deng": deng}
    if method not in METHODS:
        raise ConfigError(f"--method {method}: allowed are {', '.join(METHODS)}")
    if method != "wa" and weights is not None:
        raise ConfigError(f"--method {method}: has no weights; --method wa does")
    masses = _hypotheses(scores, loss)
    if method == "wa":
        shares = equal_weights(len(masses)) if weights is None else weights
        fused = wa(masses, torch.tensor(shares, dtype=torch.float64))
    else:
        fused = rules[method](masses)
    return fused[..., 0] if loss == "sigmoid" else fused


def fuse_logits(logits: Tensor, method: str, loss: str, weights: Sequence[float] | None = None) -> Tensor:
    """The same of logits and to logits, float32 `[n, clips, classes]` -> `[clips, classes]`.

    `objective.probabilities` makes the fused probabilities of what comes out, down to the least that float32 holds.
    """
    fused = fuse(torch.stack([probabilities(one, loss) for one in logits.double()]), method, loss, weights)
    found = fused.clamp(min=torch.finfo(torch.float32).tiny).log()
    return (found - _logs(1 - fused) if loss == "sigmoid" else found).float()


def equal_weights(sources: int) -> tuple[float, ...]:
    """The same weight for each source."""
    return (1 / sources,) * sources


def log_loss(scores: Tensor, targets: Tensor, loss: str) -> Tensor:
    """The log loss of each clip, `[clips]`, of probabilities and targets `[clips, classes]`.

    What `objective.clip_loss` is of a clip: cross-entropy with "softmax", where a clip's targets are shares;
    with "sigmoid" binary cross-entropy, the mean over the classes. Probabilities are at least `FLOOR`.
    """
    each = -(_truth(targets, loss) * _logs(_hypotheses(scores, loss))).sum(-1)
    return each.mean(-1) if loss == "sigmoid" else each


def fit_weights(scores: Tensor, targets: Tensor, loss: str) -> tuple[float, ...]:
    """The weights of the average that has the least log loss on clips, one for each of n sources.

    The mean log loss is convex in the weights, which are at least 0 and sum to 1: from equal ones SLSQP (D. Kraft,
    "A software package for sequential quadratic programming", DFVLR-FB 88-28, 1988) finds the least, and the same one
    each time. What is found is never worse than equal weights.

    Args:
        scores: probabilities, float64 `[n, clips, classes]`.
        targets: `[clips, classes]`.
        loss: "softmax" or "sigmoid".
    """
    from scipy.optimize import minimize  # half a second to import

    count = len(scores)
    truth = _truth(targets, loss)
    # Only hypotheses that hold take part: the loss is the mean of -share log(sum_i w_i m_i) over them.
    there = truth > 0
    shares = (truth[there] / truth.sum()).numpy()
    masses = _hypotheses(scores, loss)[:, there].clamp(min=FLOOR).numpy()  # [n, of them]

    def mean_loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = weights @ masses
        return float(-(shares * np.log(mixed)).sum()), -(masses * (shares / mixed)).sum(1)

    found = minimize(
        mean_loss,
        np.full(count, 1 / count),
        jac=True,
        method="SLSQP",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    fitted = np.where(found.x < _NO_WEIGHT, 0, found.x)
    weights = tuple((fitted / fitted.sum()).tolist())
    before, after = (
        log_loss(fuse(scores, "wa", loss, some), targets, loss).mean() for some in (None, weights)
    )
    return weights if after < before else equal_weights(count)


def _hypotheses(scores: Tensor, loss: str) -> Tensor:
    """`[..., classes]` as masses: of the classes, or with "sigmoid" `[..., classes, 2]` of present and absent."""
    return torch.stack([scores, 1 - scores], -1) if loss == "sigmoid" else scores


def _truth(targets: Tensor, loss: str) -> Tensor:
    """Targets as shares of the hypotheses that `_hypotheses` gives, float64."""
    wide = targets.double()
    return _hypotheses(wide, loss) if loss == "sigmoid" else wide / wide.sum(-1, keepdim=True)


def _logs(masses: Tensor) -> Tensor:
    return masses.clamp(min=FLOOR).log()


def _combined_with_itself(mean: Tensor, count: int) -> Tensor:
    """`count` of the same evidence by Dempster's rule."""
    return (count * _logs(mean)).softmax(-1)
