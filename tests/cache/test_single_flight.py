"""Calls that several callers share, in virtual time."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

import pytest

from crustcredits import (
    Account,
    ApiKey,
    Balance,
    ClientClosedError,
    ConfigurationError,
    RateLimit,
    Retry,
)
from crustcredits._http.protocol import Response
from tests.cache.calls import BROKEN, KEY, UNKNOWN_KEY, counting, outcome, settle
from tests.virtual import FakeServer, Reply, fake_client, keys, now, refusal

pytestmark = pytest.mark.virtual


# --- many callers, one call


async def test_simultaneous_callers_share_one_call() -> None:
    """Also without `max_age`; each endpoint has its own call."""
    server = FakeServer()
    async with fake_client(server) as client:
        balances = await asyncio.gather(
            *(client.balance(KEY) for _ in range(100)), client.account(KEY)
        )
    assert len(server.arrivals) == 2
    assert len({id(balance) for balance in balances}) == 2
    assert type(balances[0]) is Balance
    assert type(balances[-1]) is Account


async def test_without_max_age_an_answer_is_not_returned_again() -> None:
    """Not even in the same moment."""
    server = FakeServer(counting())
    async with fake_client(server) as client:
        assert [(await client.balance(KEY)).credits for _ in range(3)] == [1, 2, 3]


async def test_an_outcome_has_its_source() -> None:
    """Fetched by this call, shared with another caller, or cached."""
    server = FakeServer()
    async with fake_client(server) as client:
        both = await asyncio.gather(outcome(client), outcome(client))
        kept = await outcome(client, max_age=5)
    assert [(each.source, each.attempts) for each in (*both, kept)] == [
        ("fetched", 1),
        ("shared", 1),
        ("cached", 0),
    ]
    assert kept.checked_at == both[0].checked_at


async def test_each_caller_gets_the_answer_under_its_own_key_name() -> None:
    """Callers may use different names for one secret."""
    server = FakeServer()
    other = ApiKey("secret-0", name="other", account="acme")
    async with fake_client(server) as client:
        shared = await asyncio.gather(client.balance(KEY), client.balance(other))
        kept = await client.balance(other, max_age=9)
        again = await client.balance(KEY, max_age=9)
    assert [balance.key.name for balance in (*shared, kept, again)] == [
        "prod",
        "other",
        "other",
        "prod",
    ]
    assert len(server.arrivals) == 1


async def test_a_call_on_the_wire_without_waiters_can_be_joined_again() -> None:
    """Then its failure is retried for the new waiters."""
    server = FakeServer(counting(Reply(seconds=2, status=503, body=""), Reply()))
    async with fake_client(server) as client:
        caller = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(1)
        caller.cancel()
        await settle()
        assert (await client.balance(KEY)).credits == 9406
    assert len(server.arrivals) == 2


async def test_errors_are_shared_by_the_waiters_and_not_cached_by_default() -> None:
    """Each waiter has its own copy, so that no traceback mixes two of them."""
    server = FakeServer(counting(UNKNOWN_KEY, Reply()))
    other = ApiKey("secret-0", name="other")
    async with fake_client(server) as client:
        results = await asyncio.gather(
            *(client.balance(key) for key in (KEY, other, KEY)), return_exceptions=True
        )
        assert (await client.balance(KEY)).credits == 9406
    assert [str(error) for error in results] == [
        f"{name}: the API does not know the key (Invalid API key in request); correct or replace "
        "the key (HTTP 401)"
        for name in ("prod", "other", "prod")
    ]
    assert len({id(error) for error in results}) == 3
    assert len(server.arrivals) == 2


async def test_an_eager_task_factory_changes_nothing() -> None:
    """asyncio has one from Python 3.12 on."""
    asyncio.get_running_loop().set_task_factory(getattr(asyncio, "eager_task_factory", None))
    server = FakeServer(counting())

    async def at_once(path: str, key: ApiKey, timeout: float) -> Any:
        server.arrivals.append((now(), key.name))
        return Response(200, {}, b'{"credits": 7}')

    async with fake_client(server, rate_limit=RateLimit(requests=20, pace=None)) as client:
        pool = keys(18)
        await client.check(pool)
        began = now()
        await asyncio.sleep(1)
        assert all(
            outcome.stale for outcome in await client.check(pool, stale_while_revalidate=600)
        )
        await asyncio.sleep(10)
        assert len(server.arrivals) == 18, "refreshes left no part of the limit free"
        await asyncio.sleep(60.3 - (now() - began))
        assert len(server.arrivals) > 18
        server.attempt = at_once  # type: ignore[method-assign]  # an immediate answer
        assert (await client.balance(KEY)).credits == 7


# --- stale_while_revalidate


async def test_a_waiter_that_joins_a_refresh_moves_it_to_the_foreground() -> None:
    """It takes its place behind earlier calls, and is retried like any other call."""
    server = FakeServer(counting(Reply(), BROKEN, Reply(credits="7")))
    async with fake_client(
        server, rate_limit=RateLimit(requests=10, pace=None), retry=Retry(backoff=0.0)
    ) as client:
        await client.check([KEY, *keys(8, "other")])
        await asyncio.sleep(1)
        assert (await client.balance(KEY, stale_while_revalidate=60)).stale
        await settle()
        assert client.quota().refreshing == 1  # one token is left, and that is the last tenth
        fresh = await outcome(client)
        assert fresh.credits == 7
        assert (fresh.source, fresh.attempts) == ("shared", 2)


async def test_a_refresh_runs_in_an_empty_context() -> None:
    """It belongs to no caller, and keeps no context alive.

    A foreground call runs in the context of its caller.
    """
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    def script(name: str, times: int) -> Reply:
        seen.append(request.get())
        return Reply()

    async with fake_client(FakeServer(script)) as client:
        request.set("one")
        await client.balance(KEY)
        await asyncio.sleep(1)
        await client.balance(KEY, stale_while_revalidate=60)
        await asyncio.sleep(1)
    assert seen == ["one", "none"]


async def test_many_refreshes_delay_no_foreground_call() -> None:
    """Also if each key has its own quota and only the pace is shared."""
    limit = RateLimit(scope="key")
    server = FakeServer(lambda name, times: Reply(seconds=0.05))
    async with fake_client(server, rate_limit=limit, concurrency=32) as client:
        pool = keys(1000)
        await client.check(pool)
        await asyncio.sleep(1)
        await client.check(pool, stale_while_revalidate=600)
        began = now()
        for number in range(20):
            await client.balance(f"newcomer-{number}", timeout=0.3)
        assert now() - began < 20 * 0.15
        await asyncio.sleep(20)
        assert client.quota(key=pool[0]).refreshing == 0
        assert len(server.arrivals) == 2020


async def test_closing_ends_background_refreshes() -> None:
    """Both the queued ones and the ones on the wire."""
    server = FakeServer(lambda name, times: Reply(seconds=5 * times))
    client = fake_client(server, rate_limit=RateLimit(requests=10, pace=None))
    pool = keys(4)
    await client.check(pool)
    await client.check(pool, stale_while_revalidate=60)
    await asyncio.sleep(2)
    assert server.on_wire == 1
    assert client.quota().refreshing == 4
    await client.close()
    assert len(asyncio.all_tasks()) == 1
    assert server.on_wire == 0
    with pytest.raises(ClientClosedError):
        await client.balance(pool[0], max_age=60)


# --- stale_if_error


async def test_a_check_of_cached_balances_ends_when_the_client_is_closed() -> None:
    """No refresh is sent afterwards."""
    server = FakeServer()
    client = fake_client(
        server, rate_limit=RateLimit(requests=10_000, pace=None), stale_while_revalidate=600
    )
    pool = keys(2_500)
    await client.check(pool)
    await asyncio.sleep(1)
    check = asyncio.create_task(client.check(pool))
    await asyncio.sleep(0)
    await client.close()
    sent = len(server.arrivals)
    with pytest.raises(ClientClosedError):
        await check
    await asyncio.sleep(1)
    assert len(server.arrivals) == sent
    assert len(asyncio.all_tasks()) == 1


async def test_an_account_without_tokens_delays_no_other_accounts_refreshes() -> None:
    """Each quota has its own queue."""
    spent = [
        ApiKey(f"secret-s-{number}", name=f"s{number}", account="spent") for number in range(30)
    ]
    other = ApiKey("secret-o", name="other", account="other")
    limit = RateLimit(requests=30, scope="account", pace=None)
    async with fake_client(FakeServer(), rate_limit=limit, stale_while_revalidate=600) as client:
        await client.check([*spent, other])
        await asyncio.sleep(1)
        await client.check([*spent, other])
        await asyncio.sleep(1)
        assert client.quota(key=spent[0]).refreshing == 30
        assert client.quota(key=other).refreshing == 0
        fresh = client.peek(other, max_age=2)
        assert fresh is not None
        assert not fresh.stale


async def test_a_refresh_that_a_cooldown_stops_is_sent_after_it() -> None:
    """It keeps its place in the queue."""
    server = FakeServer(lambda name, times: refusal(10) if 5 < now() < 15 and times else Reply())
    async with fake_client(
        server, rate_limit=RateLimit(pace=2.0), retry=Retry(backoff=0.0), stale_while_revalidate=600
    ) as client:
        pool = keys(8)
        await client.check(pool)
        await asyncio.sleep(2)
        await client.check(pool)
        await asyncio.gather(
            *(client.balance(key, stale_while_revalidate=0) for key in keys(6, "other")),
            return_exceptions=True,
        )
        await asyncio.gather(
            *(client.balance(key, stale_while_revalidate=0) for key in keys(6, "other")),
            return_exceptions=True,
        )
        await asyncio.sleep(200)
        assert client.quota().refreshing == client.quota().in_flight == 0


# --- invalidate


async def test_invalidate_drops_cached_answers() -> None:
    """Of one key on both endpoints, or of all keys; failures too."""
    server = FakeServer(
        lambda name, times: UNKNOWN_KEY if name == "k1" else Reply(credits=str(times))
    )
    pool = keys(3)
    async with fake_client(server, max_age=3600) as client:
        await client.check(pool)
        await client.account(pool[0])
        client.invalidate(pool[0].get_secret_value())
        assert client.peek(pool[0]) is client.peek(pool[0], detail=True) is None
        assert [each.source for each in await client.check(pool)] == ["fetched", "cached", "cached"]
        client.invalidate()
        assert {each.source for each in await client.check(pool)} == {"fetched"}
        with pytest.raises(ConfigurationError):
            client.invalidate("two words")


async def test_an_answer_on_the_wire_at_invalidate_is_not_cached() -> None:
    """It may be outdated: its own waiters have it, and later callers begin a new call."""
    server = FakeServer(counting(Reply(credits="1", seconds=5.0), Reply(credits="2", seconds=1.0)))
    async with fake_client(server, max_age=3600) as client:
        before = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(1)
        client.invalidate(KEY)
        assert (await client.balance(KEY)).credits == 2
        assert (await before).credits == 1
        assert (await client.balance(KEY)).credits == 2
    assert len(server.arrivals) == 2


async def test_an_answer_to_a_request_sent_after_invalidate_is_cached() -> None:
    """Its call may have waited in the queue before."""
    server = FakeServer()
    async with fake_client(server, max_age=3600, rate_limit=RateLimit(requests=1)) as client:
        await client.balance(keys(1)[0])
        waiting = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(1)
        client.invalidate()
        assert await waiting == await client.balance(KEY)
    assert len(server.arrivals) == 2


async def test_an_invalidated_call_ends_with_the_client_or_its_caller() -> None:
    """Like any other call."""
    server = FakeServer(lambda name, times: Reply(seconds=5.0))
    async with fake_client(server, max_age=3600) as client:
        given_up, ended = (asyncio.create_task(client.balance(key)) for key in keys(2))
        await asyncio.sleep(1)
        client.invalidate()
        given_up.cancel()
        await asyncio.sleep(1)
        await client.close()
        with pytest.raises(ClientClosedError):
            await ended
    assert given_up.cancelled()
