"""The samplers: each a law of its own, and every position from (seed, position) alone."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from clipmill.errors import ConfigError
from clipmill.loader.orders import key, permuted
from clipmill.loader.sampler import (
    SLOTS,
    Balanced,
    Mixed,
    Sampler,
    Sequential,
    Shuffled,
    Weighted,
    crop_starts,
    inverse_frequency,
    rank_positions,
    step_seed,
)

GOLDEN = 0x9E3779B97F4A7C15
seeds = st.integers(0, 2**63)
label_lists = st.lists(st.lists(st.integers(0, 6), max_size=4, unique=True), min_size=1, max_size=30)
labelled = label_lists.filter(any)


def csr(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Label lists as `label_ids` and `offsets`."""
    ids = np.array([label for labels in lists for label in labels], np.int32)
    return ids, np.cumsum([0, *map(len, lists)])


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    """One of each kind, and mixtures of two."""
    seed, lists = draw(seeds), draw(labelled)
    one_of_each = [
        Sequential(len(lists), first=draw(st.integers(0, 50))),
        Shuffled(len(lists), seed),
        Balanced.of(*csr(lists), seed),
        Weighted.of(inverse_frequency(*csr(lists)), seed),
    ]
    first, second = draw(st.permutations(one_of_each))[:2]
    return draw(st.sampled_from([first, Mixed.of([first, second], [0, len(lists)], [2, 1], seed)]))


def first_rows(sampler: Sampler, count: int) -> list[int]:
    return sampler.rows(np.arange(count)).tolist()


# What every sampler holds.


@settings(deadline=None)
@given(samplers(), st.lists(st.integers(0, 10**9), min_size=1, max_size=5))
def test_a_position_does_not_depend_on_what_is_asked_with_it(sampler, positions):
    together = sampler.rows(np.array(positions))
    assert together.dtype == np.int64
    assert together.tolist() == [int(sampler.rows(np.array([position]))[0]) for position in positions]


@settings(deadline=None, max_examples=40)
@given(samplers(), st.integers(1, 40), st.integers(1, 6))
def test_a_run_resumed_at_any_step_sees_what_an_undisturbed_one_sees(sampler, batch_size, steps):
    undisturbed = sampler.rows(np.arange(steps * batch_size)).reshape(steps, batch_size)
    for start in range(steps):
        resumed = [sampler.rows(rank_positions(step, batch_size, 0, 1)) for step in range(start, steps)]
        np.testing.assert_array_equal(resumed, undisturbed[start:])


@settings(deadline=None)
@given(samplers(), st.sampled_from([1, 2, 4]), st.integers(1, 10), st.integers(0, 1000))
def test_any_number_of_ranks_shares_one_global_order_evenly(sampler, ranks, each, step):
    whole = sampler.rows(rank_positions(step, each * ranks, 0, 1))
    parts = [sampler.rows(rank_positions(step, each * ranks, rank, ranks)) for rank in range(ranks)]
    assert [len(part) for part in parts] == [each] * ranks
    np.testing.assert_array_equal(np.stack(parts, axis=1).ravel(), whole)


@settings(deadline=None, max_examples=40)
@given(samplers(), st.integers(0, 5))
def test_substitutes_are_clips_of_the_same_set_and_the_same_every_time(sampler, attempt):
    allowed = set(first_rows(sampler, 20 * SLOTS))
    substitutes = first_rows(sampler.other(attempt), 50)
    assert substitutes == first_rows(sampler.other(attempt), 50)
    assert set(substitutes) <= allowed


def test_substitutes_stand_in_an_order_of_each_attempts_own():
    for sampler in (
        Sequential(100),
        Shuffled(100, 0),
        Balanced.of(np.arange(100), np.arange(101), 0),
        Weighted.of(np.ones(100), 0),
        Mixed.of([Shuffled(100, 0)], [0], [1], 0),
    ):
        orders = {tuple(first_rows(one, 50)) for one in (sampler, *map(sampler.other, range(1, 5)))}
        assert len(orders) == 5, sampler


def test_a_batch_that_ranks_cannot_share_names_the_flag():
    with pytest.raises(ConfigError, match="a multiple of 4"):
        rank_positions(0, 33, 0, 4)


