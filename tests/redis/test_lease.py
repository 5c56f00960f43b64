"""The leader's lease in virtual time, with the real script over a model of Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from redis.exceptions import AuthenticationError, NoPermissionError

from crustcredits import ClientClosedError, ConfigurationError
from crustcredits.redis import Lease, RedisBackend
from tests.redis.lua import EPOCH, FakeRedis, connected
from tests.virtual import VirtualLoop, now

pytestmark = pytest.mark.virtual

SPAN = 10.0
KEY = "{crustcredits}:lease:watcher"
TERM = "{crustcredits}:term:watcher"
# Most seconds after which a candidate has taken over.
TAKEOVER = 1.2 * SPAN


def lease(redis: FakeRedis, **options: Any) -> Lease:
    """A candidate of a process of its own."""
    return connected(redis).lease("watcher", **{"seconds": SPAN, **options})


def is_known(redis: FakeRedis) -> bool:
    """Whether Redis has a holder of the lease."""
    return KEY in list(redis.keys())


def is_leader(one: Lease) -> bool:
    """`is_held`, as a call: a checker of types takes a property for unchanged."""
    return one.is_held


def holder(redis: FakeRedis) -> str:
    """The name under which Redis has the leader, which is new for each term."""
    name, _ = redis.content(KEY)["text"].split()
    assert isinstance(name, str)
    return name


async def kill(redis: FakeRedis, leader: Lease) -> None:
    """End the leader's process. Its release does not reach Redis."""
    redis.cut.add(holder(redis))
    await leader.close()


def refuses(error: Exception) -> Callable[..., Awaitable[Any]]:
    """What Redis does with each message: it answers with this error."""

    async def evalsha(process: str, sha: str, count: int, *said: str | int) -> Any:
        raise error

    return evalsha


def enters(candidate: Lease) -> asyncio.Task[Lease]:
    return asyncio.create_task(candidate.__aenter__())


# --- one leader


async def test_the_lease_is_held_until_its_block_is_left(redis: FakeRedis) -> None:
    one = lease(redis)
    assert (is_leader(one), one.fencing_number) == (False, 0)
    async with one as entered:
        assert entered is one
        assert is_leader(one)
        number = one.fencing_number
        assert number == pytest.approx((EPOCH + now()) * 1e6, abs=1e6)
        assert is_known(redis)
    assert not is_leader(one)
    assert one.fencing_number == number
    assert not is_known(redis)


async def test_the_leader_renews_after_each_third_of_the_lease(redis: FakeRedis) -> None:
    """It stays the leader, with one fencing number and three messages in each lease's time."""
    async with lease(redis) as one:
        number, before = one.fencing_number, redis.messages
        other = enters(lease(redis))
        for _ in range(100):
            await asyncio.sleep(1)
            assert is_leader(one)
        assert redis.messages - before == pytest.approx(30 + 11, abs=4)
        assert not other.done()
        assert one.fencing_number == number
        other.cancel()


async def test_a_killed_leader_is_replaced(redis: FakeRedis) -> None:
    """Within 1.2 times the lease's time, with a higher fencing number, after few messages."""
    one = await lease(redis).__aenter__()
    candidate = lease(redis)
    entering = enters(candidate)
    await asyncio.sleep(SPAN * 3.4)
    await kill(redis, one)
    killed_at, before = now(), redis.messages
    await entering
    assert now() - killed_at <= TAKEOVER
    assert redis.messages - before <= 4
    assert candidate.fencing_number > one.fencing_number
    await candidate.__aexit__()


async def test_a_leader_that_leaves_is_replaced(redis: FakeRedis) -> None:
    """A process that comes then acquires the lease at once."""
    async with lease(redis) as one:
        pass
    async with lease(redis) as two:
        assert two.fencing_number > one.fencing_number
        assert now() < 0.1


async def test_two_leases_of_one_process_compete(redis: FakeRedis) -> None:
    backend = connected(redis)
    async with backend.lease("watcher"), backend.lease("another"):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60), backend.lease("watcher"):
                raise AssertionError


async def test_a_lease_object_serves_one_block(redis: FakeRedis) -> None:
    """Also after it: code that still has the object must not take a new term for the old one."""
    one = lease(redis)
    async with one:
        with pytest.raises(ConfigurationError, match=r"call backend\.lease\(\) for each block"):
            await one.__aenter__()
        assert is_leader(one)
    with pytest.raises(ConfigurationError, match="entered before"):
        await one.__aenter__()


async def test_a_candidate_seldom_asks_for_a_longer_lease(redis: FakeRedis) -> None:
    """Another process may use more seconds for the same lease."""
    async with lease(redis, seconds=3600):
        before = redis.messages
        entering = enters(lease(redis))
        await asyncio.sleep(10 * SPAN)
        assert 8 <= redis.messages - before <= 11
    await asyncio.sleep(TAKEOVER)
    assert entering.done()
    await (await entering).__aexit__()


