"""Processes that share their tokens in one Redis: the relevant part of each, without a client."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeAlias

import attrs
import pytest

from crustcredits import BackendUnavailableError
from crustcredits._ratelimit.leased_tokens import LeasedTokens
from crustcredits.redis import RedisBackend
from crustcredits.redis.local_tokens import FRESH
from crustcredits.redis.shared_tokens import SharedTokens
from tests.redis.lua import FakeRedis, between, connected, opened
from tests.virtual import now

PATH = "/user/credits"
PERIOD = 60.0
LATE = 10.0
LEASE = PERIOD + 2 * LATE + FRESH
# Most seconds that a message and its answer take.
TRAVEL = 0.005


class Waiting:
    """Waiters for the tokens of one bucket, first come, first served: a minimal scheduler.

    All of them leave `kept` of the tokens unused.
    """

    def __init__(self, tokens: SharedTokens) -> None:
        self.tokens = LeasedTokens(tokens, self._wake, self._fail)
        self.kept = 0
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def room(self) -> int:
        return self.tokens.room(now(), self.kept)

    async def acquire(self) -> None:
        """Wait until a token is granted."""
        if self._waiters or self.room <= 0:
            await self._join()

    async def holds(self, count: int) -> None:
        """Wait until `count` tokens are granted, while no waiter takes one."""
        while (missing := count - self.room) > 0:
            await asyncio.gather(*(self._join() for _ in range(missing)))

    def start(self) -> bool:
        """Use a granted token for an attempt; return whether there was one."""
        if self.room <= 0:
            return False
        self.tokens.take(now())
        return True

    async def send(self) -> None:
        """Wait for a token and start one attempt."""
        await self.acquire()
        while not self.start():
            await self.acquire()

    def unused(self) -> None:
        """Give a granted token back."""
        assert self.start()
        self.tokens.put_back()

    def is_idle(self) -> bool:
        """Whether the bucket can be forgotten without a loss."""
        self.tokens.room(now(), 0)
        return self.tokens.is_whole

    async def _join(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._want()
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            self._want()

    def _want(self) -> None:
        self.tokens.want(len(self._waiters), self.kept)
        when = self.tokens.room_at(now(), self.kept)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            None
            if when is None or not self._waiters
            else asyncio.get_running_loop().call_at(when, self._wake)
        )

    def _wake(self) -> None:
        for waiter in [waiter for waiter in self._waiters if not waiter.done()][
            : max(0, self.room)
        ]:
            self._waiters.remove(waiter)
            waiter.set_result(None)
        self._want()

    def _fail(self) -> None:
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(BackendUnavailableError("out of reach"))


@attrs.define(eq=False)
class Worker:
    """One process: its backend, and the bucket of all its attempts."""

    redis: FakeRedis
    backend: RedisBackend
    waiting: Waiting
    name: str
    late: float = LATE
    period: float = PERIOD

    @property
    def bucket(self) -> LeasedTokens:
        return self.waiting.tokens

    async def acquire(self) -> None:
        await self.waiting.acquire()

    async def holds(self, count: int) -> None:
        await self.waiting.holds(count)

    def start(self) -> bool:
        return self.waiting.start()

    async def send(self) -> None:
        await self.waiting.send()

    def unused(self) -> None:
        self.waiting.unused()

    def is_idle(self) -> bool:
        return self.waiting.is_idle()

    def end(self) -> None:
        self.bucket.return_at(now() + self.period)

    def abandon(self) -> None:
        self.bucket.return_at(now() + self.period + self.late)

    def waits(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.send())

    def vanish(self) -> None:
        """End the process without another message."""
        vanish(self.backend)

    async def close(self) -> None:
        await self.backend.close()


def vanish(backend: RedisBackend) -> None:
    """End the process with this backend without another message."""
    # A fault is injected: a process cannot do this to itself.
    link = backend._link
    link.closed = True
    link._stop_timer()
    link.outage.close()
    if link._task is not None:
        link._task.cancel()


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
    backend = connected(redis, name=name, **options)
    backend.open(period=period, late=late, pace=pace, scope="client")
    waiting = Waiting(backend.tokens(PATH, None, limit))
    return Worker(redis, backend, waiting, name, late, period)


Start: TypeAlias = Callable[..., Worker]


@pytest.fixture
async def redis() -> AsyncIterator[FakeRedis]:
    """A server that has been in use for a while."""
    redis = opened(latency=between(0.0, TRAVEL / 2))

    def fault(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        redis.faults.append(f"{context['message']}: {context.get('exception')!r}")

    # Exceptions in timers and callbacks have no caller.
    asyncio.get_running_loop().set_exception_handler(fault)
    yield redis
    assert redis.faults == []


@pytest.fixture
async def start(redis: FakeRedis) -> AsyncIterator[Start]:
    """A function that starts processes; those left are closed after the test."""
    workers: list[Worker] = []

    def begin(**options: Any) -> Worker:
        options.setdefault("name", f"process {len(workers)}")
        workers.append(worker(redis, **options))
        return workers[-1]

    yield begin
    for one in workers:
        await one.close()


async def passes(until: float) -> None:
    """Sleep until then."""
    await asyncio.sleep(until - now())
