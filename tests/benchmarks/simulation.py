"""A fleet too large for one machine, in virtual time: a million keys over 32 processes.

They share one limit in Redis. Only the consequences of the rules are measured: each process is a
`CreditsClient` with `RedisBackend`, all on one virtual loop; the script is the real one, run by a
Lua interpreter over a model of Redis's commands; the server is a strict sliding window. Round trips
to the server and to Redis are drawn at random. Memory is that of all the processes and both servers
together.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import resource
import statistics
from collections.abc import Iterator
from itertools import count

import attrs

from crustcredits import ApiKey, CreditsClient, RateLimit
from tests.benchmarks._measure import Benchmark, Bound, print_machine, print_table, whole
from tests.redis.lua import FakeRedis, between, connected
from tests.virtual import VirtualLoop, WindowServer, fake_client

LIMIT = 3000
PERIOD = 60.0
TRAVEL = (0.0, 0.02)
TO_REDIS = (0.0002, 0.001)


@attrs.frozen
class Simulated:
    """The result of one run."""

    seconds: float
    refused: int
    worst_window: int
    ends: list[float]  # of each process
    shares: list[
        float
        # Of the answers in the first half of the time, each process's share times the processes.
    ]
    messages: int
    megabytes: float


class _Counting(WindowServer):
    """Stores the times of arrivals without their keys, so that their memory is not measured."""

    def __init__(self) -> None:
        super().__init__(limit=LIMIT, period=PERIOD, seconds=TRAVEL)
        self.worst = 0

    def count(self, scope: object, name: str) -> tuple[bool, dict[str, str]]:
        answer = super().count(scope, name)
        self.worst = max(self.worst, len(self.windows[scope]))
        self.served.clear()
        return answer


def _keys(process: int, keys: int) -> Iterator[ApiKey]:
    for place in range(keys):
        yield ApiKey(f"simulated-{process}-{place}")


async def _check(
    client: CreditsClient, process: int, keys: int, answered: list[list[float]]
) -> float:
    """Get an answer for all its keys; note when every hundredth came."""
    loop, places = asyncio.get_running_loop(), count(1)
    async for outcome in client.stream(_keys(process, keys)):
        assert outcome.ok, outcome.error
        if next(places) % 100 == 0:
            answered[process].append(loop.time())
    await client.close()
    return loop.time()


async def _simulate(processes: int, keys: int) -> Simulated:
    server, redis = _Counting(), FakeRedis(latency=between(*TO_REDIS))
    limit = RateLimit(requests=LIMIT, scope="client")
    clients = [
        fake_client(
            server, rate_limit=limit, backend=connected(redis, prefix="simulated"), max_entries=1
        )
        for _ in range(processes)
    ]
    # The clock starts after the wait of the first message to an empty Redis.
    await clients[0].account("simulated-first")
    began = asyncio.get_running_loop().time()
    server.windows.clear()
    answered: list[list[float]] = [[] for _ in clients]
    before = _resident()
    ends = await asyncio.gather(
        *(_check(client, place, keys, answered) for place, client in enumerate(clients))
    )
    seconds = max(ends) - began
    first_half = [sum(time - began < seconds / 2 for time in times) for times in answered]
    mean = statistics.mean(first_half)
    return Simulated(
        seconds=seconds,
        refused=len(server.refused),
        worst_window=server.worst,
        ends=[end - began for end in ends],
        shares=[number / mean for number in first_half] if mean else [1.0],
        messages=redis.messages,
        megabytes=_resident() - before,
    )


def _resident() -> float:
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("redis")
    keys = options.keys // options.processes
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(_simulate(options.processes, keys))
    total = keys * options.processes
    floor = (math.ceil(total / LIMIT) - 1) * PERIOD
    print_table(
        f"Simulated: {total:,} keys over {options.processes} processes, one limit of "
        f"{LIMIT:,} requests in any {PERIOD:g} s, "
        f"round trips of at most {TRAVEL[1] * 1000:g} ms, to Redis of at most "
        f"{TO_REDIS[1] * 2000:g} ms.",
        ("", ""),
        [
            ("time, s", result.seconds),
            ("of the floor", f"{result.seconds / floor:.4f}"),
            ("429s", result.refused),
            ("worst window", result.worst_window),
            ("the first process ended after, s", min(result.ends)),
            ("answers of a process in the first half, of the mean: least", min(result.shares)),
            ("and most", max(result.shares)),
            ("messages to Redis a call", result.messages / total),
            ("memory that it took, of all together, MB", result.megabytes),
        ],
    )
    return [
        Bound("requests refused (429)", result.refused, 0),
        Bound(f"requests in any {PERIOD:g} s", result.worst_window, LIMIT),
        Bound("time, of the floor", result.seconds / floor, 1.06),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys",
        type=whole(LIMIT + 1),
        default=1_000_000,
        help="keys in all; a million take some minutes",
    )
    parser.add_argument(
        "--processes", type=whole(1), default=32, help="processes among which they are divided"
    )


BENCHMARK = Benchmark(
    "a million keys over 32 processes and one limit, simulated in virtual time", run, _add_options
)
