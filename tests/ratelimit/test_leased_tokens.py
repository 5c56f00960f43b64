"""`LeasedTokens` over a hand-written count, and which objects are a backend."""

from __future__ import annotations

import pytest

from crustcredits import ConfigurationError
from crustcredits._ratelimit.leased_tokens import (
    CountedScope,
    GateTokens,
    LeasedTokens,
    PermitGate,
    SharedTokens,
    check_backend,
)
from tests.ratelimit.leases import Tokens


def leased(tokens: SharedTokens) -> LeasedTokens:
    return LeasedTokens(tokens, lambda: None, lambda: None)


def ended(bucket: LeasedTokens, *moments: float) -> None:
    """Requests that have started at 0 and ended, with the moments at which their tokens return."""
    for when in moments:
        bucket.take(0.0)
        bucket.return_at(when)


# --- the tokens


def test_tokens_that_come_and_a_store_out_of_reach_are_reported_to_the_scheduler() -> None:
    tokens, reports = Tokens(), list[str]()
    LeasedTokens(tokens, lambda: reports.append("come"), lambda: reports.append("out of reach"))
    tokens.wake()
    tokens.fail()
    assert reports == ["come", "out of reach"]


def test_leased_tokens_are_shared_and_no_refresh_has_to_wait_at_first() -> None:
    bucket = leased(Tokens())
    assert bucket.is_shared
    assert bucket.next_refresh == 0.0


def test_the_limit_is_that_of_all_processes() -> None:
    """A new one is passed on to the store."""
    tokens = Tokens(limit=300)
    bucket = leased(tokens)
    assert bucket.limit == 300
    bucket.limit = 60
    assert (tokens.limit, bucket.limit) == (60, 60)


def test_the_state_is_that_of_the_tokens() -> None:
    tokens = Tokens()
    bucket = leased(tokens)
    assert (bucket.on_wire, bucket.is_degraded, bucket.is_settling, bucket.is_whole) == (
        0,
        False,
        False,
        False,
    )
    tokens.in_flight = 3
    assert bucket.on_wire == 3
    tokens.degraded = True
    assert (bucket.is_degraded, bucket.is_settling, bucket.is_whole) == (True, False, False)
    tokens.degraded, tokens.settling = False, True
    assert (bucket.is_degraded, bucket.is_settling, bucket.is_whole) == (False, True, False)
    tokens.settling, tokens.idle = False, True
    assert (bucket.is_degraded, bucket.is_settling, bucket.is_whole) == (False, False, True)


@pytest.mark.parametrize("kept", [0, 5])
def test_there_is_room_for_as_many_calls_as_tokens_are_leased(kept: int) -> None:
    """Redis has kept the reserve from them already. Tokens that return by now count."""
    tokens = Tokens(limit=10, free=2)
    tokens.coming = [4.0, 5.0, 6.0]
    bucket = leased(tokens)
    assert bucket.room(3.9, kept) == 2
    assert bucket.room(5.0, kept) == 4
    assert tokens.log == [("collect", 3.9), ("collect", 5.0)]


@pytest.mark.parametrize(
    ("limit", "share", "free", "kept", "room"),
    [
        (300, 100, 100, 0, 100),
        (300, 100, 100, 30, 90),
        (300, 100, 100, 29, 91),
        (300, 100, 4, 30, -6),
        (10, 5, 5, 9, 1),
        (10, 10, 10, 10, 1),
        (10, 2, 2, 10, 1),
        (10, 1, 1, 10, 1),
        (10, 0, 0, 10, 0),
    ],
)
def test_in_degraded_mode_the_share_leaves_its_part_of_the_reserve(
    limit: int, share: int, free: int, kept: int, room: int
) -> None:
    """Rounded down, and at least one token of the share is left for the calls."""
    tokens = Tokens(limit, free)
    tokens.share, tokens.degraded = share, True
    assert leased(tokens).room(0.0, kept) == room


@pytest.mark.parametrize(
    ("free", "now", "moment"),
    [(0, 0.0, 4.0), (3, 0.0, 4.0), (-1, 0.0, 5.0), (-2, 0.0, 6.0), (-3, 0.0, None), (0, 4.0, 5.0)],
)
def test_there_is_room_when_enough_tokens_have_returned(
    free: int, now: float, moment: float | None
) -> None:
    """With room already, when there is room for one more; unknown while a lease is requested."""
    tokens = Tokens(free=free)
    tokens.coming = [4.0, 5.0, 6.0]
    assert leased(tokens).room_at(now, 0) == moment


def test_in_degraded_mode_the_reserve_delays_the_moment_of_room() -> None:
    tokens = Tokens(limit=10, free=1)
    tokens.share, tokens.degraded = 5, True
    tokens.coming = [4.0, 5.0, 6.0]
    bucket = leased(tokens)
    assert [bucket.room_at(0.0, kept) for kept in (0, 2, 4, 6)] == [4.0, 4.0, 5.0, 6.0]


def test_tokens_are_leased_for_the_calls_that_wait() -> None:
    tokens = Tokens()
    bucket = leased(tokens)
    bucket.kept_within = 3
    bucket.want(7, 2)
    bucket.kept_within = 0
    bucket.want(0, 0)
    assert tokens.log == [("need", 7, 2, 3), ("need", 0, 0, 0)]


