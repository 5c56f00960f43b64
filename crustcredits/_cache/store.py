"""The answers that are kept: the last good one for each key and endpoint, and why there is no newer one.

Bounded: the least recently used go first. It neither asks nor waits, and is told the time, in the
running loop's seconds. A secret is no part of what answers are found by.
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
from crustcredits._http.protocol import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.retry import Retry, refresh_delay
from crustcredits._models import Account, Balance, Known, Outcome, Unknown

_log = logging.getLogger("crustcredits")

#: The path of an endpoint and the digest of a key.
CacheKey: TypeAlias = tuple[str, bytes]

# What the API says of the key itself: then what it said before holds no longer. Any other error
# tells only that there was no answer to be had.
_OF_THE_KEY = (AuthenticationError, PaymentRequiredError, PermissionDeniedError)
# These of them hold on both endpoints: no such key, no credits. What a key may ask differs.
_OF_ALL_ENDPOINTS = (AuthenticationError, PaymentRequiredError)

# What says that the endpoint gives no answers to anybody. A refusal (429) may be one account's, and
# has its own pause; answers of a gateway have a circuit breaker, which ends calls at once.
_OF_THE_ENDPOINT = (APIConnectionError, APITimeoutError, InternalServerError)

# Failures in a row, of different keys, after which an endpoint is taken to be down, and seconds for
# which it then is. After that nobody knows, and whoever asks has to wait and see.
_FAILURES = 3
_DOWN = 60.0


class Moment(NamedTuple):
    """A moment on the running loop's clock and on the wall's."""

    loop: float
    wall: float

    def age(self, now: float) -> float:
        """Seconds since then, by the clock that has gone on for longer."""
        return max(now - self.loop, time.time() - self.wall)


def _grant_after(account: Account) -> float:
    """When the account's next grant comes, which changes its balance.

    On the wall clock, infinite when nobody knows.
    """
    date = account.recurring_credits_refresh_date
    return math.inf if date is None or date <= account.checked_at else date.timestamp()


class _EndpointFailures:
    """Failures in a row on one endpoint that say nothing of the keys."""

    __slots__ = ("_blocked", "_keys", "claimed_by", "error", "failures", "last", "refresh_at")

    def __init__(self, blocked: Callable[[], CrustCreditsError | None]) -> None:
        self._blocked = blocked
        self._keys: set[bytes] = set()  # whose they were: one key's trouble is not the endpoint's
        self.claimed_by: CacheKey | None = (
            None  # whose refresh is to find out whether it answers again
        )
        self.failures = 0  # of different keys, and then of any
        self.error: CrustCreditsError | None = None
        self.last = 0.0
        self.refresh_at = 0.0

    def heard(self) -> None:
        """It answered."""
        if self.failures >= _FAILURES:
            _log.info("the API answers again")
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
        keeps: Callable[[], bool],
    ) -> None:
        """It gave no answer for this key."""
        before = self.failures
        if before < _FAILURES:
            self._keys.add(digest)
        self.failures = before + 1 if before >= _FAILURES else len(self._keys)
        self.claimed_by = None
        self.error, self.last = error, now
        if before < self.failures == _FAILURES:
            kept = "; kept answers are not renewed" if keeps() else ""
            _log.warning(
                "no answer from the API, for %d keys in a row%s: %s", _FAILURES, kept, error
            )
        if self.failures >= _FAILURES:
            self.refresh_at = now + refresh_delay(retry, error, self.failures - _FAILURES + 1)

    def reason(self, now: float) -> CrustCreditsError | None:
        """Why the endpoint is down, if it is."""
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
    """What is known of one key on one endpoint.

    Attributes:
        tried: When something was last heard of it, good or bad; the order of refreshing goes by it.
        refresh_at: When it may be refreshed again, as far as its own failures go.

    Moments are of both clocks: the running loop's, and the wall's, which goes on while a laptop
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
        self._refreshes_at = math.inf  # when the account's next grant comes, on the wall clock
        self._failed: Moment | None = None  # when a request failed, since the balance
        self._failure: Unknown | None = None  # the last one, since the balance
        self._failures = 0
        self.tried = 0.0
        self.refresh_at = 0.0
        # Made when first asked for, and then the same for all.
        self._fresh: Known[Any] | None = None
        self._stale: Known[Any] | None = None

    def succeeded(self, balance: Balance, now: float) -> None:
        """A balance came."""
        self._balance, self._failure, self._failed = balance, None, None
        self._received, self._received_wall = now, time.time()
        self._refreshes_at = _grant_after(balance) if isinstance(balance, Account) else math.inf
        self.tried = self.refresh_at = now
        self._failures = 0
        self._fresh = self._stale = None

    def failed(self, failure: Unknown, retry: Retry, now: float) -> None:
        """None came.

        Where that is the API's word on the key, the balance from before holds no longer.
        """
        self._failure = attrs.evolve(failure, attempts=0, source="cached")
        self._failures += 1
        self.tried = now
        if failure.attempts:  # a failure that cost no request is not given again in place of one
            self._failed = Moment(now, time.time())
        self.refresh_at = now + refresh_delay(retry, failure.error, self._failures)
        self._stale = None
        if isinstance(failure.error, _OF_THE_KEY):
            self._balance = self._fresh = None

    @property
    def has_balance(self) -> bool:
        """Whether a balance is kept, however old."""
        return self._balance is not None

    @property
    def failures(self) -> int:
        """How often in a row no answer came."""
        return self._failures

    def claim_refresh(self, place: CacheKey, now: float) -> bool:
        """Whether to refresh it now: its pause after a failure is over.

        And while the endpoint is down, one at a time is enough.
        """
        if (
            now < self.refresh_at
            or now < self._endpoint.refresh_at
            or not self._endpoint.may_refresh
        ):
            return False
        if self._endpoint.reason(now) is not None:
            self._endpoint.claimed_by, self._endpoint.refresh_at = place, now + _DOWN
        return True

    def answer(self, freshness: CachePolicy, now: float) -> Outcome[Any] | None:
        """What is young enough to be given without asking: the balance, else the failure.

        A stale balance is to be refreshed.
        """
        balance = self._balance
        if balance is not None:
            age = self._age(freshness, now)
            if age < freshness.max_age:
                return self._fresh or self._make_fresh(balance)
            if age < freshness.max_age + freshness.revalidate:
                return self._stale_now(balance, now)
            if age < freshness.max_age + freshness.if_error and self._is_down(now):
                return self._stale_now(balance, now)
        if self._failed is not None and self._failed.age(now) < freshness.error_age:
            return self._failure
        return None

    def may_stand_in(self, freshness: CachePolicy, now: float) -> bool:
        """Whether the balance may stand in for a newer one while the API gives none."""
        return (
            self._balance is not None
            and self._age(freshness, now) < freshness.max_age + freshness.if_error
        )

    def instead_of(
        self, failure: Unknown, freshness: CachePolicy, began: float, now: float
    ) -> Known[Any] | None:
        """The balance with this failure beside it, where it may stand in for a newer one.

        For one who asks since `began`: an answer that came meanwhile, in the moment of the failure,
        is what was asked for.
        """
        if self._balance is None or isinstance(failure.error, (*_OF_THE_KEY, ClientClosedError)):
            return None
        age = self._age(freshness, now)
        if self._received > began or age < freshness.max_age:
            return self._fresh or self._make_fresh(self._balance)
        if age >= freshness.max_age + freshness.if_error:
            return None
        if isinstance(failure.error, RateLimitWaitError) and not freshness.own_limit:
            return None
        return attrs.evolve(
            self._stale or self._make_stale(self._balance),
            error=failure.error,
            attempts=failure.attempts,
        )

    def heard_since(self, began: float) -> Known[Any] | None:
        """The balance, if it came since then: as if its call had been shared."""
        if self._balance is None or self._received < began:
            return None
        return attrs.evolve(
            self._fresh or self._make_fresh(self._balance), attempts=1, source="shared"
        )

    def last(self, freshness: CachePolicy, now: float) -> Outcome[Any] | None:
        """What was heard last, however long ago: the balance, with the failure since then beside it, or the failure."""
        balance, failure = self._balance, self._failure
        if balance is None:
            return failure
        if self._age(freshness, now) >= freshness.max_age:
            return self._stale_now(balance, now)
        fresh = self._fresh or self._make_fresh(balance)
        return fresh if failure is None else attrs.evolve(fresh, error=failure.error)

    def _age(self, freshness: CachePolicy, now: float) -> float:
        """Seconds since the balance came.

        One of an account that has had its next grant since then is older than `max_age`.
        """
        wall = time.time()
        age = max(now - self._received, wall - self._received_wall)
        return (
            age
            if wall < self._refreshes_at
            else max(age, freshness.max_age + wall - self._refreshes_at)
        )

    def _is_down(self, now: float) -> bool:
        own = self._failure is not None and now - self.tried < _DOWN
        return own or self._endpoint.reason(now) is not None

    def _stale_now(self, balance: Balance, now: float) -> Known[Any]:
        """The stale balance, and beside it the failure to renew it, or why nothing on the endpoint can be renewed."""
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
    """At most `room` of them, found by place.

    `blocked` says why no request can be sent on an endpoint at the moment, or None.
    """

    def __init__(
        self, room: int, retry: Retry, blocked: Callable[[str], CrustCreditsError | None]
    ) -> None:
        self._room = room
        self._retry = retry
        self._kept: OrderedDict[CacheKey, CacheEntry] = OrderedDict()
        self._endpoints = {
            path: _EndpointFailures(partial(blocked, path))
            for path in (USER_CREDITS, ACCOUNT_CREDITS)
        }

    def find(self, place: CacheKey) -> CacheEntry | None:
        """What is known there; looking is using."""
        kept = self._kept.get(place)
        if kept is not None:
            self._kept.move_to_end(place)
        return kept

    def succeeded(self, place: CacheKey, balance: Balance, now: float) -> CacheKey | None:
        """A balance came. Returns the place whose answer had to go for it, if any."""
        kept, evicted = self._kept.get(place), None
        endpoint = self._endpoints[place[0]]
        if endpoint.failures or endpoint.refresh_at:
            endpoint.heard()
        if kept is None:
            kept, evicted = self._make(place)
        else:
            self._kept.move_to_end(place)
        kept.succeeded(balance, now)
        return evicted

    def failed(self, place: CacheKey, failure: Unknown, now: float) -> CacheKey | None:
        """None came. Returns the same."""
        kept, evicted = self.find(place), None
        if kept is None:
            kept, evicted = self._make(place)
        kept.failed(failure, self._retry, now)
        if isinstance(failure.error, _OF_ALL_ENDPOINTS):
            for path in {USER_CREDITS, ACCOUNT_CREDITS} - {place[0]}:
                self._kept.pop((path, place[1]), None)
        if isinstance(failure.error, _OF_THE_KEY):
            self._endpoints[place[0]].heard()
        elif isinstance(failure.error, _OF_THE_ENDPOINT):
            keeps = partial(self._keeps_any, place[0])
            self._endpoints[place[0]].failed(place[1], failure.error, self._retry, now, keeps=keeps)
        else:
            self.given_up(place)
        return evicted

    def keeps(self, place: CacheKey) -> bool:
        """Whether a balance is kept there."""
        kept = self._kept.get(place)
        return kept is not None and kept.has_balance

    def given_up(self, place: CacheKey) -> None:
        """A call there has told nothing of the endpoint: another may find out."""
        endpoint = self._endpoints[place[0]]
        if endpoint.claimed_by == place:
            endpoint.claimed_by, endpoint.refresh_at = None, 0.0

    def has_just_failed(self, place: CacheKey) -> bool:
        """Whether the last failure there was the first since an answer, and not one of many while the endpoint is down."""
        kept = self._kept.get(place)
        return (
            kept is not None
            and kept.failures == 1
            and self._endpoints[place[0]].failures < _FAILURES
        )

    def forget(self, digest: bytes | None) -> None:
        """Drop what is kept of one key, or of all."""
        if digest is None:
            self._kept.clear()
        else:
            for path in (USER_CREDITS, ACCOUNT_CREDITS):
                self._kept.pop((path, digest), None)

    def _keeps_any(self, path: str) -> bool:
        return any(kept.has_balance for place, kept in self._kept.items() if place[0] == path)

    def _make(self, place: CacheKey) -> tuple[CacheEntry, CacheKey | None]:
        kept = self._kept[place] = CacheEntry(self._endpoints[place[0]])
        return kept, self._kept.popitem(last=False)[0] if len(self._kept) > self._room else None
