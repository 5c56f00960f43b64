"""`SingleFlight`: one call at a time for each key and endpoint, shared by all who ask; and what came of it, kept for who asks next.

A call belongs to nobody who asks. Whoever does has a waiter, with a deadline of his own, and may
leave; when the last one has left, a call that waits is dropped, and one on the wire goes on and is
kept. How the API is asked is `_cache.dispatcher`'s.
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


# Deadlines that one turn of the loop looks at, and entries below which the ended ones are not
# cleared away.
_FEW = 1_000


class Waiter(Protocol):
    """Who waits for a call: a future, or a key of a fan-out."""

    def done(self) -> bool: ...
    def set_result(self, result: Outcome[Any], /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...
    def cancel(self) -> object: ...


class WaitTerms(NamedTuple):
    """Since when one has waited, and until when, in the loop's time.

    And whether an older answer may stand in for him.
    """

    began: float
    deadline: float
    falls_back: bool


class SharedCall(ApiCall):
    """One call under way, and who waits for it."""

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
        self.first: Waiter | None = None  # of whoever began it
        self.waiters: dict[Waiter, WaitTerms] = {}
        self.early: tuple[Pool, int] | None = (
            None  # the pool in which it waits for its turn, and its number there
        )

    @property
    def is_refresh(self) -> bool:
        """Whether it only renews a kept answer, for nobody."""
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
    """The waiter of one key of a fan-out: what comes of its call is handed on at once, without a task that waits for it.

    Attributes:
        key: The key that is asked about.
        freshness: How old its answer may be.
        began: Since when it has waited, in the loop's time.
        call: Its call, once it has one.
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
            # In the next turn, as a future would: an answer that comes in this very turn is kept by
            # then.
            asyncio.get_running_loop().call_soon(self._stand_in, result, self._land)
            self._land = None
        else:
            self.hand_on(outcome_for(self.key, result))

    def set_exception(self, exception: BaseException, /) -> None:
        self.hand_on(exception)

    def cancel(self) -> None:
        self.hand_on(asyncio.CancelledError())

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        assert self.call is not None, "what has not landed has a call"
        self._calls.leave(self.call, self)

    def hand_on(self, landed: Outcome[Any] | BaseException) -> None:
        """It has landed."""
        land, self._land = self._land, None
        assert land is not None, "one thing lands"
        land(landed)

    def _stand_in(self, result: Unknown, land: Land) -> None:
        assert self.call is not None
        land(self._calls.given(self.call, self.key, result, self.freshness, self.began))


class Pool(PoolFlow):
    """Keys of one check whose turn has not come.

    Attributes:
        path: The endpoint.
        early: SingleFlight of numbers that wait, made because others ask for their keys too.
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
        """The call of a number."""

    @abstractmethod
    def number_of(self, digest: bytes) -> int | None:
        """The number of this secret, if it is among those that wait."""


class _Deadlines:
    """When the time of each who waits is over: one timer for all of them."""

    def __init__(self, time_out: Callable[[SharedCall, Waiter], None]) -> None:
        self._time_out = time_out
        self._heap: list[tuple[float, int, SharedCall, Waiter]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.Handle | None = None
        self._due = math.inf  # when it runs; uvloop's handles do not tell
        self._room = _FEW

    def add(self, deadline: float, call: SharedCall, waiter: Waiter) -> None:
        """One waits until then."""
        if len(self._heap) >= self._room:
            self._purge()
        heapq.heappush(self._heap, (deadline, next(self._numbers), call, waiter))
        if deadline < self._due:
            self._set_timer()

    def close(self) -> None:
        """Nobody waits any more."""
        self._heap.clear()
        self._set_timer()

    def _purge(self) -> None:
        """Forget those whose wait is over.

        So that long deadlines keep no more than twice as many as wait.
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
        for _ in range(
            _FEW
        ):  # the rest in the next turn of the loop, so that other tasks run meanwhile
            if not self._heap or not (self._heap[0][0] <= now or self._heap[0][3].done()):
                break
            _, _, call, waiter = heapq.heappop(self._heap)
            self._time_out(call, waiter)
        self._timer = None
        self._set_timer()


