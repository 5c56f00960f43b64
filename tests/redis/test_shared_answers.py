"""Answers that processes share: one of them asks the API, within each one's own ages.

In virtual time, with the real script over a model of Redis.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crustcredits import (
    ApiKey,
    APITimeoutError,
    BackendUnavailableError,
    CreditsClient,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    PaymentRequiredError,
    RateLimit,
    Retry,
)
from crustcredits._http.transport_types import Failure, Fate
from tests.redis.lua import EPOCH, FakeRedis, connected, opened
from tests.redis.processes import vanish
from tests.virtual import FakeServer, Reply, fake_client, keys, now

pytestmark = pytest.mark.virtual

HASH = "{crustcredits}:epoch:answers"


class Fleet:
    """Clients of one API that share one Redis, and the API.

    Args:
        redis: Where they share answers.
        server: The API.
    """

    def __init__(self, redis: FakeRedis, server: FakeServer) -> None:
        self.redis = redis
        self.server = server
        self.backends: list[Any] = []
        self.clients: list[CreditsClient] = []

    def client(self, *, on_outage: str = "local", **options: Any) -> CreditsClient:
        backend = connected(
            self.redis, share_answers=True, fallback_share=1 / 4, on_outage=on_outage
        )
        options = {"max_age": 60, "rate_limit": RateLimit(scope="client", pace=None), **options}
        client = fake_client(self.server, backend=backend, **options)
        self.backends.append(backend)
        self.clients.append(client)
        return client

    def clients_(self, count: int, **options: Any) -> list[CreditsClient]:
        return [self.client(**options) for _ in range(count)]

    @property
    def asked(self) -> int:
        """How often the API was asked."""
        return len(self.server.arrivals)


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
async def fleet(redis: FakeRedis, server: FakeServer) -> Any:
    fleet = Fleet(redis, server)
    yield fleet
    for client in fleet.clients:
        await client.close()
    assert not redis.faults


# --- one of them asks


async def test_processes_ask_once_about_a_key(fleet: Fleet) -> None:
    clients, pool = fleet.clients_(4), keys(50)
    reports = await asyncio.gather(*(client.check(pool) for client in clients))
    assert all(report.ok for report in reports)
    assert fleet.asked == 50
    assert {outcome.source for report in reports for outcome in report} == {"fetched", "shared"}
    late = await fleet.client().check(pool)
    assert {(outcome.source, outcome.attempts) for outcome in late} == {("shared", 0)}
    assert fleet.asked == 50


async def test_a_single_call_finds_the_answer_of_another_process(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    fetched = await one.balance(key)
    await asyncio.sleep(0.2)
    began = now()
    found = await two.balance(ApiKey("secret-k-0", name="otherwise"))
    assert now() - began < 0.02
    assert found.credits == fetched.credits
    assert found.key.name == "otherwise"
    assert abs((found.checked_at - fetched.checked_at).total_seconds()) < 5
    assert fleet.asked == 1


async def test_callers_of_two_processes_at_once_share_one_request(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(seconds=3.0)
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await asyncio.gather(one.balance(key), two.balance(key))
    assert fleet.asked == 1
    assert now() < 4  # the second process notices within half a second


@pytest.mark.parametrize("options", [{"max_age": 0}, {"max_age": 0, "stale_if_error": 60}])
async def test_without_an_age_nothing_is_shared(
    fleet: Fleet, redis: FakeRedis, options: dict[str, float]
) -> None:
    for client in fleet.clients_(2, **options):
        await client.balance(keys(1)[0])
    assert fleet.asked == 2
    assert redis.content(HASH) is None


async def test_the_two_endpoints_have_answers_of_their_own(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    account = await two.account(key)
    assert account.credits == 9406
    assert fleet.asked == 2


async def test_clients_of_another_address_share_nothing(redis: FakeRedis) -> None:
    servers = FakeServer(), FakeServer()
    for place, server in enumerate(servers):
        server.origin = f"https://api-{place}.test"  # type: ignore[attr-defined]  # as a transport
        fleet = Fleet(redis, server)
        await fleet.client().balance(keys(1)[0])
        assert fleet.asked == 1
        await fleet.clients[0].close()


async def test_messages_are_few_although_answers_travel_in_them(
    fleet: Fleet, redis: FakeRedis
) -> None:
    """0.6 a call at most, also where nothing is found."""
    redis.latency = lambda process: 0.005
    clients = fleet.clients_(4, rate_limit=RateLimit(scope="client"))
    before = redis.messages
    await asyncio.gather(
        *(client.check(keys(75, f"of-{place}")) for place, client in enumerate(clients))
    )
    assert fleet.asked == 300
    assert redis.messages - before < 0.6 * 300


# --- ages


async def test_the_age_counts_from_the_start_of_the_request(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(seconds=5.0)
    one, two, three = fleet.clients_(3)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(54 - now())
    assert (await two.balance(key)).credits == 9406
    assert fleet.asked == 1
    await asyncio.sleep(61 - now())
    await three.balance(key)
    assert fleet.asked == 2


async def test_each_call_has_its_own_age(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(20)
    await two.balance(key, max_age=30)
    assert fleet.asked == 1
    await fleet.client().balance(key, max_age=10)
    assert fleet.asked == 2


async def test_a_found_answer_gets_old_in_the_cache_as_it_would_in_redis(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(40)
    await two.balance(key)
    await asyncio.sleep(19)
    await two.balance(key)
    assert fleet.asked == 1
    await asyncio.sleep(2)
    await two.balance(key)
    assert fleet.asked == 2


async def test_a_stale_answer_is_returned_at_once_and_refreshed_by_one_process(
    fleet: Fleet, server: FakeServer
) -> None:
    clients = fleet.clients_(4, stale_while_revalidate=60)
    (key,) = keys(1)
    await clients[0].balance(key)
    server.script = lambda name, times: Reply(seconds=1.0, credits="7")
    await asyncio.sleep(70)
    began = now()
    balances = await asyncio.gather(*(client.balance(key) for client in clients[1:]))
    assert now() - began < 0.1
    assert all(balance.credits == 9406 and balance.stale for balance in balances)
    await asyncio.sleep(3)
    fresh = await asyncio.gather(*(client.balance(key) for client in clients[1:]))
    assert all(balance.credits == 7 and not balance.stale for balance in fresh)
    assert fleet.asked == 2


async def test_a_stale_answer_stands_in_while_the_api_gives_none(
    fleet: Fleet, server: FakeServer
) -> None:
    one, two = fleet.clients_(2, stale_if_error=600, retry=Retry(attempts=1))
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(70)
    server.script = lambda name, times: Reply(status=500, body="{}")
    (outcome,) = await two.check([key])
    assert outcome.balance is not None
    assert outcome.stale
    assert isinstance(outcome.error, InternalServerError)


async def test_an_error_of_the_key_is_shared_as_long_as_max_error_age_allows(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(status=401, body='{"message": "Invalid API key"}')
    one, two, three = fleet.clients_(3, max_error_age=30)
    (key,) = keys(1)
    for client in (one, two):
        with pytest.raises(InvalidKeyError) as caught:
            await client.balance(ApiKey("secret-k-0", name="revoked"))
        assert caught.value.key_name == "revoked"
    assert fleet.asked == 1
    await asyncio.sleep(31)
    with pytest.raises(InvalidKeyError):
        await three.balance(key)
    assert fleet.asked == 2


async def test_a_caller_that_joins_with_a_smaller_error_age_gets_no_older_error(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(status=401, body='{"message": "Invalid API key"}')
    one, two = fleet.clients_(2, max_error_age=60)
    (key,) = keys(1)
    with pytest.raises(InvalidKeyError):
        await one.balance(key)
    await asyncio.sleep(20)
    fleet.redis.latency = lambda process: 0.2
    calls = two.balance(key), two.balance(key, max_error_age=1)
    await asyncio.gather(*calls, return_exceptions=True)
    assert fleet.asked == 2


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(status=502, body="<html>"), InternalServerError),
        (Reply(status=403, body="<html>"), GatewayError),
        (
            Reply(failure=Failure(APITimeoutError("late", key_name="k0"), Fate.ABANDONED)),
            APITimeoutError,
        ),
    ],
)
async def test_errors_that_do_not_concern_the_key_are_not_shared(
    fleet: Fleet, server: FakeServer, reply: Reply, kind: type[Exception]
) -> None:
    server.script = lambda name, times: reply
    for client in fleet.clients_(2, max_error_age=60, retry=Retry(attempts=1)):
        with pytest.raises(kind):
            await client.balance(keys(1)[0])
    assert fleet.asked == 2


async def test_an_older_answer_in_redis_replaces_no_newer_one_in_the_cache(fleet: Fleet) -> None:
    one, two = fleet.clients_(2, stale_if_error=600)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(20)
    newer = await two.balance(key, max_age=0)
    await asyncio.sleep(20)
    task = asyncio.create_task(two.balance(key, max_age=10))
    await asyncio.sleep(0.012)  # the answer of Redis has come, that of the API has not
    kept = two.peek(key)
    assert kept is not None
    assert kept.checked_at == newer.checked_at
    await task
    assert fleet.asked == 3


async def test_found_answers_are_bounded_in_the_cache_too(fleet: Fleet) -> None:
    one, two = fleet.client(), fleet.client(max_entries=1)
    pool = keys(2)
    await one.check(pool)
    await asyncio.sleep(0.2)
    for key in pool:
        await two.balance(key)
    assert [two.peek(key) is not None for key in pool] == [False, True]
    assert fleet.asked == 2


async def test_a_key_of_a_check_that_waits_for_its_turn_may_be_asked_for_anew(
    fleet: Fleet,
) -> None:
    """It has not looked for a shared answer yet, and does not."""
    one, two = fleet.clients_(2, rate_limit=RateLimit(requests=5_000, scope="client", pace=None))
    pool = keys(4_000)
    await one.balance(pool[-1])
    await asyncio.sleep(0.2)
    before = fleet.redis.messages
    check = asyncio.create_task(two.check(pool))
    for _ in range(100):
        if fleet.redis.messages > before:  # the first keys have looked
            break
        await asyncio.sleep(0)
    assert (await two.balance(pool[-1], max_age=0)).credits == 9406
    assert (await check).ok
    assert fleet.asked == 4_001


# --- who fetches


async def test_an_answer_that_is_being_fetched_is_waited_for_through_retries(
    fleet: Fleet, server: FakeServer
) -> None:
    """Also through the wait that the API asks for."""
    later = Reply(status=429, headers={"Retry-After": "20"}, body="{}")
    server.script = lambda name, times: later if times == 0 else Reply()
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await asyncio.gather(one.balance(key), two.balance(key))
    assert fleet.asked == 2
    assert 20 <= now() < 23


async def test_another_process_fetches_the_answer_of_a_killed_one(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(seconds=30.0 if times == 0 else 0.01)
    one, two = fleet.clients_(2, request_timeout=60.0)
    (key,) = keys(1)
    task = asyncio.create_task(one.balance(key))
    await asyncio.sleep(1)
    vanish(fleet.backends[0])
    await two.balance(key)
    assert now() < 1 + 5 + 1
    task.cancel()


async def test_another_process_fetches_an_answer_that_is_given_up(
    fleet: Fleet, server: FakeServer
) -> None:
    """Its caller has left before its request started, because the limit was used up."""
    one, two = fleet.clients_(2, rate_limit=RateLimit(requests=1, scope="client", pace=None))
    first, second = keys(2)
    await one.balance(first)
    task = asyncio.create_task(one.balance(second))
    await asyncio.sleep(1)
    waits = asyncio.create_task(two.balance(second))
    await asyncio.sleep(1)
    task.cancel()
    await waits
    assert fleet.asked == 2
    assert now() < 62


async def test_a_failed_fetch_leaves_the_answer_to_the_next_process(
    fleet: Fleet, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(status=500 if times == 0 else 200, body=None)
    one, two = fleet.clients_(2, retry=Retry(attempts=1))
    (key,) = keys(1)
    results = await asyncio.gather(one.balance(key), two.balance(key), return_exceptions=True)
    assert sum(isinstance(result, InternalServerError) for result in results) == 1
    assert fleet.asked == 2


async def test_a_caller_with_little_time_finds_an_answer_although_no_request_may_start(
    fleet: Fleet,
) -> None:
    one, two = fleet.clients_(2, rate_limit=RateLimit(requests=3, scope="client", pace=None))
    pool = keys(3)
    await one.check(pool)
    assert (await two.check(pool, timeout=5)).ok
    assert (
        await fleet.client(rate_limit=RateLimit(requests=3, scope="client")).balance(
            pool[0], timeout=5
        )
    ).credits == 9406
    assert fleet.asked == 3


async def test_a_caller_that_wants_a_new_answer_ends_the_search(fleet: Fleet) -> None:
    """It joins the call of a caller that accepts an older one."""
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    fleet.redis.latency = lambda process: 0.2
    balances = await asyncio.gather(two.balance(key), two.balance(key, max_age=0))
    assert fleet.asked == 2
    assert {balance.credits for balance in balances} == {9406}


async def test_a_caller_that_joins_with_a_smaller_age_gets_no_older_answer(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(30)
    fleet.redis.latency = lambda process: 0.2
    await asyncio.gather(two.balance(key), two.balance(key, max_age=10))
    assert fleet.asked == 2


async def test_processes_that_wait_for_an_answer_take_it_although_it_is_old_by_then(
    fleet: Fleet, server: FakeServer
) -> None:
    """As callers in one process do that join a request. Else each would ask after the other."""
    server.script = lambda name, times: Reply(seconds=2.0)
    clients = fleet.clients_(8, max_age=1)
    (key,) = keys(1)
    await asyncio.gather(*(client.balance(key) for client in clients))
    assert fleet.asked == 1
    assert now() < 3


async def test_a_fetch_whose_beginning_was_lost_is_given_back(
    fleet: Fleet, redis: FakeRedis
) -> None:
    """The caller has left, and this process still fetches other answers."""
    one, two = fleet.clients_(2)
    first, second = keys(2)
    fleet.server.script = lambda name, times: Reply(seconds=20.0 if name == "k1" else 0.01)
    busy = asyncio.create_task(one.balance(second, timeout=60))
    await asyncio.sleep(0.7)
    redis.latency = lambda process: 0.05
    task = asyncio.create_task(one.balance(first))
    await asyncio.sleep(0.02)
    redis.lose_answers = 1
    task.cancel()
    await asyncio.sleep(2)
    began = now()
    await two.balance(first)
    assert now() - began < 1
    busy.cancel()


async def test_a_fetch_that_ends_in_an_outage_is_given_back(
    fleet: Fleet, redis: FakeRedis, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(seconds=2.0 if name == "k0" else 30.0)
    one, two = fleet.clients_(2, request_timeout=60.0)
    first, second = keys(2)
    tasks = [asyncio.create_task(one.balance(key)) for key in (first, second)]
    await asyncio.sleep(0.5)
    redis.down = True
    await asyncio.sleep(5)
    redis.down = False
    await asyncio.sleep(3)
    began = now()
    await two.balance(first, timeout=100)
    assert now() - began < 3
    for task in tasks:
        task.cancel()


async def test_an_older_statement_of_another_process_does_not_replace_a_newer_one(
    fleet: Fleet, server: FakeServer
) -> None:
    one, two = fleet.clients_(2, max_error_age=60)
    (key,) = keys(1)
    server.script = lambda name, times: Reply(status=402, body='{"message": "no credits"}')
    with pytest.raises(PaymentRequiredError):
        await one.balance(key)
    await asyncio.sleep(20)
    server.script = lambda name, times: Reply()
    await two.balance(key, max_age=0)
    await asyncio.sleep(5)
    assert (await two.balance(key, max_age=3)).credits == 9406
    assert (await two.balance(key)).credits == 9406


async def test_an_account_is_not_fresh_after_its_next_grant(
    fleet: Fleet, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    soon = (datetime.now(UTC) + timedelta(seconds=10)).isoformat()
    fields = f'"credits": 100, "recurring_credits_refresh_date": "{soon}"'
    server.script = lambda name, times: Reply(body=f'{{"account": {{{fields}}}}}')
    await one.account(key)
    await asyncio.sleep(0.2)
    later = time.time() + 20  # the grant is by the wall clock
    monkeypatch.setattr("crustcredits._cache.cache_entry.time.time", lambda: later)
    await two.account(key)
    assert fleet.asked == 2


async def test_a_shared_error_is_cached(fleet: Fleet, redis: FakeRedis, server: FakeServer) -> None:
    server.script = lambda name, times: Reply(status=401, body='{"message": "Invalid API key"}')
    one, two = fleet.clients_(2, max_error_age=30)
    (key,) = keys(1)
    with pytest.raises(InvalidKeyError):
        await one.balance(key)
    await asyncio.sleep(20)
    with pytest.raises(InvalidKeyError):
        await two.balance(key)
    before = redis.messages
    for _ in range(20):
        with pytest.raises(InvalidKeyError):
            await two.balance(key)
    assert redis.messages == before
    await asyncio.sleep(11)
    with pytest.raises(InvalidKeyError):
        await two.balance(key)
    assert fleet.asked == 2


async def test_a_caller_that_leaves_ends_the_search(fleet: Fleet) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    fleet.redis.latency = lambda process: 0.2
    task = asyncio.create_task(one.balance(key))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.sleep(0.5)
    began = now()
    await two.balance(key)
    assert now() - began < 1.5  # the lease that came too late was given back
    assert fleet.asked == 1


# --- invalidation


@pytest.mark.parametrize("all_keys", [False, True])
async def test_an_invalid_answer_does_not_come_back(
    fleet: Fleet, server: FakeServer, all_keys: bool
) -> None:
    """Not even from a request that was on the wire then."""
    server.script = lambda name, times: Reply(
        seconds=2.0 if times == 0 else 0.01, credits=str(times)
    )
    one, two, three = fleet.clients_(3)
    (key,) = keys(1)
    slow = asyncio.create_task(one.balance(key))
    await asyncio.sleep(1)
    two.invalidate(None if all_keys else key)
    assert (await two.balance(key)).credits == 1  # in the same message
    assert (await slow).credits == 0
    await asyncio.sleep(1)
    assert (await three.balance(key)).credits == 1
    assert fleet.asked == 2


async def test_many_invalidations_come_before_the_searches_that_follow(fleet: Fleet) -> None:
    """They do not fit into one message."""
    one, two = fleet.clients_(2)
    pool = keys(200)
    await one.check(pool)
    await asyncio.sleep(0.2)
    for key in pool:
        two.invalidate(key)
    assert (await two.check(pool)).ok
    assert fleet.asked == 400


async def test_an_invalidation_of_all_is_remembered_longer_than_the_answers_of_before(
    fleet: Fleet,
) -> None:
    one, two = fleet.clients_(2, max_age=3600)
    pool = keys(5)
    await one.check(pool)
    await asyncio.sleep(0.2)
    two.invalidate()
    await asyncio.sleep(700)
    assert (await two.check(pool)).ok
    assert fleet.asked == 10


def test_an_invalidation_outside_of_the_loop_goes_with_the_next_message(server: FakeServer) -> None:
    redis = opened(clock=lambda: EPOCH)
    client = fake_client(server, backend=connected(redis, share_answers=True), max_age=60)
    client.invalidate(keys(1)[0])


async def test_an_answer_of_before_an_invalidation_is_not_found(fleet: Fleet) -> None:
    one, two, three = fleet.clients_(3)
    (key,) = keys(1)
    await one.balance(key)
    two.invalidate(key)
    await asyncio.sleep(0.1)
    await three.balance(key)
    assert fleet.asked == 2


async def test_a_call_of_before_an_invalidation_does_not_free_the_answer_of_its_successor(
    fleet: Fleet, server: FakeServer
) -> None:
    """Both are of one process. The first one fails while the second one still fetches."""
    server.script = lambda name, times: (
        Reply(seconds=2.0, status=500, body="{}") if times == 0 else Reply(seconds=5.0)
    )
    one, two = fleet.clients_(2, retry=Retry(attempts=1))
    (key,) = keys(1)
    before = asyncio.create_task(one.balance(key))
    await asyncio.sleep(1)
    one.invalidate(key)
    after = asyncio.create_task(one.balance(key))
    await asyncio.sleep(2)
    await asyncio.gather(two.balance(key), after)
    assert isinstance(before.exception(), InternalServerError)
    assert fleet.asked == 2


# --- Redis


async def test_an_answer_that_arrives_while_redis_is_lost_is_not_shared(
    fleet: Fleet, redis: FakeRedis, server: FakeServer
) -> None:
    server.script = lambda name, times: Reply(seconds=8.0)
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    task = asyncio.create_task(one.balance(key))
    await asyncio.sleep(1)
    redis.down = True
    await task
    redis.down = False
    await asyncio.sleep(5)
    await two.balance(key)
    assert fleet.asked == 2


async def test_without_redis_each_process_asks_for_itself(fleet: Fleet, redis: FakeRedis) -> None:
    one, two = fleet.clients_(2)
    first, second = keys(2)
    await one.balance(first)
    redis.down = True
    await asyncio.sleep(4)
    one.invalidate(first)
    assert (await one.balance(first, timeout=200)).credits == 9406
    assert (await two.balance(first, timeout=200)).credits == 9406
    assert fleet.asked == 3
    redis.down = False
    await asyncio.sleep(10)
    await one.balance(second, timeout=200)
    await two.balance(second, timeout=200)
    assert fleet.asked == 4


async def test_a_caller_without_an_age_that_joins_while_redis_is_lost_starts_no_second_request(
    fleet: Fleet, redis: FakeRedis
) -> None:
    """The call has just learned that nothing can be found."""
    one = fleet.client(on_outage="local")
    pool = keys(3)
    await one.balance(keys(1, "first")[0])
    redis.down = True
    await asyncio.sleep(100)
    for key in pool:
        await asyncio.gather(one.balance(key), one.balance(key, max_age=0))
    assert fleet.asked == 4
    assert one.quota().in_flight == 0


async def test_a_call_that_looks_when_redis_is_lost_goes_on(fleet: Fleet, redis: FakeRedis) -> None:
    one = fleet.client(on_outage="raise")
    first, second = keys(2)
    await one.balance(first)
    redis.down = True
    with pytest.raises(BackendUnavailableError):
        await one.balance(second)
    assert now() < 4


async def test_an_answer_is_published_although_a_message_is_lost(
    fleet: Fleet, redis: FakeRedis
) -> None:
    one, two = fleet.clients_(2)
    (key,) = keys(1)
    await one.balance(key)
    redis.down = True
    await asyncio.sleep(0.3)
    redis.down = False
    await asyncio.sleep(1)
    await two.balance(key)
    assert fleet.asked == 1


async def test_a_lost_count_costs_no_search(fleet: Fleet, redis: FakeRedis) -> None:
    one, two = fleet.clients_(2)
    first, second = keys(2)
    await one.balance(first)
    redis.flush()
    await asyncio.gather(one.balance(second), two.balance(second))
    assert fleet.asked == 2


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "2 1 0 1 - e30=",
        "1 {now} 0 1 - !!!",
        "1 {now} 0 1 - e30=",
        "1 {now} 0 1 - bnVsbA==",
        "1 {now} 0 2 - {balance}",
        "1 {future} 0 1 - {balance}",
    ],
)
async def test_a_spoilt_answer_is_replaced(fleet: Fleet, redis: FakeRedis, text: str) -> None:
    one, two, three = fleet.clients_(3)
    (key,) = keys(1)
    await one.balance(key)
    await asyncio.sleep(1)
    fields = redis.content(HASH)
    ((name, good),) = fields.items()
    asked = int(good.split()[1])
    redis.spoil(
        HASH,
        {
            name: text.format(now=asked, future=asked + 10**9, balance=good.split()[-1]),
        },
    )
    assert (await two.balance(key)).credits == 9406
    assert fleet.asked == 2
    await asyncio.sleep(1)
    assert (await three.balance(key)).credits == 9406
    assert fleet.asked == 2


async def test_redis_learns_no_secret_and_no_name(fleet: Fleet, redis: FakeRedis) -> None:
    client = fleet.client()
    await client.balance(ApiKey("crust-secret-value", name="label-of-key", account="acme"))
    await asyncio.sleep(1)
    text = redis.text()
    assert len(redis.content(HASH)) == 1
    assert not [word for word in ("crust-secret", "label-of-key", "acme") if word in text]


@pytest.mark.parametrize(
    "body",
    [
        '{"credits": 1, "echo": "SECRET-k-0"}',
        '{"credits": 1, "echo": "\\u0073ecret-k-0"}',
        '{"credits": 1, "fill": "' + "x" * 5000 + '"}',
        '{"credits": 1, "fill": "' + "é" * 1100 + '"}',
    ],
)
async def test_an_answer_that_repeats_the_secret_or_is_large_is_not_shared(
    fleet: Fleet, server: FakeServer, redis: FakeRedis, body: str
) -> None:
    server.script = lambda name, times: Reply(body=body)
    for client in fleet.clients_(2):
        assert (await client.balance(keys(1)[0])).credits == 1
    assert fleet.asked == 2
    assert "{" not in "".join(redis.content(HASH).values())


async def test_answers_are_forgotten_when_no_process_needs_them(
    fleet: Fleet, redis: FakeRedis
) -> None:
    one = fleet.client()
    await one.check(keys(20))
    await asyncio.sleep(1)
    assert len(redis.content(HASH)) == 20
    await asyncio.sleep(120)
    await one.check(keys(1, "later"))
    await asyncio.sleep(1)
    assert len(redis.content(HASH)) == 1


async def test_a_process_at_rest_says_nothing(fleet: Fleet, redis: FakeRedis) -> None:
    one = fleet.client()
    await one.check(keys(5))
    await asyncio.sleep(70)
    before = redis.messages
    await asyncio.sleep(100)
    assert redis.messages == before
