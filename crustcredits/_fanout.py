"""One question for each of many keys: how many are asked at a time, and how their answers come out as they land.

It knows nothing of requests or limits: asking is a function that is given to it, which answers with an outcome. Memory
grows with `room`, never with the number of keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

from crustcredits._errors import ConfigurationError, RateLimitWaitError
from crustcredits._keys import ApiKey, Uniqueness, UnusableKey
from crustcredits._models import Outcome, Unknown, outcome_for

Key: TypeAlias = ApiKey | UnusableKey
Ask: TypeAlias = Callable[[Key], Awaitable[Outcome[Any]]]


# Keys that are read before other tasks have their turn: some milliseconds.
_SLICE = 1_000


class FanOut:
    """One fan-out of `ask`, up to `room` keys at a time, counted from their start until their outcome has been taken.

    Keys that are not asked before the deadline, of the running loop, are told so at once. What `ask` raises ends it all; what
    the source of keys raises comes once those already asked have landed. However it ends, it leaves no task behind and the
    source closed.
    """

    def __init__(self, ask: Ask, *, room: int, deadline: float | None = None) -> None:
        self._ask = ask
        self._began = asyncio.get_running_loop().time()
        self._deadline = deadline
        self._room = asyncio.Semaphore(room)
        self._landed: asyncio.Queue[Outcome[Any] | BaseException | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: BaseException | None = None

    async def outcomes(self, keys: Iterator[Key] | AsyncGenerator[Key, None]) -> AsyncGenerator[Outcome[Any], None]:
        """Ask for every key and yield each outcome as it lands."""
        feeder = asyncio.create_task(self._feed(keys))
        self._tasks.add(feeder)
        feeder.add_done_callback(self._on_fed)
        try:
            while (landed := await self._landed.get()) is not None:
                if isinstance(landed, BaseException):
                    raise landed
                self._room.release()
                yield landed
        finally:
            await self._stop()

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
            for key in keys:
                await self._start(key)

    async def _start(self, key: Key) -> None:
        now = asyncio.get_running_loop().time()
        if self._deadline is not None and now >= self._deadline:
            self._landed.put_nowait(_too_late(key, now - self._began))
            await self._room.acquire()
            return
        task = asyncio.create_task(self._ask_one(key))
        self._tasks.add(task)
        task.add_done_callback(self._on_asked)
        await self._room.acquire()

    async def _ask_one(self, key: Key) -> None:
        self._landed.put_nowait(await self._ask(key))

    def _on_fed(self, feeder: asyncio.Task[None]) -> None:
        self._ending = _raised_by(feeder)
        self._end_if_done(feeder)

    def _on_asked(self, task: asyncio.Task[None]) -> None:
        error = _raised_by(task)
        if error is not None:
            self._landed.put_nowait(error)
        self._end_if_done(task)

    def _end_if_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._landed.put_nowait(self._ending)

    async def _stop(self) -> None:
        """Cancel what is under way and wait until it has ended."""
        remaining = list(self._tasks)
        for task in remaining:
            task.cancel()
        await asyncio.gather(*remaining, return_exceptions=True)


def _too_late(key: Key, waited: float) -> Unknown:
    if isinstance(key, UnusableKey):
        return Unknown(key=key, error=key.error)
    message = "deadline too short: the keys before this one took all the time; raise timeout= or check fewer keys at once"
    return Unknown(key=key, error=RateLimitWaitError(message, key_name=key.label, wait=waited))


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

    `on_outcome` is called with each as it lands.
    """
    outcomes: dict[int, Outcome[Any]] = {}
    unknown: dict[bytes, list[int]] = {}
    for place, key in enumerate(pool):
        if place % _SLICE == _SLICE - 1:
            await asyncio.sleep(0)
        outcome = known(key)
        if outcome is None:
            unknown.setdefault(key.digest, []).append(place)
            continue
        outcomes[place] = outcome
        if on_outcome is not None:
            on_outcome(outcome)
    if unknown:
        async with aclosing(fan_out(iter([pool[same[0]] for same in unknown.values()]))) as landed:
            async for outcome in landed:
                for place in unknown[outcome.key.digest]:
                    outcomes[place] = outcome_for(pool[place], outcome)
                    if on_outcome is not None:
                        on_outcome(outcomes[place])
    return [outcomes[place] for place in range(len(pool))]


def _raised_by(task: asyncio.Task[None]) -> BaseException | None:
    # A source or a question may end in a cancellation that nobody asked of us: for whoever reads the outcomes it is one.
    return asyncio.CancelledError() if task.cancelled() else task.exception()
