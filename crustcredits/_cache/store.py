"""Cache entries: the last balance for each key and endpoint, and the failure since then.

Bounded: the least recently used entries are evicted first. The module does no I/O and never waits.
Callers pass the time, in seconds of the running loop's clock. No secret is part of a cache key.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import attrs

from crustcredits._cache.policy import CachePolicy
from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    AuthenticationError,
    ClientClosedError,
    CrustCreditsError,
    InternalServerError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitWaitError,
    renamed,
)
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.retry import Retry, refresh_delay
from crustcredits._models import Account, Balance, Known, Outcome, Unknown

_log = logging.getLogger("crustcredits")

#: The path of an endpoint and the digest of a key.
CacheKey: TypeAlias = tuple[str, bytes]

# Statements of the API about the key itself: they invalidate its cached balance. Any other error
# only means that no answer was available.
_OF_THE_KEY = (AuthenticationError, PaymentRequiredError, PermissionDeniedError)
# Of these, the errors that hold on both endpoints: no such key, no credits. Permissions differ.
_OF_ALL_ENDPOINTS = (AuthenticationError, PaymentRequiredError)

# Errors that may mean that the endpoint is down for all keys. A refusal (429) may concern one
# account, and has a cooldown of its own. Gateway answers have a circuit breaker, which ends calls
# at once.
_OF_THE_ENDPOINT = (APIConnectionError, APITimeoutError, InternalServerError)

# Failures in a row, of different keys, after which an endpoint is taken to be down, and the seconds
# for which this holds. After that its state is unknown, and a caller has to wait for an answer.
_FAILURES = 3
_DOWN = 60.0


class Moment(NamedTuple):
    """A moment on the running loop's clock and on the wall clock, in seconds."""

    loop: float
    wall: float

    def age(self, now: float) -> float:
        """Seconds since this moment, by the clock that has advanced further."""
        return max(now - self.loop, time.time() - self.wall)


def _grant_after(account: Account) -> float:
    """The time of the account's next grant, which changes its balance.

    On the wall clock; infinite if unknown.
    """
    date = account.recurring_credits_refresh_date
    return math.inf if date is None or date <= account.checked_at else date.timestamp()


class _EndpointFailures:
    """Failures in a row on one endpoint that say nothing about the keys."""

    __slots__ = ("_blocked", "_keys", "claimed_by", "error", "failures", "last", "refresh_at")

    def __init__(self, blocked: Callable[[], CrustCreditsError | None]) -> None:
        self._blocked = blocked
        self._keys: set[bytes] = set()  # failed keys: one key's failures are not the endpoint's
        # The cache entry with the refresh that tests whether the endpoint answers again.
        self.claimed_by: CacheKey | None = None
        self.failures = 0  # of different keys up to the threshold, then of any key
        self.error: CrustCreditsError | None = None
        self.last = 0.0
        self.refresh_at = 0.0

    def answered(self) -> None:
        """Record that the endpoint answered."""
        if self.failures >= _FAILURES:
            _log.warning("the API answers again; cached balances are refreshed")
        self.failures = 0
        self._keys.clear()
        self.claimed_by = None
        self.refresh_at = 0.0

    def failed(
        self,
        digest: bytes,
        error: CrustCreditsError,
        retry: Retry,
        now: float,
        *,
        has_balance: Callable[[], bool],
    ) -> None:
        """Record that the endpoint gave no answer for this key."""
        before = self.failures
        if before < _FAILURES:
            self._keys.add(digest)
        self.failures = before + 1 if before >= _FAILURES else len(self._keys)
        self.claimed_by = None
        self.error, self.last = error, now
        if before < self.failures == _FAILURES:
            cached = "; one refresh at a time tests whether it answers" if has_balance() else ""
            _log.warning(
                "no balance from the API for %d keys in a row%s; last failure: %s",
                _FAILURES,
                cached,
                error,
            )
        if self.failures >= _FAILURES:
            self.refresh_at = now + refresh_delay(retry, error, self.failures - _FAILURES + 1)

    def reason(self, now: float) -> CrustCreditsError | None:
        """The error for which the endpoint is down, or None."""
        return (
            self.error
            if self.failures >= _FAILURES and now - self.last < _DOWN
            else self._blocked()
        )

    @property
    def may_refresh(self) -> bool:
        """Whether a request would be sent."""
        return self._blocked() is None


