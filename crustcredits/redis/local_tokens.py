"""`LocalTokens`: this process's own count of tokens that it shares with others.

Times are the running loop's.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

# Seconds after its grant by which a shared token must be used for an attempt.
FRESH = 1.0


class LocalTokens:
    """Tokens counted in this process.

    All are alike: it does not matter which one a call takes.
    """

    __slots__ = ("_capacity", "_counted", "_home", "free", "in_flight")

    def __init__(self, limit: int) -> None:
        self.free: int = limit
        self.in_flight: int = 0
        self._capacity = limit
        self._counted = 0
        # Return times of used tokens that are not in flight, ascending.
        self._home: list[float] = []

    @property
    def available(self) -> int:
        """Number of tokens that are free now."""
        return max(0, self.free)

    @property
    def out(self) -> int:
        """Number of tokens that are in use, or have not returned."""
        return self.in_flight + len(self._home)

    def resize(self, limit: int) -> None:
        """Set the number of tokens; more may be out than remain."""
        self.free += limit - self._capacity
        self._capacity = limit

    def is_idle(self) -> bool:
        """Whether no token is out."""
        return not self.in_flight and not self._home

    def collect(self, now: float) -> None:
        """Free the tokens whose return time has come."""
        home = bisect_right(self._home, now)
        if home:
            del self._home[:home]
            self.free += home

    def start(self, now: float) -> int:
        """Use one token for an attempt; return a mark for `own`."""
        self.collect(now)
        mark = self.out - self._counted
        self.free -= 1
        self.in_flight += 1
        self._counted += 1
        return mark

    def end(self, home: float) -> None:
        """End one attempt; its token returns at `home`."""
        self.in_flight -= 1
        insort(self._home, home)

    def unsend(self) -> None:
        """End one attempt that the server does not count here; its token is free at once."""
        self.in_flight -= 1
        self._counted -= 1
        self.free += 1

    def own(self, mark: int) -> int:
        """Most requests of this process that the server can have counted at that mark's arrival.

        The request of that mark is included.
        """
        return mark + self._counted

    def next_home(self, missing: int) -> float | None:
        """Time at which `missing` more tokens are free; None: not before an attempt ends."""
        return self._home[missing - 1] if missing <= len(self._home) else None

    def homes(self) -> Sequence[float]:
        """Return times of the tokens that are out and not in flight, ascending."""
        return self._home

    def returns(self, now: float, period: float) -> list[float]:
        """Earliest free time of each token, ascending, if every attempt in flight ends now."""
        times = sorted([*[now] * self.free, *[now + period] * self.in_flight, *self._home])
        return times[max(0, -self.free) :]
