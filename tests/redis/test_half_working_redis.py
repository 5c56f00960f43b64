"""A Redis that works by half: within six seconds calls proceed, or fail as configured.

One line of the log says why. The clients reach a real server through a proxy that loses, stalls or
delays answers, each with one of the settings of `on_outage`. They run beside each other, because
most of their time they wait.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Literal, TypeAlias

import attrs
import pytest

from crustcredits import (
    ApiKey,
    BackendUnavailableError,
    CreditsClient,
    CrustCreditsError,
    RateLimit,
    RateLimitWaitError,
)
from crustcredits.redis import RedisBackend
from crustcredits.testing import SandboxServer
from tests.redis.proxy import Proxy
from tests.redis.test_redis import open_prefix
from tests.servers import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture, found by its name

pytestmark = pytest.mark.outages

OnOutage: TypeAlias = Literal["local", "strict", "raise"]

SETTINGS: tuple[OnOutage, ...] = ("local", "strict", "raise")

# Seconds after the first loss within which calls proceed or fail.
SOON = 6.0
# Seconds that a call may take: in an outage, during which a strict process sends nothing for longer
# than this, and where calls proceed, of which one a second may be all.
SHORT, LONG = 4.0, 10.0
LIMIT, PERIOD, LATE = 30, 1.0, 0.5

# The setting of the client that the running task belongs to.
setting: ContextVar[str] = ContextVar("setting", default="unknown")

UNREACHABLE = "Redis is out of reach ("
LOSES = "Redis lost 3 messages within 10 s, so calls wait longer; last cause: "
TIMEOUT = "no reply within 1 s"


@attrs.define
class Ended:
    """How calls ended, and when."""

    calls: list[tuple[float, CrustCreditsError | None]] = attrs.field(factory=list)

    def answered_since(self, moment: float) -> int:
        return sum(at > moment and error is None for at, error in self.calls)

    def errors_since(self, moment: float) -> set[type[CrustCreditsError]]:
        return {type(error) for at, error in self.calls if at > moment and error is not None}


@attrs.frozen
class User:
    """A client that is used all the time.

    Attributes:
        on_outage: Its setting.
        proxy: Between it and Redis.
        client: The client.
        sandbox: The API.
        timeout: Seconds that each call may take.
        ended: Its calls.
    """

    on_outage: OnOutage
    proxy: Proxy
    client: CreditsClient
    sandbox: SandboxServer
    timeout: float
    ended: Ended = attrs.field(factory=Ended)

    async def uses(self, key: ApiKey) -> None:
        while True:
            error = None
            try:
                await self.client.balance(key, timeout=self.timeout)
            except CrustCreditsError as raised:
                error = raised
            self.ended.calls.append((now(), error))
            await asyncio.sleep(0.05)

    async def has(self, condition: Callable[[], object]) -> None:
        """Wait until it is true, six seconds after the first loss at the latest."""
        while not condition():
            lost = self.proxy.lost_at
            assert lost is None or now() < lost + SOON, f"{self.on_outage}: not within {SOON:g} s"
            await asyncio.sleep(0.02)


def now() -> float:
    return asyncio.get_running_loop().time()


@asynccontextmanager
async def user(server: RedisServer, on_outage: OnOutage, timeout: float) -> AsyncIterator[User]:
    """A client with calls under way, that has had answers."""
    prefix = uuid.uuid4().hex
    await asyncio.to_thread(open_prefix, server, prefix)
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(SandboxServer(limit=LIMIT, period=PERIOD))
        proxy = await stack.enter_async_context(Proxy(server.socket))
        backend = RedisBackend(proxy.url, prefix=prefix, on_outage=on_outage, fallback_share=1 / 2)
        client = await stack.enter_async_context(
            CreditsClient(
                base_url=sandbox.url,
                backend=backend,
                rate_limit=RateLimit(requests=LIMIT, period=PERIOD, scope="client", pace=None),
                request_timeout=LATE,
            )
        )
        one = User(on_outage, proxy, client, sandbox, timeout)
        tasks = [asyncio.create_task(one.uses(sandbox.add_key())) for _ in range(3)]
        try:
            await one.has(lambda: len(one.ended.calls) >= 3)
            yield one
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task


class Lines(logging.Handler):
    """The warnings of each client: what a client starts runs in the context of its test."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.by_setting: defaultdict[str, list[str]] = defaultdict(list)

    def emit(self, record: logging.LogRecord) -> None:
        self.by_setting[setting.get()].append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    logger = logging.getLogger("crustcredits")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


async def assert_each_setting_sees(
    server: RedisServer,
    fault: Callable[[Proxy], object],
    sees: Callable[[User, float], Awaitable[None]],
    *,
    timeout: float = SHORT,
) -> None:
    """Let the fault begin for a client of each setting, and check that each sees its effect."""

    async def course(on_outage: OnOutage) -> None:
        setting.set(on_outage)
        async with user(server, on_outage, timeout) as one:
            fault(one.proxy)
            await one.has(lambda: one.proxy.lost_at is not None)
            assert one.proxy.lost_at is not None
            await sees(one, one.proxy.lost_at)

    async with asyncio.TaskGroup() as tasks:
        for on_outage in SETTINGS:
            tasks.create_task(course(on_outage))


