"""Cached answers and the calls that replace them, in virtual time."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from crustcredits import (
    APIConnectionError,
    ApiKey,
    APITimeoutError,
    ConfigurationError,
    CreditsClient,
    CreditsUnknownError,
    GatewayError,
    InsufficientCreditsError,
    InternalServerError,
    InvalidKeyError,
    Outcome,
    RateLimit,
    RateLimitWaitError,
    Retry,
)
from tests.cache.calls import BROKEN, KEY, ONCE, UNKNOWN_KEY, counting, outcome
from tests.virtual import FakeServer, Reply, fake_client, keys, lost, now, refusal

pytestmark = pytest.mark.virtual


# --- max_age


async def test_an_answer_younger_than_max_age_is_returned_again() -> None:
    """In seconds or as a timedelta; the age counts from the receipt."""
    server = FakeServer(lambda name, times: Reply(seconds=3, credits=str(times)))
    async with fake_client(server) as client:
        assert (await client.balance(KEY, max_age=5)).credits == 0
        await asyncio.sleep(4.9)
        assert (await client.balance(KEY, max_age=timedelta(seconds=5))).credits == 0
        await asyncio.sleep(0.2)
        assert (await client.balance(KEY, max_age=5.5)).credits == 0
        assert (await client.balance(KEY, max_age=5)).credits == 1


async def test_the_max_age_of_the_client_is_the_default_of_its_calls() -> None:
    """For a key, a pool or a stream; a call may give its own."""
    server = FakeServer(counting())
    async with fake_client(server, max_age=timedelta(minutes=1)) as client:
        assert (await client.balance(KEY)).credits == 1
        assert (await client.check([KEY])).total_credits == 1
        assert [each.credits async for each in client.stream([KEY])] == [1]
        assert (await client.balance(KEY, max_age=0)).credits == 2
        assert [each.credits async for each in client.stream([KEY], max_age=0)] == [3]
        assert (await client.check([KEY], max_age=0)).total_credits == 4
        assert (await client.account(KEY)).credits == 5  # the other endpoint


async def test_a_check_sends_requests_only_for_keys_that_are_not_cached() -> None:
    """Its outcomes stay in order, and the callback gets each of them."""
    server = FakeServer(counting())
    seen: list[str] = []
    pool = keys(6)
    async with fake_client(server) as client:
        await client.check(pool[::2])
        report = await client.check(
            [*pool, pool[0]], max_age=60, on_outcome=lambda each: seen.append(each.key.name)
        )
    assert [each.source for each in report] == ["cached", "fetched"] * 3 + ["cached"]
    assert seen == ["k0", "k2", "k4", "k0", "k1", "k3", "k5"]
    assert len(server.arrivals) == 6


@pytest.mark.parametrize("name", ["max_age", "stale_while_revalidate", "stale_if_error"])
@pytest.mark.parametrize(
    "mistake", [-1, float("nan"), float("inf"), "5", True, timedelta(seconds=-1)]
)
async def test_cache_options_are_numbers_of_seconds(name: str, mistake: Any) -> None:
    """Any other value is refused before any request; the error names the option."""
    server = FakeServer()
    async with fake_client(server) as client:
        for call in (
            client.balance(KEY, **{name: mistake}),
            client.check([KEY], **{name: mistake}),
        ):
            with pytest.raises(
                ConfigurationError, match=f"{name} must be a finite number of seconds of at least 0"
            ):
                await call
        with pytest.raises(ConfigurationError, match=name):
            client.stream([KEY], **{name: mistake})
        with pytest.raises(TypeError, match="maxage"):
            await client.balance(KEY, maxage=5)  # type: ignore[call-arg]  # the mistake under test
    with pytest.raises(ConfigurationError, match=name):
        CreditsClient(**{name: mistake})
    assert not server.arrivals


# --- stale_while_revalidate


async def test_a_stale_answer_is_returned_at_once_and_refreshed_in_the_background() -> None:
    """One refresh serves all callers; the answer is marked, and the next one is new."""
    server = FakeServer(counting())
    async with fake_client(server, max_age=5, stale_while_revalidate=60) as client:
        await client.balance(KEY)
        await asyncio.sleep(10)
        balances = await asyncio.gather(*(client.balance(KEY) for _ in range(10)))
        assert {(str(balance.credits), balance.stale) for balance in balances} == {("1", True)}
        assert now() == pytest.approx(10, abs=0.1)
        again = await outcome(client)
        assert (again.ok, again.stale, again.error, again.source, again.attempts) == (
            True,
            True,
            None,
            "cached",
            0,
        )
        await asyncio.sleep(1)
        fresh = await client.balance(KEY)
        assert fresh.credits == 2
        assert not fresh.stale
    assert len(server.arrivals) == 2


async def test_an_answer_beyond_stale_while_revalidate_is_not_returned() -> None:
    """The caller waits for a new one."""
    server = FakeServer(counting())
    async with fake_client(server) as client:
        await client.balance(KEY)
        await asyncio.sleep(20)
        assert (await client.balance(KEY, max_age=5, stale_while_revalidate=10)).credits == 2


async def test_under_overload_answers_get_older_not_slower() -> None:
    """50 keys are checked every second at a limit of 30 a minute, always at once.

    No answer is older than a round of refreshes.
    """
    server = FakeServer()
    oldest: list[float] = []
    pool = keys(50)
    limit = RateLimit(requests=30, period=60.0)
    async with fake_client(
        server, rate_limit=limit, max_age=1, stale_while_revalidate=600
    ) as client:
        await client.check(pool)
        began = now()
        for _ in range(600):
            report = await client.check(pool)
            assert report.ok
            received = {name: at for at, name in server.arrivals}
            oldest.append(now() - min(received.values()))
            await asyncio.sleep(1)
        assert now() - began == pytest.approx(600, abs=1)
    # 27 a period: a round of the pool takes 50 / 27 periods, and the first burst is over after one.
    assert max(oldest[300:]) <= 50 / 27 * 60.3 + 5
    late = [time for time, _ in server.arrivals if time > 300]
    gaps = [after - before for before, after in pairwise(late)]
    assert max(gaps) < 2 * 60.3 / 27, "the first burst repeats"


async def test_a_failed_refresh_leaves_the_stale_answer_with_the_error_beside_it() -> None:
    """The refresh is repeated after a growing backoff, as long as callers ask."""
    server = FakeServer(
        lambda name, times: BROKEN if 1 <= times <= 5 else Reply(credits=str(times))
    )
    async with fake_client(
        server, max_age=1, stale_while_revalidate=600, retry=Retry(backoff=1.0)
    ) as client:
        await client.balance(KEY)
        seen: list[Outcome[Any]] = []
        for _ in range(120):
            await asyncio.sleep(0.5)
            seen.append(await outcome(client))
    assert all(each.ok for each in seen)
    failing = [each for each in seen if each.error is not None]
    assert {type(each.error) for each in failing} == {InternalServerError}
    assert all(each.stale for each in failing)
    assert seen[-1].error is None
    assert seen[-1].result().credits >= 6


async def test_a_refused_refresh_waits_as_long_as_the_server_asks() -> None:
    """No caller waits for it."""
    server = FakeServer(counting(Reply(), refusal(20), Reply(credits="7")))
    async with fake_client(server, max_age=1, stale_while_revalidate=600) as client:
        await client.balance(KEY)
        for _ in range(30):
            await asyncio.sleep(1)
            await client.balance(KEY)
        assert (await client.balance(KEY)).credits == 7
    assert [time for time, _ in server.arrivals][2] - server.arrivals[1][0] >= 20


async def test_an_error_about_the_key_drops_its_cached_balance() -> None:
    """A revoked key has no balance, not even a recent one.

    A server that is down changes nothing.
    """
    for reply, kind in ((UNKNOWN_KEY, InvalidKeyError), (BROKEN, None)):
        server = FakeServer(counting(Reply(), reply))
        async with fake_client(server, retry=ONCE) as client:
            await client.balance(KEY)
            await asyncio.sleep(1)
            assert (await client.balance(KEY, stale_while_revalidate=60)).stale
            await asyncio.sleep(1)
            again = await outcome(client, stale_while_revalidate=60, stale_if_error=60)
            assert (type(again.error) if kind else again.ok) == (kind or True)


async def test_an_error_that_is_not_about_the_key_leaves_its_cached_balance() -> None:
    """A gateway's 404 or 408, a rejected request or a session failure is not about the key."""
    for trouble in (400, 404, 408, 451):
        server = FakeServer(counting(Reply(credits="7"), Reply(status=trouble, body="{}")))
        async with fake_client(server) as client:
            await client.balance(KEY)
            stand_in = await outcome(client, stale_if_error=60)
            assert stand_in.credits == 7
            assert stand_in.error is not None


