"""Tokens that several processes share: messages, knowledge of each process, and failures.

In virtual time, with the real script over a model of Redis.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
import statistics
from itertools import pairwise
from typing import Any, Literal

import pytest

from crustcredits import (
    APIConnectionError,
    ApiKey,
    BackendUnavailableError,
    ClientClosedError,
    ConfigurationError,
    CreditsClient,
    RateLimit,
    RateLimitWaitError,
    Retry,
)
from crustcredits._http.transport_types import Fate
from crustcredits.redis.coordinator import PAUSE
from crustcredits.redis.local_tokens import FRESH
from crustcredits.redis.shared_tokens import SharedTokens
from crustcredits.redis.timing import BEAT
from crustcredits.redis.window import MOST
from tests.redis.lua import EPOCH, FakeRedis, between, connected, opened
from tests.redis.processes import LATE, LEASE, PATH, PERIOD, Start, Waiting, Worker, passes
from tests.virtual import FakeServer, Reply, WindowServer, fake_client, keys, lost, now

pytestmark = pytest.mark.virtual

# Most seconds from the return of a token to its grant: other processes may have waited longer, and
# then it is asked for again.
SOONEST = 0.35
# Most seconds until the next message of any process.
SOON = 0.6


# The log's text for a server that is down.
REFUSED = "ConnectionError: Error 111 connecting to nowhere:1. Connection refused."


# --- together


async def test_two_processes_share_one_count(redis: FakeRedis, start: Start) -> None:
    """A token used by one process is unavailable to the other until it returns."""
    one, two = start(limit=3), start(limit=3)
    for _ in range(2):
        await one.send()
    await two.send()
    waiting = [one.waits(), two.waits()]
    one.end()
    two.abandon()
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert now() == pytest.approx(60, abs=SOONEST)
    await asyncio.gather(*waiting)
    assert now() == pytest.approx(70, abs=SOONEST)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("processes", [2, 4])
async def test_the_server_never_sees_more_than_the_limit(processes: int, seed: int) -> None:
    """At any delay to Redis and the API, no request is refused and every call succeeds."""
    redis = opened(latency=between(0.0, 0.2, seed))
    server = WindowServer(limit=40, period=10.0, seconds=(0.0, 2.0), seed=seed)
    limit = RateLimit(requests=40, period=10.0, scope="client")
    clients = [
        fake_client(server, rate_limit=limit, backend=connected(redis)) for _ in range(processes)
    ]
    reports = await asyncio.gather(
        *(client.check(keys(240 // processes, str(place))) for place, client in enumerate(clients))
    )
    assert all(report.ok for report in reports)
    assert (len(server.refused), server.worst_window()) == (0, 40)
    for client in clients:
        await client.close()
    assert not redis.faults


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
async def test_a_token_given_back_goes_to_one_of_the_waiting_processes(
    redis: FakeRedis, start: Start, processes: int
) -> None:
    """Each learns of it, and none gives up its place by asking."""
    first = start(limit=3)
    for _ in range(2):
        await first.send()
        first.end()
    await first.acquire()
    others = [start(limit=3) for _ in range(processes)]
    tasks = [other.waits() for other in others]
    await asyncio.sleep(0.5)
    first.unused()
    await asyncio.sleep(1.0)
    assert sum(task.done() for task in tasks) == 1
    for task in tasks:
        task.cancel()


async def test_a_strict_share_counts_although_the_clock_was_set_back(
    redis: FakeRedis, start: Start
) -> None:
    """Then tokens are granted after the pause for the registration."""
    one, two = strict(start, 2, limit=10)
    await passes(100)
    for each in (one, two):
        await each.send()
        each.end()
    await passes(200)
    redis.clock = lambda: EPOCH - 3600 + now()
    began = now()
    await asyncio.gather(*(each.send() for each in (one, two) for _ in range(3)))
    assert now() - began < 10


async def test_no_process_starves(redis: FakeRedis, start: Start) -> None:
    """Not even the process with the longest way to Redis."""
    redis.latency = {"near": 0.0002, "nearer": 0.0001, "far": 0.02, "before": 0.0}.__getitem__
    workers = {name: start(name=name, limit=60) for name in ("near", "nearer", "far")}
    served = dict.fromkeys(workers, 0)

    async def asks(name: str) -> None:
        one = workers[name]
        while True:
            await one.send()
            served[name] += 1
            await asyncio.sleep(0.01)
            one.end()

    # Tokens return one at a time.
    spread = start(name="before", limit=60)
    for _ in range(60):
        await spread.send()
        spread.end()
        await asyncio.sleep(1)
    tasks = [asyncio.create_task(asks(name)) for name in workers for _ in range(40)]
    await asyncio.sleep(600)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert sum(served.values()) > 550
    assert min(served.values()) > 0.1 * sum(served.values())


# --- leases


async def test_tokens_of_a_vanished_process_return_after_the_lease(start: Start) -> None:
    """Not before a period and two request timeouts, both for used and unused tokens."""
    one, two = start(limit=2), start(limit=2)
    await one.send()
    await one.acquire()
    one.vanish()
    tasks = [two.waits(), two.waits()]
    await passes(LEASE - 0.1)
    assert not any(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(LEASE, abs=FRESH + 0.5)


async def test_a_reported_end_survives_its_process(
    start: Start,
) -> None:
    """Without other reports, the end of an attempt is reported after 0.1 s."""
    one, two = start(limit=1), start(limit=1)
    await one.send()
    one.end()
    await asyncio.sleep(0.2)
    one.vanish()
    await two.send()
    assert now() == pytest.approx(60, abs=SOONEST)


async def test_a_request_that_outlives_its_process_counts_for_a_whole_period(start: Start) -> None:
    """It starts as late after its grant, lasts as long and arrives as late as possible."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    await passes(FRESH - 0.01)
    assert one.start()
    await asyncio.sleep(LATE - 0.01)
    one.vanish()
    arrives = now() + LATE - 0.01
    await two.send()
    assert now() >= arrives + PERIOD


async def test_an_attempt_abandoned_during_an_outage_counts_for_a_whole_period(
    redis: FakeRedis, start: Start
) -> None:
    """Other processes still reach Redis, and this one cannot report to it."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    await passes(FRESH - 0.01)
    assert one.start()
    redis.cut.add(one.name)
    await asyncio.sleep(LATE - 0.01)
    one.abandon()
    arrives = now() + LATE - 0.01
    await two.send()
    assert now() >= arrives + PERIOD


@pytest.mark.parametrize(("waited", "starts"), [(0.9, True), (1.1, False)])
async def test_a_token_unused_for_a_second_is_given_back(
    start: Start, waited: float, starts: bool
) -> None:
    """Other processes could use it, and its lease only covers an attempt that starts by then."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    task = two.waits()
    await asyncio.sleep(waited)
    assert one.start() == starts
    await asyncio.sleep(SOON)
    assert task.done() != starts
    task.cancel()


