"""`CreditsClient` in virtual time: waiting, retries, many keys, closing.

Tests over sockets have their own files.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from crustcredits import (
    Account,
    APIConnectionError,
    ApiKey,
    APIStatusError,
    APITimeoutError,
    Balance,
    ClientClosedError,
    ConfigurationError,
    CreditsClient,
    InternalServerError,
    InvalidKeyError,
    Outcome,
    RateLimit,
    RateLimitError,
    RateLimitWaitError,
    Retry,
)
from crustcredits._http.transport_types import Fate
from tests import searches
from tests.virtual import FakeServer, Reply, fake_client, keys, lost, now, refusal

pytestmark = pytest.mark.virtual

KEY = ApiKey("secret-0", name="prod")
BROKEN = Reply(status=503, body="")


def worst_window(server: FakeServer, period: float = 60.0) -> int:
    times = [time for time, _ in server.arrivals]
    return max(sum(1 for time in times if first <= time < first + period) for first in times)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


# --- one key


async def test_a_balance_is_one_request() -> None:
    """The key is a `str` or an `ApiKey`."""
    server = FakeServer()
    async with fake_client(server) as client:
        assert (await client.balance(KEY)).credits == Decimal(9406)
        found = await client.balance("secret-1")
        assert type(found) is Balance
        assert found.key == ApiKey("secret-1")
        assert type(await client.account(KEY)) is Account
    assert len(server.arrivals) == 3


async def test_transient_failures_are_retried_with_backoff(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each attempt takes a token; the outcome counts the attempts, and the log names them."""
    replies = [BROKEN, lost(APIConnectionError("reset", key_name="k0")), Reply(seconds=99), Reply()]
    server = FakeServer(lambda name, times: replies[times])
    caplog.set_level(logging.INFO, "crustcredits")
    async with fake_client(server, retry=Retry(backoff=1.0)) as client:
        report = await client.check(keys(1))
        assert report[0].ok
        assert report[0].attempts == 4
        quota = client.quota()
        assert (quota.free, quota.in_flight) == (296, 0)
    assert 10 <= now() <= 10 + 1 + 2 + 4 + 1
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert (
        "k0: the API or a gateway before it failed; try again later (HTTP 503); this was attempt "
        "1 of 4" in caplog.text
    )


async def test_the_last_failure_is_the_error_after_all_attempts() -> None:
    """The error has the number of attempts."""
    server = FakeServer(lambda name, times: BROKEN)
    async with fake_client(server, retry=Retry(attempts=3)) as client:
        with pytest.raises(InternalServerError) as caught:
            await client.balance(KEY)
    assert caught.value.attempts == len(server.arrivals) == 3


async def test_an_invalid_key_is_not_retried() -> None:
    """A second attempt would change nothing."""
    server = FakeServer(
        lambda name, times: Reply(status=401, body='{"message": "Invalid API key in request"}')
    )
    async with fake_client(server) as client:
        with pytest.raises(InvalidKeyError) as caught:
            await client.balance(KEY)
    assert (caught.value.attempts, len(server.arrivals)) == (1, 1)


async def test_a_refused_key_waits_as_long_as_the_server_asks() -> None:
    """The retry adds a jitter."""
    server = FakeServer(lambda name, times: refusal(7) if times == 0 else Reply())
    async with fake_client(server) as client:
        await client.balance(KEY)
    assert 7 <= server.arrivals[1][0] <= 7.3


async def test_a_wait_beyond_wait_max_is_raised_with_its_length() -> None:
    """The error is raised at once, so that the caller can decide."""
    server = FakeServer(lambda name, times: refusal(50))
    async with fake_client(server, retry=Retry(wait_max=30.0)) as client:
        with pytest.raises(RateLimitError) as caught:
            await client.balance(KEY)
    assert caught.value.retry_after == 50
    assert now() < 1


async def test_an_unsent_request_returns_its_token_at_once() -> None:
    """The server has not counted a refused connection."""
    server = FakeServer(lambda name, times: lost(APIConnectionError("refused"), Fate.UNSENT))
    async with fake_client(server, retry=Retry(attempts=1)) as client:
        with pytest.raises(APIConnectionError):
            await client.balance(KEY)
        assert client.quota().free == 300


async def test_an_abandoned_request_returns_its_token_one_request_timeout_later() -> None:
    """The request may still arrive."""
    server = FakeServer(lambda name, times: Reply(seconds=99) if times == 0 else Reply())
    limit = RateLimit(requests=1, margin=0.0)
    async with fake_client(server, rate_limit=limit, request_timeout=10.0) as client:
        await client.balance(KEY)
    assert server.arrivals[1][0] == pytest.approx(10 + 60 + 10, abs=0.1)


async def test_an_incomplete_answer_returns_the_token_one_period_later() -> None:
    """The server has counted the request before it began to answer."""
    cut_short = lost(APIConnectionError("cut short"), Fate.ANSWERED, seconds=5.0)
    server = FakeServer(lambda name, times: cut_short if times == 0 else Reply())
    limit = RateLimit(requests=1, margin=0.0)
    async with fake_client(server, rate_limit=limit, request_timeout=10.0) as client:
        await client.balance(KEY)
    assert server.arrivals[1][0] == pytest.approx(5 + 60, abs=0.1)


# --- deadlines


async def test_a_deadline_that_the_rate_limit_cannot_meet_fails_at_once() -> None:
    """No request is sent, and the error has the wait in seconds."""
    server = FakeServer()
    async with fake_client(server, rate_limit=RateLimit(requests=1)) as client:
        await client.balance(KEY)
        with pytest.raises(RateLimitWaitError) as caught:
            await client.balance("secret-1", timeout=5)
    assert now() < 1
    assert caught.value.wait == pytest.approx(60.3, abs=0.1)
    assert caught.value.attempts == 0
    assert str(caught.value).startswith(ApiKey("secret-1").name)
    assert len(server.arrivals) == 1


