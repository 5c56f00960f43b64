"""No call waits for ever or fails without need, whatever else the client does; in virtual time."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from unittest.mock import patch

import pytest

from crustcredits import (
    ApiKey,
    APITimeoutError,
    ClientClosedError,
    CreditsClient,
    InternalServerError,
    RateLimit,
    RateLimitError,
    RateLimitWaitError,
    Retry,
)
from crustcredits._cache.lookup import FanOutWaiter
from crustcredits._fan_out import FanOut
from crustcredits._ratelimit.estimates import Estimates
from crustcredits._ratelimit.flow import Flow
from tests.virtual import FakeServer, Reply, WindowServer, fake_client, keys, now, refusal

pytestmark = pytest.mark.virtual

VAST = 100_000  # requests in a period


def of_one_account(count: int) -> list[ApiKey]:
    return [ApiKey(f"secret-a-{number}", name=f"a{number}", account="A") for number in range(count)]


async def end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def collect(
    client: CreditsClient, pool: list[ApiKey] | AsyncIterator[ApiKey], timeout: float | None
) -> bool:
    """Whether each key of a stream has its answer."""
    return all([outcome.ok async for outcome in client.stream(pool, timeout=timeout)])


# --- starvation


@pytest.mark.parametrize(
    ("seconds", "options", "most"),
    [
        (0.3, {"rate_limit": RateLimit(requests=VAST), "concurrency": 1}, 1.0),
        (1.0, {"rate_limit": RateLimit(requests=VAST, pace=None), "concurrency": 4}, 2.0),
        (0.05, {"rate_limit": RateLimit(requests=VAST, pace=1.0)}, 3.0),
        (0.4, {"rate_limit": RateLimit(scope="account")}, 1.0),
    ],
)
@pytest.mark.parametrize("detail", [False, True])
async def test_a_check_on_one_endpoint_leaves_starts_to_the_other(
    seconds: float, options: dict[str, Any], most: float, *, detail: bool
) -> None:
    """Where one start is possible at a time, because of slots or pace, the endpoints take turns."""
    server = FakeServer(lambda name, times: Reply(seconds=seconds))
    async with fake_client(server, **options) as client:
        check = asyncio.create_task(client.check(keys(5_000), detail=detail))
        await asyncio.sleep(5)
        began, key = now(), keys(1, "single")[0]
        await (client.balance(key) if detail else client.account(key))
        assert now() - began <= most
        await end(check)


async def test_a_refresh_that_was_let_out_keeps_no_single_call_of_its_account_waiting() -> None:
    """It waits behind a check in the queue, while the account's token is free."""
    limit = RateLimit(requests=1, scope="account", pace=5.0)
    async with fake_client(FakeServer(), rate_limit=limit) as client:
        pool = of_one_account(3)
        await client.balance(pool[0])
        assert (await client.balance(pool[0], stale_while_revalidate=1_000)).stale
        check = asyncio.create_task(client.check(keys(5_000)))
        await asyncio.sleep(61)
        began = now()
        await client.balance(pool[1])
        await client.balance(pool[2])
        assert now() - began < 62
        await end(check)


async def test_a_call_of_a_check_that_was_let_out_goes_before_the_rest_of_its_check() -> None:
    """Single calls of its account wait for the token for which it stands."""
    limit = RateLimit(requests=1, scope="account", pace=5.0)
    async with fake_client(FakeServer(), rate_limit=limit) as client:
        pool = of_one_account(5)
        await client.balance(pool[0])
        check = asyncio.create_task(client.check([*pool[1:3], *keys(5_000)]))
        await asyncio.sleep(10)
        began = now()
        await asyncio.gather(client.balance(pool[3]), client.balance(pool[4]))
        assert now() - began < 3 * 61
        await end(check)


# --- short timeouts


