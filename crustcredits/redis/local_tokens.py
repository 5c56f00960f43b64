"""`LocalTokens`: what a process counts by itself of tokens that it shares with others.

Times are the running loop's.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

# Seconds after its grant by which a token that others could use has to be on the wire.
FRESH = 1.0


class LocalTokens:
    """Tokens that are counted in this process.

    All alike: it does not matter which one a call has.
    """

    __slots__ = ("_capacity", "_counted", "_home", "free", "in_flight")

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.in_flight = 0
        self._capacity = limit
        self._counted = 0
        self._home: list[
            float
        ] = []  # when the tokens that are out, and not in flight, come home; ascending

    @property
    def available(self) -> int:
        """Tokens that could be had now."""
        return max(0, self.free)

    def resize(self, limit: int) -> None:
        """So many there are from now on; more may be out than is left."""
        self.free += limit - self._capacity
        self._capacity = limit

    def is_idle(self) -> bool:
        """Whether none is out."""
        return not self.in_flight and not self._home

    def collect(self, now: float) -> None:
        """Make those free that have come home by `now`."""
        home = bisect_right(self._home, now)
        if home:
            del self._home[:home]
            self.free += home

    def start(self, now: float) -> int:
        """One goes onto the wire. Returns a mark for `own`."""
        self.collect(now)
        mark = self.in_flight + len(self._home) - self._counted
        self.free -= 1
        self.in_flight += 1
        self._counted += 1
        return mark

    def end(self, home: float) -> None:
        """One has left the wire, and comes home then."""
        self.in_flight -= 1
        insort(self._home, home)

    def unsend(self) -> None:
        """One has left the wire, and is free: the server does not count it here."""
        self.in_flight -= 1
        self._counted -= 1
        self.free += 1

    def own(self, mark: int) -> int:
        """Requests of this process that the server can have counted when the one of that mark arrived, itself included."""
        return mark + self._counted

    def next_home(self, missing: int) -> float | None:
        """When so many more will be free. None: not before a request on the wire ends."""
        return self._home[missing - 1] if missing <= len(self._home) else None

    def homes(self) -> Sequence[float]:
        """When those that are out and not in flight come home, ascending."""
        return self._home

    def returns(self, now: float, period: float) -> list[float]:
        """When each of those that may be out can be had at the earliest, ascending, if what is in flight ends now."""
        times = sorted([*[now] * self.free, *[now + period] * self.in_flight, *self._home])
        return times[max(0, -self.free) :]