async def test_a_deadline_during_a_request_is_a_timeout() -> None:
    """The caller's deadline is shorter than `request_timeout`."""
    async with fake_client(FakeServer(lambda name, times: Reply(seconds=99))) as client:
        with pytest.raises(APITimeoutError) as caught:
            await client.balance(KEY, timeout=3)
    assert now() == pytest.approx(3, abs=0.01)
    assert caught.value.attempts == 1


async def test_a_timeout_may_be_a_timedelta() -> None:
    """The same holds for `max_age`."""
    async with fake_client(FakeServer(lambda name, times: Reply(seconds=99))) as client:
        report = await client.check([KEY], timeout=timedelta(seconds=2))
        outcomes = [outcome async for outcome in client.stream([KEY], timeout=timedelta(seconds=3))]
    assert {type(outcome.error) for outcome in (*report, *outcomes)} == {APITimeoutError}
    assert now() == pytest.approx(5, abs=0.01)


async def test_a_deadline_before_the_next_attempt_ends_with_the_last_failure() -> None:
    """The failure is raised at once."""
    async with fake_client(FakeServer(lambda name, times: refusal(30))) as client:
        with pytest.raises(RateLimitError):
            await client.balance(KEY, timeout=10)
    assert now() < 1


async def test_a_retry_without_a_token_in_time_ends_with_the_last_failure() -> None:
    """The failure is more useful than a `RateLimitWaitError`."""
    server = FakeServer(lambda name, times: BROKEN)
    async with fake_client(server, rate_limit=RateLimit(requests=1)) as client:
        with pytest.raises(InternalServerError) as caught:
            await client.balance(KEY, timeout=30)
    assert caught.value.attempts == 1


async def test_a_deadline_in_the_wait_for_a_connection_slot_is_no_attempt() -> None:
    """The call takes no token."""
    server = FakeServer(lambda name, times: Reply(seconds=0.35))
    async with fake_client(server, concurrency=1) as client:
        first = asyncio.create_task(client.balance(KEY))
        await asyncio.sleep(0.1)
        with pytest.raises(RateLimitWaitError, match="deadline too short") as caught:
            await client.balance("secret-1", timeout=0.2)
        assert caught.value.wait == pytest.approx(0.2, abs=0.01)
        await first
        assert client.quota().free == 299


async def test_the_request_timeout_starts_when_the_request_is_sent() -> None:
    """Waiting for the rate limit and for a connection slot is not counted."""
    server = FakeServer(lambda name, times: Reply(seconds=0.9))
    async with fake_client(
        server, concurrency=2, request_timeout=1.0, rate_limit=RateLimit(requests=10)
    ) as client:
        report = await client.check(keys(20))
    assert report.ok
    assert {outcome.attempts for outcome in report} == {1}


async def test_no_request_is_sent_after_the_deadline_of_a_check() -> None:
    """The other keys of the pool fail, even if the rate limit has tokens."""
    server = FakeServer(lambda name, times: Reply(seconds=0.3))
    async with fake_client(server, rate_limit=RateLimit(requests=100_000, pace=None)) as client:
        report = await client.check(keys(2_000), timeout=1)
    assert max(time for time, _ in server.arrivals) < 1
    assert now() == pytest.approx(1, abs=0.01)
    assert {type(outcome.error) for outcome in report.failed} == {
        APITimeoutError,
        RateLimitWaitError,
    }
    assert len(report.succeeded) == 96


async def test_a_deadline_before_the_calls_turn_fails_at_the_deadline() -> None:
    """The call does not fail earlier, because calls ahead of it might give up."""
    async with fake_client(FakeServer(), rate_limit=RateLimit(pace=1.0)) as client:
        others = [asyncio.create_task(client.balance(key)) for key in keys(50)]
        await settle()
        with pytest.raises(RateLimitWaitError, match="deadline too short") as caught:
            await client.balance(KEY, timeout=5)
        assert now() == pytest.approx(5, abs=0.1)
        assert caught.value.wait == pytest.approx(5, abs=0.1)
        assert client.quota().seconds_for(1) == pytest.approx(45, abs=1)
        await asyncio.gather(*others)


async def test_the_wait_of_a_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """At level DEBUG."""
    caplog.set_level(logging.DEBUG, "crustcredits")
    async with fake_client(FakeServer(), rate_limit=RateLimit(requests=1)) as client:
        await client.check(keys(2))
    assert "k1: attempt sent 60.3" in caplog.text


# --- many keys


async def test_a_report_has_the_order_of_the_keys_given() -> None:
    """The callback gets each outcome as it lands."""
    server = FakeServer(
        lambda name, times: Reply(seconds=1 / (1 + int(name[1:])), credits=name[1:])
    )
    landed: list[str] = []
    async with fake_client(server, rate_limit=RateLimit(pace=None)) as client:
        report = await client.check(
            keys(10), on_outcome=lambda outcome: landed.append(outcome.key.name)
        )
    assert [outcome.key.name for outcome in report] == [f"k{number}" for number in range(10)]
    assert [outcome.credits for outcome in report] == [Decimal(number) for number in range(10)]
    assert landed == [f"k{number}" for number in reversed(range(10))]


async def test_a_secret_given_twice_is_one_request_and_two_outcomes() -> None:
    """Each outcome has its own name; the two keys may be far apart."""
    server = FakeServer()
    pool = [ApiKey("s-1", name="a"), *keys(400), ApiKey("s-1", name="b")]
    async with fake_client(server, rate_limit=RateLimit(requests=1000)) as client:
        report = await client.check(pool)
    assert len(server.arrivals) == 401
    assert (report[0].key.name, report[-1].key.name) == ("a", "b")
    assert report[0].ok
    assert report[-1].ok
    assert report.total_credits == 401 * 9406


async def test_one_bad_key_never_fails_the_others() -> None:
    """The server or the client refuses the key; the client does so before any request."""
    server = FakeServer(
        lambda name, times: Reply(status=401, body="{}") if name == "k1" else Reply()
    )
    async with fake_client(server) as client:
        report = await client.check([*keys(3), "two words", ""])
        mapped = await client.check({"prod": "secret-1", "dev": "Bearer x"}, detail=True)
    assert [outcome.ok for outcome in report] == [True, False, True, False, False]
    assert isinstance(report[3].error, ConfigurationError)
    assert report[3].key.name == "keys[3]"
    assert report[3].attempts == 0
    assert [outcome.ok for outcome in mapped] == [True, False]
    assert isinstance(mapped[0].balance, Account)
    assert "dev: the API key begins with" in str(mapped[1].error)
    assert len(server.arrivals) == 4


