"""What a bucket can ask of whoever counts its tokens, the same for all of them: in the process, and in Redis.

In virtual time with the real script over a model of Redis; what has to do with time once more with a real server.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from unittest.mock import patch

import attrs
import pytest

from crustcredits import RateLimit, RateLimitWaitError
from crustcredits._debt import Told
from crustcredits._limits import TokenBucket
from crustcredits._tokens import LocalStore, TokenStore
from crustcredits._turn import Turn
from crustcredits.redis import _SCRIPT, RedisBuckets
from tests.lua import between, connected, opened, opening
from tests.servers import RedisServer, redis_server
from tests.virtual import WindowServer, fake_client, keys, now, run

__all__ = ["redis_server"]  # a fixture, found by its name

PATH = "/user/credits"
# Redis counts in microseconds of a clock of its own.
ROUNDING = 2e-3


@attrs.define
class World:
    """A place to count in. Of several times the ones that fit it; `slack` is by how much something may come later."""

    make_store: Callable[[], TokenStore]
    period: float = 60.0
    late: float = 10.0
    slack: float = math.inf
    stores: list[TokenStore] = attrs.field(factory=list)

    def store(self, *, period: float) -> TokenStore:
        store = self.make_store()
        store.open(period=period, late=self.late, pace=None)
        self.stores.append(store)
        return store

    def bucket(self, limit: int, *, period: float | None = None) -> TokenBucket:
        period = period or self.period
        tokens = self.store(period=period).tokens(PATH, None, limit)
        return TokenBucket(limit, period, late=self.late, tokens=tokens)

    async def takes(self, seconds: float, something: Awaitable[Any]) -> None:
        """It ends after so many seconds: no sooner, and in virtual time not much later."""
        began = now()
        await something
        assert seconds - ROUNDING <= now() - began <= seconds + self.slack


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """In the process, or in a model of Redis, in virtual time; or in a real one, with the shortest of periods."""
    if request.param == "real":
        server: RedisServer = request.getfixturevalue("redis_server")
        prefix = request.node.name
        marker, said = opening(prefix)
        server.ask("EVAL", _SCRIPT, 1, *marker, *said)
        world = World(lambda: RedisBuckets(server.url, prefix=prefix), period=0.04, late=0.01)
    elif request.param == "fake":
        redis = opened(latency=between(0.0, 0.002))
        world = World(lambda: connected(redis), slack=0.15)
    else:
        world = World(LocalStore, slack=0.001)
    yield world
    for store in world.stores:
        await store.close()


def virtually(test: Any) -> Any:
    """In virtual time, in the process and in a model of Redis."""
    return pytest.mark.virtual(pytest.mark.parametrize("world", ["process", "fake"], indirect=True)(test))


async def send(bucket: TokenBucket) -> int:
    token = await bucket.acquire()
    assert bucket.may_start(token, now())
    return bucket.start()


async def take(bucket: TokenBucket, log: list[str], name: str, turn: Turn | None = None) -> None:
    await bucket.acquire(turn)
    log.append(name)


def waits(bucket: TokenBucket, *, wanted: bool = True) -> tuple[Turn, asyncio.Task[int]]:
    turn = Turn()
    turn.wanted = wanted
    return turn, asyncio.create_task(bucket.acquire(turn))


class Alike:
    """What holds everywhere."""

    async def test_a_token_comes_home_one_period_after_its_end(self, world: World) -> None:
        """Not after its start: the request may have arrived as late as it ended."""
        bucket = world.bucket(1)
        await send(bucket)
        await asyncio.sleep(world.period / 4)
        bucket.ended()
        await world.takes(world.period, bucket.acquire())

    async def test_the_token_of_an_abandoned_request_comes_home_later(self, world: World) -> None:
        """It may still arrive."""
        bucket = world.bucket(1)
        await send(bucket)
        bucket.abandoned()
        await world.takes(world.period + world.late, bucket.acquire())

    async def test_a_token_on_the_wire_does_not_come_home(self, world: World) -> None:
        """However long it is there, up to what a request may take."""
        bucket = world.bucket(1)
        await send(bucket)
        _, task = waits(bucket)
        await asyncio.sleep(world.late)
        assert not task.done()
        bucket.ended()
        await world.takes(world.period, task)

    async def test_an_unused_token_is_free_at_once(self, world: World) -> None:
        """What certainly never left counts nowhere; whoever waits for it has it."""
        bucket = world.bucket(1, period=60.0)
        await bucket.acquire()
        _, task = waits(bucket)
        await asyncio.sleep(0.01)
        bucket.unused()
        await world.takes(0.0, task)

    async def test_the_token_of_an_unsent_request_is_free_at_once(self, world: World) -> None:
        """The server does not count it here after all."""
        bucket = world.bucket(1, period=60.0)
        await send(bucket)
        _, task = waits(bucket)
        await asyncio.sleep(0.01)
        bucket.unsent()
        await world.takes(0.0, task)

    async def test_nobody_waits_while_a_token_is_free(self, world: World) -> None:
        """As many as there are go at once, and no more."""
        bucket = world.bucket(70, period=60.0)
        tasks = [asyncio.create_task(send(bucket)) for _ in range(71)]
        await world.takes(0.0, asyncio.gather(*tasks[:70]))
        assert not tasks[70].done()
        tasks[70].cancel()

    async def test_first_come_first_served(self, world: World) -> None:
        """In the order of their coming, over several rounds."""
        bucket = world.bucket(2)
        log: list[str] = []
        tasks = [asyncio.create_task(take(bucket, log, str(number))) for number in range(6)]
        for task in tasks:
            await task
            bucket.start()
            bucket.ended()
        assert log == ["0", "1", "2", "3", "4", "5"]

    async def test_a_cancelled_waiter_costs_nothing_and_the_next_has_its_turn(self, world: World) -> None:
        """The token that it would have had is the next one's."""
        bucket = world.bucket(1)
        await send(bucket)
        (_, first), (_, second) = waits(bucket), waits(bucket)
        await asyncio.sleep(0)
        bucket.ended()
        first.cancel()
        await world.takes(world.period, second)

    async def test_buckets_of_different_places_do_not_share_tokens(self, world: World) -> None:
        """Paths, accounts and keys are counted apart."""
        store = world.store(period=60.0)
        for path, whose in [(PATH, None), ("/account/credits", None), (PATH, "acme"), (PATH, b"acme"), (PATH, "other")]:
            bucket = TokenBucket(1, 60.0, tokens=store.tokens(path, whose, 1))
            await world.takes(0.0, send(bucket))

    async def test_a_store_can_be_closed_while_tokens_are_out(self, world: World) -> None:
        """And when nothing was ever asked of it."""
        await world.store(period=60.0).close()
        bucket = world.bucket(2, period=60.0)
        await send(bucket)
        await bucket.acquire()
        await world.stores.pop().close()