async def test_a_candidate_seldom_asks_for_a_lease_that_never_expires(redis: FakeRedis) -> None:
    """An operator made the key permanent."""
    redis.spoil(KEY, "another 1")
    entering = enters(lease(redis))
    await asyncio.sleep(10 * SPAN)
    assert 8 <= redis.messages <= 11
    redis.flush()
    await asyncio.sleep(TAKEOVER)
    assert entering.done()
    await (await entering).__aexit__()


# --- the fencing number


async def test_fencing_numbers_ascend_when_redis_loses_its_data(redis: FakeRedis) -> None:
    one = await lease(redis).__aenter__()
    redis.flush()
    async with lease(redis) as two:
        assert two.fencing_number > one.fencing_number
    await one.__aexit__()


async def test_fencing_numbers_ascend_when_the_clock_is_set_back(redis: FakeRedis) -> None:
    async with lease(redis) as one:
        pass
    redis.clock = lambda: EPOCH - 3600 + now()
    async with lease(redis) as two:
        assert two.fencing_number == one.fencing_number + 1


async def test_fencing_numbers_ascend_after_a_failover_to_an_earlier_state(
    redis: FakeRedis,
) -> None:
    earlier = redis.snapshot()
    async with lease(redis) as one:
        redis.roll_back(earlier)
        async with lease(redis) as two:
            assert two.fencing_number > one.fencing_number


# --- a lease that is lost


def counted() -> tuple[list[float], Callable[[], None]]:
    """When `on_lost` was called, and the function."""
    times: list[float] = []
    return times, lambda: times.append(now())


async def test_the_lease_is_lost_when_redis_does_not_answer_in_time(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """After 0.9 of its time since the last renewal was asked for. It never comes back."""
    times, on_lost = counted()
    async with lease(redis, on_lost=on_lost) as one:
        await asyncio.sleep(SPAN / 2)  # the last renewal is at a third
        redis.down = True
        await asyncio.sleep(SPAN / 3 + 0.9 * SPAN - SPAN / 2 - 0.01)
        assert is_leader(one)
        assert times == []
        await asyncio.sleep(0.03)
        assert not is_leader(one)
        redis.down, number = False, one.fencing_number
        await asyncio.sleep(SPAN)
        assert not is_leader(one)
    assert times == [pytest.approx(SPAN / 3 + 0.9 * SPAN, abs=0.02)]
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "no reply from Redis for lease 'watcher'",
        "lease 'watcher' lost",
    ]
    assert f"lost (fencing number {number}), because Redis did not answer in time" in caplog.text


async def test_the_lease_is_released_when_it_is_lost(redis: FakeRedis) -> None:
    """Redis still has it, but lost the answers."""
    async with lease(redis) as one:
        redis.deaf.add(holder(redis))
        await asyncio.sleep(SPAN)
        assert not is_leader(one)
        assert not is_known(redis)


async def test_an_outage_shorter_than_the_lease_costs_nothing(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    times, on_lost = counted()
    async with lease(redis, on_lost=on_lost) as one:
        await asyncio.sleep(3)
        redis.down = True
        await asyncio.sleep(5.5)
        redis.down = False
        await asyncio.sleep(SPAN)
        assert is_leader(one)
    assert times == []
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "no reply from Redis for lease 'watcher'",
        "Redis answers again; lease 'watcher' continues",
    ]