@pytest.mark.parametrize("lone", ["sk-secret-1", b"sk-secret-1", ApiKey("sk-secret-1"), 7])
async def test_an_argument_that_is_no_pool_is_refused_before_any_request(lone: Any) -> None:
    """`check` and `stream` refuse it when called."""
    server = FakeServer()
    async with fake_client(server) as client:
        with pytest.raises(ConfigurationError):
            await client.check(lone)
        with pytest.raises(ConfigurationError):
            client.stream(lone)
    assert not server.arrivals


async def test_a_pool_with_one_name_for_two_keys_is_refused_before_any_request() -> None:
    """Its report would be ambiguous."""
    server = FakeServer()
    async with fake_client(server) as client:
        with pytest.raises(ConfigurationError, match="two different keys"):
            await client.check({"a": "s-1"} | {"b": ApiKey("s-2", name="x")} | {"a ": "s-3"})
    assert not server.arrivals


async def test_keys_without_an_answer_in_time_fail_and_the_other_outcomes_stay() -> None:
    """Queued keys and keys on the wire have different errors at the deadline."""
    server = FakeServer(lambda name, times: Reply(seconds=99) if name in {"k0", "k7"} else Reply())
    async with fake_client(server, rate_limit=RateLimit(requests=20)) as client:
        report = await client.check(keys(500), timeout=5)
        assert now() == pytest.approx(5, abs=0.01)
        kinds = [type(outcome.error) for outcome in report]
        assert kinds.count(type(None)) == 18
        assert kinds.count(APITimeoutError) == 2
        assert kinds.count(RateLimitWaitError) == 480
        assert client.quota().in_flight == 2  # requests on the wire are finished all the same
        await asyncio.sleep(6)
        assert client.quota().in_flight == 0
    assert len(server.arrivals) == 20


async def test_the_rate_limit_holds_for_a_pool_larger_than_it() -> None:
    """1,000 keys at 300 a minute: three sliding windows, none with more than the limit."""
    draw = random.Random(1)
    server = FakeServer(lambda name, times: Reply(seconds=draw.uniform(0, 0.02)))
    async with fake_client(server) as client:
        report = await client.check(keys(1000))
    assert report.ok
    assert worst_window(server) == 300
    assert now() == pytest.approx(3 * 60.3 + 1.0, abs=0.3)
    assert server.most_on_wire <= 32


async def test_a_key_that_is_always_refused_delays_no_other() -> None:
    """The other keys are answered while its call waits."""
    server = FakeServer(lambda name, times: refusal(60) if name == "k0" else Reply())
    async with fake_client(server) as client:
        stream = client.stream(keys(200))
        async with aclosing(stream):
            for _ in range(199):
                assert (await anext(stream)).ok
            assert now() < 3
            last = await anext(stream)
    assert isinstance(last.error, RateLimitError)
    assert last.attempts == 4


@pytest.mark.parametrize("trouble", ["hang", "refused"])
async def test_64_failing_keys_at_the_front_delay_the_first_answer_by_at_most_1_s(
    trouble: str,
) -> None:
    """With default settings."""

    def script(name: str, times: int) -> Reply:
        number = int(name[1:])
        if number >= 64:
            return Reply()
        return Reply(seconds=1e6) if trouble == "hang" else refusal(1 + number * 37 % 59)

    async with (
        fake_client(FakeServer(script)) as client,
        aclosing(client.stream(keys(500))) as stream,
    ):
        async for outcome in stream:
            if outcome.ok:
                break
        assert now() <= 1.0


async def test_hanging_requests_are_bounded() -> None:
    """At most nine times `concurrency` requests are on the wire."""
    server = FakeServer(lambda name, times: Reply(seconds=1e6))
    async with fake_client(server, concurrency=4, retry=Retry(attempts=1)) as client:
        await client.check(keys(100))
    assert server.most_on_wire <= 4 * 9


async def test_refusals_of_all_keys_start_a_cooldown_of_the_endpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """If other clients spend the limit, at most 32 requests are sent before it is free again."""
    caplog.set_level(logging.INFO, "crustcredits")
    freed = 20.0
    server = FakeServer(lambda name, times: Reply() if now() >= freed else refusal(freed - now()))
    async with fake_client(server) as client:
        report = await client.check(keys(250))
    assert report.ok
    assert len([time for time, _ in server.arrivals if time < freed]) <= 32
    assert now() < 30
    assert caplog.text.count("look for other clients of the same rate limit") == 1


async def test_any_served_answer_ends_a_cooldown() -> None:
    """The window has room if the server served a 403; a gateway's failure says nothing."""
    for status, seconds in ((403, 5.0), (503, 25.0)):
        began = now()

        def script(name: str, times: int, status: int = status) -> Reply:
            return (
                refusal(1)
                if int(name[1:]) < 3 and times == 0
                else Reply(seconds=0.2, status=status, body="{}")
            )

        async with fake_client(FakeServer(script), retry=Retry(attempts=1)) as client:
            await client.check(keys(100))
        assert (now() - began < 5) is (seconds == 5.0)


async def test_scope_key_gives_each_key_its_own_quota() -> None:
    """Only the pace is shared."""
    server = FakeServer()
    limit = RateLimit(requests=1, scope="key")
    async with fake_client(server, rate_limit=limit) as client:
        report = await client.check(keys(500))
        assert now() < 6
        assert client.quota(key=keys(1)[0]).free == 0
        assert client.quota(key="another").free == 1
        with pytest.raises(ConfigurationError, match="name the key"):
            client.quota()
        with pytest.raises(ConfigurationError, match="is empty"):
            client.quota(key="")
    assert report.ok


