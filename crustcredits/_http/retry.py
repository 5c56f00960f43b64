"""When to try again, and after how long. Arithmetic only: it neither sleeps nor sends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import attrs

from crustcredits._errors import (
    APIConnectionError,
    BucketsUnavailableError,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    RateLimitError,
    RateLimitWaitError,
)
from crustcredits._validation import Number, Whole, init_hides_arguments

# Nothing was sent for these. They may recover, and are not for an attempt to mend.
_UNSENT = (BucketsUnavailableError, RateLimitWaitError)

# After lost connections and answers of a gateway the fourth attempt comes no sooner than so many
# seconds after the first failure. Jitter from 0 alone could spend all attempts within the first
# second of an outage of the network or of name resolution.
_LATE_ATTEMPT = 4
_OUTAGE = 4.0

# Seconds; a refresh is tried again after as long at the most, whatever the server asked: the
# trouble may be over sooner.
_LONGEST_PAUSE = 60.0


@init_hides_arguments
@attrs.frozen(kw_only=True)
class Retry:
    """How failures that may pass are tried again: lost connections, timeouts, gateways, 408, 425, 429 and 5xx. Others never are.

    Attributes:
        attempts: Requests for one call at the most; 1 means never to try again. With more than 1, a
            refusal that comes while several accounts are refused does not count, four times at
            most: it says nothing of the key.
        backoff: Seconds; before the second attempt the wait is drawn from 0 to this, and the bound
            doubles each time. After lost connections and answers of a gateway the fourth attempt
            comes no sooner than 4 s after the first failure, where the call has the time and
            `backoff` is above 0, so that a short outage of the network, of name resolution or of a
            gateway is survived.
        backoff_max: Seconds; where the doubling stops.
        wait_max: Seconds; a refusal (429, or 503 with `Retry-After`) that asks for a longer wait is
            raised at once.

    Raises:
        ConfigurationError: A value is not a number of that range.
    """

    attempts: int = attrs.field(default=4, validator=Whole(1))
    backoff: float = attrs.field(default=0.25, validator=Number(minimum=0))
    backoff_max: float = attrs.field(default=8.0, validator=Number(minimum=0))
    wait_max: float = attrs.field(default=65.0, validator=Number(minimum=0))


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
    """Seconds to wait before the next attempt, or None when there is to be none.

    `attempts` counts those made, `spared` the ones among them that do not count, because they tried
    out the rate limit. `elapsed` is the time in seconds since the first of them failed, `patience`
    the time that is left. A refusal waits as long as the server asked and a jitter more, so that
    keys refused together do not come back together.
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
    """Seconds before an answer is refreshed again after this many failures in a row, without end."""
    return min(asked_wait(error) or 0.0, _LONGEST_PAUSE) + _jitter(retry, failures, uniform)


def _jitter(retry: Retry, failures: int, uniform: Callable[[float, float], float]) -> float:
    # The exponent is bounded because 2.0**1024 overflows.
    return uniform(0.0, min(retry.backoff_max, retry.backoff * 2.0 ** min(failures - 1, 60)))


def asked_wait(error: CrustCreditsError) -> float | None:
    """Seconds that the server asked to wait, or None."""
    return error.retry_after if isinstance(error, (RateLimitError, InternalServerError)) else None
