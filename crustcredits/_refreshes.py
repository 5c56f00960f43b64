"""`RefreshGate`: which of the calls that nobody waits for may go, and when.

They give way: a few at a time, so that whoever comes finds hardly any of them before him, wherever he has to wait. It knows
nothing of requests.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort

from crustcredits._turn import Turn


class RefreshGate:
    """Lets at most `room` refreshes through at a time, the one of the oldest answer first.

    One that somebody comes to wait for while it stands here goes on at once.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._inside: set[Turn] = set()
        self._waiting: list[tuple[float, int, Turn]] = []  # ascending by age and ticket
        self._entries: dict[Turn, tuple[float, int, Turn]] = {}  # the same, by turn
        self._tickets = 0

    def __len__(self) -> int:
        return len(self._inside) + len(self._waiting)

    async def enter(self, turn: Turn) -> None:
        """Wait for a place, if it has none. Whoever has entered has to leave."""
        if turn in self._inside:
            return
        if len(self._inside) < self._room and not self._waiting:
            self._inside.add(turn)
            return
        waiter = turn.waiter = asyncio.get_running_loop().create_future()
        self._tickets += 1
        entry = self._entries[turn] = turn.since, self._tickets, turn
        insort(self._waiting, entry)
        turn.joins(self)
        try:
            await waiter
        except asyncio.CancelledError:
            self._drop(turn)
            self.leave(turn)
            raise
        finally:
            turn.waiter = None
            turn.leaves()

    def leave(self, turn: Turn) -> None:
        """It has ended, or was given up."""
        self._inside.discard(turn)
        while self._waiting and len(self._inside) < self._room:
            oldest = self._waiting[0][2]
            self._drop(oldest)
            self._admit(oldest)

    def expected(self, turn: Turn, now: float) -> float:
        """Nobody with a deadline waits here."""
        return now

    def move_up(self, turn: Turn) -> None:
        """Somebody wants it now."""
        self._drop(turn)
        self._admit(turn)

    def _admit(self, turn: Turn) -> None:
        if turn.waiter is not None and not turn.waiter.done():  # else cancelled in this very turn of the loop
            self._inside.add(turn)
            turn.waiter.set_result(0)

    def _drop(self, turn: Turn) -> None:
        entry = self._entries.pop(turn, None)
        if entry is not None:
            del self._waiting[bisect_left(self._waiting, entry)]
