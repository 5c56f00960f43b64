"""Shared tokens under failures at the worst moment: clocks, late messages, crowds, waiting order.

In virtual time, with the real script over a model of Redis.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from crustcredits import ApiKey, BackendUnavailableError, RateLimit, RateLimitWaitError
from crustcredits.redis.coordinator import PAUSE
from crustcredits.redis.local_tokens import FRESH
from tests.redis.lua import EPOCH, FakeRedis, between, connected, opened
from tests.redis.processes import (
    LEASE,
    PATH,
    PERIOD,
    Start,
    Waiting,
    Worker,
    passes,
    vanish,
    worker,
)
from tests.virtual import FakeServer, Reply, WindowServer, fake_client, keys, now

pytestmark = pytest.mark.virtual

# Most seconds until the next message of any process.
SOON = 0.6


async def spend(one: Worker, count: int) -> None:
    """Send `count` attempts that are answered at once."""
    for _ in range(count):
        await one.send()
        one.end()


# --- clocks


@pytest.mark.parametrize("step", [3600.0, 5.0, -5.0, -3600.0])
async def test_a_clock_that_was_set_is_noticed(
    redis: FakeRedis, start: Start, step: float, caplog: pytest.LogCaptureFixture
) -> None:
    """No token returns earlier, and hardly any later."""
    one, two = start(limit=5), start(limit=5)
    await spend(one, 2)
    await spend(two, 1)
    await passes(20)
    tasks = [two.waits() for _ in range(2)]
    redis.clock = lambda: EPOCH + step + now()
    await passes(20.9)
    tasks += [two.waits() for _ in range(3)]
    await passes(59)
    assert redis.out() == 5
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 3
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(60, abs=0.35)
    assert "or its clock jumped" in caplog.text


async def test_a_new_process_notices_a_clock_that_was_set_back(
    redis: FakeRedis, start: Start
) -> None:
    """Tokens of vanished processes are out for at most a lease."""
    one = start(limit=3)
    await spend(one, 2)
    await asyncio.sleep(1)
    one.vanish()
    redis.clock = lambda: EPOCH - 3600 + now()
    two = start(limit=3)
    await asyncio.gather(*(two.send() for _ in range(3)))
    assert now() < LEASE


@pytest.mark.parametrize("clock", [1.00001, 0.99999])
async def test_clocks_with_different_rates_cause_no_false_alarm(
    redis: FakeRedis, start: Start, clock: float
) -> None:
    """Even after most of a day without a message."""
    redis.clock = lambda: EPOCH + clock * now()
    one = start(limit=3, fallback_share=1)
    await spend(one, 3)
    await passes(80_000)
    began = now()
    await spend(one, 3)
    assert now() - began < 0.1


# --- late messages


async def test_a_message_read_long_after_it_was_sent_grants_no_token(
    start: Start, redis: FakeRedis
) -> None:
    """All were in degraded mode, so none gets a token before the others have registered."""
    one, two = start(limit=10, fallback_share=1 / 2), start(limit=10, fallback_share=1 / 2)
    await spend(one, 5)
    await spend(two, 5)
    await passes(30)
    redis.stall()
    await passes(60)
    tasks = [one.waits() for _ in range(5)]
    await passes(64)
    redis.resume(late=True)
    tasks += [two.waits() for _ in range(10)]
    await passes(75)
    assert sum(task.done() for task in tasks) <= 10
    for task in tasks:
        task.cancel()


async def test_tokens_put_back_during_their_registration_are_given_back(
    start: Start, redis: FakeRedis
) -> None:
    """The attempts turn out not to count before the answer to the registration arrives."""
    redis.latency = lambda process: 0.2
    one = start(limit=4, fallback_share=1)
    redis.down = True
    for _ in range(3):
        await one.send()
    redis.down = False
    await asyncio.sleep(1.15)  # a message has arrived, its answer has not
    assert redis.out() == 3
    for _ in range(3):
        one.bucket.put_back()
    await asyncio.sleep(2)
    assert redis.out() == 0


async def test_token_numbers_continue_in_a_new_bucket(redis: FakeRedis, start: Start) -> None:
    """So a message that is read late cannot refer to later tokens."""
    one = start(limit=5)
    await spend(one, 3)
    await passes(70)
    assert one.is_idle()
    fresh = Waiting(one.backend.tokens(PATH, None, 5))
    redis.seen = []
    await fresh.acquire()
    ((_, first, _),) = redis.seen[0].buckets[0].permits
    assert first >= 3


async def test_reports_queued_during_a_failed_exchange_are_sent_with_the_next(
    redis: FakeRedis, start: Start
) -> None:
    """Also of another bucket, and in addition to the tokens of the failed message."""
    one = start(limit=5)
    other = Waiting(one.backend.tokens("/account/credits", None, 5))
    await one.send()
    await other.acquire()
    await one.acquire()
    one.unused()
    redis.down = True
    redis.latency = lambda process: 0.2
    task = one.waits()
    await asyncio.sleep(0.1)
    other.unused()
    await asyncio.sleep(0.3)
    redis.down = False
    await task
    await asyncio.sleep(1)
    assert redis.out() == 2


async def test_a_token_without_a_waiter_is_given_back(redis: FakeRedis, start: Start) -> None:
    """Its waiter was cancelled while the message was under way."""
    redis.latency = lambda process: 0.05
    one = start(limit=4)
    tasks = [one.waits() for _ in range(3)]
    await asyncio.sleep(0.01)
    tasks[0].cancel()
    await asyncio.sleep(0.12)
    assert redis.out() == 3
    await asyncio.sleep(FRESH + SOON)
    assert redis.out() == 2


async def test_messages_are_few_while_no_tokens_are_granted(redis: FakeRedis, start: Start) -> None:
    """After a loss of the count."""
    one = start(limit=4)
    redis.flush()
    task = one.waits()
    await asyncio.sleep(1.2)
    assert redis.messages <= 5
    assert not task.done()
    task.cancel()


async def test_a_token_that_expired_during_an_outage_is_given_back(
    redis: FakeRedis, start: Start
) -> None:
    """It is free after the outage, and not only after its lease."""
    one = start(limit=4)
    await one.acquire()
    redis.down = True
    await asyncio.sleep(4)
    assert one.bucket.is_degraded
    assert not one.is_idle()
    redis.down = False
    await asyncio.sleep(2)
    assert redis.out() == 0
    assert one.is_idle()


async def test_a_bucket_with_a_queued_report_is_not_forgotten(
    redis: FakeRedis, start: Start
) -> None:
    """The report would be lost with it."""
    one = start(limit=4, on_outage="raise")
    await one.acquire()
    one.unused()
    assert not one.is_idle()
    await asyncio.sleep(0.3)
    assert one.is_idle()
    await one.send()
    redis.down = True
    await asyncio.sleep(0.2)
    one.end()
    await asyncio.sleep(PERIOD + 1)
    assert not one.is_idle()
    redis.down = False
    await asyncio.sleep(1)
    assert one.is_idle()


async def test_a_lost_answer_costs_half_a_second(redis: FakeRedis, start: Start) -> None:
    """Other processes wait for nothing, since they were answered."""
    one, two = start(limit=4), start(limit=4)
    await passes(10)
    redis.lose_answers = 1
    await one.send()
    assert now() == pytest.approx(10.5, abs=0.02)
    began = now()
    await two.send()
    assert now() - began < 0.02


async def test_a_report_does_not_delay_a_request_for_tokens(start: Start) -> None:
    """An attempt ends while a call waits for the message that is due."""
    one = start(limit=4)
    await one.send()
    began = now()
    task = one.waits()
    await asyncio.sleep(0)
    one.end()
    await task
    assert now() - began < 0.02


async def test_tokens_are_registered_at_once_when_a_loss_is_noticed(
    redis: FakeRedis, start: Start
) -> None:
    """The next message follows at once."""
    one = start(limit=4)
    await spend(one, 3)
    await asyncio.sleep(1)
    redis.flush()
    redis.seen = []
    await asyncio.sleep(1)
    noticed, told = (message.at for message in redis.seen[:2])
    assert told - noticed < 0.02
    assert redis.out() == 3


# --- a Redis that works by half


@pytest.mark.parametrize("each", [2, 3, 5])
@pytest.mark.parametrize("on_outage", ["local", "strict", "raise"])
async def test_calls_proceed_although_answers_are_lost(
    redis: FakeRedis, start: Start, each: int, on_outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each second answer, for example. One line of the log says why calls take longer."""
    one = start(limit=300, on_outage=on_outage, fallback_share=1 / 2)
    await one.send()
    redis.lose_each = each
    began = now()
    for _ in range(40):
        await one.send()
        one.end()
        await asyncio.sleep(0.1)
    assert now() - began < 4 + 40 * 0.6
    redis.lose_each = 0
    (line,) = {record.message for record in caplog.records}
    assert "so calls wait longer; last cause: ConnectionError: Conn" in line


