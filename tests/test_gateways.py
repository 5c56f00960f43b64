"""Answers of a gateway in the API's place: retried, no word on the key, and a circuit breaker. In virtual time."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from crustcredits import APIConnectionError, Balance, CreditsClient, GatewayError, InvalidKeyError, RateLimit, Retry
from crustcredits._circuit_breaker import CircuitBreaker
from crustcredits._transport import Fate
from crustcredits.testing import Fault, SandboxServer
from tests.virtual import FakeServer, Reply, fake_client, keys, lost, now

CHALLENGE = Reply(status=403, body="<html>Just a moment...</html>")
FAST = Retry(attempts=4, backoff=0.01, backoff_max=0.01)
ONCE = Retry(attempts=1)


def since(moment: float) -> FakeServer:
    """A gateway answers until then, and after that the API."""
    return FakeServer(lambda name, times: CHALLENGE if now() < moment else Reply())


@pytest.mark.virtual
async def test_it_is_tried_again() -> None:
    """And is an error of its own when it stays."""
    server = FakeServer(lambda name, times: CHALLENGE if times < 3 else Reply())
    async with fake_client(server, retry=FAST) as client:
        assert (await client.balance(keys(1)[0])).credits == 9406
    async with fake_client(FakeServer(lambda name, times: CHALLENGE), retry=FAST) as client:
        with pytest.raises(GatewayError, match="a gateway answered in the API's place") as caught:
            await client.balance(keys(1)[0])
    assert (caught.value.status, caught.value.attempts, caught.value.key_name) == (403, 4, "k0")


@pytest.mark.virtual
async def test_a_kept_balance_stands_in() -> None:
    """It says nothing of the key. The API's own 401 does, and ends it."""
    key = keys(1)[0]
    replies = [Reply(), CHALLENGE, Reply(status=401, body='{"message": "Invalid API key in request"}'), CHALLENGE]
    server = FakeServer(lambda name, times: replies[times])
    async with fake_client(server, retry=ONCE) as client:
        await client.balance(key)
        report = await client.check([key], stale_if_error=60)
        assert report[0].stale
        assert isinstance(report[0].error, GatewayError)
        with pytest.raises(InvalidKeyError):
            await client.balance(key)
        assert not (await client.check([key], stale_if_error=60)).ok


@pytest.mark.virtual
async def test_after_eight_in_a_row_no_key_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    """The rest of a pool fails when its turn comes, with the reason, and what waits for its next attempt fails at once."""
    server = since(1e9)
    pool = keys(500)
    with caplog.at_level(logging.WARNING, logger="crustcredits"):
        async with fake_client(server, retry=FAST, concurrency=4) as client:
            report = await client.check(pool)
            assert now() < 1
            assert 8 <= len(server.arrivals) <= 12  # four may be on the wire when it opens
            assert all(isinstance(outcome.error, GatewayError) for outcome in report)
            assert report[-1].attempts == 0
            assert str(report[-1].error).startswith("k499: not asked, because a gateway answered ")
            with pytest.raises(GatewayError, match="k0: not asked"):
                await client.balance(pool[0])
            assert len(server.arrivals) <= 12
    assert caplog.text.count("/user/credits: a gateway answered 8 requests in a row in the API's place; no key is asked") == 1


@pytest.mark.virtual
async def test_one_probe_finds_out_whether_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """At first after a second, then after twice as long each time; each is one request. Then all keys are asked again."""
    server = since(10.0)
    pool = keys(20)
    with caplog.at_level(logging.INFO, logger="crustcredits"):
        async with fake_client(server, retry=FAST) as client:
            await client.check(pool)
            before = len(server.arrivals)
            opened = now()
            while now() < 12:
                await asyncio.gather(*(client.balance(key) for key in pool), return_exceptions=True)
                await asyncio.sleep(0.05)
            probes = [moment - opened for moment, _ in server.arrivals[before:] if moment < 10]
            assert [round(moment) for moment in probes] == [1, 3, 7]
            await asyncio.sleep(5)
            assert (await client.check(pool)).ok is False  # the probe is one of them, and the others are not asked yet
            assert (await client.check(pool)).ok
    assert "/user/credits: the API answers again" in caplog.text