@pytest.mark.parametrize("scope", ["client", "auto"])
async def test_tokens_that_wait_for_a_connection_slot_are_given_back(
    redis: FakeRedis, scope: Literal["client", "auto"]
) -> None:
    """Other processes could use them within a second; the waiting call gets another one later."""
    server = FakeServer(lambda name, times: Reply(seconds=9.0))
    limit = RateLimit(requests=100, scope=scope, pace=None)
    redis.seen = []
    async with fake_client(
        server, rate_limit=limit, backend=connected(redis), concurrency=1
    ) as client:
        check = asyncio.create_task(client.check(keys(60)))
        await asyncio.sleep(8)
        check.cancel()
    granted: dict[int, float] = {}
    unused: set[int] = set()
    for message in redis.seen:
        for asked in message.buckets:
            for count, first, _ in asked.permits:
                granted |= dict.fromkeys(range(first, first + count), message.at)
            for number in asked.returned:
                unused.add(number)
                assert message.at - granted[number] <= FRESH + SOON
    assert len(granted) > 32
    assert len(granted.keys() - unused) == len(server.asked)


async def test_a_call_holds_no_token_of_its_account_while_it_waits_for_a_common_one(
    redis: FakeRedis,
) -> None:
    """With `scope="auto"`, Redis grants both or neither."""
    server = WindowServer(limit=3, seconds=(0.0, 0.0))
    limit = RateLimit(requests=3)
    async with (
        fake_client(server, rate_limit=limit, backend=connected(redis)) as one,
        fake_client(server, rate_limit=limit, backend=connected(redis)) as two,
    ):
        await one.check(keys(3))
        key = keys(1, "later")[0]
        task = asyncio.create_task(two.balance(key))
        await passes(59)
        assert redis.out("key") == 3
        await task
        assert now() == pytest.approx(60.3, abs=0.1)
        assert redis.out("key") == 1
    assert not server.refused


@pytest.mark.parametrize(("limit", "processes"), [(1, 2), (1, 3), (2, 3), (2, 4)])
async def test_processes_do_not_deadlock_on_two_buckets(
    redis: FakeRedis, limit: int, processes: int
) -> None:
    """Each attempt needs a token of its account and a common one."""
    server = FakeServer()
    rate_limit = RateLimit(requests=limit, period=20.0)
    clients = [
        fake_client(server, rate_limit=rate_limit, backend=connected(redis))
        for _ in range(processes)
    ]
    reports = await asyncio.gather(*(client.check(keys(6)) for client in clients))
    assert all(report.ok for report in reports)
    assert now() < 1.2 * 20.1 * 6 * processes / limit
    for client in clients:
        await client.close()


async def test_a_stream_with_a_timeout_is_as_fast_over_redis(redis: FakeRedis) -> None:
    """All tokens are free, so each key has its turn in time, at the pace."""
    server = WindowServer()
    async with fake_client(server, backend=connected(redis)) as client:
        await client.balance(keys(1, "before")[0])
        began = now()
        outcomes = [outcome async for outcome in client.stream(iter(keys(250)), timeout=1.0)]
    assert all(outcome.ok for outcome in outcomes)
    assert now() - began < 3.0


@pytest.mark.parametrize("latency", [0.0, 0.003])
@pytest.mark.parametrize(
    ("limit", "begins"),
    [
        (1, (0.0, 0.34)),
        (1, (0.0, 0.69)),
        (1, (0.0, 1.46)),
        (2, (0.0, 0.71, 0.67)),
        (2, (0.0, 1.59, 0.39)),
        (2, (0.0, 2.63, 2.93)),
    ],
)
async def test_every_call_ends_for_any_moments_at_which_processes_begin(
    limit: int, begins: tuple[float, ...], latency: float
) -> None:
    """Processes on steady networks do not exchange tokens that each of them lacks for ever."""
    redis = opened(latency=lambda process: latency)
    rate_limit = RateLimit(requests=limit, period=1.0)
    server = WindowServer(limit=limit, period=1.0, scope=lambda key: key.account or key.name)
    pool = [
        ApiKey(f"secret-{number}", name=f"k{number}", account="A" if number % 2 else None)
        for number in range(4 * limit)
    ]

    async def checks(client: CreditsClient, begin: float) -> bool:
        await asyncio.sleep(begin)
        return (await client.check(pool)).ok

    clients = [fake_client(server, rate_limit=rate_limit, backend=connected(redis)) for _ in begins]
    done = await asyncio.gather(*map(checks, clients, begins))
    assert all(done)
    assert now() < 60
    for client in clients:
        await client.close()


# --- messages


async def test_a_message_asks_for_at_most_32_tokens_and_one_message_is_under_way(
    redis: FakeRedis, start: Start
) -> None:
    """For any number of waiters."""
    redis.seen = []
    redis.latency = between(0.05, 0.1)
    one = start(limit=300)
    await asyncio.gather(*(one.send() for _ in range(300)))
    wanted = [asked.wanted for message in redis.seen for asked in message.buckets]
    assert max(wanted) == MOST == 32
    assert sum(wanted) >= 300
    assert redis.messages <= 20


async def test_a_pace_bounds_the_tokens_asked_for_ahead(redis: FakeRedis, start: Start) -> None:
    """15 at a pace of 100 a second; more would be unused while other processes wait."""
    redis.seen = []
    one = start(limit=300, pace=100.0)
    await asyncio.gather(*(one.send() for _ in range(40)))
    assert max(asked.wanted for message in redis.seen for asked in message.buckets) == 15


async def test_an_idle_process_sends_no_message(redis: FakeRedis, start: Start) -> None:
    """A process without waiters and tokens sends no heartbeat."""
    one = start()
    await one.send()
    one.end()
    await asyncio.sleep(62)
    messages = redis.messages
    await asyncio.sleep(1000)
    assert redis.messages == messages


async def test_waiting_processes_send_at_most_two_messages_a_second(
    redis: FakeRedis, start: Start
) -> None:
    """For any number of waiters, while no token is about to return."""
    workers = [start(limit=4) for _ in range(4)]
    for one in workers:
        await one.send()
    await asyncio.sleep(1)
    for one in workers:
        one.end()
    tasks = [one.waits() for one in workers for _ in range(100)]
    await asyncio.sleep(1)
    before = dict(redis.messages_of)
    await asyncio.sleep(57)
    assert all(50 <= redis.messages_of[name] - before[name] <= 120 for name in before), (
        before,
        redis.messages_of,
    )
    for task in tasks:
        task.cancel()


async def test_one_message_fetches_several_returning_tokens(redis: FakeRedis, start: Start) -> None:
    """100 tokens that return within a second take few messages."""
    one, two = start(limit=100), start(limit=100)
    for _ in range(100):
        await one.send()
        one.end()
        await asyncio.sleep(0.01)
    last = now() + PERIOD
    tasks = [two.waits() for _ in range(100)]
    await passes(59)
    before = redis.messages_of[two.name]
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(last, abs=0.1)
    assert redis.messages_of[two.name] - before <= 30