@pytest.mark.parametrize(
    ("limit", "after"),
    [
        (RateLimit(reserve=0.1), 20.0),
        (RateLimit(), 1.0),
        (RateLimit(scope="account"), 1.0),
    ],
)
async def test_a_single_call_beside_a_check_is_sent_while_a_token_is_free_for_it(
    limit: RateLimit, after: float
) -> None:
    """A waiting check takes no start from it, so little time left is no reason not to try."""
    server = FakeServer(lambda name, times: Reply(seconds=0.25))
    async with fake_client(server, rate_limit=limit) as client:
        check = asyncio.create_task(client.check(keys(2_000)))
        await asyncio.sleep(after)
        assert (await client.balance(keys(1, "single")[0], timeout=0.35)).credits == 9406
        await end(check)


async def test_a_check_tries_its_last_keys_although_little_time_is_left() -> None:
    """All its keys have one deadline: no other key has more use of the token."""
    server = FakeServer(lambda name, times: Reply(seconds=0.2))
    limit = RateLimit(requests=VAST, pace=100.0)
    async with fake_client(server, rate_limit=limit) as client:
        report = await client.check(keys(500), timeout=1.0)
    assert len(report.succeeded) == 84


async def test_in_an_overload_a_call_with_too_little_time_leaves_its_token_to_the_next() -> None:
    """Its error says so; no request is sent whose answer would come too late."""
    server = FakeServer(lambda name, times: Reply(seconds=0.2))
    limit = RateLimit(requests=VAST, pace=5.0)
    errors: Counter[str] = Counter()
    async with fake_client(server, rate_limit=limit) as client:

        async def one(key: ApiKey) -> None:
            try:
                await client.balance(key, timeout=1.0)
            except (RateLimitWaitError, APITimeoutError) as error:
                errors[str(error).partition(": ")[2].partition(",")[0]] += 1

        callers: list[asyncio.Task[None]] = []
        for key in keys(200):
            callers.append(asyncio.create_task(one(key)))
            await asyncio.sleep(0.05)
        await asyncio.gather(*callers)
    answered = len(callers) - errors.total()
    assert len(server.arrivals) - 1 <= answered >= 50  # the last one is tried: no other waits
    assert errors["not sent: deadline too short for an answer"] > 50


@pytest.mark.parametrize(("count", "timeout"), [(1_000, 10.0), (1_000, 30.0), (400, 0.5)])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_stream_with_a_timeout_takes_keys_only_as_they_can_be_answered(
    count: int, timeout: float, *, is_async: bool
) -> None:
    """An endless source is not drained, and no key fails for the rate limit."""
    taken = 0

    async def source() -> AsyncIterator[ApiKey]:
        nonlocal taken
        for key in keys(count):
            taken += 1
            yield key

    server = WindowServer()
    async with fake_client(server) as client:
        landed = 0
        async for outcome in client.stream(source() if is_async else keys(count), timeout=timeout):
            assert outcome.error is None
            landed += 1
            assert not is_async or taken <= landed + 301
        assert landed == count
    assert now() < 61 * (count / 300)


@pytest.mark.parametrize("scope", ["auto", "key", "client"])
async def test_a_stream_with_a_timeout_drains_no_source_of_keys_whose_account_is_held(
    scope: Any,
) -> None:
    """About one key a second is tried; all others have shared the first request."""
    key, landed = keys(1)[0], 0

    async def source() -> AsyncIterator[ApiKey]:
        while True:
            yield key

    server = FakeServer(lambda name, times: refusal(300))
    async with fake_client(server, rate_limit=RateLimit(scope=scope)) as client:
        await asyncio.gather(client.balance(key, timeout=10.0), return_exceptions=True)
        async with aclosing(client.stream(source(), timeout=10.0)) as stream:
            async for outcome in stream:
                assert not outcome.ok
                landed += 1
                if now() > 30:
                    break
    assert landed <= 40


