"""The sampler: every clip once an epoch, and any step from its number alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmill.train.sampler import epoch_permutation, rows_at, step_rows, step_seed

seeds = st.integers(0, 2**31)


@given(seeds, st.integers(0, 1000), st.integers(1, 500))
def test_an_epoch_holds_every_clip_once(seed, epoch, n):
    order = epoch_permutation(seed, epoch, n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


@settings(deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 50), st.integers(1, 12))
def test_a_run_resumed_at_any_step_sees_what_an_undisturbed_one_sees(seed, batch_size, n, steps):
    undisturbed = rows_at(seed, np.arange(steps * batch_size), n).reshape(steps, batch_size)
    for start in range(steps):
        epoch_permutation.cache_clear()  # a new process remembers nothing
        resumed = [step_rows(seed, step, batch_size, n) for step in range(start, steps)]
        np.testing.assert_array_equal(resumed, undisturbed[start:])


@given(seeds, st.integers(1, 30), st.integers(1, 60))
def test_epochs_follow_each_other_without_a_gap_whatever_the_batch(seed, n, batch_size):
    steps = -(-3 * n // batch_size)
    seen = np.concatenate([step_rows(seed, step, batch_size, n) for step in range(steps)])
    for epoch in range(3):
        np.testing.assert_array_equal(seen[epoch * n : (epoch + 1) * n], epoch_permutation(seed, epoch, n))


@given(seeds, st.lists(st.integers(0, 10_000), min_size=1, max_size=40), st.integers(1, 60))
def test_a_position_does_not_depend_on_what_is_asked_with_it(seed, positions, n):
    together = rows_at(seed, np.array(positions), n)
    alone = [int(rows_at(seed, np.array([position]), n)[0]) for position in positions]
    assert together.tolist() == alone


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {epoch_permutation(seed, epoch, 100).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_the_same_in_every_release():
    """Changing it would make every interrupted run go on with other clips."""
    assert epoch_permutation(0, 0, 10).tolist() == [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
    assert step_seed(0, 0) == 3717377837946358015


def test_every_step_has_a_seed_of_its_own_that_torch_takes():
    found = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(found) == 4000
    assert all(0 <= seed < 2**63 for seed in found)


def test_two_million_clips_are_ordered_within_their_memory():
    order = epoch_permutation(1, 0, 2_084_320)
    assert order.nbytes < 17e6
    assert int(order.sum()) == 2_084_320 * 2_084_319 // 2