async def test_the_endpoints_have_a_quota_each() -> None:
    """The API's limits are per endpoint."""
    async with fake_client(FakeServer()) as client:
        await client.account(KEY)
        assert client.quota(detail=True).free == 299
        assert client.quota().free == 300


async def test_a_callback_that_raises_ends_the_check() -> None:
    """The check raises the callback's exception, and no task is left over."""

    def fail(outcome: Outcome[Any]) -> None:
        raise LookupError("no such row")

    async with fake_client(FakeServer()) as client:
        with pytest.raises(LookupError):
            await client.check(keys(50), on_outcome=fail)
        await asyncio.sleep(0.1)  # requests on the wire are finished
        assert len(asyncio.all_tasks()) == 1


async def test_a_coroutine_function_is_refused_as_on_outcome() -> None:
    """It would never be awaited."""

    async def callback(outcome: Outcome[Any]) -> None: ...

    async with fake_client(FakeServer()) as client:
        for mistake in (callback, 5):
            with pytest.raises(ConfigurationError, match="use stream"):
                await client.check(keys(1), on_outcome=mistake)  # type: ignore[arg-type]  # the mistake under test


# --- streams


async def test_equal_secrets_of_a_stream_share_one_call() -> None:
    """One request, two outcomes."""
    server = FakeServer()
    async with fake_client(server) as client:
        found = [
            outcome.key.name
            async for outcome in client.stream([ApiKey("s", name="a"), ApiKey("s", name="b")])
        ]
    assert found == ["a", "b"]
    assert len(server.arrivals) == 1


async def test_an_endless_stream_yields_outcomes_as_keys_arrive() -> None:
    """The keys come from an asynchronous source."""

    async def source() -> AsyncIterator[str]:
        number = 0
        while True:
            yield f"secret-{number}" if number != 2 else "two words"
            number += 1
            await asyncio.sleep(1)

    found: list[bool] = []
    async with (
        fake_client(FakeServer()) as client,
        aclosing(client.stream(source(), detail=True)) as stream,
    ):
        async for outcome in stream:
            found.append(outcome.ok)
            if len(found) == 5:
                break
    assert found == [True, True, False, True, True]
    assert now() == pytest.approx(4, abs=0.1)


async def test_any_asynchronous_iterable_is_a_source() -> None:
    """Also an iterable that cannot be closed."""

    class Source:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> str:
            self.left -= 1
            if self.left < 0:
                raise StopAsyncIteration
            return f"secret-{self.left}"

    async with fake_client(FakeServer()) as client:
        assert len([outcome async for outcome in client.stream(Source())]) == 3


async def test_the_timeout_of_a_stream_applies_to_each_key() -> None:
    """A source may be endless, so no timeout covers the whole."""
    server = FakeServer(lambda name, times: Reply(seconds=99) if name == "k1" else Reply())
    async with fake_client(server) as client:
        outcomes = {
            outcome.key.name: outcome.error async for outcome in client.stream(keys(3), timeout=2)
        }
        with pytest.raises(
            ConfigurationError, match="timeout must be a finite number of seconds above 0"
        ):
            client.stream(keys(3), timeout=0)
    assert isinstance(outcomes["k1"], APITimeoutError)
    assert outcomes["k0"] is outcomes["k2"] is None


@pytest.mark.parametrize("is_async", [False, True])
async def test_keys_that_wait_for_their_account_delay_no_others_of_a_stream(
    is_async: bool,
) -> None:
    """Neither do keys that wait for a retry.

    Of 8,192 keys under way, 1,024 may wait for something else.
    """
    read = 0

    def source() -> Iterator[ApiKey]:
        nonlocal read
        for read in range(3_000):
            yield ApiKey(f"secret-{read}", name=f"k{read}", account="one")
        for read in range(3_000, 20_000):
            yield ApiKey(f"secret-{read}", name=f"k{read}")

    async def async_source() -> AsyncIterator[ApiKey]:
        for key in source():
            yield key

    server = FakeServer(lambda name, times: BROKEN if name == "k3000" else Reply())
    async with fake_client(
        server, rate_limit=RateLimit(requests=5, scope="account", pace=None)
    ) as client:
        stream = client.stream(async_source() if is_async else source())
        async with aclosing(stream):
            names = [(await anext(stream)).key.name for _ in range(1_000)]
        assert now() < 2
    assert sum(int(name[1:]) >= 3_000 for name in names) >= 990
    assert read < 3_000 + 8_192


@pytest.mark.timeout(120)  # the test needs this many keys, and coverage slows each down
async def test_a_stream_of_many_keys_needs_bounded_memory() -> None:
    """Each key is answered once; the peak is that of the keys under way."""
    many = 40_000 if searches.extent == "few" else 100_000
    seen = bytearray(many)

    def source() -> Iterator[str]:
        for number in range(many):
            yield f"secret-{number}"

    server = FakeServer(lambda name, times: Reply(seconds=0.001))
    server.arrivals = _Uncounted()
    server.asked = _Unasked()
    blocks: list[int] = []
    limit = RateLimit(requests=5_000, period=1.0, pace=None, scope="client")
    numbers = {ApiKey(f"secret-{number}").digest: number for number in range(many)}
    async with fake_client(
        server, rate_limit=limit, max_entries=1_000, request_timeout=1.0
    ) as client:
        count = 0
        async for outcome in client.stream(source()):
            seen[numbers[outcome.key.digest]] += 1
            count += 1
            if count % 10_000 == 0 and count < many:
                gc.collect()
                blocks.append(sys.getallocatedblocks())
    assert seen == b"\x01" * many
    assert max(blocks) - min(blocks) < 5_000


class _Uncounted(list[tuple[float, str]]):
    def append(self, item: tuple[float, str]) -> None:
        pass


class _Unasked(dict[str, int]):
    def __setitem__(self, name: str, times: int) -> None:
        pass


# --- closing and cancelling


