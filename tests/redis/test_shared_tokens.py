"""Tokens that several processes share: what they say, what they know, and what becomes of it when
things go wrong.

In virtual time, with the real script over a model of Redis.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import pickle
from typing import Any

import pytest

from crustcredits import (
    ApiKey,
    BucketsUnavailableError,
    ClientClosedError,
    ConfigurationError,
    CreditsClient,
    RateLimit,
    RateLimitWaitError,
)
from crustcredits._ratelimit.leased_tokens import LeasedTokens
from crustcredits.redis.coordinator import PAUSE
from crustcredits.redis.local_tokens import FRESH
from crustcredits.redis.shared_tokens import MOST, SharedTokens
from tests.redis.lua import FakeRedis, between, connected, opened
from tests.redis.processes import LATE, LEASE, PATH, PERIOD, Start, Waiting, Worker, passes
from tests.virtual import FakeServer, Reply, WindowServer, fake_client, keys, now

pytestmark = pytest.mark.virtual

# By how much it may come later than a token comes home: others may have waited longer, and then it
# is asked for again.
SOONEST = 0.1
# What a process that has not been heard of for a while does within this time.
SOON = 0.6


# What the log says of a server that is down.
REFUSED = "ConnectionError: Error 111 connecting to nowhere:1. Connection refused."


def shared(client: CreditsClient) -> SharedTokens:
    """What a client knows of the tokens of all its requests for balances."""
    bucket = client._dispatcher._schedulers[PATH]._common
    assert isinstance(bucket, LeasedTokens)
    assert isinstance(bucket._tokens, SharedTokens)
    return bucket._tokens


# --- together


async def test_two_processes_share_one_count(redis: FakeRedis, start: Start) -> None:
    """What one has, the other has not, until it comes home."""
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
    """Whatever the delays to Redis and to the API: nothing is refused, and all come to their
    turn."""
    redis = opened(latency=between(0.0, 0.2, seed))
    server = WindowServer(limit=40, period=10.0, seconds=(0.0, 2.0), seed=seed)
    limit = RateLimit(requests=40, period=10.0, scope="client")
    clients = [
        fake_client(server, rate_limit=limit, buckets=connected(redis)) for _ in range(processes)
    ]
    reports = await asyncio.gather(
        *(client.check(keys(240 // processes, str(place))) for place, client in enumerate(clients))
    )
    assert all(report.ok for report in reports)
    assert (len(server.refused), server.worst_window()) == (0, 40)
    for client in clients:
        await client.close()
    assert not redis.faults


async def test_no_process_starves(redis: FakeRedis, start: Start) -> None:
    """Also not the one that is always the last to hear of it, because it is farther from Redis."""
    redis.latency = {"near": 0.0002, "nearer": 0.0001, "far": 0.02}.__getitem__
    workers = {name: start(name=name, limit=60) for name in ("near", "nearer", "far")}
    served = dict.fromkeys(workers, 0)

    async def asks(name: str) -> None:
        one = workers[name]
        while True:
            await one.send()
            served[name] += 1
            await asyncio.sleep(0.01)
            one.end()

    # Tokens come home one at a time.
    spread = start(name="near", limit=60)
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


async def test_what_a_process_had_that_vanished_comes_home_by_itself(start: Start) -> None:
    """After a period and two request timeouts, and no sooner; whether it was on the wire or not."""
    one, two = start(limit=2), start(limit=2)
    await one.send()
    await one.acquire()
    one.vanish()
    tasks = [two.waits(), two.waits()]
    await passes(LEASE - 0.1)
    assert not any(task.done() for task in tasks)
    await asyncio.gather(*tasks)
    assert now() == pytest.approx(LEASE, abs=FRESH + 0.5)


async def test_what_had_ended_before_its_process_vanished_comes_home_as_if_it_had_not(
    start: Start,
) -> None:
    """That it has ended is told a tenth of a second later, if there is nothing else to say."""
    one, two = start(limit=1), start(limit=1)
    await one.send()
    one.end()
    await asyncio.sleep(0.2)
    one.vanish()
    await two.send()
    assert now() == pytest.approx(60, abs=SOONEST)


async def test_a_request_that_outlives_its_process_counts_for_a_whole_period(start: Start) -> None:
    """It began as late after its token's grant as it may, lasted as long as it may, and arrives as
    late as it may."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    await passes(FRESH - 0.01)
    assert one.start()
    await asyncio.sleep(LATE - 0.01)
    one.vanish()
    arrives = now() + LATE - 0.01
    await two.send()
    assert now() >= arrives + PERIOD


