"""The contenders that check a pool: the client, and other ways to do it.

Every contender has one session with as many connections. The others are a bare gather with a gate
before each request; a refused key (429) waits as long as the answer asks, and tries again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from typing import Any, TypeAlias

import aiohttp
from aiolimiter import AsyncLimiter
from pyrate_limiter import InMemoryBucket, Limiter, Rate

from crustcredits import CreditsClient, RateLimit
from crustcredits._http.addresses import USER_CREDITS
from crustcredits._http.protocol import API_VERSION
from tests.benchmarks._measure import CONNECTIONS

OURS = "crustcredits"
AIOLIMITER = "aiolimiter `AsyncLimiter`"
PYRATE = "pyrate-limiter `InMemoryBucket`"
BARE = "bare `asyncio.gather`"

# Checks all keys at a URL; returns how many were answered.
Contender: TypeAlias = Callable[[str, Sequence[str]], Coroutine[Any, Any, int]]
# Held around each request.
Gate: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]


async def ours(url: str, secrets: Sequence[str], *, limit: RateLimit) -> int:
    async with CreditsClient(base_url=url, rate_limit=limit) as client:
        return len((await client.check(secrets)).succeeded)


async def bare(url: str, secrets: Sequence[str]) -> int:
    return await gather(url, secrets, nullcontext)


async def aiolimiter(url: str, secrets: Sequence[str], *, limit: int, period: float) -> int:
    limiter = AsyncLimiter(limit, period)
    return await gather(url, secrets, lambda: limiter)


async def pyrate(url: str, secrets: Sequence[str], *, limit: int, period: float) -> int:
    with closing(Limiter(InMemoryBucket([Rate(limit, int(period * 1000))]))) as limiter:

        @asynccontextmanager
        async def gate() -> AsyncIterator[None]:
            await limiter.try_acquire_async()
            yield

        return await gather(url, secrets, gate)


async def gather(url: str, secrets: Sequence[str], gate: Gate) -> int:
    """Ask for all at once. Returns how many were answered."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        return len(await asyncio.gather(*(_ask(session, url, secret, gate) for secret in secrets)))


async def _ask(session: aiohttp.ClientSession, url: str, secret: str, gate: Gate) -> float:
    headers = {"Authorization": f"Bearer {secret}", "x-api-version": API_VERSION}
    while True:
        async with gate(), session.get(url + USER_CREDITS, headers=headers) as response:
            if response.status != 429:
                response.raise_for_status()
                credits: float = (await response.json())["credits"]
                return credits
            wait = float(response.headers["x-ratelimit-reset"])
        await asyncio.sleep(wait)
