"""Processes that share their tokens in one Redis: what of each of them matters, without the client around it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import attrs
import pytest

from crustcredits._limits import TokenBucket
from crustcredits._tokens import FRESH
from crustcredits._turn import Turn
from crustcredits.redis import RedisBuckets
from tests.lua import FakeRedis, between, connected, opened
from tests.virtual import now

PATH = "/user/credits"
PERIOD = 60.0
LATE = 10.0
LEASE = PERIOD + 2 * LATE + FRESH
# Seconds that a message and its answer take at the most.
TRAVEL = 0.005


@attrs.define(eq=False)
class Worker:
    """A process: its buckets, and the one of them that all its requests go through."""

    redis: FakeRedis
    buckets: RedisBuckets
    bucket: TokenBucket
    on_wire: deque[int] = attrs.field(factory=deque)

    @property
    def name(self) -> str:
        return self.buckets._link._process

    async def acquire(self) -> int:
        return await self.bucket.acquire()

    def start(self, token: int = 0) -> bool:
        """Whether a token that was taken goes onto the wire; otherwise it goes back."""
        if not self.bucket.may_start(token, now()):
            self.bucket.unused(token)
            return False
        self.bucket.start()
        self.on_wire.append(token)
        return True

    async def send(self) -> None:
        """One request goes onto the wire."""
        while not self.start(await self.acquire()):
            pass

    def end(self) -> None:
        self.bucket.ended(self.on_wire.popleft())

    def abandon(self) -> None:
        self.bucket.abandoned(self.on_wire.popleft())

    def waits(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.send())

    def vanish(self) -> None:
        """It is gone, and says nothing any more."""
        vanish(self.buckets)

    async def close(self) -> None:
        await self.buckets.close()


def vanish(buckets: RedisBuckets) -> None:
    """The process with these is gone, and says nothing any more."""
    buckets._link.closed = True
    buckets._link._stop_timers()
    if buckets._link._task is not None:
        buckets._link._task.cancel()


def worker(
    redis: FakeRedis,
    *,
    name: str = "",
    limit: int = 5,
    period: float = PERIOD,
    late: float = LATE,
    pace: float | None = None,
    **options: Any,
) -> Worker:
    buckets = connected(redis, **options)
    buckets._link._process = name
    buckets.open(period=period, late=late, pace=pace)
    tokens = buckets.tokens(PATH, None, limit)
    return Worker(redis, buckets, TokenBucket(limit, period, late=late, tokens=tokens))


Start: TypeAlias = Callable[..., Worker]


@pytest.fixture
async def redis() -> AsyncIterator[FakeRedis]:
    """A server that has been in use for a while."""
    redis = opened(latency=between(0.0, TRAVEL / 2))

    def fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        redis.faults.append(f"{context['message']}: {context.get('exception')!r}")

    # What is raised where messages are sent and read, nobody waits for.
    asyncio.get_running_loop().set_exception_handler(fault)
    yield redis
    assert redis.faults == []


@pytest.fixture
async def start(redis: FakeRedis) -> AsyncIterator[Start]:
    """Begins processes, and closes those that are left."""
    workers: list[Worker] = []

    def begin(**options: Any) -> Worker:
        workers.append(worker(redis, **{"name": f"process {len(workers)}"} | options))
        return workers[-1]

    yield begin
    for one in workers:
        await one.close()


async def passes(until: float) -> None:
    """Time passes until then."""
    await asyncio.sleep(until - now())


def turn(bucket: TokenBucket, *, wanted: bool = True) -> tuple[Turn, asyncio.Task[int]]:
    """One that waits."""
    turn = Turn()
    turn.wanted = wanted
    return turn, asyncio.create_task(bucket.acquire(turn))