async def test_a_stream_with_a_timeout_takes_few_keys_of_an_account_without_tokens() -> None:
    """About as many as its requests, and one a second."""
    taken = 0

    async def source() -> AsyncIterator[ApiKey]:
        nonlocal taken
        while True:
            taken += 1
            yield ApiKey(f"s-{taken}", name=f"n{taken}", account="A")

    limit = RateLimit(scope="account", requests=20)
    async with fake_client(WindowServer(limit=20), rate_limit=limit) as client:
        stream = client.stream(source(), timeout=10.0)
        assert all(outcome.ok for outcome in [await anext(stream) for _ in range(20)])
        await asyncio.sleep(15)
        before = taken
        while now() < 200:
            await anext(stream)
        assert taken - before < 20 * 3 * 2 + 200
        await stream.aclose()


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_a_stream_of_a_new_client_takes_no_more_keys_than_its_slots_can_answer(
    concurrency: int,
) -> None:
    """Before the first answer nothing is known of the time that answers take."""
    server = WindowServer(limit=VAST, seconds=(0.25, 0.35))
    limit = RateLimit(requests=VAST)
    async with fake_client(server, rate_limit=limit, concurrency=concurrency) as client:
        assert await collect(client, keys(100), 5.0)


@pytest.mark.parametrize("timeout", [5.0, 90.0])
async def test_a_stream_with_a_timeout_takes_few_keys_while_all_are_refused(timeout: float) -> None:
    """One for each probe, after the keys that were taken before the first refusal."""
    taken = 0

    async def source() -> AsyncIterator[ApiKey]:
        nonlocal taken
        for key in keys(5_000):
            taken += 1
            yield key

    server = FakeServer(lambda name, times: refusal(30))
    async with fake_client(server, rate_limit=RateLimit(scope="client")) as client:
        reader = asyncio.create_task(collect(client, source(), timeout))
        await asyncio.sleep(100)
        await end(reader)
    assert taken < 50


async def test_failed_requests_leave_no_tokens_for_a_stream_with_a_timeout() -> None:
    """A tenth is kept until ten requests can witness: no key is taken for it in vain."""
    landed: Counter[str] = Counter()
    server = FakeServer(lambda name, times: Reply(status=503, body=""))
    async with fake_client(server, retry=Retry(attempts=1)) as client:

        async def read() -> None:
            async for outcome in client.stream(keys(1_000), timeout=0.5):
                landed[type(outcome.error).__name__] += 1

        reader = asyncio.create_task(read())
        await asyncio.sleep(50)
        await end(reader)
    assert landed["InternalServerError"] == 270
    assert landed["RateLimitWaitError"] < 5


async def test_a_stream_with_a_timeout_leaves_no_timer_behind() -> None:
    """It waits for the next token when it is left."""
    async with fake_client(WindowServer(limit=2), rate_limit=RateLimit(requests=2)) as client:
        stream = client.stream(keys(5), timeout=1.0)
        assert [(await anext(stream)).ok for _ in range(2)] == [True, True]
        waits = asyncio.create_task(anext(stream))
        await asyncio.sleep(1)
        await end(waits)
        await stream.aclose()


# --- memory and endings


@pytest.mark.parametrize("count", [3, 2_000])
async def test_an_ended_check_with_a_long_timeout_is_not_kept(count: int) -> None:
    """Nor is one that was cancelled while another caller shares one of its calls."""
    server = FakeServer(lambda name, times: Reply(seconds=50.0 if name == "slow0" else 0.0))
    limit = RateLimit(requests=VAST, pace=None)
    async with fake_client(server, rate_limit=limit, request_timeout=60.0) as client:
        slow, pool, others = keys(1, "slow"), keys(count), keys(count, "other")
        # The cache holds the first name of a secret, and only the check its second one.
        second_names = [
            ApiKey(each[0].get_secret_value(), name="second") for each in (pool, others)
        ]
        kept = [weakref.ref(each) for each in second_names]
        assert (await client.check([*pool, second_names[0]], timeout=86_400)).ok
        check = asyncio.create_task(client.check([*others, second_names[1], *slow], timeout=86_400))
        await asyncio.sleep(1)
        sharer = asyncio.create_task(client.balance(slow[0], timeout=86_400))
        await asyncio.sleep(1)
        await end(check)
        del check, second_names
        await asyncio.sleep(1)  # asyncio holds on to the exception for a moment
        gc.collect()
        assert [each() for each in kept] == [None, None]
        assert (await sharer).credits == 9406


