"""Retry decisions and backoff. Arithmetic only: this module neither sleeps nor sends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import attrs

from crustcredits._errors import (
    APIConnectionError,
    BackendUnavailableError,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    RateLimitError,
    RateLimitWaitError,
)
from crustcredits._validation import Number, Whole, init_hides_arguments

# Nothing was sent for these errors. They may recover, but another attempt does not help.
_UNSENT = (BackendUnavailableError, RateLimitWaitError)

# After lost connections and gateway answers, the fourth attempt starts at least `_OUTAGE` seconds
# after the first failure. Full jitter alone could spend all attempts within the first second of an
# outage of the network or of name resolution.
_LATE_ATTEMPT = 4
_OUTAGE = 4.0

# Seconds. Upper bound of the wait that the server can ask of a background refresh: the trouble may
# be over sooner.
_LONGEST_PAUSE = 60.0


@init_hides_arguments
@attrs.frozen(kw_only=True)
class Retry:
    """How transient failures are retried: exponential backoff with full jitter.

    Transient failures are lost connections, timeouts, gateway answers, 408, 425, 429 and 5xx. No
    other failure is retried.

    Attributes:
        attempts: Most requests for one call; 1 means no retry. With more than 1, up to four
            refusals that come while several accounts are refused do not count: they tell nothing
            about the key.
        backoff: Seconds. The wait before the second attempt is drawn from 0 to this bound, and the
            bound doubles with each attempt. After lost connections and gateway answers the fourth
            attempt starts at least 4 s after the first failure, where the call's deadline allows it
            and `backoff` is above 0. Calls then survive a short outage of the network, of name
            resolution or of a gateway.
        backoff_max: Seconds; the doubling stops at this bound.
        wait_max: Seconds; a refusal (429, or 503 with `Retry-After`) that asks for a longer wait is
            raised at once.

    Raises:
        ConfigurationError: A value is not a number of its range.
    """

    attempts: int = attrs.field(default=4, validator=Whole(1))
    backoff: float = attrs.field(default=0.25, validator=Number(minimum=0, unit=" of seconds"))
    backoff_max: float = attrs.field(default=8.0, validator=Number(minimum=0, unit=" of seconds"))
    wait_max: float = attrs.field(default=65.0, validator=Number(minimum=0, unit=" of seconds"))


def retry_delay(
    retry: Retry,
    error: CrustCreditsError,
    attempts: int,
    uniform: Callable[[float, float], float] = random.uniform,
    *,
    spared: int = 0,
    elapsed: float = math.inf,
    patience: float = math.inf,
) -> float | None:
    """Seconds to wait before the next attempt, or None when the call is not retried.

    `attempts` counts the attempts made. `spared` counts those of them that probed the rate limit
    and are not held against the call. `elapsed` is the seconds since the first failure, `patience`
    the seconds left until the deadline. After a refusal the delay is the server's wait plus jitter,
    so that keys refused together do not retry together.
    """
    if attempts - (spared if retry.attempts > 1 else 0) >= retry.attempts or not error.may_recover:
        return None
    if isinstance(error, _UNSENT):
        return None
    jitter = _jitter(retry, attempts, uniform)
    asked = asked_wait(error)
    if asked is not None:
        return asked + jitter if asked <= retry.wait_max else None
    outage = _OUTAGE - elapsed
    is_outage = isinstance(error, (APIConnectionError, GatewayError)) and retry.backoff > 0
    late = is_outage and attempts + 1 >= _LATE_ATTEMPT
    return max(jitter, outage) if late and outage < patience else jitter


def refresh_delay(
    retry: Retry,
    error: CrustCreditsError,
    failures: int,
    uniform: Callable[[float, float], float] = random.uniform,
) -> float:
    """Seconds until the next background refresh after `failures` in a row; there is no limit."""
    return min(asked_wait(error) or 0.0, _LONGEST_PAUSE) + _jitter(retry, failures, uniform)


def _jitter(retry: Retry, failures: int, uniform: Callable[[float, float], float]) -> float:
    # The exponent is bounded because 2.0**1024 overflows.
    return uniform(0.0, min(retry.backoff_max, retry.backoff * 2.0 ** min(failures - 1, 60)))


def asked_wait(error: CrustCreditsError) -> float | None:
    """Seconds that the server asked to wait, or None."""
    return error.retry_after if isinstance(error, (RateLimitError, InternalServerError)) else None
