"""A pool in less quiet cases, over real sockets.

Refused and saturated accounts, plans, bursts, networks in front. A server in this process counts as
the row says, and sends all documented headers; the client has its default settings except for those
that the row names. Time is real, so a row takes as long as it says.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from secrets import token_hex
from typing import Any

import attrs
from aiohttp import web

from crustcredits import ApiKey, CreditsClient, Outcome, RateLimit
from tests.benchmarks._measure import Benchmark, Bound, print_machine, print_table, whole
from tests.ratelimit.worlds import Counter, Leaky, Saturated, Sliding

LIMIT = 300
# Seconds that an answer takes.
DELAY = (0.0, 0.02)
_requests = itertools.count(10**30)


@attrs.frozen(kw_only=True)
class Situation:
    """A pool and a server, with bounds.

    `at_most` are seconds until the first and until the last good answer, and keys that fail.
    """

    pool: Callable[[], Sequence[ApiKey]]
    at_most: tuple[float, float, int]
    count: Callable[[Hashable], Counter] = lambda scope: Sliding(LIMIT)
    scope: Callable[[str, str], Hashable] = lambda name, account: account
    special: Callable[[], Callable[[str, float], dict[str, str] | None]] = lambda: (
        lambda name, at: None
    )
    told: tuple[int, int] | None = None
    headers: bool = True
    good: Callable[[str], bool] = lambda name: True
    shuffled: bool = False
    limit: RateLimit = attrs.field(factory=RateLimit)
    timeout: float | None = None


class _Api:
    """A server of one situation."""

    def __init__(self, situation: Situation, pool: Sequence[ApiKey]) -> None:
        self._situation = situation
        self._keys = {key.get_secret_value(): key for key in pool}
        self._counters: dict[Hashable, Counter] = {}
        self._special = situation.special()
        self.refused = 0
        self._began = time.monotonic()

    async def answer(self, request: web.Request) -> web.Response:
        key = self._keys[request.headers["Authorization"].removeprefix("Bearer ")]
        whole = random.uniform(*DELAY)
        travel = random.uniform(0, whole)
        await asyncio.sleep(travel)
        refusal = self._special(key.name, time.monotonic() - self._began)
        if refusal is None:
            status, headers = self._count(key)
        else:
            status, headers = 429, refusal
        self.refused += status == 429
        headers["x-request-id"] = f"{next(_requests):040x}"
        await asyncio.sleep(whole - travel)
        body = b'{"message": "rate limited"}' if status == 429 else b'{"credits": 7}'
        return web.Response(
            status=status, headers=headers, body=body, content_type="application/json"
        )

    def _count(self, key: ApiKey) -> tuple[int, dict[str, str]]:
        situation = self._situation
        scope = situation.scope(key.name, key.account or key.name)
        counter = self._counters.get(scope)
        if counter is None:
            counter = self._counters[scope] = situation.count(scope)
        served, remaining, reset = counter.hit(time.monotonic())
        limit, remaining = situation.told or (counter.limit, remaining)
        told = {"limit": limit, "remaining": remaining, "reset": max(1, math.ceil(reset))}
        return 200 if served else 429, {
            f"x-ratelimit-{name}": str(value) for name, value in told.items()
        } if situation.headers else {}


@attrs.frozen
class Run:
    """The result of a situation."""

    first: float
    last: float
    refused: int
    failed: int


async def _play(situation: Situation) -> Run:
    pool = list(situation.pool())
    if situation.shuffled:
        random.shuffle(pool)
    api = _Api(situation, pool)
    app = web.Application()
    app.router.add_get("/user/credits", api.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    took: list[float] = []
    began = time.monotonic()

    def landed(outcome: Outcome[Any]) -> None:
        if outcome.ok and situation.good(outcome.key.name):
            took.append(time.monotonic() - began)
            if len(took) == good:
                done.set()

    good, done = sum(situation.good(key.name) for key in pool), asyncio.Event()
    async with CreditsClient(
        base_url=f"http://127.0.0.1:{port}", rate_limit=situation.limit
    ) as client:
        check = asyncio.create_task(
            client.check(pool, timeout=situation.timeout, on_outcome=landed)
        )
        waiting = asyncio.create_task(done.wait())
        # A check does not wait for keys that are refused for ever.
        await asyncio.wait([check, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=300)
        for task in (check, waiting):
            task.cancel()
        await asyncio.gather(check, waiting, return_exceptions=True)
    await runner.cleanup()
    return Run(
        min(took, default=math.inf), max(took, default=math.inf), api.refused, good - len(took)
    )


def _keys(count: int, name: str = "k", account: str | None = None) -> list[ApiKey]:
    return [
        ApiKey(f"sk-{token_hex(20)}", name=f"{name}{place}", account=account)
        for place in range(count)
    ]


def _edge() -> Callable[[str, float], dict[str, str] | None]:
    gate = Leaky(600, 20)
    return lambda name, at: None if gate.hit(at)[0] else {"Retry-After": "1"}


def _busy() -> Callable[[str, float], dict[str, str] | None]:
    return lambda name, at: {"x-ratelimit-reset": "1"} if name.startswith("busy") else None


def _is_ok(name: str) -> bool:
    return name.startswith("ok")


def _saturated(share: float, at_most: tuple[float, float, int], *, shuffled: bool) -> Situation:
    bad = int(500 * share)
    return Situation(
        pool=lambda: [*_keys(bad, "full"), *_keys(500 - bad, "ok")],
        count=lambda scope: (
            Saturated(LIMIT, str(scope)) if str(scope).startswith("full") else Sliding(LIMIT)
        ),
        good=_is_ok,
        shuffled=shuffled,
        at_most=at_most,
    )


SITUATIONS: dict[str, Situation] = {
    "64 always refused in front of 436": Situation(
        pool=lambda: [*_keys(64, "busy"), *_keys(436, "ok")],
        special=_busy,
        good=_is_ok,
        at_most=(0.5, 10.0, 0),
    ),
    "10 % saturated in front": _saturated(0.1, (0.5, 7.0, 0), shuffled=False),
    "30 % saturated anywhere": _saturated(0.3, (math.inf, 8.0, 0), shuffled=True),
    "50 % saturated anywhere": _saturated(0.5, (math.inf, 12.0, 0), shuffled=True),
    "1,000 accounts, timeout=20": Situation(
        pool=lambda: _keys(1000), timeout=20.0, at_most=(math.inf, 20.0, 0)
    ),
    "1,000 accounts, limit 20": Situation(
        pool=lambda: _keys(1000),
        count=lambda scope: Sliding(20),
        limit=RateLimit(requests=20),
        at_most=(math.inf, 15.0, 0),
    ),
    "1,000 accounts, limit 60": Situation(
        pool=lambda: _keys(1000),
        count=lambda scope: Sliding(60),
        limit=RateLimit(requests=60),
        at_most=(math.inf, 15.0, 0),
    ),
    "3,000 accounts, no pace": Situation(
        pool=lambda: _keys(3000), limit=RateLimit(pace=None), at_most=(math.inf, 6.0, 0)
    ),
    "200 keys behind a declared account of 1,000": Situation(
        pool=lambda: [*_keys(1000, "d", "D"), *_keys(200, "ok")],
        good=_is_ok,
        at_most=(0.1, math.inf, 0),
    ),
    "plans of 1,200": Situation(
        pool=lambda: _keys(600), count=lambda scope: Sliding(1200), at_most=(math.inf, 7.2, 0)
    ),
    "plans of 60": Situation(
        pool=lambda: _keys(600), count=lambda scope: Sliding(60), at_most=(math.inf, 7.2, 0)
    ),
    "mixed plans": Situation(
        pool=lambda: _keys(600),
        count=lambda scope: Sliding(60 if int(str(scope)[1:]) % 2 else 1200),
        at_most=(math.inf, 7.2, 0),
    ),
    "limit 30, remaining 29 for ever": Situation(
        pool=lambda: _keys(600),
        scope=lambda name, account: None,
        told=(30, 29),
        at_most=(math.inf, 1.05 * 63.2, 0),
    ),
    "a network in front, 10 a second": Situation(
        pool=lambda: _keys(500), special=_edge, at_most=(math.inf, math.inf, 1)
    ),
    "a burst of 20 without headers": Situation(
        pool=lambda: _keys(1000),
        scope=lambda name, account: None,
        count=lambda scope: Leaky(LIMIT, 20),
        headers=False,
        at_most=(math.inf, math.inf, 10),
    ),
}


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    rows: list[tuple[str, float, float, float, float]] = []
    bounds: list[Bound] = []
    for name, situation in SITUATIONS.items():
        if options.only not in name:
            continue
        runs = [asyncio.run(_play(situation)) for _ in range(options.rounds)]
        first, last, refused, failed = (
            statistics.median(part) for part in zip(*map(attrs.astuple, runs), strict=True)
        )
        rows.append((name, first, last, refused, failed))
        for what, measured, at_most in zip(
            ("first good, s", "last good, s", "failed"),
            (first, last, failed),
            situation.at_most,
            strict=True,
        ):
            if at_most < math.inf:
                bounds.append(Bound(f"{name}: {what}", measured, at_most))
    print_table(
        f"Default settings except for those named, 0 to {DELAY[1] * 1000:g} ms of delay; "
        f"medians of {options.rounds}.",
        ("", "first good, s", "last good, s", "429s", "failed"),
        rows,
    )
    return bounds


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole(1), default=3, help="runs of each row")
    parser.add_argument("--only", default="", help="only rows whose name contains this")


BENCHMARK = Benchmark(
    "refused and saturated accounts, plans and bursts, over real sockets", run, _add_options
)