# --- stale_if_error


@pytest.mark.parametrize(
    "trouble",
    [
        BROKEN,
        refusal(100),
        Reply(seconds=1e6),
        lost(APIConnectionError("reset")),
        Reply(body="<html>maintenance</html>"),
    ],
    ids=["5xx", "429", "timeout", "connection", "maintenance"],
)
async def test_while_the_api_is_down_the_last_balance_stands_in(trouble: Reply) -> None:
    """The outcome is `ok` and `stale`, with the error beside the balance."""
    server = FakeServer(counting(Reply(credits="7"), trouble))
    async with fake_client(server, retry=Retry(attempts=2), request_timeout=2) as client:
        await client.balance(KEY)
        stand_in = await outcome(client, stale_if_error=600)
        assert stand_in.credits == 7
        assert (stand_in.ok, stand_in.stale, stand_in.source) == (True, True, "cached")
        assert stand_in.error is not None
        assert stand_in.attempts == stand_in.error.attempts >= 1
        assert (await client.balance(KEY, stale_if_error=600)).stale
        await asyncio.sleep(300)
        later = await outcome(client, max_age=60, stale_if_error=100)
        assert not later.ok


async def test_a_stale_answer_stands_in_for_a_missed_deadline() -> None:
    """The wait for the rate limit or the request may use up the time."""
    server = FakeServer(counting(Reply(), Reply(seconds=5)))
    async with fake_client(server, rate_limit=RateLimit(requests=2)) as client:
        await client.balance(KEY)
        on_wire = await outcome(client, timeout=1, stale_if_error=600)
        assert isinstance(on_wire.error, APITimeoutError)
        await asyncio.sleep(10)
        waiting = await outcome(client, timeout=1, stale_if_error=600)
        assert isinstance(waiting.error, RateLimitWaitError)
    assert on_wire.ok
    assert waiting.ok