async def test_a_password_that_is_changed_during_the_term_is_an_outage(
    redis: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lease(redis) as one:
        with monkeypatch.context() as fault:
            fault.setattr(redis, "evalsha", refuses(AuthenticationError("invalid")))
            await asyncio.sleep(5)
            assert is_leader(one)
        await asyncio.sleep(SPAN)
        assert is_leader(one)


@pytest.mark.parametrize("taken", [True, False])
async def test_the_lease_is_lost_when_redis_has_another_holder_or_none(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture, *, taken: bool
) -> None:
    """Another process holds it, or Redis lost it. Another's lease is not released."""
    times, on_lost = counted()
    another = lease(redis, seconds=60)
    async with lease(redis, on_lost=on_lost) as one:
        redis.flush()
        if taken:
            await another.__aenter__()
        await asyncio.sleep(SPAN / 2)
        assert not is_leader(one)
        assert times == [pytest.approx(SPAN / 3, abs=0.02)]
        messages = redis.messages
    assert redis.messages == messages
    assert is_known(redis) == taken
    assert "another process holds it, or Redis lost it" in caplog.text
    assert "stop the leader's work in this process" in caplog.text
    await another.close()


async def test_an_error_of_on_lost_is_logged(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    async with lease(redis, on_lost=lambda: 1 / 0):
        redis.flush()
        await asyncio.sleep(SPAN)
    assert "on_lost of the lease 'watcher' failed; correct the function" in caplog.text
    assert "ZeroDivisionError" in caplog.text


async def test_a_lost_lease_is_logged_without_on_lost(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    async with lease(redis):
        redis.flush()
        await asyncio.sleep(SPAN)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


# --- a process that stands still


def freeze(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.move(seconds)


async def test_a_process_that_stood_still_is_no_leader(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, before any timer; `on_lost` follows, and the renewal changes nothing."""
    times, on_lost = counted()
    async with lease(redis, on_lost=on_lost) as one:
        freeze(0.91 * SPAN)
        assert not is_leader(one)
        assert times == []
        await asyncio.sleep(SPAN)
        assert not is_leader(one)
        assert len(times) == 1
    assert "this process stood still" in caplog.text


async def test_a_lease_that_was_lost_by_the_clock_is_reported_on_leaving(redis: FakeRedis) -> None:
    """The block ended before any timer."""
    times, on_lost = counted()
    async with lease(redis, on_lost=on_lost):
        freeze(SPAN)
    assert len(times) == 1


async def test_an_answer_that_is_read_too_late_does_not_bring_the_lease_back(
    redis: FakeRedis,
) -> None:
    """The term had ended by then, so that it may have been seen as lost."""
    times, on_lost = counted()
    loop, ways = asyncio.get_running_loop(), iter(["there", "back"])

    def latency(process: str) -> float:
        # Something blocks the loop right before the task reads the answer to the first renewal.
        if next(ways, "") == "back":
            loop.call_at(now() + 0.2, loop.call_soon, freeze, 0.6 * SPAN)
        return 0.2

    async with lease(redis, on_lost=on_lost) as one:
        redis.latency = latency
        await asyncio.sleep(SPAN / 3 + 0.3)
        assert is_leader(one)
        await asyncio.sleep(0.2)
        assert now() > 0.9 * SPAN
        assert not is_leader(one)
        await asyncio.sleep(SPAN)
        assert not is_leader(one)
    assert len(times) == 1


async def test_an_answer_that_is_read_after_its_term_acquires_nothing(redis: FakeRedis) -> None:
    """A candidate that stood still asks again."""
    redis.latency = lambda process: 0.1
    one = lease(redis)
    entering = enters(one)
    await asyncio.sleep(0.15)
    freeze(0.9 * SPAN)
    await entering
    assert is_leader(one)
    await one.__aexit__()


# --- waiting


async def test_waiting_goes_on_during_an_outage(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """The log reports its start and its end, and messages are few."""
    redis.down = True
    entering = enters(lease(redis))
    await asyncio.sleep(600)
    assert redis.messages <= 1201
    redis.down = False
    await asyncio.sleep(1.1)
    one = await entering
    assert is_leader(one)
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "no reply from Redis for lease 'watcher'",
        "Redis answers again; this process competes for lease 'watcher' again",
    ]
    assert "this process waits until it answers" in caplog.text
    await one.__aexit__()


async def test_a_cancelled_wait_sends_nothing_more(redis: FakeRedis) -> None:
    async with lease(redis):
        candidate = enters(lease(redis))
        await asyncio.sleep(0.1)
        messages = redis.messages
        candidate.cancel()
        with pytest.raises(asyncio.CancelledError):
            await candidate
        assert redis.messages == messages


@pytest.mark.parametrize("after", [0.05, 0.15])
async def test_a_lease_of_a_cancelled_message_is_released_or_expires(
    redis: FakeRedis, after: float
) -> None:
    """The message was under way, or its answer. The lease is never renewed."""
    redis.latency = lambda process: 0.1
    entering = enters(lease(redis))
    await asyncio.sleep(after)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert not is_known(redis)
    messages = redis.messages
    await asyncio.sleep(3 * SPAN)
    assert redis.messages == messages


async def test_a_message_that_arrives_after_its_cancellation_expires(redis: FakeRedis) -> None:
    """Redis reads it after the release."""
    redis.stall()
    entering = enters(lease(redis))
    await asyncio.sleep(0.1)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    redis.resume()
    began = now()
    async with lease(redis):
        assert now() - began <= TAKEOVER


async def test_a_release_that_fails_raises_nothing(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with lease(redis):
        redis.down = True
    assert "was not released (ConnectionError: Error 111" in caplog.text
    assert "it expires within 10 s" in caplog.text


async def test_a_cancellation_during_the_release_does_not_stop_it(redis: FakeRedis) -> None:
    redis.latency = lambda process: 0.1
    one = await lease(redis).__aenter__()
    leaving = asyncio.create_task(one.__aexit__())
    await asyncio.sleep(0.05)
    assert not is_leader(one)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await asyncio.sleep(0.2)
    assert not is_known(redis)


async def test_an_error_of_the_block_is_raised(redis: FakeRedis) -> None:
    """Also when the lease was lost."""

    async def works() -> None:
        async with lease(redis):
            redis.flush()
            await asyncio.sleep(SPAN)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await works()


# --- messages that are lost or repeated


async def test_a_lease_whose_answer_was_lost_is_acquired_by_the_next_message(
    redis: FakeRedis,
) -> None:
    """It lasts for its whole time from there on."""
    redis.lose_answers = 4
    async with lease(redis) as one:
        assert 1.9 < now() < 2.1
        assert is_leader(one)
        await kill(redis, one)
        await asyncio.sleep(0.98 * SPAN)
        assert is_known(redis)


async def test_a_message_that_redis_py_repeats_acquires_one_term(redis: FakeRedis) -> None:
    async with lease(redis):  # from now on Redis knows the script, so the next message is enough
        pass
    redis.repeat = 1
    async with lease(redis) as one:
        number = str(one.fencing_number)
        assert redis.content(TERM) == {"text": number}
        assert redis.content(KEY) == {"text": f"{holder(redis)} {number}"}
        assert now() < 0.1


async def test_the_lease_of_an_earlier_run_is_not_taken_for_an_own_one(redis: FakeRedis) -> None:
    """The same process starts again, and waits until the earlier lease has expired."""
    one, earlier = await lease(redis).__aenter__(), holder(redis)
    await kill(redis, one)
    async with lease(redis):
        assert now() > 0.9 * SPAN
        assert holder(redis) != earlier


async def test_the_script_is_sent_again_after_script_flush(redis: FakeRedis) -> None:
    async with lease(redis) as one:
        redis.flush_scripts()
        await asyncio.sleep(2 * SPAN)
        assert is_leader(one)
    assert redis.evals == 2


# --- the backend


async def test_closing_the_backend_ends_its_leases(
    redis: FakeRedis, caplog: pytest.LogCaptureFixture
) -> None:
    """A held one is lost, and one that waits fails. Leaving the block then does nothing more."""
    times, on_lost = counted()
    backend = connected(redis)
    async with backend.lease("watcher", on_lost=on_lost) as one:
        waiting = enters(backend.lease("watcher"))
        await asyncio.sleep(1)
        await backend.close()
        assert not is_leader(one)
        assert len(times) == 1
        with pytest.raises(ClientClosedError, match="closed before this process got the lease"):
            await waiting
        assert not is_known(redis)
    assert len(times) == 1
    assert "the backend was closed" in caplog.text
    await one.close()


async def test_a_lease_that_was_never_entered_can_be_closed(redis: FakeRedis) -> None:
    await lease(redis).close()
    assert redis.messages == 0


async def test_a_wait_that_is_cancelled_as_it_fails_is_cancelled(
    redis: FakeRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller who cancelled it does not get the mistake instead."""

    async def fails(*said: object) -> None:
        asyncio.get_running_loop().call_soon(entering.cancel)
        raise NoPermissionError("no")

    monkeypatch.setattr(redis, "evalsha", fails)
    entering = enters(lease(redis))
    with pytest.raises(asyncio.CancelledError):
        await entering


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (AuthenticationError("x"), "refuses the user name or the password"),
        (NoPermissionError("x"), "no right to run the script"),
    ],
)
async def test_errors_that_do_not_heal_are_raised_on_entering(
    redis: FakeRedis, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    monkeypatch.setattr(redis, "evalsha", refuses(error))
    with pytest.raises(ConfigurationError, match=message):
        await lease(redis).__aenter__()
    assert redis.messages == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "name must be non-empty printable text"),
        ({"name": "a\nb"}, "name must be non-empty printable text"),
        ({"name": b"watcher"}, "name must be a str, not bytes"),
        ({"seconds": 0}, "of at least 0.01 and at most 86400, not 0"),
        ({"seconds": -1.0}, "seconds must be a finite number of seconds of at least 0"),
        ({"seconds": timedelta(0)}, "of at least 0.01"),
        ({"seconds": 1e6}, "at most 86400"),
        ({"seconds": float("nan")}, "finite number"),
        ({"seconds": "10"}, "not a str"),
        ({"on_lost": 5}, "on_lost must be a plain function"),
        ({"on_lost": asyncio.sleep}, "not a coroutine function"),
    ],
)
async def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    backend = RedisBackend("redis://localhost:1", on_outage="raise")
    with pytest.raises(ConfigurationError, match=message):
        backend.lease(**{"name": "watcher", **options})


async def test_a_duration_may_be_a_timedelta(redis: FakeRedis) -> None:
    async with lease(redis, seconds=timedelta(seconds=2)) as one:
        await kill(redis, one)
        await asyncio.sleep(1.98)
        assert is_known(redis)
        await asyncio.sleep(0.04)
        assert not is_known(redis)
