"""Stop a batch that would run out of credits, and tell "too few credits" from "not known".

Buy credits for the first, and check again for the second. A second key of one account adds nothing.
It is a check, not a reservation: credits that others spend meanwhile are gone. A sandbox stands in
for the API.
"""

import asyncio

from crustcredits import CreditsClient, CreditsUnknownError, InsufficientCreditsError
from crustcredits.testing import Fault, SandboxServer


async def main() -> None:
    async with SandboxServer() as sandbox, CreditsClient(base_url=sandbox.url) as client:
        sandbox.add_account("acme", credits="5000.50")
        keys = [
            sandbox.add_key("acme-prod", account="acme"),
            sandbox.add_key("acme-dev", account="acme"),
        ]
        keys.append(sandbox.add_key("globex", credits=9000))
        sandbox.fail(keys[-1], Fault.INTERNAL_ERROR)

        # 4000 and a fifth more are there; 5000 and a fifth more are not, while globex has no
        # answer.
        for needed in (4000, 5000, 20_000):
            if needed == 20_000:
                sandbox.heal(keys[-1])
                client.invalidate()
            try:
                report = await client.require(needed, keys, margin=1.2, timeout=30, max_age=10)
            except CreditsUnknownError as error:
                print(
                    f"{needed}: wait, {error.available} are known, and "
                    f"{', '.join(error.unknown)} decides"
                )
            except InsufficientCreditsError as error:
                print(f"{needed}: stop, {error.needed - error.available} are missing")
            else:
                print(f"{needed}: go, {report.available_credits} are there")


if __name__ == "__main__":
    asyncio.run(main())