async def test_accounts_of_refused_calls_are_forgotten() -> None:
    """No answer comes that would remind the client of them."""
    limit = RateLimit(requests=1)
    async with fake_client(FakeServer(), rate_limit=limit, max_entries=1) as client:
        await client.balance(keys(1, "first")[0])
        pool = keys(3_000)
        gc.collect()
        before = len(gc.get_objects())
        for key in pool:
            with pytest.raises(RateLimitWaitError):
                await client.balance(key, timeout=0.5)
        await asyncio.sleep(1)  # their deadlines pass
        gc.collect()
        assert len(gc.get_objects()) < before + 300


async def test_many_callers_of_one_key_may_leave_at_once() -> None:
    """The last one has its answer, and its own deadline."""
    server = FakeServer(lambda name, times: Reply(seconds=5.0))
    async with fake_client(server) as client:
        key = keys(1)[0]
        callers = [asyncio.create_task(client.balance(key, timeout=60.0)) for _ in range(2_000)]
        await asyncio.sleep(1)
        await end(*callers[1:])
        assert (await callers[0]).credits == 9406


async def test_many_calls_that_wait_are_ended_by_close() -> None:
    """Also calls that two checks share."""
    client = fake_client(FakeServer(), rate_limit=RateLimit(requests=1))
    pool = keys(2_500)
    checks = [asyncio.create_task(client.check(pool)) for _ in range(2)]
    await asyncio.sleep(1)
    await client.close()
    errors = await asyncio.gather(*checks, return_exceptions=True)
    assert [type(error).__name__ for error in errors] == ["ClientClosedError"] * 2


@pytest.mark.parametrize("is_async", [False, True])
async def test_keys_that_need_no_turn_do_not_wait_in_a_stream_with_a_timeout(
    *, is_async: bool
) -> None:
    """Keys with a cached answer, keys that cannot be used, and keys that others ask about."""
    limit = RateLimit(requests=5, scope="client")
    server = FakeServer(lambda name, times: Reply(seconds=2.0 if name == "slow0" else 0.0))
    async with fake_client(server, rate_limit=limit, max_age=600) as client:
        cached, slow = keys(4), keys(1, "slow")
        await client.check(cached)
        other = asyncio.create_task(client.balance(slow[0]))
        await asyncio.sleep(1)
        began = now()

        async def source() -> AsyncIterator[ApiKey | str]:
            for key in cached:
                yield key
            yield ""
            yield slow[0]

        stream = client.stream(source() if is_async else [*cached, "", *slow], timeout=5.0)
        labels = [(outcome.ok, outcome.key.name) async for outcome in stream]
        assert labels == [
            *((True, key.name) for key in cached),
            (False, "keys[4]"),
            (True, "slow0"),
        ]
        assert now() - began <= 1
        await other


async def test_a_stream_that_is_never_likely_to_be_in_time_tries_a_key_now_and_then() -> None:
    """After its timeout and a period, so that the failure is seen."""
    limit = RateLimit(requests=2, period=10.0, scope="client")
    async with fake_client(WindowServer(limit=2, period=10.0), rate_limit=limit) as client:
        checks = [asyncio.create_task(client.check(keys(500, f"c{n}-"))) for n in range(20)]
        await asyncio.sleep(1)
        began = now()
        async with aclosing(client.stream(keys(50), timeout=20.0)) as stream:
            outcome = await anext(stream)
        assert isinstance(outcome.error, RateLimitWaitError)
        assert 30 <= now() - began <= 52
        await end(*checks)


