"""`FanOut`: asks about many keys, a bounded number at a time, and yields outcomes as they land.

The module knows nothing of requests or limits: the function that asks is passed in, and each
outcome lands through a callback. Memory grows with `room`, never with the number of keys.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias

from crustcredits._keys.api_key import Key
from crustcredits._models import Outcome
from crustcredits._turn_gate import TurnGate, Turns

Land: TypeAlias = Callable[[Outcome[Any] | BaseException], None]
# Begins to ask about a key, and returns a function that gives the key up. Its outcome lands once,
# at once or later.
Ask: TypeAlias = Callable[[Key, Land], Callable[[], None]]

# Keys that are read before other tasks run: a few milliseconds of work.
_SLICE = 1_000
# Most keys under way, counted or not, as a multiple of `room`.
_MOST = 8


class FanOut:
    """One fan-out of `ask`, over up to `room` keys at a time.

    A key counts from its start until its outcome has been taken. Keys that wait for their own
    account or for a retry do not count, so that they delay no others; but at most eight times
    `room` keys are under way. With `turns`, a `TurnGate` admits the keys.

    An exception that `ask` raises, or that lands, ends the fan-out. An exception of the source is
    raised once the keys already asked about have landed. However the fan-out ends, nothing stays
    under way and the source is closed. A task reads an asynchronous source.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        room: int,
        turns: Turns | None = None,
    ) -> None:
        self._ask = ask
        self._gate = None if turns is None else TurnGate(turns, room, self._wake_readers)
        self._next_key: Key | None = None  # taken from the source, and not admitted so far
        self._room = room
        self._open = 0  # keys until their outcome is taken
        self._parked = 0  # of these, the keys that do not count against `room`
        self._landed: deque[Outcome[Any] | BaseException] = deque()
        self._under_way: dict[int, Callable[[], None]] = {}  # gives up each key
        self._started = 0  # keys asked about so far
        self._is_fed = False
        self._is_stopped = False
        self._ending: BaseException | None = None
        # The reader of outcomes waits for the next one.
        self._reader: asyncio.Future[None] | None = None
        # The task that reads an asynchronous source, and the room for which it waits.
        self._feeding: asyncio.Task[None] | None = None
        self._feeder: asyncio.Future[None] | None = None

    async def outcomes(
        self, keys: Iterator[Key] | AsyncGenerator[Key, None]
    ) -> AsyncGenerator[Outcome[Any], None]:
        """Ask about every key and yield each outcome as it lands."""
        if isinstance(keys, AsyncGenerator):
            self._feeding = asyncio.create_task(self._feed(keys))
            self._feeding.add_done_callback(self._on_fed)
        try:
            while (
                landed := await self._next(None if isinstance(keys, AsyncGenerator) else keys)
            ) is not None:
                yield landed
        finally:
            await self._stop()

    async def _next(self, keys: Iterator[Key] | None) -> Outcome[Any] | None:
        """The next outcome, or None at the end.

        Further keys of an iterator take the room of keys with a taken outcome.
        """
        while True:
            landed = self._landed.popleft() if self._landed else None
            if isinstance(landed, BaseException):
                raise landed
            if landed is not None:
                self._open -= 1
                _wake(self._feeder)
            if keys is not None and not self._is_fed and self._has_room():
                await self._take(keys)
            if landed is not None:
                return landed
            if self._is_fed and not self._under_way and not self._landed:
                if self._ending is not None:
                    raise self._ending
                return None
            if not self._landed:
                self._reader = asyncio.get_running_loop().create_future()
                await self._reader

    def end(self, error: Exception) -> None:
        """End the fan-out: `error` is raised after the outcomes that have landed.

        The source is read no further, also if nobody reads the outcomes.
        """
        self._landed.append(error)
        self._stop_reading()
        _wake(self._reader)

    def on_parked(self, step: int) -> None:
        """Count one key less against `room` (1), or one more (-1)."""
        self._parked += step
        if step > 0:
            self._wake_readers()

    def _has_room(self) -> bool:
        """Whether one more key may be under way."""
        return (
            not self._is_stopped
            and self._open - self._parked < self._room
            and self._open < _MOST * self._room
        )

    def _admit(self, key: Key) -> bool:
        """Admit a key to be asked about, unless it has to wait: then it is tried again later."""
        if self._is_stopped:
            return False
        return self._gate is None or self._gate.admit(key, is_idle=not self._open)

    def _wake_readers(self) -> None:
        """Let both readers go on: of the source, and of the outcomes."""
        _wake(self._feeder)
        _wake(self._reader)

    async def _take(self, keys: Iterator[Key]) -> None:
        """Ask about as many keys as there is room for."""
        try:
            while self._has_room():
                key = next(keys, None) if self._next_key is None else self._next_key
                if key is None:
                    self._is_fed = True
                    return
                self._next_key = key
                if not self._admit(key):
                    return
                self._next_key = None
                if self._start(key):
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  # raised to the reader of the outcomes
            self._is_fed, self._ending = True, error

    async def _feed(self, keys: AsyncGenerator[Key, None]) -> None:
        async with aclosing(keys):
            async for key in keys:
                while not self._admit(key):
                    await self._wait_for_room()
                if self._start(key):
                    await asyncio.sleep(0)
                while not self._has_room():
                    await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """Wait until there may be room for a key of an asynchronous source.

        Raises:
            CancelledError: The fan-out has ended, and the source has swallowed its cancellation.
        """
        if self._is_stopped:
            raise asyncio.CancelledError
        self._feeder = asyncio.get_running_loop().create_future()
        await self._feeder

    def _start(self, key: Key) -> bool:
        """Ask about a key. Returns whether other tasks should run now."""
        number = self._started
        self._started += 1
        self._open += 1
        self._under_way[number] = nothing
        try:
            give_up = self._ask(key, partial(self._land, number))
        except Exception as error:  # noqa: BLE001  # as above
            self._land(number, error)
        else:
            if number in self._under_way:
                self._under_way[number] = give_up
        return number % _SLICE == _SLICE - 1

    def _land(self, number: int, landed: Outcome[Any] | BaseException) -> None:
        is_at_once = self._under_way.pop(number, None) is nothing
        if self._gate is not None and not isinstance(landed, BaseException):
            self._gate.land(landed, number, self._started, is_at_once=is_at_once)
        self._landed.append(landed)
        _wake(self._reader)

    def _on_fed(self, feeding: asyncio.Task[None]) -> None:
        # A source may end in a cancellation of its own: then the reader is cancelled too.
        self._ending = asyncio.CancelledError() if feeding.cancelled() else feeding.exception()
        self._is_fed = True
        _wake(self._reader)

    def _stop_reading(self) -> None:
        """Read no further key from the source."""
        if self._is_stopped:
            return
        self._is_stopped = True
        if self._gate is not None:
            self._gate.close()
        if self._feeding is not None:
            self._feeding.cancel()

    async def _stop(self) -> None:
        """Give up all keys under way, and wait until the source is closed."""
        self._stop_reading()
        while self._under_way:  # giving up one can let others land
            self._under_way.popitem()[1]()
        if self._feeding is not None:
            await asyncio.gather(self._feeding, return_exceptions=True)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


def nothing() -> None:
    """Give up nothing: the outcome has landed."""
