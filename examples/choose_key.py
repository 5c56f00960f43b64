"""Give each job the key with the richest account, and ask the API for balances only now and then.

A stale answer is returned at once while it is refreshed; while the API is down, the last good
answer stands in. A sandbox stands in for the API.
"""

import asyncio
from collections.abc import Sequence

from crustcredits import ApiKey, CreditsClient
from crustcredits.testing import SandboxServer


async def choose(client: CreditsClient, keys: Sequence[ApiKey], credits: int) -> ApiKey | None:
    """Return the key with the most credits, if it has enough, or None."""
    report = await client.check(
        keys, timeout=20, max_age=30, stale_while_revalidate=120, stale_if_error=600
    )
    for outcome in report.low(100):
        print(f"  {outcome.key.label} runs low: {outcome.credits}")
    best = report.ranked(min_credits=credits)
    return best[0].key if best else None


async def main() -> None:
    async with SandboxServer() as sandbox, CreditsClient(base_url=sandbox.url) as client:
        keys = [
            sandbox.add_key(name, credits=credits)
            for name, credits in (("acme", 70), ("globex", 900), ("initech", 400))
        ]
        for job, needed in (("small", 50), ("large", 500), ("huge", 5000)):
            key = await choose(client, keys, needed)
            print(
                f"{job} job, {needed} credits: {'no key has enough' if key is None else key.label}"
            )
        print(f"{sandbox.requests} requests for three jobs")


if __name__ == "__main__":
    asyncio.run(main())