async def test_a_request_that_was_given_up_on_during_an_outage_counts_for_a_whole_period(
    redis: FakeRedis, start: Start
) -> None:
    """Where the others can still count, and this process cannot tell them."""
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
async def test_a_token_that_is_not_used_within_a_second_goes_back(
    start: Start, waited: float, starts: bool
) -> None:
    """Others could use it, and its lease is made for a request that begins by then."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    task = two.waits()
    await asyncio.sleep(waited)
    assert one.start() == starts
    await asyncio.sleep(SOON)
    assert task.done() != starts
    task.cancel()


async def test_tokens_that_wait_for_a_place_on_the_wire_go_back_within_a_second(
    redis: FakeRedis,
) -> None:
    """Others could use them; whoever waits has others when it has its place."""
    server = FakeServer(lambda name, times: Reply(seconds=9.0))
    limit = RateLimit(requests=100, scope="client", pace=None)
    async with fake_client(
        server, rate_limit=limit, buckets=connected(redis), concurrency=1
    ) as client:
        check = asyncio.create_task(client.check(keys(60)))
        for _ in range(40):
            await asyncio.sleep(0.2)
            assert not any(now() - token.at > FRESH + SOON for token in shared(client)._hand)
        check.cancel()


async def test_an_accounts_own_token_that_has_become_stale_meanwhile_goes_back(
    redis: FakeRedis,
) -> None:
    """With `scope="auto"`, while the one of all was waited for.

    So nothing is sent with a token whose lease is too short.
    """
    server = WindowServer(limit=3, seconds=(0.0, 0.0))
    limit = RateLimit(requests=3)
    async with (
        fake_client(server, rate_limit=limit, buckets=connected(redis)) as one,
        fake_client(server, rate_limit=limit, buckets=connected(redis)) as two,
    ):
        await one.check(keys(3))
        key = keys(1, "later")[0]
        task = asyncio.create_task(two.balance(key))
        await passes(59)
        assert redis.out("key") == 3
        redis.seen = []
        await task
        assert now() == pytest.approx(60.3, abs=0.1)
        own = [asked for message in redis.seen for asked in message.buckets if "key" in asked.key]
        assert sum(asked.wanted for asked in own) == 1
        await asyncio.sleep(1)
        assert redis.out("key") == 1
    assert not server.refused


@pytest.mark.parametrize(("limit", "processes"), [(1, 2), (1, 3), (2, 3), (2, 4)])
async def test_processes_do_not_wait_for_each_others_halves(
    redis: FakeRedis, limit: int, processes: int
) -> None:
    """Each request needs a token of its account and one of all.

    Who has one of them and not the other lets it go.
    """
    server = FakeServer()
    rate_limit = RateLimit(requests=limit, period=20.0)
    clients = [
        fake_client(server, rate_limit=rate_limit, buckets=connected(redis))
        for _ in range(processes)
    ]
    reports = await asyncio.gather(*(client.check(keys(6)) for client in clients))
    assert all(report.ok for report in reports)
    assert now() < 1.2 * 20.1 * 6 * processes / limit
    for client in clients:
        await client.close()


# --- messages


async def test_a_message_asks_for_no_more_than_32_and_only_one_is_under_way(
    redis: FakeRedis, start: Start
) -> None:
    """However many wait."""
    redis.seen = []
    redis.latency = between(0.05, 0.1)
    one = start(limit=300)
    await asyncio.gather(*(one.send() for _ in range(300)))
    wanted = [asked.wanted for message in redis.seen for asked in message.buckets]
    assert max(wanted) == MOST == 32
    assert sum(wanted) >= 300
    assert redis.messages <= 20


async def test_with_a_pace_no_more_is_asked_for_than_goes_in_a_moment(
    redis: FakeRedis, start: Start
) -> None:
    """15 at 100 a second; what waits for the pace could be used by others."""
    redis.seen = []
    one = start(limit=300, pace=100.0)
    await asyncio.gather(*(one.send() for _ in range(40)))
    assert max(asked.wanted for message in redis.seen for asked in message.buckets) == 15


async def test_no_message_is_sent_that_nothing_is_to_be_said_in(
    redis: FakeRedis, start: Start
) -> None:
    """A process that waits for nothing and holds nothing is silent."""
    one = start()
    await one.send()
    one.end()
    await asyncio.sleep(62)
    messages = redis.messages
    await asyncio.sleep(1000)
    assert redis.messages == messages


async def test_while_everybody_waits_there_are_two_messages_a_second_at_the_most(
    redis: FakeRedis, start: Start
) -> None:
    """For each process, however many wait in it, when no token is to come home for long."""
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


async def test_while_tokens_come_home_one_after_the_other_messages_stay_few(
    redis: FakeRedis, start: Start
) -> None:
    """Of a hundred that come home within a second each message brings all that came in between."""
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


async def test_whoever_waits_wakes_when_the_next_token_comes_home(
    redis: FakeRedis, start: Start
) -> None:
    """Each answer tells when that is."""
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


async def test_what_has_ended_rides_along(redis: FakeRedis, start: Start) -> None:
    """Ten requests end within a tenth of a second, and one message says so."""
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


async def test_a_message_has_sixty_four_buckets_at_the_most(redis: FakeRedis, start: Start) -> None:
    """The rest goes with the next one."""
    one = start()
    buckets = [Waiting(one.buckets.tokens(PATH, f"account {number}", 1)) for number in range(150)]
    redis.seen = []
    await asyncio.gather(*(bucket.acquire() for bucket in buckets))
    assert sorted(len(message.buckets) for message in redis.seen)[-2:] == [64, 64]
    assert sum(len(message.buckets) for message in redis.seen) >= 150
    assert now() < 0.1


async def test_a_token_that_comes_back_is_had_by_another_process_soon(start: Start) -> None:
    """It is told within a tenth of a second, and heard of within half a second more."""
    one, two = start(limit=1), start(limit=1)
    await one.acquire()
    task = two.waits()
    await asyncio.sleep(0.5)
    one.unused()
    await asyncio.sleep(SOON)
    assert task.done()


async def test_a_longer_round_trip_does_not_make_more_messages(
    redis: FakeRedis, start: Start
) -> None:
    """At a quarter of a second there and back as many tokens come with each."""
    redis.latency = lambda process: 0.125
    one = start(limit=300)
    await asyncio.gather(*(one.send() for _ in range(96)))
    assert redis.messages == 3
    assert now() == pytest.approx(0.75, abs=0.1)


# --- a loss of the count


async def test_on_a_new_server_no_token_is_given_at_first(start: Start, redis: FakeRedis) -> None:
    """It may have been another one a moment ago."""
    redis.flush()
    one = start()
    await asyncio.gather(*(one.send() for _ in range(5)))
    assert now() == pytest.approx(PAUSE, abs=SOONEST)


async def exhausted(*workers: Worker) -> None:
    """All tokens are out, of all processes alike."""
    for place in range(workers[0].bucket.limit):
        await workers[place % len(workers)].send()
    for one in workers:
        while one.bucket.on_wire:
            one.end()
    await asyncio.sleep(1)


@pytest.mark.parametrize("kind", ["flush", "restart", "roll back"])
async def test_after_a_loss_every_process_says_what_it_holds_before_tokens_are_given(
    redis: FakeRedis, start: Start, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """So nobody has a token before one of those that were out comes home."""
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
    assert now() == pytest.approx(60, abs=0.2)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(caplog.records)
    assert (
        1
        <= sum(
            "the rate limit's count in Redis was lost" in record.message
            for record in caplog.records
        )
        <= 3
    )
    assert bool(redis.evals) == (kind == "restart")


async def test_what_is_on_the_wire_during_a_loss_is_told_too(
    redis: FakeRedis, start: Start
) -> None:
    """And what is in hand; each with its lease, which does not begin anew."""
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


async def test_what_is_held_by_a_process_that_was_silent_is_told_after_a_loss(
    redis: FakeRedis, start: Start
) -> None:
    """Nobody waits in it, and it has nothing to say.

    But it says something every half a second while its tokens are out.
    """
    one, two = start(limit=5), start(limit=5)
    await exhausted(one)
    await passes(20)
    redis.flush()
    await two.send()
    assert now() == pytest.approx(60, abs=0.2)


async def test_after_two_losses_everything_is_told_twice(redis: FakeRedis, start: Start) -> None:
    """The second comes while the first is being repaired."""
    workers = [start(limit=6) for _ in range(3)]
    await exhausted(*workers)
    for _ in range(2):
        redis.flush()
        await asyncio.sleep(0.3)
    await asyncio.sleep(3)
    assert redis.out() == 6


async def test_a_loss_of_the_last_messages_only_is_noticed(redis: FakeRedis, start: Start) -> None:
    """Also where others have sent more messages since than were lost: a replica that was a moment
    behind has taken over."""
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


async def test_after_a_loss_of_the_last_messages_nobody_has_what_they_brought(
    redis: FakeRedis, start: Start
) -> None:
    """Whoever is the first to speak then."""
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


async def test_what_a_lost_answer_would_have_brought_goes_back(
    redis: FakeRedis, start: Start
) -> None:
    """Nobody knows whether it was given; it is there again when Redis is."""
    one = start(limit=5, share=1)
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
    """A client that tries again by itself when an answer is lost does no harm."""
    one = start(limit=5)
    redis.repeat = 1
    await asyncio.gather(*(one.send() for _ in range(5)))
    assert now() < 0.1
    assert redis.out() == 5


async def test_a_message_that_is_read_late_takes_nothing_from_anybody_for_long(
    redis: FakeRedis, start: Start
) -> None:
    """Redis stood still, was given up on, and finds in its socket what nobody waits for any
    more."""
    one, two = start(limit=5), start(limit=5)
    await one.send()
    one.end()
    redis.stall()
    tasks = [one.waits(), two.waits()]
    await asyncio.sleep(5)
    assert one.buckets._link.degraded
    redis.resume()
    await asyncio.gather(*tasks)
    assert now() < 10
    await asyncio.gather(two.send(), two.send())
    assert now() < 10
    assert redis.out() == 5


async def test_keys_expire_when_nobody_uses_them(redis: FakeRedis, start: Start) -> None:
    """A bucket's when all that was in it must have come home, and the marker after a day."""
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
    """A web service gives up soon, and a batch that shares its quota later."""
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


