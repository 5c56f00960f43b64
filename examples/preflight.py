"""Stop a batch that would run dry, before it starts.

What could not be checked counts as nothing, and so does a second key of one account. It is a check, not a reservation:
credits that others spend meanwhile are gone. A sandbox stands in for the API.
"""

import asyncio
from decimal import Decimal

from crustcredits import CreditsClient, InsufficientCreditsError, Report
from crustcredits.testing import Fault, SandboxServer


def require(report: Report, needed: Decimal) -> None:
    """Raise unless the pool holds `needed` credits for certain."""
    available = report.total_credits or Decimal(0)
    # Undeclared keys with the very same answer may share an account: count only one of each such group.
    available -= sum((group[0].result().credits * (len(group) - 1) for group in report.lookalikes), Decimal(0))
    if available < needed:
        unknown = ", ".join(outcome.key.name for outcome in report.failed) or "none"
        raise InsufficientCreditsError(
            f"the batch needs {needed} credits and {available} are certain (unknown: {unknown})", needed=needed, available=available
        )


async def main() -> None:
    async with SandboxServer() as sandbox, CreditsClient(base_url=sandbox.url) as client:
        sandbox.add_account("acme", credits="5000.50")
        keys = [sandbox.add_key("acme-prod", account="acme"), sandbox.add_key("acme-dev", account="acme")]
        keys.append(sandbox.add_key("globex", credits=9000))
        sandbox.fail(keys[-1], Fault.INTERNAL_ERROR)

        report = await client.check(keys, timeout=30)
        for needed in (Decimal(5000), Decimal(6000)):
            try:
                require(report, needed)
                print(f"{needed}: go")
            except InsufficientCreditsError as error:
                print(f"{needed}: stop, {error}")


if __name__ == "__main__":
    asyncio.run(main())
