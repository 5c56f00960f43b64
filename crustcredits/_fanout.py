"""One question for each of many keys: how many are asked at a time, and how their answers come out as they land.

It knows nothing of requests or limits: asking is a function that is given to it, which answers with an outcome. Memory
grows with `room`, never with the number of keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any, TypeAlias

from crustcredits._keys import ApiKey
from crustcredits._models import Outcome, outcome_for

Ask: TypeAlias = Callable[[ApiKey], Awaitable[Outcome[Any]]]


async def fan_out(keys: Iterator[ApiKey] | AsyncIterator[ApiKey], ask: Ask, *, room: int) -> AsyncGenerator[Outcome[Any], None]:
    """Ask for every key, up to `room` at a time, and yield each outcome as it lands.

    Equal secrets under way at the same time are asked once. What `ask` raises ends it all; what the source of keys raises
    comes once those already asked have landed. However it ends, it leaves no task behind.
    """
    run = _Run(ask, room)
    feeder = asyncio.create_task(run.feed(keys))
    try:
        while (outcome := await run.next_outcome()) is not None:
            yield outcome
    finally:
        await run.stop(feeder)


class _Run:
    """The state of one fan-out. `room` counts keys from their start until the consumer has taken their outcome."""

    def __init__(self, ask: Ask, room: int) -> None:
        self._ask = ask
        self._room = asyncio.Semaphore(room)
        self._landed: asyncio.Queue[Outcome[Any] | Exception | None] = asyncio.Queue()
        self._under_way: dict[bytes, list[ApiKey]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: Exception | None = None
        self._fed = False

    async def feed(self, keys: Iterator[ApiKey] | AsyncIterator[ApiKey]) -> None:
        """Start a task for each key as room allows."""
        try:
            async with aclosing(_one_by_one(keys)) as source:
                await self._room.acquire()
                async for key in source:
                    self._start(key)
                    await self._room.acquire()
        except Exception as error:  # noqa: BLE001  # whatever a caller's source raises is his, and comes last
            self._ending = error
        self._fed = True
        self._end_if_done()

    async def next_outcome(self) -> Outcome[Any] | None:
        """The next outcome to land; None when there will be no more."""
        landed = await self._landed.get()
        if isinstance(landed, Exception):
            raise landed
        self._room.release()
        return landed

    async def stop(self, feeder: asyncio.Task[None]) -> None:
        """Cancel what is under way and wait until it has ended."""
        remaining = [task for task in (feeder, *self._tasks) if not task.done()]
        for task in remaining:
            task.cancel()
        await asyncio.gather(*remaining, return_exceptions=True)

    def _start(self, key: ApiKey) -> None:
        askers = self._under_way.get(key.digest)
        if askers is not None:
            askers.append(key)
            return
        self._under_way[key.digest] = [key]
        task = asyncio.create_task(self._ask_one(key))
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def _ask_one(self, key: ApiKey) -> None:
        outcome = await self._ask(key)
        for asker in self._under_way.pop(key.digest):
            self._landed.put_nowait(outcome_for(asker, outcome))

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            self._landed.put_nowait(error)
        self._end_if_done()

    def _end_if_done(self) -> None:
        if self._fed and not self._tasks:
            self._landed.put_nowait(self._ending)


async def _one_by_one(keys: Iterator[ApiKey] | AsyncIterator[ApiKey]) -> AsyncGenerator[ApiKey, None]:
    if isinstance(keys, AsyncIterator):
        async for key in keys:
            yield key
    else:
        for key in keys:
            yield key
