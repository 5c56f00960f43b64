"""`SingleFlight`: one shared call at a time for each key and endpoint.

A call belongs to the client, not to a caller. Each caller has a waiter with its own deadline, and
may leave. When the last waiter has left, a call that waits is dropped; a call on the wire is
finished and its answer cached. `under_way` holds the calls, `waiters` their waiters, `promotion`
moves a call to the flow of a waiter, `completion` ends calls, and `dispatcher` sends the requests.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Iterable

from crustcredits._cache.completion import Completion
from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.policy import CachePolicy
from crustcredits._cache.pools import Pools
from crustcredits._cache.promotion import Promotion
from crustcredits._cache.shared_call import Pool, SharedCall, Waiter, WaitTerms
from crustcredits._cache.store import BalanceCache, CacheKey
from crustcredits._cache.under_way import UnderWay
from crustcredits._cache.waiters import Waiters
from crustcredits._keys.api_key import ApiKey
from crustcredits._ratelimit.flow import Flow

# Calls that one iteration of the loop queues, or ends.
_SLICE = 1_000


class SingleFlight:
    """Begins calls and lets callers join them, and queues the pools whose keys wait for a call.

    Args:
        dispatcher: Sends the requests.
        cache: Gets the answers.

    Attributes:
        endpoints: The endpoints by their paths.
        under_way: The calls that have not ended.
        waiters: The waiters of these calls.
    """

    def __init__(self, dispatcher: Dispatcher, cache: BalanceCache) -> None:
        self._dispatcher = dispatcher
        self._cache = cache
        self._pools = Pools()
        self.endpoints = dispatcher.endpoints
        self.under_way = UnderWay(self._pools)
        self._completion = Completion(self.under_way, self._pools, dispatcher, cache, self.refresh)
        self.waiters = Waiters(self.endpoints, self.under_way, self._completion)
        self._promotion = Promotion(dispatcher, self._pools)

    # --- calls

    def join(
        self, cache_key: CacheKey, key: ApiKey, waiter: Waiter, terms: WaitTerms, flow: Flow | None
    ) -> SharedCall:
        """Let a waiter join the call under way for a key, or a new one.

        A new call waits for its turn in `flow`; None means the flow of single calls.
        """
        flow = self._dispatcher.singles if flow is None else flow
        call = self.under_way.find(cache_key)
        if call is None and self._pools:
            call = self._pools.begin_early(cache_key)
        if call is None:
            call = self.open(
                cache_key, key, waiter, terms, flow=flow, context=contextvars.copy_context()
            )
            self._dispatcher.enter(call)
        else:
            self.waiters.add(call, waiter, terms)
            self._dispatcher.sharing.join(call, terms.policy)
            self._promotion.joined(call, flow, terms)
        self.waiters.time_out_if_hopeless(call, waiter, terms)
        return call

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
        call = self._make(cache_key, key, flow, context)
        self.waiters.add_first(call, waiter, terms)
        self._dispatcher.sharing.begin(call, terms.policy)
        return call

    def refresh(self, cache_key: CacheKey, key: ApiKey, policy: CachePolicy) -> None:
        """Begin a call without a waiter, for an answer that is fresh by this policy.

        It belongs to no caller, and keeps no context alive.
        """
        call = self._make(cache_key, key, self._dispatcher.refreshes, contextvars.Context())
        self._dispatcher.sharing.begin(call, policy._replace(revalidate=0.0))
        self._dispatcher.enter(call)

    def _make(
        self, cache_key: CacheKey, key: ApiKey, flow: Flow, context: contextvars.Context
    ) -> SharedCall:
        call = SharedCall(
            self.waiters,
            self._completion,
            cache_key,
            key,
            account=self.endpoints[cache_key[0]].account_of(key),
            flow=flow,
            context=context,
        )
        self.under_way.add(call)
        return call

    def may_find(self, policy: CachePolicy) -> bool:
        """Whether another process may have an answer that this policy accepts."""
        return self._dispatcher.sharing.is_on and policy.max_age > 0

    def invalidate(self, key: ApiKey | None) -> None:
        """Let no process find an answer that was asked for before now."""
        self._dispatcher.sharing.invalidate(key)

    def detach(self, key: ApiKey | None) -> None:
        """Let no later waiter join a request that is on the wire for `key`, or for any key."""
        for cache_key in self.under_way.outdate(None if key is None else key.digest):
            self._cache.ended_without_result(cache_key)

    async def close(self) -> None:
        """End all calls, with `ClientClosedError` for the waiters, and wait for their end."""
        self._dispatcher.stop()
        for pool in self._pools.clear():
            self._dispatcher.leave_pool(pool.path, pool)
        for number, call in enumerate(self.under_way.all(), start=1):
            if call in self.under_way:
                self._completion.end_closed(call)
            if number % _SLICE == 0:
                await asyncio.sleep(0)
        self.waiters.close()
        await self._completion.requests_ended()

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
            if call in self.under_way:
                self._dispatcher.enter(call)
        if calls:
            asyncio.get_running_loop().call_soon(self._queue_released, calls)
