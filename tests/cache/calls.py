"""Keys, answers and waits for the tests of shared calls and cached answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from crustcredits import (
    ApiKey,
    CreditsClient,
    Outcome,
    Report,
    Retry,
)
from tests.virtual import Reply

KEY = ApiKey("secret-0", name="prod")
BROKEN = Reply(status=503, body="")
UNKNOWN_KEY = Reply(status=401, body='{"message": "Invalid API key in request"}')
ONCE = Retry(attempts=1, backoff=0.0)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def counting(*replies: Reply) -> Callable[[str, int], Reply]:
    """Each key's answers in turn, the last one for ever; without any, one more credit each time."""
    return lambda name, times: (
        replies[min(times, len(replies) - 1)] if replies else Reply(credits=str(times + 1))
    )


async def outcome(client: CreditsClient, key: ApiKey = KEY, **options: Any) -> Outcome[Any]:
    report: Report[Any] = await client.check([key], **options)
    return report[0]
