"""`Window`: how many permits a client asks for ahead. `Demand`: those of one bucket."""

from __future__ import annotations

import asyncio
import weakref
from typing import Generic, Protocol, TypeVar

# Most permits in the window.
MOST = 32
# Seconds of starts, at the configured pace, that are asked for ahead.
_AHEAD = 0.15


class Waiter(Protocol):
    """Tokens with waiting calls."""

    def room_came(self) -> None:
        """Note that more permits may be asked for."""
        ...


WaiterT = TypeVar("WaiterT", bound=Waiter)


class Window(Generic[WaiterT]):
    """Permits that one client has asked for, or has and does not use yet, over all buckets.

    They are no more than the pace can use in a moment: other processes could use the rest. Requests
    come in groups of at least half the window, so that messages are few.

    Args:
        pace: Starts a second; None without a limit.

    Attributes:
        size: The most permits.
        waiters: Tokens with waiting calls, in the order in which they began to wait.
    """

    def __init__(self, pace: float | None) -> None:
        self.size: int = MOST if pace is None else max(1, min(MOST, int(pace * _AHEAD)))
        self._asked = 0
        self._unused = 0
        self.waiters: dict[WaiterT, None] = {}
        self._is_telling = False

    @property
    def room(self) -> int:
        """How many more permits may be asked for."""
        return max(0, self.size - self._asked - self._unused)

    def allows(self, wanted: int) -> bool:
        """Whether there is room for that many permits, or for a group."""
        return 0 < min(wanted, (self.size + 1) // 2) <= self.room

    def share_of(self, wanted: int, asked: int) -> int:
        """How many of the wanted permits to ask for, with those already `asked` for."""
        room = self.room + asked
        return min(wanted, room) if room >= min(wanted, (self.size + 1) // 2) else 0

    def waits(self, waiter: WaiterT, count: int) -> None:
        """Note that `count` calls wait, which may ask when there is room."""
        if count:
            self.waiters[waiter] = None
        else:
            self.waiters.pop(waiter, None)

    def goes_last(self, waiter: WaiterT) -> None:
        """Put tokens with waiting calls behind the others."""
        self.waiters[waiter] = self.waiters.pop(waiter)

    def asked_for(self, more: int) -> None:
        """Note that more permits are asked for, or with a negative number fewer."""
        self._asked += more
        if more < 0:
            self._tell_soon()

    def answered(self, asked: int, granted: int) -> None:
        """Note that `asked` permits were asked for, and `granted` of them came."""
        self._asked -= asked
        self._unused += granted
        if granted < asked:
            self._tell_soon()

    def used(self) -> None:
        """Note that a permit was used, or given back."""
        self._unused -= 1
        self._tell_soon()

    def _tell_soon(self) -> None:
        """Tell all waiters in the next turn of the loop, because a call may start in this one."""
        if self.waiters and not self._is_telling:
            self._is_telling = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._is_telling = False
        for waiter in tuple(self.waiters):
            waiter.room_came()


class Demand(Generic[WaiterT]):
    """The calls that wait for tokens of one bucket, and the permits that they ask for.

    Args:
        window: How many permits the client may ask for.
        waiter: The tokens.
        asks: Whether permits are asked for these tokens. If not, the demand is only told.

    Attributes:
        asks: As above.
        wanted: How many calls wait.
        asked: How many permits the window counts as asked for.
        kept: How many tokens these calls leave.
        kept_within: How many tokens they leave of the other ones that a permit takes.
    """

    def __init__(self, window: Window[WaiterT], waiter: WaiterT, *, asks: bool) -> None:
        self.asks: bool = asks
        self.wanted: int = 0
        self.asked: int = 0
        self.kept: int = 0
        self.kept_within: int = 0
        self._window = window
        # The tokens own this demand. A cycle of references would keep forgotten buckets alive.
        self._waiter = weakref.ref(waiter)

    def change(self, wanted: int, kept: int, kept_within: int) -> None:
        """Note how many calls wait now."""
        self.wanted, self.kept, self.kept_within = wanted, kept, kept_within
        self._note(wanted)

    @property
    def permits(self) -> int:
        """How many permits to ask for now."""
        if not self.wanted or not self.asks:
            return 0
        return self._window.share_of(self.wanted, self.asked)

    def ask(self, count: int) -> None:
        """Let the window count that many permits as asked for."""
        more, self.asked = count - self.asked, count
        if more:
            self._window.asked_for(more)

    def answered(self, given: int) -> None:
        """Count the permits that an answer brought as unused, and no more as asked for."""
        asked, self.asked = self.asked, 0
        self._window.answered(asked, given)

    def used(self) -> None:
        """Note that a permit was used, or given back."""
        if self.asks:
            self._window.used()

    def met(self) -> None:
        """Note that an answer was about all calls: if some still wait, they ask again."""
        self.wanted = 0
        self._note(0)

    def end(self) -> None:
        """Note that no call waits any more, or that none asks for now."""
        self.met()
        self.ask(0)

    def _note(self, wanted: int) -> None:
        waiter = self._waiter()
        assert waiter is not None
        self._window.waits(waiter, wanted)