async def test_a_stream_with_a_timeout_takes_no_more_keys_than_probes_may_start() -> None:
    """After a refusal one request at a time tests whether all are refused."""
    server = FakeServer(
        lambda name, times: refusal(1) if len(server.arrivals) == 1 else Reply(seconds=0.1)
    )
    limit, once = RateLimit(scope="client"), Retry(attempts=1)
    taken = 0

    async def source() -> AsyncIterator[ApiKey]:
        nonlocal taken
        for key in keys(200):
            taken += 1
            yield key

    async with fake_client(server, rate_limit=limit, retry=once) as client:
        with pytest.raises(RateLimitError):
            await client.balance(keys(1, "refused")[0])
        async with aclosing(client.stream(source(), timeout=60.0)) as stream:
            assert (await anext(stream)).ok
            assert taken < 5
            async for outcome in stream:
                assert outcome.ok
        assert taken == 200


async def test_a_stream_beside_single_calls_that_never_end_has_its_turns() -> None:
    """Single calls and others are let out in turn."""
    limit = RateLimit(requests=10, period=10.0, scope="client")
    async with fake_client(WindowServer(limit=10, period=10.0), rate_limit=limit) as client:
        singles = [asyncio.create_task(client.balance(key)) for key in keys(300, "single")]
        await asyncio.sleep(1)
        began = now()
        async for outcome in client.stream(keys(30), timeout=20.0):
            assert outcome.ok
        assert now() - began < 100
        await end(*singles)


async def test_a_check_whose_deadline_passes_while_it_reads_has_an_outcome_for_each_key() -> None:
    """Also for keys that it had not looked up before."""
    async with fake_client(FakeServer(), max_age=60) as client:
        await client.check(keys(1_500))
        pool = keys(5_000, "p")
        loop = asyncio.get_running_loop()
        check = asyncio.create_task(client.check([*keys(1_500), *pool], timeout=1e-6))
        for _ in range(20):
            await asyncio.sleep(0)
            loop.call_later(1e-7, int)
        report = await check
    assert len(report) == 6_500
    assert all(outcome is not None for outcome in report)


# --- endings in an unusual moment


async def test_thousands_of_keys_survive_a_gateway_for_some_seconds() -> None:
    """They wait for a probe, and are asked again a slice at a time."""
    page = Reply(status=403, body="<html>")
    server = FakeServer(lambda name, times: page if now() < 3 else Reply())
    limit = RateLimit(requests=VAST, pace=None)
    async with fake_client(server, rate_limit=limit) as client:
        assert (await client.check(keys(3_000))).ok


async def test_keys_that_wait_for_a_gateway_may_be_given_up_as_it_goes_away() -> None:
    """Some of them have been asked again, the others have not."""
    page = Reply(status=403, body="<html>")
    server = FakeServer(lambda name, times: page if now() < 0.5 else Reply(seconds=0.1))
    limit = RateLimit(requests=VAST, pace=None)
    async with fake_client(server, rate_limit=limit) as client:
        check = asyncio.create_task(client.check(keys(5_000)))
        await asyncio.sleep(0.5)
        await asyncio.sleep(0.001)
        await end(check)
        assert client.quota().waiting == 0
        assert (await client.balance(keys(1, "single")[0])).credits == 9406


async def test_calls_that_end_while_the_client_closes_are_ended_once() -> None:
    """Their answers come between two slices."""
    server = FakeServer(lambda name, times: Reply(seconds=1.0))
    limit = RateLimit(requests=VAST, pace=None)
    client = fake_client(server, rate_limit=limit, concurrency=3_000)
    check = asyncio.create_task(client.check(keys(2_500)))
    await asyncio.sleep(1.0)
    await client.close()
    with pytest.raises(ClientClosedError):
        await check
    assert len(asyncio.all_tasks()) == 1