class SingleFlight:
    """The calls under way, and the answers that are kept."""

    def __init__(self, dispatcher: Dispatcher, answers: BalanceCache) -> None:
        self._dispatcher = dispatcher
        self._answers = answers
        self._under_way: dict[CacheKey, SharedCall] = {}
        self._outdated: set[SharedCall] = (
            set()
        )  # on the wire when their answers were declared invalid; joined by nobody
        self._dropped: set[asyncio.Task[Any]] = set()
        self._pools: list[Pool] = []
        self._deadlines = _Deadlines(self._time_out)

    def known(
        self, path: str, key: ApiKey | UnusableKey, freshness: CachePolicy
    ) -> Outcome[Any] | None:
        """A kept answer that is young enough, or None. A stale one is refreshed behind it."""
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
            # It is no request's own, so it keeps none's context alive.
            account, flow = self._dispatcher.account_of(key), self._dispatcher.refreshes
            call = self._under_way[place] = SharedCall(
                self, place, key, account=account, flow=flow, context=contextvars.Context()
            )
            self._dispatcher.enter(call)
        return outcome if outcome.key is key else outcome_for(key, outcome)

    def last(self, path: str, key: ApiKey, freshness: CachePolicy) -> Outcome[Any] | None:
        """What was heard last of `key`, however long ago, or None."""
        kept = self._answers.find((path, key.digest))
        outcome = None if kept is None else kept.last(freshness, _now())
        return None if outcome is None else outcome_for(key, outcome)

    async def ask(
        self, path: str, key: ApiKey | UnusableKey, freshness: CachePolicy, deadline: float | None
    ) -> Outcome[Any]:
        """The outcome of one call for `key`: of one under way, else of a new one.

        Without an answer in time its error says why.
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
        """The same for a key of a fan-out, without a task: the outcome lands, at once or later.

        A new call waits for its turn in `flow`. What lands is an exception where the client was
        closed.
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
        """Whether there are any."""
        return bool(self._under_way or self._pools)

    @property
    def counts_accounts(self) -> bool:
        """Whether a declared account's keys share its tokens."""
        return self._dispatcher.counts_accounts

    def is_asked(self, path: str, key: ApiKey) -> bool:
        """Whether a call for this key is under way, or waits for its turn as a number."""
        return (path, key.digest) in self._under_way or self._waiting_in(
            path, key.digest
        ) is not None

    def enter_pool(self, pool: Pool) -> None:
        """The keys of a check wait for their turn from now on."""
        self._pools.append(pool)
        self._dispatcher.enter_pool(pool.path, pool)

    def leave_pool(self, pool: Pool, landings: Iterable[FanOutWaiter] = ()) -> None:
        """Give up the keys whose turn has not come, and these of its calls.

        SingleFlight that others await go on.
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
            self._dispatcher.enter(call)

    def take_turn(
        self,
        path: str,
        landing: FanOutWaiter,
        patience: WaitTerms,
        flow: Flow,
        context: contextvars.Context,
    ) -> SharedCall:
        """The call of a key of a pool.

        Nobody has asked for it yet, or the number of the key would have been found.
        """
        key = landing.key
        place = path, key.digest
        if landing.freshness.if_error:
            patience = self._patience(place, landing.freshness, patience.began, patience.deadline)
        call = landing.call = self._open(place, key, landing, patience, flow=flow, context=context)
        call.entered = patience.began
        return call

    def heard_since(self, path: str, key: ApiKey, began: float) -> Outcome[Any] | None:
        """A balance that came since then, or None."""
        kept = self._answers.find((path, key.digest))
        return None if kept is None else kept.heard_since(began)

    def hopeless(self, path: str, keys: Sequence[ApiKey], deadline: float) -> list[int]:
        """Those of these keys, by number, for which certainly no request starts before the deadline."""
        return self._dispatcher.hopeless(path, keys, deadline, _now())

    def too_late(
        self, path: str, key: ApiKey, freshness: CachePolicy, began: float
    ) -> Outcome[Any]:
        """The outcome of a key whose turn did not come before its deadline."""
        now = _now()
        outcome = _failure(
            key, _late_turn(key, self._dispatcher.earliest_of(path, key, now) - began)
        )
        kept = self._answers.find((path, key.digest)) if freshness.if_error else None
        instead = None if kept is None else kept.instead_of(outcome, freshness, began, now)
        return outcome if instead is None else outcome_for(key, instead)

    def _waiting_in(self, path: str, digest: bytes) -> tuple[Pool, int] | None:
        """The pool in which a secret waits for its turn, and its number there."""
        for pool in self._pools:
            number = pool.number_of(digest) if pool.path == path else None
            if number is not None:
                return pool, number
        return None

    def _begin_early(self, place: CacheKey) -> SharedCall | None:
        """The call for a key that waits in a pool, now that somebody else asks too.

        It waits there.
        """
        found = self._waiting_in(*place)
        if found is None:
            return None
        pool, number = found
        call = pool.make(number)
        call.early, pool.early[number] = found, call
        return call

    def _leave_early(self, call: SharedCall) -> None:
        """A call waits in its pool no more."""
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
        """What one who asked for `key` is given: under that name, and while the API is down perhaps an older answer."""
        if isinstance(outcome, Unknown) and freshness.if_error:
            kept = self._answers.find(call.place)
            outcome = (kept and kept.instead_of(outcome, freshness, began, _now())) or outcome
        return outcome if outcome.key is key else outcome_for(key, outcome)

    async def close(self) -> None:
        """End all calls, with `ClientClosedError` for those who wait, and return when they have ended."""
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
        """Drop what is kept of `key`, or of all keys.

        A request on the wire still answers those who wait, and nobody else.
        """
        digest = None if key is None else key.digest
        self._answers.forget(digest)
        for place, call in list(self._under_way.items()):
            if call.task is not None and digest in {None, place[1]}:
                self._outdated.add(self._under_way.pop(place))
                self._answers.given_up(place)

    def refuse_hopeless(self, call: SharedCall) -> None:
        """Send away those whose deadline is before the next attempt of `call` can start."""
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
        """Send away all waiters: their time is over before an answer could come."""
        for waiter in tuple(call.waiters):
            self._time_out(call, waiter)

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
        """A new call, with its first waiter."""
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
            call.waiters[waiter] = patience
            call.deadline = max(call.deadline, patience.deadline)
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
        """One who waits for a call gives up."""
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
        """A call has ended: keep what came of it, and tell those who wait.

        Nothing, if it was given up meanwhile.
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
        """Keep what came of a call. Returns the place whose answer had to go for it, if any."""
        if isinstance(outcome, Known):
            return self._answers.succeeded(call.place, outcome.balance, _now())
        kept = self._answers.keeps(call.place)
        evicted = self._answers.failed(call.place, outcome, _now())
        # Nobody is told otherwise. What was not sent, because a gateway answers, is told once for
        # all keys.
        if call.is_refresh and call.attempts and kept and self._answers.has_just_failed(call.place):
            _log.warning("%s; its kept answer could not be refreshed", outcome.error)
        return evicted

    def _forget(self, place: CacheKey) -> None:
        """Its answer is no longer kept, so what only refreshes it can go."""
        call = self._under_way.get(place)
        if call is not None and not (call.wanted or call.task is not None):
            self._drop(call)

    def _settle(self, call: SharedCall, outcome: Outcome[Any]) -> None:
        """End the call, with this outcome for all who wait."""
        self._remove(call)
        shared: Outcome[Any] | None = None
        for waiter in call.waiters:
            if waiter.done():  # given up in this very turn of the loop
                continue
            if waiter is call.first:
                waiter.set_result(outcome)
            else:
                shared = shared or _shared(outcome)
                waiter.set_result(shared)

    def break_off(self, call: SharedCall, error: BaseException | None) -> None:
        """Nobody may be left waiting for a call that was cancelled from outside, or has failed as it never should."""
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
    """What those are told who wait for, or begin, a call of a client that was closed."""
    return ClientClosedError("this client is closed; make a new one")


def _shared(outcome: Outcome[Any]) -> Outcome[Any]:
    """The same outcome, for those who did not begin the call.

    `"none"` stays: no request was sent for anybody.
    """
    return outcome if outcome.source == "none" else attrs.evolve(outcome, source="shared")


def _failure(key: ApiKey | UnusableKey, error: CrustCreditsError) -> Unknown:
    source: Source = "fetched" if error.attempts else "none"
    return Unknown(
        key=key, error=error, checked_at=datetime.now(UTC), attempts=error.attempts, source=source
    )


def _why_late(call: SharedCall, patience: WaitTerms, earliest: float) -> CrustCreditsError:
    """The error of one whose time is over: what kept him waiting."""
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
    return _late_turn(call.api_key, earliest - patience.began)


def _late_turn(key: ApiKey, wait: float) -> RateLimitWaitError:
    return RateLimitWaitError(
        "deadline too short: the rate limit, or requests without an answer, hold this "
        "request back for at least "
        f"{wait:.1f} s; raise timeout= or check fewer keys at once",
        key_name=key.label,
        wait=wait,
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
