"""Recipes: every choice of a training run that is not the data, as readable entries.

A new experiment is one entry in `RECIPES`; any field can be overridden by the flag of its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from clipmill.errors import ConfigError
from clipmill.loader import SAMPLINGS

MIXUPS = ("none", "standard", "between-class")
SCHEDULES = ("constant", "one-cycle")
LOSSES = ("auto", "softmax", "sigmoid")


@dataclass(frozen=True)
class Recipe:
    """A training preset; the defaults are the papers' for small datasets from scratch (journal, 4.1).

    `learning_rate` is Adam's, and the highest one with "one-cycle". `crop_s` is in seconds; 0
    trains on whole clips. `ema_warmup` see `ema.decay_at`. `eval_every` is in steps. `loss` "auto"
    takes softmax with cross-entropy, and sigmoid with binary cross-entropy as soon as any clip
    has several labels. `sampling` is one of `loader.SAMPLINGS`.
    """

    name: str
    model: str
    steps: int
    batch_size: int = 32
    learning_rate: float = 2e-4
    schedule: str = "constant"
    crop_s: float = 0.0
    mixup: str = "between-class"
    specaugment: bool = True
    ema_decay: float = 0.999
    ema_warmup: bool = True
    eval_every: int = 500
    loss: str = "auto"
    sampling: str = "shuffled"

    def __post_init__(self) -> None:
        choices = {"mixup": MIXUPS, "schedule": SCHEDULES, "loss": LOSSES, "sampling": SAMPLINGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"--{name} {getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        for name in ("steps", "batch_size", "eval_every"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{_flag(name)} {getattr(self, name)}: allowed is any whole number from 1 up"
                )
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate {self.learning_rate}: allowed is any number above 0")
        if not 0 <= self.crop_s < math.inf:
            raise ConfigError(f"--crop-s {self.crop_s}: allowed is 0 (whole clips) or any number of seconds")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"--ema-decay {self.ema_decay}: allowed is 0 to below 1")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Ten kinds of synthetic sound, easy to tell apart: a minute or two on two CPU cores.
        Recipe(
            "tones",
            model="erann-2-1",
            steps=300,
            batch_size=16,
            learning_rate=3e-3,
            schedule="one-cycle",
            crop_s=1.0,
            mixup="none",
            ema_decay=0.98,
            eval_every=50,
        ),
        # A few hundred clips on a machine without a GPU: minutes, by a high rate that falls to nothing. The paper's
        # crop of 4 s, for in one second of a dog's clip there is often no dog; no mixup, which pays over many more
        # epochs than these (docs/results.md).
        Recipe(
            "small-cpu",
            model="erann-2-1",
            steps=800,
            batch_size=8,
            learning_rate=2e-3,
            schedule="one-cycle",
            crop_s=4.0,
            mixup="none",
            ema_decay=0.99,
            eval_every=100,
        ),
        # Journal, 4.1 and 4.3: ERANN-1-3 reaches 0.892 over ESC-50's five folds.
        Recipe("esc50-scratch", model="erann-1-3", steps=20_000, crop_s=4.0),
        # The same without cropping, as the journal trains on UrbanSound8K, whose clips differ in length (4.4).
        Recipe("scratch", model="erann-1-3", steps=20_000),
    )
}

_BY_DATASET = {
    ("tones", "cpu"): "tones",
    ("tones", "cuda"): "tones",
    ("esc50", "cuda"): "esc50-scratch",
    ("esc10", "cuda"): "esc50-scratch",
}
_BY_DEVICE = {"cpu": "small-cpu", "cuda": "scratch"}


def choose_recipe(dataset: str, device: str, name: str | None = None, **overrides: Any) -> tuple[Recipe, str]:
    """The recipe for a dataset on a "cpu" or "cuda" device, and a line that says what was chosen and why.

    Args:
        dataset: the dataset's name, as its shards say.
        device: "cpu" or "cuda".
        name: a recipe asked for by name, instead.
        overrides: fields to change; None leaves a field as it is.

    Raises:
        ConfigError: no recipe has that name, or a value cannot be; lists what is allowed.
    """
    if name is not None:
        if name not in RECIPES:
            raise ConfigError(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")
        chosen, why = name, "asked for"
    elif (dataset, device) in _BY_DATASET:
        chosen, why = _BY_DATASET[dataset, device], f"for {dataset} on {device}"
    else:
        chosen, why = _BY_DEVICE[device], f"for any small dataset on {device}"
    changes = {field: value for field, value in overrides.items() if value is not None}
    recipe = replace(RECIPES[chosen], **changes)
    changed = [f"--{_flag(field)}" for field in changes if changes[field] != getattr(RECIPES[chosen], field)]
    return recipe, f"recipe {chosen}: {why}" + (f", changed by {', '.join(changed)}" if changed else "")


def describe(recipe: Recipe) -> str:
    """What a recipe does, in one line."""
    parts = [
        recipe.model,
        f"{recipe.steps} steps of {recipe.batch_size} clips, {recipe.sampling}",
        f"{recipe.crop_s:g} s crops" if recipe.crop_s else "whole clips",
        f"mixup {recipe.mixup}",
        "SpecAugment" if recipe.specaugment else "no SpecAugment",
        f"Adam {recipe.learning_rate:g} {recipe.schedule}",
        f"EMA {recipe.ema_decay:g}",
    ]
    return ", ".join(parts)


def learning_rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of a step (from 0): a pure function, so that resuming needs no schedule's state.

    "one-cycle" is Smith's policy with torch's `OneCycleLR` defaults: from a 25th of the highest
    rate up to it over the first 30 % of the steps and down to a 250,000th, both as half a cosine.
    Adam's momentum stays as it is (the paper does not say that it moves).
    """
    if recipe.schedule == "constant":
        return recipe.learning_rate
    low, high, end = recipe.learning_rate / 25, recipe.learning_rate, recipe.learning_rate / 25e4
    peak = 0.3 * recipe.steps - 1
    if step <= peak:
        return _half_cosine(low, high, step / peak)
    return _half_cosine(high, end, (step - peak) / (recipe.steps - 1 - peak))


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


def _flag(field: str) -> str:
    return field.replace("_", "-")
