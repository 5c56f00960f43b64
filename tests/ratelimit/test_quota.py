"""Estimates from the tokens that a bucket can still give."""

from __future__ import annotations

from typing import Any

import pytest

from crustcredits import ConfigurationError
from crustcredits._ratelimit.quota import Quota


def test_each_token_can_be_used_again_a_period_after_its_return() -> None:
    """Three tokens, which return at 0, 10 and 20 s, are enough for any number of calls."""
    quota = Quota(limit=3, free=1, returns=(0.0, 10.0, 20.0), period=60.0)
    starts = [quota.seconds_for(count) for count in (1, 2, 3, 4, 5, 6, 7)]
    assert starts == [0, 10, 20, 60, 70, 80, 120]


def test_a_quota_made_by_hand_has_no_more_than_its_tokens() -> None:
    """All that are not free return after a period of 60 s."""
    quota = Quota(limit=3, free=1)
    assert (quota.in_flight, quota.waiting, quota.refreshing) == (0, 0, 0)
    assert (quota.cooldown, quota.probing, quota.degraded) == (None, False, False)
    assert [quota.seconds_for(count) for count in (1, 2, 3, 4, 5)] == [0, 60, 60, 60, 120]
    assert repr(quota) == (
        "Quota(limit=3, free=1, in_flight=0, waiting=0, refreshing=0, cooldown=None, "
        "probing=False, degraded=False, cut_off=False)"
    )


@pytest.mark.parametrize("requests", [-1, 1.0, True, None])
def test_only_a_whole_number_of_requests_has_an_estimate(requests: Any) -> None:
    """Of at least 0."""
    with pytest.raises(ConfigurationError) as raised:
        Quota(limit=3, free=1).seconds_for(requests)
    assert str(raised.value) == f"requests must be a whole number of at least 0, not {requests!r}"


def test_no_calls_take_no_time() -> None:
    """Not even with a cooldown, single calls or another flow ahead."""
    quota = Quota(limit=1, free=0, cooldown=9.0, singles=5, lengths=(5,))
    assert (quota.seconds_for(0), quota.start_of(0)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("lengths", "singles", "seconds"),
    [((), 0, 3), ((2,), 0, 5), ((9,), 0, 7), ((9, 2), 0, 9), ((9, 2), 4, 13), ((), 4, 7)],
)
def test_each_other_flow_takes_as_many_turns_until_it_ends(
    lengths: tuple[int, ...], singles: int, seconds: float
) -> None:
    """Before the last of four calls, with a token each second. Single calls come first."""
    quota = Quota(limit=1, free=1, period=1.0, returns=(0.0,), lengths=lengths, singles=singles)
    assert quota.seconds_for(4) == seconds


@pytest.mark.parametrize(
    ("pace", "count", "seconds"),
    [
        (100.0, 5, 0.0),
        (100.0, 6, 0.01),
        (4.0, 4, 0.0),
        (4.0, 5, 0.25),
        (1.0, 1, 0.0),
        (0.5, 1, 0.0),
        (0.5, 2, 2.0),
        (None, 300, 0.0),
    ],
)
def test_a_quota_starts_calls_after_a_burst_at_the_pace(
    pace: float | None, count: int, seconds: float
) -> None:
    """Of five at the most, and of one at least."""
    assert Quota(limit=300, free=300, pace=pace).start_of(count) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("count", "answer_seconds", "seconds"),
    [(10, 0.2, 0.0), (11, 0.2, 0.02), (30, 0.2, 0.4), (30, 9.0, 0.8)],
)
def test_calls_beyond_the_slots_start_as_answers_come(
    count: int, answer_seconds: float, seconds: float
) -> None:
    """A request holds its slot for 0.4 s at the most."""
    quota = Quota(limit=300, free=300, slots=10, answer_seconds=answer_seconds)
    assert quota.start_of(count) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("free", "others", "count", "seconds"),
    [
        (10, 200, 10, 0.0),
        (10, 200, 11, 0.6),
        (0, 0, 10, 0.0),
        (0, 1, 299, 60.0),
        (0, 300, 2, 120.0),
        (0, 400, 2, 120.0),
    ],
)
def test_calls_beyond_the_free_tokens_start_at_the_rate_that_others_leave(
    free: int, others: int, count: int, seconds: float
) -> None:
    """One in a period at least. Here all tokens have returned, and other clients spend."""
    quota = Quota(limit=300, free=free, others=others, returns=(0.0,) * 300, slots=300)
    assert quota.start_of(count) == pytest.approx(seconds)


def test_the_slowest_of_all_bounds_decides() -> None:
    """Here the cooldown, and for three calls the tokens."""
    quota = Quota(limit=2, free=2, cooldown=20.0, pace=1.0, others=1, returns=(0.0, 0.0))
    assert [quota.start_of(count) for count in (1, 2, 3)] == [20.0, 20.0, 60.0]


def test_the_keys_of_a_check_leave_the_reserve() -> None:
    """A reserved token is no token for them, whether it is free or returns."""
    quota = Quota(limit=4, free=3, kept=2, returns=(0.0, 0.0, 0.0, 9.0))
    assert [quota.seconds_for(count) for count in (1, 2, 3, 4)] == [0.0, 9.0, 60.0, 69.0]
    spent = Quota(limit=4, free=4, kept=2, others=2, returns=(0.0,) * 4)
    assert [spent.seconds_for(count) for count in (2, 3)] == [0.0, 60.0]
