"""`Line`: who waits for a token, in order. It knows neither tokens nor time."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeAlias

from crustcredits._turn import Turn

# Who waits, in order, each with its ticket.
_Queue: TypeAlias = "OrderedDict[Turn, int]"


class Line:
    """First come, first served; before them those whose token had to go back, and behind them those that nobody wants.

    Attributes:
        waiting: How many are wanted.
        refreshes: Those that are not.
    """

    __slots__ = ("_again", "_tickets", "_waiters", "refreshes", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self._again: _Queue = OrderedDict()
        self._waiters: _Queue = OrderedDict()
        self.refreshes: _Queue = OrderedDict()
        self._tickets = 0

    def __bool__(self) -> bool:
        return bool(self.waiting or self.refreshes)

    def join(self, turn: Turn, *, again: bool) -> None:
        """To the end of those of its kind; with `again` it had a token before."""
        queue = self.refreshes if not turn.wanted else self._again if again else self._waiters
        queue[turn] = self._ticket()
        self.waiting += turn.wanted

    def leave(self, turn: Turn) -> None:
        """It waits no more."""
        if self._again.pop(turn, None) or self._waiters.pop(turn, None):
            self.waiting -= 1
        self.refreshes.pop(turn, None)

    def move_up(self, turn: Turn) -> bool:
        """Somebody wants it now: to the end of those that are wanted. Returns whether it was not."""
        if self.refreshes.pop(turn, None) is None:
            return False
        self._waiters[turn] = self._ticket()
        self.waiting += 1
        return True

    def next(self) -> Turn:
        """Take out the first of those that are wanted; there are some."""
        self.waiting -= 1
        return (self._again or self._waiters).popitem(last=False)[0]

    def next_refresh(self) -> Turn:
        """Take out the first of those that are not."""
        return self.refreshes.popitem(last=False)[0]

    def ahead_of(self, turn: Turn) -> int:
        """How many are served before it, or a few more: of those who left in between some are counted too."""
        if turn in self._again:
            return _ahead_in(self._again, turn)
        return len(self._again) + (_ahead_in(self._waiters, turn) if turn in self._waiters else len(self._waiters))

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets


def _ahead_in(queue: _Queue, turn: Turn) -> int:
    # By tickets, because counting would cost more the more there are.
    return min(queue[turn] - next(iter(queue.values())), len(queue) - 1)
