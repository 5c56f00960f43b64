"""`SingleFlight`: one shared call at a time for each key and endpoint, and the cache of answers.

A call belongs to the client, not to a caller. Each caller has a waiter with its own deadline, and
may leave. When the last waiter has left, a call that waits is dropped; a call on the wire is
finished and its answer cached. `_cache.dispatcher` sends the requests.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import heapq
import itertools
import logging
import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol, TypeAlias

import attrs

from crustcredits._cache.dispatcher import ApiCall, Dispatcher
from crustcredits._cache.policy import NEW, CachePolicy
from crustcredits._cache.store import BalanceCache, CacheKey
from crustcredits._errors import (
    APITimeoutError,
    ClientClosedError,
    CrustCreditsError,
    RateLimitWaitError,
)
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Balance, Known, Outcome, Source, Unknown, outcome_for
from crustcredits._ratelimit.fair_queue import Flow, PoolFlow

_log = logging.getLogger("crustcredits")

Land: TypeAlias = Callable[[Outcome[Any] | BaseException], None]


# Deadlines that one iteration of the loop handles; also the number of heap entries below which
# ended ones are not purged.
_FEW = 1_000


class Waiter(Protocol):
    """The waiter of a call: a future, or a key of a fan-out."""

    def done(self) -> bool: ...
    def set_result(self, result: Outcome[Any], /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...
    def cancel(self) -> object: ...


class WaitTerms(NamedTuple):
    """The start and the deadline of a wait, in seconds of the loop's clock.

    `falls_back` says whether a stale answer may end it.
    """

    began: float
    deadline: float
    falls_back: bool


class SharedCall(ApiCall):
    """One call under way, and its waiters."""

    __slots__ = ("calls", "early", "first", "place", "waiters")

    def __init__(
        self,
        calls: SingleFlight,
        place: CacheKey,
        key: ApiKey,
        *,
        account: Hashable,
        flow: Flow,
        context: contextvars.Context,
    ) -> None:
        super().__init__(place, key, account, flow, context)
        self.calls = calls
        self.place = place
        self.first: Waiter | None = None  # the waiter that began the call
        self.waiters: dict[Waiter, WaitTerms] = {}
        # The pool in which the call waits for its turn, and its number there.
        self.early: tuple[Pool, int] | None = None

    @property
    def is_refresh(self) -> bool:
        """Whether the call only refreshes a cache entry, without a waiter."""
        return self.first is None and not self.wanted

    def on_late(self) -> None:
        self.calls.refuse_all(self)

    def on_wait(self) -> None:
        self.calls.refuse_hopeless(self)

    def can_fall_back(self) -> bool:
        return all(patience.falls_back for patience in self.waiters.values())

    def patience(self, now: float) -> float:
        return (
            max((patience.deadline for patience in self.waiters.values()), default=math.inf) - now
        )

    def on_end(self, result: Balance | CrustCreditsError) -> None:
        self.calls.end(self, result)

    def on_broken_off(self, error: BaseException | None) -> None:
        self.calls.break_off(self, error)


class FanOutWaiter:
    """The waiter of one key of a fan-out: its outcome is passed on at once, without a task.

    Attributes:
        key: The key that is asked about.
        freshness: How old its answer may be.
        began: When the wait began, in seconds of the loop's clock.
        call: The call of the key, once there is one.
    """

    __slots__ = ("_calls", "_land", "began", "call", "freshness", "key")

    def __init__(
        self, calls: SingleFlight, key: ApiKey, freshness: CachePolicy, began: float, land: Land
    ) -> None:
        self.key = key
        self.freshness = freshness
        self.began = began
        self.call: SharedCall | None = None
        self._calls = calls
        self._land: Land | None = land

    def done(self) -> bool:
        return self._land is None

    def set_result(self, result: Outcome[Any], /) -> None:
        if result.error is None and self._land is not None:
            land, self._land = self._land, None
            land(result if result.key is self.key else outcome_for(self.key, result))
        elif isinstance(result.error, ClientClosedError):
            self.hand_on(copy.copy(result.error))
        elif isinstance(result, Unknown) and self.freshness.if_error and self._land is not None:
            # In the next iteration of the loop, as a future would: an answer that arrives in this
            # iteration is cached by then.
            asyncio.get_running_loop().call_soon(self._stand_in, result, self._land)
            self._land = None
        else:
            self.hand_on(outcome_for(self.key, result))

    def set_exception(self, exception: BaseException, /) -> None:
        self.hand_on(exception)

    def cancel(self) -> None:
        self.hand_on(asyncio.CancelledError())

    def give_up(self) -> None:
        """Leave the call."""
        assert self.call is not None, "a waiter without an outcome has a call"
        self._calls.leave(self.call, self)

    def hand_on(self, landed: Outcome[Any] | BaseException) -> None:
        """Pass on the outcome or the exception."""
        land, self._land = self._land, None
        assert land is not None, "a waiter has one outcome"
        land(landed)

    def _stand_in(self, result: Unknown, land: Land) -> None:
        assert self.call is not None
        land(self._calls.given(self.call, self.key, result, self.freshness, self.began))


class Pool(PoolFlow):
    """Keys of one check that wait for their turn.

    Attributes:
        path: The endpoint.
        early: Calls of numbers that still wait, made because other callers ask for their keys too.
    """

    __slots__ = ("early", "path")

    def __init__(self, path: str, accounts: Sequence[Hashable | None]) -> None:
        super().__init__(accounts)
        self.path = path
        self.early: dict[int, SharedCall] = {}

    def begin(self, number: int) -> SharedCall:
        call = self.early.pop(number, None)
        if call is None:
            return self.make(number)
        call.early = None
        return call

    @abstractmethod
    def make(self, number: int) -> SharedCall:
        """Make the call of a number."""

    @abstractmethod
    def number_of(self, digest: bytes) -> int | None:
        """The number of this secret, if it waits in the pool; else None."""


class _Deadlines:
    """The deadlines of all waiters, with one timer for all of them."""

    def __init__(self, time_out: Callable[[SharedCall, Waiter], None]) -> None:
        self._time_out = time_out
        self._heap: list[tuple[float, int, SharedCall, Waiter]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._due = math.inf  # time of the timer; uvloop's handles do not expose it
        self._room = _FEW

    def add(self, deadline: float, call: SharedCall, waiter: Waiter) -> None:
        """Add the deadline of a waiter."""
        if len(self._heap) >= self._room:
            self._purge()
        heapq.heappush(self._heap, (deadline, next(self._numbers), call, waiter))
        if deadline < self._due:
            self._set_timer()

    def close(self) -> None:
        """Drop all deadlines."""
        self._heap.clear()
        self._set_timer()

    def _purge(self) -> None:
        """Drop the deadlines of waiters that have ended.

        So long deadlines take at most twice as many entries as there are waiters.
        """
        self._heap = [entry for entry in self._heap if not entry[3].done()]
        heapq.heapify(self._heap)
        self._room = max(_FEW, 2 * len(self._heap))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = None, math.inf
        if self._heap:
            self._due = self._heap[0][0]
            self._timer = asyncio.get_running_loop().call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        now = _now()
        # The rest in the next iteration of the loop, so that other tasks run meanwhile.
        for _ in range(_FEW):
            if not self._heap or not (self._heap[0][0] <= now or self._heap[0][3].done()):
                break
            _, _, call, waiter = heapq.heappop(self._heap)
            self._time_out(call, waiter)
        self._timer = None
        self._set_timer()


class SingleFlight:
    """The calls under way, and the cache.

    The class is long because single calls, pools and refreshes share the same calls and waiters.
    """

    def __init__(self, dispatcher: Dispatcher, answers: BalanceCache) -> None:
        self._dispatcher = dispatcher
        self._answers = answers
        self._under_way: dict[CacheKey, SharedCall] = {}
        # On the wire when their cache entries were invalidated; no new waiter joins them.
        self._outdated: set[SharedCall] = set()
        self._dropped: set[asyncio.Task[Any]] = set()
        self._pools: list[Pool] = []
        self._deadlines = _Deadlines(self._time_out)

    def known(
        self, path: str, key: ApiKey | UnusableKey, freshness: CachePolicy
    ) -> Outcome[Any] | None:
        """A cached outcome young enough, or None; a stale one is refreshed in the background."""
        if freshness is NEW or isinstance(key, UnusableKey):
            return None
        place = path, key.digest
        kept = self._answers.find(place)
        if kept is None:
            return None
        now = _now()
        outcome = kept.answer(freshness, now)
        if outcome is None:
            return None
        is_asked = place in self._under_way or (
            self._pools and self._waiting_in(path, key.digest) is not None
        )
        if outcome.stale and not is_asked and kept.claim_refresh(place, now):
            # A refresh belongs to no caller, so it keeps no caller's context alive.
            account, flow = self._dispatcher.account_of(key), self._dispatcher.refreshes
            call = self._under_way[place] = SharedCall(
                self, place, key, account=account, flow=flow, context=contextvars.Context()
            )
            self._dispatcher.enter(call)
        return outcome if outcome.key is key else outcome_for(key, outcome)

    def last(self, path: str, key: ApiKey, freshness: CachePolicy) -> Outcome[Any] | None:
        """The last outcome for `key`, of any age, or None."""
        kept = self._answers.find((path, key.digest))
        outcome = None if kept is None else kept.last(freshness, _now())
        return None if outcome is None else outcome_for(key, outcome)

    async def ask(
        self, path: str, key: ApiKey | UnusableKey, freshness: CachePolicy, deadline: float | None
    ) -> Outcome[Any]:
        """The outcome of one call for `key`: of the call under way, else of a new one.

        Without an answer in time, the error of the outcome says why.
        """
        if isinstance(key, UnusableKey):
            return _failure(key, key.error)
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiter: asyncio.Future[Outcome[Any]] = loop.create_future()
        place = path, key.digest
        patience = self._patience(
            place, freshness, began, math.inf if deadline is None else deadline
        )
        call = self._join(place, key, waiter, patience, self._dispatcher.singles)
        try:
            outcome = await waiter
        except asyncio.CancelledError:
            self.leave(call, waiter)
            raise
        if freshness is NEW and outcome.key is key:
            return outcome
        return self.given(call, key, outcome, freshness, began)

    def begin(self, path: str, landing: FanOutWaiter, deadline: float, flow: Flow) -> None:
        """Ask about a key of a fan-out, without a task: the outcome lands at once or later.

        A new call waits for its turn in `flow`. If the client was closed, an exception lands.
        """
        outcome = (
            None if landing.freshness is NEW else self.known(path, landing.key, landing.freshness)
        )
        if outcome is not None:
            landing.hand_on(outcome)
            return
        place = path, landing.key.digest
        self._join(
            place,
            landing.key,
            landing,
            self._patience(place, landing.freshness, landing.began, deadline),
            flow,
        )

    # --- pools

    @property
    def are_under_way(self) -> bool:
        """Whether any call or pool is under way."""
        return bool(self._under_way or self._pools)

    @property
    def counts_accounts(self) -> bool:
        """Whether the keys of a declared account share its tokens."""
        return self._dispatcher.counts_accounts

    def is_asked(self, path: str, key: ApiKey) -> bool:
        """Whether a call for this key is under way, or waits for its turn in a pool."""
        return (path, key.digest) in self._under_way or self._waiting_in(
            path, key.digest
        ) is not None

    def enter_pool(self, pool: Pool) -> None:
        """Queue the keys of a check."""
        self._pools.append(pool)
        self._dispatcher.enter_pool(pool.path, pool)

    def leave_pool(self, pool: Pool, landings: Iterable[FanOutWaiter] = ()) -> None:
        """Give up the keys that still wait for their turn, and these waiters.

        Calls with other waiters continue.
        """
        if pool not in self._pools:  # the client was closed
            return
        self._pools.remove(pool)
        self._dispatcher.leave_pool(pool.path, pool)
        for landing in landings:
            landing.give_up()
        early, pool.early = pool.early, {}
        for call in early.values():
            call.early = None
        self._enter(deque(early.values()))

    def _enter(self, calls: deque[SharedCall]) -> None:
        """Queue calls whose pool has gone and that others await, a slice at a time."""
        for _ in range(min(_FEW, len(calls))):
            call = calls.popleft()
            if self._is_under_way(call):
                self._dispatcher.enter(call)
        if calls:
            asyncio.get_running_loop().call_soon(self._enter, calls)

    def take_turn(
        self,
        path: str,
        landing: FanOutWaiter,
        patience: WaitTerms,
        flow: Flow,
        context: contextvars.Context,
    ) -> SharedCall:
        """Open the call of a key of a pool.

        No other caller has asked about the key yet, or its number would have been found.
        """
        key = landing.key
        place = path, key.digest
        if landing.freshness.if_error:
            patience = self._patience(place, landing.freshness, patience.began, patience.deadline)
        call = landing.call = self._open(place, key, landing, patience, flow=flow, context=context)
        call.entered = patience.began
        return call

    def heard_since(self, path: str, key: ApiKey, began: float) -> Outcome[Any] | None:
        """The outcome with a balance that arrived since `began`, or None."""
        kept = self._answers.find((path, key.digest))
        return None if kept is None else kept.heard_since(began)

    def hopeless(self, path: str, keys: Sequence[ApiKey], deadline: float) -> list[int]:
        """Numbers of the keys for which certainly no request starts before the deadline."""
        return self._dispatcher.hopeless(path, keys, deadline, _now())

    def too_late(
        self, path: str, key: ApiKey, freshness: CachePolicy, began: float
    ) -> Outcome[Any]:
        """The outcome of a key that had no turn before its deadline."""
        now = _now()
        outcome = _failure(
            key, _late_turn(key, self._dispatcher.earliest_of(path, key, now) - began)
        )
        kept = self._answers.find((path, key.digest)) if freshness.if_error else None
        instead = None if kept is None else kept.instead_of(outcome, freshness, began, now)
        return outcome if instead is None else outcome_for(key, instead)

    def _waiting_in(self, path: str, digest: bytes) -> tuple[Pool, int] | None:
        """The pool in which a secret waits for its turn, and its number there; or None."""
        for pool in self._pools:
            number = pool.number_of(digest) if pool.path == path else None
            if number is not None:
                return pool, number
        return None

    def _begin_early(self, place: CacheKey) -> SharedCall | None:
        """Make the call of a key that waits in a pool, because another caller asks about it too.

        The call waits in the pool. None if no pool has the key.
        """
        found = self._waiting_in(*place)
        if found is None:
            return None
        pool, number = found
        call = pool.make(number)
        call.early, pool.early[number] = found, call
        return call

    def _leave_early(self, call: SharedCall) -> None:
        """Take a call out of the pool in which it waits."""
        if call.early is not None:
            pool, number = call.early
            call.early = None
            del pool.early[number]
            pool.take_out(number)

    def given(
        self,
        call: SharedCall,
        key: ApiKey,
        outcome: Outcome[Any],
        freshness: CachePolicy,
        began: float,
    ) -> Outcome[Any]:
        """The outcome for a caller that asked for `key`, under its name; a stale one if allowed.

        Stale-if-error allows it while the API is down.
        """
        if isinstance(outcome, Unknown) and freshness.if_error:
            kept = self._answers.find(call.place)
            outcome = (kept and kept.instead_of(outcome, freshness, began, _now())) or outcome
        return outcome if outcome.key is key else outcome_for(key, outcome)

    async def close(self) -> None:
        """End all calls, with `ClientClosedError` for the waiters, and wait for their end."""
        self._dispatcher.stop()
        for pool in self._pools:
            self._dispatcher.leave_pool(pool.path, pool)
            pool.early.clear()
        self._pools.clear()
        for call in [*self._under_way.values(), *self._outdated]:
            call.early = None
            self._settle(call, _failure(call.api_key, closed_error()))
            self._end(call)
        self._deadlines.close()
        await asyncio.gather(*self._dropped, return_exceptions=True)

    def invalidate(self, key: ApiKey | None) -> None:
        """Drop the cache entries of `key`, or of all keys.

        A request on the wire still answers its own waiters, and no later ones.
        """
        digest = None if key is None else key.digest
        self._answers.forget(digest)
        for place, call in list(self._under_way.items()):
            if call.task is not None and digest in {None, place[1]}:
                self._outdated.add(self._under_way.pop(place))
                self._answers.given_up(place)

    def refuse_hopeless(self, call: SharedCall) -> None:
        """End the waiters with a deadline before the next attempt of `call` can start."""
        patient = [
            (waiter, patience.deadline)
            for waiter, patience in call.waiters.items()
            if patience.deadline < math.inf
        ]
        if not patient:
            return
        earliest = self._dispatcher.earliest(call, _now())
        for waiter, deadline in patient:
            if deadline < earliest:
                self._time_out(call, waiter)

    def refuse_all(self, call: SharedCall) -> None:
        """End all waiters: their deadlines come before an answer could."""
        for waiter in tuple(call.waiters):
            self._time_out(call, waiter)
        if self._is_under_way(call) and call.task is None:
            # A waiter that was cancelled in this very iteration of the loop has not left yet.
            call.waiters.clear()
            call.wanted = False
            self._drop(call)

    # --- waiters

    def _patience(
        self, place: CacheKey, freshness: CachePolicy, began: float, deadline: float
    ) -> WaitTerms:
        kept = self._answers.find(place) if freshness.if_error else None
        return WaitTerms(began, deadline, kept is not None and kept.may_stand_in(freshness, began))

    def _open(
        self,
        place: CacheKey,
        key: ApiKey,
        waiter: Waiter,
        patience: WaitTerms,
        *,
        flow: Flow,
        context: contextvars.Context,
    ) -> SharedCall:
        """Make a new call, with its first waiter."""
        account = self._dispatcher.account_of(key)
        call = self._under_way[place] = SharedCall(
            self, place, key, account=account, flow=flow, context=context
        )
        call.first = waiter
        call.waiters[waiter] = patience
        if patience.deadline < math.inf:
            call.deadline = patience.deadline
            self._deadlines.add(patience.deadline, call, waiter)
        return call

    def _join(
        self, place: CacheKey, key: ApiKey, waiter: Waiter, patience: WaitTerms, flow: Flow
    ) -> SharedCall:
        call = self._under_way.get(place)
        if call is None and self._pools:
            call = self._begin_early(place)
        if call is None:
            call = self._open(
                place, key, waiter, patience, flow=flow, context=contextvars.copy_context()
            )
            if isinstance(waiter, FanOutWaiter):
                waiter.call = call
            self._dispatcher.enter(call)
        else:
            deadline = patience.deadline
            call.deadline = max(call.deadline, deadline) if call.waiters else deadline
            call.waiters[waiter] = patience
            if isinstance(waiter, FanOutWaiter):
                waiter.call = call
            if patience.deadline < math.inf:
                self._deadlines.add(patience.deadline, call, waiter)
            if call.early is not None and flow.kind < call.flow.kind:
                self._leave_early(call)
                call.flow = flow
                self._dispatcher.enter(call)
            elif flow.kind < call.flow.kind or not call.wanted:
                self._dispatcher.move(call, flow)
        if (
            patience.deadline < math.inf
            and not patience.began
            < patience.deadline
            >= self._dispatcher.earliest(call, patience.began)
        ):
            self._time_out(call, waiter)
        return call

    def _time_out(self, call: SharedCall, waiter: Waiter) -> None:
        patience = call.waiters.get(waiter)
        if patience is None or waiter.done():
            return
        waiter.set_result(
            _failure(
                call.api_key, _why_late(call, patience, self._dispatcher.earliest(call, _now()))
            )
        )
        self.leave(call, waiter)

    def leave(self, call: SharedCall, waiter: Waiter) -> None:
        """Remove a waiter that gives up its call."""
        call.waiters.pop(waiter, None)
        if call.waiters:
            call.deadline = max(patience.deadline for patience in call.waiters.values())
            return
        if not self._is_under_way(call):
            return
        call.wanted = False
        if call.task is None:
            self._drop(call)

    def _is_under_way(self, call: SharedCall) -> bool:
        return self._under_way.get(call.place) is call or call in self._outdated

    def _remove(self, call: SharedCall) -> None:
        if call in self._outdated:
            self._outdated.remove(call)
        else:
            del self._under_way[call.place]

    def _drop(self, call: SharedCall) -> None:
        self._leave_early(call)
        self._remove(call)
        self._answers.given_up(call.place)
        self._end(call)

    def _end(self, call: SharedCall) -> None:
        if call.task is None:
            self._dispatcher.leave(call)
            return
        self._dropped.add(call.task)
        call.task.add_done_callback(self._dropped.discard)
        call.task.cancel()

    # --- one call

    def end(self, call: SharedCall, result: Balance | CrustCreditsError) -> None:
        """End a call: cache its result, and pass it to the waiters.

        Does nothing if the call was given up meanwhile.
        """
        is_joined = self._under_way.get(call.place) is call
        if not is_joined and call not in self._outdated:
            return
        if isinstance(result, Balance):
            outcome: Outcome[Any] = Known(balance=result, attempts=call.attempts)
        else:
            result.attempts = call.attempts
            outcome = _failure(call.api_key, result)
        evicted = self._keep(call, outcome) if is_joined else None
        self._settle(call, outcome)
        if evicted is not None:
            self._forget(evicted)

    def _keep(self, call: SharedCall, outcome: Outcome[Any]) -> CacheKey | None:
        """Cache the outcome of a call. Returns the cache key that was evicted for it, if any."""
        if isinstance(outcome, Known):
            return self._answers.succeeded(call.place, outcome.balance, _now())
        kept = self._answers.keeps(call.place)
        evicted = self._answers.failed(call.place, outcome, _now())
        # No caller sees this error. A refresh that the circuit breaker refuses is logged once for
        # all keys.
        if call.is_refresh and call.attempts and kept and self._answers.has_just_failed(call.place):
            _log.warning("%s; the cached balance could not be refreshed", outcome.error)
        return evicted

    def _forget(self, place: CacheKey) -> None:
        """Drop the call of an evicted cache entry, if it only refreshes and is not on the wire."""
        call = self._under_way.get(place)
        if call is not None and not (call.wanted or call.task is not None):
            self._drop(call)

    def _settle(self, call: SharedCall, outcome: Outcome[Any]) -> None:
        """End the call, with this outcome for every waiter."""
        self._remove(call)
        shared: Outcome[Any] | None = None
        for waiter in call.waiters:
            if waiter.done():  # given up in this iteration of the loop
                continue
            if waiter is call.first:
                waiter.set_result(outcome)
            else:
                shared = shared or _shared(outcome)
                waiter.set_result(shared)

    def break_off(self, call: SharedCall, error: BaseException | None) -> None:
        """End the waiters of a call that was cancelled from outside or failed unexpectedly."""
        if not self._is_under_way(call):
            return
        self._remove(call)
        self._answers.given_up(call.place)
        for waiter in [waiter for waiter in call.waiters if not waiter.done()]:
            if error is None:
                waiter.cancel()
            else:
                waiter.set_exception(error)


def closed_error() -> ClientClosedError:
    """The error of calls that wait, or begin, when the client is closed."""
    return ClientClosedError("this client is closed; make a new one")


def _shared(outcome: Outcome[Any]) -> Outcome[Any]:
    """The same outcome, for the waiters that joined the call.

    The source `"none"` stays: no request was sent.
    """
    return outcome if outcome.source == "none" else attrs.evolve(outcome, source="shared")


def _failure(key: ApiKey | UnusableKey, error: CrustCreditsError) -> Unknown:
    source: Source = "fetched" if error.attempts else "none"
    return Unknown(
        key=key, error=error, checked_at=datetime.now(UTC), attempts=error.attempts, source=source
    )


def _why_late(call: SharedCall, patience: WaitTerms, earliest: float) -> CrustCreditsError:
    """The error of a waiter past its deadline: the reason why it had no answer."""
    if call.task is not None:
        seconds = patience.deadline - patience.began
        return APITimeoutError(
            f"no whole answer within {seconds:.3g} s",
            key_name=call.api_key.label,
            attempts=call.attempts,
        )
    if call.last is not None:
        last = copy.copy(call.last)
        last.attempts = call.attempts
        return last
    return _late_turn(call.api_key, max(earliest, patience.deadline) - patience.began)


def _late_turn(key: ApiKey, wait: float) -> RateLimitWaitError:
    return RateLimitWaitError(
        "deadline too short: the rate limit, or requests without an answer, would delay this "
        f"request by at least {wait:.1f} s; raise timeout= or check fewer keys at once",
        key_name=key.label,
        wait=wait,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