@virtually
class TestInVirtualTime(Alike):
    """In the process, and in a model of Redis."""


@pytest.mark.parametrize("world", ["real"], indirect=True)
class TestWithAServer(Alike):
    """With short periods, on a real loop."""


# --- where a token is


# --- who has it


@virtually
async def test_a_waiter_cancelled_in_the_moment_of_its_grant_hands_the_token_on(world: World) -> None:
    """Nothing is lost between the grant and the waiter's awakening."""
    bucket = world.bucket(1)
    await bucket.acquire()
    (_, first), (_, second) = waits(bucket), waits(bucket)
    await asyncio.sleep(1)
    grant = TokenBucket._grant
    with patch.object(TokenBucket, "_grant", lambda *args, **kwargs: (grant(*args, **kwargs), first.cancel())[0]):
        bucket.unused()
        await asyncio.wait([first])
    await world.takes(0.0, second)
    assert first.cancelled()


@virtually
async def test_when_all_have_left_the_token_is_there_for_whoever_comes(world: World) -> None:
    """Those who left in the queue do not take it along."""
    bucket = world.bucket(3)
    for _ in range(3):
        await bucket.acquire()
    tasks = [waits(bucket)[1] for _ in range(50)]
    await asyncio.sleep(1)
    for task in tasks:
        task.cancel()
    await asyncio.sleep(1)
    for _ in range(3):
        bucket.unused()
    await world.takes(0.0, asyncio.gather(*(bucket.acquire() for _ in range(3))))


# --- what the server tells


@virtually
async def test_a_debt_holds_tokens_back(world: World) -> None:
    """Six are left of ten, of which one is ours and three are others'; after a period all are there."""
    bucket = world.bucket(10)
    mark = await send(bucket)
    bucket.heard(Told("somebody", now(), now(), 4, None), mark)
    bucket.ended()
    await asyncio.sleep(0.3)
    tasks = [asyncio.create_task(send(bucket)) for _ in range(9)]
    await asyncio.sleep(5)
    assert [task.done() for task in tasks] == [True] * 6 + [False] * 3
    await world.takes(60 - 5.3, asyncio.gather(*tasks))