async def sees_an_outage(one: User, lost: float) -> None:
    """Calls proceed with the process's own tokens, wait until their deadline, or fail."""
    if one.on_outage == "local":
        await one.has(lambda: one.client.quota().degraded)
        degraded = now()
        await one.has(lambda: one.ended.answered_since(degraded))
    elif one.on_outage == "strict":
        await one.has(lambda: one.ended.errors_since(lost))
        assert one.ended.errors_since(lost) == {RateLimitWaitError}
        # A token of before is used within a second, and its request arrives within its timeout.
        assert not [each for each in one.sandbox.arrivals if each.at > lost + 1 + LATE]
    else:
        await one.has(lambda: one.ended.errors_since(lost))
        assert one.ended.errors_since(lost) == {BackendUnavailableError}


def assert_one_line_each(lines: Lines, start: str) -> None:
    """Each client has logged one warning."""
    assert set(lines.by_setting) == set(SETTINGS)
    for of_one in lines.by_setting.values():
        (line,) = of_one
        assert line.startswith(start)


def sees_losses(lines: Lines) -> Callable[[User, float], Awaitable[None]]:
    """Calls proceed, and after the third loss a line of the log says why they take longer."""

    async def sees(one: User, lost: float) -> None:
        await one.has(lambda: lines.by_setting[one.on_outage])
        said = now()
        await one.has(lambda: one.ended.answered_since(said))
        assert not one.ended.errors_since(0)

    return sees


# --- answers are lost


@pytest.mark.parametrize("each", [2, 3])
async def test_calls_proceed_although_each_nth_answer_is_lost(
    redis_server: RedisServer, lines: Lines, each: int
) -> None:
    def loses(proxy: Proxy) -> None:
        proxy.lose_each = each

    await assert_each_setting_sees(redis_server, loses, sees_losses(lines), timeout=LONG)
    assert_one_line_each(lines, LOSES + "ConnectionError: ")


@pytest.mark.parametrize("answers", [1, 3])
async def test_calls_proceed_although_each_connection_stalls_after_some_answers(
    redis_server: RedisServer, lines: Lines, answers: int
) -> None:
    def stalls(proxy: Proxy) -> None:
        proxy.stall_after = answers

    await assert_each_setting_sees(redis_server, stalls, sees_losses(lines), timeout=LONG)
    assert_one_line_each(lines, LOSES + TIMEOUT)


# --- answers are late


async def test_calls_proceed_over_a_slow_connection(
    redis_server: RedisServer, lines: Lines
) -> None:
    """Answers come within a second, so nothing is lost, and there is nothing to log."""

    def slows(proxy: Proxy) -> None:
        proxy.delay = 0.5

    async def sees(one: User, lost: float) -> None:
        await one.has(lambda: one.ended.answered_since(lost + 2.5))
        assert not one.ended.errors_since(0)

    await assert_each_setting_sees(redis_server, slows, sees, timeout=LONG)
    assert not lines.by_setting


@pytest.mark.parametrize("delay", [1.5, 3.0])
async def test_a_redis_that_answers_late_is_an_outage(
    redis_server: RedisServer, lines: Lines, delay: float
) -> None:
    def slows(proxy: Proxy) -> None:
        proxy.delay = delay

    await assert_each_setting_sees(redis_server, slows, sees_an_outage)
    assert_one_line_each(lines, UNREACHABLE + TIMEOUT)


async def test_a_redis_whose_new_connections_are_slow_is_an_outage(
    redis_server: RedisServer, lines: Lines
) -> None:
    """redis-py waits for answers before it sends a message: together longer than a second."""

    def slows(proxy: Proxy) -> None:
        proxy.delay = 0.8
        proxy.close_connections()

    await assert_each_setting_sees(redis_server, slows, sees_an_outage)
    assert_one_line_each(lines, UNREACHABLE + TIMEOUT)


# --- no answer at all


async def test_half_open_connections_are_an_outage(redis_server: RedisServer, lines: Lines) -> None:
    """Connections are accepted, and nothing is answered."""

    def opens_by_half(proxy: Proxy) -> None:
        proxy.is_half_open = True

    await assert_each_setting_sees(redis_server, opens_by_half, sees_an_outage)
    assert_one_line_each(lines, UNREACHABLE + TIMEOUT)


async def test_closed_connections_are_an_outage(redis_server: RedisServer, lines: Lines) -> None:
    await assert_each_setting_sees(redis_server, Proxy.cut, sees_an_outage)
    assert_one_line_each(lines, UNREACHABLE + "ConnectionError: ")
