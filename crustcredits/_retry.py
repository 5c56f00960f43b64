"""When to try again, and after how long. Arithmetic only: it neither sleeps nor sends."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from crustcredits._checks import Number, Whole
from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    CrustCreditsError,
    InternalServerError,
    RateLimitError,
)

_TRANSIENT = (APIConnectionError, APITimeoutError, InternalServerError, RateLimitError)


@attrs.frozen(kw_only=True)
class Retry:
    """How failures that may pass are tried again: lost connections, timeouts, 5xx and 429. Others never are.

    Attributes:
        attempts: Requests for one call at the most; 1 means never to try again.
        backoff: Seconds; before the second attempt the wait is drawn from 0 to this, and the bound doubles each time.
        backoff_max: Seconds; where the doubling stops.
        wait_max: Seconds; a refusal (429) that asks for a longer wait is raised at once.

    Raises:
        ConfigurationError: A value is not a number of that range.
    """

    attempts: int = attrs.field(default=4, validator=Whole(1))
    backoff: float = attrs.field(default=0.25, validator=Number(minimum=0))
    backoff_max: float = attrs.field(default=8.0, validator=Number(minimum=0))
    wait_max: float = attrs.field(default=65.0, validator=Number(minimum=0))

    def delay(
        self, error: CrustCreditsError, attempts: int, uniform: Callable[[float, float], float] = random.uniform
    ) -> float | None:
        """Seconds to wait before the next attempt, or None when there is to be none.

        `attempts` counts those made. A refusal waits what the server asked and a jitter more, so that keys refused
        together do not come back together.
        """
        if attempts >= self.attempts or not isinstance(error, _TRANSIENT):
            return None
        jitter = self._jitter(attempts, uniform)
        asked = error.retry_after if isinstance(error, RateLimitError) else None
        if asked is None:
            return jitter
        return asked + jitter if asked <= self.wait_max else None

    def pause(self, error: CrustCreditsError, failures: int, uniform: Callable[[float, float], float] = random.uniform) -> float:
        """Seconds before an answer is refreshed again after so many failures in a row. There is no end to these."""
        asked = error.retry_after if isinstance(error, RateLimitError) else None
        return (asked or 0.0) + self._jitter(failures, uniform)

    def _jitter(self, failures: int, uniform: Callable[[float, float], float]) -> float:
        # The exponent is bounded because 2.0**1024 overflows.
        return uniform(0.0, min(self.backoff_max, self.backoff * 2.0 ** min(failures - 1, 60)))
