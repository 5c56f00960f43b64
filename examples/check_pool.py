"""Check every key of a pool and print the credits of each.

Keys come from `CRUSTDATA_API_KEY` or `CRUSTDATA_API_KEYS`; without any, a sandbox with some keys
stands in for the API.
"""

import asyncio
from contextlib import AsyncExitStack

from crustcredits import CreditsClient, Known, Unknown, keys_from_env
from crustcredits.testing import Fault, SandboxServer


async def main() -> None:
    async with AsyncExitStack() as stack:
        keys, base_url = keys_from_env(), None
        if not keys:
            sandbox = await stack.enter_async_context(SandboxServer())
            sandbox.add_account("acme", credits="138940.37")
            keys = [sandbox.add_key(name, account="acme") for name in ("prod", "dev")]
            keys += [sandbox.add_key("globex", credits=0), sandbox.add_key("initech")]
            sandbox.fail(keys[-1], Fault.FORBIDDEN)
            base_url = sandbox.url
        client = await stack.enter_async_context(CreditsClient(base_url=base_url))
        report = await client.check(keys, timeout=120)

    for outcome in report:
        match outcome:
            case Known(key=key, credits=credits):
                print(f"{key.label:12} {credits}")
            case Unknown(key=key, error=error):
                print(f"{key.label:12} unknown: {error.message}")
    print(
        f"{'total':12} {report.total_credits} ({len(report.failed)} of {len(report)} keys unknown)"
    )


if __name__ == "__main__":
    asyncio.run(main())
