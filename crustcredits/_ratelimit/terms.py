"""`SchedulerTerms`: the settings that the scheduler of an endpoint keeps to."""

from __future__ import annotations

from typing import Literal, Self

import attrs

from crustcredits._ratelimit.config import RateLimit


@attrs.frozen(kw_only=True)
class SchedulerTerms:
    """Settings of a scheduler, derived from `RateLimit`.

    Attributes:
        requests: Requests that the server allows in any one period, within one scope.
        period: Seconds after its end for which a request counts, the margin included.
        window: Seconds for which the server counts a request, without the margin.
        late: Most seconds that a request takes, and most seconds after which an abandoned one may
            still arrive.
        scope: The scope that the server counts by; with `"auto"` all together, except where a proof
            shows otherwise.
        reserve: The fraction of a bucket's tokens that only single calls may take.
        adopts: Which other limit is followed when the server states one: a lower one, any, or none.
    """

    requests: int = 300
    period: float = 60.3
    window: float = 60.0
    late: float = 10.0
    scope: Literal["auto", "client", "account"] = "auto"
    reserve: float = 0.0
    adopts: Literal["lower", "any", "never"] = "lower"

    @classmethod
    def of(cls, rate_limit: RateLimit, *, late: float) -> Self:
        """The settings for a configured limit, where no request takes more than `late` seconds."""
        period, scope = rate_limit.period, rate_limit.scope
        return cls(
            requests=rate_limit.requests,
            period=period * (1 + rate_limit.margin),
            window=period * (1 - rate_limit.margin),
            late=late,
            scope="account" if scope == "key" else scope,
            reserve=rate_limit.reserve,
            adopts=rate_limit.adopt_server_limit,
        )
