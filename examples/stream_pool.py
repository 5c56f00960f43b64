"""Check keys as they come out of an asynchronous source, and use each answer as it lands.

The source might be a database cursor; memory does not grow with the number of keys. A sandbox
stands in for the API.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from crustcredits import ApiKey, CreditsClient, Known
from crustcredits.testing import SandboxServer


async def rows(sandbox: SandboxServer) -> AsyncIterator[ApiKey]:
    for number in range(50):
        yield sandbox.add_key(f"customer-{number}", credits=number * 100)
        await asyncio.sleep(0)  # where a cursor would fetch the next row


async def main() -> None:
    low = []
    async with (
        SandboxServer() as sandbox,
        CreditsClient(base_url=sandbox.url) as client,
        # If the loop is left early, requests under way end at once.
        aclosing(client.stream(rows(sandbox), timeout=30)) as outcomes,
    ):
        async for outcome in outcomes:
            if isinstance(outcome, Known) and outcome.credits < 500:
                low.append(outcome.key.label)
                print(f"{outcome.key.label} has only {outcome.credits} credits")
    print(f"{len(low)} customers have fewer than 500 credits")


if __name__ == "__main__":
    asyncio.run(main())