@virtually
async def test_what_this_process_has_sent_is_no_debt(world: World) -> None:
    """Nor what it has under way."""
    bucket = world.bucket(10)
    marks = [await send(bucket) for _ in range(4)]
    bucket.heard(Told("somebody", now(), now(), 4, None), marks[-1])
    await asyncio.sleep(0.3)
    assert bucket.quota().debt == 0


@virtually
async def test_one_goes_beyond_a_debt_when_the_server_says_that_a_slot_is_free(world: World) -> None:
    """The others wait for what it learns."""
    bucket = world.bucket(10)
    mark = await send(bucket)
    began = now()
    bucket.heard(Told("somebody", began, began, 10, 20.0), mark)
    bucket.ended()
    await asyncio.sleep(0.3)
    tasks = [waits(bucket)[1] for _ in range(3)]
    await world.takes(20 - (now() - began), tasks[0])
    await asyncio.sleep(10)
    assert not tasks[1].done()
    bucket.start()
    bucket.heard(Told("somebody", now(), now(), 2, 20.0), 1)
    await world.takes(0.0, asyncio.gather(*tasks))


@virtually
async def test_when_the_one_that_was_to_find_out_has_left_the_next_does(world: World) -> None:
    """Also where it comes later."""
    bucket = world.bucket(10)
    mark = await send(bucket)
    bucket.heard(Told("somebody", now(), now(), 10, 20.0), mark)
    bucket.ended()
    _, task = waits(bucket)
    await asyncio.sleep(19)
    task.cancel()
    await asyncio.sleep(10)
    await world.takes(0.0, bucket.acquire())
    _, task = waits(bucket)
    await asyncio.sleep(10)
    assert not task.done()
    task.cancel()


@virtually
async def test_a_lower_limit_is_followed_and_a_higher_one(world: World) -> None:
    """More may be out than there are now; when there are more, those who wait go at once."""
    bucket = world.bucket(10)
    for _ in range(6):
        await send(bucket)
    bucket.follow(5)
    task = asyncio.create_task(send(bucket))
    await asyncio.sleep(5)
    assert not task.done()
    bucket.follow(8)
    await world.takes(0.0, task)
    await send(bucket)
    bucket.follow(5)
    for _ in range(8):
        bucket.ended()
        await asyncio.sleep(1)
    # Three of the eight have no successor: the fourth that comes home has the first.
    await world.takes(60 - 8 + 3, bucket.acquire())


@virtually
async def test_a_pause_holds_back_all_but_one(world: World) -> None:
    """Until that one is served."""
    bucket = world.bucket(10)
    for account in range(3):
        await send(bucket)
        bucket.refused(account, 30.0)
        bucket.ended()
    tasks = [waits(bucket)[1] for _ in range(3)]
    await world.takes(30.0, tasks[0])
    await asyncio.sleep(5)
    assert not tasks[1].done()
    bucket.succeeded()
    await world.takes(0.0, asyncio.gather(*tasks))


# --- what nobody waits for


@virtually
async def test_refreshes_leave_a_tenth_alone(world: World) -> None:
    """Eighteen of twenty go, evenly; the nineteenth when one of them has come home. Whoever is waited for goes at once."""
    bucket = world.bucket(20)
    times = []
    for _ in range(18):
        _, task = waits(bucket, wanted=False)
        await task
        bucket.start()
        bucket.ended()
        times.append(now())
    assert times[-1] - times[0] < 60
    nineteenth = waits(bucket, wanted=False)[1]
    await world.takes(0.0, send(bucket))
    await asyncio.sleep(times[0] + 60 - 0.1 - now())
    assert not nineteenth.done()
    await nineteenth
    assert now() - times[1] == pytest.approx(60, abs=1)


@virtually
async def test_a_refresh_that_is_wanted_takes_of_the_tenth_at_once(world: World) -> None:
    """Nobody who is waited for waits while a token is free."""
    bucket = world.bucket(10)
    for _ in range(9):
        await send(bucket)
    turn, task = waits(bucket, wanted=False)
    await asyncio.sleep(5)
    assert not task.done()
    turn.want()
    await world.takes(0.0, task)


# --- what it knows