async def test_a_failure_lasts_until_a_message_that_asks_is_answered(
    redis: FakeRedis,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where only messages that ask are lost, the others do not end the outage."""
    one = start(limit=20, fallback_share=1 / 2)
    for _ in range(10):
        await one.send()
        one.end()
    await passes(58)
    works, evalsha = False, redis.evalsha

    async def answers(*said: Any) -> object:
        answer = await evalsha(*said)
        if answer[-1] and not works:
            raise RedisConnectionError("reset")
        return answer

    monkeypatch.setattr(redis, "evalsha", answers)
    tasks = [one.waits() for _ in range(8)]
    await passes(66)
    assert all(task.done() for task in tasks)
    assert one.bucket.is_degraded
    assert [record.message[:23] for record in caplog.records] == ["Redis is out of reach ("]
    works = True
    await asyncio.sleep(3)
    assert not one.bucket.is_degraded


# --- crowds


async def test_no_token_is_granted_while_a_process_still_registers() -> None:
    """It has thousands of buckets, and a message holds only a few."""
    redis = opened(latency=between(0.03, 0.03))
    one, two = worker(redis, name="one"), worker(redis, name="two")
    accounts = [f"account {number}" for number in range(3000)]

    def bucket(process: Worker, account: str) -> Waiting:
        return Waiting(process.backend.tokens(PATH, account, 1))

    spent = [bucket(one, account) for account in accounts]
    for first in range(0, len(spent), 200):
        await asyncio.gather(*(each.send() for each in spent[first : first + 200]))
    for each in spent:
        each.tokens.return_at(now() + PERIOD)
    await asyncio.sleep(2)
    redis.flush()
    tasks = [asyncio.create_task(bucket(two, account).send()) for account in accounts[::50]]
    await asyncio.sleep(8)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    for process in (one, two):
        vanish(process.backend)


async def test_a_long_outage_leaves_few_tokens_to_give_back(redis: FakeRedis, start: Start) -> None:
    """Only those of the first failed message, for any number of waiters."""
    one = start(limit=50, on_outage="raise")
    await one.send()
    redis.down = True
    for _ in range(20):
        await asyncio.gather(*(one.waits() for _ in range(50)), return_exceptions=True)
    redis.seen = []
    redis.down = False
    await one.send()
    assert sum(len(asked.returned) for message in redis.seen for asked in message.buckets) <= 40


async def test_thousands_of_waiting_calls_end_a_slice_at_a_time(redis: FakeRedis) -> None:
    """Each with the error of the outage."""
    backend = connected(redis, on_outage="raise")
    limit = RateLimit(requests=5, scope="client")
    async with fake_client(FakeServer(), rate_limit=limit, backend=backend) as client:
        check = asyncio.create_task(client.check(keys(2_500)))
        await asyncio.sleep(1)
        redis.down = True
        report = await check
    errors = [type(outcome.error) for outcome in report.failed]
    assert len(errors) >= 2_490
    assert set(errors) == {BackendUnavailableError}


# --- waiting order


async def test_a_waiter_that_cannot_be_served_does_not_block_others(start: Start) -> None:
    """A background refresh leaves a tenth of the tokens unused; other calls do not."""
    one, two = start(limit=10), start(limit=10)
    for _ in range(9):
        await two.send()
    one.waiting.kept = 1
    waits = one.waits()
    await asyncio.sleep(1)
    began = now()
    await two.send()
    assert now() - began < 0.1
    assert not waits.done()
    waits.cancel()


# --- degraded mode


@pytest.mark.parametrize("before", [True, False])
async def test_a_late_attempt_of_degraded_mode_is_registered_with_a_whole_lease(
    redis: FakeRedis, start: Start, before: bool
) -> None:
    """Its lease starts with the attempt, with or without earlier tokens of Redis."""
    one, two = start(limit=4, fallback_share=1 / 2), start(limit=4, fallback_share=1 / 2)
    redis.down = not before
    await one.holds(2)
    redis.down = True
    await asyncio.sleep(95)
    assert [one.start(), one.start()] == [True, True]
    redis.down = False
    await asyncio.sleep(2)
    tasks = [two.waits() for _ in range(4)]
    await asyncio.sleep(5)
    assert redis.out() == 4
    assert sum(task.done() for task in tasks) == 2
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("seed", [1, 2])
async def test_an_outage_never_exceeds_the_limit(seed: int) -> None:
    """Foreign requests in the headers are those of the other processes, each within its share."""
    redis = opened(latency=between(0.0, 0.005, seed))
    server = WindowServer(limit=40, period=20.0, seconds=(0.0, 0.05), seed=seed)
    limit = RateLimit(requests=40, period=20.0, scope="client", pace=None)
    clients = [
        fake_client(
            server,
            request_timeout=2.0,
            rate_limit=limit,
            backend=connected(redis, fallback_share=1 / 4),
        )
        for _ in range(4)
    ]
    checks = [
        asyncio.create_task(client.check(keys(100, str(place))))
        for place, client in enumerate(clients)
    ]
    await asyncio.sleep(13)
    redis.down = True
    await asyncio.sleep(100)
    assert {client.quota().degraded for client in clients} == {True}
    redis.down = False
    assert all(report.ok for report in await asyncio.gather(*checks))
    assert (len(server.refused), server.worst_window()) == (0, 40)
    assert not clients[0].quota().degraded
    for client in clients:
        await client.close()


async def test_closing_at_the_start_of_degraded_mode_leaves_no_timer(
    redis: FakeRedis, start: Start
) -> None:
    """The last message fails during the close."""
    one = start(limit=4)
    redis.stall()
    task = one.waits()
    await asyncio.sleep(2.5)
    task.cancel()
    await one.close()
    assert one.bucket.is_degraded


async def test_a_slow_pace_resumes_without_a_gap_after_an_outage(redis: FakeRedis) -> None:
    """Its own tokens have expired by then, which costs only a moment."""
    server = WindowServer(limit=300)
    limit = RateLimit(scope="client", pace=1.0)
    async with fake_client(server, rate_limit=limit, backend=connected(redis)) as client:
        redis.down = True
        tasks = [asyncio.create_task(client.balance(key)) for key in keys(75)]
        await asyncio.sleep(90)
        assert 8 <= len(server.served) <= 12
        redis.down = False
        await asyncio.gather(*tasks)
        assert now() < 170


async def test_available_tokens_in_degraded_mode_are_the_share(
    redis: FakeRedis, start: Start
) -> None:
    """The estimate of their return has the same size."""
    one = start(limit=16)
    redis.down = True
    await one.acquire()
    one.unused()
    assert now() == pytest.approx(LEASE, abs=0.1)
    assert (one.bucket.available(now()), len(one.bucket.returns(now(), PERIOD))) == (4, 4)


async def test_background_calls_leave_a_tenth_of_the_share(redis: FakeRedis, start: Start) -> None:
    """As they leave a tenth of the limit otherwise."""
    one = start(limit=40)
    redis.down = True
    await one.send()
    one.waiting.kept = 4
    tasks = [one.waits() for _ in range(9)]
    await asyncio.sleep(50)
    assert sum(task.done() for task in tasks) == 8
    for task in tasks:
        task.cancel()


async def test_degraded_mode_uses_no_more_than_the_share_of_earlier_tokens(
    redis: FakeRedis, start: Start
) -> None:
    """Other processes may have used theirs.

    Tokens granted by Redis have expired when degraded mode starts.
    """
    one = start(limit=8)
    await spend(one, 4)
    await one.holds(4)
    redis.down = True
    await asyncio.sleep(4)
    assert one.bucket.is_degraded
    assert not one.start()
    await passes(PERIOD + 1)
    assert [one.start() for _ in range(4)] == [True, True, False, False]


async def test_a_second_outage_starts_from_the_beginning(redis: FakeRedis, start: Start) -> None:
    """Other processes may have used the rest again."""
    one = start(limit=8)
    await spend(one, 1)
    redis.down = True
    await asyncio.sleep(10)
    redis.down = False
    await asyncio.sleep(60)
    redis.down = True
    began = now()
    tasks = [one.waits() for _ in range(2)]
    await passes(began + LEASE - 0.1)
    assert not any(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(began + LEASE, abs=0.6)


async def test_the_quota_in_degraded_mode_is_the_share(redis: FakeRedis, start: Start) -> None:
    """Its own tokens return first, the others later."""
    one = start(limit=16)
    await spend(one, 2)
    await passes(30)
    redis.down = True
    await passes(40)
    assert [round(when - now()) for when in one.bucket.returns(now(), PERIOD)] == [20, 20, 71, 71]


# --- knowledge of other processes


async def test_calls_without_a_token_in_time_fail_at_their_deadline(
    redis: FakeRedis,
) -> None:
    """Not earlier: another process may give back a token at any moment."""
    server = WindowServer(limit=5)
    limit = RateLimit(requests=5, scope="client", pace=None)
    async with (
        fake_client(server, rate_limit=limit, backend=connected(redis)) as one,
        fake_client(server, rate_limit=limit, backend=connected(redis)) as two,
    ):
        await one.check(keys(5))
        began = now()
        for _ in range(2):
            refused = await two.check(keys(3, "late"), timeout=10)
            for outcome in refused:
                assert isinstance(outcome.error, RateLimitWaitError)
                assert outcome.error.wait == pytest.approx(10, abs=1)
        assert now() - began == pytest.approx(20, abs=0.1)


async def test_a_quota_shows_the_tokens_out_and_their_return(redis: FakeRedis) -> None:
    """Those of this process, and those of other processes as of the last answer.

    The latter expire by themselves.
    """
    server = WindowServer(limit=30)
    limit = RateLimit(requests=30, scope="client", pace=None)
    async with (
        fake_client(server, rate_limit=limit, backend=connected(redis)) as one,
        fake_client(server, rate_limit=limit, backend=connected(redis)) as two,
    ):
        await one.check(keys(20))
        await asyncio.sleep(1)
        await two.check(keys(4))
        assert (one.quota().free, two.quota().free) == (10, 6)
        assert one.quota().seconds_for(10) == 0
        assert one.quota().seconds_for(11) == pytest.approx(59.3, abs=0.3)
        assert two.quota().seconds_for(6) == 0
        assert 58 < two.quota().seconds_for(7) < 60.5
        await asyncio.sleep(65)
        for client in (one, two):
            assert (client.quota().free, client.quota().seconds_for(30)) == (30, 0)


# --- forgotten accounts


async def test_an_account_without_waiters_is_forgotten(redis: FakeRedis) -> None:
    """After its tokens were given back."""
    limit = RateLimit(scope="key", pace=None)
    redis.latency = lambda process: 0.005
    async with fake_client(FakeServer(), rate_limit=limit, backend=connected(redis)) as client:
        for number in range(30):
            task = asyncio.create_task(client.balance(keys(1, f"given-up-{number}")[0]))
            await asyncio.sleep(0.007)
            task.cancel()
            await client.balance(keys(1, f"meanwhile-{number}")[0])
        for number in range(10):
            await client.balance(keys(1, f"later-{number}")[0])
            await asyncio.sleep(10)
        assert len(client._dispatcher.endpoints[PATH].scheduler.permits.accounts) < 10


async def test_degraded_mode_starts_despite_a_forgotten_account(
    redis: FakeRedis,
) -> None:
    """The process continues with its share."""
    limit = RateLimit(scope="account", pace=None)
    backend = connected(redis)
    async with fake_client(
        FakeServer(lambda name, times: Reply(seconds=1.0)), rate_limit=limit, backend=backend
    ) as client:
        given_up, other, later = keys(3)
        task = asyncio.create_task(client.balance(other))
        await asyncio.sleep(0.3)
        redis.down = True
        await asyncio.sleep(0.5)
        with pytest.raises(RateLimitWaitError):
            await client.balance(given_up, timeout=0.1)
        await task
        waiting = asyncio.create_task(client.balance(later))
        await asyncio.sleep(5)
        assert client.quota(key=later).degraded
        redis.down = False
        await waiting
    assert not redis.faults


@pytest.mark.parametrize("scope", ["account", "auto"])
async def test_accounts_whose_tokens_returned_before_they_were_registered_stop_nobody(
    redis: FakeRedis, scope: Literal["account", "auto"]
) -> None:
    """A process has hundreds of accounts to register after a loss of the count."""
    redis.latency = lambda process: 0.05
    limit = RateLimit(requests=300, scope=scope, pace=None)
    one, two = (
        fake_client(FakeServer(), rate_limit=limit, backend=connected(redis)) for _ in range(2)
    )
    calls = []
    for key in keys(240):
        calls.append(asyncio.create_task(one.balance(key)))
        await asyncio.sleep(0.25)
    await asyncio.sleep(2)
    redis.flush()
    for key in keys(40, "later"):
        calls.append(asyncio.create_task(one.balance(key)))
        await asyncio.sleep(0.25)
    began = now()
    await two.balance(keys(1, "of-two")[0])
    assert now() - began < 1
    await asyncio.gather(*calls)
    for client in (one, two):
        await client.close()


@pytest.mark.parametrize("pause", [0.1, 7200.0])
async def test_a_process_tells_of_an_outage_at_once(
    redis: FakeRedis, start: Start, pause: float
) -> None:
    """Its next call, however late, stops no other process."""
    one, two = start(limit=10), start(limit=10)
    await one.send()
    redis.down = True
    await asyncio.sleep(5)
    redis.down = False
    await asyncio.sleep(PAUSE + 1 + pause)
    for each in (one, two):
        began = now()
        await each.send()
        assert now() - began < 0.1


async def test_a_process_with_a_bad_network_stops_no_other_process(
    redis: FakeRedis, start: Start
) -> None:
    """Redis has the messages of the others meanwhile, so none of them counts by itself."""
    one, two = start(limit=1000, period=5.0), start(limit=1000, period=5.0)
    waits = []
    await one.send()
    for step in range(360):
        redis.cut = {one.name} if step > 60 and step % 30 < 20 else set()
        began = now()
        await two.send()
        two.end()
        waits.append(now() - began)
        await asyncio.sleep(0.1)
    redis.cut = set()
    assert max(waits) < 0.1


async def test_after_an_outage_of_all_processes_none_is_served_before_each_has_registered(
    redis: FakeRedis, start: Start
) -> None:
    """One of them may have counted by itself."""
    one, two = start(limit=4, fallback_share=1 / 2), start(limit=4, fallback_share=1 / 2)
    for each in (one, two):
        await each.send()
        each.end()
    await passes(58)
    redis.down = True
    await passes(62)
    tasks = [each.waits() for each in (one, two) for _ in range(4)]
    await asyncio.sleep(0.1)
    assert sum(task.done() for task in tasks) == 2  # with the tokens that have returned
    redis.down = False
    await asyncio.sleep(PAUSE - 0.1)
    assert sum(task.done() for task in tasks) == 2
    await asyncio.sleep(1)
    assert sum(task.done() for task in tasks) == 4
    for task in tasks:
        task.cancel()


@pytest.mark.parametrize("seconds", [4.0, LEASE + 5])
async def test_a_process_that_was_idle_in_an_outage_of_all_waits_for_the_others(
    redis: FakeRedis, start: Start, seconds: float
) -> None:
    """It asks first when Redis is back, which does not know yet what the others use."""
    one, two = start(limit=10, fallback_share=1 / 2), start(limit=10, fallback_share=1 / 2)
    await two.send()
    two.end()
    await passes(65)
    await spend(one, 5)
    await passes(124)
    redis.down = True
    await passes(124 + seconds)
    for _ in range(5):
        assert one.start()
        one.end()
    redis.down = False
    tasks = [two.waits() for _ in range(10)]
    await asyncio.sleep(PAUSE + 1)
    assert sum(task.done() for task in tasks) == 5
    for task in tasks:
        task.cancel()


async def test_a_process_whose_tokens_have_returned_says_so_once(
    redis: FakeRedis, start: Start
) -> None:
    """Then no other process waits for it after an outage, and it says nothing more."""
    one = start(limit=4)
    await spend(one, 1)
    await passes(PERIOD - 1)
    assert redis.content("{crustcredits}:epoch:busy")
    await passes(PERIOD + 1)
    assert redis.content("{crustcredits}:epoch:busy") is None
    before = redis.messages
    await passes(PERIOD + 100)
    assert redis.messages == before


async def test_a_closed_process_is_waited_for_by_nobody(redis: FakeRedis, start: Start) -> None:
    """Its tokens return, and no process can use them again before."""
    one = start(limit=4)
    await spend(one, 1)
    await one.close()
    await passes(10)
    began = now()
    await start(limit=4).send()
    assert now() - began < 0.1
    assert redis.out() == 2


async def test_a_count_that_was_lost_in_an_outage_is_registered_with_the_first_message(
    redis: FakeRedis, start: Start
) -> None:
    """And not with the second one: another process may be served soon."""
    one = start(limit=4, fallback_share=1)
    await spend(one, 3)
    redis.down = True
    await passes(10)
    redis.flush()
    redis.down = False
    redis.seen = []
    await passes(11)
    assert len(redis.seen[0].buckets[0].homes) == 3
    assert redis.out() == 3


async def test_a_marker_that_another_program_writes_in_an_outage_is_repaired(
    redis: FakeRedis, start: Start
) -> None:
    one = start(limit=4, fallback_share=1)
    await spend(one, 3)
    redis.down = True
    await passes(10)
    redis.spoil("{crustcredits}:epoch", "x")
    redis.down = False
    await passes(12)
    assert not one.bucket.is_degraded
    assert redis.out() == 3


async def test_a_call_that_waited_for_its_account_fails_too(redis: FakeRedis) -> None:
    """It is ready when the call before it has failed."""
    limit = RateLimit(requests=1, scope="client")
    backend = connected(redis, on_outage="raise")
    async with fake_client(FakeServer(), rate_limit=limit, backend=backend) as client:
        pool = [ApiKey(f"secret-{number}", name=f"k{number}", account="one") for number in range(3)]
        await client.balance(pool[0])
        calls = [asyncio.create_task(client.balance(key, timeout=500)) for key in pool[1:]]
        await passes(59)
        redis.down = True
        await asyncio.wait(calls)
        assert now() < 70
        assert [type(call.exception()) for call in calls] == [BackendUnavailableError] * 2


async def test_attempts_of_degraded_mode_are_known_although_its_last_message_was_under_way(
    redis: FakeRedis, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They began and ended between the message and its answer."""

    async def answers(process: str, key: str, field: str) -> str:
        epoch: str = redis.content(key)[field]
        return epoch

    monkeypatch.setattr(redis, "hget", answers)
    one = start(limit=30, fallback_share=1)
    redis.deaf = {one.name}
    await one.send()
    one.end()
    await passes(LEASE + 10)
    redis.latency = lambda process: 0.3
    redis.deaf = set()
    sent = 0
    while one.bucket.is_degraded:
        assert one.start()
        one.end()
        sent += 1
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    assert redis.out() >= sent  # permits of lost messages may be out too


async def test_a_lowered_limit_holds_for_all_waiters(start: Start) -> None:
    """From the moment at which a process learns of it."""
    one = start(limit=5)
    one.bucket.limit = 3
    tasks = [one.waits() for _ in range(5)]
    await asyncio.sleep(1)
    assert sum(task.done() for task in tasks) == 3
    for task in tasks:
        task.cancel()
