"""One question for each of many keys: how many are asked at a time, and how their answers come out as they land.

It knows nothing of requests or limits: asking is a function that is given to it, of which an outcome lands. Memory grows with
`room`, never with the number of keys.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias, cast

from crustcredits._errors import ConfigurationError, RateLimitWaitError
from crustcredits._keys import ApiKey, Uniqueness, UnusableKey
from crustcredits._models import Outcome, Unknown, outcome_for

Key: TypeAlias = ApiKey | UnusableKey
Land: TypeAlias = Callable[[Outcome[Any] | BaseException], None]
# Begins to ask about a key, and returns what gives that up; what comes of it lands once, at once or later.
Ask: TypeAlias = Callable[[Key, Land], Callable[[], None]]

# Keys that are read before other tasks have their turn: some milliseconds.
_SLICE = 1_000


class FanOut:
    """One fan-out of `ask`, up to `room` keys at a time, counted from their start until their outcome has been taken.

    After the deadline, in the running loop's time, no further key of an iterator is asked, and no outcome comes of it. An
    exception that `ask` raises, or that lands, ends it all; what the source of keys raises comes once those already asked have
    landed. However it ends, it leaves nothing under way and the source closed. Its only task reads the source.
    """

    def __init__(self, ask: Ask, *, room: int, deadline: float | None = None) -> None:
        self._ask = ask
        self._deadline = math.inf if deadline is None else deadline
        self._room = asyncio.Semaphore(room)
        self._landed: asyncio.Queue[Outcome[Any] | BaseException | None] = asyncio.Queue()
        self._under_way: dict[int, Callable[[], None]] = {}  # what gives each up
        self._numbers = itertools.count()
        self._is_fed = False
        self._ending: BaseException | None = None

    async def outcomes(self, keys: Iterator[Key] | AsyncGenerator[Key, None]) -> AsyncGenerator[Outcome[Any], None]:
        """Ask for every key and yield each outcome as it lands."""
        feeder = asyncio.create_task(self._feed(keys))
        feeder.add_done_callback(self._on_fed)
        try:
            while (landed := await self._landed.get()) is not None:
                if isinstance(landed, BaseException):
                    raise landed
                self._room.release()
                yield landed
        finally:
            await self._stop(feeder)

    def end(self, error: Exception) -> None:
        """Let `error` be what comes next."""
        self._landed.put_nowait(error)

    async def _feed(self, keys: Iterator[Key] | AsyncGenerator[Key, None]) -> None:
        await self._room.acquire()
        if isinstance(keys, AsyncGenerator):
            async with aclosing(keys):
                async for key in keys:
                    await self._start(key)
        else:
            loop = asyncio.get_running_loop()
            for key in keys:
                if loop.time() >= self._deadline:
                    break
                await self._start(key)

    async def _start(self, key: Key) -> None:
        number = next(self._numbers)
        if number % _SLICE == _SLICE - 1:
            await asyncio.sleep(0)
        self._under_way[number] = _nothing
        try:
            give_up = self._ask(key, partial(self._land, number))
        except Exception as error:  # noqa: BLE001  # whatever it is, it is for who reads the outcomes
            self._land(number, error)
        else:
            if number in self._under_way:
                self._under_way[number] = give_up
        await self._room.acquire()

    def _land(self, number: int, landed: Outcome[Any] | BaseException) -> None:
        self._under_way.pop(number, None)
        self._landed.put_nowait(landed)
        self._end_if_done()

    def _on_fed(self, feeder: asyncio.Task[None]) -> None:
        # A source may end in a cancellation that nobody asked of us: for whoever reads the outcomes it is one.
        self._ending = asyncio.CancelledError() if feeder.cancelled() else feeder.exception()
        self._is_fed = True
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._is_fed and not self._under_way:
            self._landed.put_nowait(self._ending)

    async def _stop(self, feeder: asyncio.Task[None]) -> None:
        """Give up what is under way, and wait until the source is closed."""
        feeder.cancel()
        while self._under_way:  # giving up one can let others land
            self._under_way.popitem()[1]()
        await asyncio.gather(feeder, return_exceptions=True)


def _nothing() -> None:
    """There is nothing to give up."""


async def read_pool(source: Iterable[Key]) -> list[Key]:
    """The keys of a pool. Other tasks run meanwhile.

    Raises:
        ConfigurationError: Two different keys have one label, or one secret two accounts.
    """
    pool: list[Key] = []
    taken = Uniqueness()
    for key in source:
        problem = None if isinstance(key, UnusableKey) else taken.take(key)
        if problem is not None:
            raise ConfigurationError(problem, key_name=key.label)
        pool.append(key)
        if len(pool) % _SLICE == 0:
            await asyncio.sleep(0)
    return pool


async def in_order(
    pool: Sequence[Key],
    *,
    known: Callable[[Key], Outcome[Any] | None],
    fan_out: Callable[[Iterator[Key]], AsyncGenerator[Outcome[Any], None]],
    on_outcome: Callable[[Outcome[Any]], object] | None,
) -> list[Outcome[Any]]:
    """One outcome for each key of a pool, in its order: what is known, and what a fan-out over the rest, each secret once, brings.

    Keys for which the fan-out had no time left are told so. `on_outcome` is called with each as it lands.
    """
    began = asyncio.get_running_loop().time()
    outcomes = _Outcomes(pool, on_outcome)
    unknown = await outcomes.take_known(known)
    if unknown:
        async with aclosing(fan_out(iter([pool[place] for place in unknown]))) as landed:
            async for outcome in landed:
                outcomes.take(outcome)
    return await outcomes.complete(asyncio.get_running_loop().time() - began)


class _Outcomes:
    """The outcomes of a pool, by place."""

    def __init__(self, pool: Sequence[Key], on_outcome: Callable[[Outcome[Any]], object] | None) -> None:
        self._pool = pool
        self._on_outcome = on_outcome
        self._landed: list[Outcome[Any] | None] = [None] * len(pool)
        self._missing = len(pool)
        self._first: dict[bytes, int] = {}
        self._again: defaultdict[bytes, list[int]] = defaultdict(list)  # of secrets that stand in the pool more than once

    async def take_known(self, known: Callable[[Key], Outcome[Any] | None]) -> Collection[int]:
        """Take what is known, and return the places of the others, each secret once."""
        for place, key in enumerate(self._pool):
            if place % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
            outcome = known(key)
            if outcome is not None:
                self._land(place, outcome)
            elif self._first.setdefault(key.digest, place) != place:
                self._again[key.digest].append(place)
        return self._first.values()

    def take(self, outcome: Outcome[Any]) -> None:
        """Take what came of one secret."""
        digest = outcome.key.digest
        for place in (self._first[digest], *self._again.get(digest, ())):
            self._land(place, outcome_for(self._pool[place], outcome))

    async def complete(self, waited: float) -> list[Outcome[Any]]:
        """All of them; those that are missing came too late."""
        for place, key in enumerate(self._pool) if self._missing else ():
            if place % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
            if self._landed[place] is None:
                self._land(place, _too_late(key, waited))
        return cast("list[Outcome[Any]]", self._landed)

    def _land(self, place: int, outcome: Outcome[Any]) -> None:
        self._landed[place] = outcome
        self._missing -= 1
        if self._on_outcome is not None:
            self._on_outcome(outcome)


def _too_late(key: Key, waited: float) -> Unknown:
    if isinstance(key, UnusableKey):
        return Unknown(key=key, error=key.error)
    message = "deadline too short: the keys before this one took all the time; raise timeout= or check fewer keys at once"
    return Unknown(key=key, error=RateLimitWaitError(message, key_name=key.label, wait=waited))