async def test_a_waiter_wakes_when_the_next_token_returns(redis: FakeRedis, start: Start) -> None:
    """Each answer contains that time."""
    one, two = start(limit=2), start(limit=2)
    for _ in range(2):
        await one.send()
    one.end()
    await passes(17.77)
    one.end()
    first, second = two.waits(), two.waits()
    await first
    assert now() == pytest.approx(60, abs=SOONEST)
    await second
    assert now() == pytest.approx(77.77, abs=SOONEST)


async def test_ended_attempts_are_reported_together(redis: FakeRedis, start: Start) -> None:
    """Ten attempts that end within 0.1 s take one message."""
    one = start(limit=20)
    for _ in range(10):
        await one.send()
    await asyncio.sleep(1)
    redis.seen = []
    for _ in range(10):
        one.end()
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    assert [len(asked.homes) for message in redis.seen for asked in message.buckets] == [10]
    await one.send()
    redis.seen = []
    one.end()
    await one.send()
    assert [
        (asked.wanted, len(asked.homes)) for message in redis.seen for asked in message.buckets
    ] == [(1, 1)]


async def test_a_message_has_at_most_64_buckets(redis: FakeRedis, start: Start) -> None:
    """The rest follows in the next one."""
    one = start()
    buckets = [Waiting(one.backend.tokens(PATH, f"account {number}", 1)) for number in range(150)]
    for bucket in buckets:
        await bucket.send()
    await asyncio.sleep(1)
    redis.seen = []
    for bucket in buckets:
        bucket.tokens.return_at(now() + PERIOD)
    await asyncio.sleep(0.2)
    assert [len(message.buckets) for message in redis.seen] == [64, 64, 22]


