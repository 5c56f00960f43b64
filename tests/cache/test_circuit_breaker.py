"""Gateway answers in the API's place: retries, stale balances and the circuit breaker.

In virtual time, except for one test over a socket.
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
from crustcredits._http.transport_types import Fate
from crustcredits.testing import Fault, SandboxServer
from tests.virtual import FakeServer, Reply, fake_client, keys, lost, now

CHALLENGE = Reply(status=403, body="<html>Just a moment...</html>")
FAST = Retry(attempts=4, backoff=0.01, backoff_max=0.01)
ONCE = Retry(attempts=1)


def since(moment: float) -> FakeServer:
    """A server behind a gateway that answers until `moment`; after that the API answers."""
    return FakeServer(lambda name, times: CHALLENGE if now() < moment else Reply())


@pytest.mark.virtual
async def test_a_gateway_answer_is_retried() -> None:
    """After the last attempt it is a `GatewayError` with status, attempts and key name."""
    server = FakeServer(lambda name, times: CHALLENGE if times < 3 else Reply())
    async with fake_client(server, retry=FAST) as client:
        assert (await client.balance(keys(1)[0])).credits == 9406
    async with fake_client(FakeServer(lambda name, times: CHALLENGE), retry=FAST) as client:
        with pytest.raises(GatewayError, match="a gateway answered in the API's place") as caught:
            await client.balance(keys(1)[0])
    assert (caught.value.status, caught.value.attempts, caught.value.key_name) == (403, 4, "k0")


@pytest.mark.virtual
async def test_a_stale_balance_stands_in_for_a_gateway_answer() -> None:
    """A gateway says nothing about the key; the API's own 401 drops the cached balance."""
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
async def test_eight_gateway_answers_in_a_row_open_the_circuit_breaker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The rest of a pool waits for the first probes, then fails with the reason.

    Each group of keys that waits together takes one second.
    """
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
            # Four requests may be on the wire when the row begins, and four when it opens.
            assert 8 <= opened <= 16
            assert [
                round(later - before) for before, later in pairwise(times[opened - 1 : opened + 3])
            ] == [1, 2, 4]
            assert len(times) - opened <= 8
            assert now() < 1 + 2 + 4 + 8 + 500 / (4 * 9) + 2
            assert all(isinstance(outcome.error, GatewayError) for outcome in report)
            assert (report[-1].attempts, report[-1].source) == (0, "none")
            assert str(report[-1].error).startswith("k499: not sent: the circuit breaker is open")
            assert "look for a proxy or firewall" in str(report[-1].error)
            began = now()
            with pytest.raises(
                GatewayError, match="k400: not sent: the circuit breaker is open for another"
            ):
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
async def test_a_call_with_a_deadline_before_the_next_probe_fails_at_its_deadline() -> None:
    """The error is the gateway's.

    The call does not fail at once, because an answer to an older request may close the circuit
    breaker.
    """
    async with fake_client(since(1e9), retry=FAST) as client:
        await client.check(keys(20), timeout=0.5)
        began = now()
        with pytest.raises(GatewayError, match="k0: "):
            await client.balance(keys(1)[0], timeout=0.1)
        assert now() == pytest.approx(began + 0.1)


@pytest.mark.virtual
async def test_an_answer_to_an_older_request_starts_the_calls_that_wait_for_a_probe() -> None:
    """The API has answered, so no probe is needed."""
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
async def test_a_call_with_an_attempt_ends_with_its_own_error() -> None:
    """The refusal of the circuit breaker does not replace the error of the attempt."""
    async with fake_client(since(1e9), retry=FAST) as client:
        report = await client.check(keys(5))
        assert {outcome.attempts > 0 for outcome in report} == {True}
        assert all(
            "a gateway answered in the API's place" in str(outcome.error) for outcome in report
        )


@pytest.mark.virtual
@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("count", [3, 8, 30, 250])
async def test_a_gateway_that_answers_for_seconds_fails_no_key_of_a_pool(
    count: int, seconds: float
) -> None:
    """Answers to requests on the wire together count once, and calls wait for the probes."""
    server = since(seconds)
    async with fake_client(server) as client:
        report = await client.check(keys(count), timeout=60)
    assert [str(outcome.error) for outcome in report.failed] == []


@pytest.mark.virtual
async def test_one_probe_at_a_time_tests_whether_the_api_answers_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The delay starts at 1 s and doubles after each failed probe; each probe is one request.

    After an answer of the API all keys are asked about again.
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
            # A second failed probe of a key delays no other key, so one more probe may follow.
            assert sorted({round(moment) for moment in probes}) == [1, 3, 7]
            assert len(probes) <= 5
            await asyncio.sleep(3600)
            assert (await client.check(pool)).ok, (
                "all calls wait for the probe, which is one of them"
            )
    assert "/user/credits: circuit breaker closed: the API answers again" in caplog.text


@pytest.mark.virtual
@pytest.mark.parametrize("trouble", ["hangs", "gateway", "down"])
async def test_one_failing_key_delays_no_other_key(trouble: str) -> None:
    """The key is the first of the pool each time, and would be each probe."""
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
async def test_two_keys_that_a_gateway_refuses_fail_no_other_key_of_a_rare_check(
    every: int,
) -> None:
    """The two keys are the first of each pool; the checks are minutes apart."""
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
async def test_several_keys_that_a_gateway_refuses_delay_no_other_key(bad: int, good: int) -> None:
    """The refused keys are the first of the pool, which is checked repeatedly."""
    pool = [*keys(bad, "bad"), *keys(good)]
    server = FakeServer(lambda name, times: CHALLENGE if name.startswith("bad") else Reply())
    async with fake_client(server) as client:
        for _ in range(10):
            report = await client.check(pool, timeout=10)
            assert all(outcome.ok for outcome in report if outcome.key.name.startswith("k"))
            await asyncio.sleep(1)


def test_remembered_keys_are_forgotten_after_three_failed_probes_of_them() -> None:
    """At most 1,000 keys are remembered as answered by the API."""
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
async def test_stale_balances_are_returned_without_a_wait_for_probes() -> None:
    """This holds for calls under way when the circuit breaker opens, too."""
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
async def test_an_open_circuit_breaker_does_not_drain_an_endless_stream() -> None:
    """Its keys wait for probes like other calls."""
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
async def test_stale_balances_stand_in_while_the_circuit_breaker_is_open() -> None:
    """No request is sent for them."""
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
async def test_stale_answers_are_not_refreshed_while_the_circuit_breaker_is_open() -> None:
    """Only one probe at a time is sent."""
    pool = keys(12)
    server = FakeServer(lambda name, times: Reply() if times == 0 else CHALLENGE)
    async with fake_client(server, retry=ONCE, stale_while_revalidate=600) as client:
        await client.check(pool)
        for _ in range(200):
            await client.check(pool)
            await asyncio.sleep(0.05)
        assert len(server.arrivals) <= 12 + 12 + 6


@pytest.mark.virtual
async def test_an_answer_of_the_apis_own_resets_the_count_of_gateway_answers() -> None:
    """A refusal of the key counts as such an answer."""
    no = Reply(status=401, body='{"message": "Invalid API key in request"}')
    server = FakeServer(lambda name, times: no if name in {"k7", "k15"} else CHALLENGE)
    async with fake_client(
        server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)
    ) as client:
        report = await client.check(keys(22))
        assert [outcome.attempts for outcome in report] == [1] * 22


@pytest.mark.virtual
async def test_a_probe_without_a_waiter_is_finished_and_the_next_call_starts() -> None:
    """Other calls wait for its end, and no longer."""
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
        with pytest.raises(GatewayError, match="is open while a probe is on the wire"):
            await client.balance(pool[2], timeout=0.5)
        probe.cancel()
        began = now()
        assert (await waiting).credits == 9406
        assert now() - began < 5  # requests on the wire are finished


@pytest.mark.virtual
async def test_a_probe_that_fails_without_an_answer_closes_the_circuit_breaker() -> None:
    """One more gateway answer opens it again."""
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


def test_a_probe_that_ends_after_the_breaker_has_closed_does_not_open_it() -> None:
    """Its answer counts like any other, and of two probes only the last one counts as a probe."""
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


def test_the_delay_between_probes_doubles_up_to_60_seconds() -> None:
    """The delay does not grow further in a longer outage.

    Requests on the wire when the circuit breaker opened, or when the row began, do not count.
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
    moment, delays = 0.5, []
    for _ in range(70):
        start = moment
        while breaker.refusal(moment) is not None:
            moment += 0.5
        delays.append(moment - start)
        request = breaker.start(moment, None)
        assert request.is_probe is True
        assert breaker.refusal(moment) is not None, "one probe at a time"
        breaker.gateway_answered(request, error, moment)
        breaker.end(request, moment)
    assert delays[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delays[-1] == 60
    moment += 60
    breaker.end(breaker.start(moment, None), moment)
    assert breaker.refusal(moment) is None, "a probe without an answer proves nothing"
    breaker.gateway_answered(breaker.start(moment, None), error, moment)
    assert breaker.refusal(moment + 59) is not None, (
        "the outage is the same, so the delay is as long as before"
    )
    breaker.api_answered()
    assert breaker.refusal(moment) is None


@pytest.mark.virtual
async def test_rate_limit_headers_of_a_gateway_are_ignored() -> None:
    """They do not state the limit of the API."""
    headers = {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60"}
    odd = Reply(status=403, body="<html>", headers=headers)
    server = FakeServer(lambda name, times: odd if name in {"k0", "k1", "k2"} else Reply())
    async with fake_client(server, retry=ONCE) as client:
        await client.check(keys(3))
        assert client.quota().limit == 300
        assert (await client.check(keys(20)[3:], timeout=20)).ok


@pytest.mark.virtual
async def test_a_gateway_answer_ends_no_cooldown() -> None:
    """A run of refusals has started the cooldown."""
    refused = Reply(status=429, body="{}", headers={"x-ratelimit-reset": "50"})
    late = Reply(seconds=1.0, status=403, body="<html>")
    server = FakeServer(lambda name, times: late if name == "k0" else refused)
    async with fake_client(server, retry=ONCE, rate_limit=RateLimit(pace=None)) as client:
        await client.check(keys(40), timeout=5)
        assert client.quota().cooldown is not None


@pytest.mark.virtual
@pytest.mark.parametrize("status", [400, 401, 404, 429])
async def test_any_json_object_of_the_api_resets_the_count_of_gateway_answers(status: int) -> None:
    """Seven gateway answers, one of the API and seven more leave the circuit breaker closed."""
    own = Reply(status=status, body='{"message": "no"}')
    server = FakeServer(lambda name, times: own if name == "k7" else CHALLENGE)
    async with fake_client(
        server, retry=ONCE, concurrency=1, rate_limit=RateLimit(pace=None)
    ) as client:
        report = await client.check(keys(15))
        assert [outcome.attempts for outcome in report] == [1] * 15


@pytest.mark.virtual
async def test_a_probe_is_one_request_not_a_whole_call() -> None:
    """While the probe's call waits for its retry, other calls find that the API answers again."""
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
async def test_the_circuit_breaker_opens_for_one_endpoint_only() -> None:
    """Requests to the other endpoint are sent as before."""
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
async def test_cancelled_refreshes_and_evictions_lose_no_call(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The cache is small and the cancellations are random.

    The library logs no error, and every call is answered once the API is back.
    """
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


async def test_the_html_page_of_a_gateway_is_retried_over_a_socket(sandbox: SandboxServer) -> None:
    """The sandbox serves the page."""
    key = sandbox.add_key("prod")
    sandbox.fail(key, Fault.CHALLENGE, times=1)
    async with CreditsClient(base_url=sandbox.url, retry=Retry(backoff=0.01)) as client:
        report = await client.check([key])
    assert (report[0].ok, report[0].attempts) == (True, 2)