class CacheEntry:
    """The last balance for one key on one endpoint, and the failure since then.

    Attributes:
        tried: Time of the last result, good or bad; refreshes are ordered by it.
        refresh_at: Earliest time of the next refresh, as far as the entry's own failures decide.

    Ages count on both clocks: the running loop's, and the wall clock, which advances while a laptop
    sleeps.
    """

    __slots__ = (
        "_balance",
        "_endpoint",
        "_failed",
        "_failure",
        "_failures",
        "_fresh",
        "_received",
        "_received_wall",
        "_refreshes_at",
        "_stale",
        "refresh_at",
        "tried",
    )

    def __init__(self, endpoint: _EndpointFailures) -> None:
        self._endpoint = endpoint
        self._balance: Balance | None = None
        self._received = self._received_wall = -math.inf
        self._refreshes_at = math.inf  # wall-clock time of the account's next grant
        self._failed: Moment | None = None  # time of the last failed request since the balance
        self._failure: Unknown | None = None  # the last failure since the balance
        self._failures = 0
        self.tried = 0.0
        self.refresh_at = 0.0
        # Built on first use, then shared by all callers.
        self._fresh: Known[Any] | None = None
        self._stale: Known[Any] | None = None

    def succeeded(self, balance: Balance, now: float) -> None:
        """Record a balance."""
        self._balance, self._failure, self._failed = balance, None, None
        self._received, self._received_wall = now, time.time()
        self._refreshes_at = _grant_after(balance) if isinstance(balance, Account) else math.inf
        self.tried = self.refresh_at = now
        self._failures = 0
        self._fresh = self._stale = None

    def failed(self, failure: Unknown, retry: Retry, now: float) -> None:
        """Record a failure.

        If the error is about the key itself, the cached balance is dropped.
        """
        self._failure = attrs.evolve(failure, attempts=0, source="cached")
        self._failures += 1
        self.tried = now
        if failure.attempts:  # a failure without a request is not returned in place of a request
            self._failed = Moment(now, time.time())
        self.refresh_at = now + refresh_delay(retry, failure.error, self._failures)
        self._stale = None
        if isinstance(failure.error, _OF_THE_KEY):
            self._balance = self._fresh = None

    @property
    def has_balance(self) -> bool:
        """Whether a balance is cached, of any age."""
        return self._balance is not None

    @property
    def failures(self) -> int:
        """Failures in a row since the last balance."""
        return self._failures

    def claim_refresh(self, cache_key: CacheKey, now: float) -> bool:
        """Whether to refresh the entry now: its backoff after a failure is over.

        While the endpoint is down, one refresh at a time is enough.
        """
        if (
            now < self.refresh_at
            or now < self._endpoint.refresh_at
            or not self._endpoint.may_refresh
        ):
            return False
        if self._endpoint.reason(now) is not None:
            self._endpoint.claimed_by, self._endpoint.refresh_at = cache_key, now + _DOWN
        return True

    def answer(self, policy: CachePolicy, now: float) -> Outcome[Any] | None:
        """The outcome to return without a request: a young balance, else a young failure, or None.

        The caller refreshes a stale balance.
        """
        balance = self._balance
        if balance is not None:
            age = self._age(policy, now)
            if policy.is_fresh(age):
                return self._fresh or self._make_fresh(balance)
            if policy.is_stale_while_revalidate(age):
                return self._stale_now(balance, now)
            if policy.is_stale_if_error(age) and self._is_down(now):
                return self._stale_now(balance, now)
        if self._failed is not None and self._failed.age(now) < policy.error_age:
            return self._failure
        return None

    def may_stand_in(self, policy: CachePolicy, now: float) -> bool:
        """Whether stale-if-error allows the balance while the API gives no answer."""
        return self._balance is not None and policy.is_stale_if_error(self._age(policy, now))

    def instead_of(
        self, failure: Unknown, policy: CachePolicy, began: float, now: float
    ) -> Known[Any] | None:
        """The balance with this failure beside it, if it may replace a newer one; else None.

        A balance that arrived after `began`, in the moment of the failure, is the answer that the
        caller asked for.
        """
        if self._balance is None or isinstance(failure.error, (*_OF_THE_KEY, ClientClosedError)):
            return None
        age = self._age(policy, now)
        if self._received > began or policy.is_fresh(age):
            return self._fresh or self._make_fresh(self._balance)
        if not policy.is_stale_if_error(age):
            return None
        if isinstance(failure.error, RateLimitWaitError) and not policy.own_limit:
            return None
        return attrs.evolve(
            self._stale or self._make_stale(self._balance),
            error=failure.error,
            attempts=failure.attempts,
        )

    def arrived_since(self, began: float) -> Known[Any] | None:
        """The balance, if it arrived since `began`: as if its call had been shared."""
        if self._balance is None or self._received < began:
            return None
        return attrs.evolve(
            self._fresh or self._make_fresh(self._balance), attempts=1, source="shared"
        )

    def last(self, policy: CachePolicy, now: float) -> Outcome[Any] | None:
        """The last balance, of any age, with the failure since then beside it; else the failure."""
        balance, failure = self._balance, self._failure
        if balance is None:
            return failure
        if not policy.is_fresh(self._age(policy, now)):
            return self._stale_now(balance, now)
        fresh = self._fresh or self._make_fresh(balance)
        return fresh if failure is None else attrs.evolve(fresh, error=failure.error)

    def _age(self, policy: CachePolicy, now: float) -> float:
        """Age of the balance in seconds.

        After the account's next grant the balance is older than `max_age`.
        """
        wall = time.time()
        age = max(now - self._received, wall - self._received_wall)
        return (
            age
            if wall < self._refreshes_at
            else max(age, policy.max_age + wall - self._refreshes_at)
        )

    def _is_down(self, now: float) -> bool:
        own = self._failure is not None and now - self.tried < _DOWN
        return own or self._endpoint.reason(now) is not None

    def _stale_now(self, balance: Balance, now: float) -> Known[Any]:
        """The stale balance, and beside it the reason why it is not refreshed.

        The reason is the failure of its last refresh, else the error for which the endpoint is
        down.
        """
        stale = self._stale or self._make_stale(balance)
        reason = self._endpoint.reason(now) if stale.error is None else None
        return (
            stale
            if reason is None
            else attrs.evolve(stale, error=renamed(reason, balance.key.label))
        )

    def _make_fresh(self, balance: Balance) -> Known[Any]:
        self._fresh = Known(balance=balance, attempts=0, source="cached")
        return self._fresh

    def _make_stale(self, balance: Balance) -> Known[Any]:
        error = None if self._failure is None else self._failure.error
        self._stale = Known(
            balance=attrs.evolve(balance, stale=True), error=error, attempts=0, source="cached"
        )
        return self._stale


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
            path: _EndpointFailures(partial(blocked, path))
            for path in (USER_CREDITS, ACCOUNT_CREDITS)
        }

    def find(self, cache_key: CacheKey) -> CacheEntry | None:
        """The cache entry, or None. The entry becomes the most recently used."""
        entry = self._entries.get(cache_key)
        if entry is not None:
            self._entries.move_to_end(cache_key)
        return entry

    def succeeded(self, cache_key: CacheKey, balance: Balance, now: float) -> CacheKey | None:
        """Record a balance. Returns the cache key that was evicted for it, if any."""
        entry, evicted = self._entries.get(cache_key), None
        endpoint = self._endpoints[cache_key[0]]
        if endpoint.failures or endpoint.refresh_at:
            endpoint.answered()
        if entry is None:
            entry, evicted = self._make(cache_key)
        else:
            self._entries.move_to_end(cache_key)
        entry.succeeded(balance, now)
        return evicted

    def failed(self, cache_key: CacheKey, failure: Unknown, now: float) -> CacheKey | None:
        """Record a failure. Returns the cache key that was evicted for it, if any."""
        entry, evicted = self.find(cache_key), None
        if entry is None:
            entry, evicted = self._make(cache_key)
        entry.failed(failure, self._retry, now)
        if isinstance(failure.error, _OF_ALL_ENDPOINTS):
            for path in {USER_CREDITS, ACCOUNT_CREDITS} - {cache_key[0]}:
                self._entries.pop((path, cache_key[1]), None)
        if isinstance(failure.error, _OF_THE_KEY):
            self._endpoints[cache_key[0]].answered()
        elif isinstance(failure.error, _OF_THE_ENDPOINT):
            has_balance = partial(self._has_any_balance, cache_key[0])
            self._endpoints[cache_key[0]].failed(
                cache_key[1], failure.error, self._retry, now, has_balance=has_balance
            )
        else:
            self.given_up(cache_key)
        return evicted

    def has_balance(self, cache_key: CacheKey) -> bool:
        """Whether a balance is cached there."""
        entry = self._entries.get(cache_key)
        return entry is not None and entry.has_balance

    def given_up(self, cache_key: CacheKey) -> None:
        """Record that a call said nothing about the endpoint: another refresh may test it."""
        endpoint = self._endpoints[cache_key[0]]
        if endpoint.claimed_by == cache_key:
            endpoint.claimed_by, endpoint.refresh_at = None, 0.0

    def has_just_failed(self, cache_key: CacheKey) -> bool:
        """Whether the last failure was the first since a balance, and the endpoint is not down."""
        entry = self._entries.get(cache_key)
        return (
            entry is not None
            and entry.failures == 1
            and self._endpoints[cache_key[0]].failures < _FAILURES
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
