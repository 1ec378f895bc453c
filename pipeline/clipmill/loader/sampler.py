"""Which clip stands where: pure functions of (seed, position), so that a run's state is one integer.

Positions count from 0 over all epochs, and step s takes the positions s * batch_size to
(s + 1) * batch_size - 1: a batch may straddle two epochs, so no clip is ever dropped and no batch is
ever short. Nothing is kept between calls, and no order is written out: the clip at a position is
computed, so any step of any epoch begins at once, whatever was asked before and by whichever rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipmill.errors import ConfigError
from clipmill.loader.orders import key, permuted, uniform

Rows = NDArray[np.int64]
Ids = NDArray[np.integer]

SLOTS = 1000
"""Places in one period of `Mixed`: shares are kept in thousandths."""

_NOISE = 1
"""The first word of `step_seed`'s seed sequence."""

_ORDER, _CLASSES, _WITHIN, _STRATA, _DRAW, _SETS, _OTHER, _CROP, _AUGMENT = range(9)
"""What a stream of random numbers is for: streams of different uses never meet, whatever their seed and count."""


_GOLDEN_SECTION = (5**0.5 - 1) / 2


class Sampler(Protocol):
    """A law that says which clip stands at each position."""

    @property
    def clips(self) -> int:
        """Positions in an epoch: how many clips the set has."""

    def rows(self, positions: Rows) -> Rows:
        """The clips at these positions, 0 or more: int64 `[k]`, each 0 to the number of clips - 1."""

    def other(self, attempt: int) -> Sampler:
        """The same law with another seed: where substitutes for unreadable clips come from."""


@dataclass(frozen=True)
class Sequential:
    """One clip after the other, over and over; `first` is the one at position 0."""

    clips: int
    first: int = 0

    def rows(self, positions: Rows) -> Rows:
        """See `Sampler`."""
        return (positions + self.first) % self.clips

    def other(self, attempt: int) -> Sequential:
        """The same order, begun well further on: what stands next to a clip is likely damaged with it."""
        return replace(self, first=self.first + round(attempt * self.clips * _GOLDEN_SECTION))


@dataclass(frozen=True)
class Shuffled:
    """Every clip once an epoch, in an order of the epoch's own."""

    clips: int
    seed: int

    def rows(self, positions: Rows) -> Rows:
        """See `Sampler`."""
        epochs, places = np.divmod(positions, self.clips)
        return permuted(key(self.seed, _ORDER, epochs), places, self.clips)

    def other(self, attempt: int) -> Shuffled:
        """See `Sampler`."""
        return replace(self, seed=_other_seed(self.seed, attempt))


@dataclass(frozen=True, eq=False)
class Balanced:
    """Each class as often as any other: PANNs' sampler (Kong et al. 2020), in closed form.

    A round holds each class that has clips once, in an order of the round's own. Each class goes through
    its own clips, each once before any comes again, in an order of the class's and the pass's own. A clip
    with several labels stands in the list of each; one without labels never comes.

    Attributes:
        clips: how many clips the set has, those without labels too.
        members: the clips of each class, one class after the other: integers `[entries]`.
        ends: where in `members` each class's list ends: int64 `[classes]`; no list is empty.
    """

    clips: int
    members: Ids
    ends: Rows
    seed: int

    @classmethod
    def of(cls, label_ids: Ids, offsets: Ids, seed: int) -> Balanced:
        """From label lists.

        Args:
            label_ids: the labels, 0 or more, of all clips, one clip after the other: integers `[entries]`.
                No clip has a label twice.
            offsets: integers `[clips + 1]`; clip k has `label_ids[offsets[k]:offsets[k + 1]]`.

        Raises:
            ConfigError: no clip has a label.
        """
        labels, owners = _entries(label_ids, offsets)
        counts = np.bincount(labels)
        if not len(labels):
            raise ConfigError(f"--sampling balanced: none of the {len(offsets) - 1} clips has a label")
        # A stable sort is a radix sort for 16 bits, five times as fast as the sort of 32.
        order = np.argsort(labels.astype(np.uint16) if len(counts) <= 1 << 16 else labels, kind="stable")
        return cls(len(offsets) - 1, owners[order], np.cumsum(counts[counts > 0]), seed)

    def rows(self, positions: Rows) -> Rows:
        """See `Sampler`."""
        rounds, places = np.divmod(positions, len(self.ends))
        classes = permuted(key(self.seed, _CLASSES, rounds), places, len(self.ends))
        counts = np.diff(self.ends, prepend=0)[classes]
        passes, draws = np.divmod(rounds, counts)
        within = permuted(key(self.seed, _WITHIN, classes, passes), draws, counts)
        return self.members[self.ends[classes] - counts + within].astype(np.int64)

    def other(self, attempt: int) -> Balanced:
        """See `Sampler`."""
        return replace(self, seed=_other_seed(self.seed, attempt))


