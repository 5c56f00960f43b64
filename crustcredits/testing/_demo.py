"""The made-up pool of `crustcredits demo`: good keys and broken ones.

It knows the sandbox, and nothing of the display.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from crustcredits._keys.api_key import ApiKey
from crustcredits.testing import Fault, SandboxServer

_COMPANIES = (  # noqa: SIM905  # as a list it takes forty lines
    "acme adatum alpine boreal brooks cascade cedar contoso corvid delta dune ember everline "
    "fabrikam fjord globex "
    "granite harbor hooli initech juniper keystone lumen maple meridian monarch nimbus "
    "norden orchard oscorp pinnacle "
    "quarry redwood sable stark tailspin umbrella vandelay waystar zephyr"
).split()


def demo_pool(sandbox: SandboxServer, count: int) -> list[ApiKey]:
    """Make the same pool every time, except for its secrets and for dates in the future."""
    draw = random.Random(11)
    for place, company in enumerate(_COMPANIES):
        credits = (
            0
            if place % 13 == 5
            else Decimal(draw.randint(1_000, 25_000_000)).scaleb(-2 * (place % 4 == 0))
        )
        sandbox.add_account(company, credits=credits, **(_grant(draw) if place % 3 else {}))
    return sorted(
        (_key(sandbox, place) for place in range(count)), key=lambda key: key.account or ""
    )


def _grant(draw: random.Random) -> dict[str, Any]:
    grant = {
        "recurring_credits": draw.choice((2_500, 10_000, 50_000)),
        "recurring_credits_frequency": "monthly",
    }
    date = datetime.now(UTC) + timedelta(days=draw.randint(1, 30))
    return grant | {"recurring_credits_refresh_date": f"{date:%Y-%m-%d}T00:00:00Z"}


def _key(sandbox: SandboxServer, place: int) -> ApiKey:
    cycle, company = divmod(place, len(_COMPANIES))
    account = _COMPANIES[company]
    name = ("prod", "dev", "batch")[cycle % 3]
    if cycle > 2:
        name = f"{name}-{cycle // 3 + 1}"
    if place % 29 == 7:
        return ApiKey(f"sandbox-revoked-{place}", name=name, account=account)
    key = sandbox.add_key(name, account=account)
    if account == "waystar":
        sandbox.fail(key, Fault.FORBIDDEN)
    elif place % 17 == 3:
        sandbox.fail(
            key, (Fault.BAD_GATEWAY, Fault.UNAVAILABLE, Fault.RESET)[place % 3], times=1 + place % 2
        )
    return key
