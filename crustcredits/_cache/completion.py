"""`Completion`: the end of a call, for the cache and for its waiters."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from crustcredits._cache.answer_store import JOIN, StoredAnswer
from crustcredits._cache.cache_entry import CacheEntry
from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.outcomes import closed_error, failure, shared
from crustcredits._cache.policy import CachePolicy
from crustcredits._cache.pools import Pools
from crustcredits._cache.shared_call import SharedCall
from crustcredits._cache.store import BalanceCache, CacheKey
from crustcredits._cache.under_way import UnderWay
from crustcredits._errors import CrustCreditsError
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance, Known, Outcome, Unknown

_log = logging.getLogger("crustcredits")


class Completion:
    """Ends calls: with a result, without one, or because no caller waits any more.

    Args:
        under_way: The calls that have not ended.
        pools: The pools in which calls may wait for their turn.
        dispatcher: Sends no request for a call that has ended.
        cache: Gets the results.
        refresh: Begins a refresh of a cache entry.
    """

    def __init__(
        self,
        under_way: UnderWay,
        pools: Pools,
        dispatcher: Dispatcher,
        cache: BalanceCache,
        refresh: Callable[[CacheKey, ApiKey, CachePolicy], None],
    ) -> None:
        self._under_way = under_way
        self._pools = pools
        self._dispatcher = dispatcher
        self._cache = cache
        self._refresh = refresh
        self._cancelled: set[asyncio.Task[Any]] = set()  # requests whose end is awaited

    # --- with a result

    def end(self, call: SharedCall, result: Balance | CrustCreditsError) -> None:
        """End a call: cache its result, and pass it to the waiters.

        Does nothing if the call has ended before.
        """
        is_joinable = self._under_way.find(call.cache_key) is call
        if not is_joinable and call not in self._under_way:
            return
        if isinstance(result, Balance):
            outcome: Outcome[Any] = Known(balance=result, attempts=call.attempts)
        else:
            result.attempts = call.attempts
            outcome = failure(call.api_key, result)
        evicted = self._record(call, outcome) if is_joinable else None
        self._pass_on(call, outcome)
        call.release_references()
        if evicted is not None:
            self._drop_refresh_of(evicted)

    def end_stored(self, call: SharedCall, answer: StoredAnswer) -> bool:
        """Cache an answer of another process, and end a call for which it is young enough.

        A stale balance ends it where stale-while-revalidate allows that, and is refreshed. Returns
        whether the call has ended.
        """
        result = self._dispatcher.endpoints[call.path].read_stored(call, answer)
        now = asyncio.get_running_loop().time()
        age, policy = now - answer.began, call.policy
        evicted: CacheKey | None = None
        entry: CacheEntry | None = None
        outcome: Outcome[Any] | None = None
        joins = call.is_parked and answer.began >= call.entered - JOIN
        if result is None or self._cache.has_newer(call.cache_key, age, now):
            return False
        if isinstance(result, Balance):
            evicted = self._cache.succeeded(call.cache_key, result, now, age=age)
            entry = self._cache.find(call.cache_key)
            cached = None if entry is None else entry.answer(policy, now)
            if joins or (cached is not None and not cached.stale and cached.error is None):
                outcome = Known(balance=result, attempts=0, source="shared")
            elif policy.is_stale_while_revalidate(age):
                outcome = cached
        elif joins or age < policy.error_age:
            unknown = Unknown(
                key=call.api_key,
                error=result,
                checked_at=datetime.now(UTC) - timedelta(seconds=age),
                source="shared",
            )
            evicted = self._cache.failed(call.cache_key, unknown, now, age=age)
            outcome = unknown
        if outcome is not None:
            self._pass_on(call, outcome)
            if entry is not None and outcome.stale and entry.claim_refresh(call.cache_key[1], now):
                self._refresh(call.cache_key, call.api_key, policy)
            call.release_references()
        if evicted is not None:
            self._drop_refresh_of(evicted)
        return outcome is not None

    def _record(self, call: SharedCall, outcome: Outcome[Any]) -> CacheKey | None:
        """Cache the outcome of a call. Returns the cache key that was evicted for it, if any."""
        now = asyncio.get_running_loop().time()
        if isinstance(outcome, Known):
            return self._cache.succeeded(call.cache_key, outcome.balance, now)
        had_balance = self._cache.has_balance(call.cache_key)
        evicted = self._cache.failed(call.cache_key, outcome, now)
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

    def _pass_on(self, call: SharedCall, outcome: Outcome[Any]) -> None:
        """Forget a call, and pass the outcome to every waiter."""
        self._under_way.remove(call)
        self._dispatcher.sharing.end(call)
        for_others: Outcome[Any] | None = None
        for waiter in call.waiters:
            if waiter.done():  # given up in this iteration of the loop
                continue
            try:
                if waiter is call.first:
                    waiter.set_result(outcome)
                    continue
                for_others = for_others or shared(outcome)
                waiter.set_result(for_others)
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
        call = self._under_way.find(cache_key)
        if call is not None and not (call.is_foreground or call.task is not None):
            self.drop(call)

    # --- without a result

    def break_off(self, call: SharedCall, error: BaseException | None) -> None:
        """End the waiters of a call that was cancelled from outside or failed unexpectedly."""
        if call not in self._under_way:
            return
        self._forget(call)
        for waiter in [waiter for waiter in call.waiters if not waiter.done()]:
            if error is None:
                waiter.cancel()
            else:
                waiter.set_exception(error)
        call.release_references()

    def drop(self, call: SharedCall) -> None:
        """End a call without waiters before its request is on the wire."""
        self._pools.leave_early(call)
        self._forget(call)
        self._dispatcher.leave(call)
        call.release_references()

    def _forget(self, call: SharedCall) -> None:
        """Forget a call without a result, so that another refresh may test the endpoint."""
        self._dispatcher.sharing.end(call)
        if self._under_way.remove(call):
            self._cache.ended_without_result(call.cache_key)

    # --- when the client is closed

    def end_closed(self, call: SharedCall) -> None:
        """End a call because the client is closed."""
        self._pass_on(call, failure(call.api_key, closed_error()))
        if call.task is None:
            self._dispatcher.leave(call)
            return
        self._cancelled.add(call.task)
        call.task.add_done_callback(self._cancelled.discard)
        call.task.cancel()

    async def requests_ended(self) -> None:
        """Wait for the end of the cancelled requests."""
        await asyncio.gather(*self._cancelled, return_exceptions=True)
