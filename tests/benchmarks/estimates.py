"""`quota().seconds_for(n)` beside the truth: the start of the last of `n` more calls.

In virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from crustcredits import CreditsClient, RateLimit
from tests.benchmarks._measure import Benchmark, Bound, print_machine, print_table
from tests.virtual import WindowServer, fake_client, keys, now, run

# An estimate is right within a third of the truth, or within this many seconds.
_SHARE, _SECONDS = 1 / 3, 0.5

Before = Callable[[CreditsClient, WindowServer], Awaitable[object]]


async def _nothing(client: CreditsClient, server: WindowServer) -> None:
    """The client is new."""


def _checked(count: int, wait: float = 1.0) -> Before:
    async def before(client: CreditsClient, server: WindowServer) -> None:
        await client.check(keys(count, "before"))
        await asyncio.sleep(wait)

    return before


def _beside(count: int, wait: float = 1.0) -> Before:
    """A check is under way."""

    async def before(client: CreditsClient, server: WindowServer) -> object:
        task = asyncio.create_task(client.check(keys(count, "beside")))
        await asyncio.sleep(wait)
        return task

    return before


def _neighbour(rate: float) -> Before:
    async def before(client: CreditsClient, server: WindowServer) -> None:
        def spend() -> None:
            server.spend(1)
            asyncio.get_running_loop().call_later(1 / rate, spend)

        spend()
        await asyncio.sleep(66)
        await client.check(keys(20, "before"))

    return before


def _spent(count: int) -> Before:
    """Other clients have spent this many requests at once, and this client was refused for it."""

    async def before(client: CreditsClient, server: WindowServer) -> None:
        server.spend(count)
        await client.check(keys(30, "before"), timeout=5)

    return before


@attrs.frozen
class Situation:
    """The state before, the number of more calls, and the settings of client and server."""

    before: Before
    count: int
    client: dict[str, Any] = attrs.field(factory=dict)
    server: dict[str, Any] = attrs.field(factory=dict)


_BY_KEY: dict[str, Any] = {"scope": lambda key: key.digest}
SITUATIONS = {
    "quiet, 1": Situation(_nothing, 1),
    "quiet, 250": Situation(_nothing, 250),
    "quiet, 600": Situation(_nothing, 600),
    "quiet, 1,000": Situation(_nothing, 1000),
    "quiet, no pace, 700": Situation(
        _nothing, 700, {"rate_limit": RateLimit(pace=None, scope="client")}
    ),
    "a limit of 60, 200": Situation(
        _nothing, 200, {"rate_limit": RateLimit(requests=60)}, {"limit": 60}
    ),
    "after 300, 10": Situation(_checked(300), 10),
    "after 300, half a minute later, 100": Situation(_checked(300, 30.0), 100),
    "after 100, 400": Situation(_checked(100), 400),
    "beside a check of 1,000, 1": Situation(_beside(1000), 1),
    "beside a check of 1,000, 100": Situation(_beside(1000), 100),
    "beside a check of 1,000, later, 500": Situation(_beside(1000, 70.0), 500),
    "beside a check of 5,000, 1,000": Situation(_beside(5000), 1000),
    "a slow server, 300": Situation(_checked(40), 300, server={"seconds": (0.3, 0.5)}),
    "a very slow server, 200": Situation(_checked(40), 200, server={"seconds": (2.0, 3.0)}),
    "accounts apart, 1,000": Situation(_checked(50, 3.0), 1000, server=_BY_KEY),
    "a neighbour of a quarter, 300": Situation(_neighbour(1.25), 300),
    "a neighbour of half, 300": Situation(_neighbour(2.5), 300),
    "200 spent by others, 200": Situation(_spent(200), 200),
    "all spent by others, 50": Situation(_spent(300), 50),
}


async def _play(situation: Situation) -> tuple[float, float]:
    server = WindowServer(**situation.server)
    async with fake_client(server, **situation.client) as client:
        task = await situation.before(client, server)
        began = now()
        said = client.quota().seconds_for(situation.count)
        await client.check(keys(situation.count, "more"))
        took = max(when for when, name in server.served if name.startswith("more")) - began
        if isinstance(task, asyncio.Task):
            task.cancel()
    return said, took


def run_all(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    rows = [(name, *run(_play(situation))) for name, situation in SITUATIONS.items()]
    wrong = [name for name, said, took in rows if abs(said - took) > max(_SHARE * took, _SECONDS)]
    print_table(
        "Seconds until the last of that many more calls starts.",
        ("", "said", "true", "within a third"),
        [(name, said, took, "no" if name in wrong else "yes") for name, said, took in rows],
    )
    return [
        Bound(f"of {len(rows)} estimates, the wrong ones (by more than a third)", len(wrong), 5)
    ]


BENCHMARK = Benchmark(
    "estimates of when calls start, beside the truth, in virtual time", run_all, lambda parser: None
)