async def test_a_token_given_back_soon_goes_to_another_process(start: Start) -> None:
    """It is reported within 0.1 s, and granted within half a second more."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    task = two.waits()
    await asyncio.sleep(0.5)
    one.unused()
    await asyncio.sleep(SOON)
    assert task.done()


async def test_a_longer_round_trip_does_not_cause_more_messages(
    redis: FakeRedis, start: Start
) -> None:
    """With a round trip of 0.25 s each message brings as many tokens."""
    redis.latency = lambda process: 0.125
    one = start(limit=300)
    await asyncio.gather(*(one.send() for _ in range(96)))
    assert redis.messages == 3
    assert now() == pytest.approx(0.75, abs=0.1)


async def test_many_waiting_accounts_share_the_heartbeats(redis: FakeRedis) -> None:
    """Each heartbeat is about some of them, so messages stay few."""
    limit = RateLimit(requests=1, scope="account", pace=None)
    async with fake_client(FakeServer(), rate_limit=limit, backend=connected(redis)) as client:
        pool = [
            ApiKey(f"secret-{number}", name=f"key {number}", account=f"account {number % 300}")
            for number in range(600)
        ]
        check = asyncio.create_task(client.check(pool))
        await asyncio.sleep(20)
        before = redis.messages
        await asyncio.sleep(30)
        assert redis.messages - before <= 3 / BEAT * 30
        assert (await check).failed == ()


@pytest.mark.parametrize("others_a_second", [0, 3, 30])
async def test_a_waiting_call_learns_of_a_token_that_comes_back_early(
    redis: FakeRedis, others_a_second: int
) -> None:
    """However many messages its process sends meanwhile."""
    unsent = lost(APIConnectionError("refused"), Fate.UNSENT, seconds=5.0)
    server = FakeServer(lambda name, times: unsent if name == "first" else Reply())
    limit = RateLimit(requests=1, scope="account")
    one, two = (
        fake_client(server, rate_limit=limit, backend=connected(redis), retry=Retry(attempts=1))
        for _ in range(2)
    )
    first, second = (
        ApiKey(f"secret-{name}", name=name, account="shared") for name in ("first", "second")
    )
    holds = asyncio.create_task(one.balance(first))
    await asyncio.sleep(1)
    waits = asyncio.create_task(two.balance(second))
    others: list[asyncio.Task[Any]] = []
    while not waits.done() and now() < 30:
        for key in keys(others_a_second, f"at-{now()}-"):
            others.append(asyncio.create_task(two.balance(key)))
            await asyncio.sleep(1 / others_a_second)
        if not others_a_second:
            await asyncio.sleep(0.1)
    assert now() < 7
    await asyncio.gather(waits, holds, *others, return_exceptions=True)
    for client in (one, two):
        await client.close()


@pytest.mark.parametrize("requests", [6, 12, 60])
async def test_other_accounts_have_their_turn_beside_a_large_one(
    redis: FakeRedis, requests: int
) -> None:
    """Where several processes check the large one, and all count together."""
    server = WindowServer(limit=requests)
    limit = RateLimit(requests=requests, scope="auto", pace=None)
    clients = [fake_client(server, rate_limit=limit, backend=connected(redis)) for _ in range(3)]
    large = [ApiKey(f"l-{number}", name=f"l{number}", account="large") for number in range(2000)]
    checks = [asyncio.create_task(client.check(large)) for client in clients]
    checks.append(asyncio.create_task(clients[0].check(keys(2000, "other"))))
    await asyncio.sleep(900)
    turns = [when for when, name in server.served if name.startswith("other")]
    assert len(turns) >= 900 / PERIOD / 2
    assert max(after - before for before, after in pairwise([0.0, *turns, 900.0])) < 4 * PERIOD
    for check in checks:
        check.cancel()
    await asyncio.wait(checks)
    for client in clients:
        await client.close()


@pytest.mark.parametrize("used_for", [0.0, 0.1])
async def test_a_client_that_opens_while_it_is_in_use_sends_one_message_at_a_time(
    redis: FakeRedis, used_for: float
) -> None:
    """The server notes two that are under way."""
    redis.latency = lambda process: 0.3
    client = fake_client(FakeServer(), backend=connected(redis))
    call = asyncio.create_task(client.balance(keys(1)[0]))
    await asyncio.sleep(used_for)
    opening = [asyncio.create_task(client.__aenter__()) for _ in range(2)]
    await asyncio.wait([call, *opening])
    await client.close()
    assert not redis.faults


# --- a loss of the count


async def test_a_new_server_grants_no_token_at_first(start: Start, redis: FakeRedis) -> None:
    """Another server may have counted a moment ago."""
    redis.flush()
    one = start()
    await asyncio.gather(*(one.send() for _ in range(5)))
    assert now() == pytest.approx(PAUSE, abs=SOONEST)


async def test_while_no_tokens_are_granted_one_account_asks_for_all(redis: FakeRedis) -> None:
    """After a loss of the count the accounts need not ask one by one."""
    redis.flush()
    limit = RateLimit(requests=100, scope="auto", pace=None)
    async with fake_client(FakeServer(), rate_limit=limit, backend=connected(redis)) as client:
        check = asyncio.create_task(client.check(keys(90)))
        await asyncio.sleep(PAUSE - 0.1)
        assert redis.messages <= 2 + PAUSE / BEAT
        assert (await check).failed == ()
        assert now() < PAUSE + 1


async def exhausted(*workers: Worker) -> None:
    """Use all tokens, evenly over the processes."""
    for place in range(workers[0].bucket.limit):
        await workers[place % len(workers)].send()
    for one in workers:
        while one.bucket.on_wire:
            one.end()
    await asyncio.sleep(1)


@pytest.mark.parametrize("kind", ["flush", "restart", "roll back"])
async def test_after_a_loss_every_process_registers_before_tokens_are_granted(
    redis: FakeRedis, start: Start, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So no process gets a token before a used one returns."""
    workers = [start(limit=6) for _ in range(3)]
    earlier = redis.snapshot()
    await exhausted(*workers)
    newcomer = start(limit=6)
    tasks = [one.waits() for one in [*workers, newcomer]]
    if kind == "roll back":
        redis.roll_back(earlier)
    else:
        redis.flush()
    if kind == "restart":
        redis.flush_scripts()
    await passes(50)
    assert redis.out() == 6
    assert not any(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(60, abs=0.35)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(caplog.records)
    assert (
        1
        <= sum("Redis lost the rate limit's count" in record.message for record in caplog.records)
        <= 3
    )
    assert bool(redis.evals) == (kind == "restart")


async def test_tokens_in_flight_during_a_loss_are_registered(
    redis: FakeRedis, start: Start
) -> None:
    """Granted ones too; each with the rest of its lease."""
    one, two = start(limit=4), start(limit=4)
    await one.send()
    await one.holds(2)
    await two.acquire()
    await passes(0.4)
    redis.flush()
    await passes(0.9)
    assert redis.out() == 4
    one.vanish()
    two.vanish()
    three = start(limit=4)
    await asyncio.gather(*(three.send() for _ in range(4)))
    assert now() == pytest.approx(LEASE, abs=FRESH + SOON)


async def test_a_process_without_waiters_registers_after_a_loss(
    redis: FakeRedis, start: Start
) -> None:
    """It has no waiters and nothing to report.

    Its heartbeat every half second continues while its tokens are out.
    """
    one, two = start(limit=5), start(limit=5)
    await exhausted(one)
    await passes(20)
    redis.flush()
    await two.send()
    assert now() == pytest.approx(60, abs=0.2)


async def test_after_two_losses_every_token_is_registered_twice(
    redis: FakeRedis, start: Start
) -> None:
    """The second loss comes during the repair of the first."""
    workers = [start(limit=6) for _ in range(3)]
    await exhausted(*workers)
    for _ in range(2):
        redis.flush()
        await asyncio.sleep(0.3)
    await asyncio.sleep(3)
    assert redis.out() == 6


async def test_a_loss_of_the_last_messages_only_is_noticed(redis: FakeRedis, start: Start) -> None:
    """Even after more messages than were lost: a slightly delayed replica has taken over."""
    one, two, three = (start(limit=11) for _ in range(3))
    await two.send()
    await three.send()
    await asyncio.sleep(0.2)
    earlier = redis.snapshot()
    for _ in range(3):
        await one.send()
    redis.roll_back(earlier)
    for other in (two, three) * 3:
        await other.send()
    await asyncio.sleep(3)
    assert redis.out() == 11


async def test_tokens_of_lost_messages_are_not_granted_again(
    redis: FakeRedis, start: Start
) -> None:
    """Regardless of the process that sends the next message."""
    one, two = start(limit=4), start(limit=4)
    await two.send()
    await asyncio.sleep(0.2)
    earlier = redis.snapshot()
    for _ in range(3):
        await one.send()
    redis.roll_back(earlier)
    task = two.waits()
    await asyncio.sleep(5)
    assert not task.done()
    task.cancel()


async def test_tokens_of_a_lost_answer_are_given_back(redis: FakeRedis, start: Start) -> None:
    """Redis may have granted them; they are free again with the next exchange."""
    one = start(limit=5, fallback_share=1)
    await one.send()
    redis.lose_answers = 1
    task = one.waits()
    await asyncio.sleep(0.1)
    assert redis.out() == 2
    await asyncio.sleep(2)
    assert redis.out() == 2
    assert task.done()
    two = start(limit=5)
    await asyncio.gather(*(two.send() for _ in range(3)))
    assert redis.out() == 5


async def test_a_message_that_arrives_twice_takes_tokens_once(
    redis: FakeRedis, start: Start
) -> None:
    """A Redis client that retries by itself does no harm."""
    one = start(limit=5)
    redis.repeat = 1
    await asyncio.gather(*(one.send() for _ in range(5)))
    assert now() < 0.1
    assert redis.out() == 5


async def test_a_message_read_late_does_not_take_tokens_for_long(
    redis: FakeRedis, start: Start
) -> None:
    """Redis stalled, and later reads messages whose senders have given up."""
    one, two = start(limit=5), start(limit=5)
    await one.send()
    one.end()
    redis.stall()
    tasks = [one.waits(), two.waits()]
    await asyncio.sleep(5)
    assert one.bucket.is_degraded
    redis.resume()
    await asyncio.gather(*tasks)
    assert now() < 10
    await asyncio.gather(two.send(), two.send())
    assert now() < 10
    assert redis.out() == 5


async def test_unused_redis_keys_expire(redis: FakeRedis, start: Start) -> None:
    """A bucket's after the return of all its tokens, the marker's after a day."""
    one = start()
    await one.send()
    one.vanish()
    await passes(LEASE + 2 * LATE + 10)
    assert redis.keys() == ["{crustcredits}:epoch"]
    await passes(86_500)
    assert redis.keys() == []


async def test_processes_with_different_timeouts_do_not_forget_each_others_tokens(
    redis: FakeRedis, start: Start
) -> None:
    """For example a web service with a short timeout and a batch with a long one."""
    patient, hasty = start(limit=2, late=120.0), start(limit=2, late=1.0)
    await patient.send()
    await hasty.send()
    hasty.end()
    await asyncio.sleep(1)
    hasty.vanish()
    await passes(110)
    assert redis.out() == 1
    patient.abandon()
    await asyncio.sleep(170)
    assert redis.out() == 1
    await passes(291)
    assert redis.out() == 0


async def test_names_and_values_contain_no_secret(redis: FakeRedis) -> None:
    """Accounts and keys appear as SHA-256."""
    key = ApiKey("secret-of-acme-0123", name="acme's key", account="acme's account")
    for scope in ("auto", "account", "key"):
        limit = RateLimit(scope=scope)
        async with fake_client(FakeServer(), rate_limit=limit, backend=connected(redis)) as client:
            await client.balance(key)
            await client.balance("secret-of-nobody")
    text = redis.text()
    assert not any(word in text for word in ("secret", "acme", "nobody", key.digest.hex()))
    names = redis.keys()
    assert sum("account:" in name or "key:" in name for name in names) == 3


# --- the reserve


@pytest.mark.parametrize("scope", ["client", "account", "auto"])
async def test_single_calls_hardly_wait_beside_a_check_with_a_reserve(
    redis: FakeRedis, scope: Literal["client", "account", "auto"]
) -> None:
    """The check leaves them a tenth of the limit; all keys are of one account."""
    server = WindowServer(limit=60)
    limit = RateLimit(requests=60, scope=scope, reserve=0.1)
    pool = [ApiKey(f"secret-{number}", name=f"k{number}", account="A") for number in range(200)]
    async with fake_client(server, rate_limit=limit, backend=connected(redis)) as client:
        check = asyncio.create_task(client.check(pool[20:]))
        waits = []
        for key in pool[:15]:
            await asyncio.sleep(12.0)
            began = now()
            await client.balance(key)
            waits.append(now() - began)
        check.cancel()
        await asyncio.wait([check])
    assert statistics.median(waits) < 0.15
    assert max(waits) < 1.0
    assert server.worst_window() <= 60


@pytest.mark.parametrize("scope", ["client", "account", "auto"])
async def test_messages_are_few_while_a_single_call_waits_beside_a_check(
    redis: FakeRedis, scope: Literal["client", "account", "auto"]
) -> None:
    """Both learn when tokens return, each for the tokens that it leaves."""
    server = WindowServer(limit=3)
    limit = RateLimit(requests=3, scope=scope, reserve=0.3)
    pool = [ApiKey(f"secret-{number}", name=f"k{number}", account="A") for number in range(20)]
    clients = [fake_client(server, rate_limit=limit, backend=connected(redis)) for _ in range(2)]
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(client.check(pool)) for client in clients]
    tasks += [asyncio.create_task(client.balance(pool[3])) for client in clients]
    await asyncio.sleep(10)
    before = redis.messages
    await asyncio.sleep(40)
    assert redis.messages - before <= 2 * 2.5 * 40
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for client in clients:
        await client.close()


