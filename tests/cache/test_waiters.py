"""Waiters that join and leave calls, and their deadlines, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crustcredits import (
    ApiKey,
    APITimeoutError,
    Balance,
    InternalServerError,
    RateLimit,
    RateLimitError,
    RateLimitWaitError,
    Retry,
)
from crustcredits._http.protocol import Response
from tests.cache.calls import BROKEN, KEY, counting, outcome, settle
from tests.virtual import FakeServer, Reply, VirtualLoop, fake_client, keys, now, refusal

pytestmark = pytest.mark.virtual


# --- many callers, one call


async def test_a_waiter_that_gives_up_ends_the_call_for_no_other() -> None:
    """By cancellation or timeout, also if this caller began the call."""
    server = FakeServer(lambda name, times: Reply(seconds=2))
    async with fake_client(server) as client:
        first = asyncio.create_task(client.balance(KEY))
        hasty = asyncio.create_task(client.balance(KEY, timeout=1.5))
        patient = asyncio.create_task(client.balance(KEY, timeout=3))
        await asyncio.sleep(1)
        first.cancel()
        assert (await patient).credits == 9406
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(APITimeoutError, match=r"prod: no whole answer within 1\.5 s"):
            await hasty
    assert len(server.arrivals) == 1
    assert now() == pytest.approx(2, abs=0.01)


async def test_a_queued_call_is_dropped_when_its_last_waiter_has_left() -> None:
    """It is never sent and costs no token; a caller in the same moment begins another call."""
    server = FakeServer()
    async with fake_client(server, rate_limit=RateLimit(requests=1)) as client:
        await client.balance("another")
        callers = [asyncio.create_task(client.balance(KEY)) for _ in range(2)]
        await asyncio.sleep(1)
        callers[0].cancel()
        await asyncio.sleep(1)
        assert client.quota().waiting == 1
        callers[1].cancel()
        await settle()
        assert client.quota().waiting == 0
        assert len(asyncio.all_tasks()) == 1
        last = asyncio.create_task(client.balance(KEY))
        await settle()
        last.cancel()
        await asyncio.sleep(0)
        assert (await client.balance(KEY)).credits == 9406
    assert len(server.arrivals) == 2


async def test_a_call_on_the_wire_is_finished_when_its_last_waiter_has_left() -> None:
    """Its answer is cached, and its failure is not retried."""
    server = FakeServer(counting(Reply(seconds=2), Reply(seconds=2, status=503, body="")))
    async with fake_client(server) as client:
        for _ in range(2):
            caller = asyncio.create_task(client.balance(KEY))
            await asyncio.sleep(1)
            caller.cancel()
            await asyncio.sleep(9)
        assert (await client.balance(KEY, max_age=60)).credits == 9406
    assert len(server.arrivals) == 2


async def test_a_deadline_that_a_joined_call_cannot_meet_fails_at_once() -> None:
    """The call may wait for a token or for a retry; it continues for the other waiters."""
    server = FakeServer(counting(BROKEN, Reply()))
    async with fake_client(
        server, rate_limit=RateLimit(requests=1), retry=Retry(backoff=0.0)
    ) as client:
        await asyncio.gather(client.balance("another"), return_exceptions=True)
        began = now()
        patient = asyncio.create_task(client.balance(KEY))
        await settle()
        with pytest.raises(RateLimitWaitError) as caught:
            await client.balance(KEY, timeout=9)
        assert now() == began
        assert caught.value.wait == pytest.approx(60.3, abs=0.1)
        await asyncio.sleep(61)
        with pytest.raises(InternalServerError):  # after one attempt it waits for its retry
            await client.balance(KEY, timeout=9)
        assert (await patient).credits == 9406


async def test_a_deadline_before_the_retry_ends_with_the_failure_at_once() -> None:
    """Waiters with a later deadline stay."""
    server = FakeServer(counting(refusal(30), Reply()))
    async with fake_client(server) as client:
        callers = [
            asyncio.create_task(client.balance(KEY, timeout=timeout)) for timeout in (10, None, 40)
        ]
        await asyncio.sleep(1)
        assert [caller.done() for caller in callers] == [True, False, False]
        with pytest.raises(RateLimitError) as caught:
            await client.balance(KEY, timeout=10)
        assert caught.value.attempts == 1
        results = await asyncio.gather(*callers, return_exceptions=True)
    assert [type(result) for result in results] == [RateLimitError, Balance, Balance]


async def test_a_cancellation_at_the_moment_of_the_answer_or_the_deadline_wins() -> None:
    """The other waiters have the answer."""
    for moment in (2.0, 2.0 - 1e-9, 1.5):
        server = FakeServer(lambda name, times: Reply(seconds=2))
        async with fake_client(server, rate_limit=RateLimit(pace=None)) as client:
            caller = asyncio.create_task(
                client.balance(KEY, timeout=1.5 if moment == 1.5 else None)
            )
            other = asyncio.create_task(client.balance(KEY))
            asyncio.get_running_loop().call_later(moment, caller.cancel)
            assert (await other).credits == 9406
            with pytest.raises(asyncio.CancelledError):
                await caller


async def test_a_late_call_ends_with_a_waiter_cancelled_in_the_same_iteration() -> None:
    """It is not sent, and a later caller begins a new call."""
    server, key = FakeServer(), keys(1)[0]
    answer = server.attempt
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    async with fake_client(server, concurrency=1, rate_limit=RateLimit(pace=None)) as client:

        async def cancel_and_answer(path: str, key: ApiKey, timeout: float) -> Any:
            answered = await answer(path, key, timeout)
            late.cancel()
            loop.move(1.0)  # beyond the deadline of the other call, whose turn comes now
            return answered

        server.attempt = cancel_and_answer  # type: ignore[method-assign]  # the moment under test
        first = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(0)
        late = asyncio.create_task(client.balance(key, timeout=0.5))
        assert (await first).credits == 9406
        with pytest.raises(asyncio.CancelledError):
            await late
        assert client.quota().waiting == 0
        assert server.asked == {"prod": 1}
        server.attempt = answer  # type: ignore[method-assign]  # as before
        assert (await client.balance(key)).credits == 9406


async def test_a_call_with_a_short_deadline_starts_once_the_pace_has_room() -> None:
    """The loop was blocked for 1 s meanwhile; the call is sent once."""
    server = FakeServer()
    async with fake_client(server, rate_limit=RateLimit(pace=10.0)) as client:
        others = [asyncio.create_task(client.balance(key)) for key in keys(3)]
        await settle()
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.move(1.0)
        assert (await client.balance(KEY, timeout=0.05)).credits == 9406
        await asyncio.gather(*others)
    assert len(server.arrivals) == 4


# --- stale_if_error


async def test_an_answer_in_the_loop_iteration_of_the_deadline_is_fresh() -> None:
    """It is the answer that was asked for, just in time."""
    server = FakeServer()
    async with fake_client(server) as client:

        async def too_late_and_answer(path: str, key: ApiKey, timeout: float) -> Response:
            await asyncio.sleep(2 - 1e-9)
            return Response(200, {}, b'{"credits": 7}')

        server.attempt = too_late_and_answer  # type: ignore[method-assign]  # with that answer
        found = await outcome(client, timeout=2, stale_if_error=60)
        assert found.credits == 7
        assert (found.stale, found.error) == (False, None)
