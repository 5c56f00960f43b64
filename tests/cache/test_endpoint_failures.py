"""Endpoints that are down for all keys, in virtual time."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from crustcredits import (
    APIConnectionError,
    InternalServerError,
    RateLimit,
    Retry,
)
from crustcredits._http.transport_types import Fate
from tests.cache.calls import BROKEN, KEY, ONCE, outcome
from tests.virtual import FakeServer, Reply, fake_client, keys, lost, now, refusal

pytestmark = pytest.mark.virtual


# --- stale_while_revalidate


async def test_an_outage_is_logged_once_for_all_keys(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At its beginning and at its end."""
    caplog.set_level(logging.INFO, "crustcredits")
    server = FakeServer(lambda name, times: BROKEN if 10 < now() < 100 else Reply())
    async with fake_client(server, max_age=1, stale_while_revalidate=600) as client:
        while now() < 150:
            await client.check(keys(50))
            await asyncio.sleep(1)
    began = ["one refresh at a time tests whether it answers" in each for each in caplog.messages]
    assert sum(began) == 1
    assert caplog.messages.count("the API answers again; cached balances are refreshed") == 1
    assert len(caplog.messages) == 4


# --- stale_if_error


async def test_callers_do_not_wait_for_an_endpoint_that_is_known_to_be_down() -> None:
    """The first call waits for its failure.

    For a minute after the failure the others have the stale answer at once, and it is refreshed.
    """
    server = FakeServer(
        lambda name, times: Reply(seconds=1e6) if 10 < now() < 100 else Reply(credits=str(times))
    )
    async with fake_client(
        server, retry=Retry(attempts=2, backoff=0.1), stale_if_error=600
    ) as client:
        await client.balance(KEY)
        await asyncio.sleep(20)
        began = now()
        assert (await client.balance(KEY)).stale
        assert now() - began > 19
        began = now()
        for _ in range(60):
            assert (await client.balance(KEY)).stale
            await asyncio.sleep(1)
        assert now() - began == pytest.approx(60, abs=0.5)
        await asyncio.sleep(80)  # longer than a failure counts
        assert not (await client.balance(KEY)).stale


@pytest.mark.parametrize("trouble", ["hang", "refused"])
async def test_a_large_pool_is_answered_at_once_during_a_long_outage(trouble: str) -> None:
    """The endpoint is known to be down, also for keys with an old failure of their own.

    Hardly any requests are sent meanwhile.
    """

    def script(name: str, times: int) -> Reply:
        if not 100 < now() < 700:
            return Reply()
        return (
            Reply(seconds=1e6)
            if trouble == "hang"
            else lost(APIConnectionError("refused"), Fate.UNSENT)
        )

    server = FakeServer(script)
    pool = keys(600)
    options = {"max_age": 5.0, "stale_while_revalidate": 60.0, "stale_if_error": 3600.0}
    async with fake_client(server, rate_limit=RateLimit(requests=1000), **options) as client:
        await client.check(pool)
        while now() < 200:  # then the outage is known, and earlier calls were tried
            await client.check(pool)
            await asyncio.sleep(5)
        asked, began, slow = len(server.arrivals), now(), 0
        while now() < 650:
            started = now()
            report = await client.check(pool, timeout=10)
            slow += now() - started > 0.1
            assert report.ok
            assert len(report.stale) == 600
            assert all(each.error is not None for each in report)
            await asyncio.sleep(5)
        assert slow == 0
        assert (len(server.arrivals) - asked) / (now() - began) < 1
        while now() < 790:
            await client.check(pool)
            await asyncio.sleep(5)
        assert not [each for each in await client.check(pool) if each.error is not None]


@pytest.mark.parametrize(
    "trouble", [BROKEN, refusal(60), Reply(status=400, body="{}"), Reply(body="<html>")]
)
async def test_the_failures_of_one_key_do_not_mark_the_endpoint_as_down(trouble: Reply) -> None:
    """The other keys are refreshed, and have no error beside their balances."""
    server = FakeServer(lambda name, times: trouble if name == "k0" else Reply())
    bad, good = keys(2)
    async with fake_client(
        server, retry=ONCE, max_age=1, stale_while_revalidate=60, stale_if_error=3600
    ) as client:
        for _ in range(100):
            await outcome(client, bad)
            assert (await outcome(client, good)).error is None
            await asyncio.sleep(5)
    assert server.asked["k1"] >= 90


async def test_a_given_up_refresh_lets_the_next_one_test_the_endpoint() -> None:
    """A refresh that is joined and given up, or evicted, says nothing about the endpoint."""
    server = FakeServer(lambda name, times: BROKEN if 10 < now() < 50 else Reply())
    pool = keys(4)
    options = {"max_age": 1.0, "stale_while_revalidate": 600.0}
    async with fake_client(
        server, retry=Retry(backoff=1.0), rate_limit=RateLimit(pace=None), **options
    ) as client:
        await client.check(pool)
        await asyncio.sleep(20)
        for key in pool[:3]:
            await outcome(client, key, max_age=0, stale_while_revalidate=0)
        await asyncio.sleep(9)
        asked = len(server.arrivals)
        claiming = await outcome(client, pool[3])
        assert claiming.stale
        # Its deadline is shorter than the wait before the next attempt, with this jitter.
        random.seed(1)
        with pytest.raises(InternalServerError):
            await client.balance(pool[3], timeout=0.02, stale_while_revalidate=0)
        assert len(server.arrivals) == asked + 1
        await asyncio.sleep(max(0.0, 51 - now()))
        for _ in range(10):  # well within the minute for which the refresh blocks others
            await client.check(pool)
            await asyncio.sleep(2)
        assert {each.state for each in await client.check(pool, max_age=25)} == {"fresh"}