@dataclass(frozen=True, eq=False)
class Weighted:
    """Each clip by its weight, with replacement, evenly over the epoch: systematic sampling.

    An epoch, as many positions as there are clips, draws once from each of as many equal parts of the
    sum of the weights, in an order of its own. So a clip with the share p of the sum comes at least
    floor(clips * p) - 1 and at most ceil(clips * p) + 1 times an epoch; drawn independently, it would
    stray by the square root of that.

    Attributes:
        cumulative: the sums of the weights up to and with each clip: float64 `[clips]`.
    """

    cumulative: NDArray[np.float64]
    seed: int

    @classmethod
    def of(cls, weights: ArrayLike, seed: int) -> Weighted:
        """From one weight for each clip, 0 or more: `[clips]`. They need not sum to 1.

        Raises:
            ConfigError: a weight is negative or not finite, or none is above zero.
        """
        values = np.asarray(weights, np.float64)
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            found = f"{values[wrong[0]]} for clip {wrong[0]}, one of {len(wrong)}"
            raise ConfigError(f"weights: {found}; allowed are finite numbers, 0 or more")
        cumulative = np.cumsum(values)
        if not 0 < cumulative[-1] < np.inf:
            raise ConfigError(f"weights: they sum to {cumulative[-1]:g}; allowed is a finite sum above 0")
        return cls(cumulative, seed)

    @property
    def clips(self) -> int:
        """Positions in an epoch: how many clips the set has."""
        return len(self.cumulative)

    def rows(self, positions: Rows) -> Rows:
        """See `Sampler`."""
        epochs, places = np.divmod(positions, self.clips)
        strata = permuted(key(self.seed, _STRATA, epochs), places, self.clips)
        within = uniform(key(self.seed, _DRAW, positions))
        total = self.cumulative[-1]
        # Rounded up, the last draw could be the total itself, at which no clip's part begins.
        draws = np.minimum((strata + within) * (total / self.clips), np.nextafter(total, 0))
        return np.searchsorted(self.cumulative, draws, side="right").astype(np.int64)

    def other(self, attempt: int) -> Weighted:
        """See `Sampler`."""
        return replace(self, seed=_other_seed(self.seed, attempt))


@dataclass(frozen=True, eq=False)
class Mixed:
    """Several sets by weight, each in its own sampler's order.

    A period of `SLOTS` positions gives each part its share of them, in an order of the period's own; the
    j-th that falls to a part is position j of its sampler.

    Attributes:
        parts: one sampler for each part.
        rows_of: what each part calls 0, 1, 2 ... in the whole: int64 `[rows of the part]`, or, where its rows
            follow each other, the first of them.
        slots: positions in a period that are each part's: int64 `[parts]`; they sum to `SLOTS`.
    """

    parts: tuple[Sampler, ...]
    rows_of: tuple[Rows | int, ...]
    slots: Rows
    seed: int

    @classmethod
    def of(
        cls, parts: Sequence[Sampler], rows_of: Sequence[Rows | int], weights: Sequence[float], seed: int
    ) -> Mixed:
        """From one weight for each part; they need not sum to 1, and are rounded to thousandths by largest remainder.

        Raises:
            ConfigError: a weight is not a finite number above zero, or too small for one position in `SLOTS`.
        """
        given = np.asarray(weights, np.float64)
        if not (np.isfinite(given) & (given > 0)).all():
            raise ConfigError(f"--set-weights {list(weights)}: allowed are finite numbers above 0")
        shares = SLOTS * given / given.sum()
        slots = np.floor(shares).astype(np.int64)
        slots[np.argsort(slots - shares, kind="stable")[: SLOTS - slots.sum()]] += 1
        if not slots.all():
            least = weights[int(slots.argmin())]
            raise ConfigError(
                f"--set-weights: {least} is no clip in {SLOTS}: leave that set out, or give it more"
            )
        return cls(tuple(parts), tuple(rows_of), slots, seed)

    @property
    def clips(self) -> int:
        """Positions in an epoch: how many clips the parts have."""
        return sum(part.clips for part in self.parts)

    def rows(self, positions: Rows) -> Rows:
        """See `Sampler`. Works each period out as a whole: positions that lie together cost the least."""
        periods, places = np.divmod(positions, SLOTS)
        distinct, which = np.unique(periods, return_inverse=True)
        order = permuted(key(self.seed, _SETS, distinct)[:, None], np.arange(SLOTS), SLOTS)
        owners = np.searchsorted(np.cumsum(self.slots), order, side="right")  # [periods, SLOTS]
        rows = np.empty(len(positions), np.int64)
        for k, (part, own) in enumerate(zip(self.parts, self.rows_of, strict=True)):
            here = owners[which, places] == k
            before = np.cumsum(owners == k, axis=1)[which[here], places[here]] - 1
            drawn = part.rows(periods[here] * self.slots[k] + before)
            rows[here] = own[drawn] if isinstance(own, np.ndarray) else drawn + own
        return rows

    def other(self, attempt: int) -> Mixed:
        """The same schedule with other draws: a substitute comes from the set that it stands in for."""
        return replace(self, parts=tuple(part.other(attempt) for part in self.parts))