async def test_without_a_cached_balance_the_outcome_is_the_error() -> None:
    """Unknown credits are never 0."""
    async with fake_client(
        FakeServer(lambda name, times: BROKEN), retry=ONCE, stale_if_error=600
    ) as client:
        failed = await outcome(client)
        assert (failed.ok, failed.credits, failed.stale) == (False, None, False)
        with pytest.raises(InternalServerError):
            await client.balance(KEY)


# --- peek


async def test_peek_returns_the_cached_outcome_without_a_request() -> None:
    """The last balance, or the last failure, or None."""
    server = FakeServer(lambda name, times: BROKEN if name == "bad" else Reply())
    bad = ApiKey("secret-bad", name="bad")
    async with fake_client(server, retry=ONCE) as client:
        assert client.peek(KEY) is None
        await client.check([KEY, bad])
        await asyncio.sleep(30)
        fresh, stale, failed = (
            client.peek(KEY, max_age=60),
            client.peek("secret-0"),
            client.peek(bad),
        )
        assert fresh is not None
        assert (fresh.ok, fresh.stale, fresh.source) == (True, False, "cached")
        assert stale is not None
        assert (stale.ok, stale.stale, stale.key.name) == (True, True, ApiKey("secret-0").name)
        assert failed is not None
        assert isinstance(failed.error, InternalServerError)
        assert client.peek(KEY, detail=True) is None
        server.script = lambda name, times: BROKEN
        await outcome(client)
        again = client.peek(KEY, max_age=60)
        assert again is not None
        assert (again.ok, again.stale, type(again.error)) == (True, False, InternalServerError)
        with pytest.raises(ConfigurationError, match="is empty"):
            client.peek("")
    assert len(server.arrivals) == 3
    assert client.quota().in_flight == 0


