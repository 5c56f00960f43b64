"""`BucketView`: what is known of a bucket from the last answer."""

from __future__ import annotations

import math

import pytest

from crustcredits.redis.bucket_view import GAP, BucketView
from crustcredits.redis.protocol import BucketState


def heard(
    *returns: float, out: int = 5, missing: int = 0, free: int = 0, is_short: bool = False
) -> BucketView:
    """A view of 2 own tokens, and the others until 70.0."""
    view = BucketView()
    state = BucketState(out=out, missing=missing, free=free, returns=returns)
    view.hear(state, 10.0, own=2, period=60.0, is_short=is_short)
    return view


def test_other_processes_have_the_rest_out_for_a_period() -> None:
    view = heard(out=5)
    assert [view.others_out(now) for now in (10.0, 69.9, 70.0)] == [3, 3, 0]
    assert heard(out=1).others_out(10.0) == 0


@pytest.mark.parametrize(
    ("missing", "free", "is_short", "is_in_line"),
    [(0, 0, False, False), (1, 0, False, True), (0, 1, False, True), (0, 0, True, True)],
)
def test_a_process_whose_calls_wait_is_listed_as_waiting(
    missing: int, free: int, is_short: bool, is_in_line: bool
) -> None:
    """Also where another bucket did not allow its permits."""
    assert heard(missing=missing, free=free, is_short=is_short).is_in_line == is_in_line


def test_tokens_return_at_the_times_in_the_answer() -> None:
    view = heard(1.0, 2.0)
    assert [view.has_come(now) for now in (10.9, 11.0, 12.0)] == [0, 1, 2]
    assert heard().has_come(99.0) is None


def test_calls_ask_for_the_next_token_with_those_that_follow_at_once() -> None:
    view = heard(1.0, 1.0 + GAP, 2.0)
    view.note_short(0, 10.0, otherwise=99.0)
    assert view.short_until(0) == 11.0 + GAP


def test_calls_ask_at_once_for_tokens_that_have_come() -> None:
    view = heard(1.0, 5.0)
    view.note_short(0, 11.5, otherwise=99.0)
    assert view.short_until(0) == 11.5


def test_calls_ask_again_where_no_return_is_known() -> None:
    view = heard()
    view.note_short(0, 10.0, otherwise=99.0)
    assert view.short_until(0) == 99.0


def test_a_call_that_leaves_fewer_tokens_asks_although_others_may_not() -> None:
    view = heard(1.0)
    view.note_short(3, 10.0, otherwise=99.0)
    assert [view.short_until(kept) for kept in (2, 3, 4)] == [-math.inf, 11.0, 11.0]
    view.forget_short()
    assert view.short_until(3) == -math.inf