def inverse_frequency(label_ids: Ids, offsets: Ids) -> NDArray[np.float64]:
    """AST's weights for `Weighted` (Gong et al. 2021): for each clip the sum over its labels of 1 / the label's clips.

    Arguments as in `Balanced.of`; float64 `[clips]`, 0 for a clip without labels.
    """
    labels, owners = _entries(label_ids, offsets)
    rarity = 1 / np.maximum(np.bincount(labels), 1)
    return np.bincount(owners, weights=rarity[labels], minlength=len(offsets) - 1).astype(np.float64)


def rank_positions(step: int, batch_size: int, rank: int, ranks: int) -> Rows:
    """The positions of one rank in one step: int64 `[batch_size / ranks]`.

    `batch_size` counts the clips of all ranks together, so their order is the same for any number of ranks.

    Raises:
        ConfigError: there is no such rank, or the ranks cannot share the batch evenly.
    """
    if not 0 <= rank < ranks:
        raise ConfigError(f"rank {rank} of {ranks}: allowed is 0 to {ranks - 1}")
    if batch_size % ranks:
        raise ConfigError(
            f"--batch-size {batch_size} cannot be shared by {ranks} ranks: give a multiple of {ranks}"
        )
    return np.arange(step * batch_size + rank, (step + 1) * batch_size, ranks, dtype=np.int64)


def crop_places(seed: int, positions: Rows) -> NDArray[np.float64]:
    """Where in the room that it has the crop of the clip at each position begins: float64 `[k]`, 0 to below 1."""
    return uniform(key(seed, _CROP, positions))


def crop_starts(seed: int, positions: Rows, samples: Rows, crop: int) -> Rows:
    """Where the crop of `crop` samples begins in the clip at each position: int64 `[k]`, uniform over all places.

    `samples`, `[k]`, is how long the clips are; a shorter one begins at 0.
    """
    rooms = np.maximum(samples - crop, 0) + 1
    return (crop_places(seed, positions) * rooms).astype(np.int64)


def draws(seed: int, positions: Rows, count: int) -> NDArray[np.float64]:
    """Uniform numbers for the augmentation of the clip at each position: float64 `[k, count]`, 0 to below 1."""
    return uniform(key(seed, _AUGMENT, positions[:, None], np.arange(count)))


def step_seed(seed: int, step: int) -> int:
    """Seed of what else is random in one step, dropout: 0 to 2**63 - 1."""
    words = np.random.SeedSequence([_NOISE, seed, step]).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def _entries(label_ids: Ids, offsets: Ids) -> tuple[Ids, NDArray[np.int32]]:
    """The labels of all clips, and the clip that each belongs to: both `[entries]`."""
    clips = np.arange(len(offsets) - 1, dtype=np.int32)
    return label_ids[offsets[0] : offsets[-1]], np.repeat(clips, np.diff(offsets))


def _other_seed(seed: int, attempt: int) -> int:
    return int(key(seed, _OTHER, attempt)[0])
