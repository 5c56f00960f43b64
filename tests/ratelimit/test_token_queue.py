"""The tokens of one scope with the calls that wait for them: who is let out, and when."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence

import pytest

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import TokenBucket
from crustcredits._ratelimit.token_queue import AccountQueue, CommonQueue, TokenQueue

PERIOD = 60.0
SINGLE, MANY, BACKGROUND = Kind


class Bucket(TokenBucket):
    """Notes for how many calls tokens are wanted, and how many tokens these leave."""

    __slots__ = ("wanted",)

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.wanted: list[tuple[int, int]] = []

    def want(self, count: int, kept: int) -> None:
        self.wanted.append((count, kept))


class SharedBucket(Bucket):
    """Tokens that other processes take too."""

    __slots__ = ()

    is_shared = True


class Pool(PoolFlow):
    """Numbers that become calls of the same name, each of an account of its own."""

    def __init__(self, size: int) -> None:
        super().__init__([None] * size)

    def begin(self, number: int) -> Call:
        return Call(f"p{number}", f"p{number}", self)


def terms(reserve: float = 0.0, *, is_auto: bool = True) -> SchedulerTerms:
    return SchedulerTerms(reserve=reserve, scope="auto" if is_auto else "client")


def with_returns(bucket: Bucket, returns: Sequence[float], on_wire: int = 0) -> Bucket:
    """Tokens of ended requests return at these times, and others are on the wire."""
    for when in returns:
        bucket.take(0.0)
        bucket.return_at(when)
    for _ in range(on_wire):
        bucket.take(0.0)
    return bucket


def account_of(
    limit: int,
    *,
    reserve: float = 0.0,
    is_shared: bool = False,
    returns: Sequence[float] = (),
    on_wire: int = 0,
) -> AccountQueue:
    queue = AccountQueue("A", "k", with_returns(Bucket(limit), returns, on_wire), terms(reserve))
    queue.has_several_keys = is_shared
    return queue


def common_of(
    limit: int,
    *,
    reserve: float = 0.0,
    answers: Sequence[float] = (),
    is_auto: bool = True,
    is_shared: bool = False,
    returns: Sequence[float] = (),
    on_wire: int = 0,
) -> CommonQueue:
    """The common queue after answers at these times, each of which took no time."""
    scope = ScopeDetection(PERIOD, 10.0, proves=is_auto)
    for when in answers:
        scope.served(when, when)
    bucket = with_returns((SharedBucket if is_shared else Bucket)(limit), returns, on_wire)
    return CommonQueue(bucket, terms(reserve, is_auto=is_auto), scope)


def wanted(queue: TokenQueue) -> list[tuple[int, int]]:
    assert isinstance(queue.bucket, Bucket)
    return queue.bucket.wanted


FLOWS = {kind: Flow(kind) for kind in Kind}
NAMES = {SINGLE: "s", MANY: "m", BACKGROUND: "b"}


def call(kind: Kind, name: str = "") -> Call:
    name = name or NAMES[kind]
    return Call(name, name, FLOWS[kind])


def waits(queue: TokenQueue, **counts: int) -> None:
    """Calls named s1, m1, b1 ... wait: `single`, `many` and `background` of them."""
    for kind in Kind:
        for number in range(1, counts.get(kind.name.lower(), 0) + 1):
            queue.push(call(kind, f"{NAMES[kind]}{number}"))


def released(queue: TokenQueue, now: float) -> list[Hashable]:
    return [each.key for each in queue.release(now)]


# --- calls that wait


def test_nothing_waits_at_first() -> None:
    queue = account_of(3)
    assert (len(queue), list(queue.queues), queue.has_waiters) == (0, [], False)
    assert (queue.let_out, queue.refreshes_let_out, queue.releases_at) == (0, 0, -math.inf)
    assert [queue.waiting(kind) for kind in Kind] == [0, 0, 0]
    assert not any(map(queue.waits_before, Kind))
    assert not list(queue.drain())
    assert not released(queue, 0.0)
    assert (queue.name, queue.key, queue.refreshing, queue.cools_until, queue.idles_at) == (
        "A",
        "k",
        0,
        -math.inf,
        None,
    )


def test_an_account_has_calls_of_one_key_at_first() -> None:
    assert AccountQueue("A", "k", Bucket(1), terms()).has_several_keys is False


def test_calls_wait_by_kind() -> None:
    queue = account_of(3)
    waits(queue, single=1, many=2, background=3)
    queue.push_pool(Pool(4))
    assert queue.has_waiters
    assert (len(queue), [queue.waiting(kind) for kind in Kind]) == (10, [1, 6, 3])
    assert [each.length for each in queue.queues] == [1, 6, 3]


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        (SINGLE, [False, True, True]),
        (MANY, [False, False, True]),
        (BACKGROUND, [False, False, False]),
    ],
)
def test_calls_of_a_better_kind_wait_before_others(kind: Kind, before: list[bool]) -> None:
    queue = account_of(3)
    queue.push(call(kind))
    assert [queue.waits_before(each) for each in Kind] == before
    assert len(list(queue.drain())) == 1
    assert not any(map(queue.waits_before, Kind))


def test_a_queue_holds_the_calls_that_wait_in_it() -> None:
    queue, other = account_of(1), account_of(1)
    here, there, ready, nowhere = (call(MANY, name) for name in "abcd")
    assert not queue.holds(here)
    queue.push(here)
    other.push(there)
    FairQueue().push(ready)
    assert [queue.holds(each) for each in (here, there, ready, nowhere)] == [
        True,
        False,
        False,
        False,
    ]
    list(queue.drain())
    assert not queue.holds(here)


def test_all_waiting_calls_are_taken_out_the_best_kind_first() -> None:
    """They were not let out: none of them stands for a token."""
    queue = account_of(0)
    waits(queue, background=1, many=2, single=1)
    queue.push_pool(Pool(2))
    drained = list(queue.drain())
    assert [each.key for each in drained] == ["s1", "m1", "p0", "m2", "p1", "b1"]
    assert all(each.let_out_of is None for each in drained)
    assert (len(queue), queue.let_out, queue.refreshes_let_out) == (0, 0, 0)


# --- calls that are let out


def test_as_many_calls_are_let_out_as_there_is_room_for() -> None:
    """Calls that were let out stand for their tokens until they start."""
    queue = account_of(4, returns=(60.0, 61.0))
    waits(queue, many=5)
    assert released(queue, 0.0) == ["m1", "m2"]
    assert (len(queue), queue.let_out) == (3, 2)
    assert released(queue, 59.9) == []
    assert released(queue, 60.0) == ["m3"]
    assert released(queue, 61.0) == ["m4"]
    assert (queue.let_out, queue.refreshes_let_out) == (4, 0)


def test_single_calls_and_others_are_let_out_in_turn() -> None:
    """A single call is the first, and the turn goes on with the next token."""
    queue = account_of(4, returns=(60.0,))
    waits(queue, single=4, many=2)
    assert released(queue, 0.0) == ["s1", "m1", "s2"]
    assert released(queue, 60.0) == ["m2"]
    assert [queue.waiting(kind) for kind in Kind] == [2, 0, 0]


def test_where_only_calls_of_one_kind_wait_each_of_them_is_next() -> None:
    queue = account_of(7)
    waits(queue, single=3)
    assert released(queue, 0.0) == ["s1", "s2", "s3"]
    waits(queue, many=3)
    assert released(queue, 0.0) == ["m1", "m2", "m3"]
    waits(queue, single=3, many=3)
    assert released(queue, 0.0) == ["s1"]


def test_single_calls_take_the_reserve_that_others_leave() -> None:
    queue = account_of(4, reserve=0.5, is_shared=True)
    waits(queue, single=4, many=4)
    assert released(queue, 0.0) == ["s1", "m1", "s2", "s3"]


def test_refreshes_are_let_out_last_and_one_at_a_time() -> None:
    queue = account_of(5)
    waits(queue, background=2, many=1)
    assert released(queue, 0.0) == ["m1"]
    assert (queue.let_out, queue.refreshes_let_out) == (1, 0)
    queue = account_of(5)
    waits(queue, background=2)
    assert released(queue, 0.0) == ["b1"]
    assert (queue.let_out, queue.refreshes_let_out) == (0, 1)
    assert released(queue, 1.0) == []


def test_a_refresh_that_was_let_out_keeps_no_foreground_call_waiting() -> None:
    queue = account_of(3)
    waits(queue, background=1)
    assert released(queue, 0.0) == ["b1"]
    waits(queue, many=4)
    assert released(queue, 0.0) == ["m1", "m2", "m3"]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_call_that_is_taken_back_gives_its_token_to_the_next(kind: Kind) -> None:
    """Only its own queue takes it back, and only once."""
    queue, other = account_of(2, on_wire=1), account_of(2)
    if kind is BACKGROUND:
        queue = account_of(2)
    first, second = call(kind, "first"), call(kind, "second")
    queue.push(first)
    queue.push(second)
    assert list(queue.release(0.0)) == [first]
    assert released(queue, 0.0) == []
    assert not other.take_back(first)
    assert not queue.take_back(second)
    assert queue.take_back(first)
    assert not queue.take_back(first)
    assert first.let_out_of is None
    assert (queue.let_out, queue.refreshes_let_out) == (0, 0)
    assert (other.let_out, other.refreshes_let_out) == (0, 0)
    assert list(queue.release(0.0)) == [second]


def test_calls_of_a_pool_are_let_out_as_they_begin() -> None:
    queue, pool = common_of(2, is_auto=False), Pool(3)
    queue.push_pool(pool)
    assert released(queue, 0.0) == ["p0", "p1"]
    assert (pool.waiting, queue.waiting(MANY), queue.let_out) == (1, 1, 2)


# --- refreshes


@pytest.mark.parametrize(
    ("reserve", "next_refresh"),
    [(0.0, 5.0 + 60 / 9), (0.5, 5.0 + 60 / 5)],
)
def test_the_next_refresh_follows_after_a_share_of_the_period(
    reserve: float, next_refresh: float
) -> None:
    """Refreshes are spread over the tokens that they may take: not the reserve, nor a tenth."""
    queue = account_of(10, reserve=reserve, is_shared=True)
    queue.space_refreshes(5.0, PERIOD)
    assert queue.bucket.next_refresh == pytest.approx(next_refresh)
    waits(queue, background=1)
    assert released(queue, next_refresh - 0.1) == []
    assert queue.next_room(next_refresh - 0.1) == pytest.approx(next_refresh)
    assert released(queue, next_refresh + 0.1) == ["b1"]


def test_after_a_burst_refreshes_wait_for_its_tokens() -> None:
    queue = account_of(10, returns=(50.0,) * 9)
    queue.space_refreshes(5.0, PERIOD)
    assert queue.bucket.next_refresh == pytest.approx(5.0 + 45.0)


# --- the tokens of an account


@pytest.mark.parametrize(
    ("is_shared", "reserve", "rooms"),
    [
        (False, 0.0, [10, 10, 1]),
        (True, 0.0, [10, 10, 1]),
        (False, 0.5, [10, 10, 1]),
        (True, 0.5, [10, 5, 1]),
        (True, 1.0, [10, 1, 1]),
    ],
)
def test_only_an_account_of_several_keys_has_a_reserve(
    is_shared: bool, reserve: float, rooms: list[int]
) -> None:
    queue = account_of(10, reserve=reserve, is_shared=is_shared)
    assert queue.reserve == (reserve if is_shared else 0.0)
    assert [queue.room(kind, 0.0) for kind in Kind] == rooms


def test_refreshes_leave_a_tenth_of_an_account() -> None:
    queue = account_of(10, on_wire=9)
    assert [queue.room(kind, 0.0) for kind in Kind] == [1, 1, 0]


@pytest.mark.parametrize("reserve", [0.0, 0.5])
def test_an_account_has_no_room_before_its_cooldown_is_over(reserve: float) -> None:
    queue = account_of(10, reserve=reserve, is_shared=True)
    queue.cools_until = 30.0
    assert [queue.room(kind, 29.9) for kind in Kind] == [0, 0, 0]
    assert all(queue.room(kind, 30.0) > 0 for kind in Kind)


def test_waiting_calls_of_an_account_have_room_when_its_cooldown_is_over() -> None:
    """No tokens are wanted before."""
    queue = account_of(10, returns=(20.0,))
    queue.cools_until = 30.0
    assert queue.next_room(29.9) is None
    waits(queue, many=1, background=1)
    assert queue.next_room(29.9) == 30.0
    assert wanted(queue) == []
    queue.next_room(30.0)
    assert wanted(queue) == [(1, 0)]


# Waiting calls by kind, the moment at which the best kind among them has room, and the tokens that
# this kind leaves.
by_kinds = pytest.mark.parametrize(
    ("counts", "moment", "kept"),
    [
        ({"single": 1}, 10.0, 0),
        ({"many": 2}, 20.0, 1),
        ({"background": 1}, 30.0, 2),
        ({"single": 1, "many": 1, "background": 1}, 10.0, 0),
        ({"many": 1, "background": 1}, 20.0, 1),
    ],
)


@by_kinds
def test_calls_of_the_best_kind_decide_when_an_account_has_room(
    counts: dict[str, int], moment: float, kept: int
) -> None:
    """Tokens are wanted for the calls of this kind, which leave fewer than those of others."""
    queue = account_of(11, reserve=0.05, is_shared=True, returns=(10.0, 20.0, 30.0), on_wire=8)
    waits(queue, **counts)
    assert queue.next_room(0.0) == moment
    assert wanted(queue) == [(next(iter(counts.values())), kept)]


def test_tokens_are_wanted_for_all_kinds_that_leave_equally_many() -> None:
    """Without a reserve a check leaves none, and a refresh a tenth."""
    queue = account_of(11, returns=(10.0, 20.0, 30.0), on_wire=8)
    waits(queue, single=1, many=3, background=1)
    queue.next_room(0.0)
    assert wanted(queue) == [(4, 0)]


def test_an_account_without_waiting_calls_needs_no_wake_up() -> None:
    queue = account_of(1, returns=(10.0,))
    assert queue.next_room(0.0) is None
    assert wanted(queue) == []


def test_the_earliest_known_moment_counts_where_another_kind_waits_for_an_answer() -> None:
    """The check needs two tokens, of which one is on the wire."""
    queue = account_of(2, reserve=0.5, is_shared=True, returns=(10.0,), on_wire=1)
    waits(queue, many=1)
    assert queue.next_room(0.0) is None
    waits(queue, single=1)
    assert queue.next_room(0.0) == 10.0


# --- the common tokens


@pytest.mark.parametrize(
    ("limit", "reserve", "rooms"),
    [
        (300, 0.0, [270, 270, 1]),
        (300, 0.5, [285, 135, 1]),
        (11, 0.0, [11, 11, 1]),
        (12, 0.0, [10, 10, 1]),
        (20, 0.5, [20, 10, 1]),
        (24, 0.5, [22, 10, 1]),
    ],
)
def test_no_call_takes_the_last_tenth_before_ten_requests_can_witness(
    limit: int, reserve: float, rooms: list[int]
) -> None:
    """A tenth of what checks may take, rounded up; a bucket of eleven keeps none."""
    queue = common_of(limit, reserve=reserve)
    assert [queue.room(kind, 0.0) for kind in Kind] == rooms


def test_the_last_tenth_is_free_while_ten_requests_can_witness() -> None:
    """They witness for a request 1.5 s after their end, and for one period."""
    queue = common_of(300, answers=range(10))
    assert [queue.room(SINGLE, now) for now in (10.4, 10.5, 60.0, 60.1)] == [270, 300, 300, 270]


@pytest.mark.parametrize(
    ("limit", "answers", "room"), [(300, 0, 15), (300, 10, 0), (100, 0, 25), (99, 0, 30)]
)
def test_a_shared_count_withholds_half_of_the_tenth_from_a_process_with_few_answers(
    limit: int, answers: int, room: int
) -> None:
    """The others may have used all else. A small bucket has not ten answers for each process."""
    queue = common_of(limit, on_wire=limit - 30, is_shared=True, answers=[0.1] * answers)
    assert queue.room(SINGLE, 1.0) == room
    assert queue.admits(call(SINGLE), 1.0) is (room > 0)


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_known_scope_withholds_no_tokens(is_shared: bool) -> None:
    queue = common_of(300, on_wire=270, is_auto=False, is_shared=is_shared)
    assert [queue.room(kind, 0.0) for kind in Kind] == [30, 30, 0]
    waits(queue, many=1)
    assert queue.admits(call(SINGLE), 0.0)


@pytest.mark.parametrize(("on_wire", "room"), [(99, -9), (100, 0), (103, -3)])
def test_a_bucket_without_a_free_token_keeps_no_last_tenth(on_wire: int, room: int) -> None:
    queue = common_of(100, on_wire=on_wire)
    assert [queue.room(kind, 0.0) for kind in (SINGLE, MANY)] == [room, room]


@pytest.mark.parametrize(
    ("limit", "reserve", "on_wire", "admitted"),
    [
        # the last tenth of 300 tokens is 30
        (300, 0.0, 0, [True, True, True]),
        (300, 0.0, 239, [True, True, True]),
        (300, 0.0, 240, [True, True, False]),
        (300, 0.0, 269, [True, True, False]),
        (300, 0.0, 270, [False, False, False]),
        (300, 0.0, 271, [False, False, False]),
        (300, 0.0, 299, [False, False, False]),
        (300, 0.0, 300, [False, False, False]),
        (300, 0.0, 301, [False, False, False]),
        # with a reserve of 150 it is 15
        (300, 0.5, 134, [True, True, True]),
        (300, 0.5, 135, [True, False, False]),
        (300, 0.5, 284, [True, False, False]),
        (300, 0.5, 285, [False, False, False]),
        # a bucket of eleven keeps none
        (11, 0.0, 8, [True, True, True]),
        (11, 0.0, 9, [True, True, False]),
        (11, 0.0, 10, [True, True, False]),
        (11, 0.0, 11, [False, False, False]),
        (10, 0.1, 8, [True, True, True]),
        (10, 0.1, 9, [True, False, False]),
        (1, 0.0, 0, [True, True, True]),
        (1, 0.0, 1, [False, False, False]),
    ],
)
def test_a_call_is_admitted_while_there_is_room_for_its_kind(
    limit: int, reserve: float, on_wire: int, admitted: list[bool]
) -> None:
    queue = common_of(limit, reserve=reserve, on_wire=on_wire)
    assert [queue.admits(call(kind), 0.0) for kind in Kind] == admitted
    assert [queue.room(kind, 0.0) > 0 for kind in Kind] == admitted


def test_a_refresh_is_admitted_at_its_moment() -> None:
    queue = common_of(300)
    queue.bucket.next_refresh = 7.0
    assert [queue.admits(call(BACKGROUND), now) for now in (6.9, 7.0)] == [False, True]


def test_a_returned_token_admits_a_call() -> None:
    for kind in (SINGLE, MANY):
        queue = common_of(1, returns=(60.0,))
        assert [queue.admits(call(kind), now) for now in (59.9, 60.0)] == [False, True]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_call_is_admitted_ahead_of_none_of_its_kind_that_waits(kind: Kind) -> None:
    """Calls of another kind do not stop it."""
    queue = common_of(300)
    queue.push(call(kind))
    assert [queue.admits(call(each, "new"), 0.0) for each in Kind] == [
        each is not kind for each in Kind
    ]


def test_no_call_takes_the_tokens_of_calls_that_were_let_out() -> None:
    """Those take their tokens themselves."""
    queue = common_of(5, is_auto=False, on_wire=2)
    waits(queue, many=2)
    first, second = queue.release(0.0)
    assert queue.admits(call(SINGLE, "third"), 0.0)
    queue.bucket.take(0.0)  # the third call has started
    assert not queue.admits(call(SINGLE, "fourth"), 0.0)
    assert not queue.admits(call(MANY, "fourth"), 0.0)
    assert queue.admits(first, 0.0)
    assert queue.admits(second, 0.0)
    queue.take_back(second)  # it is given up, and its token is free
    assert queue.admits(call(SINGLE, "fourth"), 0.0)


def test_a_token_that_has_returned_is_beyond_those_of_calls_that_were_let_out() -> None:
    queue = common_of(2, is_auto=False, returns=(60.0,))
    waits(queue, many=1)
    assert released(queue, 0.0) == ["m1"]
    assert [queue.admits(call(SINGLE), now) for now in (59.9, 60.0)] == [False, True]


def test_beside_calls_of_a_check_that_were_let_out_a_single_call_takes_the_reserve() -> None:
    """Another call of a check waits for the tokens that it may take, and a refresh for all."""
    queue = common_of(10, reserve=0.5, is_auto=False, on_wire=2)
    waits(queue, many=3)
    assert released(queue, 0.0) == ["m1", "m2", "m3"]
    assert [queue.admits(call(kind, "new"), 0.0) for kind in Kind] == [True, False, False]


def test_a_call_that_another_queue_has_let_out_waits_its_turn() -> None:
    queue, account = common_of(5, is_auto=False), account_of(5)
    account.push(call(MANY, "let out"))
    (let_out,) = account.release(0.0)
    assert queue.admits(let_out, 0.0)
    queue.push(call(MANY, "first"))
    assert not queue.admits(let_out, 0.0)


def test_a_call_that_was_let_out_needs_a_token_all_the_same() -> None:
    queue = common_of(1, is_auto=False)
    queue.push(call(MANY))
    (let_out,) = queue.release(0.0)
    queue.bucket.limit = 0
    assert not queue.admits(let_out, 0.0)


# --- when there is room for common tokens


@by_kinds
def test_calls_of_the_best_kind_decide_when_there_is_a_common_token(
    counts: dict[str, int], moment: float, kept: int
) -> None:
    """Tokens are wanted for the calls of this kind, which leave fewer than those of others."""
    queue = common_of(11, reserve=0.05, is_auto=False, returns=(10.0, 20.0, 30.0), on_wire=8)
    waits(queue, **counts)
    assert queue.next_room(0.0) == moment
    assert wanted(queue) == [(next(iter(counts.values())), kept)]


@pytest.mark.parametrize(("next_refresh", "moment"), [(5.0, 10.0), (15.0, 15.0)])
def test_a_waiting_refresh_takes_a_common_token_at_its_moment(
    next_refresh: float, moment: float
) -> None:
    queue = common_of(2, is_auto=False, returns=(5.0, 10.0))
    queue.bucket.next_refresh = next_refresh
    waits(queue, background=1)
    assert queue.next_room(0.0) == moment


def test_the_earliest_known_moment_counts_where_other_kinds_have_none() -> None:
    queue = common_of(2, reserve=0.5, is_auto=False, returns=(10.0,), on_wire=1)
    waits(queue, many=1)
    assert queue.next_room(0.0) is None
    waits(queue, single=1)
    assert queue.next_room(0.0) == 10.0


def test_without_waiting_calls_no_common_token_is_wanted() -> None:
    queue = common_of(2, is_auto=False, returns=(10.0,))
    assert queue.next_room(0.0) is None
    assert wanted(queue) == [(0, 0)]


def test_waiting_calls_may_have_the_last_tenth_when_ten_requests_can_witness() -> None:
    """If none has returned by then. Without ten answers the moment is not known."""
    returns = [*itertools.repeat(50.0, 90)]
    few = common_of(100, answers=range(9), returns=returns)
    waits(few, many=1)
    assert few.next_room(9.0) == 50.0
    assert wanted(few) == [(1, 10)]
    enough = common_of(100, answers=range(10), returns=returns)
    waits(enough, many=1)
    assert enough.next_room(9.0) == pytest.approx(10.5, abs=0.001)
    assert enough.next_room(9.0) >= 10.5  # type: ignore[operator]  # a moment, as above
    assert wanted(enough) == [(1, 10)] * 2


def test_a_token_beyond_the_last_tenth_may_return_first() -> None:
    queue = common_of(100, answers=range(10), returns=[*itertools.repeat(9.5, 90)])
    waits(queue, many=1)
    assert queue.next_room(9.0) == 9.5


def test_no_call_waits_for_a_token_of_the_last_tenth_that_is_free() -> None:
    """Ten tokens are free and kept: the next token that returns beyond them is for the call."""
    queue = common_of(100, returns=[10.0] * 45 + [20.0] * 45)
    waits(queue, many=1)
    assert queue.room(MANY, 0.0) == 0
    assert queue.next_room(0.0) == 10.0
    for free, moment in ((5, 6.0), (1, 10.0)):
        fewer = common_of(100, returns=[*range(1, 101 - free)])
        waits(fewer, many=1)
        assert (fewer.room(MANY, 0.0), fewer.next_room(0.0)) == (free - 10, moment)


def test_with_no_token_at_all_a_call_waits_for_the_first_that_returns() -> None:
    """By then ten requests may be able to witness."""
    queue = common_of(100, returns=[*range(1, 101)])
    waits(queue, many=1)
    assert queue.next_room(0.0) == 1.0


def test_a_check_does_not_wait_for_a_token_of_the_reserve_or_of_the_last_tenth() -> None:
    """Of 100 tokens ten are the reserve, and nine the tenth of the rest."""
    queue = common_of(100, reserve=0.1, returns=[*range(1, 84)])
    waits(queue, many=1)
    assert (queue.room(MANY, 0.0), queue.next_room(0.0)) == (-2, 3.0)
    assert wanted(queue) == [(1, 19)]
    waits(queue, single=1)
    assert queue.room(SINGLE, 0.0) == 8
    assert wanted(queue) == [(1, 19)]
    queue.next_room(0.0)
    assert wanted(queue)[-1] == (1, 9)