# Orders.


@settings(deadline=None)
@given(st.lists(seeds, min_size=1, max_size=4), st.integers(1, 300))
def test_every_key_gives_a_permutation(keys, n):
    orders = permuted(np.array(keys, np.uint64)[:, None], np.arange(n), n)
    assert orders.dtype == np.int64
    np.testing.assert_array_equal(np.sort(orders), np.tile(np.arange(n), (len(keys), 1)))


@settings(deadline=None)
@given(seeds, st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_place_may_have_a_length_of_its_own(seed, lengths):
    keys, n = np.repeat(key(seed, np.arange(len(lengths))), lengths), np.repeat(lengths, lengths)
    places = np.concatenate([np.arange(length) for length in lengths])
    alone = [permuted(key(seed, i), np.arange(length), length) for i, length in enumerate(lengths)]
    np.testing.assert_array_equal(permuted(keys, places, n), np.concatenate(alone))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_are_equally_likely(n):
    orders = permuted(key(0, np.arange(100_000))[:, None], np.arange(n), n)
    counts = Counter(map(tuple, orders.tolist()))
    assert_uniform(np.array(list(counts.values())), math.factorial(n))


def test_a_thousand_clips_stand_anywhere_and_beside_anyone():
    n, keys = 1000, 1000
    orders = permuted(key(1, np.arange(keys))[:, None], np.arange(n), n)
    place_and_value = np.broadcast_to(np.arange(n) // 50 * 20, orders.shape) + orders // 50
    assert_uniform(np.bincount(place_and_value.ravel()), 400)
    assert_uniform(np.bincount(np.diff(orders).ravel() % n)[1:], n - 1)
    assert_uniform(np.bincount((orders[:, ::2] // 50 * 20 + orders[:, 1::2] // 50).ravel()), 400)
    assert abs((orders == np.arange(n)).sum() / keys - 1) < 4 / math.sqrt(keys)  # one fixed point in the mean


def test_a_million_clips_stand_anywhere():
    n = 2_084_320
    places = np.arange(0, n, 16)
    order = permuted(key(2), places, n)
    assert len(set(order.tolist())) == len(places)
    assert_uniform(np.bincount(places * 50 // n * 50 + order * 50 // n), 2500)
    assert_uniform(np.bincount(np.diff(order) % n * 500 // n), 500)


def assert_uniform(counts: np.ndarray, kinds: int) -> None:
    """Chi-square over equally likely kinds. The seeds are fixed, so it holds or does not."""
    assert len(counts) == kinds
    assert chisquare(counts).pvalue > 1e-4


def test_streams_of_different_seeds_counts_and_uses_do_not_meet():
    numbers = np.arange(40)
    found = np.concatenate([key(seed, use, numbers) for seed in range(40) for use in range(40)])
    assert len(np.unique(found)) == 40**3


# Sequential and shuffled.


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 900))
def test_sequential_goes_round_and_its_substitutes_lie_far_from_it_and_from_each_other(clips, position):
    positions = np.array([position])
    found = [int(Sequential(clips).other(attempt).rows(positions)[0]) for attempt in range(9)]
    assert found[0] == position % clips
    # What cuts a shard short takes the clips behind it too.
    around = np.sort(found)
    gaps = np.diff(np.append(around, around[0] + clips))
    assert gaps.min() >= clips // 20


@settings(deadline=None)
@given(seeds, st.integers(1, 200))
def test_an_epoch_holds_every_clip_once_and_the_next_follows_without_a_gap(seed, clips):
    epochs = Shuffled(clips, seed).rows(np.arange(3 * clips)).reshape(3, clips)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(clips), (3, 1)))


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        Shuffled(100, seed).rows(np.arange(100) + 100 * epoch).tobytes()
        for seed in (0, 1, 2, 2**32, 2**63)
        for epoch in range(5)
    }
    assert len(orders) == 25


# Balanced.


@settings(deadline=None)
@given(labelled, seeds)
def test_a_round_holds_each_class_once_and_a_class_each_of_its_clips_before_any_again(lists, seed):
    clips_of = {c: [k for k, labels in enumerate(lists) if c in labels] for labels in lists for c in labels}
    sampler = Balanced.of(*csr(lists), seed)
    passes = 2 * max(map(len, clips_of.values()))
    classes = permuted_classes(sampler, passes)
    rows = sampler.rows(np.arange(classes.size)).reshape(classes.shape)
    assert sampler.clips == len(lists)
    for number, label in enumerate(sorted(clips_of)):
        assert ((classes == number).sum(axis=1) == 1).all()
        drawn, own = rows[classes == number].tolist(), clips_of[label]
        for begin in range(0, len(drawn) - len(own) + 1, len(own)):
            assert sorted(drawn[begin : begin + len(own)]) == own


def permuted_classes(sampler: Balanced, rounds: int) -> np.ndarray:
    """Which class each position of the first rounds draws, by a set that has the same classes with one clip each."""
    count = len(sampler.ends)
    one_each = Balanced.of(np.arange(count), np.arange(count + 1), sampler.seed)
    return one_each.rows(np.arange(rounds * count)).reshape(rounds, count)


def test_a_rare_class_is_drawn_as_often_as_a_common_one():
    rare, common = [[0]] * 3, [[1]] * 997
    rows = first_rows(Balanced.of(*csr(rare + common), seed=0), 1000)
    counts = Counter(row for row in rows if row < 3)
    assert counts.total() == 500
    assert sorted(counts.values()) == [166, 167, 167]
    assert len({row for row in rows if row >= 3}) == 500


def test_the_order_of_classes_and_of_each_classs_clips_changes_from_round_to_round():
    sampler = Balanced.of(*csr([[k % 5] for k in range(50)]), seed=0)
    rows = sampler.rows(np.arange(5 * 40)).reshape(40, 5)
    assert len({tuple(classes) for classes in (rows % 5).tolist()}) > 25
    passes = {tuple(rows[rows % 5 == c].reshape(4, 10)[i].tolist()) for c in range(5) for i in range(4)}
    assert len(passes) == 20
    assert len({tuple(k // 5 for k in order) for order in passes}) == 20  # nor do classes share an order


def test_clips_without_labels_never_come_and_labels_without_clips_take_no_turn():
    assert set(first_rows(Balanced.of(*csr([[], [9], [], [4, 9], []]), seed=0), 60)) == {1, 3}
    with pytest.raises(ConfigError, match="none of the 2 clips has a label"):
        Balanced.of(*csr([[], []]), seed=0)


def test_label_lists_may_be_a_slice_of_longer_ones():
    ids, offsets = csr([[1, 2], [2], [7], [5, 1], []])
    assert first_rows(Balanced.of(ids, offsets[1:4], seed=3), 50) == first_rows(
        Balanced.of(*csr([[2], [7]]), seed=3), 50
    )
    np.testing.assert_array_equal(inverse_frequency(ids, offsets[1:4]), [1, 1])


def test_classes_may_be_more_than_16_bits_can_count():
    rows = first_rows(Balanced.of(*csr([[2], [2], [2**16 + 1]]), seed=0), 100)
    assert rows.count(2) == 50


# Weighted.


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60).filter(lambda w: sum(w) > 0), seeds)
def test_a_clip_comes_as_often_in_an_epoch_as_its_weight_says(weights, seed):
    clips = len(weights)
    epochs = Weighted.of(weights, seed).rows(np.arange(3 * clips)).reshape(3, clips)
    wanted = clips * np.array(weights) / math.fsum(weights)
    for epoch in epochs:
        found = np.bincount(epoch, minlength=clips)
        assert (found >= np.floor(wanted - 1e-9) - 1).all()
        assert (found <= np.ceil(wanted + 1e-9) + 1).all()
        assert not found[np.array(weights) == 0].any()


def test_equal_weights_give_each_clip_once_an_epoch_in_an_order_of_the_epochs_own():
    epochs = Weighted.of(np.ones(500), seed=0).rows(np.arange(1000)).reshape(2, 500)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(500), (2, 1)))
    assert (epochs[0] != epochs[1]).any()
    assert (np.diff(epochs) < 0).any(axis=1).all()


def test_over_many_epochs_each_clip_comes_in_proportion():
    weights = np.array([0.5, 1, 3, 0, 8.25, 0.01])
    counts = np.bincount(first_rows(Weighted.of(weights, seed=0), 20_000 * 6), minlength=6)
    np.testing.assert_allclose(counts / counts.sum(), weights / weights.sum(), atol=0.002)


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ([1, -1, 2], "-1.0 for clip 1, one of 1; allowed"),
        ([1, 2, math.nan], "nan for clip 2"),
        ([math.inf, 1], "inf for clip 0"),
        ([0, 0], "sum to 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, found):
    with pytest.raises(ConfigError, match=found):
        Weighted.of(weights, seed=0)


@settings(deadline=None)
@given(label_lists)
def test_inverse_frequency_is_the_sum_of_each_labels_rarity(lists):
    counts = Counter(label for labels in lists for label in labels)
    expected = [sum(1 / counts[label] for label in labels) for labels in lists]
    np.testing.assert_allclose(inverse_frequency(*csr(lists)), expected)


# Mixed.


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=4), seeds, st.integers(0, 10**6))
def test_every_period_holds_each_set_in_its_share_and_each_set_in_its_own_order(weights, seed, period):
    parts = [Shuffled(10 * k + 7, seed + k) for k in range(len(weights))]
    sampler = Mixed.of(parts, [100 * k for k in range(len(weights))], weights, seed)
    rows = sampler.rows(np.arange(2 * SLOTS) + period * SLOTS)
    for k, part in enumerate(parts):
        own = rows[rows // 100 == k] - 100 * k
        slots = (rows[:SLOTS] // 100 == k).sum()
        assert abs(slots - SLOTS * weights[k] / sum(weights)) < 1
        np.testing.assert_array_equal(own, part.rows(period * slots + np.arange(2 * slots)))


def test_sets_alternate_within_a_period_and_not_in_every_period_alike():
    rows = Mixed.of([Sequential(1), Sequential(1)], [0, 1], [1, 1], seed=0).rows(np.arange(5 * SLOTS))
    assert np.abs(np.cumsum(2 * rows - 1)).max() < 100
    assert len({period.tobytes() for period in rows.reshape(5, SLOTS)}) == 5


def test_the_rows_of_a_set_may_lie_anywhere_in_the_whole():
    apart = [np.array([8, 2, 6]), 3]
    sampler = Mixed.of([Sequential(3), Sequential(2)], apart, [0.5, 0.5], seed=0)
    rows = sampler.rows(np.arange(SLOTS))
    assert sampler.clips == 5
    assert [row for row in rows if row in (8, 2, 6)][:6] == [8, 2, 6, 8, 2, 6]
    assert [row for row in rows if row in (3, 4)][:4] == [3, 4, 3, 4]


def test_a_substitute_comes_from_the_set_that_it_stands_in_for():
    sampler = Mixed.of([Shuffled(10, 0), Shuffled(10, 1)], [0, 10], [3, 1], seed=0)
    assert ((sampler.rows(np.arange(500)) < 10) == (sampler.other(1).rows(np.arange(500)) < 10)).all()


@pytest.mark.parametrize(
    ("weights", "found"),
    [([1, 1e-5], "--set-weights: 1e-05 is no clip in 1000"), ([1, 0], "above 0"), ([1, math.nan], "nan")],
)
def test_a_set_that_would_never_come_is_refused(weights, found):
    with pytest.raises(ConfigError, match=found):
        Mixed.of([Sequential(1), Sequential(1)], [0, 1], weights, seed=0)


# What must stay.


def test_the_orders_are_the_same_on_every_platform_and_in_every_release():
    """Changing them would make every interrupted run go on with other clips."""
    lists = [[0], [1], [1, 2], [2], [2, 3], [3], [2]]
    mixed = Mixed.of([Shuffled(5, 0), Sequential(3)], [0, 5], [2, 1], seed=0)
    assert first_rows(Shuffled(10, seed=0), 20) == [
        8,
        6,
        5,
        7,
        9,
        2,
        3,
        4,
        1,
        0,
        7,
        9,
        8,
        6,
        2,
        0,
        1,
        5,
        4,
        3,
    ]
    assert first_rows(Balanced.of(*csr(lists), seed=0), 16) == [
        0,
        6,
        1,
        5,
        0,
        2,
        4,
        2,
        3,
        0,
        4,
        1,
        0,
        4,
        5,
        2,
    ]
    assert first_rows(Weighted.of(inverse_frequency(*csr(lists)), 0), 14) == [
        1,
        0,
        3,
        5,
        2,
        5,
        0,
        2,
        4,
        3,
        0,
        0,
        2,
        6,
    ]
    assert first_rows(mixed, 12) == [5, 2, 4, 0, 6, 7, 3, 1, 0, 1, 4, 2]
    assert first_rows(Shuffled(10, seed=0).other(1), 10) == [3, 8, 1, 0, 5, 7, 6, 2, 4, 9]
    assert crop_starts(0, np.arange(4), np.full(4, 441_000), 352_800).tolist() == [27020, 12812, 46008, 6584]
    assert step_seed(0, 0) == 3717377837946358015


def test_keys_and_orders_are_what_python_integers_give():
    assert key(1234567).tolist() == [
        6457827717110365317
    ]  # SplitMix64's first output for this seed, as published
    positions = [0, 1, 2_084_319, 2_084_320, 10**12]
    shuffled = Shuffled(2_084_320, seed=1).rows(np.array(positions))
    for position, row in zip(positions, shuffled, strict=True):
        epoch, place = divmod(position, 2_084_320)
        use = splitmix(1) ^ 0
        assert row == swap_or_not(splitmix(splitmix(use) ^ epoch), place, 2_084_320)


def swap_or_not(state: int, x: int, n: int) -> int:
    """The shuffle as its paper writes it."""
    for _ in range(48):
        word = splitmix(state)
        state = (state + GOLDEN) % 2**64
        partner = ((word >> 32) * n // 2**32 - x) % n
        chosen = mixed(max(x, partner) ^ word)
        x = partner if chosen >> 63 else x
    return x


def splitmix(state: int) -> int:
    """The first output of SplitMix64 from this state."""
    return mixed((state + GOLDEN) % 2**64)


def mixed(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def test_a_crop_begins_anywhere_in_its_clip_and_at_0_in_a_shorter_one():
    positions, samples = np.arange(40_000), np.full(40_000, 19)
    starts = crop_starts(0, positions, samples, 10)
    assert_uniform(np.bincount(starts), 10)
    assert not np.array_equal(starts, crop_starts(1, positions, samples, 10))
    np.testing.assert_array_equal(starts[7:99:5], crop_starts(0, positions[7:99:5], samples[7:99:5], 10))
    assert crop_starts(0, positions[:3], np.array([10, 9, 0]), 10).tolist() == [0, 0, 0]


def test_every_step_has_a_seed_of_its_own_that_torch_takes():
    found = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(found) == 4000
    assert all(0 <= seed < 2**63 for seed in found)


AUDIOSET = """
import sys
import numpy as np
from clipmill.loader.sampler import Balanced, Shuffled, Weighted, inverse_frequency

def peak_mb():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

ids, offsets = np.load(sys.argv[1]), np.load(sys.argv[2])
before = peak_mb()
for sampler in (Shuffled(2_084_320, 0), Balanced.of(ids, offsets, 0), Weighted.of(inverse_frequency(ids, offsets), 0)):
    rows = sampler.rows(np.arange(10**9, 10**9 + 32))
    assert rows.shape == (32,) and 0 <= rows.min() and rows.max() < 2_084_320
    kept = sum(value.nbytes for value in vars(sampler).values() if isinstance(value, np.ndarray))
    assert kept < 40e6, kept
print(peak_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_two_million_clips_of_527_classes_need_little_memory(tmp_path):
    """The process's own peak, which getrusage would not tell: a new process begins with its parent's there."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 4, 2_084_320)
    share = 1 / np.arange(1, 528)
    classes = np.searchsorted(np.cumsum(share / share.sum()), rng.random(counts.sum()))
    np.save(tmp_path / "ids.npy", np.minimum(classes, 526).astype(np.int32))
    np.save(tmp_path / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]))
    command = [sys.executable, "-c", AUDIOSET, str(tmp_path / "ids.npy"), str(tmp_path / "offsets.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 250