# --- require


async def test_require_returns_the_report_of_a_pool_with_enough_credits() -> None:
    """After one check, with the margin on top."""
    server = FakeServer(lambda name, times: Reply(credits="100.5" if name == "k0" else "50"))
    async with fake_client(server) as client:
        report = await client.require(125, keys(2), margin=1.2)
        assert report.available_credits == Decimal("150.5")
        assert len(server.arrivals) == 2
        with pytest.raises(
            InsufficientCreditsError,
            match=r"too few credits: 150\.60 needed, 150\.5 known to be available",
        ) as caught:
            await client.require(Decimal("125.5"), keys(2), margin=Decimal("1.2"), max_age=60)
    assert caught.value.needed == Decimal("150.60")
    assert len(server.arrivals) == 2


async def test_require_waits_for_a_current_balance() -> None:
    """A stale balance would do for a dashboard.

    `require` accepts one only with `stale_if_error`, or with its own `stale_while_revalidate`.
    """
    server = FakeServer(counting(Reply(credits="5000"), Reply(credits="10"), BROKEN))
    options = {"max_age": 5, "stale_while_revalidate": 600, "stale_if_error": 3600}
    async with fake_client(server, retry=ONCE, **options) as client:
        await client.require(5000, [KEY])
        await asyncio.sleep(100)
        assert (await client.require(5000, [KEY], stale_while_revalidate=600)).stale
        await asyncio.sleep(100)
        with pytest.raises(InsufficientCreditsError, match="10 known to be available"):
            await client.require(5000, [KEY])
        await asyncio.sleep(100)
        report = await client.require(5, [KEY])
        assert [each.key.name for each in report.stale] == ["prod"]


async def test_require_can_ask_for_the_whole_account() -> None:
    """Spending draws from the account's credits.

    With `detail`, equal credits do not make two keys lookalikes.
    """
    server = FakeServer(
        lambda name, times: Reply(
            body=f'{{"account": {{"credits": 5, "recurring_credits": {name[1:]}}}}}'
        )
    )
    async with fake_client(server) as client:
        assert (await client.require(10, keys(2), detail=True)).available_credits == 10


# --- require, when this client's own limit or the API gives no answer


async def test_require_accepts_no_stale_balance_that_the_clients_own_limit_delays() -> None:
    """A dashboard may show it.

    But the API has not failed to answer, because no request was sent.
    """
    server = FakeServer()
    limit = RateLimit(requests=1, period=60.0)
    async with fake_client(server, rate_limit=limit, max_age=1, stale_if_error=3600) as client:
        await client.balance(KEY)
        await asyncio.sleep(5)
        assert (await client.check([KEY], timeout=2)).stale
        with pytest.raises(CreditsUnknownError) as caught:
            await client.require(5, [KEY], timeout=2)
    assert [type(error) for error in caught.value.deciding] == [RateLimitWaitError]
    assert caught.value.available == 0


async def test_require_accepts_a_stale_balance_after_a_failure_of_the_api() -> None:
    """The failure stands beside the balance."""
    server = FakeServer(counting(Reply(credits="10"), BROKEN))
    async with fake_client(server, retry=ONCE, max_age=1, stale_if_error=3600) as client:
        await client.balance(KEY)
        await asyncio.sleep(5)
        report = await client.require(10, [KEY])
    assert isinstance(report[0].error, InternalServerError)


# --- cached failures


async def test_a_failure_is_returned_again_for_max_age() -> None:
    """So a revoked key does not spend the rate limit."""
    server = FakeServer(lambda name, times: UNKNOWN_KEY if name == "prod" else Reply())
    async with fake_client(server, max_age=30) as client:
        for _ in range(298):
            await outcome(client)
        failed = await outcome(client)
        assert server.asked == {"prod": 1}
        assert (failed.source, failed.attempts, failed.ok) == ("cached", 0, False)
        with pytest.raises(InvalidKeyError, match="twin: the API does not know the key"):
            await client.balance(ApiKey(KEY.get_secret_value(), name="twin"))
        await asyncio.sleep(30)
        await outcome(client)
    assert server.asked == {"prod": 2}


