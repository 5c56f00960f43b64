"""Single calls beside a large check: how long each waits, with a reserve for them and without.

The server counts all keys together, in a strict sliding window, and answers after a random delay.
One client checks a pool that takes many windows. Beside it a `balance()` asks for a key at
intervals: each time another key, because callers of one key share a call. With `--period 60` a
whole run takes a quarter of an hour; `--seconds` ends it early. The two clients run at the same
time, with a server each: they wait for nearly all of it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import attrs

from crustcredits import CreditsClient, CrustCreditsError, RateLimit
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Figures,
    make_secrets,
    print_machine,
    print_table,
    server_process,
    whole,
)

LIMIT = 300
DELAY = (0.0, 0.02)

# Seconds between two single calls, as a share of the period: 7 s of a minute.
_EVERY = 7 / 60

# Keys of the single calls: more than ever wait at once.
_SINGLES = 1_000

# Most seconds that single calls with a reserve may wait, at any period: the median and the longest.
_MEDIAN, _LONGEST = 0.1, 1.0


@attrs.frozen
class Run:
    """The figures of one client."""

    waits: list[float]  # of the single calls; for calls without an end, until the end of the run
    failed: int  # single calls
    answered: int  # answered keys of the check
    seconds: float


async def _beside(
    url: str, pool: Sequence[str], singles: Sequence[str], limit: RateLimit, seconds: float
) -> Run:
    """Check the pool, and ask for a key beside it now and then.

    It ends when the check has ended or the time is over.
    """
    waits: list[float] = []
    landed: list[bool] = []
    failed = 0

    async def ask(client: CreditsClient, secret: str) -> None:
        nonlocal failed
        began = time.perf_counter()
        try:
            await client.balance(secret)
        except CrustCreditsError:
            failed += 1
        finally:
            waits.append(time.perf_counter() - began)

    began = time.perf_counter()
    async with CreditsClient(base_url=url, rate_limit=limit) as client:
        check = asyncio.create_task(
            client.check(pool, on_outcome=lambda outcome: landed.append(outcome.ok))
        )
        asking: list[asyncio.Task[None]] = []
        for secret in itertools.cycle(singles):
            await asyncio.wait([check], timeout=_EVERY * limit.period)
            if check.done() or time.perf_counter() - began > seconds:
                break
            asking.append(asyncio.create_task(ask(client, secret)))
        took = time.perf_counter() - began
        for task in (check, *asking):
            task.cancel()
        await asyncio.gather(check, *asking, return_exceptions=True)
    return Run(waits, failed, sum(landed), took)


async def _all(plays: Iterable[Coroutine[Any, Any, Run]]) -> list[Run]:
    return await asyncio.gather(*plays)


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    pool, period = make_secrets(options.keys), options.period
    singles = [f"benchmark-single-{place}" for place in range(_SINGLES)]
    reserves = {f"`reserve={options.reserve:g}`": options.reserve, "no reserve": 0.0}
    limits = [RateLimit(period=period, reserve=reserve) for reserve in reserves.values()]
    with ExitStack() as stack:
        servers = [stack.enter_context(server_process()) for _ in limits]
        urls = [
            server.open([*pool, *singles], limit=LIMIT, period=period, delay=DELAY)
            for server in servers
        ]
        seconds = options.seconds or math.inf
        runs = asyncio.run(
            _all(
                _beside(url, pool, singles, limit, seconds)
                for url, limit in zip(urls, limits, strict=True)
            )
        )
        figures = [server.close() for server in servers]
    targets = (f"{_MEDIAN:g}, {_LONGEST:g}", f"-, {period}")
    print_table(
        f"A single call every {_EVERY * period:.2g} s beside a `check` of {options.keys:,} "
        f"keys, {LIMIT} requests in any "
        f"{period} s counted for all together, {DELAY[0] * 1000:g} to {DELAY[1] * 1000:g} ms "
        "of delay.",
        (
            "",
            "single calls",
            "median, s",
            "longest, s",
            "target",
            "429s",
            "worst window",
            "keys of the check",
            "in, s",
        ),
        [
            (
                name,
                len(run.waits),
                statistics.median(run.waits),
                max(run.waits),
                target,
                *_seen(seen),
                run.answered,
                run.seconds,
            )
            for name, run, target, seen in zip(reserves, runs, targets, figures, strict=True)
        ],
    )
    reserved, plain = runs
    return [
        Bound(
            "with a reserve: the median wait of a single call, s",
            statistics.median(reserved.waits),
            _MEDIAN,
        ),
        Bound("with a reserve: the longest, s", max(reserved.waits), _LONGEST),
        Bound("without: the longest, s (a period)", max(plain.waits), period),
        Bound("single calls that failed", sum(run.failed for run in runs), 0),
        Bound("requests refused (429)", sum(seen.refused for seen in figures), 0),
    ]


def _seen(figures: Figures) -> tuple[int, int]:
    return figures.refused, figures.worst_window or 0


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=whole(1), default=5_000, help="keys of the check")
    parser.add_argument(
        "--period", type=whole(1), default=6, help="seconds that the server's window is long"
    )
    parser.add_argument(
        "--seconds",
        type=whole(0),
        default=0,
        help="seconds after which the check is broken off; 0 for never",
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.1,
        help="share of the limit that only single calls may take",
    )


BENCHMARK = Benchmark(
    "single calls beside a large check, with and without a reserve", run, _add_options
)