# --- without Redis, and "local"


async def test_degraded_mode_starts_with_the_process_own_returning_tokens(
    redis: FakeRedis, start: Start
) -> None:
    """Others may have used the rest; the whole share follows after a lease."""
    one, two = start(limit=12, fallback_share=1 / 3), start(limit=12)
    for _ in range(2):
        await one.send()
        one.end()
    for _ in range(10):
        await two.send()
        two.end()
    await passes(30)
    redis.down = True
    tasks = [one.waits() for _ in range(6)]
    await passes(59)
    assert one.bucket.is_degraded
    assert not any(task.done() for task in tasks)
    await passes(61)
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 4
    settles = 30 + LEASE  # the first message without an answer follows within a heartbeat
    await passes(settles - 0.1)
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 4
    await passes(settles + BEAT + 0.1)
    assert [task.done() for task in tasks] == [True] * 4 + [False] * 2
    for task in tasks:
        task.cancel()
    redis.down = False


async def test_the_share_follows_a_lower_limit_of_the_server(
    redis: FakeRedis, start: Start
) -> None:
    """The share is computed from the limit in force, and is at least one token."""
    one = start(limit=100, fallback_share=1 / 4)
    await one.send()
    redis.down = True
    await passes(100)
    assert one.bucket.available(now()) == 24
    one.bucket.limit = 40
    assert one.bucket.available(now()) == 9
    one.bucket.limit = 2
    assert one.bucket.available(now()) == 0
    one.end()
    await passes(161)
    assert one.bucket.available(now()) == 1
    redis.down = False


async def test_a_process_that_never_reached_redis_starts_after_a_lease(
    redis: FakeRedis, start: Start
) -> None:
    """Without tokens of its own, other processes may have used all."""
    redis.down = True
    one = start(limit=8)
    tasks = [one.waits() for _ in range(3)]
    await asyncio.sleep(LEASE - 0.1)
    assert not any(task.done() for task in tasks)
    await asyncio.sleep(0.2)
    assert [task.done() for task in tasks] == [True, True, False]
    assert Waiting(one.backend.tokens("/account/credits", None, 8)).tokens.room(now(), 0) == 2
    redis.down = False
    await tasks[2]


async def test_a_bucket_made_during_an_outage_is_empty_at_first(
    redis: FakeRedis, start: Start
) -> None:
    """Other processes may have used all its tokens."""
    one = start()
    redis.down = True
    task = one.waits()
    await asyncio.sleep(3)
    assert Waiting(one.backend.tokens("/account/credits", None, 8)).tokens.room(now(), 0) == 0
    task.cancel()
    redis.down = False


async def test_a_call_that_cannot_wait_for_its_share_fails_at_its_deadline(
    redis: FakeRedis,
) -> None:
    """Redis might answer sooner. A call with a longer deadline waits."""
    redis.down = True
    async with fake_client(
        WindowServer(), rate_limit=RateLimit(scope="client"), backend=connected(redis)
    ) as client:
        first = asyncio.create_task(client.balance(keys(1, "first")[0], timeout=90))
        await asyncio.sleep(3)
        began = now()
        with pytest.raises(RateLimitWaitError) as caught:
            await client.balance(keys(1, "hasty")[0], timeout=20)
        assert now() == began + 20
        assert caught.value.wait == pytest.approx(20, abs=1)
        assert client.quota().seconds_for(1) == pytest.approx(58.3, abs=1)
        assert (await first).credits == 7
        assert now() == pytest.approx(81.3, abs=0.5)


async def test_a_call_that_waits_for_its_share_names_redis(redis: FakeRedis) -> None:
    """In the error of each call, of a process that starts during the outage too."""
    redis.down = True
    async with fake_client(WindowServer(), backend=connected(redis)) as client:
        for timeout in (1, 30):
            with pytest.raises(RateLimitWaitError) as caught:
                await client.balance(keys(1)[0], timeout=timeout)
            assert str(caught.value) == (
                "k0: not sent: deadline too short, because Redis is out of reach and the leases of "
                f"other processes delay this call by at least {timeout:.1f} s; see the log for the "
                "cause, and raise timeout="
            )
        report = await client.check(keys(3), timeout=1)
        assert all("Redis is out of reach" in str(outcome.error) for outcome in report)
    redis.down = False


