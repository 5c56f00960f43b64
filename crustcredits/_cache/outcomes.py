"""Outcomes of calls without an answer, and the errors that say why."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import attrs

from crustcredits._errors import (
    APITimeoutError,
    ClientClosedError,
    CrustCreditsError,
    RateLimitWaitError,
)
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Outcome, Source, Unknown


def failure(key: ApiKey | UnusableKey, error: CrustCreditsError) -> Unknown:
    """The outcome of a key without an answer."""
    source: Source = "fetched" if error.attempts else "none"
    return Unknown(
        key=key, error=error, checked_at=datetime.now(UTC), attempts=error.attempts, source=source
    )


def shared(outcome: Outcome[Any]) -> Outcome[Any]:
    """The same outcome, for the waiters that joined the call.

    The source `"none"` stays: no request was sent.
    """
    return outcome if outcome.source == "none" else attrs.evolve(outcome, source="shared")


def closed_error() -> ClientClosedError:
    """The error of calls that wait, or begin, when the client is closed."""
    return ClientClosedError("this client is closed; make a new one")


def late_error(key: ApiKey, wait: float, *, is_cut_off: bool = False) -> RateLimitWaitError:
    """The error of a key that cannot have its turn for `wait` seconds, beyond its deadline.

    `is_cut_off` says that the count of all processes is out of reach.
    """
    if is_cut_off:
        return RateLimitWaitError(
            "not sent: deadline too short, because Redis is out of reach and the leases of other "
            f"processes delay this call by at least {wait:.1f} s; see the log for the cause, and "
            "raise timeout=",
            key_name=key.label,
            wait=wait,
        )
    return RateLimitWaitError(
        "not sent: deadline too short, because the rate limit or requests without an answer delay "
        f"this call by at least {wait:.1f} s; raise timeout=, check fewer keys at once, or set "
        "RateLimit(reserve=0.1) for single calls beside a check",
        key_name=key.label,
        wait=wait,
    )


def overload_error(key: ApiKey, wait: float) -> RateLimitWaitError:
    """The error of a waiter whose turn came with too little time left, in an overload."""
    return RateLimitWaitError(
        "not sent: deadline too short for an answer, because more calls wait than may start; "
        "raise timeout=, or make fewer calls at once",
        key_name=key.label,
        wait=wait,
    )


def timeout_error(key: ApiKey, seconds: float, attempts: int) -> APITimeoutError:
    """The error of a waiter whose deadline passes while a request is on the wire."""
    return APITimeoutError(
        f"no whole answer within {seconds:.3g} s of the call; try again, or raise timeout=",
        key_name=key.label,
        attempts=attempts,
    )


def last_error(error: CrustCreditsError, attempts: int) -> CrustCreditsError:
    """A copy of the error of the attempt before, which other waiters may get too."""
    last = copy.copy(error)
    last.attempts = attempts
    return last
