"""What answers tell of the server's count, for tests in virtual time, and a clock that can be set."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from decimal import Decimal

from crustcredits import ApiKey, Balance, CrustCreditsError, RateLimitError, RateLimitStatus
from crustcredits._claim import Claim
from crustcredits._turn import Turn
from tests.virtual import VirtualLoop

KEY = ApiKey("secret-of-nobody", name="nobody")
WHEN = datetime(2026, 1, 1, tzinfo=UTC)


def at(moment: float) -> None:
    """The clock jumps there; what was due before has not run yet."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._virtual.now = moment


async def settle() -> None:
    """Whatever can happen now has happened."""
    for _ in range(8):
        await asyncio.sleep(0)


def balance(limit: int | None = None, remaining: int | None = None, reset: float | None = None) -> Balance:
    """A 200 whose headers say this; without a number of them it has none."""
    return Balance(key=KEY, credits=Decimal(7), checked_at=WHEN, rate_limit=status(limit, remaining, reset))


def refusal(limit: int, reset: float) -> RateLimitError:
    """A 429 whose headers say this."""
    return RateLimitError("refused", retry_after=reset, rate_limit=status(limit, 0, reset))


def status(limit: int | None, remaining: int | None, reset: float | None) -> RateLimitStatus | None:
    if limit is None and remaining is None and reset is None:
        return None
    return RateLimitStatus(limit=limit, remaining=remaining, reset=reset)


async def sent(claim: Claim) -> Claim:
    """Its attempt is on the wire."""
    await claim.acquire(Turn())
    assert claim.may_start()
    claim.start()
    return claim


def answered(claim: Claim, result: Balance | CrustCreditsError) -> None:
    """Its answer has come, of the status that fits."""
    claim.answered(200 if isinstance(result, Balance) else getattr(result, "status", None), result)