async def test_neither_names_nor_values_tell_a_secret(redis: FakeRedis) -> None:
    """Accounts and keys are there as a SHA-256."""
    key = ApiKey("secret-of-acme-0123", name="acme's key", account="acme's account")
    for scope in ("auto", "account", "key"):
        limit = RateLimit(scope=scope)
        async with fake_client(FakeServer(), rate_limit=limit, buckets=connected(redis)) as client:
            await client.balance(key)
            await client.balance("secret-of-nobody")
    text = redis.text()
    assert not any(word in text for word in ("secret", "acme", "nobody", key.digest.hex()))
    names = redis.keys()
    assert sum("account:" in name or "key:" in name for name in names) == 3


# --- without Redis, and "local"


async def test_without_redis_a_process_goes_on_with_tokens_of_its_own_that_come_home(
    redis: FakeRedis, start: Start
) -> None:
    """The others may have the rest; after a period and a request timeout with its whole share."""
    one, two = start(limit=12, share=1 / 3), start(limit=12)
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
    assert one.buckets._link.degraded
    assert not any(task.done() for task in tasks)
    await passes(61)
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 4
    settles = one.buckets._link.settles_at
    assert settles >= 30 + PERIOD + LATE
    await passes(settles - 0.1)
    assert [task.done() for task in tasks] == [True] * 2 + [False] * 4
    await passes(settles + 0.1)
    assert [task.done() for task in tasks] == [True] * 4 + [False] * 2
    for task in tasks:
        task.cancel()
    redis.down = False