async def test_a_short_outage_is_waited_for(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """While one process is cut off, its own spending would be in addition to the others'."""
    one, two = start(limit=4, fallback_share=1), start(limit=4, fallback_share=1)
    for _ in range(4):
        await one.send()
        one.end()
    await passes(59)
    redis.cut.add(one.name)
    tasks = [each.waits() for each in (two, one) for _ in range(4)]
    await passes(60.9)
    assert [task.done() for task in tasks] == [True] * 4 + [False] * 4
    redis.cut.clear()
    for _ in range(4):
        two.end()
    await asyncio.gather(*tasks)
    assert now() >= 120
    assert not caplog.records


@pytest.mark.parametrize("late", [True, False])
async def test_after_an_outage_no_process_gets_tokens_before_all_have_registered(
    redis: FakeRedis, start: Start, late: bool
) -> None:
    """One process is in degraded mode, the other almost.

    With `late`, messages of the outage are read now.
    """
    one, two = start(limit=4, fallback_share=1 / 2), start(limit=4, fallback_share=1 / 2)
    for _ in range(4):
        await one.send()
        one.end()
    await passes(58.5)
    redis.stall()
    ones = [one.waits() for _ in range(2)]
    await asyncio.sleep(0.3)
    twos = [two.waits() for _ in range(4)]
    await asyncio.wait(ones)
    assert not two.bucket.is_degraded
    redis.resume(late=late)
    await asyncio.sleep(4)
    assert redis.out() == 4
    assert [task.done() for task in twos].count(True) == 2
    for task in twos:
        task.cancel()


async def test_an_outage_and_its_end_are_logged_once_each(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """For any number of failed exchanges."""
    caplog.set_level(logging.INFO)
    one = start(limit=8, fallback_share=0.123456)
    await one.send()
    for _ in range(2):
        redis.down = True
        await asyncio.sleep(200)
        redis.down = False
        await asyncio.sleep(3)
        await one.acquire()
        one.unused()
        await one.send()
    effect = (
        "until it answers, this process uses only the tokens that it already has for 81 s "
        "(degraded mode), then up to 0.123 of the limit"
    )
    remedy = "look at Redis and at the network between it and this process"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"Redis is out of reach ({REFUSED}); {effect}; {remedy}"),
        ("WARNING", "Redis answers again after 200 s; this process counts in Redis again"),
    ] * 2


async def test_redis_is_tried_twice_a_second(redis: FakeRedis, start: Start) -> None:
    """For any number of queued reports."""
    one = start(limit=100, fallback_share=1)
    for _ in range(50):
        await one.send()
    redis.down = True
    await asyncio.sleep(3)
    before = redis.messages
    for _ in range(50):
        one.end()
        await asyncio.sleep(0.2)
    assert 18 <= redis.messages - before <= 21
    redis.down = False


async def test_after_an_outage_every_process_registers_its_tokens(
    redis: FakeRedis, start: Start
) -> None:
    """Also those of degraded mode, but not those already returned."""
    one, two = start(limit=12, fallback_share=1 / 2), start(limit=12)
    await two.send()
    redis.cut.add(one.name)
    tasks = [one.waits() for _ in range(4)]
    await asyncio.gather(*tasks)
    one.end()
    one.abandon()
    await one.acquire()
    one.unused()
    redis.cut.clear()
    await asyncio.sleep(2)
    assert redis.out() == 4


async def test_after_an_outage_no_token_of_an_unregistered_process_is_granted(
    redis: FakeRedis, start: Start
) -> None:
    """Each reaches Redis at its own time; until all have registered, no token is granted."""
    workers = [start(limit=8, fallback_share=1 / 4) for _ in range(4)]
    redis.down = True
    tasks = []
    for one in workers:
        tasks += [one.waits(), one.waits()]
        await asyncio.sleep(0.24)
    await asyncio.gather(*tasks)
    redis.down = False
    more = [one.waits() for one in workers for _ in range(2)]
    await asyncio.sleep(5)
    assert redis.out() == 8
    assert not any(task.done() for task in more)
    for task in more:
        task.cancel()


async def test_unused_tokens_of_degraded_mode_end_with_the_outage(
    redis: FakeRedis, start: Start
) -> None:
    """Redis does not know them, and no attempt has used them."""
    one = start(limit=4)
    redis.down = True
    await one.acquire()
    redis.down = False
    await asyncio.sleep(5)
    assert redis.out() == 0
    assert not one.start()


async def test_the_whole_share_waits_for_slow_attempts_of_before_the_outage(
    redis: FakeRedis, start: Start
) -> None:
    """One process noticed the outage at once; the other was sending its last tokens, slowly."""
    one, two = start(limit=4, fallback_share=1 / 2), start(limit=4, fallback_share=1 / 2)
    await two.holds(4)
    redis.down = True
    tasks = [one.waits() for _ in range(2)]
    await asyncio.sleep(0.9)
    assert [two.start() for _ in range(4)] == [True] * 4
    # Abandoned after one timeout, and arriving as late after that as possible.
    arrives = now() + 2 * LATE - 0.1
    await asyncio.sleep(LATE)
    for _ in range(4):
        two.abandon()
    assert one.bucket.is_degraded
    await asyncio.gather(*tasks)
    assert now() >= arrives + PERIOD
    redis.down = False