@pytest.mark.parametrize(
    ("options", "call", "seconds"),
    [
        ({"max_age": 5}, {}, 5.0),
        ({"max_age": 0.1}, {}, 1.0),
        ({"stale_if_error": 60}, {}, 1.0),
        ({"max_age": 5, "max_error_age": 20}, {}, 20.0),
        ({"max_error_age": 20}, {}, 20.0),
        ({"max_age": 5, "max_error_age": 0}, {}, 0.0),
        ({"max_age": 5}, {"max_error_age": 9}, 9.0),
        ({"max_age": 5, "max_error_age": 20}, {"max_age": 7}, 7.0),
        ({"max_age": 5, "max_error_age": 20}, {"max_age": 0}, 0.0),
        ({"max_age": 5}, {"max_age": 0}, 0.0),
        ({}, {}, 0.0),
        ({}, {"max_age": timedelta(seconds=3)}, 3.0),
    ],
)
async def test_max_error_age_says_how_long_a_failure_is_returned_again(
    options: dict[str, Any], call: dict[str, Any], seconds: float
) -> None:
    """By default as long as a balance, and at least 1 s with any cache option.

    The options of a call come first.
    """
    server = FakeServer(lambda name, times: UNKNOWN_KEY)
    async with fake_client(server, **options) as client:
        await outcome(client, **call)
        await asyncio.sleep(seconds - 0.02 if seconds else 0.0)
        assert (await outcome(client, **call)).source == ("cached" if seconds else "fetched")
        await asyncio.sleep(0.03)
        assert (await outcome(client, **call)).source == "fetched"


async def test_a_failure_without_a_request_is_not_returned_again() -> None:
    """The circuit breaker refuses for seconds, even if `max_error_age` is longer."""
    challenge = Reply(status=403, body="<html>")
    server = FakeServer(lambda name, times: challenge if now() < 20 else Reply())
    async with fake_client(server, retry=ONCE, max_age=3600) as client:
        await client.check(keys(40))
        late = await outcome(client)
        assert (late.source, late.attempts, type(late.error)) == ("none", 0, GatewayError)
        await asyncio.sleep(120)
        assert (await outcome(client)).ok


# --- how old an answer is


async def test_an_answer_ages_while_the_machine_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's clock stops then, and the wall clock advances."""
    server = FakeServer(lambda name, times: Reply() if name == "prod" else UNKNOWN_KEY)
    asleep = 0.0
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + asleep)
    bad = keys(1)[0]
    async with fake_client(server, max_age=60) as client:
        await client.check([KEY, bad])
        asleep = 59.0
        assert {each.source for each in await client.check([KEY, bad])} == {"cached"}
        asleep = 61.0
        assert {each.source for each in await client.check([KEY, bad])} == {"fetched"}
        asleep = -1e6  # a clock that is set back makes no answer younger, and none eternal
        assert {each.source for each in await client.check([KEY, bad])} == {"cached"}
        await asyncio.sleep(61)
        assert {each.source for each in await client.check([KEY, bad])} == {"fetched"}


async def test_an_account_is_not_fresh_beyond_its_own_refresh_date(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer does not include the grant of that date."""
    at = datetime.now(UTC) + timedelta(seconds=100)
    body = f'{{"account": {{"credits": 5, "recurring_credits_refresh_date": "{at.isoformat()}"}}}}'
    server = FakeServer(lambda name, times: Reply(body=body))
    async with fake_client(server, max_age=3600) as client:
        await client.account(KEY)
        assert (await client.check([KEY], detail=True))[0].source == "cached"
        monkeypatch.setattr(time, "time", lambda: at.timestamp() + 1)
        known = client.peek(KEY, detail=True)
        assert known is not None
        assert known.stale
        assert (await client.check([KEY], detail=True))[0].source == "fetched"


async def test_a_cached_outcome_is_built_once() -> None:
    """Repeated calls for one key share one outcome in memory."""
    async with fake_client(FakeServer(), max_age=60) as client:
        await client.balance(KEY)
        first = await outcome(client)
        assert first is await outcome(client)
        assert first.credits is first.result().credits
