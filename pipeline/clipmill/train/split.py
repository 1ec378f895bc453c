"""Which clips a run learns from and which it holds out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from clipmill.errors import ConfigError, TrainError
from clipmill.shards.read import Shards
from clipmill.types import NO_SPLIT, TRAIN_SPLITS

HELD_OUT_PART = 0.1
"""How much is held out, in groups, where the dataset says nothing."""


@dataclass(frozen=True)
class Split:
    """Rows to train on and rows held out (int64, ascending), and how that was decided.

    `by` is "fold", "split" or "groups"; `value` is the fold, the split's name, or the seed
    that drew the groups; `why` tells a person.
    """

    by: str
    value: int | str
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    why: str

    @property
    def tag(self) -> str:
        """A short name for file names: fold1, eval, groups."""
        return {"fold": f"fold{self.value}", "split": str(self.value)}.get(self.by, self.by)


def choose_split(
    shards: Shards, fold: int | None, seed: int, *, allow_leak: bool = False, where: str | None = None
) -> Split:
    """Hold out `fold`; without one the dataset's own split, else its lowest fold, else a tenth of its groups.

    With a fold, clips whose split is valid or eval are left out of training too. Clips
    without a label teach nothing and cannot be scored: they stand on neither side.

    `where`, an expression as `Shards.where` takes it, thins out both sides and moves no clip from one
    to the other: what is held out is decided on all the clips first.

    Raises:
        ConfigError: `where` cannot be read.
        TrainError: the fold is not there, a side is empty, or a group stands on both sides
            and `allow_leak` is not given.
    """
    if fold is not None:
        split = _by_fold(shards, fold, f"fold {fold} is held out")
    elif held := next((name for name in ("valid", "eval") if name in shards.splits), None):
        train = shards.in_splits(*TRAIN_SPLITS, NO_SPLIT)
        why = f"the dataset's own split: {held} is held out"
        split = _split(shards, "split", held, train, shards.in_splits(held), why)
    elif (shards.folds >= 0).any():
        lowest = int(shards.folds[shards.folds >= 0].min())
        split = _by_fold(shards, lowest, f"fold {lowest}, the lowest, is held out; --fold chooses another")
    else:
        held_out = _some_groups(shards.groups, seed)
        why = f"no folds and no splits: {HELD_OUT_PART:.0%} of the groups, drawn by seed {seed}, are held out"
        split = _split(shards, "groups", seed, ~held_out, held_out, why)
    if where is not None:
        split = _thinned(shards, split, where)
    _check_sides(shards, split, "--fold" if where is None else "--fold or --where")
    if not allow_leak:
        _check_groups(shards, split)
    return split


def held_out_again(shards: Shards, by: str, value: Any) -> NDArray[np.int64]:
    """The rows that `Split.held_out` held before any `where`, from what a run's config.json keeps of it."""
    if by == "fold":
        chosen = shards.folds == int(value)
    elif by == "split":
        chosen = shards.in_splits(str(value))
    else:
        chosen = _some_groups(shards.groups, int(value))
    return np.flatnonzero(chosen & labelled(shards))


def learnt_from(shards: Shards, config: dict[str, Any]) -> NDArray[np.bool_]:
    """`[clips]`: whether a run learnt from a clip, by what its config.json keeps.

    Clips of other datasets, by name, are none of its own. Where the run held out groups that it drew from other
    shards than these, any clip may be one that it learnt from.

    Raises:
        ConfigError: the run's `where` names a column that these shards lack.
    """
    held, names = config["held_out"], str(config["dataset"]).split("+")
    same = shards.root_sha256 == config["root_sha256"]
    learnt = labelled(shards) & np.isin([part.info["name"] for part in shards.sets], names)[shards.set_of]
    if held["by"] != "groups" or (same and shards.some_files == config.get("files")):
        learnt[held_out_again(shards, held["by"], held["value"])] = False
    if held["by"] != "groups":
        learnt &= shards.in_splits(*TRAIN_SPLITS, NO_SPLIT)
    if config.get("where") is not None:
        learnt &= shards.fulfilling(config["where"])
    for number, files in enumerate(config.get("files") or [] if same else []):
        if files is not None:
            inside = np.asarray(pc.is_in(shards.columns["shard"], pa.array(files)))
            learnt &= inside | (shards.set_of != number)
    return learnt


