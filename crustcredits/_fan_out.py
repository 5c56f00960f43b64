"""`FanOut`: asks about many keys, a bounded number at a time, and yields outcomes as they land.

The module knows nothing of requests or limits: the function that asks is passed in, and each
outcome lands through a callback. Memory grows with `room`, never with the number of keys.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol, TypeAlias

from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Outcome

Key: TypeAlias = ApiKey | UnusableKey
Land: TypeAlias = Callable[[Outcome[Any] | BaseException], None]
# Begins to ask about a key, and returns a function that gives the key up. Its outcome lands once,
# at once or later.
Ask: TypeAlias = Callable[[Key, Land], Callable[[], None]]

# Keys that are read before other tasks run: a few milliseconds of work.
_SLICE = 1_000
# Most keys under way, counted or not, as a multiple of `room`.
_MOST = 8
# Seconds for which an estimate of the keys that have their turn in time is used, also one of 0, and
# the most seconds until the next one.
_ESTIMATED = 0.1
_LATER = 1.0
# After a key without a turn, the least and the most seconds until the next key that needs one.
_LEAST_BACKOFF = 0.1
_MOST_BACKOFF = 1.0


class Turns(Protocol):
    """Says which keys of a source are likely to have their turn in time."""

    # If no key is under way for so many seconds, the next one is tried in any case.
    patience: float

    def needs_turn(self, key: Key) -> bool:
        """Whether a key needs a turn.

        A key needs a turn if it has no cached answer and no request for it is on the wire.
        """
        ...

    def likely(self, most: int) -> tuple[int, float]:
        """How many more keys are likely to have their turn in time, up to `most`.

        Returns the number, and the seconds until the first such key if the number is 0.
        """
        ...

    def had_no_turn(self, outcome: Outcome[Any]) -> bool:
        """Whether no request was sent for a key, because its turn did not come in time."""
        ...


class FanOut:
    """One fan-out of `ask`, over up to `room` keys at a time.

    A key counts from its start until its outcome has been taken. Keys that wait for their own
    account or for a retry do not count, so that they delay no others; but at most eight times
    `room` keys are under way. With `turns`, no key is asked about before it is likely to have its
    turn in time: otherwise an endless source would be drained, and most would fail. That is an
    estimate, which does not know the account of a key. So after a key without a turn, the next key
    that needs one waits 0.1 s, and the others twice as long each time, up to 1 s. Each outcome of a
    request then lets two keys start without such a wait.

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
        self._turns = turns
        self._next_key: Key | None = None  # taken from the source, and not likely in time so far
        # Keys that are likely to have their turn in time; None without an estimate.
        self._estimate: int | None = None
        self._estimated_at = -math.inf
        self._waits_since: float | None = None  # since when no key is under way and one waits
        self._timer: asyncio.Handle | None = None  # for the next estimate, or the backoff's end
        # Keys that may take a turn without a wait: infinite until a key has had no turn.
        self._credit = math.inf
        self._backoff = 0.0  # seconds between two keys beyond these; 0 after a turn
        self._backs_off_until = -math.inf
        self._backed_off_at = 0  # number of keys when the backoff was set or doubled last
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
            _wake(self._feeder)
            _wake(self._reader)

    def _has_room(self) -> bool:
        """Whether one more key may be under way."""
        return (
            not self._is_stopped
            and self._open - self._parked < self._room
            and self._open < _MOST * self._room
        )

    def _may_start(self, key: Key) -> bool:
        """Whether a key may be asked about now.

        If not, a timer wakes the reader of the source, which asks again.
        """
        if self._is_stopped:
            return False
        turns = self._turns
        if turns is None or not turns.needs_turn(key):
            return True
        now = asyncio.get_running_loop().time()
        if not self._credit and now < self._backs_off_until:
            self._set_timer(self._backs_off_until - now)
            return False
        if not self._is_likely(turns, now) and not self._is_tried(turns, now):
            return False
        self._waits_since = None
        if self._estimate:
            self._estimate = self._estimate - 1 or None
        if self._credit:
            self._credit -= 1
        else:
            self._backs_off_until = now + max(_LEAST_BACKOFF, self._backoff)
        return True

    def _is_likely(self, turns: Turns, now: float) -> bool:
        """Whether one more key is likely to have its turn in time."""
        if self._estimate is None or now - self._estimated_at > _ESTIMATED:
            self._estimate, wait = turns.likely(self._room)
            self._estimated_at = now
            if not self._estimate:
                self._set_timer(min(max(wait, _ESTIMATED), _LATER))
        return self._estimate > 0

    def _is_tried(self, turns: Turns, now: float) -> bool:
        """Whether a key is tried although it is not likely to have its turn in time.

        It is if no key of this fan-out was under way for long, so that its failure is seen.
        """
        if self._open:
            self._waits_since = None
            return False
        self._waits_since = now if self._waits_since is None else self._waits_since
        return now - self._waits_since >= turns.patience

    def _set_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self._estimate:
            self._estimate = None
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
                if not self._may_start(key):
                    return
                self._next_key = None
                if self._start(key):
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001  # raised to the reader of the outcomes
            self._is_fed, self._ending = True, error

    async def _feed(self, keys: AsyncGenerator[Key, None]) -> None:
        async with aclosing(keys):
            async for key in keys:
                while not self._may_start(key):
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
        self._waits_since = None
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
        if self._turns is not None and not isinstance(landed, BaseException):
            # Requests of an outcome that lands at once were sent for other callers before.
            if self._turns.had_no_turn(landed) or (is_at_once and landed.attempts):
                self._back_off(number)
            elif landed.attempts and self._credit < math.inf:
                self._backoff = 0.0
                self._credit = self._credit + 2 if self._credit < self._room else math.inf
                _wake(self._feeder)
        self._landed.append(landed)
        _wake(self._reader)

    def _back_off(self, number: int) -> None:
        """Let the next key that needs a turn wait, unless the failed one began before that."""
        if number < self._backed_off_at:
            return
        self._credit, self._backed_off_at = 0, self._started
        self._backoff = min(max(_LEAST_BACKOFF, 2 * self._backoff), _MOST_BACKOFF)
        self._backs_off_until = asyncio.get_running_loop().time() + self._backoff

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
        if self._timer is not None:
            self._timer.cancel()
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