async def test_closing_ends_calls_under_way() -> None:
    """A single call, a pool or a stream, in every kind of wait; later calls fail too."""
    server = FakeServer(lambda name, times: Reply(seconds=5) if name != "refused" else refusal(40))
    client = fake_client(server, rate_limit=RateLimit(requests=10))
    calls = [
        asyncio.create_task(client.balance(KEY)),
        asyncio.create_task(client.balance(ApiKey("s-2", name="refused"))),
        asyncio.create_task(client.check(keys(30))),
        asyncio.create_task(_last(client.stream(keys(5, "other")))),
    ]
    await asyncio.sleep(2)
    await client.close()
    assert now() == pytest.approx(2, abs=0.01)
    for call in calls:
        with pytest.raises(ClientClosedError):
            await call
    assert len(asyncio.all_tasks()) == 1
    assert client.quota().waiting == 0
    for again in (
        client.balance(KEY),
        client.check([]),
        client.__aenter__(),
        _last(client.stream(keys(1))),
    ):
        with pytest.raises(ClientClosedError):
            await again
    await client.close()


async def _last(stream: Any) -> Any:
    return [outcome async for outcome in stream][-1]


async def test_closing_waits_until_the_calls_have_ended() -> None:
    """The session is closed after them; two `close` calls at once do no harm."""
    server = FakeServer(lambda name, times: Reply(seconds=5))
    client = fake_client(server)
    call = asyncio.create_task(client.balance(KEY))
    await asyncio.sleep(1)
    await asyncio.gather(client.close(), client.close())
    assert server.on_wire == 0
    with pytest.raises(ClientClosedError):
        await call


async def test_a_cancellation_while_the_client_closes_stays_a_cancellation() -> None:
    """The client leaves no cancellation of its own on the caller's task."""
    client = fake_client(FakeServer(lambda name, times: Reply(seconds=5)))
    counts: list[int] = []

    async def caller() -> None:
        try:
            await client.balance(KEY)
        finally:
            task = asyncio.current_task()
            assert task is not None
            counts.append(task.cancelling())

    call = asyncio.create_task(caller())
    await asyncio.sleep(1)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await closing
    assert counts == [1]


async def test_closing_leaves_no_cancellation_on_the_callers_task() -> None:
    """A timeout of the caller's own still works afterwards."""
    client = fake_client(FakeServer(lambda name, times: Reply(seconds=5)))

    async def caller() -> int:
        with pytest.raises(ClientClosedError):
            await client.balance(KEY)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.sleep(5)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    call = asyncio.create_task(caller())
    await asyncio.sleep(1)
    await client.close()
    assert await call == 0


async def test_closing_ends_a_stream_that_waits_for_its_source() -> None:
    """Nothing else is under way then."""

    async def source() -> AsyncIterator[str]:
        yield "secret-1"
        await asyncio.sleep(3600)

    client = fake_client(FakeServer())
    stream = client.stream(source())
    assert (await anext(stream)).ok
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(1)
    await client.close()
    with pytest.raises(ClientClosedError):
        await waiting
    assert now() == pytest.approx(1, abs=0.1)
    assert len(asyncio.all_tasks()) == 1


async def test_keys_of_a_pool_without_a_turn_fail_at_the_deadline() -> None:
    """The other keys have their answers.

    The queued keys do not fail earlier, because a request on the wire may return its token at any
    moment.
    """
    limit = RateLimit(requests=3, scope="client", pace=None)
    async with fake_client(
        FakeServer(lambda name, times: Reply(seconds=1.0)), rate_limit=limit
    ) as client:
        report = await client.check(keys(10), timeout=1.5)
        assert now() == pytest.approx(1.5, abs=0.01)
    assert len(report.succeeded) == 3
    assert {type(outcome.error) for outcome in report.failed} == {RateLimitWaitError}
    assert "raise timeout=" in str(report.failed[0].error)


async def test_a_pool_waits_without_an_object_for_each_key() -> None:
    """A key becomes a call at its turn."""
    async with fake_client(
        FakeServer(lambda name, times: Reply(seconds=0.1)), rate_limit=RateLimit(requests=40)
    ) as client:
        pool = keys(20_000)
        before = len(gc.get_objects())
        check = asyncio.create_task(client.check(pool))
        await asyncio.sleep(0.2)
        waiting = len(gc.get_objects()) - before
        assert client.quota().waiting > 19_900
        check.cancel()
        await settle()
        assert client.quota().waiting == 0
    assert waiting < 1_000


async def test_a_caller_for_a_key_that_waits_in_a_pool_shares_its_call() -> None:
    """A single call shares it at once, another check at the turn of the first one.

    A cancelled check takes no outcome from the others.
    """
    server = FakeServer(lambda name, times: Reply(seconds=0.01))
    async with fake_client(server, rate_limit=RateLimit(pace=10.0)) as client:
        pool = keys(50)
        first = asyncio.create_task(client.check(pool))
        await settle()
        second = asyncio.create_task(client.check(pool[::-1]))
        third = asyncio.create_task(client.check(pool[20:30]))
        streamed = asyncio.create_task(_streamed(client, pool[45:]))
        await settle()
        began = now()
        balance = await client.balance(pool[40])
        assert now() - began < 1
        third.cancel()
        reports = [await first, await second]
        assert await streamed == {f"k{number}" for number in range(45, 50)}
    assert len(server.arrivals) == 50
    assert [outcome.key for outcome in reports[1]] == pool[::-1]
    assert all(report.ok for report in reports)
    assert reports[0].by_label["k40"].checked_at == balance.checked_at


async def _streamed(client: CreditsClient, pool: list[ApiKey]) -> set[str]:
    return {outcome.key.name async for outcome in client.stream(pool)}


async def test_a_check_joins_a_refresh_and_uses_answers_that_arrive_meanwhile() -> None:
    """A key that was answered since the check began is not asked about again."""
    server = FakeServer(lambda name, times: Reply(seconds=0.01))
    async with fake_client(server, rate_limit=RateLimit(pace=10.0), max_age=60) as client:
        pool = keys(30)
        check = asyncio.create_task(client.check(pool))
        await settle()
        await client.balance(pool[29])
        assert (await check).ok
        assert [name for _, name in server.arrivals].count("k29") == 1
        await asyncio.sleep(100)
        check = asyncio.create_task(client.check(pool, max_age=0))
        await settle()
        stale = await client.check(pool[:20], stale_while_revalidate=600)  # then refreshed
        assert len(stale.stale) == 20
        assert (await check).ok
        await asyncio.sleep(100)
        assert len((await client.check(pool[:20], stale_while_revalidate=600)).stale) == 20
        report = await client.check(pool[:20], max_age=0)
        assert report.ok
        assert {outcome.source for outcome in report} >= {"shared"}


