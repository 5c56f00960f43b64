"""`Lookup`: the answer for a key, from the cache where its age allows it, else from a call."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from crustcredits._cache.outcomes import failure, late_error
from crustcredits._cache.policy import NEW, CachePolicy
from crustcredits._cache.shared_call import SharedCall, WaitTerms
from crustcredits._cache.single_flight import SingleFlight
from crustcredits._cache.store import BalanceCache, CacheKey
from crustcredits._errors import ClientClosedError
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Outcome, Unknown, outcome_for
from crustcredits._ratelimit.flow import Flow

Land: TypeAlias = Callable[[Outcome[Any] | BaseException], None]


class FanOutWaiter:
    """The waiter of one key of a fan-out: its outcome is passed on at once, without a task.

    Args:
        lookup: Replaces an error by a stale answer where that is allowed.
        key: The key that is asked about.
        policy: How old its answer may be.
        began: When the wait began, in seconds of the loop's clock.
        land: Called once, with the outcome or an exception.

    Attributes:
        key: The key.
        policy: How old its answer may be.
        began: When the wait began.
        call: The call of the key, once there is one.
    """

    __slots__ = ("_land", "_lookup", "began", "call", "key", "policy")

    def __init__(
        self, lookup: Lookup, key: ApiKey, policy: CachePolicy, began: float, land: Land
    ) -> None:
        self.key = key
        self.policy = policy
        self.began = began
        self.call: SharedCall | None = None
        self._lookup = lookup
        self._land: Land | None = land

    def done(self) -> bool:
        return self._land is None

    def set_result(self, result: Outcome[Any], /) -> None:
        if result.error is None and self._land is not None:
            own = outcome_for(self.key, result)
            land, self._land = self._land, None
            land(own)
        elif isinstance(result.error, ClientClosedError):
            self.hand_on(copy.copy(result.error))
        elif isinstance(result, Unknown) and self.policy.if_error and self._land is not None:
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
        """Leave the call: nothing lands any more."""
        self._land = None
        assert self.call is not None, "a waiter without an outcome has a call"
        self._lookup.calls.waiters.leave(self.call, self)

    def hand_on(self, landed: Outcome[Any] | BaseException) -> None:
        """Pass on the outcome or the exception."""
        land, self._land = self._land, None
        assert land is not None, "a waiter has one outcome"
        land(landed)

    def _stand_in(self, result: Unknown, land: Land) -> None:
        assert self.call is not None
        cache_key = self.call.cache_key
        land(self._lookup.for_caller(cache_key, self.key, result, self.policy, self.began))


class Lookup:
    """The answer for a key, from its cache entry or from a call.

    Args:
        calls: The calls under way.
        cache: The cached answers.

    Attributes:
        calls: The calls under way.
    """

    def __init__(self, calls: SingleFlight, cache: BalanceCache) -> None:
        self.calls = calls
        self._cache = cache

    def cached(
        self, path: str, key: ApiKey | UnusableKey, policy: CachePolicy
    ) -> Outcome[Any] | None:
        """A cached outcome young enough, or None; a stale one is refreshed in the background."""
        if policy is NEW or isinstance(key, UnusableKey):
            return None
        cache_key = path, key.digest
        entry = self._cache.find(cache_key)
        if entry is None:
            return None
        now = _now()
        outcome = entry.answer(policy, now)
        if outcome is None:
            return None
        if (
            outcome.stale
            and not self.calls.under_way.is_asked(cache_key)
            and entry.claim_refresh(key.digest, now)
        ):
            self.calls.refresh(cache_key, key, policy)
        return outcome if outcome.key is key else outcome_for(key, outcome)

    def needs_turn(self, path: str, key: ApiKey, policy: CachePolicy) -> bool:
        """Whether a key needs a turn.

        A key needs a turn if it has no cached answer and no request for it is on the wire.
        """
        cache_key = path, key.digest
        entry = None if policy is NEW else self._cache.find(cache_key)
        if entry is not None and entry.answer(policy, _now()) is not None:
            return False
        return not self.calls.under_way.is_on_wire(cache_key)

    def last(self, path: str, key: ApiKey, policy: CachePolicy) -> Outcome[Any] | None:
        """The last outcome for `key`, of any age, or None."""
        entry = self._cache.find((path, key.digest))
        outcome = None if entry is None else entry.last(policy, _now())
        return None if outcome is None else outcome_for(key, outcome)

    def arrived_since(self, path: str, key: ApiKey, began: float) -> Outcome[Any] | None:
        """The outcome with a balance that arrived since `began`, or None."""
        entry = self._cache.find((path, key.digest))
        return None if entry is None else entry.arrived_since(began)

    async def ask(
        self, path: str, key: ApiKey | UnusableKey, policy: CachePolicy, deadline: float | None
    ) -> Outcome[Any]:
        """The outcome of one call for `key`: of the call under way, else of a new one.

        Without an answer in time, the error of the outcome says why.
        """
        if isinstance(key, UnusableKey):
            return failure(key, key.error)
        loop = asyncio.get_running_loop()
        began = loop.time()
        waiter: asyncio.Future[Outcome[Any]] = loop.create_future()
        cache_key = path, key.digest
        terms = self._terms(cache_key, policy, began, math.inf if deadline is None else deadline)
        call = self.calls.join(cache_key, key, waiter, terms, None)
        try:
            outcome = await waiter
        except asyncio.CancelledError:
            self.calls.waiters.leave(call, waiter)
            raise
        if policy is NEW and outcome.key is key:
            return outcome
        return self.for_caller(cache_key, key, outcome, policy, began)

    def begin(
        self,
        path: str,
        waiter: FanOutWaiter,
        deadline: float,
        flow: Flow,
        *,
        own_timer: bool = False,
    ) -> None:
        """Ask about a key of a fan-out, without a task: the outcome lands at once or later.

        A new call waits for its turn in `flow`. If the client was closed, an exception lands. With
        `own_timer` the caller ends the wait at the deadline.
        """
        key, policy = waiter.key, waiter.policy
        outcome = None if policy is NEW else self.cached(path, key, policy)
        if outcome is not None:
            waiter.hand_on(outcome)
            return
        cache_key = path, key.digest
        terms = self._terms(cache_key, policy, waiter.began, deadline)
        if own_timer:
            terms = terms._replace(own_timer=True)
        waiter.call = self.calls.join(cache_key, key, waiter, terms, flow)

    def open_for_pool(
        self,
        path: str,
        waiter: FanOutWaiter,
        terms: WaitTerms,
        flow: Flow,
        context: contextvars.Context,
    ) -> SharedCall:
        """Open the call of a key of a pool.

        No call for the key is under way: another caller's call would have been made from its
        number.
        """
        key = waiter.key
        cache_key = path, key.digest
        if waiter.policy.if_error:
            falls_back = self._falls_back(cache_key, waiter.policy, terms.began)
            terms = terms._replace(falls_back=falls_back)
        call = waiter.call = self.calls.open(
            cache_key, key, waiter, terms, flow=flow, context=context
        )
        call.entered = terms.began
        return call

    def for_caller(
        self,
        cache_key: CacheKey,
        key: ApiKey,
        outcome: Outcome[Any],
        policy: CachePolicy,
        began: float,
    ) -> Outcome[Any]:
        """The outcome for a caller that asked for `key`, under its name; a stale one if allowed.

        Stale-if-error allows it while the API is down.
        """
        if isinstance(outcome, Unknown) and policy.if_error:
            entry = self._cache.find(cache_key)
            stand_in = None if entry is None else entry.instead_of(outcome, policy, began, _now())
            if stand_in is not None:
                outcome = stand_in
        return outcome if outcome.key is key else outcome_for(key, outcome)

    def too_late(self, path: str, key: ApiKey, policy: CachePolicy, began: float) -> Outcome[Any]:
        """The outcome of a key that had no turn before its deadline."""
        endpoint = self.calls.endpoints[path]
        earliest = endpoint.earliest_for(key, _now())
        outcome = failure(key, late_error(key, earliest - began, is_cut_off=endpoint.is_cut_off))
        return self.for_caller((path, key.digest), key, outcome, policy, began)

    def invalidate(self, key: ApiKey | None) -> None:
        """Drop the cache entries of `key`, or of all keys.

        A request on the wire still answers its own waiters, and no later ones.
        """
        self._cache.forget(None if key is None else key.digest)
        self.calls.invalidate(key)
        self.calls.detach(key)

    def _terms(
        self, cache_key: CacheKey, policy: CachePolicy, began: float, deadline: float
    ) -> WaitTerms:
        falls_back = self._falls_back(cache_key, policy, began)
        return WaitTerms(began, deadline, falls_back, policy=policy)

    def _falls_back(self, cache_key: CacheKey, policy: CachePolicy, began: float) -> bool:
        """Whether stale-if-error allows a stale answer for this caller."""
        entry = self._cache.find(cache_key) if policy.if_error else None
        return entry is not None and entry.may_stand_in(policy, began)


def _now() -> float:
    return asyncio.get_running_loop().time()
