"""`FanOut`: room, order and endings, in virtual time, with an `ask` that needs no client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from crustcredits import ApiKey, Balance, Known, Outcome
from crustcredits._fan_out import Ask, FanOut, Land
from crustcredits._keys.api_key import Key
from crustcredits._keys.key_pool import async_pool_of
from tests.virtual import keys, now

pytestmark = pytest.mark.virtual

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Asker:
    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.asked: list[str] = []
        self.under_way = 0
        self.most = 0

    async def __call__(self, key: Key) -> Outcome[Balance]:
        assert isinstance(key, ApiKey)
        self.asked.append(key.name)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.under_way -= 1
        balance = Balance(key=key, credits=Decimal(1), checked_at=NOON)
        return Known(balance=balance)


def begins(ask: Callable[[Key], Coroutine[Any, Any, Outcome[Any]]]) -> Ask:
    """The same as a callback function: the outcome of a key lands."""

    def begin(key: Key, land: Land) -> Callable[[], None]:
        def on_done(task: asyncio.Task[Outcome[Any]]) -> None:
            if task not in given_up:
                land(
                    asyncio.CancelledError()
                    if task.cancelled()
                    else task.exception() or task.result()
                )

        def give_up() -> None:
            given_up.add(task)
            task.cancel()

        given_up: set[asyncio.Task[Outcome[Any]]] = set()
        task = asyncio.create_task(ask(key))
        task.add_done_callback(on_done)
        return give_up

    return begin


async def tasks() -> int:
    """The number of tasks once the cancelled ones have ended."""
    for _ in range(3):
        await asyncio.sleep(0)
    return len(asyncio.all_tasks())


async def names(stream: Any) -> list[str]:
    return [outcome.key.name async for outcome in stream]


async def test_every_key_has_an_outcome_with_at_most_room_keys_under_way() -> None:
    """`room` bounds the tasks, not the number of keys."""
    ask = Asker()
    assert sorted(await names(FanOut(begins(ask), room=4).outcomes(iter(keys(10))))) == [
        f"k{number}" for number in range(10)
    ]
    assert ask.most == 4
    assert now() == pytest.approx(3, abs=1e-3)
    assert await tasks() == 1


async def test_an_empty_source_yields_no_outcomes() -> None:
    """The fan-out ends at once."""
    assert await names(FanOut(begins(Asker()), room=4).outcomes(iter([]))) == []


async def test_a_slow_consumer_delays_further_keys() -> None:
    """Outcomes that have not been taken count against `room`, so memory stays bounded."""
    ask = Asker(seconds=0.0)
    stream = FanOut(begins(ask), room=4).outcomes(iter(keys(100)))
    async with aclosing(stream):
        await anext(stream)
        await asyncio.sleep(10)
        assert len(ask.asked) == 5


async def test_an_exception_of_the_source_is_raised_after_the_keys_under_way() -> None:
    """No outcome is lost, and the caller gets the exception of the source."""

    def source() -> Iterator[Key]:
        yield from keys(2)
        raise LookupError("the database is gone")

    stream = FanOut(begins(Asker()), room=4).outcomes(source())
    landed = {(await anext(stream)).key.name for _ in range(2)}
    with pytest.raises(LookupError, match="the database is gone"):
        await anext(stream)
    assert landed == {"k0", "k1"}
    assert await tasks() == 1


async def test_an_asynchronous_source_is_read_while_outcomes_are_yielded() -> None:
    """Outcomes are yielded while the next key is still awaited."""

    async def source() -> AsyncGenerator[Key, None]:
        for key in keys(3):
            yield key
            await asyncio.sleep(5)

    times = [now() async for _ in FanOut(begins(Asker()), room=4).outcomes(source())]
    assert times == pytest.approx([1, 6, 11], abs=1e-3)


async def test_leaving_early_cancels_and_awaits_the_rest() -> None:
    """No task outlives the generator."""
    ask = Asker()
    async with aclosing(FanOut(begins(ask), room=10).outcomes(iter(keys(50)))) as stream:
        await anext(stream)
    assert await tasks() == 1
    assert ask.under_way == 0


async def test_cancelling_the_consumer_cancels_and_awaits_the_rest() -> None:
    """This holds at any moment of the fan-out."""
    for moment in (0.0, 0.5, 1.0, 1.5):
        ask = Asker()
        consumer = asyncio.create_task(names(FanOut(begins(ask), room=10).outcomes(iter(keys(50)))))
        await asyncio.sleep(moment)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert await tasks() == 1
        assert ask.under_way == 0


async def test_an_exception_that_lands_ends_the_fan_out() -> None:
    """Failures of a key are outcomes; an exception is none."""

    async def ask(key: Key) -> Outcome[Balance]:
        await asyncio.sleep(0 if key.name == "k3" else 9)
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        await names(FanOut(begins(ask), room=10).outcomes(iter(keys(10))))
    assert await tasks() == 1


async def test_an_exception_that_ask_raises_ends_the_fan_out() -> None:
    """A closed client raises in this way."""

    def ask(key: Key, land: Land) -> Callable[[], None]:
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        await names(FanOut(ask, room=10).outcomes(iter(keys(10))))
    assert await tasks() == 1


async def test_an_outcome_that_lands_at_once_is_yielded() -> None:
    """A cached outcome lands in this way."""

    def ask(key: Key, land: Land) -> Callable[[], None]:
        assert isinstance(key, ApiKey)
        land(Known(balance=Balance(key=key, credits=Decimal(1), checked_at=NOON)))
        return lambda: None

    assert len(await names(FanOut(ask, room=4).outcomes(iter(keys(2_500))))) == 2_500


@pytest.mark.parametrize("kind", [LookupError, asyncio.CancelledError])
async def test_an_exception_of_an_asynchronous_source_ends_the_fan_out(
    kind: type[BaseException],
) -> None:
    """A cancellation inside the source counts too, and the keys under way land first."""

    async def source() -> AsyncGenerator[Key, None]:
        yield keys(1)[0]
        raise kind

    stream = FanOut(begins(Asker()), room=4).outcomes(source())
    assert (await anext(stream)).key.name == "k0"
    with pytest.raises(kind):
        await anext(stream)
    assert await tasks() == 1


async def test_a_cancelled_call_ends_the_fan_out() -> None:
    """Its key has no outcome, and no key is left out silently."""

    async def ask(key: Key) -> Outcome[Balance]:
        if key.name == "k1":
            raise asyncio.CancelledError
        return await Asker()(key)

    with pytest.raises(asyncio.CancelledError):
        await names(FanOut(begins(ask), room=10).outcomes(iter(keys(3))))
    assert await tasks() == 1


async def test_an_asynchronous_source_is_closed_on_every_exit() -> None:
    """A database cursor in the source must not stay open."""
    closed: list[int] = []

    async def source() -> AsyncGenerator[str, None]:
        try:
            for number in range(100):
                yield f"secret-{number}"
        finally:
            await asyncio.sleep(0)
            closed.append(now() > 0)

    async with aclosing(
        FanOut(begins(Asker()), room=2).outcomes(async_pool_of(source()))
    ) as stream:
        await anext(stream)
    assert len(closed) == 1
    await names(FanOut(begins(Asker()), room=200).outcomes(async_pool_of(source())))
    assert len(closed) == 2
    assert await tasks() == 1


async def test_end_interrupts_the_wait_for_an_asynchronous_source() -> None:
    """Closing the client ends a fan-out in this way."""

    async def source() -> AsyncGenerator[Key, None]:
        await asyncio.sleep(3600)
        yield keys(1)[0]

    run = FanOut(begins(Asker()), room=4)
    consumer = asyncio.create_task(names(run.outcomes(source())))
    await asyncio.sleep(1)
    run.end(LookupError("closed"))
    with pytest.raises(LookupError, match="closed"):
        await consumer
    assert now() == pytest.approx(1, abs=0.01)
    assert await tasks() == 1


@pytest.mark.parametrize("is_async", [False, True])
async def test_end_stops_the_reading_of_the_source_while_no_outcome_is_read(
    *, is_async: bool
) -> None:
    """The outcomes that have landed are still yielded."""
    ask, taken = Asker(), 0
    closed: list[float] = []

    def source() -> Iterator[Key]:
        nonlocal taken
        for key in keys(50):
            taken += 1
            yield key

    async def as_generator() -> AsyncGenerator[Key, None]:
        try:
            for key in source():
                yield key
        finally:
            await asyncio.sleep(1)
            closed.append(now())

    run = FanOut(begins(ask), room=4)
    stream = run.outcomes(as_generator() if is_async else source())
    assert (await anext(stream)).ok
    await asyncio.sleep(5)
    assert taken == 5
    run.end(LookupError("closed"))
    await asyncio.sleep(5)
    with pytest.raises(LookupError, match="closed"):
        assert len([outcome async for outcome in stream]) == 4
    assert taken == 5
    assert closed == ([pytest.approx(7, abs=0.01)] if is_async else [])
    assert await tasks() == 1