async def test_a_single_call_joins_a_call_of_a_stream_that_waits_for_its_retry() -> None:
    """The wait continues, and no longer counts for the stream."""
    server = FakeServer(lambda name, times: BROKEN if times == 0 else Reply())
    async with fake_client(server, retry=Retry(backoff=5.0)) as client:
        streamed = asyncio.create_task(_streamed(client, keys(1)))
        await asyncio.sleep(0.1)
        assert (await client.balance(keys(1)[0])).credits
        assert await streamed == {"k0"}
    assert len(server.arrivals) == 2


@pytest.mark.parametrize("scope", ["client", "key"])
async def test_under_overload_every_request_sent_is_answered_in_time(
    scope: Any,
) -> None:
    """The call at its turn is then always the next to expire.

    It leaves its token to a call with more time.
    """
    server = FakeServer(lambda name, times: Reply(seconds=0.1 + int(name[1:]) % 3 / 10))
    answered, pool = [], keys(900)
    async with fake_client(
        server, rate_limit=RateLimit(scope=scope, requests=100, period=10.0, pace=10.0)
    ) as client:

        async def ask(key: ApiKey) -> None:
            with contextlib.suppress(RateLimitWaitError, APITimeoutError):
                answered.append(await client.balance(key, timeout=5))

        tasks = []
        for key in pool:
            tasks.append(asyncio.create_task(ask(key)))
            await asyncio.sleep(1 / 30)
        await asyncio.gather(*tasks)
    # The last calls have nobody behind them, and are tried.
    assert len(server.arrivals) - 2 <= len(answered) <= len(server.arrivals)
    assert len(answered) > 300


async def test_a_large_check_joins_another_a_slice_at_a_time() -> None:
    """Answers that arrive between two slices count as shared; a failure is asked again."""
    bad = {f"k{number}" for number in range(101, 500, 2)}
    server = FakeServer(lambda name, times: Reply(status=401 if name in bad else 200, seconds=0.0))
    async with fake_client(server, rate_limit=RateLimit(pace=None, requests=5_000)) as client:
        pool = keys(4_500)
        first = asyncio.create_task(client.check(pool))
        for _ in range(10):
            await asyncio.sleep(0)
        second = await client.check(pool[::-1])
        await first
    assert {outcome.key.name for outcome in second.failed} == bad
    assert {outcome.source for outcome in second} >= {"shared"}
    assert len(server.arrivals) < 5_000


@pytest.mark.parametrize("turns", range(1, 6))
async def test_closing_ends_a_large_check_between_two_slices(turns: int) -> None:
    """The check joins no more calls."""
    async with fake_client(FakeServer(), rate_limit=RateLimit(pace=1.0)) as client:
        pool = keys(1_500)
        first = asyncio.create_task(client.check(pool))
        await settle()
        second = asyncio.create_task(client.check(pool))
        for _ in range(turns):
            await asyncio.sleep(0)
        await client.close()
        for check in (first, second):
            with pytest.raises(ClientClosedError):
                await check


async def test_a_cancelled_check_takes_its_unshared_calls_with_it() -> None:
    """Another check has shared them before, and was cancelled first."""
    async with fake_client(FakeServer(), rate_limit=RateLimit(pace=1.0)) as client:
        checks = []
        for _ in range(2):
            checks.append(asyncio.create_task(client.check(keys(50))))
            await settle()
        for check in reversed(checks):
            check.cancel()
            await settle()
        assert client.quota().waiting == 0


async def test_calls_that_others_share_go_on_when_their_check_is_cancelled() -> None:
    """Also more than one slice of them."""
    server = FakeServer()
    limit = RateLimit(requests=5_000, scope="client", pace=None, period=1.0)
    async with fake_client(server, rate_limit=limit, concurrency=1) as client:
        first = asyncio.create_task(client.check(keys(1_500)))
        await settle()
        second = asyncio.create_task(client.check(keys(1_500)))
        for _ in range(5):
            await asyncio.sleep(0)
        first.cancel()
        third = asyncio.create_task(client.check(keys(3)))
        third.cancel()
        assert (await second).ok
    assert len(server.arrivals) < 1_600


async def test_two_large_checks_are_cancelled_at_once() -> None:
    """Calls that the second one shared, and that were to be queued again, are dropped."""
    async with fake_client(FakeServer(), rate_limit=RateLimit(pace=1.0)) as client:
        checks = []
        for _ in range(2):
            checks.append(asyncio.create_task(client.check(keys(1_500))))
            for _ in range(8):
                await asyncio.sleep(0)
        for check in checks:
            check.cancel()
        await settle()
        assert client.quota().waiting == 0


async def test_a_waiter_that_joins_while_a_late_call_is_refused_is_served() -> None:
    """The only waiter was cancelled in the same iteration, and another one joins."""
    server = FakeServer(lambda name, times: Reply(seconds=0.3))
    async with fake_client(server, concurrency=1, rate_limit=RateLimit(pace=None)) as client:
        pool = keys(6)
        await client.balance(pool[5])
        for delay in range(20):
            others = [asyncio.create_task(client.balance(key)) for key in pool[2:5]]
            await asyncio.sleep(0.01)
            late = asyncio.create_task(client.balance(pool[0], timeout=0.31 + delay / 100))
            await asyncio.sleep(0.29)
            late.cancel()
            joins = asyncio.create_task(client.balance(pool[0]))
            assert (await joins).credits
            await asyncio.gather(*others, late, return_exceptions=True)


