"""Answers of a gateway in the API's place: retried, no word on the key, and a circuit breaker.

In virtual time.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from contextlib import aclosing
from functools import partial
from itertools import pairwise

import pytest

from crustcredits import (
    APIConnectionError,
    APITimeoutError,
    Balance,
    CreditsClient,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    RateLimit,
    Retry,
)
from crustcredits._cache.circuit_breaker import CircuitBreaker
from crustcredits._http.transport import Fate
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
    replies = [
        Reply(),
        CHALLENGE,
        Reply(status=401, body='{"message": "Invalid API key in request"}'),
        CHALLENGE,
    ]
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
    """The rest of a pool waits for the first probes, and then fails with the reason, a second for
    each room full of keys."""
    server = since(1e9)
    pool = keys(500)
    with caplog.at_level(logging.WARNING, logger="crustcredits"):
        async with fake_client(server, retry=FAST, concurrency=4) as client:
            report = await client.check(pool)
            times = [moment for moment, _ in server.arrivals]
            opened = next(
                after
                for after, (before, later) in enumerate(pairwise(times), 1)
                if later - before > 0.9
            )
            assert (
                8 <= opened <= 16
            )  # four may be on the wire when it opens, and when the row began
            assert [
                round(later - before) for before, later in pairwise(times[opened - 1 : opened + 3])
            ] == [1, 2, 4]
            assert len(times) - opened <= 8
            assert now() < 1 + 2 + 4 + 8 + 500 / (4 * 9) + 2
            assert all(isinstance(outcome.error, GatewayError) for outcome in report)
            assert (report[-1].attempts, report[-1].source) == (0, "none")
            assert str(report[-1].error).startswith("k499: not sent for ")
            assert "look for a proxy or firewall" in str(report[-1].error)
            began = now()
            with pytest.raises(GatewayError, match="k400: not sent for"):
                await client.balance(pool[400])
            assert now() - began == pytest.approx(1, abs=0.01)
    assert (
        caplog.text.count(
            "/user/credits: circuit breaker open: a gateway answered 8 requests in a row in the "
            "API's place; only probes are sent until the API answers one"
        )
        == 1
    )


@pytest.mark.virtual
async def test_a_call_without_time_for_the_next_probe_fails_in_time() -> None:
    """It is told why.

    Not at once, because an answer to an older request may close the circuit breaker.
    """
    async with fake_client(since(1e9), retry=FAST) as client:
        await client.check(keys(20), timeout=0.5)
        began = now()
        with pytest.raises(GatewayError, match="k0: "):
            await client.balance(keys(1)[0], timeout=0.1)
        assert now() == pytest.approx(began + 0.1)


@pytest.mark.virtual
async def test_an_answer_to_an_older_request_lets_those_go_that_wait_for_a_probe() -> None:
    """The API has answered: there is nothing to wait for."""
    slow = Reply(seconds=0.3)
    server = FakeServer(
        lambda name, times: slow if name == "slow0" else CHALLENGE if now() < 0.1 else Reply()
    )
    async with fake_client(server, retry=ONCE, rate_limit=RateLimit(pace=None)) as client:
        older = asyncio.create_task(client.balance(keys(1, "slow")[0]))
        for key in keys(8):
            with pytest.raises(GatewayError):
                await client.balance(key)
        assert (await client.balance(keys(1, "later")[0], timeout=0.7)).credits == 9406
        assert now() == pytest.approx(0.3, abs=0.05)
        await older


@pytest.mark.virtual
async def test_a_key_that_was_asked_keeps_its_own_failure() -> None:
    """That it was not asked again is no news."""
    async with fake_client(since(1e9), retry=FAST) as client:
        report = await client.check(keys(5))
        assert {outcome.attempts > 0 for outcome in report} == {True}
        assert all(
            "a gateway answered in the API's place" in str(outcome.error) for outcome in report
        )


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("count", [3, 8, 30, 250])
async def test_a_gateway_that_answers_for_seconds_sinks_no_pool(count: int, seconds: float) -> None:
    """Requests on the wire together are one answer of it; and calls wait for the probes."""
    server = since(seconds)
    async with fake_client(server) as client:
        report = await client.check(keys(count), timeout=60)
    assert [str(outcome.error) for outcome in report.failed] == []


@pytest.mark.virtual
async def test_one_probe_finds_out_whether_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    """At first after a second, then after twice as long each time; each is one request.

    Then all keys are asked again.
    """
    server = since(10.0)
    pool = keys(20)
    with caplog.at_level(logging.INFO, logger="crustcredits"):
        async with fake_client(server, retry=FAST) as client:
            await client.check(pool, timeout=0.5)
            before = len(server.arrivals)
            opened = now()
            while now() < 9:
                await asyncio.gather(
                    *(client.balance(key, timeout=5) for key in pool), return_exceptions=True
                )
                await asyncio.sleep(0.05)
            probes = [moment - opened for moment, _ in server.arrivals[before:]]
            # A key that is refused again puts off nobody else, so that one more may follow.
            assert sorted({round(moment) for moment in probes}) == [1, 3, 7]
            assert len(probes) <= 5
            await asyncio.sleep(3600)
            assert (await client.check(pool)).ok, "all wait for the probe, which is one of them"
    assert "/user/credits: the API answers again" in caplog.text


@pytest.mark.virtual
@pytest.mark.parametrize("trouble", ["hangs", "gateway", "down"])
async def test_one_key_in_trouble_keeps_no_other_from_being_asked(trouble: str) -> None:
    """It is the first of the pool each time, and so would be each probe."""
    bad = {"hangs": Reply(seconds=99), "gateway": CHALLENGE, "down": Reply(status=500, body="")}[
        trouble
    ]
    server = FakeServer(
        lambda name, times: CHALLENGE if now() < 1 else bad if name == "k0" else Reply()
    )
    pool = keys(20)
    async with fake_client(server, request_timeout=0.5) as client:
        for _ in range(3):
            await client.check(pool, timeout=3)
            await asyncio.sleep(1)
        report = await client.check(pool, timeout=3)
        assert [outcome.key.name for outcome in report.failed] == ["k0"]
        began = now()
        with pytest.raises(
            (APIConnectionError, APITimeoutError, InternalServerError, GatewayError)
        ):
            await client.balance(pool[0], timeout=20)
        assert now() - began <= 20


@pytest.mark.virtual
@pytest.mark.parametrize("every", [125, 900])
async def test_keys_that_a_gateway_refuses_keep_no_other_from_being_asked_however_seldom(
    every: int,
) -> None:
    """Also two of them, in front of each pool."""
    server = FakeServer(
        lambda name, times: CHALLENGE if now() < 3 or name in {"k0", "k1"} else Reply()
    )
    pool = keys(20)
    async with fake_client(server) as client:
        await client.check(pool, timeout=2)
        for _ in range(3):
            await asyncio.sleep(every)
            report = await client.check(pool)
        report = await client.check(pool)
    assert [outcome.key.name for outcome in report.failed] == ["k0", "k1"]


@pytest.mark.virtual
@pytest.mark.parametrize(("bad", "good"), [(3, 1), (8, 20), (9, 1)])
async def test_several_keys_that_a_gateway_refuses_hold_up_no_others(bad: int, good: int) -> None:
    """In front of them, and asked again and again."""
    pool = [*keys(bad, "bad"), *keys(good)]
    server = FakeServer(lambda name, times: CHALLENGE if name.startswith("bad") else Reply())
    async with fake_client(server) as client:
        for _ in range(10):
            report = await client.check(pool, timeout=10)
            assert all(outcome.ok for outcome in report if outcome.key.name.startswith("k"))
            await asyncio.sleep(1)


def test_keys_that_the_api_has_answered_are_forgotten_in_an_outage() -> None:
    """After three probes for such keys in a row; and no more than a thousand are remembered."""
    breaker, error = CircuitBreaker("/user/credits"), GatewayError("x", status=403)
    for number in range(1_001):
        breaker.api_answered(f"k{number}")
    for number in range(8):
        breaker.gateway_answered(breaker.start(float(number), "bad"), error, float(number))
    assert breaker.is_open
    assert breaker.refusal(7.5, "k0") is not None
    for number in range(1, 4):
        assert breaker.refusal(7.5, f"k{number}") is None
        breaker.gateway_answered(breaker.start(7.5, f"k{number}"), error, 7.5)
    assert breaker.refusal(7.5, "k4") is not None


@pytest.mark.virtual
async def test_kept_balances_are_given_without_waiting_for_probes() -> None:
    """Also to those who are under way when it opens."""
    pool = keys(60)
    server = FakeServer(lambda name, times: CHALLENGE if times else Reply())
    async with fake_client(server, stale_if_error=3600) as client:
        await client.check(pool)
        began = now()
        report = await client.check(pool)
        assert len(report.stale) == 60
        assert now() - began < 3
        await asyncio.sleep(90)
        began = now()
        assert len((await client.check(pool)).stale) == 60
        assert now() - began < 1


@pytest.mark.virtual
async def test_a_stream_without_end_is_not_emptied_while_it_is_open() -> None:
    """Its keys wait like others."""
    count = 0
    source = (f"secret-{number}" for number in itertools.count())
    async with (
        fake_client(since(1e9), retry=FAST) as client,
        aclosing(client.stream(source)) as outcomes,
    ):
        async for _ in outcomes:
            count += 1
            if now() > 20:
                break
    assert count <= 20 * 1024


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
    async with fake_client(
        server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)
    ) as client:
        report = await client.check(keys(22))
        assert [outcome.attempts for outcome in report] == [1] * 22


@pytest.mark.virtual
async def test_a_probe_that_is_given_up_lets_another_go() -> None:
    """Others wait for its end, and not longer."""
    pool = keys(40)
    server = FakeServer(
        lambda name, times: CHALLENGE if now() < 1 else Reply(seconds=5 if name == "k0" else 0.01)
    )
    async with fake_client(server, retry=ONCE) as client:
        await client.check(pool, timeout=0.5)
        await asyncio.sleep(2)
        probe = asyncio.create_task(client.balance(pool[0]))
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(client.balance(pool[1]))
        with pytest.raises(GatewayError, match="not sent while a probe is on the wire"):
            await client.balance(pool[2], timeout=0.5)
        probe.cancel()
        began = now()
        assert (await waiting).credits == 9406
        assert now() - began < 5  # what is on the wire is finished


@pytest.mark.virtual
async def test_a_probe_that_is_lost_proves_no_gateway() -> None:
    """All are asked again; one more answer of a gateway is enough to stop that."""
    pool = keys(40)
    gone = lost(APIConnectionError("reset"), Fate.ABANDONED)
    server = FakeServer(lambda name, times: gone if name == "k0" and now() > 1 else CHALLENGE)
    async with fake_client(server, retry=ONCE) as client:
        await client.check(pool, timeout=0.5)
        await asyncio.sleep(2)
        with pytest.raises(APIConnectionError):
            await client.balance(pool[0])
        before = len(server.arrivals)
        report = await client.check(pool[1:], timeout=0.5)
        assert 1 <= len(server.arrivals) - before <= 8
        assert all(isinstance(outcome.error, GatewayError) for outcome in report)


def test_a_probe_that_ends_after_the_breaker_has_closed_opens_nothing() -> None:
    """It is one answer like any other; and of two probes only the last one counts as such."""
    breaker, error = CircuitBreaker("/user/credits"), GatewayError("x", status=403)

    def opened(now: float) -> None:
        for _ in range(8):
            breaker.gateway_answered(breaker.start(now, None), error, now)
        assert breaker.is_open

    opened(0.0)
    old = breaker.start(2.0, "k0")
    breaker.api_answered()  # by a request that was sent before
    breaker.gateway_answered(old, error, 3.0)
    breaker.end(old, 3.0)
    assert not breaker.is_open
    opened(4.0)
    older = breaker.start(10.0, "k0")
    breaker.api_answered()
    opened(11.0)
    probe = breaker.start(20.0, "k1")
    breaker.gateway_answered(older, error, 20.0)
    breaker.end(older, 20.0)
    assert breaker.is_probing
    breaker.end(probe, 21.0)
    assert not breaker.is_probing


def test_the_pause_grows_to_a_minute() -> None:
    """However long it lasts.

    What was on the wire when it opened, or when the row began, does not count.
    """
    breaker, error = CircuitBreaker("/user/credits"), GatewayError("x", status=403)
    early = [breaker.start(0.0, None) for _ in range(8)]
    for request in early:
        breaker.gateway_answered(request, error, 0.5)
        assert not breaker.is_open
    for number in range(7):
        assert breaker.refusal(0.5) is None, number
        request = breaker.start(0.5, None)
        assert request.is_probe is False
        breaker.gateway_answered(request, error, 0.5)
    breaker.gateway_answered(early[0], error, 1.0)
    moment, pauses = 0.5, []
    for _ in range(70):
        start = moment
        while breaker.refusal(moment) is not None:
            moment += 0.5
        pauses.append(moment - start)
        request = breaker.start(moment, None)
        assert request.is_probe is True
        assert breaker.refusal(moment) is not None, "one probe at a time"
        breaker.gateway_answered(request, error, moment)
        breaker.end(request, moment)
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert pauses[-1] == 60
    moment += 60
    breaker.end(breaker.start(moment, None), moment)
    assert breaker.refusal(moment) is None, "a probe without an answer proves nothing"
    breaker.gateway_answered(breaker.start(moment, None), error, moment)
    assert breaker.refusal(moment + 59) is not None, (
        "it is the same outage, and the pause as long as before"
    )
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
    """A run of refusals has begun it."""
    refused = Reply(status=429, body="{}", headers={"x-ratelimit-reset": "50"})
    late = Reply(seconds=1.0, status=403, body="<html>")
    server = FakeServer(lambda name, times: late if name == "k0" else refused)
    async with fake_client(server, retry=ONCE, rate_limit=RateLimit(pace=None)) as client:
        await client.check(keys(40), timeout=5)
        assert client.quota().cooldown is not None


@pytest.mark.virtual
@pytest.mark.parametrize("status", [400, 401, 404, 429])
async def test_any_answer_of_the_apis_own_closes_it(status: int) -> None:
    """With a JSON object. Seven of a gateway, one of the API and seven more open nothing."""
    own = Reply(status=status, body='{"message": "no"}')
    server = FakeServer(lambda name, times: own if name == "k7" else CHALLENGE)
    async with fake_client(
        server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)
    ) as client:
        report = await client.check(keys(15))
        assert [outcome.attempts for outcome in report] == [1] * 15


@pytest.mark.virtual
async def test_a_probe_is_one_request_and_no_call() -> None:
    """While its key waits for its next attempt others find that the API is back."""
    pool = keys(12)
    hangs = Reply(seconds=99)
    server = FakeServer(
        lambda name, times: CHALLENGE if now() < 1 else hangs if name == "k0" else Reply()
    )
    async with fake_client(
        server, retry=Retry(attempts=4, backoff=0.4), request_timeout=1.0
    ) as client:
        await client.check(pool, timeout=0.5)
        await asyncio.sleep(2)
        hanging = asyncio.create_task(client.balance(pool[0]))
        await asyncio.sleep(0.05)
        began = now()
        assert (await client.balance(pool[1])).credits == 9406
        assert now() - began == pytest.approx(0.96, abs=0.02), "as long as the probe hangs"
        hanging.cancel()


@pytest.mark.virtual
async def test_it_opens_for_one_endpoint() -> None:
    """The other is asked as before."""
    server = since(1e9)
    async with fake_client(server, retry=ONCE) as client:
        await client.check(keys(20), timeout=0.5)
        before = len(server.arrivals)
        with pytest.raises(GatewayError, match="a gateway answered in the API's place"):
            await client.account(keys(1)[0])
        assert len(server.arrivals) == before + 1


def _challenge_until(end: float, name: str, times: int) -> Reply:
    return CHALLENGE if times and now() < end else Reply()


@pytest.mark.virtual
async def test_many_refreshes_that_are_stopped_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With few places for answers, at random moments: no error of ours, and all are served when the
    API is back."""
    for seed in range(20):
        random.seed(seed)
        end = now() + 3.0
        server = FakeServer(partial(_challenge_until, end))
        async with fake_client(
            server, retry=FAST, max_entries=6, stale_while_revalidate=60, concurrency=4
        ) as client:
            pool = keys(10)
            while now() < end + 3:
                calls = [
                    asyncio.create_task(client.balance(random.choice(pool), timeout=2))
                    for _ in range(6)
                ]
                await asyncio.sleep(random.uniform(0, 0.3))
                random.choice(calls).cancel()
                outcomes = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(each) for each in outcomes} <= {
                    Balance,
                    GatewayError,
                    APITimeoutError,
                    asyncio.CancelledError,
                }
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
