"""One call: the processor time that the client adds to the bare aiohttp session, and Redis to it.

No limit delays a call. Redis runs in a process of its own, whose time is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import aiohttp
import uvloop

from crustcredits import CreditsClient, RateLimit
from crustcredits._http.addresses import USER_CREDITS
from crustcredits._http.protocol import API_VERSION
from crustcredits._ratelimit.leased_tokens import CountedScope
from crustcredits.redis import RedisBackend
from tests.benchmarks._measure import (
    CONNECTIONS,
    Benchmark,
    Bound,
    Server,
    in_turns,
    make_secrets,
    median_ratio,
    print_machine,
    print_table,
    rounds_text,
    server_process,
    whole,
)
from tests.benchmarks._redis import redis_process

# More than any run sends; the short window lets the server forget them soon.
_NO_LIMIT = 1_000_000
_SERVER = {"limit": _NO_LIMIT, "period": 1.0, "record": False}

# Calls that open the connections, which are not counted.
_WARM_UP = 10 * CONNECTIONS

# Starts in a group, and seconds between groups: the result of the default pace.
_GROUP, _GAP = 3, 0.03

_SCOPES: Final[tuple[CountedScope, ...]] = ("auto", "client", "account")

# Does the work for new keys; returns the processor time in seconds, without that of the first ones.
Contender: TypeAlias = Callable[[str, Sequence[str]], Coroutine[Any, Any, float]]


def _client(url: str, pace: float | None = None) -> CreditsClient:
    return CreditsClient(base_url=url, rate_limit=RateLimit(requests=_NO_LIMIT, pace=pace))


async def _check(url: str, secrets: Sequence[str], *, pace: float | None = None) -> float:
    async with _client(url, pace) as client:
        if pace is None:
            await client.check(secrets[:_WARM_UP])
        began = time.process_time()
        report = await client.check(secrets[_WARM_UP:])
        assert report.ok
        return time.process_time() - began


async def _check_in_scope(
    url: str, secrets: Sequence[str], *, scope: CountedScope, redis: str | None = None
) -> float:
    """A check with a count in this process, or in the Redis of this URL."""
    backend = redis and RedisBackend(redis, prefix=uuid.uuid4().hex, fallback_share=1 / 4)
    rate_limit = RateLimit(requests=_NO_LIMIT, pace=None, scope=scope)
    async with CreditsClient(
        base_url=url, rate_limit=rate_limit, backend=backend or None
    ) as client:
        await client.check(secrets[:_WARM_UP])
        began = time.process_time()
        report = await client.check(secrets[_WARM_UP:])
        assert report.ok
        return time.process_time() - began


async def _stream(url: str, secrets: Sequence[str]) -> float:
    async with _client(url) as client:
        await client.check(secrets[:_WARM_UP])
        began = time.process_time()
        async for outcome in client.stream(secrets[_WARM_UP:]):
            assert outcome.ok
        return time.process_time() - began


async def _balance(url: str, secrets: Sequence[str], *, gate: bool) -> float:
    async with _client(url) as client:
        return await _gather(client.balance, secrets, gate=gate)


async def _bare(url: str, secrets: Sequence[str], *, gate: bool) -> float:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        return await _gather(partial(_ask, session, url), secrets, gate=gate)


async def _ask(session: aiohttp.ClientSession, url: str, secret: str) -> object:
    headers = {"Authorization": f"Bearer {secret}", "x-api-version": API_VERSION}
    async with session.get(url + USER_CREDITS, headers=headers) as response:
        return (await response.json())["credits"]


async def _gather(
    ask: Callable[[str], Coroutine[Any, Any, object]], secrets: Sequence[str], *, gate: bool
) -> float:
    """All at once, or behind a semaphore."""
    slots = asyncio.Semaphore(CONNECTIONS)

    async def gated(secret: str) -> object:
        async with slots:
            return await ask(secret)

    await asyncio.gather(*map(gated, secrets[:_WARM_UP]))
    began = time.process_time()
    await asyncio.gather(*map(gated if gate else ask, secrets[_WARM_UP:]))
    return time.process_time() - began


async def _paced(url: str, secrets: Sequence[str]) -> float:
    """The bare session, with starts as the default pace groups them."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS)) as session:
        began, tasks = time.process_time(), []
        for first in range(_WARM_UP, len(secrets), _GROUP):
            tasks += [
                asyncio.create_task(_ask(session, url, secret))
                for secret in secrets[first : first + _GROUP]
            ]
            await asyncio.sleep(_GAP)
        await asyncio.gather(*tasks)
        return time.process_time() - began


