"""One call: what the client adds to the bare aiohttp session in processor time, with no limit in the way."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TypeAlias

import aiohttp

from crustcredits import ApiKey, CreditsClient, RateLimit
from crustcredits._wire import API_VERSION, USER_CREDITS
from tests.benchmarks._measure import (
    CONNECTIONS,
    Benchmark,
    Bound,
    Server,
    compare,
    in_turns,
    make_secrets,
    print_machine,
    print_table,
    rounds_text,
    server_process,
    whole,
)

# More than any run sends; the short window keeps the server from remembering them all.
_NO_LIMIT = 1_000_000
_SERVER = {"limit": _NO_LIMIT, "period": 1.0, "record": False}

# The value that was reached and a tenth. The target is printed beside it; what takes the time stands in README.md here.
_BOUND = 1.8
_TARGET = 1.25

# So that opening the connections is not counted.
_WARM_UP = 10 * CONNECTIONS

Ask: TypeAlias = Callable[[], Awaitable[object]]
Cost: TypeAlias = Callable[[str, Sequence[str], int], Coroutine[object, object, float]]


async def _ours(url: str, secrets: Sequence[str], calls: int) -> float:
    keys = [ApiKey(secret) for secret in secrets]
    async with CreditsClient(base_url=url, rate_limit=RateLimit(requests=_NO_LIMIT, pace=None)) as client:
        return await _cost([partial(client.balance, key) for key in keys], calls)


async def _bare(url: str, secrets: Sequence[str], calls: int) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:

        async def ask(secret: str) -> object:
            headers = {"Authorization": f"Bearer {secret}", "x-api-version": API_VERSION}
            async with session.get(url + USER_CREDITS, headers=headers) as response:
                return (await response.json())["credits"]

        return await _cost([partial(ask, secret) for secret in secrets], calls)


async def _cost(asks: Sequence[Ask], calls: int) -> float:
    """Microseconds of this process's processor time for each call."""
    await _call(asks, _WARM_UP)
    began = time.process_time()
    await _call(asks, calls)
    return (time.process_time() - began) / calls * 1e6


async def _call(asks: Sequence[Ask], calls: int) -> None:
    """Each with a key of its own, because calls for one key at the same time would be one call."""
    left = iter(range(calls))

    async def work(ask: Ask) -> None:
        for _ in left:
            await ask()

    await asyncio.gather(*map(work, asks))


def _round(server: Server, cost: Cost, secrets: Sequence[str], calls: int) -> float:
    # With a window of its own, or the last contender's requests would look like somebody else's.
    url = server.open(secrets, **_SERVER)
    microseconds = asyncio.run(cost(url, secrets, calls))
    server.close()
    return microseconds


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    secrets = make_secrets(CONNECTIONS)
    with server_process() as server:
        contenders = {"`CreditsClient.balance`": _ours, "bare `ClientSession.get`": _bare}
        costs = in_turns(
            {name: partial(_round, server, cost, secrets, options.calls) for name, cost in contenders.items()}, options.rounds
        )
    ratio, rows = compare(costs)
    print_table(
        f"{options.calls:,} calls a round, {CONNECTIONS} at a time; {rounds_text(options.rounds)}.",
        ("", "processor time a call, µs", "of the bare one's"),
        rows,
    )
    return [Bound(f"processor time a call, of the bare session's (target: {_TARGET})", ratio, _BOUND)]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=whole(1), default=5000, help="calls of each round")
    parser.add_argument("--rounds", type=whole(1), default=15, help="rounds")


BENCHMARK = Benchmark("processor time of one call, against the bare aiohttp session", run, _add_options)