async def test_its_share_is_no_more_than_the_limit_that_the_server_tells(
    redis: FakeRedis, start: Start
) -> None:
    """What is held back is held back, and what is to be followed is followed.

    One token at least.
    """
    one = start(limit=100, share=1 / 4)
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


async def test_a_process_that_never_had_redis_begins_after_a_period(
    redis: FakeRedis, start: Start
) -> None:
    """With nothing of its own there is nothing that is certainly not spent by others."""
    redis.down = True
    one = start(limit=8)
    tasks = [one.waits() for _ in range(3)]
    await asyncio.sleep(LEASE - 0.1)
    assert not any(task.done() for task in tasks)
    await asyncio.sleep(0.2)
    assert [task.done() for task in tasks] == [True, True, False]
    assert Waiting(one.buckets.tokens("/account/credits", None, 8)).tokens.room(now(), 0) == 2
    redis.down = False
    await tasks[2]


async def test_a_bucket_that_is_made_during_an_outage_has_nothing_before(
    redis: FakeRedis, start: Start
) -> None:
    """The others may have all of it."""
    one = start()
    redis.down = True
    task = one.waits()
    await asyncio.sleep(3)
    assert Waiting(one.buckets.tokens("/account/credits", None, 8)).tokens.room(now(), 0) == 0
    task.cancel()
    redis.down = False


