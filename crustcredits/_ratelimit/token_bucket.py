"""`TokenBucket`: the requests of one scope that the server may count.

A value: it is told the time, and nobody waits in it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import Protocol

# Of the tokens that are out, how many are looked at to tell how fast refreshes may follow each
# other.
_LOOKS = 100


class Bucket(Protocol):
    """What the scheduler needs of tokens, wherever they are counted.

    `TokenBucket` says what each member is.

    Attributes:
        limit: How many tokens there are.
        on_wire: Tokens of requests that have not ended.
        next_refresh: When the next refresh may take one.
        is_shared: Whether other processes take them too.
        is_degraded: Whether this process counts by itself, because the count that several share is
            out of reach.
        is_settling: Whether all tokens are there, and other processes are still to be told so.
    """

    next_refresh: float

    @property
    def limit(self) -> int: ...
    @limit.setter
    def limit(self, limit: int) -> None: ...
    @property
    def is_shared(self) -> bool: ...
    @property
    def on_wire(self) -> int: ...
    @property
    def is_degraded(self) -> bool: ...
    @property
    def is_settling(self) -> bool: ...
    @property
    def is_whole(self) -> bool: ...
    def room(self, now: float, kept: int) -> int: ...
    def room_at(self, now: float, kept: int) -> float | None: ...
    def want(self, count: int, kept: int) -> None: ...
    def take(self, now: float) -> int: ...
    def own(self, mark: int) -> int: ...
    def return_at(self, when: float) -> None: ...
    def put_back(self) -> None: ...
    def returning(self, since: float, until: float) -> int: ...
    def available(self, now: float) -> int: ...
    def returns(self, now: float, period: float) -> list[float]: ...


class TokenBucket:
    """`limit` tokens, one for each request. A token returns one period after its request has ended.

    The server counts a request when it arrives, somewhere between its start and its end. Counted
    from the end, two requests that use one token arrive more than a period apart, whatever the
    delays.

    Attributes:
        limit: How many tokens there are. It may be changed at any time.
        on_wire: Tokens of requests that have not ended.
        next_refresh: When the next refresh may take one; kept here for the scheduler.
    """

    __slots__ = ("_counted", "_returns", "limit", "next_refresh", "on_wire")

    is_degraded = is_shared = is_settling = False

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.on_wire = 0
        self.next_refresh = 0.0
        self._returns: list[float] = []  # of the tokens of ended requests; ascending
        self._counted = 0  # requests that have started and were not taken back

    def room(self, now: float, kept: int) -> int:
        """Tokens that can be taken now, but for `kept` of them.

        Below 0 where more are out, or the limit was lowered.
        """
        returns = self._returns
        if returns and returns[0] <= now:
            del returns[: bisect_right(returns, now)]
        return self.limit - kept - self.on_wire - len(returns)

    def room_at(self, now: float, kept: int) -> float | None:
        """When there is room, or room for one more.

        None where that needs a request on the wire to end.
        """
        nth = max(1, 1 - self.room(now, kept))
        return self._returns[nth - 1] if nth <= len(self._returns) else None

    def want(self, count: int, kept: int) -> None:
        """So many calls wait for tokens, and leave `kept` alone.

        Nothing: tokens return by themselves.
        """

    def take(self, now: float) -> int:
        """A request starts, for which there is `room` now. Returns a mark for `own`."""
        mark = self.on_wire + len(self._returns) - self._counted
        self.on_wire += 1
        self._counted += 1
        return mark

    def own(self, mark: int) -> int:
        """At most so many of this client's requests are in the count that an answer tells, its own included."""
        return mark + self._counted

    def return_at(self, when: float) -> None:
        """A request has ended; its token returns then."""
        self.on_wire -= 1
        if self._returns and when < self._returns[-1]:
            insort(self._returns, when)
        else:
            self._returns.append(when)

    def put_back(self) -> None:
        """The server does not count a request; its token returns now."""
        self.on_wire -= 1
        self._counted -= 1

    def returning(self, since: float, until: float) -> int:
        """How many tokens of ended requests return from one moment to another."""
        return bisect_right(self._returns, until) - bisect_left(self._returns, since)

    @property
    def is_whole(self) -> bool:
        """Whether all tokens are there, as of the last look. Such a bucket can be forgotten."""
        return not self.on_wire and not self._returns

    def available(self, now: float) -> int:
        """Tokens that could be had now."""
        return max(0, self.room(now, 0))

    def returns(self, now: float, period: float) -> list[float]:
        """When each token can be had, ascending, if the requests on the wire end now."""
        room = self.room(now, 0)
        times = sorted([*[now] * room, *[now + period] * self.on_wire, *self._returns])
        return times[max(0, -room) :]


def refresh_gap(bucket: Bucket, now: float, period: float, kept: int) -> float:
    """Seconds to the next refresh, such that as many follow at the same distance as tokens are left and return for them.

    Sooner, and after a burst of others they would use up what is left and then stop until the burst
    returns.
    """
    returns = [when - now for when in bucket.returns(now, period) if when > now]
    spare = max(0, bucket.available(now) - kept) + 1
    step = 1 + len(returns) // _LOOKS
    gap = period / max(1, bucket.limit - kept)
    return max([gap, *(returns[place] / (spare + place) for place in range(0, len(returns), step))])
