"""`CacheEntry`: the last balance for one key and endpoint, and the failure since then.

The module does no I/O and never waits. Callers pass the time, in seconds of the running loop's
clock.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import attrs

from crustcredits._cache.endpoint_failures import DOWN, EndpointFailures
from crustcredits._cache.policy import CachePolicy
from crustcredits._errors import (
    AuthenticationError,
    ClientClosedError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitWaitError,
    renamed,
)
from crustcredits._http.retry import Retry, refresh_delay
from crustcredits._models import Account, Balance, Known, Outcome, Unknown

# Statements of the API about the key itself: they invalidate its cached balance. Any other error
# only means that no answer was available.
OF_THE_KEY = (AuthenticationError, PaymentRequiredError, PermissionDeniedError)


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


class CacheEntry:
    """The last balance for one key on one endpoint, and the failure since then.

    Attributes:
        tried: Time of the last result, good or bad.
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

    def __init__(self, endpoint: EndpointFailures) -> None:
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

    def succeeded(self, balance: Balance, now: float, *, age: float = 0.0) -> None:
        """Record a balance, of this age in seconds."""
        self._balance, self._failure, self._failed = balance, None, None
        self._received, self._received_wall = now - age, time.time() - age
        self._refreshes_at = _grant_after(balance) if isinstance(balance, Account) else math.inf
        self.tried = now - age
        self.refresh_at = now
        self._failures = 0
        self._fresh = self._stale = None

    def failed(self, failure: Unknown, retry: Retry, now: float, *, age: float = 0.0) -> None:
        """Record a failure, of this age in seconds.

        If the error is about the key itself, the cached balance is dropped.
        """
        self._failure = attrs.evolve(failure, attempts=0, source="cached")
        self._failures += 1
        self.tried = now - age
        # A failure without a request, here or in another process, is not returned in place of one.
        if failure.attempts or failure.source == "shared":
            self._failed = Moment(now - age, time.time() - age)
        self.refresh_at = now + refresh_delay(retry, failure.error, self._failures)
        self._stale = None
        if isinstance(failure.error, OF_THE_KEY):
            self._balance = self._fresh = None

    def is_newer_than(self, age: float, now: float) -> bool:
        """Whether the last result, good or bad, is younger than this age."""
        has_result = self._balance is not None or self._failure is not None
        return has_result and now - self.tried < age

    @property
    def has_balance(self) -> bool:
        """Whether a balance is cached, of any age."""
        return self._balance is not None

    @property
    def failures(self) -> int:
        """Failures in a row since the last balance."""
        return self._failures

    def claim_refresh(self, digest: bytes, now: float) -> bool:
        """Claim the refresh of the entry of this key. Returns whether it may begin now.

        It may when its backoff after a failure is over. While the endpoint is down, one refresh at
        a time is enough.
        """
        if (
            now < self.refresh_at
            or now < self._endpoint.refresh_at
            or not self._endpoint.may_refresh
        ):
            return False
        if self._endpoint.reason(now) is not None:
            self._endpoint.claim(digest, now)
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
        if self._balance is None or isinstance(failure.error, (*OF_THE_KEY, ClientClosedError)):
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
        own = self._failure is not None and now - self.tried < DOWN
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
