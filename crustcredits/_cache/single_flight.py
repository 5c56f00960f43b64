"""`SingleFlight`: one shared call at a time for each key and endpoint.

A call belongs to the client, not to a caller. Each caller has a waiter with its own deadline, and
may leave. When the last waiter has left, a call that waits is dropped; a call on the wire is
finished and its answer cached. `_cache.dispatcher` sends the requests.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, KeysView
from contextlib import suppress
from typing import Any

from crustcredits._cache.deadlines import Deadlines
from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.outcomes import (
    closed_error,
    failure,
    last_error,
    late_error,
    overload_error,
    shared,
    timeout_error,
)
from crustcredits._cache.pools import Pools
from crustcredits._cache.shared_call import Pool, SharedCall, Waiter, WaitTerms
from crustcredits._cache.store import BalanceCache, CacheKey
from crustcredits._errors import CrustCreditsError
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance, Known, Outcome
from crustcredits._ratelimit.fair_queue import Flow

_log = logging.getLogger("crustcredits")

# Calls that one iteration of the loop queues, or ends.
_SLICE = 1_000
# Up to this many remaining waiters, the deadline is computed anew when one leaves.
_FEW = 8


class SingleFlight:
    """The calls under way, their waiters, and the pools whose keys wait for a call.

    The class is long because a call may end at any moment in each of these roles.

    Args:
        dispatcher: Sends the requests.
        cache: Gets the answers.

    Attributes:
        endpoints: The endpoints by their paths.
    """

    def __init__(self, dispatcher: Dispatcher, cache: BalanceCache) -> None:
        self._dispatcher = dispatcher
        self.endpoints = dispatcher.endpoints
        self._cache = cache
        self._under_way: dict[CacheKey, SharedCall] = {}
        # On the wire when their cache entries were invalidated; no new waiter joins them.
        self._outdated: set[SharedCall] = set()
        self._dropped: set[asyncio.Task[Any]] = set()
        self._pools = Pools()
        self._deadlines = Deadlines(self.time_out)

    @property
    def is_idle(self) -> bool:
        """Whether no call and no pool is under way."""
        return not self._under_way and not self._pools

    def is_asked(self, cache_key: CacheKey) -> bool:
        """Whether a call for this key is under way, or waits for its turn in a pool."""
        return cache_key in self._under_way or (bool(self._pools) and self._pools.holds(cache_key))

    def is_on_wire(self, cache_key: CacheKey) -> bool:
        """Whether a request for this key is on the wire, which later callers join."""
        call = self._under_way.get(cache_key)
        return call is not None and call.task is not None

    def asked_among(self, path: str, digests: KeysView[bytes]) -> set[bytes]:
        """The digests among these for which `is_asked` holds."""
        asked = self._pools.holds_among(path, digests) if self._pools else set[bytes]()
        if len(digests) < len(self._under_way):
            asked.update(digest for digest in digests if (path, digest) in self._under_way)
        else:
            asked.update(
                digest for each, digest in self._under_way if each == path and digest in digests
            )
        return asked

    # --- calls

    def join(
        self, cache_key: CacheKey, key: ApiKey, waiter: Waiter, terms: WaitTerms, flow: Flow | None
    ) -> SharedCall:
        """Let a waiter join the call under way for a key, or a new one.

        A new call waits for its turn in `flow`; None means the flow of single calls.
        """
        flow = self._dispatcher.singles if flow is None else flow
        call = self._under_way.get(cache_key)
        if call is None and self._pools:
            call = self._pools.begin_early(cache_key)
        if call is None:
            call = self.open(
                cache_key, key, waiter, terms, flow=flow, context=contextvars.copy_context()
            )
            self._dispatcher.enter(call)
        else:
            call.deadline = max(call.deadline, terms.deadline) if call.waiters else terms.deadline
            self._add(call, waiter, terms)
            moves = flow.kind < call.flow.kind or self._is_sooner_in(flow, call, terms)
            if call.early is not None and moves:
                self._pools.leave_early(call)
                call.flow = flow
                self._dispatcher.enter(call)
            elif moves or not call.is_foreground:
                self._dispatcher.move(call, flow)
        if terms.deadline < math.inf and not (
            terms.began < terms.deadline >= self.endpoints[call.path].earliest(call, terms.began)
        ):
            self.time_out(call, waiter)
        return call

    def _is_sooner_in(self, flow: Flow, call: SharedCall, terms: WaitTerms) -> bool:
        """Whether a call starts sooner at the end of a stream's flow than where it waits.

        A stream with a timeout takes a key that is likely to have its turn in this flow, in time
        for its deadline. Flows of a kind take turns, so fewer calls before a call mean an earlier
        turn.
        """
        is_of_stream = terms.deadline < math.inf and not terms.own_timer
        if flow is call.flow or flow.kind is not call.flow.kind or not is_of_stream:
            return False
        return self.endpoints[call.path].waiting_in(flow) < self._most_before(call, terms)

    def _most_before(self, call: SharedCall, terms: WaitTerms) -> int:
        """At most so many calls start before a call where it waits.

        0 if it must not move: it does not wait for its turn, or another stream or check that has an
        earlier deadline expects its turn there.
        """
        if call.early is not None:
            pool, number = call.early
            return pool.most_before(number)
        endpoint = self.endpoints[call.path]
        if not endpoint.waits_in_turn(call) or len(call.waiters) > _FEW:
            return 0
        if any(each.deadline < terms.deadline for each in call.waiters.values()):
            return 0
        return endpoint.waiting_in(call.flow) - 1

    def open(
        self,
        cache_key: CacheKey,
        key: ApiKey,
        waiter: Waiter,
        terms: WaitTerms,
        *,
        flow: Flow,
        context: contextvars.Context,
    ) -> SharedCall:
        """Make a new call with its first waiter. The caller lets the call enter a queue."""
        call = self._under_way[cache_key] = SharedCall(
            self,
            cache_key,
            key,
            account=self.endpoints[cache_key[0]].account_of(key),
            flow=flow,
            context=context,
        )
        call.first = waiter
        call.deadline = terms.deadline
        self._add(call, waiter, terms)
        return call

    def refresh(self, cache_key: CacheKey, key: ApiKey) -> None:
        """Begin a call without a waiter. It belongs to no caller, and keeps no context alive."""
        call = self._under_way[cache_key] = SharedCall(
            self,
            cache_key,
            key,
            account=self.endpoints[cache_key[0]].account_of(key),
            flow=self._dispatcher.refreshes,
            context=contextvars.Context(),
        )
        self._dispatcher.enter(call)

    def _add(self, call: SharedCall, waiter: Waiter, terms: WaitTerms) -> None:
        call.waiters[waiter] = terms
        if terms.deadline < math.inf and not terms.own_timer:
            self._deadlines.add(terms.deadline, call, waiter)

    def leave(self, call: SharedCall, waiter: Waiter) -> None:
        """Remove a waiter that gives up its call."""
        call.waiters.pop(waiter, None)
        if call.waiters:
            # Of many waiters the deadline stays as it is, so that thousands leave at little cost.
            if len(call.waiters) <= _FEW:
                call.deadline = max(terms.deadline for terms in call.waiters.values())
            return
        if not self._is_under_way(call):
            return
        call.is_foreground = False
        if call.task is None:
            self._drop(call)

    def detach(self, key: ApiKey | None) -> None:
        """Let no later waiter join a request that is on the wire for `key`, or for any key."""
        for cache_key, call in list(self._under_way.items()):
            if call.task is not None and (key is None or key.digest == cache_key[1]):
                self._outdated.add(self._under_way.pop(cache_key))
                self._cache.given_up(cache_key)

    async def close(self) -> None:
        """End all calls, with `ClientClosedError` for the waiters, and wait for their end."""
        self._dispatcher.stop()
        for pool in self._pools.clear():
            self._dispatcher.leave_pool(pool.path, pool)
        calls = [*self._under_way.values(), *self._outdated]
        for number, call in enumerate(calls, start=1):
            if self._is_under_way(call):
                self._settle(call, failure(call.api_key, closed_error()))
                self._withdraw(call)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        self._deadlines.close()
        await asyncio.gather(*self._dropped, return_exceptions=True)

    # --- pools

    def enter_pool(self, pool: Pool) -> None:
        """Queue the keys of a check."""
        self._pools.add(pool)
        self._dispatcher.enter_pool(pool.path, pool)

    def leave_pool(self, pool: Pool, leaving: Iterable[Callable[[], None]] = ()) -> None:
        """Give up the keys that still wait for their turn, and then call these functions.

        Keys that other callers have asked about too go on, each as a call in the queue.
        """
        if not self._pools.remove(pool):
            return
        self._dispatcher.leave_pool(pool.path, pool)
        for leave in leaving:
            leave()
        self._queue_released(deque(self._pools.release_early(pool)))

    def _queue_released(self, calls: deque[SharedCall]) -> None:
        """Queue calls whose pool has gone and that others await, a slice at a time."""
        for _ in range(min(_SLICE, len(calls))):
            call = calls.popleft()
            if self._is_under_way(call):
                self._dispatcher.enter(call)
        if calls:
            asyncio.get_running_loop().call_soon(self._queue_released, calls)

    # --- deadlines

    def time_out_hopeless(self, call: SharedCall) -> None:
        """End the waiters with a deadline before the next attempt of `call` can start."""
        patient = [
            (waiter, terms.deadline)
            for waiter, terms in call.waiters.items()
            if terms.deadline < math.inf
        ]
        if not patient:
            return
        earliest = self.endpoints[call.path].earliest(call, _now())
        for waiter, deadline in patient:
            if deadline < earliest:
                self.time_out(call, waiter)

    def time_out_all(self, call: SharedCall) -> None:
        """End all waiters: their deadlines come before an answer could."""
        for waiter in tuple(call.waiters):
            self.time_out(call, waiter, is_late=True)
        if self._is_under_way(call) and call.task is None:
            # A waiter that was cancelled in this very iteration of the loop has not left yet.
            call.waiters.clear()
            call.is_foreground = False
            self._drop(call)

    def time_out(self, call: SharedCall, waiter: Waiter, *, is_late: bool = False) -> None:
        """End a waiter whose deadline has passed, or certainly passes without an answer.

        With `is_late` its turn has come, with too little time left.
        """
        terms = call.waiters.get(waiter)
        if terms is None or waiter.done():
            return
        waiter.set_result(failure(call.api_key, self._why_late(call, terms, is_late=is_late)))
        self.leave(call, waiter)

    def _why_late(self, call: SharedCall, terms: WaitTerms, *, is_late: bool) -> CrustCreditsError:
        """The error of a waiter past its deadline: the reason why it had no answer."""
        if call.task is not None:
            return timeout_error(call.api_key, terms.deadline - terms.began, call.attempts)
        if call.last is not None:
            return last_error(call.last, call.attempts)
        endpoint = self.endpoints[call.path]
        earliest = endpoint.earliest(call, _now())
        wait = max(earliest, terms.deadline) - terms.began
        if is_late and earliest <= terms.deadline:
            return overload_error(call.api_key, wait)
        return late_error(call.api_key, wait, is_cut_off=endpoint.is_cut_off)

    # --- the end of a call

    def end(self, call: SharedCall, result: Balance | CrustCreditsError) -> None:
        """End a call: cache its result, and pass it to the waiters.

        Does nothing if the call was given up meanwhile.
        """
        is_joined = self._under_way.get(call.cache_key) is call
        if not is_joined and call not in self._outdated:
            return
        if isinstance(result, Balance):
            outcome: Outcome[Any] = Known(balance=result, attempts=call.attempts)
        else:
            result.attempts = call.attempts
            outcome = failure(call.api_key, result)
        evicted = self._record(call, outcome) if is_joined else None
        self._settle(call, outcome)
        call.release_references()
        if evicted is not None:
            self._drop_refresh_of(evicted)

    def break_off(self, call: SharedCall, error: BaseException | None) -> None:
        """End the waiters of a call that was cancelled from outside or failed unexpectedly."""
        if not self._is_under_way(call):
            return
        if self._remove(call):
            self._cache.given_up(call.cache_key)
        for waiter in [waiter for waiter in call.waiters if not waiter.done()]:
            if error is None:
                waiter.cancel()
            else:
                waiter.set_exception(error)
        call.release_references()

    def _record(self, call: SharedCall, outcome: Outcome[Any]) -> CacheKey | None:
        """Cache the outcome of a call. Returns the cache key that was evicted for it, if any."""
        if isinstance(outcome, Known):
            return self._cache.succeeded(call.cache_key, outcome.balance, _now())
        had_balance = self._cache.has_balance(call.cache_key)
        evicted = self._cache.failed(call.cache_key, outcome, _now())
        # No caller sees this error. A refresh that the circuit breaker refuses is logged once for
        # all keys.
        if (
            call.is_refresh
            and call.attempts
            and had_balance
            and self._cache.has_just_failed(call.cache_key)
        ):
            _log.warning(
                "cached balance not refreshed, so callers get an older one: %s", outcome.error
            )
        return evicted

    def _settle(self, call: SharedCall, outcome: Outcome[Any]) -> None:
        """End the call, with this outcome for every waiter."""
        self._remove(call)
        for_others = shared(outcome) if len(call.waiters) > 1 or call.first is None else outcome
        for waiter in call.waiters:
            if waiter.done():  # given up in this iteration of the loop
                continue
            try:
                waiter.set_result(outcome if waiter is call.first else for_others)
            except Exception as error:  # noqa: BLE001  # a defect; the other waiters go on
                _log.error(  # a traceback may hold secrets
                    "%s: an outcome could not be passed on (%s); this is a defect of crustcredits, "
                    "please report it",
                    call.api_key.label,
                    type(error).__name__,
                )
                if not waiter.done():
                    with suppress(Exception):
                        waiter.set_exception(error.with_traceback(None))

    def _drop_refresh_of(self, cache_key: CacheKey) -> None:
        """Drop the call of an evicted cache entry, if it only refreshes and is not on the wire."""
        call = self._under_way.get(cache_key)
        if call is not None and not (call.is_foreground or call.task is not None):
            self._drop(call)

    def _drop(self, call: SharedCall) -> None:
        """End a call without waiters before its request is on the wire."""
        self._pools.leave_early(call)
        if self._remove(call):
            self._cache.given_up(call.cache_key)
        self._withdraw(call)
        call.release_references()

    def _withdraw(self, call: SharedCall) -> None:
        """Take a call out of the queue, or cancel its request."""
        if call.task is None:
            self._dispatcher.leave(call)
            return
        self._dropped.add(call.task)
        call.task.add_done_callback(self._dropped.discard)
        call.task.cancel()

    def _remove(self, call: SharedCall) -> bool:
        """Forget a call under way. Returns whether later callers would have joined it."""
        if call in self._outdated:
            self._outdated.remove(call)
            return False
        del self._under_way[call.cache_key]
        return True

    def _is_under_way(self, call: SharedCall) -> bool:
        return self._under_way.get(call.cache_key) is call or call in self._outdated


def _now() -> float:
    return asyncio.get_running_loop().time()