async def test_a_short_timeout_is_kept_where_nothing_is_scarce() -> None:
    """With 32 slots for ten keys, all start at once."""
    server = FakeServer(lambda name, times: Reply(seconds=0.15))
    async with fake_client(server) as client:
        await client.balance(keys(1)[0])
        pool = keys(11)[1:]
        assert (await client.check(pool, timeout=0.29)).ok
        await asyncio.gather(*(client.balance(key, timeout=0.29) for key in pool))


async def test_a_quota_counts_waiting_keys_of_a_pool() -> None:
    """Keys of a declared account, and keys without one."""
    pool = [
        *keys(20),
        *(ApiKey(f"s{number}", name=f"n{number}", account="one") for number in range(5)),
    ]
    async with fake_client(FakeServer(), rate_limit=RateLimit(pace=1.0)) as client:
        check = asyncio.create_task(client.check(pool))
        await settle()
        assert client.quota(key=pool[10]).waiting == 1
        assert client.quota(key=pool[-1]).waiting == 5
        assert client.quota(key="another").waiting == 0
        check.cancel()
        await settle()


async def test_a_finished_check_is_freed() -> None:
    """Its keys and outcomes are freed, also without further calls."""
    pool = keys(20)
    # The cache holds the first name of a secret, and only the check its second one.
    second_name = ApiKey(pool[0].get_secret_value(), name="second")
    async with fake_client(FakeServer()) as client:
        report = await client.check([*pool, second_name])
        kept: list[weakref.ref[Any]] = [weakref.ref(report), weakref.ref(second_name)]
        del report, second_name
        gc.collect()
        assert [each() for each in kept] == [None, None]


async def test_many_deadlines_at_one_moment_all_expire() -> None:
    """Each call has its own error."""
    async with fake_client(FakeServer(lambda name, times: Reply(seconds=99))) as client:
        found = await asyncio.gather(
            *(client.balance(key, timeout=1) for key in keys(1_500)), return_exceptions=True
        )
    assert {type(error) for error in found} <= {RateLimitWaitError, APITimeoutError}
    assert now() < 2


async def test_keys_of_a_pool_that_certainly_miss_the_deadline_fail_at_once() -> None:
    """The other keys are answered."""
    async with fake_client(
        FakeServer(), rate_limit=RateLimit(requests=2, scope="account", pace=None)
    ) as client:
        pool = [ApiKey(f"s{number}", name=f"k{number}", account="one") for number in range(3)]
        await client.check(pool[:2])
        await asyncio.sleep(1)
        began = now()
        report = await client.check([*pool, *keys(1500)], timeout=20)
        assert now() - began < 1
    assert [outcome.key.name for outcome in report.failed] == ["k0", "k1", "k2"]
    assert {type(outcome.error) for outcome in report.failed} == {RateLimitWaitError}


async def test_cancelling_a_check_leaves_no_task_and_returns_every_token() -> None:
    """This holds at any moment; requests on the wire are finished."""
    for moment in range(0, 200, 7):
        server = FakeServer(
            lambda name, times: BROKEN if times == 0 and name == "k3" else Reply(seconds=0.5)
        )
        async with fake_client(
            server, rate_limit=RateLimit(requests=40, period=5.0), request_timeout=1.0
        ) as client:
            check = asyncio.create_task(client.check(keys(100)))
            await asyncio.sleep(moment / 20)
            check.cancel()
            with pytest.raises(asyncio.CancelledError):
                await check
            await settle()
            assert len(asyncio.all_tasks()) == 1 + server.on_wire
            quota = client.quota()
            assert (quota.in_flight, quota.waiting) == (server.on_wire, 0)
            # A gateway may forward a request that it has answered with a 503, within the timeout of
            # a request.
            await asyncio.sleep(0.5 + 5 * 1.005 + 1.0 + 0.001)
            assert len(asyncio.all_tasks()) == 1
            assert client.quota().free == 40


async def test_cancelling_one_call_affects_no_other() -> None:
    """A cancelled call raises its cancellation, not an error of the library."""
    async with fake_client(FakeServer(lambda name, times: Reply(seconds=1))) as client:
        one, other = (asyncio.create_task(client.balance(key)) for key in keys(2))
        await asyncio.sleep(0.5)
        one.cancel()
        with pytest.raises(asyncio.CancelledError):
            await one
        assert (await other).credits


@pytest.mark.own_loops
def test_a_client_is_refused_on_a_second_loop() -> None:
    """The error names the remedy."""
    client = fake_client(FakeServer())
    asyncio.run(client.balance(KEY))
    with pytest.raises(ConfigurationError, match="make one client for each loop"):
        asyncio.run(client.balance(KEY))


def test_making_a_client_needs_no_loop() -> None:
    """It does no I/O."""
    with pytest.raises(ConfigurationError, match="no event loop runs here"):
        CreditsClient().quota()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1"),
        ({"request_timeout": 0}, "request_timeout must be a finite number of seconds above 0"),
        ({"base_url": "http://example.com"}, "base_url is plain http"),
        ({"proxy": 5}, "proxy is not an http"),
        ({"rate_limit": 5}, "rate_limit must be a RateLimit, not an int"),
        (
            {"backend": "redis://:hunter2@localhost"},
            "backend is a str, which cannot count tokens; pass a RedisBackend$",
        ),
        ({"backend": Retry}, "backend is the class Retry"),
        ({"retry": None}, "retry must be a Retry, not None"),
        ({"session": "x"}, "session must be an aiohttp.ClientSession, not a str"),
        ({"request_timeout": 10**400}, "request_timeout must be a finite number"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(options: dict[str, Any], said: str) -> None:
    """The client is refused when it is made."""
    with pytest.raises(ConfigurationError, match=said):
        CreditsClient(**options)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True])
async def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    """Any other value is refused before any request."""
    server = FakeServer()
    async with fake_client(server) as client:
        for call in (client.balance(KEY, timeout=timeout), client.check([KEY], timeout=timeout)):
            with pytest.raises(ConfigurationError, match="timeout must be a finite number"):
                await call
    assert not server.arrivals


# --- transient failures