async def test_a_redis_that_hangs_is_an_outage_after_three_seconds(
    redis: FakeRedis, start: Start
) -> None:
    """A call then waits for it no longer."""
    one = start(limit=8, fallback_share=1)
    for _ in range(4):
        await one.send()
        one.end()
    await passes(30)
    redis.stall()
    task = one.waits()
    await asyncio.sleep(3.5)
    assert one.bucket.is_degraded
    await task
    assert now() == pytest.approx(60, abs=0.1)
    redis.resume()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Event loop is closed"), TypeError("unexpected keyword"), ValueError("nonsense")],
)
async def test_no_call_hangs_on_an_unexpected_exception(
    redis: FakeRedis, start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A client of another loop, or one with unknown options, is an outage too."""

    async def raises(*said: Any) -> None:
        raise error

    monkeypatch.setattr(redis, "evalsha", raises)
    one = start(limit=4)
    await asyncio.wait_for(one.send(), LEASE + 5)
    with pytest.raises(BackendUnavailableError):
        await asyncio.wait_for(start(limit=4, on_outage="raise").send(), 5)


@pytest.mark.parametrize(
    "answer", [[], [[1, 2]], [[1, 1, 1, 0], [0]], [[1, 1, 0], [0]], None, b"OK"]
)
async def test_no_call_hangs_on_an_unexpected_answer(
    redis: FakeRedis,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: Any,
) -> None:
    """From another script, or a proxy in between. The log names the cause."""

    async def answers(*said: Any) -> Any:
        return answer

    monkeypatch.setattr(redis, "evalsha", answers)
    with pytest.raises(BackendUnavailableError):
        await asyncio.wait_for(start(limit=4, on_outage="raise").send(), 5)
    cause = "Redis sent a reply that is not from the script; look for a proxy, or another program"
    assert f"Redis is out of reach ({cause} with this prefix); until" in caplog.text


# --- without Redis, and "raise"


async def test_a_call_that_needs_a_token_fails_without_redis(redis: FakeRedis) -> None:
    """The error names its key, and no request was sent."""
    server = FakeServer()
    async with fake_client(server, backend=connected(redis, on_outage="raise")) as client:
        await client.balance(keys(1)[0])
        redis.down = True
        with pytest.raises(BackendUnavailableError) as caught:
            await client.balance(keys(2)[1])
        assert (caught.value.key_name, caught.value.attempts) == ("k1", 0)
        assert str(caught.value) == (
            "k1: not sent: Redis, which counts for all processes, is out of reach; see the log for "
            "the cause, and try again when Redis answers"
        )
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own
        assert (str(again), type(again)) == (str(caught.value), BackendUnavailableError)
        report = await client.check(keys(3))
        assert [type(outcome.error) for outcome in report] == [BackendUnavailableError] * 3
        assert [outcome.error.key_name for outcome in report if outcome.error] == ["k0", "k1", "k2"]
        redis.down = False
        assert (await client.check(keys(3))).ok
    assert len(server.arrivals) == 4


async def test_every_waiter_fails_when_redis_is_out_of_reach(
    redis: FakeRedis, start: Start
) -> None:
    """In every bucket, within three seconds if Redis hangs."""
    one = start(limit=1, on_outage="raise")
    other = Waiting(one.backend.tokens("/account/credits", None, 1))
    await one.send()
    await other.send()
    tasks = [
        asyncio.create_task(bucket.acquire()) for bucket in (one.waiting, other) for _ in range(2)
    ]
    await asyncio.sleep(1)
    redis.stall()
    done, _ = await asyncio.wait(tasks, timeout=3.5)
    assert len(done) == 4
    assert {type(task.exception()) for task in done} == {BackendUnavailableError}
    redis.seen = []
    redis.resume(late=False)
    await asyncio.sleep(3)
    assert not any(asked.wanted for message in redis.seen for asked in message.buckets)


async def test_a_waiter_cancelled_at_the_moment_of_the_outage_is_skipped(
    redis: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its future is done already."""
    limit = RateLimit(requests=1, scope="client")
    async with fake_client(
        FakeServer(), rate_limit=limit, backend=connected(redis, on_outage="raise")
    ) as client:
        await client.balance(keys(1)[0])
        left, stays = (asyncio.create_task(client.balance(key)) for key in keys(2, "late"))
        await asyncio.sleep(1)
        redis.down = True
        # The message is logged right before the calls fail.
        monkeypatch.setattr(logging.Logger, "warning", lambda *said: left.cancel())
        await asyncio.wait([left, stays])
        redis.down = False
        assert left.cancelled()
        assert isinstance(stays.exception(), BackendUnavailableError)
        assert client.quota().waiting == 0


async def test_failing_calls_are_logged_once(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """And their end once too."""
    one = start(limit=8, on_outage="raise")
    redis.down = True
    for _ in range(5):
        with pytest.raises(BackendUnavailableError):
            await one.send()
        await asyncio.sleep(1.5)
    redis.down = False
    await one.send()
    effect = "until it answers, calls fail"
    remedy = "look at Redis and at the network between it and this process"
    assert [record.message for record in caplog.records] == [
        f"Redis is out of reach ({REFUSED}); {effect}; {remedy}",
        "Redis answers again after 12 s; this process counts in Redis again",
    ]


async def test_queued_reports_are_sent_after_the_outage(redis: FakeRedis, start: Start) -> None:
    """The token returns as if there had been no outage."""
    one, two = start(limit=1, on_outage="raise"), start(limit=1, on_outage="raise")
    await one.send()
    redis.down = True
    one.end()
    await asyncio.sleep(3)
    redis.down = False
    await asyncio.sleep(2)
    one.vanish()
    await two.send()
    assert now() == pytest.approx(60, abs=SOONEST)


async def test_the_first_message_after_an_outage_is_short(redis: FakeRedis, start: Start) -> None:
    """The tokens of a failed message are given back.

    A long outage must not add up those of all calls.
    """
    one = start(limit=300, on_outage="raise")
    await one.send()
    redis.down = True
    for _ in range(3000):
        with pytest.raises(BackendUnavailableError):
            await one.send()
        await asyncio.sleep(0.1)
    redis.down = False
    redis.seen = []
    await one.send()
    assert sum(len(asked.returned) for message in redis.seen for asked in message.buckets) < 1000


# --- without Redis, and "strict"


def strict(start: Start, count: int, **options: Any) -> list[Worker]:
    """Processes that divide the limit evenly."""
    options = {"on_outage": "strict", "fallback_share": 1 / count, **options}
    return [start(**options) for _ in range(count)]


async def test_a_strict_process_without_redis_sends_nothing_for_a_lease_and_then_its_share(
    redis: FakeRedis, start: Start
) -> None:
    """The others leave its share to it from the moment at which it may use it."""
    one, two, three = strict(start, 3, limit=12)
    for each in (one, two, three):
        await each.send()
        each.end()
    await passes(10)
    redis.cut.add(one.name)
    ones = [one.waits() for _ in range(6)]
    others = [each.waits() for each in (two, three) for _ in range(9)]
    await passes(12)
    for each in (two, three):
        while each.bucket.on_wire:
            each.end()
    await passes(10 + LEASE)
    assert not any(task.done() for task in ones)
    assert redis.out() == 8
    await passes(20 + LEASE)
    assert sum(task.done() for task in ones) == 4
    await passes(140)
    assert sum(task.done() for task in ones) == 4
    assert redis.out() == 8
    for task in (*ones, *others):
        task.cancel()
    redis.cut.clear()


async def test_strict_processes_use_together_as_much_as_their_shares_add_up_to(
    redis: FakeRedis, start: Start
) -> None:
    """A process that Redis has never heard may use its share by itself at any time."""
    one, two, three = strict(start, 3, limit=12)
    tasks = [each.waits() for each in (one, two) for _ in range(6)]
    await asyncio.sleep(5)
    assert sum(task.done() for task in tasks) == 8
    await three.send()
    await asyncio.sleep(5)
    assert sum(task.done() for task in tasks) == 11
    for task in tasks:
        task.cancel()


async def test_an_idle_strict_process_still_leaves_its_share_to_the_others(start: Start) -> None:
    """It sends a message every two seconds."""
    one, two = strict(start, 2, limit=10)
    await one.send()
    one.end()
    await passes(200)
    await asyncio.gather(*(two.send() for _ in range(10)))
    assert now() < 201


async def test_the_share_of_a_new_strict_process_counts_when_no_other_can_have_used_it(
    redis: FakeRedis, start: Start
) -> None:
    """A process that was cut off for long may have used it a moment ago, when it was killed."""
    one, two = strict(start, 2, limit=10)
    for each in (one, two):
        await each.send()
        each.end()
    redis.cut.add(one.name)
    tasks = [one.waits() for _ in range(5)]
    await passes(100)
    assert sum(task.done() for task in tasks) == 5
    one.vanish()
    (three,) = (start(limit=10, on_outage="strict", fallback_share=1 / 2),)
    more = [each.waits() for each in (two, three) for _ in range(10)]
    await passes(99 + LEASE)
    assert sum(task.done() for task in more) == redis.out() == 5
    await passes(110 + LEASE)
    assert redis.out() == 10
    for task in more:
        task.cancel()


async def test_the_share_of_a_strict_process_that_was_closed_is_free(
    redis: FakeRedis, start: Start
) -> None:
    """A new process may take its place at once."""
    one, two = strict(start, 2, limit=10)
    for each in (one, two):
        await each.send()
        each.end()
    await one.close()
    await passes(300)
    (three,) = (start(limit=10, on_outage="strict", fallback_share=1 / 2),)
    await asyncio.gather(*(three.send() for _ in range(10)))
    assert now() < 301


async def test_a_strict_process_that_was_killed_is_forgotten_when_others_have_its_share(
    redis: FakeRedis, start: Start
) -> None:
    """So later processes do not wait because of it."""
    one, two = strict(start, 2, limit=10)
    for each in (one, two):
        await each.send()
        each.end()
    one.vanish()
    begun = [start(limit=10, on_outage="strict", fallback_share=1 / 2) for _ in range(2)]
    await begun[0].send()
    await passes(300)
    await two.close()
    await asyncio.gather(*(begun[1].send() for _ in range(9)))
    assert now() < 301


async def test_a_strict_share_of_less_than_one_request_is_none(
    redis: FakeRedis, start: Start
) -> None:
    """Four processes with one each would exceed a limit of two."""
    one, *_ = strict(start, 4, limit=2)
    redis.down = True
    task = one.waits()
    await passes(3 * LEASE)
    assert not task.done()
    task.cancel()
    redis.down = False


async def test_the_log_says_that_a_strict_process_sends_nothing(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = strict(start, 2, limit=10)
    redis.down = True
    task = one.waits()
    await asyncio.sleep(3)
    assert "sends nothing for 88 s (degraded mode), then up to 0.5 of the limit" in caplog.text
    task.cancel()
    redis.down = False


@pytest.mark.parametrize("on_outage", ["local", "strict", "raise"])
async def test_a_process_that_gets_no_answer_does_not_stop_the_others(
    redis: FakeRedis, start: Start, on_outage: str
) -> None:
    """Its messages arrive: after an outage, they would let all wait for its tokens."""
    one, two = (start(limit=200, on_outage=on_outage, fallback_share=1 / 2) for _ in range(2))
    await one.send()
    await two.send()
    redis.deaf.add(one.name)
    task = one.waits()
    await asyncio.sleep(10)
    for _ in range(40):
        began = now()
        await two.send()
        assert now() - began < 0.1
        await asyncio.sleep(0.25)
    task.cancel()
    await asyncio.wait([task])
    redis.deaf.clear()


# --- closing


async def test_closing_sends_every_queued_report(redis: FakeRedis) -> None:
    """Unused tokens are free at once, and ended attempts return theirs in time."""
    server = FakeServer(lambda name, times: Reply(seconds=5.0))
    client = fake_client(
        server,
        rate_limit=RateLimit(requests=8, scope="client"),
        backend=connected(redis),
        concurrency=2,
    )
    task = asyncio.create_task(client.check(keys(8)))
    await asyncio.sleep(0.3)
    assert redis.out() == 8
    await client.close()
    await asyncio.wait([task])
    assert isinstance(task.exception(), ClientClosedError)
    assert now() < 0.4
    assert redis.out() == 2


@pytest.mark.parametrize("how", ["down", "stall"])
@pytest.mark.parametrize("on_outage", ["local", "raise"])
@pytest.mark.parametrize("alone", [True, False])
async def test_closing_without_redis_takes_no_longer_than_one_answer(
    redis: FakeRedis, how: str, on_outage: str, alone: bool
) -> None:
    """Both before and after the outage was noticed."""
    backend = connected(redis, on_outage=on_outage)
    client = fake_client(FakeServer(), backend=backend)
    await client.check(keys(20))
    if how == "down":
        redis.down = True
    else:
        redis.stall()
    await asyncio.sleep(3 * alone)
    began = now()
    await client.close()
    assert now() - began < 2.5
    messages = redis.messages
    await asyncio.sleep(200)
    assert redis.messages == messages


async def test_closing_does_not_wait_for_waiters(redis: FakeRedis, start: Start) -> None:
    """It does not send their messages one after the other."""
    one = start(limit=1)
    await one.send()
    tasks = [one.waits() for _ in range(3)]
    await asyncio.sleep(0.3)
    one.end()
    began = now()
    await asyncio.wait_for(one.close(), 5)
    assert now() - began < 1
    for task in tasks:
        task.cancel()


async def test_a_second_close_does_nothing(redis: FakeRedis) -> None:
    """As with the client."""
    client = fake_client(FakeServer(), backend=connected(redis))
    await client.balance(keys(1)[0])
    await client.close()
    messages = redis.messages
    await client.close()
    assert redis.messages == messages


@pytest.mark.parametrize("on_outage", ["local", "strict", "raise"])
async def test_a_backend_without_a_client_can_be_closed(redis: FakeRedis, on_outage: str) -> None:
    """It has sent nothing, and sends nothing."""
    await connected(redis, on_outage=on_outage).close()
    assert redis.messages == 0


async def test_a_closed_process_keeps_no_timers(redis: FakeRedis, start: Start) -> None:
    """And no task: nothing is left on the loop."""
    one, two = start(), start()
    await one.send()
    redis.cut.add(two.name)
    waiting = two.waits()
    await asyncio.sleep(2)
    for each in (one, two):
        await each.close()
    messages = redis.messages
    await asyncio.sleep(2 * LEASE)
    assert redis.messages == messages
    assert asyncio.all_tasks() == {asyncio.current_task(), waiting}
    waiting.cancel()


# --- ownership


async def test_a_backend_serves_one_client(redis: FakeRedis) -> None:
    """Their counts are those of one client."""
    backend = connected(redis)
    async with fake_client(FakeServer(), backend=backend):
        with pytest.raises(
            ConfigurationError, match="make a new RedisBackend with the same prefix for each client"
        ):
            CreditsClient(backend=backend)


async def test_a_process_gets_its_name_when_its_client_opens(
    redis: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backend may have been made before a fork."""
    monkeypatch.setattr("secrets.token_hex", lambda size: "made too early")
    one, two = connected(redis), connected(redis)
    monkeypatch.undo()
    async with (
        fake_client(FakeServer(), backend=one) as client,
        fake_client(FakeServer(), backend=two) as other,
    ):
        await client.balance(keys(1)[0])
        await other.balance(keys(1)[0])
    assert len(redis.messages_of) == 2
    assert "made too early" not in redis.messages_of


async def test_idle_buckets_are_forgotten(redis: FakeRedis) -> None:
    """Their number stays bounded while accounts come and go."""
    gc.collect()
    before = sum(isinstance(each, SharedTokens) for each in gc.get_objects())
    backend = connected(redis)
    async with fake_client(
        FakeServer(), rate_limit=RateLimit(scope="key"), backend=backend
    ) as client:
        await client.check(keys(50))
        for number in range(40):
            await client.balance(keys(1, f"later-{number}")[0])
            await asyncio.sleep(10)
        gc.collect()
        buckets = sum(isinstance(each, SharedTokens) for each in gc.get_objects())
        assert buckets - before < 20
