"""The token bucket by itself, against aiolimiter's: a token that is free, and a long queue for those that are not.

Takes: nobody waits, and there is a token for each; ours is also given back, aiolimiter has no such thing.

Drains: so many tasks queue at once, with all tokens out, and are let in at 300 a minute for both, in virtual time: the
clock stands while anything is left to do and then jumps to the next timer, so nothing but processor time is counted.
On a real clock either the wait for the clock or a rate that nobody uses would decide: at 300,000 a second aiolimiter's
level sinks faster than its queue moves, and it needs no timer at all. What the same tasks cost that wait for one plain
future is taken off, and the garbage collector is off, because its pauses depend on what else the process holds.

aiolimiter gives one token at a time, evenly. Ours come home as they were used: all at once after a burst, as when a queue
forms in earnest, which is judged; or evenly, when they were used that way, where each of them needs a turn of the loop.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeAlias

from aiolimiter import AsyncLimiter

from crustcredits._limits import TokenBucket
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    compare,
    in_turns,
    median_ratio,
    print_machine,
    print_table,
    rounds_text,
    whole,
)
from tests.virtual import VirtualLoop

TOKENS = 300
PERIOD = 60.0
FEW, MANY = 20_000, 100_000

_BARE = "a plain future"
_EVENLY = "crustcredits, tokens home evenly"
_AT_ONCE = "crustcredits, tokens home all at once"
_PEER = "aiolimiter"

Take: TypeAlias = Callable[[], Awaitable[None]]


# --- takes


async def _take_ours(takes: int) -> float:
    bucket = TokenBucket(takes, PERIOD)
    began = time.process_time()
    for _ in range(takes):
        await bucket.acquire()
        bucket.ended()
    return (time.process_time() - began) / takes * 1e9


async def _take_peers(takes: int) -> float:
    limiter = AsyncLimiter(takes, PERIOD)
    began = time.process_time()
    for _ in range(takes):
        await limiter.acquire()
    return (time.process_time() - began) / takes * 1e9


def _takes(takes: int, rounds: int) -> list[Bound]:
    contenders = {"crustcredits": lambda: asyncio.run(_take_ours(takes)), _PEER: lambda: asyncio.run(_take_peers(takes))}
    ratio, rows = compare(in_turns(contenders, rounds))
    print_table(
        f"A token that is free, {takes:,} times a round; {rounds_text(rounds)}.",
        ("", "processor time, ns", "of aiolimiter's"),
        rows,
    )
    return [Bound("a free token, of aiolimiter's", ratio, 1.5)]


# --- drains: each function takes all the tokens, and returns what a waiter does


async def _future() -> Take:
    loop = asyncio.get_running_loop()
    opened = loop.create_future()
    loop.call_later(PERIOD, opened.set_result, None)

    async def take() -> None:
        await opened

    return take


async def _bucket(*, evenly: bool) -> Take:
    bucket = TokenBucket(TOKENS, PERIOD)

    async def take() -> None:
        await bucket.acquire()
        bucket.ended()

    for _ in range(TOKENS):
        await take()
        await asyncio.sleep(PERIOD / TOKENS if evenly else 0)
    return take


async def _limiter() -> Take:
    limiter = AsyncLimiter(TOKENS, PERIOD)

    async def take() -> None:
        await limiter.acquire()

    for _ in range(TOKENS):
        await take()
    return take


def _drain(emptied: Callable[[], Awaitable[Take]], waiters: int) -> float:
    """Microseconds of processor time for each of so many tasks, from its creation to its end."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(_drain_in_loop(emptied, waiters))


async def _drain_in_loop(emptied: Callable[[], Awaitable[Take]], waiters: int) -> float:
    take = await emptied()
    left = waiters
    drained = asyncio.Event()

    async def wait() -> None:
        nonlocal left
        await take()
        left -= 1
        if not left:
            drained.set()

    gc.disable()
    try:
        began = time.process_time()
        tasks = [asyncio.create_task(wait()) for _ in range(waiters)]
        # Awaiting the tasks themselves would wake this one after each of them.
        await drained.wait()
        return (time.process_time() - began) / len(tasks) * 1e6
    finally:
        gc.enable()


def _drain_each(waiters: int, rounds: int) -> dict[str, list[float]]:
    """For each contender the rounds' costs of a waiter, without what the plain future costs."""
    emptied: dict[str, Callable[[], Awaitable[Take]]] = {
        _BARE: _future,
        _EVENLY: partial(_bucket, evenly=True),
        _AT_ONCE: partial(_bucket, evenly=False),
        _PEER: _limiter,
    }
    costs = in_turns({name: partial(_drain, start, waiters) for name, start in emptied.items()}, rounds)
    bare = costs.pop(_BARE)
    return {name: [cost - base for cost, base in zip(of_one, bare, strict=True)] for name, of_one in costs.items()}


def _drains(rounds: int) -> list[Bound]:
    few, many = _drain_each(FEW, rounds), _drain_each(MANY, rounds)
    print_table(
        f"A queue at {TOKENS} tokens in {PERIOD:g} s: processor time for each waiter; {rounds_text(rounds)}.",
        ("", f"{FEW:,} waiters, µs", f"{MANY:,} waiters, µs", f"of aiolimiter's with {MANY:,}"),
        [
            (name, statistics.median(few[name]), statistics.median(many[name]), median_ratio(many[name], many[_PEER]))
            for name in many
        ],
    )
    growth = statistics.median(many[_AT_ONCE]) / statistics.median(few[_AT_ONCE])
    return [
        Bound(f"a waiter of {MANY:,}, tokens home all at once, of aiolimiter's", median_ratio(many[_AT_ONCE], many[_PEER]), 0.2),
        Bound(f"a waiter of {MANY:,}, of one of {FEW:,}", growth, 1.25),
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiolimiter")
    return _takes(options.takes, options.rounds) + _drains(options.drain_rounds)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--takes", type=whole(1), default=200_000, help="takes of each round")
    parser.add_argument("--rounds", type=whole(1), default=15, help="rounds of takes")
    parser.add_argument("--drain-rounds", type=whole(1), default=5, help="rounds of drains")


BENCHMARK = Benchmark("the token bucket by itself, against aiolimiter", run, _add_options)
