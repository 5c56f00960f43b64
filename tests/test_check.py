"""Checks of large pools, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from crustcredits import (
    ApiKey,
    ConfigurationError,
    RateLimit,
    RateLimitWaitError,
)
from tests.virtual import FakeServer, VirtualLoop, fake_client, now

pytestmark = pytest.mark.virtual


async def test_other_tasks_run_while_a_large_pool_is_read() -> None:
    """They also run while its cached answers are looked up."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    turns: list[int] = []

    def source() -> Iterator[str]:
        for number in range(20_000):
            turns.append(loop.turns)
            yield f"secret-{number % 5}"

    async with fake_client(FakeServer(), max_age=3600) as client:
        await client.check(source())
        assert turns[-1] - turns[0] >= 19
        turns.clear()
        assert (await client.check(source())).ok
        assert loop.turns - turns[-1] >= 19, "other tasks did not run"


async def test_reading_a_pool_counts_against_its_timeout() -> None:
    """Keys without time left fail with the remedy, and no request is sent."""
    server = FakeServer()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)

    def slow() -> Iterator[str | ApiKey]:
        for number in range(1000):
            loop.move(0.01)
            yield f"secret-{number}"
        yield "two words"

    async with fake_client(server, rate_limit=RateLimit(requests=5000, pace=None)) as client:
        began = now()
        report = await client.check(slow(), timeout=5)
        assert now() - began < 11
    assert {type(each.error) for each in report} == {RateLimitWaitError, ConfigurationError}
    assert {each.source for each in report} == {"none"}
    assert "raise timeout=" in str(report[0].error)
    assert not server.arrivals