async def test_an_invalidated_call_that_is_cancelled_from_outside_ends_its_waiter() -> None:
    """A later call for the key is not touched."""
    server = FakeServer(lambda name, times: Reply(seconds=5.0))
    async with fake_client(server) as client:
        key = keys(1)[0]
        first = asyncio.create_task(client.balance(key))
        await asyncio.sleep(1)
        (request,) = asyncio.all_tasks() - {asyncio.current_task(), first}
        client.invalidate(key)
        second = asyncio.create_task(client.balance(key))
        await asyncio.sleep(1)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).credits == 9406


async def test_an_invalidated_call_is_dropped_when_its_waiter_leaves_before_a_retry() -> None:
    """Nothing of it is left."""
    server = FakeServer(lambda name, times: Reply(seconds=1.0, status=503, body=""))
    retry = Retry(attempts=3, backoff=100.0, wait_max=100.0)
    async with fake_client(server, retry=retry) as client:
        key = keys(1)[0]
        caller = asyncio.create_task(client.balance(key))
        await asyncio.sleep(0.5)
        client.invalidate(key)
        await asyncio.sleep(1)
        await end(caller)
        await asyncio.sleep(300)
    assert len(server.arrivals) == 1


async def test_a_waiter_that_fails_keeps_no_other_waiter_waiting(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log names the key and the kind of the error."""
    server = FakeServer(lambda name, times: Reply(seconds=1.0))
    async with fake_client(server) as client:
        key = keys(1)[0]
        with patch.object(FanOutWaiter, "set_result", side_effect=LookupError("a fault")):
            stream = asyncio.create_task(anext(client.stream([key])))
            await asyncio.sleep(0.5)
            other = asyncio.create_task(client.balance(key))
            assert (await other).credits == 9406
            with pytest.raises(LookupError):
                await stream
    assert "k0: an outcome could not be passed on (LookupError)" in caplog.text
    assert "a fault" not in caplog.text


async def test_an_outcome_that_cannot_land_keeps_no_other_waiter_waiting() -> None:
    """Its own stream has a defect, and is ended by its reader."""
    server = FakeServer(lambda name, times: Reply(seconds=1.0))
    async with fake_client(server) as client:
        key = keys(1)[0]
        with patch.object(FanOut, "_land", side_effect=LookupError):
            stream = asyncio.create_task(anext(client.stream([key])))
            await asyncio.sleep(0.5)
            assert (await client.balance(key)).credits == 9406
        await end(stream)


async def test_thousands_of_joined_calls_expire_with_their_check() -> None:
    """The other check goes on."""
    server = FakeServer(lambda name, times: Reply(seconds=8.0))
    async with fake_client(server, rate_limit=RateLimit(requests=1)) as client:
        pool = keys(2_500)
        first = asyncio.create_task(client.check(pool))
        await asyncio.sleep(1)
        began = now()
        report = await client.check(pool, timeout=5.0)
        assert now() - began == pytest.approx(5.0)
        assert len(report.failed) >= 2_499
        assert client.quota().waiting >= 2_498
        await end(first)


async def test_a_balance_beyond_stale_if_error_stands_in_for_nothing() -> None:
    """The failure is returned."""
    broken = Reply(status=503, body="")
    server = FakeServer(lambda name, times: broken if times else Reply())
    async with fake_client(server, stale_if_error=10, retry=Retry(attempts=1)) as client:
        key = keys(1)[0]
        await client.balance(key)
        await asyncio.sleep(9)
        waits = asyncio.create_task(client.balance(key))
        assert (await waits).stale
        await asyncio.sleep(100)
        with pytest.raises(InternalServerError):
            await client.balance(key)


async def test_a_stream_with_a_timeout_gives_waiting_refreshes_a_turn_in_its_time() -> None:
    """It joins them only when they are likely to start."""
    limit, pool = RateLimit(requests=60, scope="client"), keys(300)
    async with fake_client(WindowServer(limit=60), rate_limit=limit) as client:
        await client.check(pool)
        await asyncio.sleep(70)
        await client.check(pool, max_age=1, stale_while_revalidate=10_000)
        await asyncio.sleep(1)
        async for outcome in client.stream(pool[::-1], timeout=5.0):
            assert outcome.ok


async def test_a_key_in_its_own_cooldown_delays_no_other_key_of_a_stream() -> None:
    """Also if another caller waits for it."""
    server = FakeServer(lambda name, times: refusal(300) if name == "held0" else Reply())
    retry = Retry(wait_max=1_000.0)
    async with fake_client(server, rate_limit=RateLimit(scope="key"), retry=retry) as client:
        held = keys(1, "held")
        other = asyncio.create_task(client.balance(held[0]))
        await asyncio.sleep(1)
        began = now()
        stream = client.stream([*held, *keys(50)], timeout=5.0)
        async with aclosing(stream):
            landed = [await anext(stream) for _ in range(51)]
        assert sum(outcome.ok for outcome in landed) == 50
        assert now() - began <= 6
        await end(other)


async def test_a_secret_given_twice_to_a_stream_with_a_timeout_is_asked_about_once() -> None:
    """While the first call for it waits, the second key joins it."""
    limit, server = RateLimit(requests=10, period=10.0, scope="client"), WindowServer()
    async with fake_client(server, rate_limit=limit) as client:
        await client.check(keys(10, "before"))
        pool = [ApiKey(f"s{n % 8}", name=f"n{n}") for n in range(24)]
        async for outcome in client.stream(pool, timeout=30.0):
            assert outcome.ok
    assert len(server.served) == 18


async def test_cached_answers_are_given_although_the_deadline_has_passed() -> None:
    """They cost no request, and less than their errors would."""
    limit = RateLimit(requests=VAST, pace=None)
    async with fake_client(FakeServer(), rate_limit=limit, max_age=600) as client:
        pool = keys(3_500)
        await client.check(pool)
        check = asyncio.create_task(client.check(pool, timeout=1e-6))
        loop = asyncio.get_running_loop()
        for _ in range(10):
            await asyncio.sleep(0)
            loop.call_later(1e-7, int)
        assert (await check).ok


async def test_a_source_that_swallows_its_cancellation_starts_no_further_call() -> None:
    """The stream is closed at once."""

    async def source() -> AsyncIterator[ApiKey]:
        yield keys(1)[0]
        try:
            await asyncio.sleep(1_000)
        except asyncio.CancelledError:
            yield keys(1, "late")[0]

    for timeout in (None, 5.0):
        server = FakeServer()
        async with fake_client(server) as client:
            stream = client.stream(source(), timeout=timeout)
            assert (await anext(stream)).ok
            await asyncio.sleep(1)
            began = now()
            await stream.aclose()
            assert now() - began < 1
            assert client.quota().waiting == 0
        assert [name for _, name in server.arrivals] == ["k0"]


# --- keys that a stream shares with other callers


@pytest.mark.parametrize("timeout", [10.0, 60.0])
async def test_keys_that_wait_far_back_in_a_check_have_their_turn_in_the_time_of_a_stream(
    timeout: float,
) -> None:
    """They move to the flow of the stream, and the check shares their answers."""
    limit, pool, server = RateLimit(requests=60, scope="client"), keys(300), WindowServer(limit=60)
    async with fake_client(server, rate_limit=limit) as client:
        check = asyncio.create_task(client.check(pool))
        await asyncio.sleep(5)
        async for outcome in client.stream(pool[:150:-1], timeout=timeout):
            assert outcome.ok
        assert (await check).ok
    assert len(server.served) < 400


async def test_keys_that_wait_in_a_stream_have_their_turn_in_the_time_of_another() -> None:
    """A stream without a timeout takes up to 1,024 keys ahead."""
    limit, pool = RateLimit(requests=60, scope="client"), keys(300)
    async with fake_client(WindowServer(limit=60), rate_limit=limit) as client:
        others = asyncio.create_task(collect(client, pool, None))
        await asyncio.sleep(5)
        assert await collect(client, pool[::-1], 20.0)
        assert await others


@pytest.mark.parametrize("timeouts", [(60.0, 60.0), (100.0, 10.0)])
@pytest.mark.parametrize("is_same", [False, True])
async def test_two_streams_with_a_timeout_leave_each_other_turns(
    timeouts: tuple[float, float], *, is_same: bool
) -> None:
    """Each takes keys for half of the tokens, although the other has not taken its own yet."""
    pool = keys(400)
    async with fake_client(WindowServer()) as client:
        reads = [
            collect(client, pool, timeouts[0]),
            collect(client, pool[::-1] if is_same else keys(400, "other"), timeouts[1]),
        ]
        assert await asyncio.gather(*reads) == [True, True]


async def test_a_stream_that_has_ended_is_no_rival_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next one expects all starts that are left, in place of half of them."""
    rivals: list[list[Flow]] = []
    estimates = Estimates.likely_starts

    def likely_starts(self: Estimates, *asked: Any, **options: Any) -> tuple[int, float]:
        rivals.append(list(options["rivals"]))
        return estimates(self, *asked, **options)

    monkeypatch.setattr(Estimates, "likely_starts", likely_starts)
    async with fake_client(WindowServer()) as client:
        assert await collect(client, keys(10), 60.0)
        assert await collect(client, keys(10, "next"), 60.0)
    assert rivals
    assert not any(rivals)


async def test_a_check_keeps_its_keys_that_have_an_earlier_turn_than_in_a_stream() -> None:
    """Many calls of the stream wait before them in its flow."""
    limit, pool = RateLimit(requests=20, scope="client"), keys(5)
    async with fake_client(WindowServer(limit=20), rate_limit=limit) as client:
        await client.check(keys(20, "before"))
        check = asyncio.create_task(client.check(pool))
        stream = client.stream([*keys(100, "more"), *pool], timeout=1_000.0)
        waits = asyncio.create_task(anext(stream))
        await check
        assert now() < 62
        await waits
        await stream.aclose()


async def test_a_key_stays_in_the_flow_of_the_stream_with_the_earlier_deadline() -> None:
    """Both streams get its answer."""
    limit, pool = RateLimit(requests=20, scope="client"), keys(20)
    server = WindowServer(limit=20)
    async with fake_client(server, rate_limit=limit) as client:
        await client.check(keys(20, "before"))
        first = asyncio.create_task(collect(client, pool, 130.0))
        await asyncio.sleep(1)
        assert await collect(client, pool, 200.0)
        assert await first
    assert len(server.served) == 40


async def test_a_key_with_many_waiters_stays_where_it_waits() -> None:
    """The look at all their deadlines would cost too much."""
    limit, pool = RateLimit(requests=20, scope="client"), keys(15)
    server = WindowServer(limit=20)
    async with fake_client(server, rate_limit=limit) as client:
        await client.check(keys(20, "before"))
        several = asyncio.create_task(collect(client, [*pool, *pool[-1:] * 20], None))
        await asyncio.sleep(1)
        assert await collect(client, pool[-1:], 130.0)
        assert await several
    assert len(server.served) == 35


async def test_a_key_that_waits_for_a_retry_stays_where_it_waits() -> None:
    """A place in another flow would not help it."""
    server = FakeServer(lambda name, times: Reply() if times else refusal(5))
    async with fake_client(server, rate_limit=RateLimit(scope="key")) as client:
        first = asyncio.create_task(collect(client, keys(1), None))
        await asyncio.sleep(1)
        assert await collect(client, keys(1), 20.0)
        assert await first
    assert len(server.arrivals) == 2
