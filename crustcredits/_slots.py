"""How many requests are on the wire at once, and what becomes of those that hang there.

It knows nothing of what is sent. A request that has been without an answer for so long that it must be called hanging
stops counting, so that hanging keys hold up no others; how many may hang beside the others is bounded too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

# Seconds without an answer that a healthy API does not need for one number, and, where it is slow for all, how many times
# its usual answer.
_PATIENCE = 0.4
_PATIENCE_TIMES = 4.0

# How many requests may hang and not count, as a multiple of those that count.
HANGING_SHARE = 8


class Slots:
    """Slots for `count` requests on the wire at once, first come, first served; a hanging request's goes to the next."""

    __slots__ = ("_count", "_hanging", "_holders", "_timer", "_usual", "_waiters")

    def __init__(self, count: int) -> None:
        self._count = count
        self._holders: dict[object, float] = {}  # when each began; the oldest first
        self._hanging: dict[object, float] = {}
        self._waiters: OrderedDict[asyncio.Future[object], None] = OrderedDict()
        self._usual: float | None = None  # seconds that an answer takes; a moving average
        self._timer: asyncio.Handle | None = None

    def try_acquire(self) -> object | None:
        """Take a slot if one is free and nobody waits; None otherwise."""
        return None if self._waiters or len(self._holders) >= self._count else self._admit()

    async def acquire(self) -> object:
        """Take a slot, waiting for one if need be. Returns what `release` wants back."""
        slot = self.try_acquire()
        if slot is not None:
            return slot
        waiter: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        self._watch()
        try:
            return await waiter
        except asyncio.CancelledError:
            self._waiters.pop(waiter, None)
            if waiter.done() and not waiter.cancelled():
                self.release(waiter.result(), answered=False)
            raise

    def release(self, holder: object, *, answered: bool) -> None:
        """Give a slot back. Whether the server `answered` tells how long its answers take."""
        began = self._holders.pop(holder, None)
        if began is None:
            began = self._hanging.pop(holder)
        if answered:
            took = asyncio.get_running_loop().time() - began
            self._usual = took if self._usual is None else 0.9 * self._usual + 0.1 * took
        if self._waiters:
            self._wake()

    def _admit(self) -> object:
        holder = object()
        self._holders[holder] = asyncio.get_running_loop().time()
        return holder

    def _wake(self) -> None:
        while self._waiters and len(self._holders) < self._count:
            waiter = self._waiters.popitem(last=False)[0]
            if not waiter.done():  # cancelled in this very turn of the loop
                waiter.set_result(self._admit())
        self._watch()

    def _watch(self) -> None:
        # One timer for the oldest; when it is found to be early, because that one has ended since, it is set again.
        if self._timer is None and self._waiters and self._may_hang():
            oldest = next(iter(self._holders.values()))
            self._timer = asyncio.get_running_loop().call_at(oldest + self._patience(), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        overdue = asyncio.get_running_loop().time() - self._patience()
        while self._holders and self._may_hang():
            holder, began = next(iter(self._holders.items()))
            if began > overdue:
                break
            self._hanging[holder] = self._holders.pop(holder)
        self._wake()

    def _may_hang(self) -> bool:
        return len(self._hanging) < HANGING_SHARE * self._count

    def _patience(self) -> float:
        return _PATIENCE if self._usual is None else max(_PATIENCE, _PATIENCE_TIMES * self._usual)
