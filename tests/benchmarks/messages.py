"""Messages to Redis for each call, over the real script in virtual time.

Each process checks keys of its own without end, so that there are always more calls than tokens. A
heartbeat is a message that neither reports nor asks for anything: while calls wait or tokens are
out, each process sends two a second. The messages of the last periods are counted.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from typing import Literal

import attrs

from crustcredits import RateLimit
from tests.benchmarks._measure import Benchmark, Bound, print_machine, print_table, whole
from tests.redis.lua import Message, between, connected, opened
from tests.virtual import WindowServer, fake_client, keys, now, run

# Messages a call that are aimed at, by the limit.
_TARGETS = {300: 0.6, 3: 3.0}
_PERIODS = {300: 4, 3: 20}
_PERIOD = 60.0
_SCOPES: tuple[Literal["client", "auto"], ...] = ("client", "auto")
# With this age the processes share answers, which travel in the same messages.
_MAX_AGE = 60.0


@attrs.frozen
class _Counted:
    calls: int
    messages: int
    heartbeats: int
    worst_window: int
    refused: int


def _says_something(message: Message) -> bool:
    return any(bucket.homes or bucket.returned or bucket.permits for bucket in message.buckets)


async def _count(
    processes: int, limit: int, scope: Literal["client", "auto"], max_age: float, periods: int
) -> _Counted:
    redis = opened(latency=between(0.0005, 0.002))
    server = WindowServer(limit=limit, seconds=(0.02, 0.05))
    rate_limit = RateLimit(requests=limit, scope=scope)
    clients = [
        fake_client(server, rate_limit=rate_limit, backend=connected(redis, share_answers=True))
        for _ in range(processes)
    ]
    many = (periods + 2) * limit
    checks = [
        asyncio.create_task(client.check(keys(many, str(number)), max_age=max_age))
        for number, client in enumerate(clients)
    ]
    await asyncio.sleep(_PERIOD - 1)
    redis.seen = []
    served, began = len(server.served), now()
    await asyncio.sleep(periods * _PERIOD - 2)
    assert now() > began
    messages = redis.seen
    told = sum(map(_says_something, messages))
    for check in checks:
        check.cancel()
    await asyncio.wait(checks)
    for client in clients:
        await client.close()
    return _Counted(
        len(server.served) - served,
        told,
        len(messages) - told,
        server.worst_window(),
        len(server.refused),
    )


def _run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    rows: list[tuple[object, ...]] = []
    bounds: list[Bound] = []
    for max_age, limits in ((0.0, (300, 3)), (_MAX_AGE, (300,))):
        for scope, limit, processes in itertools.product(_SCOPES, limits, (4, 8)):
            target = _TARGETS[limit]
            periods = options.periods or _PERIODS[limit]
            counted = run(_count(processes, limit, scope, max_age, periods))
            a_call = counted.messages / counted.calls
            name = f'{processes} processes, {limit} requests in 60 s, `scope="{scope}"`'
            if max_age:
                name += f", `max_age={max_age:g}`"
            rows.append((name, a_call, counted.heartbeats / counted.calls, counted.calls, target))
            bounds += [
                Bound(f"{name}: messages a call", a_call, target),
                Bound(f"{name}: worst window", counted.worst_window, limit),
                Bound(f"{name}: requests refused", counted.refused, 0),
            ]
    print_table(
        "Messages to Redis while calls wait for the limit, in virtual time.",
        ["", "messages a call", "heartbeats a call", "calls", "target"],
        rows,
    )
    return bounds


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--periods", type=whole(1), default=None, help="periods that are counted; by limit"
    )


BENCHMARK = Benchmark(
    about="messages to Redis for each call, in virtual time",
    run=_run,
    add_options=_add_options,
)
