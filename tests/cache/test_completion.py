"""How calls end, for the cache and for their waiters, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from unittest.mock import patch

import pytest

from crustcredits import (
    ApiKey,
    ClientClosedError,
    RateLimit,
    Retry,
)
from crustcredits._cache.store import BalanceCache
from crustcredits._http.protocol import Response
from tests.cache.calls import BROKEN, KEY, counting, settle
from tests.virtual import FakeServer, Reply, fake_client

pytestmark = pytest.mark.virtual


# --- many callers, one call


async def test_a_cancellation_in_the_loop_iteration_of_the_answer_wins() -> None:
    """The call is settled before the cancelled waiter could leave."""
    server = FakeServer()

    async def cancel_and_answer(path: str, key: ApiKey, timeout: float) -> Response:
        await asyncio.sleep(1)
        caller.cancel()
        return Response(200, {}, b'{"credits": 7}')

    server.attempt = cancel_and_answer  # type: ignore[method-assign]  # with that answer
    async with fake_client(server) as client:
        caller = asyncio.create_task(client.balance(KEY))
        other = asyncio.create_task(client.balance(KEY))
        assert (await other).credits == 7
        with pytest.raises(asyncio.CancelledError):
            await caller


async def test_a_call_that_is_cancelled_from_outside_ends_its_waiters() -> None:
    """Another part of the program may cancel all tasks.

    An unexpected exception reaches all waiters too.
    """
    server = FakeServer(lambda name, times: Reply(seconds=5))
    async with fake_client(server) as client:
        caller = asyncio.create_task(client.balance(KEY))
        await settle()
        for task in asyncio.all_tasks() - {asyncio.current_task(), caller}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert (await client.balance(KEY)).credits == 9406

        async def broken(*_: object) -> None:
            raise ZeroDivisionError

        server.attempt = broken  # type: ignore[assignment]  # the defect under test
        results = await asyncio.gather(
            client.balance(KEY), client.balance(KEY), return_exceptions=True
        )
        assert [type(result) for result in results] == [ZeroDivisionError, ZeroDivisionError]


async def test_a_call_cancelled_before_its_first_step_ends_its_waiters() -> None:
    """Its coroutine has never run; the key can be asked about again."""
    async with fake_client(FakeServer()) as client:
        caller = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(0)  # the caller has begun the call; its task is next to run
        assert client.quota().in_flight == 1
        for task in asyncio.all_tasks() - {asyncio.current_task(), caller}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert (await client.balance(KEY)).credits == 9406


async def test_an_answer_that_comes_although_its_call_was_ended_is_dropped() -> None:
    """The transport has swallowed the cancellation by `close()`."""
    server = FakeServer()

    async def answer_in_spite_of_it(path: str, key: ApiKey, timeout: float) -> Response:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(99)
        return Response(200, {}, b'{"credits": 7}')

    server.attempt = answer_in_spite_of_it  # type: ignore[method-assign]  # the defect under test
    client = fake_client(server, max_age=60)
    caller = asyncio.create_task(client.balance(KEY))
    await asyncio.sleep(1)
    await client.close()
    with pytest.raises(ClientClosedError):
        await caller
    assert client.peek(KEY) is None
    assert client.quota().in_flight == 0
    assert len(asyncio.all_tasks()) == 1


# --- stale_while_revalidate


async def test_the_first_failure_of_a_refresh_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once: no caller sees the error while the cached answer is fresh enough."""
    server = FakeServer(lambda name, times: BROKEN if 1 <= times <= 3 else Reply())
    async with fake_client(
        server, max_age=1, stale_while_revalidate=600, retry=Retry(backoff=0.1)
    ) as client:
        await client.balance(KEY)
        for _ in range(20):
            await asyncio.sleep(1)
            await client.balance(KEY)
    assert caplog.messages[0] == (
        "cached balance not refreshed, so callers get an older one: prod: the API or a gateway "
        "before it failed; try again later (HTTP 503)"
    )
    assert len(caplog.messages) == 1


async def test_an_evicted_answer_cancels_its_refresh() -> None:
    """So no more refreshes wait than answers are cached."""
    server = FakeServer()
    async with fake_client(
        server, rate_limit=RateLimit(requests=40, pace=None), max_entries=5
    ) as client:
        for number in range(100):
            key = ApiKey(f"secret-new-{number}", name=f"n{number}")
            await client.balance(key)
            await asyncio.sleep(1)
            assert (await client.balance(key, stale_while_revalidate=600)).stale
            assert client.quota().refreshing <= 5
            assert len(asyncio.all_tasks()) <= 1 + 5 + 1


# --- stale_if_error


async def test_an_unexpected_failure_of_a_call_ends_the_check() -> None:
    """No key is left out silently.

    A waiter that was given up does not affect another fan-out for the same key.
    """
    server = FakeServer(lambda name, times: Reply(seconds=5))
    async with fake_client(server) as client:
        check = asyncio.create_task(client.check([KEY]))
        await settle()
        (request,) = asyncio.all_tasks() - {asyncio.current_task(), check}
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await check

        async def broken(*_: object) -> None:
            raise ZeroDivisionError

        server.attempt = broken  # type: ignore[assignment]  # the defect under test
        with pytest.raises(ZeroDivisionError):
            await client.check([KEY])


async def test_an_unexpected_exception_reaches_the_waiters() -> None:
    """Also an exception after the answer; no waiter hangs, and no token is lost."""
    async with fake_client(
        FakeServer(), rate_limit=RateLimit(requests=2, scope="client")
    ) as client:
        with (
            patch.object(BalanceCache, "succeeded", side_effect=LookupError("a fault")),
            pytest.raises(LookupError, match="a fault"),
        ):
            await client.balance(KEY)
        assert (await client.balance(KEY)).credits == 9406
        assert client.quota().in_flight == 0


# --- require


async def test_a_shared_call_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Not once for each waiter."""
    caplog.set_level(logging.INFO, "crustcredits")
    async with fake_client(FakeServer(counting(BROKEN, Reply()))) as client:
        await asyncio.gather(*(client.balance(KEY) for _ in range(10)))
    assert caplog.text.count("this was attempt 1 of 4") == 1