async def test_a_call_that_cannot_wait_for_its_share_fails_at_its_deadline(
    redis: FakeRedis,
) -> None:
    """Redis might be back sooner. One that can wait is not sent away."""
    redis.down = True
    async with fake_client(
        WindowServer(), rate_limit=RateLimit(scope="client"), buckets=connected(redis)
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


async def test_a_moments_trouble_is_waited_for(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """While one process is cut off the others are served, so what it spends by itself would come on
    top."""
    one, two = start(limit=4, share=1), start(limit=4, share=1)
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
async def test_the_first_that_is_served_again_has_nothing_before_the_others_have_told(
    redis: FakeRedis, start: Start, late: bool
) -> None:
    """One has gone on alone, and the other was about to.

    Also where what they said meanwhile is read now.
    """
    one, two = start(limit=4, share=1 / 2), start(limit=4, share=1 / 2)
    for _ in range(4):
        await one.send()
        one.end()
    await passes(58.5)
    redis.stall()
    ones = [one.waits() for _ in range(2)]
    await asyncio.sleep(0.3)
    twos = [two.waits() for _ in range(4)]
    await asyncio.wait(ones)
    assert not two.buckets._link.degraded
    redis.resume(late=late)
    await asyncio.sleep(3)
    assert redis.out() == 4
    assert [task.done() for task in twos].count(True) == 2
    for task in twos:
        task.cancel()


async def test_an_outage_is_told_to_the_log_once_and_its_end_too(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """However often it is looked for meanwhile."""
    caplog.set_level(logging.INFO)
    one = start(limit=8, share=0.123456)
    await one.send()
    for _ in range(2):
        redis.down = True
        await asyncio.sleep(200)
        redis.down = False
        await asyncio.sleep(3)
        await one.acquire()
        one.unused()
        await one.send()
    goes_on = "degraded mode, for 81 s with its own returning tokens, then with 0.123 of the limit"
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", f"Redis is out of reach ({REFUSED}); {goes_on}, until it answers"),
        ("WARNING", "Redis answers again; the processes share one count of the rate limit"),
    ] * 2


async def test_it_is_looked_for_twice_a_second(redis: FakeRedis, start: Start) -> None:
    """Whatever is to be said meanwhile."""
    one = start(limit=100, share=1)
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


async def test_when_redis_is_back_every_process_says_what_it_has_out(
    redis: FakeRedis, start: Start
) -> None:
    """Also what it has given itself meanwhile; and what has come back it does not say."""
    one, two = start(limit=12, share=1 / 2), start(limit=12)
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


async def test_when_redis_is_back_nobody_has_what_another_has_not_told_yet(
    redis: FakeRedis, start: Start
) -> None:
    """Each finds it again at a time of its own; until all have, tokens are not given."""
    workers = [start(limit=8, share=1 / 4) for _ in range(4)]
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


async def test_what_a_process_could_give_itself_it_has_not_when_redis_is_back(
    redis: FakeRedis, start: Start
) -> None:
    """Nobody else knows of it, as long as no request has begun."""
    one = start(limit=4)
    redis.down = True
    await one.acquire()
    redis.down = False
    await asyncio.sleep(5)
    assert redis.out() == 0
    assert not one.start()


async def test_nobody_has_its_whole_share_while_slow_requests_of_before_may_arrive(
    redis: FakeRedis, start: Start
) -> None:
    """One process noticed the outage at once, the other was sending its last tokens, and these
    requests were slow."""
    one, two = start(limit=4, share=1 / 2), start(limit=4, share=1 / 2)
    await two.holds(4)
    redis.down = True
    tasks = [one.waits() for _ in range(2)]
    await asyncio.sleep(0.9)
    assert [two.start() for _ in range(4)] == [True] * 4
    arrives = (
        now() + 2 * LATE - 0.1
    )  # given up on after one, and arriving as late after that as it may
    await asyncio.sleep(LATE)
    for _ in range(4):
        two.abandon()
    assert one.buckets._link.degraded
    await asyncio.gather(*tasks)
    assert now() >= arrives + PERIOD
    redis.down = False


async def test_redis_that_hangs_is_gone_after_two_seconds(redis: FakeRedis, start: Start) -> None:
    """A call waits for it no longer, and does not hang."""
    one = start(limit=8, share=1)
    for _ in range(4):
        await one.send()
        one.end()
    await passes(30)
    redis.stall()
    task = one.waits()
    await asyncio.sleep(2.5)
    assert one.buckets._link.degraded
    await task
    assert now() == pytest.approx(60, abs=0.1)
    redis.resume()


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Event loop is closed"), TypeError("unexpected keyword"), ValueError("nonsense")],
)
async def test_whatever_the_client_raises_nobody_hangs(
    redis: FakeRedis, start: Start, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A client that belongs to another loop, or options that it does not know, are an outage
    too."""

    async def raises(*said: Any) -> None:
        raise error

    monkeypatch.setattr(redis, "evalsha", raises)
    one = start(limit=4)
    await asyncio.wait_for(one.send(), LEASE + 5)
    with pytest.raises(BucketsUnavailableError):
        await asyncio.wait_for(start(limit=4, on_outage="raise").send(), 5)


@pytest.mark.parametrize(
    "answer", [[], [[1, 2]], [[1, 1, 1, 0], [0]], [[1, 1, 0], [0]], None, b"OK"]
)
async def test_whatever_redis_answers_nobody_hangs(
    redis: FakeRedis, start: Start, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    """Another script, or something between here and there."""

    async def answers(*said: Any) -> Any:
        return answer

    monkeypatch.setattr(redis, "evalsha", answers)
    with pytest.raises(BucketsUnavailableError):
        await asyncio.wait_for(start(limit=4, on_outage="raise").send(), 5)


# --- without Redis, and "raise"


async def test_a_call_that_needs_a_token_fails_without_redis(redis: FakeRedis) -> None:
    """With an error that names its key, and nothing was sent."""
    server = FakeServer()
    async with fake_client(server, buckets=connected(redis, on_outage="raise")) as client:
        await client.balance(keys(1)[0])
        redis.down = True
        with pytest.raises(BucketsUnavailableError) as caught:
            await client.balance(keys(2)[1])
        assert (caught.value.key_name, caught.value.attempts) == ("k1", 0)
        assert str(caught.value) == (
            "k1: the count that the processes share is out of reach, as the log says; "
            "nothing was sent"
        )
        again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own
        assert (str(again), type(again)) == (str(caught.value), BucketsUnavailableError)
        report = await client.check(keys(3))
        assert [type(outcome.error) for outcome in report] == [BucketsUnavailableError] * 3
        assert [outcome.error.key_name for outcome in report if outcome.error] == ["k0", "k1", "k2"]
        redis.down = False
        assert (await client.check(keys(3))).ok
    assert len(server.arrivals) == 4


async def test_all_who_wait_are_told_that_redis_is_gone(redis: FakeRedis, start: Start) -> None:
    """Within two seconds, if it hangs; in whatever bucket."""
    one = start(limit=1, on_outage="raise")
    other = Waiting(one.buckets.tokens("/account/credits", None, 1))
    await one.send()
    await other.send()
    tasks = [
        asyncio.create_task(bucket.acquire()) for bucket in (one.waiting, other) for _ in range(2)
    ]
    await asyncio.sleep(1)
    redis.stall()
    done, _ = await asyncio.wait(tasks, timeout=2.5)
    assert len(done) == 4
    assert {type(task.exception()) for task in done} == {BucketsUnavailableError}
    redis.seen = []
    redis.resume(late=False)
    await asyncio.sleep(3)
    assert not any(asked.wanted for message in redis.seen for asked in message.buckets)


async def test_a_waiter_that_left_in_the_moment_of_the_outage_is_passed_over(
    redis: FakeRedis,
) -> None:
    """Its future is done already."""
    limit = RateLimit(requests=1, scope="client")
    async with fake_client(
        FakeServer(), rate_limit=limit, buckets=connected(redis, on_outage="raise")
    ) as client:
        await client.balance(keys(1)[0])
        left, stays = (asyncio.create_task(client.balance(key)) for key in keys(2, "late"))
        await asyncio.sleep(1)
        left.cancel()
        shared(client).fail()
        await asyncio.wait([left, stays])
        assert left.cancelled()
        assert isinstance(stays.exception(), BucketsUnavailableError)
        assert client.quota().waiting == 0


async def test_the_log_says_once_that_calls_fail(
    redis: FakeRedis, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """And once that they do no more."""
    one = start(limit=8, on_outage="raise")
    redis.down = True
    for _ in range(5):
        with pytest.raises(BucketsUnavailableError):
            await one.send()
        await asyncio.sleep(1.5)
    redis.down = False
    await one.send()
    assert [record.message for record in caplog.records] == [
        f"Redis is out of reach ({REFUSED}); calls fail until it answers",
        "Redis answers again; the processes share one count of the rate limit",
    ]


async def test_what_was_to_be_said_is_said_when_redis_is_back(
    redis: FakeRedis, start: Start
) -> None:
    """The token comes home as if nothing had been."""
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


async def test_an_outage_does_not_make_the_first_message_after_it_long(
    redis: FakeRedis, start: Start
) -> None:
    """What each call in vain may have brought is to go back.

    But not of all calls of a long outage.
    """
    one = start(limit=300, on_outage="raise")
    await one.send()
    redis.down = True
    for _ in range(3000):
        with pytest.raises(BucketsUnavailableError):
            await one.send()
        await asyncio.sleep(0.1)
    redis.down = False
    redis.seen = []
    await one.send()
    assert sum(len(asked.returned) for message in redis.seen for asked in message.buckets) < 1000


# --- closing


async def test_closing_says_what_is_still_to_be_said(redis: FakeRedis) -> None:
    """What was not used is there at once for others, and what has ended comes home in time."""
    server = FakeServer(lambda name, times: Reply(seconds=5.0))
    client = fake_client(
        server,
        rate_limit=RateLimit(requests=8, scope="client"),
        buckets=connected(redis),
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
async def test_closing_while_redis_is_gone_takes_no_longer_than_an_answer_may(
    redis: FakeRedis, how: str, on_outage: str, alone: bool
) -> None:
    """Whether that has been noticed or not."""
    buckets = connected(redis, on_outage=on_outage)
    client = fake_client(FakeServer(), buckets=buckets)
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


async def test_closing_ends_with_those_who_still_wait(redis: FakeRedis, start: Start) -> None:
    """Their messages are not waited for, one after the other."""
    one = start(limit=1)
    await one.send()
    tasks = [one.waits() for _ in range(3)]
    await asyncio.sleep(0.3)
    one.end()
    await asyncio.wait_for(one.close(), 5)
    for task in tasks:
        task.cancel()


async def test_a_second_close_does_nothing(redis: FakeRedis) -> None:
    """As with the client."""
    client = fake_client(FakeServer(), buckets=connected(redis))
    await client.balance(keys(1)[0])
    await client.close()
    await client.close()


async def test_a_closed_process_keeps_no_timers(redis: FakeRedis, start: Start) -> None:
    """Nor a task: the loop has nothing of it."""
    one, two = start(), start()
    await one.send()
    redis.cut.add(two.name)
    waiting = two.waits()
    await asyncio.sleep(2)
    for each in (one, two):
        await each.close()
        assert (
            each.buckets._link._timer,
            each.buckets._link._settling,
            each.buckets._link._task,
        ) == (None, None, None)
    waiting.cancel()


# --- whose it is


async def test_buckets_serve_one_client_only(redis: FakeRedis) -> None:
    """Each counts what its own client has under way."""
    buckets = connected(redis)
    async with fake_client(FakeServer(), buckets=buckets):
        with pytest.raises(
            ConfigurationError, match="make new RedisBuckets with the same prefix for each client"
        ):
            CreditsClient(buckets=buckets)


async def test_a_process_names_itself_when_it_first_speaks(redis: FakeRedis) -> None:
    """It may have been forked before."""
    one, two = connected(redis), connected(redis)
    assert one._link._process == two._link._process == ""
    async with (
        fake_client(FakeServer(), buckets=one) as client,
        fake_client(FakeServer(), buckets=two) as other,
    ):
        assert one._link._process == ""
        await client.balance(keys(1)[0])
        await other.balance(keys(1)[0])
    assert len({one._link._process, two._link._process, ""}) == 3
    assert redis.messages_of.keys() >= {one._link._process, two._link._process}


async def test_buckets_that_are_idle_are_forgotten(redis: FakeRedis) -> None:
    """Also while Redis is gone."""
    buckets = connected(redis)
    async with fake_client(
        FakeServer(), rate_limit=RateLimit(scope="key"), buckets=buckets
    ) as client:
        await client.check(keys(50))
        for number in range(40):
            await client.balance(keys(1, f"later-{number}")[0])
            await asyncio.sleep(10)
        gc.collect()
        assert len(buckets._link._all) < 20
