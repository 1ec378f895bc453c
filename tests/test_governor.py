"""The budget and the pauses: pure, told the time."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from clipmill.fetch.governor import LONGEST_PAUSE_S, LONGEST_RETRY_AFTER_S, Budget, Governor


def test_without_a_rate_everything_may_be_asked_now():
    budget = Budget(None)
    budget.asks(5.0)
    assert budget.wait_s(5.0) == 0


@given(st.floats(1, 100_000), st.lists(st.floats(0, 100), max_size=50))
def test_no_hour_sees_more_questions_than_the_budget(per_hour, delays):
    budget, now, asked = Budget(per_hour), 0.0, []
    for delay in delays:
        now += delay
        now += budget.wait_s(now)
        budget.asks(now)
        asked.append(now)
    spacing = 3600 / per_hour
    assert all(b - a >= spacing * (1 - 1e-9) - 1e-9 for a, b in itertools.pairwise(asked))


def test_time_that_went_by_unused_is_not_made_up_for():
    budget = Budget(3600)
    budget.asks(0)
    budget.asks(1000)
    assert budget.wait_s(1000) == 1


def test_each_pause_is_twice_the_last_up_to_an_hour():
    governor, now, waits = Governor(pause_s=60, max_pauses=8), 0.0, []
    for _ in range(8):
        now += 1
        assert governor.refused("bot-check", asked_at=now, now=now)
        waits.append(governor.wait_s(now))
        now += waits[-1]
    assert waits == [60, 120, 240, 480, 960, 1920, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert not governor.exhausted


def test_retry_after_is_honoured_where_it_is_longer_and_bounded():
    governor = Governor(pause_s=60)
    governor.refused("rate-limited", 1, 1, retry_after_s=900)
    assert governor.wait_s(1) == 900
    governor.refused("rate-limited", 1000, 1000, retry_after_s=1e9)
    assert governor.wait_s(1000) == LONGEST_RETRY_AFTER_S


def test_what_was_asked_before_the_pause_is_no_second_refusal_but_may_lengthen_it():
    governor = Governor(pause_s=60)
    assert governor.refused("bot-check", asked_at=9, now=10)
    assert not governor.refused("bot-check", asked_at=9.5, now=11)
    assert (governor.pauses, governor.wait_s(11)) == (1, 59)
    assert not governor.refused("rate-limited", asked_at=9.5, now=11, retry_after_s=500)
    assert (governor.pauses, governor.wait_s(11)) == (1, 500)


def test_it_gives_up_after_the_last_pause_and_not_before():
    governor, now = Governor(pause_s=1, max_pauses=2), 0.0
    for exhausted in (False, False, True):
        now += 100
        governor.refused("bot-check", now, now)
        assert governor.exhausted is exhausted


def test_an_answer_begins_the_count_anew_unless_it_was_asked_for_before_the_pause():
    governor = Governor()
    governor.refused("bot-check", 10, 10)
    governor.answered(asked_at=9)
    assert governor.pauses == 1
    governor.answered(asked_at=100)
    assert governor.pauses == 0


def test_failures_of_many_clips_in_a_row_pause_the_fleet():
    governor = Governor(streak=3)
    assert not governor.failed(1, "network", 1, 1)
    assert not governor.failed(1, "network", 2, 2)  # the same clip again says nothing of the others
    assert not governor.failed(2, "network", 3, 3)
    assert governor.failed(7, "timeout", 4, 4)
    assert governor.wait_s(4) == 60
    assert "3 clips in a row failed" in governor.why


def test_an_answer_in_between_ends_the_row():
    governor = Governor(streak=2)
    governor.failed(1, "network", 1, 1)
    governor.answered(2)
    assert not governor.failed(2, "network", 3, 3)