@pytest.mark.parametrize("fate", [Fate.UNSENT, Fate.ABANDONED])
async def test_an_outage_of_three_seconds_is_survived_by_default(fate: Fate) -> None:
    """An outage of the network or of name resolution, with any jitter, if the call has the time."""
    gone = lost(APIConnectionError("could not connect"), fate)
    for seed in range(200):
        random.seed(seed)
        began = now()
        server = FakeServer(lambda name, times, began=began: gone if now() < began + 3 else Reply())  # type: ignore[misc]
        async with fake_client(server) as client:
            assert (await client.balance(KEY, timeout=20)).credits == 9406
            assert len(server.arrivals) <= 4


async def test_all_attempts_fit_into_a_deadline_of_three_seconds() -> None:
    """The fourth attempt is not delayed beyond it."""
    for seed in range(50):
        random.seed(seed)
        server = FakeServer(
            lambda name, times: lost(APIConnectionError("could not connect"), Fate.UNSENT)
        )
        async with fake_client(server) as client:
            with pytest.raises(APIConnectionError) as caught:
                await client.balance(KEY, timeout=3)
            assert caught.value.attempts == len(server.arrivals) == 4


@pytest.mark.parametrize("status", [408, 425])
async def test_statuses_408_and_425_are_retried(status: int) -> None:
    """Other statuses of that kind are not."""
    server = FakeServer(
        lambda name, times: Reply(status=status, body="{}") if times == 0 else Reply()
    )
    async with fake_client(server) as client:
        assert (await client.balance(KEY)).credits == 9406
    server = FakeServer(lambda name, times: Reply(status=404, body="{}"))
    async with fake_client(server) as client:
        with pytest.raises(APIStatusError):
            await client.balance(KEY)
    assert len(server.arrivals) == 1


async def test_a_503_with_retry_after_is_retried_after_that_time() -> None:
    """The window's reset does not count."""
    headers = {"Retry-After": "7", "x-ratelimit-reset": "60"}
    server = FakeServer(
        lambda name, times: Reply(status=503, body="", headers=headers) if times == 0 else Reply()
    )
    async with fake_client(server) as client:
        await client.balance(KEY)
    (first, _), (second, _) = server.arrivals
    assert 7 <= second - first < 7.5


async def test_a_retry_after_of_an_hour_is_raised_at_once() -> None:
    """The error has the whole hour, not the length of the window."""
    server = FakeServer(
        lambda name, times: Reply(
            status=429, body="{}", headers={"Retry-After": "3600", "x-ratelimit-reset": "9"}
        )
    )
    async with fake_client(server) as client:
        with pytest.raises(RateLimitError) as caught:
            await client.balance(KEY)
        assert now() < 1
    assert (caught.value.retry_after, caught.value.attempts) == (3600, 1)


async def test_long_waits_of_three_accounts_delay_no_other_by_more_than_a_period() -> None:
    """After one period every token is back."""
    refused = Reply(status=429, body="{}", headers={"Retry-After": "3600"})
    server = FakeServer(lambda name, times: refused if name in {"k0", "k1", "k2"} else Reply())
    async with fake_client(server, rate_limit=RateLimit(pace=None)) as client:
        await client.check(keys(3))
        await client.balance(keys(4)[3], timeout=70)
        assert now() < 62


async def test_one_answer_with_a_limit_of_1_delays_no_other_account() -> None:
    """The limit may be the key's own, or wrong."""
    odd = {"x-ratelimit-limit": "1", "x-ratelimit-remaining": "0", "x-ratelimit-reset": "60"}
    usual = {"x-ratelimit-limit": "300", "x-ratelimit-remaining": "250", "x-ratelimit-reset": "60"}
    server = FakeServer(lambda name, times: Reply(headers=odd if name == "k0" else usual))
    async with fake_client(server) as client:
        await client.balance(keys(1)[0])
        report = await client.check(keys(100)[1:], timeout=20)
        assert report.ok
        assert now() < 5


class Awaits:
    async def __call__(self, outcome: object) -> None: ...

    async def method(self, outcome: object) -> None: ...


class Yields:
    async def __call__(self, outcome: object) -> AsyncIterator[None]:
        yield


@pytest.mark.parametrize(
    "function",
    [Awaits(), Awaits().method, partial(Awaits().method), partial(Awaits()), Yields(), 7],
)
async def test_every_kind_of_coroutine_function_is_refused_as_on_outcome(function: Any) -> None:
    """None of them would be awaited."""
    server = FakeServer()
    async with fake_client(server) as client:
        with pytest.raises(ConfigurationError, match="on_outcome must be a plain function"):
            await client.check([KEY], on_outcome=function)
    assert server.arrivals == []


async def test_a_callable_object_is_accepted_as_on_outcome() -> None:
    """A partial of one is accepted too."""
    seen: list[Any] = []

    class Notes:
        def __call__(self, outcome: object) -> None:
            seen.append(outcome)

    async with fake_client(FakeServer()) as client:
        await client.check([KEY], on_outcome=Notes())
        await client.check([KEY], on_outcome=partial(Notes()))
    assert len(seen) == 2


async def test_the_log_mentions_cached_balances_only_if_there_are_any(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither a call without callers nor an API that is down mentions them otherwise."""
    server = FakeServer(lambda name, times: Reply(seconds=1.0, status=503, body=""))
    async with fake_client(server, retry=Retry(attempts=1)) as client:
        callers = [asyncio.create_task(client.balance(key)) for key in keys(5)]
        await asyncio.sleep(0.5)
        for caller in callers:
            caller.cancel()
        await asyncio.sleep(2)
        assert "one refresh" not in caplog.text
        assert "no balance from the API for 3 keys in a row; last failure: k" in caplog.text


async def test_a_failed_refresh_of_a_cached_balance_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No caller sees the error of the refresh."""
    server = FakeServer(lambda name, times: Reply(status=503, body="") if times else Reply())
    async with fake_client(server, retry=Retry(attempts=1), stale_while_revalidate=60) as client:
        for _ in range(2):
            await client.check(keys(5))
            await asyncio.sleep(20)
        assert "cached balance not refreshed" in caplog.text
        assert (
            "for 3 keys in a row; one refresh at a time tests whether it answers; last failure: "
            in caplog.text
        )
