"""A whole pool under the rate limit: time, refusals and worst window, beside what else one would reach for.

The server keeps a strict sliding window and answers after a random delay. Every contender has to bring home every key,
over one session with 32 connections.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, nullcontext
from functools import partial
from typing import Any, TypeAlias

import aiohttp
import attrs
from aiolimiter import AsyncLimiter
from pyrate_limiter import InMemoryBucket, Limiter, Rate

from crustcredits import CreditsClient, RateLimit
from crustcredits._wire import API_VERSION, USER_CREDITS
from tests.benchmarks._measure import (
    CONNECTIONS,
    Benchmark,
    Bound,
    Figures,
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

LIMIT = 300
PERIOD = 6.0
DELAY = (0.0, 0.02)

OURS = "crustcredits"
BARE = "bare `asyncio.gather`"

# Brings home all keys from a URL; returns how many.
Contender: TypeAlias = Callable[[str, Sequence[str]], Coroutine[Any, Any, int]]
Gate: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]


@attrs.frozen
class Run:
    """One contender's one round."""

    seconds: float
    processor: float
    figures: Figures


# --- the contenders


async def _ours(url: str, secrets: Sequence[str], *, limit: RateLimit) -> int:
    async with CreditsClient(base_url=url, rate_limit=limit) as client:
        return len((await client.check(secrets)).succeeded)


async def _bare(url: str, secrets: Sequence[str]) -> int:
    return await _gather(url, secrets, nullcontext)


async def _aiolimiter(url: str, secrets: Sequence[str]) -> int:
    limiter = AsyncLimiter(LIMIT, PERIOD)
    return await _gather(url, secrets, lambda: limiter)


async def _pyrate(url: str, secrets: Sequence[str]) -> int:
    with closing(Limiter(InMemoryBucket([Rate(LIMIT, int(PERIOD * 1000))]))) as limiter:

        @asynccontextmanager
        async def gate() -> AsyncIterator[None]:
            await limiter.try_acquire_async()
            yield

        return await _gather(url, secrets, gate)


async def _gather(url: str, secrets: Sequence[str], gate: Gate) -> int:
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


# --- rounds


def _round(server: Server, contender: Contender, secrets: Sequence[str]) -> Run:
    url = server.open(secrets, limit=LIMIT, period=PERIOD, delay=DELAY)
    began, processor = time.perf_counter(), time.process_time()
    answered = asyncio.run(contender(url, secrets))
    run = Run(time.perf_counter() - began, time.process_time() - processor, server.close())
    assert answered == len(secrets), f"{answered} of {len(secrets)} keys were answered"
    return run


def _whole_pool(server: Server, keys: int, rounds: int) -> list[Bound]:
    contenders: dict[str, Contender] = {
        OURS: partial(_ours, limit=RateLimit(period=PERIOD)),
        f"{OURS}, `pace=None`": partial(_ours, limit=RateLimit(period=PERIOD, pace=None)),
        "pyrate-limiter `InMemoryBucket`": _pyrate,
        "aiolimiter `AsyncLimiter`": _aiolimiter,
        BARE: _bare,
    }
    secrets = make_secrets(keys)
    runs = in_turns({name: partial(_round, server, contender, secrets) for name, contender in contenders.items()}, rounds)
    floor = (math.ceil(keys / LIMIT) - 1) * PERIOD
    print_table(
        f"{keys:,} keys, {LIMIT} requests in any {PERIOD:g} s, {DELAY[0] * 1000:g} to {DELAY[1] * 1000:g} ms of delay; no way of "
        f"asking them can take less than {floor:g} s; {rounds_text(rounds)}, but of refusals, window and connections the worst.",
        ("", "time, s", "of the floor", "429s", "worst window", "processor time, s", "connections"),
        [(name, *_row(of_one, floor)) for name, of_one in runs.items()],
    )
    return _judge(runs[OURS], keys, floor)


def _row(runs: Sequence[Run], floor: float) -> tuple[float, ...]:
    seconds = statistics.median(run.seconds for run in runs)
    processor = statistics.median(run.processor for run in runs)
    refused, window, connections = _worst(runs)
    return seconds, seconds / floor, refused, window, processor, connections


def _worst(runs: Sequence[Run]) -> tuple[int, int, int]:
    figures = [run.figures for run in runs]
    refused = max(figure.refused for figure in figures)
    return refused, max(figure.worst_window or 0 for figure in figures), max(figure.connections for figure in figures)


def _judge(runs: Sequence[Run], keys: int, floor: float) -> list[Bound]:
    refused, window, connections = _worst(runs)
    # The floor is when the last window opens. What the pace costs is to start the keys of that window one by one, where
    # without it they would start at once; in the windows before, it only spreads what had to wait anyway.
    pace_cost = (keys % LIMIT or LIMIT) / (RateLimit().pace or math.inf)
    return [
        Bound("requests refused (429)", refused, 0),
        Bound(f"requests in any {PERIOD:g} s", window, LIMIT),
        Bound(
            f"seconds for {keys:,} keys (1.03 of the floor, and {pace_cost:g} s over which the pace spreads the last window's)",
            statistics.median(run.seconds for run in runs),
            1.03 * floor + pace_cost,
        ),
        Bound("connections", connections, CONNECTIONS),
    ]


def _one_window(server: Server, rounds: int) -> list[Bound]:
    contenders: dict[str, Contender] = {
        f"{OURS}, `pace=None`": partial(_ours, limit=RateLimit(period=PERIOD, pace=None)),
        BARE: _bare,
    }
    secrets = make_secrets(LIMIT)
    runs = in_turns({name: partial(_round, server, contender, secrets) for name, contender in contenders.items()}, rounds)
    ratio, rows = compare({name: [run.seconds * 1000 for run in of_one] for name, of_one in runs.items()})
    print_table(
        f"{LIMIT} keys, which one window holds; sessions opened and closed; {rounds_text(rounds)}.",
        ("", "time, ms", "of the bare one's", "429s"),
        [(*row, _worst(runs[row[0]])[0]) for row in rows],
    )
    return [Bound(f"time for {LIMIT} keys without a pace, of the bare one's", ratio, 1.15)]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiolimiter", "pyrate-limiter")
    with server_process() as server:
        return _whole_pool(server, options.keys, options.rounds) + _one_window(server, options.window_rounds)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=whole(LIMIT + 1), default=1000, help="keys of the whole pool")
    parser.add_argument("--rounds", type=whole(1), default=3, help="rounds with the whole pool; each takes well over a minute")
    parser.add_argument("--window-rounds", type=whole(1), default=25, help="rounds with the keys of one window")


BENCHMARK = Benchmark("a pool of keys under the rate limit, against other limiters", run, _add_options)
