"""How many tokens each kind of call leaves to others, and when it may take one."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.flow import Kind
from crustcredits._ratelimit.reserve import kept_for_singles, kept_from, room, room_at
from crustcredits._ratelimit.token_bucket import TokenBucket


def bucket(limit: int, *, returns: tuple[float, ...] = (), on_wire: int = 0) -> TokenBucket:
    """A bucket with tokens that return at these times, and tokens on the wire."""
    made = TokenBucket(limit)
    for when in returns:
        made.take(0.0)
        made.return_at(when)
    for _ in range(on_wire):
        made.take(0.0)
    return made


@pytest.mark.parametrize(
    ("limit", "reserve", "kept"),
    [
        (300, 0.0, 0),
        (300, 0.1, 30),
        (10, 0.25, 3),
        (10, 0.9, 9),
        (10, 1.0, 9),
        (2, 1.0, 1),
        (1, 0.5, 0),
    ],
)
def test_the_reserve_is_rounded_up_and_leaves_one_token(
    limit: int, reserve: float, kept: int
) -> None:
    """Otherwise no check would ever end."""
    assert kept_for_singles(TokenBucket(limit), reserve) == kept


@pytest.mark.parametrize(
    ("limit", "reserve", "single", "many", "background"),
    [
        (100, 0.0, 0, 0, 10),
        (100, 0.05, 0, 5, 10),
        (100, 0.5, 0, 50, 50),
        (101, 0.0, 0, 0, 11),
        (2, 0.0, 0, 0, 1),
        (2, 1.0, 0, 1, 1),
        (1, 0.5, 0, 0, 0),
        (0, 0.0, 0, 0, 0),
    ],
)
def test_checks_leave_the_reserve_and_refreshes_at_least_a_tenth(
    limit: int, reserve: float, single: int, many: int, background: int
) -> None:
    """Single calls leave nothing. Of a single token nothing can be left."""
    tokens = TokenBucket(limit)
    assert [kept_from(kind, tokens, reserve) for kind in Kind] == [single, many, background]


@pytest.mark.parametrize(("kept", "foreground", "background"), [(0, 3, 1), (2, 1, 1), (3, 0, 0)])
def test_foreground_calls_take_all_that_is_free_and_refreshes_one_at_a_time(
    kept: int, foreground: int, background: int
) -> None:
    tokens = bucket(5, on_wire=2)
    assert room(Kind.SINGLE, tokens, kept, 0.0) == foreground
    assert room(Kind.MANY, tokens, kept, 0.0) == foreground
    assert room(Kind.BACKGROUND, tokens, kept, 0.0) == background


def test_the_next_refresh_takes_a_token_when_its_moment_has_come() -> None:
    """Foreground calls are not spaced."""
    tokens = TokenBucket(5)
    tokens.next_refresh = 7.0
    assert [room(Kind.BACKGROUND, tokens, 0, now) for now in (6.9, 7.0, 7.1)] == [0, 1, 1]
    assert [room(kind, tokens, 0, 6.9) for kind in (Kind.SINGLE, Kind.MANY)] == [5, 5]


def test_a_token_that_has_returned_is_free() -> None:
    tokens = bucket(1, returns=(60.0,))
    assert [room(Kind.MANY, tokens, 0, now) for now in (59.9, 60.0)] == [0, 1]
    tokens = bucket(1, returns=(60.0,))
    assert [room(Kind.BACKGROUND, tokens, 0, now) for now in (59.9, 60.0)] == [0, 1]


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.MANY])
def test_a_foreground_call_waits_for_the_token_beyond_those_it_leaves(kind: Kind) -> None:
    """Not for the moment of the next refresh."""
    tokens = bucket(3, returns=(10.0, 20.0, 30.0))
    tokens.next_refresh = 25.0
    assert [room_at(kind, tokens, kept, 0.0) for kept in (0, 1, 2, 3)] == [10.0, 20.0, 30.0, None]


@pytest.mark.parametrize(
    ("next_refresh", "kept", "moment"),
    [
        (0.0, 0, 10.0),
        (0.0, 1, 20.0),
        (15.0, 0, 15.0),
        (15.0, 1, 20.0),
        (0.0, 2, None),
        (15.0, 2, 15.0),
    ],
)
def test_a_refresh_waits_for_its_token_and_for_its_moment(
    next_refresh: float, kept: int, moment: float | None
) -> None:
    """The later of the two; of the token nothing is known while it is on the wire."""
    tokens = bucket(3, returns=(10.0, 20.0), on_wire=1)
    tokens.next_refresh = next_refresh
    assert room_at(Kind.BACKGROUND, tokens, kept, 5.0) == moment


@pytest.mark.parametrize(("now", "moment"), [(6.9, 7.0), (7.0, None), (7.1, None)])
def test_a_refresh_with_a_token_waits_for_its_moment_or_for_the_refresh_before_it(
    now: float, moment: float | None
) -> None:
    """At its moment another refresh was let out; its start sets the next moment."""
    tokens = bucket(3, returns=(60.0, 61.0))
    tokens.next_refresh = 7.0
    assert room_at(Kind.BACKGROUND, tokens, 0, now) == moment


def test_a_refresh_waits_for_a_token_that_returns_before_now_no_longer() -> None:
    """The token has returned, and the moment of the refresh is to come."""
    tokens = bucket(1, returns=(60.0,))
    tokens.next_refresh = 70.0
    assert room_at(Kind.BACKGROUND, tokens, 0, 60.0) == 70.0