@pytest.mark.virtual
async def test_kept_balances_stand_in_while_it_is_open() -> None:
    """Nobody is asked for them."""
    pool = keys(12)
    server = FakeServer(lambda name, times: Reply() if times == 0 else CHALLENGE)
    async with fake_client(server, retry=ONCE, stale_if_error=600) as client:
        await client.check(pool)
        await client.check(pool)
        asked = len(server.arrivals)
        report = await client.check(pool)
        assert len(server.arrivals) == asked
        assert (len(report.stale), report.ok) == (12, True)


@pytest.mark.virtual
async def test_stale_answers_are_not_refreshed_while_it_is_open() -> None:
    """But by one probe at a time."""
    pool = keys(12)
    server = FakeServer(lambda name, times: Reply() if times == 0 else CHALLENGE)
    async with fake_client(server, retry=ONCE, stale_while_revalidate=600) as client:
        await client.check(pool)
        for _ in range(200):
            await client.check(pool)
            await asyncio.sleep(0.05)
        assert len(server.arrivals) <= 12 + 12 + 6


@pytest.mark.virtual
async def test_an_answer_of_the_apis_own_ends_the_row() -> None:
    """Be it a refusal of the key."""
    no = Reply(status=401, body='{"message": "Invalid API key in request"}')
    server = FakeServer(lambda name, times: no if name in {"k7", "k15"} else CHALLENGE)
    async with fake_client(server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)) as client:
        report = await client.check(keys(22))
        assert [outcome.attempts for outcome in report] == [1] * 22


@pytest.mark.virtual
async def test_a_probe_that_is_given_up_lets_another_go() -> None:
    """Cancelled, or failed for another reason."""
    pool = keys(10)
    server = FakeServer(lambda name, times: CHALLENGE if now() < 1 else Reply(seconds=5 if name == "k0" else 0.01))
    async with fake_client(server, retry=ONCE) as client:
        await client.check(pool)
        await asyncio.sleep(2)
        probe = asyncio.create_task(client.balance(pool[0]))
        await asyncio.sleep(0.1)
        with pytest.raises(GatewayError, match="not asked"):
            await client.balance(pool[1])
        probe.cancel()
        await asyncio.sleep(6)  # what is on the wire is finished
        assert (await client.balance(pool[1])).credits == 9406


@pytest.mark.virtual
async def test_a_probe_that_is_lost_lets_another_go() -> None:
    """A timeout tells nothing of who answers."""
    pool = keys(10)
    gone = lost(APIConnectionError("reset"), Fate.ABANDONED)
    server = FakeServer(lambda name, times: CHALLENGE if now() < 1 else gone if name == "k0" else Reply())
    async with fake_client(server, retry=Retry(attempts=2)) as client:
        await client.check(pool)
        await asyncio.sleep(2)
        with pytest.raises((APIConnectionError, GatewayError)):
            await client.balance(pool[0])
        await asyncio.sleep(2)
        assert (await client.balance(pool[1])).credits == 9406


def test_the_pause_grows_to_a_minute() -> None:
    """However long it lasts. What was on the wire when it opened does not count."""
    breaker, error = CircuitBreaker("/user/credits"), GatewayError("x", status=403)
    for number in range(8):
        assert breaker.refusal(0.0) is None, number
        assert breaker.start() is False
        breaker.gateway_answered(error, 0.0, probe=False)
    breaker.gateway_answered(error, 0.5, probe=False)
    moment, pauses = 0.0, []
    for _ in range(70):
        start = moment
        while breaker.refusal(moment) is not None:
            moment += 0.5
        pauses.append(moment - start)
        assert breaker.start() is True
        assert breaker.refusal(moment) is not None, "one probe at a time"
        breaker.gateway_answered(error, moment, probe=True)
        breaker.end(moment, probe=True)
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pauses[-1] == 60
    breaker.api_answered()
    assert breaker.refusal(moment) is None


