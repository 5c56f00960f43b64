"""`Tokens`: how many tokens one bucket has, where each of them is, and when it comes home. `TokenStore`: who keeps them.

This is all that a bucket asks of whoever counts for it, so that several processes can share one count. It counts; who gets
a token, and in which order, is `_limits`'s. Times are the running loop's.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from crustcredits._errors import ConfigurationError

# Seconds after it was taken by which a token that others could use has to be on the wire.
FRESH = 1.0


class Tokens(Protocol):
    """The tokens of one bucket. All alike: it does not matter which one a call has.

    A token is taken with `take`; then it goes back with `untake`, or onto the wire with `start`, from where it ends with
    `end`, or with `unsend` when its request left no trace in the server's count after all.
    """

    @property
    def free(self) -> int:
        """Tokens that can be taken now; below 0 when more are out than may be."""
        ...

    @property
    def available(self) -> int:
        """Tokens that could be had now, as far as is known; also those that have to be sent for."""
        ...

    @property
    def in_flight(self) -> int:
        """Tokens that are taken, on the wire or before it."""
        ...

    @property
    def alone(self) -> bool:
        """Whether this process counts by itself, because the count that all share is out of reach."""
        ...

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """Call `wake` when tokens became free, and `fail` when none can be had.

        Also when those sent for did not come; but not when they come home at the time that `next_home` says.
        """
        ...

    def resize(self, limit: int, debt: int) -> None:
        """So many there are from now on, and of these so many are held back; more may be out than is left."""
        ...

    def is_idle(self) -> bool:
        """Whether none is out, so that they can be forgotten."""
        ...

    def collect(self, now: float) -> None:
        """Make those free that have come home by `now`."""
        ...

    def take(self) -> None:
        """Take one of the free ones."""
        ...

    def untake(self) -> None:
        """Put one back that was not on the wire."""
        ...

    def is_stale(self, now: float) -> bool:
        """Whether the one that was taken first has been kept from others for too long."""
        ...

    def may_start(self, now: float) -> bool:
        """Whether one that was taken may go onto the wire, as things have become since."""
        ...

    def start(self, now: float) -> int:
        """One goes onto the wire. Returns a mark, for `own` and `spent`."""
        ...

    def end(self, home: float) -> None:
        """One has left the wire, and comes home then."""
        ...

    def unsend(self) -> None:
        """One has left the wire, and is free: the server does not count it here."""
        ...

    def own(self, mark: int) -> int:
        """Requests of this process that the server can have counted when the one of that mark arrived, itself included.

        Those that started by now, and ended after its start less a period, or have not ended.
        """
        ...

    def spent(self, mark: int, started: float, tell: Callable[[int], None]) -> None:
        """The same for all who share these tokens: `tell` is called with it, now or later."""
        ...

    def need(self, count: int, beyond: int = 0) -> bool | None:
        """So many wait for tokens. Whether one is there, if `beyond` more may be out than may; None: it is sent for.

        `wake` is called when what was sent for comes. With 0 nobody waits any more.
        """
        ...

    def next_home(self, missing: int, beyond: int = 0) -> float | None:
        """When so many more will be free, if `beyond` more may be out than may. None: not known, or sent for."""
        ...

    def homes(self) -> Sequence[float]:
        """When those that are out and not in flight come home, ascending."""
        ...

    def returns(self, now: float, period: float) -> list[float]:
        """When each of those that may be out can be had at the earliest, ascending, if what is in flight ends now."""
        ...


class TokenStore(Protocol):
    """Who keeps the tokens of all buckets. A client asks it for each bucket anew, and forgets those that are idle."""

    def open(self, *, period: float, late: float, pace: float | None) -> None:
        """A client begins to use it.

        Its tokens come home `period` seconds after their attempt's end, no attempt takes longer than `late`, and `pace` of
        them begin in a second.

        Raises:
            ConfigurationError: It cannot serve this client.
        """
        ...

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> Tokens:
        """The `limit` tokens of one bucket: of all requests to `path`, or of those of one account, or of one key by its digest."""
        ...

    async def close(self) -> None:
        """The client is closed: whatever was opened for it has to be closed too."""
        ...


def check_store(store: object) -> TokenStore:
    """It, if it is one. Raises `ConfigurationError` otherwise."""
    methods = (getattr(store, name, None) for name in ("open", "tokens", "close"))
    if isinstance(store, type) or not all(map(callable, methods)):
        kind = f"the class {store.__name__}" if isinstance(store, type) else f"a {type(store).__name__}"
        raise ConfigurationError(f"buckets is RedisBuckets(url), or another TokenStore, not {kind}")
    return cast("TokenStore", store)


class LocalTokens:
    """Tokens that are counted in this process."""

    __slots__ = ("_capacity", "_home", "_on_wire", "_starts", "free", "in_flight")

    alone = False

    def __init__(self, limit: int) -> None:
        self.free = limit
        self.in_flight = 0
        self._capacity = limit
        self._on_wire = 0
        self._starts = 0
        self._home: list[float] = []  # when the tokens that are out, and not in flight, come home; ascending

    @property
    def available(self) -> int:
        return max(0, self.free)

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """None becomes free by itself, and none is out of reach."""

    def resize(self, limit: int, debt: int) -> None:
        capacity = limit - debt
        self.free += capacity - self._capacity
        self._capacity = capacity

    def is_idle(self) -> bool:
        return not self.in_flight and not self._home

    def collect(self, now: float) -> None:
        if not self._home or self._home[0] > now:
            return
        home = bisect_right(self._home, now)
        del self._home[:home]
        self.free += home

    def take(self) -> None:
        self.free -= 1
        self.in_flight += 1

    def untake(self) -> None:
        self.in_flight -= 1
        self.free += 1

    def is_stale(self, now: float) -> bool:
        return False

    def may_start(self, now: float) -> bool:
        """Not when meanwhile the others that have gone are as many as may be out."""
        self.collect(now)
        return self._on_wire + len(self._home) < self._capacity

    def start(self, now: float) -> int:
        self.collect(now)
        # Those that are out now, and from now on the starts: together they are what `own` counts.
        mark = self._on_wire + len(self._home) - self._starts
        self._on_wire += 1
        self._starts += 1
        return mark

    def end(self, home: float) -> None:
        self.in_flight -= 1
        self._on_wire -= 1
        insort(self._home, home)

    def unsend(self) -> None:
        self.in_flight -= 1
        self._on_wire -= 1
        self._starts -= 1
        self.free += 1

    def own(self, mark: int) -> int:
        return mark + self._starts

    def spent(self, mark: int, started: float, tell: Callable[[int], None]) -> None:
        tell(mark + self._starts)

    def need(self, count: int, beyond: int = 0) -> bool | None:
        return self.free + beyond > 0

    def next_home(self, missing: int, beyond: int = 0) -> float | None:
        missing -= beyond
        if missing <= 0:
            return -math.inf
        return self._home[missing - 1] if missing <= len(self._home) else None

    def homes(self) -> Sequence[float]:
        return self._home

    def returns(self, now: float, period: float) -> list[float]:
        times = sorted([*[now] * self.free, *[now + period] * self.in_flight, *self._home])
        return times[max(0, -self.free) :]


class LocalStore:
    """Tokens in this process: the default."""

    def open(self, *, period: float, late: float, pace: float | None) -> None:
        """Nothing has to be opened."""

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> Tokens:
        return LocalTokens(limit)

    async def close(self) -> None:
        """Nothing was opened."""
