"""Calls that wait, and move to the flow of a waiter that joins them; no request is sent here."""

from __future__ import annotations

import contextvars
import math
from collections.abc import Hashable, KeysView, Sequence
from typing import Any, cast

import attrs
import pytest

from crustcredits import RateLimit, Retry
from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.pools import Pools
from crustcredits._cache.promotion import Promotion
from crustcredits._cache.shared_call import Pool, SharedCall, WaitTerms
from crustcredits._http.addresses import USER_CREDITS
from crustcredits._ratelimit.flow import Flow, Kind
from tests.virtual import FakeServer, keys

pytestmark = pytest.mark.virtual

FOR_EVER = WaitTerms(0.0, math.inf, falls_back=False)
OF_STREAM = WaitTerms(0.0, 20.0, falls_back=False)
OF_CHECK = WaitTerms(0.0, 20.0, falls_back=False, own_timer=True)


class _Check(Pool):
    """A pool of keys, whose numbers stand for their digests."""

    def __init__(self, queue: Queue, accounts: Sequence[Hashable | None]) -> None:
        super().__init__(USER_CREDITS, accounts)
        self._calls = queue

    def make(self, number: int) -> SharedCall:
        return self._calls.make(f"k{number}", self)

    @property
    def digests(self) -> KeysView[bytes]:
        return {str(number).encode(): None for number in range(5)}.keys()

    def number_of(self, digest: bytes) -> int | None:
        return int(digest)


@attrs.frozen
class Queue:
    """A dispatcher that starts nothing, so that all calls wait for their turn."""

    dispatcher: Dispatcher
    pools: Pools
    promotion: Promotion

    @classmethod
    def new(cls) -> Queue:
        dispatcher = Dispatcher(
            cast("Any", FakeServer()),
            rate_limit=RateLimit(),
            backend=None,
            concurrency=32,
            request_timeout=10.0,
            retry=Retry(),
        )
        dispatcher.stop()
        pools = Pools()
        return cls(dispatcher, pools, Promotion(dispatcher, pools))

    def make(self, name: str, flow: Flow) -> SharedCall:
        key = keys(1, name)[0]
        nobody = cast("Any", None)
        return SharedCall(
            nobody,
            nobody,
            (USER_CREDITS, key.digest),
            key,
            account=key.digest,
            flow=flow,
            context=contextvars.Context(),
        )

    def enter(self, flow: Flow, count: int, prefix: str = "k") -> list[SharedCall]:
        calls = [self.make(f"{prefix}{number}", flow) for number in range(count)]
        for call in calls:
            self.dispatcher.enter(call)
        return calls

    def join(self, call: SharedCall, flow: Flow, terms: WaitTerms) -> bool:
        """Let a waiter of a flow join a call. Returns whether the call waits in that flow now."""
        call.waiters[cast("Any", object())] = terms
        self.promotion.joined(call, flow, terms)
        return call.flow is flow


async def test_a_refresh_that_somebody_awaits_moves_to_the_foreground() -> None:
    queue = Queue.new()
    (refresh,) = queue.enter(queue.dispatcher.refreshes, 1)
    assert not refresh.is_foreground
    assert queue.join(refresh, Flow(), FOR_EVER)
    assert refresh.is_foreground


async def test_a_call_of_a_check_that_a_single_caller_awaits_moves_to_the_single_calls() -> None:
    """A single call stays where it is when a check awaits it too."""
    queue, check = Queue.new(), Flow()
    singles = queue.dispatcher.singles
    (of_check,), (single,) = queue.enter(check, 1), queue.enter(singles, 1, "single")
    assert queue.join(of_check, singles, FOR_EVER)
    assert not queue.join(single, check, OF_STREAM)


async def test_a_call_whose_last_waiter_has_left_is_foreground_again() -> None:
    """In the flow of the new waiter, which has the same priority."""
    queue, other = Queue.new(), Flow()
    (call,) = queue.enter(Flow(), 1)
    call.is_foreground = False
    assert queue.join(call, other, FOR_EVER)
    assert call.is_foreground


@pytest.mark.parametrize(
    ("before", "ahead", "moves"), [(3, 0, True), (3, 2, True), (3, 3, False), (0, 0, False)]
)
async def test_a_stream_with_a_timeout_takes_a_call_that_has_an_earlier_turn_in_its_flow(
    before: int, ahead: int, *, moves: bool
) -> None:
    """Calls that wait `before` it where it is, and `ahead` in the flow of the stream."""
    queue, stream = Queue.new(), Flow()
    queue.enter(stream, ahead, "ahead")
    call = queue.enter(Flow(), before + 1)[-1]
    assert queue.join(call, stream, OF_STREAM) is moves


@pytest.mark.parametrize("terms", [FOR_EVER, OF_CHECK])
async def test_a_check_and_a_stream_without_a_timeout_move_no_call(terms: WaitTerms) -> None:
    """They do not count on a turn in their own flow."""
    queue = Queue.new()
    assert not queue.join(queue.enter(Flow(), 4)[-1], Flow(), terms)


async def test_a_call_that_the_same_flow_awaits_twice_keeps_its_turn() -> None:
    queue, stream = Queue.new(), Flow()
    call, other = queue.enter(stream, 2)
    assert queue.join(call, stream, OF_STREAM)
    assert queue.dispatcher.endpoints[USER_CREDITS].scheduler.ready.pop() is call
    assert other.flow is stream


@pytest.mark.parametrize(("deadline", "moves"), [(19.0, False), (20.0, True), (21.0, True)])
async def test_a_call_stays_where_a_waiter_with_an_earlier_deadline_expects_its_turn(
    deadline: float, *, moves: bool
) -> None:
    queue = Queue.new()
    call = queue.enter(Flow(), 4)[-1]
    call.waiters[cast("Any", object())] = OF_STREAM._replace(deadline=deadline)
    assert queue.join(call, Flow(), OF_STREAM) is moves


@pytest.mark.parametrize(("others", "moves"), [(7, True), (8, False)])
async def test_a_call_with_more_than_eight_waiters_stays(others: int, *, moves: bool) -> None:
    """A look at all their deadlines would cost too much."""
    queue = Queue.new()
    call = queue.enter(Flow(), 4)[-1]
    call.waiters = {cast("Any", object()): FOR_EVER for _ in range(others)}
    assert queue.join(call, Flow(), OF_STREAM) is moves


async def test_a_call_that_does_not_wait_for_its_turn_stays() -> None:
    """It waits for a retry, or its request is on the wire."""
    queue, flow = Queue.new(), Flow()
    queue.enter(flow, 4)
    assert not queue.join(queue.make("elsewhere", flow), Flow(), OF_STREAM)


@pytest.mark.parametrize(
    ("number", "kind", "account", "moves"),
    [
        (4, Kind.MANY, None, True),
        (0, Kind.MANY, None, False),
        (4, Kind.MANY, "A", False),
        (0, Kind.SINGLE, "A", True),
    ],
)
async def test_an_early_call_leaves_its_pool_for_an_earlier_turn(
    number: int, kind: Kind, account: str | None, *, moves: bool
) -> None:
    """For a stream with a timeout, or a single caller; the pool does not ask for its key again."""
    queue = Queue.new()
    pool = _Check(queue, [account] * 5)
    queue.pools.add(pool)
    queue.dispatcher.enter_pool(pool.path, pool)
    call = queue.pools.begin_early((pool.path, str(number).encode()))
    assert call is not None
    assert queue.join(call, Flow(kind), OF_STREAM) is moves
    assert pool.waiting == (4 if moves else 5)
    assert (call.early is None) is (call.queue is not None) is moves