def test_a_request_takes_a_token_and_reports_when_it_returns() -> None:
    """By the mark of its start, its answer counts at most so many requests of this client."""
    tokens = Tokens(free=3)
    bucket = leased(tokens)
    marks = [bucket.take(1.0), bucket.take(2.0)]
    assert [bucket.own(mark) for mark in marks] == [1, 2]
    assert bucket.on_wire == 2
    bucket.return_at(70.0)
    bucket.put_back()
    assert bucket.on_wire == 0
    assert tokens.log == [("start", 1.0, 0), ("start", 2.0, 0), ("end", 70.0), ("unsend",)]


def test_ended_requests_are_counted_by_the_return_of_their_tokens() -> None:
    """Both moments are included; requests end in any order."""
    bucket = leased(Tokens())
    ended(bucket, 30.0, 10.0, 20.0)
    assert bucket.returning(10.0, 30.0) == 3
    assert bucket.returning(10.0, 29.9) == 2
    assert bucket.returning(10.1, 20.0) == 1
    assert bucket.returning(20.1, 29.9) == 0


def test_requests_whose_tokens_are_back_are_forgotten() -> None:
    bucket = leased(Tokens())
    ended(bucket, 10.0, 20.0, 30.0)
    bucket.room(9.9, 0)
    assert bucket.returning(0.0, 40.0) == 3
    bucket.room(10.0, 0)
    assert bucket.returning(0.0, 40.0) == 2
    bucket.room(30.0, 0)
    assert bucket.returning(0.0, 40.0) == 0


def test_a_request_that_is_put_back_is_not_counted() -> None:
    bucket = leased(Tokens())
    bucket.take(0.0)
    bucket.put_back()
    assert bucket.returning(0.0, 100.0) == 0


def test_estimates_count_the_tokens_that_are_back_by_now() -> None:
    """A quota shows them as available, and not as returning."""
    tokens = Tokens()
    tokens.available, tokens.in_flight, tokens.coming = 5, 1, [4.0, 5.0, 6.0]
    bucket = leased(tokens)
    assert bucket.available(4.0) == 6
    assert bucket.returns(5.0, 60.0) == [6.0, 65.0]
    assert bucket.available(5.0) == 7


# --- the store


# --- the gate of whole permits


def gate(tokens: Tokens) -> PermitGate:
    return PermitGate(tokens, lambda: None, lambda: None)


def test_the_room_of_a_gate_is_the_number_of_calls_that_may_ask() -> None:
    """For any number of tokens in hand, which belong to calls that have asked."""
    tokens = Tokens(free=4)
    tokens.askable = 15
    assert [gate(tokens).room(0.0, kept) for kept in (0, 5)] == [15, 10]


def test_a_gate_knows_when_to_ask_again_only_while_there_is_no_token() -> None:
    tokens = Tokens()
    assert gate(tokens).room_at(0.0, 0) is None
    tokens.not_before = 7.0
    assert gate(tokens).is_short(6.9, 0)
    assert gate(tokens).room_at(6.9, 0) == 7.0
    assert gate(tokens).room_at(7.0, 0) is None


def test_in_degraded_mode_a_gate_counts_as_any_leased_tokens() -> None:
    tokens = Tokens(limit=10, free=3)
    tokens.askable, tokens.degraded, tokens.share, tokens.not_before = 15, True, 5, 7.0
    tokens.coming = [4.0, 5.0]
    assert gate(tokens).room(0.0, 4) == leased(tokens).room(0.0, 4) == 1
    assert gate(tokens).room_at(0.0, 6) == leased(tokens).room_at(0.0, 6) == 4.0
    assert not gate(tokens).is_short(0.0, 0)


class Store:
    """Has the methods of a backend."""

    def open(
        self, *, period: float, late: float, pace: float | None, scope: CountedScope
    ) -> None: ...
    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> SharedTokens:
        return Tokens(limit)

    def gate(self, path: str, limit: int) -> GateTokens:
        return Tokens(limit)

    async def start(self) -> None: ...
    async def close(self) -> None: ...


class Session:
    """Opens and closes, and has no tokens."""

    def open(self) -> None: ...
    def close(self) -> None: ...


def test_a_token_store_or_none_is_taken_as_it_is() -> None:
    store = Store()
    assert check_backend(store) is store
    assert check_backend(None) is None


@pytest.mark.parametrize(
    ("store", "kind"),
    [
        ("redis://localhost", "a str"),
        (Session(), "a Session"),
        (Store, "the class Store"),
        (Session, "the class Session"),
    ],
)
def test_any_other_object_is_refused_with_its_kind_and_the_remedy(store: object, kind: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_backend(store)
    assert str(caught.value) == f"backend is {kind}, which cannot count tokens; pass a RedisBackend"


@pytest.mark.parametrize("name", ["open", "tokens", "close"])
def test_a_store_needs_each_of_its_methods(name: str) -> None:
    """An attribute that cannot be called is no method."""
    store = Store()
    setattr(store, name, 1)
    with pytest.raises(ConfigurationError):
        check_backend(store)
