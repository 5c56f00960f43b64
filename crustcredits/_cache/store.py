"""`BalanceCache`: the cache entries of all keys, and the effect of each answer on them.

Bounded: the least recently used entries are evicted first. The module does no I/O and never waits.
Callers pass the time, in seconds of the running loop's clock. No secret is part of a cache key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from crustcredits._cache.cache_entry import OF_THE_KEY, CacheEntry
from crustcredits._cache.endpoint_failures import EndpointFailures
from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    CrustCreditsError,
    InternalServerError,
    PaymentRequiredError,
)
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.retry import Retry
from crustcredits._models import Balance, Unknown

#: The path of an endpoint and the digest of a key.
CacheKey: TypeAlias = tuple[str, bytes]

# Errors about the key that hold on both endpoints: no such key, no credits. Permissions differ.
_OF_ALL_ENDPOINTS = (AuthenticationError, PaymentRequiredError)

# Errors that may mean that the endpoint is down for all keys. A refusal (429) may concern one
# account, and has a cooldown of its own. Gateway answers have a circuit breaker, which ends calls
# at once.
_OF_THE_ENDPOINT = (APIConnectionError, APITimeoutError, InternalServerError)


class BalanceCache:
    """At most `room` cache entries, by endpoint and key.

    `blocked` returns the error that stops all requests on an endpoint at the moment, or None.
    """

    def __init__(
        self, room: int, retry: Retry, blocked: Callable[[str], CrustCreditsError | None]
    ) -> None:
        self._room = room
        self._retry = retry
        self._entries: OrderedDict[CacheKey, CacheEntry] = OrderedDict()
        self._endpoints = {
            path: EndpointFailures(partial(blocked, path))
            for path in (USER_CREDITS, ACCOUNT_CREDITS)
        }

    def find(self, cache_key: CacheKey) -> CacheEntry | None:
        """The cache entry, or None. The entry becomes the most recently used."""
        entry = self._entries.get(cache_key)
        if entry is not None:
            self._entries.move_to_end(cache_key)
        return entry

    def succeeded(
        self, cache_key: CacheKey, balance: Balance, now: float, *, age: float = 0.0
    ) -> CacheKey | None:
        """Record a balance, of this age in seconds: 0 if this process has fetched it.

        Returns the cache key that was evicted for it, if any.
        """
        entry, evicted = self._entries.get(cache_key), None
        endpoint = self._endpoints[cache_key[0]]
        if not age and (endpoint.failures or endpoint.refresh_at):
            endpoint.answered()
        if entry is None:
            entry, evicted = self._make(cache_key)
        else:
            self._entries.move_to_end(cache_key)
        entry.succeeded(balance, now, age=age)
        return evicted

    def failed(
        self, cache_key: CacheKey, failure: Unknown, now: float, *, age: float = 0.0
    ) -> CacheKey | None:
        """Record a failure, of this age in seconds: 0 if it is of this process.

        Returns the cache key that was evicted for it, if any.
        """
        entry, evicted = self.find(cache_key), None
        if entry is None:
            entry, evicted = self._make(cache_key)
        entry.failed(failure, self._retry, now, age=age)
        if isinstance(failure.error, _OF_ALL_ENDPOINTS):
            for path in {USER_CREDITS, ACCOUNT_CREDITS} - {cache_key[0]}:
                self._entries.pop((path, cache_key[1]), None)
        if isinstance(failure.error, OF_THE_KEY):
            if not age:
                self._endpoints[cache_key[0]].answered()
        elif isinstance(failure.error, _OF_THE_ENDPOINT):
            has_balance = partial(self._has_any_balance, cache_key[0])
            self._endpoints[cache_key[0]].failed(
                cache_key[1], failure.error, self._retry, now, has_balance=has_balance
            )
        else:
            self.ended_without_result(cache_key)
        return evicted

    def has_newer(self, cache_key: CacheKey, age: float, now: float) -> bool:
        """Whether a result is cached that is younger than this age."""
        entry = self._entries.get(cache_key)
        return entry is not None and entry.is_newer_than(age, now)

    def has_balance(self, cache_key: CacheKey) -> bool:
        """Whether a balance is cached there."""
        entry = self._entries.get(cache_key)
        return entry is not None and entry.has_balance

    def ended_without_result(self, cache_key: CacheKey) -> None:
        """Record that a call said nothing about the endpoint: another refresh may test it."""
        self._endpoints[cache_key[0]].release(cache_key[1])

    def has_just_failed(self, cache_key: CacheKey) -> bool:
        """Whether the last failure was the first since a balance, and the endpoint is not down."""
        entry = self._entries.get(cache_key)
        return (
            entry is not None and entry.failures == 1 and not self._endpoints[cache_key[0]].is_down
        )

    def forget(self, digest: bytes | None) -> None:
        """Drop the cache entries of one key, or of all keys."""
        if digest is None:
            self._entries.clear()
        else:
            for path in (USER_CREDITS, ACCOUNT_CREDITS):
                self._entries.pop((path, digest), None)

    def _has_any_balance(self, path: str) -> bool:
        return any(
            entry.has_balance for cache_key, entry in self._entries.items() if cache_key[0] == path
        )

    def _make(self, cache_key: CacheKey) -> tuple[CacheEntry, CacheKey | None]:
        entry = self._entries[cache_key] = CacheEntry(self._endpoints[cache_key[0]])
        return entry, self._entries.popitem(last=False)[0] if len(
            self._entries
        ) > self._room else None
