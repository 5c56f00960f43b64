"""Single-flight and cache entries: the cost of a waiter that joins a call, and of a fresh entry.

Single-flight: many callers ask at once for few keys, over real HTTP, and only one request for each
key may reach the wire. Beside it the cheapest possible task with a shared result: one that awaits
one of as many futures.

Cache entry: a fresh one, beside aiocache's memory holding the same balance.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
from aiocache import SimpleMemoryCache  # type: ignore[import-untyped]  # it has no py.typed

from crustcredits import ApiKey, Balance, CreditsClient, RateLimit
from tests.benchmarks._measure import (
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

KEYS = 20

# More than any run sends; the short window lets the server forget them soon.
_NO_LIMIT = 1_000_000
_SERVER = {"limit": _NO_LIMIT, "period": 1.0, "record": False}

# Seconds; about as long as the sandbox takes to answer. Not counted, because waiting takes no
# processor time.
_DELAY = 0.02


def _client(url: str) -> CreditsClient:
    return CreditsClient(base_url=url, rate_limit=RateLimit(requests=_NO_LIMIT, pace=None))


# --- single-flight


@attrs.frozen
class Shared:
    """One contender's one round."""

    cost: float  # microseconds of processor time for each caller
    requests: int


def _share_ours(server: Server, numbers: Iterator[int], askers: int) -> Shared:
    secrets = [f"benchmark-{next(numbers):06}" for _ in range(KEYS)]
    url = server.open(secrets, **_SERVER)
    cost = asyncio.run(_ask_client(url, [ApiKey(secret) for secret in secrets], askers))
    return Shared(cost, server.close().requests)


async def _ask_client(url: str, keys: Sequence[ApiKey], askers: int) -> float:
    async with _client(url) as client:
        began = time.process_time()
        balances = await asyncio.gather(
            *(client.balance(keys[place % KEYS], max_age=5) for place in range(askers))
        )
        cost = (time.process_time() - began) / askers * 1e6
    assert [balance.key for balance in balances] == [keys[place % KEYS] for place in range(askers)]
    return cost


async def _ask_futures(askers: int) -> Shared:
    loop = asyncio.get_running_loop()
    futures = [loop.create_future() for _ in range(KEYS)]

    async def ask(place: int) -> object:
        return await futures[place % KEYS]

    def answer() -> None:
        for future in futures:
            future.set_result(None)

    began = time.process_time()
    loop.call_later(_DELAY, answer)
    await asyncio.gather(*(ask(place) for place in range(askers)))
    return Shared((time.process_time() - began) / askers * 1e6, 0)


def _sharing(server: Server, askers: int, rounds: int) -> list[Bound]:
    contenders: dict[str, Callable[[], Shared]] = {
        "`CreditsClient.balance`": partial(_share_ours, server, itertools.count(), askers),
        "bare `asyncio.gather` over futures": lambda: asyncio.run(_ask_futures(askers)),
    }
    runs = in_turns(contenders, rounds)
    ratio, rows = compare({name: [run.cost for run in of_one] for name, of_one in runs.items()})
    requests = {name: max(run.requests for run in of_one) for name, of_one in runs.items()}
    print_table(
        f"{askers:,} callers at once for {KEYS} keys; {rounds_text(rounds)}, but of the "
        "requests the most.",
        ("", "processor time a caller, µs", "of the bare one's", "requests on the wire"),
        [(*row, requests[row[0]]) for row in rows],
    )
    return [
        Bound(f"requests on the wire for {askers:,} callers", max(requests.values()), KEYS),
        Bound("processor time a caller, of the bare gather's", ratio, 2.0),
    ]


# --- a cache entry


async def _hit_ours(url: str, key: ApiKey, hits: int) -> float:
    async with _client(url) as client:
        await client.balance(key)
        began = time.process_time()
        for _ in range(hits):
            await client.balance(key, max_age=60)
        return (time.process_time() - began) / hits * 1e9


async def _hit_peers(balance: Balance, hits: int) -> float:
    cache = SimpleMemoryCache()
    name = balance.key.name
    await cache.set(name, balance)
    began = time.process_time()
    for _ in range(hits):
        await cache.get(name)
    cost = (time.process_time() - began) / hits * 1e9
    assert await cache.get(name) is balance
    return cost


async def _fetch(url: str, key: ApiKey) -> Balance:
    async with _client(url) as client:
        return await client.balance(key)


def _kept(server: Server, hits: int, rounds: int) -> list[Bound]:
    secrets = make_secrets(1)
    key = ApiKey(secrets[0])
    url = server.open(secrets, **_SERVER)
    balance = asyncio.run(_fetch(url, key))
    contenders = {
        "`CreditsClient.balance`, cached": lambda: asyncio.run(_hit_ours(url, key, hits)),
        "aiocache `SimpleMemoryCache.get`": lambda: asyncio.run(_hit_peers(balance, hits)),
    }
    ratio, rows = compare(in_turns(contenders, rounds))
    asked = server.close().requests
    assert asked == 1 + rounds, f"{asked} requests instead of one by each client"
    print_table(
        f"A fresh cache entry, {hits:,} times a round; {rounds_text(rounds)}.",
        ("", "processor time, ns", "of aiocache's"),
        rows,
    )
    return [Bound("a cache entry, of aiocache's", ratio, 0.2)]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiocache")
    with server_process() as server:
        return _sharing(server, options.askers, options.rounds) + _kept(
            server, options.hits, options.rounds
        )


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--askers", type=whole(KEYS), default=10_000, help="callers at once, in each round"
    )
    parser.add_argument("--hits", type=whole(1), default=20_000, help="hits of each round")
    parser.add_argument("--rounds", type=whole(1), default=15, help="rounds")


BENCHMARK = Benchmark(
    "single-flight and cache entries, against a bare gather and aiocache", run, _add_options
)