@virtually
async def test_a_quota_says_what_is_out_and_how_long_more_would_take(world: World) -> None:
    """What is under way is taken to end now."""
    bucket = world.bucket(2)
    for _ in range(2):
        await send(bucket)
    bucket.ended()
    _, task = waits(bucket)
    await asyncio.sleep(10)
    quota = bucket.quota()
    assert (quota.limit, quota.free, quota.in_flight, quota.waiting) == (2, 0, 1, 1)
    assert quota.seconds_for(0) == pytest.approx(50, abs=0.1)
    assert quota.seconds_for(1) <= 60.1
    await task


@virtually
@pytest.mark.parametrize("out", [0, 1, 5])
async def test_a_quota_says_what_is_free(world: World, out: int) -> None:
    """As it was when that was last heard of."""
    bucket = world.bucket(5)
    for _ in range(out):
        await send(bucket)
    await asyncio.sleep(1)
    assert bucket.quota().free == 5 - out
    assert bucket.quota().seconds_for(5 - out) == 0


@virtually
@pytest.mark.parametrize("ends", [True, False])
async def test_what_is_to_come_is_never_later_than_it_comes(world: World, ends: bool) -> None:
    """So nobody is sent away who would have had a turn; what is on the wire ends now."""
    bucket = world.bucket(3)
    for _ in range(3):
        await send(bucket)
    if ends:
        for _ in range(3):
            bucket.ended()
    waiting = [waits(bucket) for _ in range(5)]
    await asyncio.sleep(1)
    expected = [turn.earliest(now()) for turn, _ in waiting]
    assert expected == sorted(expected)
    if not ends:
        for _ in range(3):
            bucket.ended()
    for (_, task), earliest in zip(waiting, expected, strict=True):
        await task
        assert earliest <= now() + ROUNDING
        bucket.start()
        bucket.ended()


@virtually
async def test_what_cannot_come_in_time_fails_at_once(world: World) -> None:
    """And says how long it would have had to wait."""
    server = WindowServer(limit=5)
    async with fake_client(server, rate_limit=RateLimit(requests=5, scope="client"), buckets=world.make_store()) as client:
        await client.check(keys(5))
        other = asyncio.create_task(client.balance(keys(1, "other")[0]))
        await asyncio.sleep(1)
        for _ in range(3):
            began = now()
            with pytest.raises(RateLimitWaitError) as caught:
                await client.balance(keys(1, "hasty")[0], timeout=30)
            assert now() == began
            assert 50 < caught.value.wait < 61
            await asyncio.sleep(1)
        other.cancel()


@virtually
async def test_it_is_as_good_as_new_when_all_have_come_home(world: World) -> None:
    """And not before, so that it can be forgotten then."""
    bucket = world.bucket(3)
    assert bucket.idle(now())
    await bucket.acquire()
    bucket.unused()
    await send(bucket)
    assert not bucket.idle(now())
    bucket.ended()
    await asyncio.sleep(59)
    assert not bucket.idle(now())
    await asyncio.sleep(2)
    assert bucket.idle(now())


@virtually
async def test_a_bucket_that_was_forgotten_is_the_same_when_it_is_made_anew(world: World) -> None:
    """Its tokens are all there, and come home as before."""
    store = world.store(period=60.0)
    for _ in range(3):
        bucket = TokenBucket(2, 60.0, late=10.0, tokens=store.tokens(PATH, b"digest", 2))
        for _ in range(2):
            await world.takes(0.0, send(bucket))
        bucket.ended()
        bucket.abandoned()
        await world.takes(60.0, send(bucket))
        bucket.ended()
        await asyncio.sleep(62)
        assert bucket.idle(now())


# --- closing


# --- all of it


@pytest.mark.parametrize("make", [lambda redis: None, connected], ids=["process", "fake"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_server_never_sees_more_than_the_limit(make: Callable[[Any], Any], seed: int) -> None:
    """Four times as many keys as the limit allows at once, and random delays: nothing is refused, and all end."""

    async def main() -> None:
        server = WindowServer(limit=30, period=10.0, seconds=(0.0, 2.0), seed=seed)
        buckets = make(opened(latency=between(0.0, 0.1, seed)))
        limit = RateLimit(requests=30, period=10.0, scope="client", pace=None)
        async with fake_client(server, rate_limit=limit, buckets=buckets) as client:
            report = await client.check(keys(120))
        assert report.ok
        assert (len(server.refused), server.worst_window()) == (0, 30)

    run(main())