def labelled(shards: Shards) -> NDArray[np.bool_]:
    """`[clips]`: whether a clip has any label."""
    return np.asarray(shards.label_counts > 0)


def few(names: list[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def folds_of(shards: Shards, asked: str) -> list[int]:
    """The folds that `--folds` asks for: "all" of the shards', or some by number, such as "1,3".

    Raises:
        ConfigError: it is neither.
        TrainError: a fold is not there, or there are fewer than two.
    """
    there = sorted(set(shards.folds[shards.folds >= 0].tolist()))
    if asked == "all":
        if len(there) < 2:
            raise TrainError(
                f"{shards.place}: --folds all: these clips have {'no folds' if not there else 'one fold'}; leave "
                "--folds away, or give them folds (`pipeline fetch folder --fold-column`)"
            )
        return there
    try:
        folds = list(dict.fromkeys(int(part) for part in asked.split(",")))
    except ValueError:
        raise ConfigError(
            f"--folds {asked}: allowed are all, or numbers with commas between, such as 1,3"
        ) from None
    for fold in folds:
        _check_fold(fold, there)
    return folds


def _by_fold(shards: Shards, fold: int, why: str) -> Split:
    there = sorted(set(shards.folds[shards.folds >= 0].tolist()))
    _check_fold(fold, there)
    held_out = shards.folds == fold
    train = ~held_out & shards.in_splits(*TRAIN_SPLITS, NO_SPLIT)
    return _split(shards, "fold", fold, train, held_out, why)


def _check_fold(fold: int, there: list[int]) -> None:
    if fold not in there:
        found = f"there are {', '.join(map(str, there))}" if there else "these clips have no folds"
        mend = "leave --fold away" if not there else "choose one with --fold"
        raise TrainError(f"no clip is in fold {fold}: {found}; {mend}")


def _split(
    shards: Shards,
    by: str,
    value: int | str,
    train: NDArray[np.bool_],
    held_out: NDArray[np.bool_],
    why: str,
) -> Split:
    known = labelled(shards)
    if lost := int((~known & (train | held_out)).sum()):
        why += f"; {lost} clip{'s' * (lost > 1)} without a label left out"
    return Split(by, value, np.flatnonzero(train & known), np.flatnonzero(held_out & known), why)


def _thinned(shards: Shards, split: Split, where: str) -> Split:
    kept = shards.fulfilling(where)
    train, held_out = split.train[kept[split.train]], split.held_out[kept[split.held_out]]
    lost = len(split.train) + len(split.held_out) - len(train) - len(held_out)
    why = f"{split.why}; {lost} clip{'s' * (lost != 1)} left out by --where {where!r}"
    return replace(split, train=train, held_out=held_out, why=why)


def _some_groups(groups: pa.ChunkedArray, seed: int) -> NDArray[np.bool_]:
    """Whether each clip's group is among the tenth (at least one) that stand first by a seeded hash."""
    names = sorted(pc.unique(groups).to_pylist())
    names.sort(key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    chosen = names[: math.ceil(len(names) * HELD_OUT_PART)]
    return np.asarray(pc.is_in(groups, pa.array(chosen, pa.string())).to_numpy())


def _check_sides(shards: Shards, split: Split, mend: str) -> None:
    for rows, side in ((split.train, "to train on"), (split.held_out, "to hold out")):
        if not len(rows):
            raise TrainError(
                f"of {len(shards)} clips none is left {side} ({split.why}); choose other clips with {mend}"
            )


def _check_groups(shards: Shards, split: Split) -> None:
    groups = shards.groups.combine_chunks()
    train, held_out = (pc.unique(groups.take(pa.array(rows))) for rows in (split.train, split.held_out))
    both = sorted(train.filter(pc.is_in(train, held_out)).to_pylist())
    if both:
        named = ", ".join(both[:3]) + (", ..." if len(both) > 3 else "")
        raise TrainError(
            f"{len(both)} group{'s' * (len(both) > 1)} stand{'s' * (len(both) == 1)} both in training and "
            f"among the clips held out ({split.why}): {named}. The figures would flatter the model; mend the "
            "dataset's folds or groups, choose another --fold, or accept it with --allow-leak"
        )
