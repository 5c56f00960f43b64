"""The README's table of outages, row by row, with real processes, a real Redis and a real API.

The bounds are those that the README states. Each test runs workers on both loops, so it does not
depend on the loop of the test. An outage takes its real time: two seconds until degraded mode, one
lease, and for strict processes seven seconds more. These moments are waited for.
"""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs
import pytest

from crustcredits.testing import SandboxServer
from tests.redis.outage_fleet import (
    LOOPS,
    Member,
    add_keys,
    arrivals_of,
    fleet,
    out,
    passes,
    until,
    worst_window,
)
from tests.redis.outage_worker import Settings
from tests.redis.proxy import Proxy
from tests.redis.test_redis import open_prefix
from tests.servers import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture, found by its name

pytestmark = [pytest.mark.any_loop, pytest.mark.outages, pytest.mark.timeout(60)]

LIMIT = 30
PERIOD = 1.2
LATE = 0.5
PROCESSES = 3
SHARE = LIMIT // PROCESSES

# From the README: "a lease is one period, two request timeouts and one second".
LEASE = PERIOD + 2 * LATE + 1.0
# "With `strict` a process waits seven seconds longer."
STRICT_LEASE = LEASE + 7.0
# "… when Redis has not answered for 2.5 s". A message is sent each half second, and one without an
# answer takes a second: so late the process can notice that this time is over.
NOTICED = 2.5 + 0.5 + 1.0
# A token that was granted before the outage is used within a second, and arrives within the
# request's timeout.
ARRIVED = 1.0 + LATE
# Seconds that processes and their timers may be late on a busy machine.
BUSY = 0.5

# Several calls of each worker are under way or wait at any time.
CALLS = 8


@attrs.frozen
class Group:
    """Workers that spend one quota, each with a proxy before Redis."""

    sandbox: SandboxServer
    proxies: Sequence[Proxy]
    members: Sequence[Member]
    prefix: str

    def arrivals(self, places: Sequence[int] | None = None) -> list[float]:
        """When the requests of these workers, or of all, arrived at the API."""
        return arrivals_of(self.sandbox, range(PROCESSES) if places is None else places)

    def window(
        self, since: float, until: float, places: Sequence[int] | None = None, *, longer: float = 0
    ) -> int:
        """The worst window that lies between two moments."""
        times = [at for at in self.arrivals(places) if since < at <= until]
        return worst_window(times, PERIOD + longer)

    def count(self, since: float, until: float, places: Sequence[int]) -> int:
        """How many requests arrived between two moments."""
        return sum(since < at <= until for at in self.arrivals(places))

    async def warm_up(self) -> None:
        """Wait until every worker has had answers for two periods, and the limit is used up."""
        await until(lambda: all(member.calls for member in self.members), 10)
        began = time.monotonic()
        await passes(began + 2 * PERIOD)
        # Otherwise no window could show anything.
        assert self.window(began, time.monotonic()) >= 0.9 * LIMIT

    def cut(self, places: Sequence[int]) -> float:
        """Cut these workers off from Redis. Returns the time."""
        for place in places:
            self.proxies[place].cut()
        return time.monotonic()

    def says_one_line(self, places: Sequence[int]) -> None:
        """These workers have logged that Redis is out of reach, once each, and the others nothing.

        Raises:
            AssertionError: Otherwise.
        """
        for member in self.members:
            lines = [line.text[:23] for line in member.log]
            assert lines == (["Redis is out of reach ("] if member.place in places else [])


@asynccontextmanager
async def group(
    server: RedisServer,
    on_outage: str = "local",
    *,
    api_limit: int = LIMIT,
    delay: tuple[float, float] = (0.0, 0.02),
) -> AsyncIterator[Group]:
    prefix = uuid.uuid4().hex
    await asyncio.to_thread(open_prefix, server, prefix)
    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(
            SandboxServer(limit=api_limit, period=PERIOD, delay=delay)
        )
        proxies = [await stack.enter_async_context(Proxy(server.socket)) for _ in range(PROCESSES)]
        secrets = add_keys(sandbox, PROCESSES, CALLS)
        settings = [
            Settings(
                loop=LOOPS[place % len(LOOPS)],
                api=sandbox.url,
                redis=proxies[place].url,
                prefix=prefix,
                on_outage=on_outage,
                share=1 / PROCESSES,
                limit=LIMIT,
                period=PERIOD,
                request_timeout=LATE,
                timeout=60.0,
                keys=secrets[place],
            )
            for place in range(PROCESSES)
        ]
        members = await stack.enter_async_context(fleet(settings))
        one = Group(sandbox, proxies, members, prefix)
        await one.warm_up()
        yield one


ALL, SOME, OTHERS = [0, 1, 2], [0], [1, 2]


async def at_once(*courses: Any) -> None:
    """Run the cases of a row beside each other, because most of their time they wait."""
    async with asyncio.TaskGroup() as tasks:
        for course in courses:
            tasks.create_task(course)


# --- all processes lose Redis, or some


async def test_strict_processes_without_redis_never_exceed_the_limit(
    redis_server: RedisServer,
) -> None:
    """All lose Redis, or some: they send nothing for one lease, and then use their shares."""

    async def course(places: list[int]) -> None:
        async with group(redis_server, "strict") as one:
            lost = one.cut(places)
            # The last message before degraded mode is what the lease is counted from.
            used = lost + NOTICED + STRICT_LEASE + BUSY
            await passes(used + 2 * PERIOD)
            ended = time.monotonic()
            assert one.window(0, ended) <= LIMIT
            assert one.sandbox.refused == 0
            one.says_one_line(places)
            assert one.count(lost + ARRIVED, lost + STRICT_LEASE, places) == 0
            for place in places:
                assert 0 < one.window(lost + ARRIVED, ended, [place]) <= SHARE
                assert one.count(used, ended, [place]) > 0
            rest = [place for place in ALL if place not in places]
            assert one.window(lost + STRICT_LEASE, ended, rest) <= len(rest) * SHARE
            assert all(one.count(ended - PERIOD, ended, [place]) > 0 for place in rest)

    await at_once(course(ALL), course(SOME))