# By name: the contender, its peer, the target, and CI's bound: the reached value and a tenth.
_FREE: dict[str, tuple[Contender, str, float, float]] = {
    "`check`": (_check, "bare, gathered", 1.15, 1.55),
    "`stream`": (_stream, "bare, gathered", 1.15, 1.75),
    "`balance`, gathered": (partial(_balance, gate=False), "bare, gathered", 1.25, 1.8),
    "`balance`, under a semaphore": (
        partial(_balance, gate=True),
        "bare, under a semaphore",
        1.25,
        2.4,
    ),
}
_PEERS: dict[str, Contender] = {
    "bare, gathered": partial(_bare, gate=False),
    "bare, under a semaphore": partial(_bare, gate=True),
}
_PACED: dict[str, tuple[Contender, str, float, float]] = {
    "`check` at the default pace": (partial(_check, pace=100.0), "bare, in groups", 1.3, 1.55),
}
_PACED_PEERS: dict[str, Contender] = {"bare, in groups": _paced}


def _shared(redis: str) -> dict[str, tuple[Contender, str, float, float]]:
    """Checks that count in Redis, against the same ones in this process."""
    return {
        f'`check` over Redis, `scope="{scope}"`': (
            partial(_check_in_scope, scope=scope, redis=redis),
            f'`check`, `scope="{scope}"`',
            1.5,
            bound,
        )
        for scope, bound in zip(_SCOPES, (2.3, 1.45, 2.3), strict=True)
    }


_SHARED_PEERS: dict[str, Contender] = {
    f'`check`, `scope="{scope}"`': partial(_check_in_scope, scope=scope) for scope in _SCOPES
}

_names = itertools.count()


def _round(server: Server, contender: Contender, calls: int, runner: Callable[..., float]) -> float:
    """Microseconds of this process's processor time for each call."""
    secrets = [f"{secret}-{next(_names)}" for secret in make_secrets(_WARM_UP + calls)]
    # With a window of its own, because the last contender's requests would look like another
    # client's.
    url = server.open(secrets, **_SERVER)
    seconds = runner(contender(url, secrets))
    server.close()
    return seconds / calls * 1e6


def _measure(
    options: argparse.Namespace,
    ours: dict[str, tuple[Contender, str, float, float]],
    peers: dict[str, Contender],
    calls: int,
    rounds: int,
) -> list[Bound]:
    runner = uvloop.run if options.loop == "uvloop" else asyncio.run
    contenders = {name: contender for name, (contender, *_) in ours.items()} | peers
    with server_process() as server:
        costs = in_turns(
            {
                name: partial(_round, server, contender, calls, runner)
                for name, contender in contenders.items()
            },
            rounds,
        )
    ratios = {
        name: median_ratio(costs[name], costs[peer]) for name, (_, peer, _, _) in ours.items()
    }
    rows = [
        (
            name,
            sorted(costs[name])[rounds // 2],
            ratios.get(name, 1.0),
            ours[name][2] if name in ours else "",
        )
        for name in costs
    ]
    print_table(
        f"{calls:,} calls a round for keys never seen before, on {options.loop}; "
        f"{rounds_text(rounds)}.",
        ("", "processor time a call, µs", "of its peer's", "target"),
        rows,
    )
    return [
        Bound(f"{name}, of {peer} (target: {target})", ratios[name], bound)
        for name, (_, peer, target, bound) in ours.items()
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    bounds = _measure(options, _FREE, _PEERS, options.calls, options.rounds)
    few = min(5, options.rounds)
    bounds += _measure(options, _PACED, _PACED_PEERS, min(300, options.calls), few)
    with redis_process() as redis:
        shared = _shared(redis.url)
        return bounds + _measure(options, shared, _SHARED_PEERS, options.calls, few)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=whole(1), default=3000, help="calls of each round")
    parser.add_argument("--rounds", type=whole(1), default=15, help="rounds")
    parser.add_argument(
        "--loop", choices=("asyncio", "uvloop"), default="asyncio", help="event loop"
    )


BENCHMARK = Benchmark(
    "processor time of one call, against the bare aiohttp session", run, _add_options
)
