"""The tokens of one scope: when each returns."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.token_bucket import TokenBucket, local_bucket, refresh_gap


def test_a_bucket_tells_when_its_tokens_return() -> None:
    """Free ones now, those on the wire after a period, and of a lowered limit the last ones."""
    bucket = TokenBucket(3)
    bucket.take(0.0)
    bucket.return_at(60.0)
    bucket.take(1.0)
    assert bucket.returns(2.0, 60.0) == [2.0, 60.0, 62.0]
    bucket.limit = 1
    assert (bucket.available(2.0), bucket.returns(2.0, 60.0)) == (0, [62.0])


def test_refreshes_are_spaced_by_the_tokens_that_return() -> None:
    """Evenly over a period if none are out.

    After a burst more slowly; of many tokens a sample is used.
    """
    bucket = TokenBucket(300)
    assert refresh_gap(bucket, 0.0, 60.0, 30) == pytest.approx(60 / 270)
    for _ in range(270):
        bucket.take(0.0)
        bucket.return_at(60.0)
    assert refresh_gap(bucket, 0.0, 60.0, 30) == pytest.approx(60.0)


def bucket_with(limit: int, *, on_wire: int = 0, returning: tuple[float, ...] = ()) -> TokenBucket:
    """A bucket with tokens of requests on the wire, and of ended ones with the time of return."""
    bucket = TokenBucket(limit)
    for _ in range(on_wire + len(returning)):
        bucket.take(0.0)
    for when in returning:
        bucket.return_at(when)
    return bucket


@pytest.mark.parametrize(
    ("now", "kept", "room", "at"),
    [
        (0.0, 0, 1, 60.0),
        (0.0, 1, 0, 60.0),
        (0.0, 2, -1, 70.0),
        (0.0, 3, -2, 80.0),
        (0.0, 4, -3, None),
        (60.0, 0, 2, 70.0),
        (70.0, 2, 1, 80.0),
        (79.9, 3, 0, 80.0),
        (80.0, 0, 4, None),
        (99.0, 4, 0, None),
    ],
)
def test_room_is_without_the_tokens_that_are_out_or_kept(
    now: float, kept: int, room: int, at: float | None
) -> None:
    """One token of five is on the wire, and three return at 60, 70 and 80 s.

    A token returns at its very moment. None: a request on the wire has to end first.
    """
    bucket = bucket_with(5, on_wire=1, returning=(70.0, 60.0, 80.0))
    assert bucket.room(now, kept) == room
    bucket = bucket_with(5, on_wire=1, returning=(70.0, 60.0, 80.0))
    assert bucket.room_at(now, kept) == at


def test_available_tokens_are_never_below_zero() -> None:
    """After the limit was lowered there may be fewer than none."""
    bucket = bucket_with(3, on_wire=2)
    assert bucket.available(0.0) == 1
    bucket.limit = 1
    assert (bucket.room(0.0, 0), bucket.available(0.0)) == (-1, 0)


def test_a_bucket_is_whole_when_all_its_tokens_are_back() -> None:
    """As of the last look; a token that is put back is back at once."""
    bucket = TokenBucket(1)
    assert bucket.is_whole
    bucket.take(0.0)
    assert (bucket.is_whole, bucket.on_wire) == (False, 1)
    bucket.return_at(60.0)
    assert (bucket.is_whole, bucket.on_wire) == (False, 0)
    assert bucket.room(60.0, 0) == 1
    assert bucket.is_whole
    bucket.take(60.0)
    bucket.put_back()
    assert (bucket.is_whole, bucket.on_wire, bucket.room(60.0, 0)) == (True, 0, 1)


def test_a_mark_tells_how_many_requests_of_this_client_a_count_may_have() -> None:
    """Its own, all whose tokens were out when it started, and all that have started since."""
    bucket = bucket_with(9, on_wire=1, returning=(60.0, 70.0))
    assert bucket.room(65.0, 0) == 7
    mark = bucket.take(65.0)
    assert bucket.own(mark) == 3
    bucket.take(66.0)
    bucket.take(67.0)
    assert bucket.own(mark) == 5
    bucket.put_back()
    assert bucket.own(mark) == 4
    bucket.return_at(130.0)
    assert bucket.own(mark) == 4


@pytest.mark.parametrize(
    ("since", "until", "count"),
    [(0, 100, 3), (60, 60, 1), (60, 80, 3), (60.1, 79.9, 1), (81, 99, 0), (70, 70, 1)],
)
def test_tokens_that_return_in_a_span_are_counted(since: float, until: float, count: int) -> None:
    """Both ends included; without those on the wire."""
    bucket = bucket_with(5, on_wire=1, returning=(70.0, 60.0, 80.0))
    assert bucket.returning(since, until) == count


def test_a_bucket_counted_in_this_process_shares_nothing() -> None:
    """It has nothing to settle, and calls that wait need no more than time."""
    bucket = local_bucket("a", 7, lambda whose: None)
    bucket.want(3, 0)
    assert (bucket.limit, bucket.on_wire, bucket.available(0.0)) == (7, 0, 7)
    assert (bucket.is_shared, bucket.is_degraded, bucket.is_settling) == (False, False, False)
    assert bucket.next_refresh == 0.0


@pytest.mark.parametrize(
    ("kept", "gap"),
    [(2, 60 / 7), (5, 60 / 4), (6, 20 / 1), (7, 20 / 1), (8, 60 / 2), (10, 60), (12, 60)],
)
def test_refreshes_leave_a_token_for_each_until_the_next_returns(kept: int, gap: float) -> None:
    """Six of ten tokens are free; two more return in 20 and 40 s, and two after a period.

    With two kept, seven refreshes can start until the first of the last two is back. With many
    kept, the gap is that of the tokens that are not.
    """
    bucket = bucket_with(10, on_wire=2, returning=(25.0, 45.0))
    assert refresh_gap(bucket, 5.0, 60.0, kept) == pytest.approx(gap)


@pytest.mark.parametrize(("limit", "gap"), [(99, 100 / 2), (100, 100 / 3), (200, 100 / 4)])
def test_the_gap_between_refreshes_is_computed_from_a_hundred_returns(
    limit: int, gap: float
) -> None:
    """Every second of a hundred returns and more, every third of two hundred; with the first."""
    bucket = bucket_with(limit, returning=(1.0, *[100.0] * (limit - 1)))
    assert refresh_gap(bucket, 0.0, 60.0, 0) == pytest.approx(gap)


def test_a_first_token_that_returns_late_spaces_refreshes() -> None:
    """None is free until then."""
    bucket = bucket_with(100, returning=(40.0,) * 100)
    assert refresh_gap(bucket, 0.0, 60.0, 0) == 40.0