async def test_local_processes_without_redis_add_no_more_than_they_had_and_their_shares(
    redis_server: RedisServer,
) -> None:
    """All lose Redis: the limit is kept. Some do: by so much it can be exceeded, and not by more.

    Each reuses its own tokens for one lease, as they return, and then uses its share.
    """

    async def all_lose_redis() -> None:
        async with group(redis_server) as one:
            lost = one.cut(ALL)
            await passes(lost + LEASE + BUSY + 2 * PERIOD)
            ended = time.monotonic()
            assert one.window(0, ended) <= LIMIT
            assert one.sandbox.refused == 0
            one.says_one_line(ALL)
            for place in ALL:
                assert one.count(lost + ARRIVED, lost + LEASE, [place]) > 0
                assert one.window(lost + ARRIVED, ended, [place]) <= SHARE
                # A token is out for a period and the time of its answer.
                assert one.window(lost + LEASE + BUSY, ended, [place], longer=0.3) >= 0.9 * SHARE

    async def some_lose_redis() -> None:
        # The API's limit is higher, so that it refuses none of the requests that are counted.
        async with group(redis_server, api_limit=3 * LIMIT) as one:
            lost = one.cut(SOME)
            await passes(lost + LEASE + BUSY + 2 * PERIOD)
            ended = time.monotonic()
            # The process notices with its next message, half a second later at most.
            sent = one.count(lost - PERIOD, lost + 0.5, SOME)
            assert sent > 0
            one.says_one_line(SOME)
            assert one.window(0, lost) <= LIMIT
            assert one.window(lost - PERIOD, lost + LEASE) <= LIMIT + sent
            assert one.window(lost, ended) <= LIMIT + max(sent, SHARE)
            assert one.window(lost + LEASE, ended) <= LIMIT + SHARE
            assert one.count(lost + ARRIVED, lost + LEASE, SOME) > 0
            assert one.window(lost + ARRIVED, ended, SOME) <= SHARE
            assert one.window(0, ended, OTHERS) <= LIMIT

    await at_once(all_lose_redis(), some_lose_redis())


async def test_calls_fail_without_redis_when_on_outage_is_raise(
    redis_server: RedisServer,
) -> None:
    """All lose Redis, or some: with `BackendUnavailableError`, and nothing is sent."""

    async def course(places: list[int]) -> None:
        async with group(redis_server, "raise") as one:
            lost = one.cut(places)
            await passes(lost + NOTICED + BUSY + PERIOD)
            ended = time.monotonic()
            assert one.window(0, ended) <= LIMIT
            assert one.sandbox.refused == 0
            one.says_one_line(places)
            assert one.count(lost + ARRIVED, ended, places) == 0
            for place in places:
                late = [
                    call for call in one.members[place].calls if call.at > lost + NOTICED + BUSY
                ]
                assert late
                assert {call.outcome for call in late} == {"BackendUnavailableError"}
            rest = [place for place in ALL if place not in places]
            assert all(one.count(ended - PERIOD, ended, [place]) > 0 for place in rest)
            assert all(call.is_answered for place in rest for call in one.members[place].calls)

    await at_once(course(ALL), course(SOME))


# --- a process ends or stands still


async def test_a_killed_or_frozen_process_adds_no_more_than_it_was_granted(
    redis_server: RedisServer,
) -> None:
    """A killed one adds nothing, and its tokens are free after one lease.

    Answers are slow, so that it has requests under way when it is killed or frozen. A process that
    goes on later than a lease can add what Redis had granted to it before.
    """

    async def killed() -> None:
        async with group(redis_server, delay=(0.1, 0.3)) as one:
            killed = one.members[0].send(signal.SIGKILL)
            assert await asyncio.to_thread(out, redis_server, one.prefix, one.members[0]) > 0
            await passes(killed + LEASE + 0.1)
            assert await asyncio.to_thread(out, redis_server, one.prefix, one.members[0]) == 0
            await passes(killed + LEASE + 2 * PERIOD)
            ended = time.monotonic()
            assert one.window(0, ended) <= LIMIT
            assert one.sandbox.refused == 0
            # A token is out for a period and the time of its answer.
            assert one.window(killed + LEASE, ended, OTHERS, longer=0.4) >= 0.9 * LIMIT

    async def frozen() -> None:
        # The API's limit is higher, so that it refuses none of the requests that are counted.
        async with group(redis_server, api_limit=3 * LIMIT, delay=(0.1, 0.3)) as one:
            frozen = one.members[0].send(signal.SIGSTOP)
            granted = await asyncio.to_thread(out, redis_server, one.prefix, one.members[0])
            assert granted > 0  # some of them for requests that have ended
            await passes(frozen + LEASE + 0.5)
            woke = one.members[0].send(signal.SIGCONT)
            await passes(woke + 2 * PERIOD)
            ended = time.monotonic()
            assert one.window(0, woke) <= LIMIT
            assert one.window(0, ended) <= LIMIT + granted
            assert one.window(woke + PERIOD, ended) <= LIMIT
            assert one.count(woke, ended, [0]) > 0

    await at_once(killed(), frozen())
