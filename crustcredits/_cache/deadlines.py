"""`Deadlines`: the deadlines of all waiters, in one heap with one timer."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections.abc import Callable

from crustcredits._cache.alarm import Alarm
from crustcredits._cache.shared_call import SharedCall, Waiter

# Deadlines that one iteration of the loop handles; also the number of heap entries below which
# ended ones are not purged.
_SLICE = 1_000


class Deadlines:
    """The deadlines of all waiters.

    Args:
        time_out: Called with a waiter and its call when the deadline has passed, and perhaps for a
            waiter that has ended before.
    """

    def __init__(self, time_out: Callable[[SharedCall, Waiter], None]) -> None:
        self._time_out = time_out
        self._heap: list[tuple[float, int, SharedCall, Waiter]] = []
        self._numbers = itertools.count()
        self._alarm = Alarm(self._on_alarm)
        self._room = _SLICE

    def add(self, deadline: float, call: SharedCall, waiter: Waiter) -> None:
        """Add the deadline of a waiter."""
        if len(self._heap) >= self._room:
            self._purge()
        heapq.heappush(self._heap, (deadline, next(self._numbers), call, waiter))
        if deadline < self._alarm.at:
            self._alarm.set(deadline)

    def close(self) -> None:
        """Drop all deadlines."""
        self._heap.clear()
        self._alarm.set(math.inf)

    def _purge(self) -> None:
        """Drop the deadlines of waiters that have ended.

        So long deadlines take at most twice as many entries as there are waiters.
        """
        self._heap = [entry for entry in self._heap if not entry[3].done()]
        heapq.heapify(self._heap)
        self._room = max(_SLICE, 2 * len(self._heap))

    def _on_alarm(self) -> None:
        now = asyncio.get_running_loop().time()
        # The rest in the next iteration of the loop, so that other tasks run meanwhile.
        for _ in range(_SLICE):
            if not self._heap or not (self._heap[0][0] <= now or self._heap[0][3].done()):
                break
            _, _, call, waiter = heapq.heappop(self._heap)
            self._time_out(call, waiter)
        self._alarm.set(self._heap[0][0] if self._heap else math.inf)