@pytest.mark.virtual
async def test_what_a_gateway_says_of_a_limit_is_not_listened_to() -> None:
    """Its limit is not the API's, and what it answers ends no pause."""
    headers = {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60"}
    odd = Reply(status=403, body="<html>", headers=headers)
    server = FakeServer(lambda name, times: odd if name in {"k0", "k1", "k2"} else Reply())
    async with fake_client(server, retry=ONCE) as client:
        await client.check(keys(3))
        assert client.quota().limit == 300
        assert (await client.check(keys(20)[3:], timeout=20)).ok


@pytest.mark.virtual
async def test_a_gateway_ends_no_pause() -> None:
    """Three refusals have begun it."""
    refused = Reply(status=429, body="{}", headers={"x-ratelimit-reset": "50"})
    late = Reply(seconds=1.0, status=403, body="<html>")
    server = FakeServer(lambda name, times: late if name == "k3" else refused)
    async with fake_client(server, retry=ONCE, rate_limit=RateLimit(pace=None)) as client:
        await client.check(keys(4))
        assert client.quota().paused is not None


@pytest.mark.virtual
@pytest.mark.parametrize("status", [400, 401, 404, 429])
async def test_any_answer_of_the_apis_own_closes_it(status: int) -> None:
    """With a JSON object. Seven of a gateway, one of the API and seven more open nothing."""
    own = Reply(status=status, body='{"message": "no"}')
    server = FakeServer(lambda name, times: own if name == "k7" else CHALLENGE)
    async with fake_client(server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)) as client:
        report = await client.check(keys(15))
        assert [outcome.attempts for outcome in report] == [1] * 15


@pytest.mark.virtual
async def test_a_probe_is_one_request_and_no_call() -> None:
    """While its key waits for its next attempt, or is told to wait, others find that the API is back."""
    pool = keys(12)
    hangs = Reply(seconds=99)
    server = FakeServer(lambda name, times: CHALLENGE if now() < 1 else hangs if name == "k0" else Reply())
    async with fake_client(server, retry=Retry(attempts=4, backoff=0.4), request_timeout=1.0) as client:
        await client.check(pool)
        await asyncio.sleep(2)
        hanging = asyncio.create_task(client.balance(pool[0]))
        refused = 0
        for _ in range(60):
            await asyncio.sleep(0.05)
            try:
                assert (await client.balance(pool[1])).credits == 9406
            except GatewayError:
                refused += 1
            else:
                break
        assert 30 <= refused < 60, "as long as its request hangs and a pause more"
        hanging.cancel()


@pytest.mark.virtual
async def test_it_opens_for_one_endpoint() -> None:
    """The other is asked as before."""
    server = since(1e9)
    async with fake_client(server, retry=ONCE) as client:
        await client.check(keys(20))
        before = len(server.arrivals)
        with pytest.raises(GatewayError, match="a gateway answered in the API's place"):
            await client.account(keys(1)[0])
        assert len(server.arrivals) == before + 1


@pytest.mark.virtual
async def test_many_refreshes_that_are_stopped_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    """With few places for answers, at random moments: no error of ours, and all are served when the API is back."""
    for seed in range(20):
        random.seed(seed)
        end = now() + 3.0
        server = FakeServer(lambda name, times, end=end: CHALLENGE if times and now() < end else Reply())  # type: ignore[misc]
        async with fake_client(server, retry=FAST, max_entries=6, stale_while_revalidate=60, concurrency=4) as client:
            pool = keys(10)
            while now() < end + 3:
                calls = [asyncio.create_task(client.balance(random.choice(pool), timeout=2)) for _ in range(6)]
                await asyncio.sleep(random.uniform(0, 0.3))
                random.choice(calls).cancel()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(each) for each in outcomes} <= {Balance, GatewayError, asyncio.CancelledError}
            assert (await client.check(pool, max_age=0, stale_while_revalidate=0)).ok
    assert "Traceback" not in caplog.text
    assert "never retrieved" not in caplog.text


async def test_the_page_of_a_real_gateway(sandbox: SandboxServer) -> None:
    """Over a socket, as the sandbox serves it."""
    key = sandbox.add_key("prod")
    sandbox.fail(key, Fault.CHALLENGE, times=1)
    async with CreditsClient(base_url=sandbox.url, retry=Retry(backoff=0.01)) as client:
        report = await client.check([key])
    assert (report[0].ok, report[0].attempts) == (True, 2)
