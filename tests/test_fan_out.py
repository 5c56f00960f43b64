"""Fan-out: room, order, endings; in virtual time, with a question that needs no client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from crustcredits import ApiKey, Balance, Known, Outcome
from crustcredits._fan_out import Ask, FanOut, Key, Land
from crustcredits._keys.api_key import as_keys_async, methods_of
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
    """The same without a coroutine: what comes of a key lands."""

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
    """How many there are when those that were cancelled have ended."""
    for _ in range(3):
        await asyncio.sleep(0)
    return len(asyncio.all_tasks())


async def names(stream: Any) -> list[str]:
    return [outcome.key.name async for outcome in stream]


async def test_every_key_is_answered_with_no_more_than_room_under_way() -> None:
    """Room bounds the tasks, not the number of keys."""
    ask = Asker()
    assert sorted(await names(FanOut(begins(ask), room=4).outcomes(iter(keys(10))))) == [
        f"k{number}" for number in range(10)
    ]
    assert ask.most == 4
    assert now() == pytest.approx(3, abs=1e-3)
    assert await tasks() == 1


async def test_no_keys_no_outcomes() -> None:
    """An empty source ends at once."""
    assert await names(FanOut(begins(Asker()), room=4).outcomes(iter([]))) == []


async def test_a_slow_consumer_holds_back_the_asking() -> None:
    """Outcomes that nobody has taken yet count too, so memory stays bounded."""
    ask = Asker(seconds=0.0)
    stream = FanOut(begins(ask), room=4).outcomes(iter(keys(100)))
    async with aclosing(stream):
        await anext(stream)
        await asyncio.sleep(10)
        assert len(ask.asked) == 5


async def test_a_source_that_raises_ends_it_after_those_already_asked() -> None:
    """Nothing that was asked is lost, and the caller sees his own error."""

    def source() -> Iterator[Key]:
        yield from keys(2)
        raise LookupError("the database is gone")

    stream = FanOut(begins(Asker()), room=4).outcomes(source())
    landed = {(await anext(stream)).key.name for _ in range(2)}
    with pytest.raises(LookupError, match="the database is gone"):
        await anext(stream)
    assert landed == {"k0", "k1"}
    assert await tasks() == 1


async def test_an_asynchronous_source_is_read_as_it_comes() -> None:
    """Outcomes come out while the next key is still awaited."""

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
    """At whatever point."""
    for moment in (0.0, 0.5, 1.0, 1.5):
        ask = Asker()
        consumer = asyncio.create_task(names(FanOut(begins(ask), room=10).outcomes(iter(keys(50)))))
        await asyncio.sleep(moment)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert await tasks() == 1
        assert ask.under_way == 0


async def test_what_a_question_raises_ends_it_all() -> None:
    """Asking answers with outcomes; an exception is no outcome but the end."""

    async def ask(key: Key) -> Outcome[Balance]:
        await asyncio.sleep(0 if key.name == "k3" else 9)
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        await names(FanOut(begins(ask), room=10).outcomes(iter(keys(10))))
    assert await tasks() == 1


async def test_what_asking_raises_at_once_ends_it_all() -> None:
    """Such as a client that is closed."""

    def ask(key: Key, land: Land) -> Callable[[], None]:
        raise RuntimeError("closed")

    with pytest.raises(RuntimeError, match="closed"):
        await names(FanOut(ask, room=10).outcomes(iter(keys(10))))
    assert await tasks() == 1


async def test_what_lands_at_once_is_an_outcome_like_any_other() -> None:
    """It may be known already."""

    def ask(key: Key, land: Land) -> Callable[[], None]:
        assert isinstance(key, ApiKey)
        land(Known(balance=Balance(key=key, credits=Decimal(1), checked_at=NOON)))
        return lambda: None

    assert len(await names(FanOut(ask, room=4).outcomes(iter(keys(2_500))))) == 2_500


@pytest.mark.parametrize("kind", [LookupError, asyncio.CancelledError])
async def test_an_asynchronous_source_that_raises_ends_it(kind: type[BaseException]) -> None:
    """Whatever it raises, also a cancellation that it met inside.

    And those already asked come first.
    """

    async def source() -> AsyncGenerator[Key, None]:
        yield keys(1)[0]
        raise kind

    stream = FanOut(begins(Asker()), room=4).outcomes(source())
    assert (await anext(stream)).key.name == "k0"
    with pytest.raises(kind):
        await anext(stream)
    assert await tasks() == 1


async def test_a_question_that_ends_cancelled_ends_it_all() -> None:
    """Its key has no outcome, and no key is left out silently."""

    async def ask(key: Key) -> Outcome[Balance]:
        if key.name == "k1":
            raise asyncio.CancelledError
        return await Asker()(key)

    with pytest.raises(asyncio.CancelledError):
        await names(FanOut(begins(ask), room=10).outcomes(iter(keys(3))))
    assert await tasks() == 1


async def test_an_asynchronous_source_is_closed_however_it_ends() -> None:
    """A database cursor in it must not stay open."""
    closed: list[int] = []

    async def source() -> AsyncGenerator[str, None]:
        try:
            for number in range(100):
                yield f"secret-{number}"
        finally:
            await asyncio.sleep(0)
            closed.append(now() > 0)

    async with aclosing(
        FanOut(begins(Asker()), room=2).outcomes(as_keys_async(*methods_of(source())))
    ) as stream:
        await anext(stream)
    assert len(closed) == 1
    await names(FanOut(begins(Asker()), room=200).outcomes(as_keys_async(*methods_of(source()))))
    assert len(closed) == 2
    assert await tasks() == 1


async def test_what_ends_it_from_outside_comes_even_while_the_source_is_awaited() -> None:
    """Such as the client's closing."""

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
