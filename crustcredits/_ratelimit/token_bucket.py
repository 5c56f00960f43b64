"""`TokenBucket`: the requests of one scope that the server may count.

A value: methods take the time as `now`, and no caller waits in it. `feedback` decides when the
token of an ended request returns: one period after its end, because the server's window slides.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Hashable
from typing import Protocol, TypeAlias

# Most returning tokens that the distance between refreshes is computed from.
_LOOKS = 100


class Bucket(Protocol):
    """The interface of a bucket to the scheduler, whether Redis or this process counts.

    `TokenBucket` documents each member.

    Attributes:
        limit: How many tokens there are.
        on_wire: Tokens of requests that have not ended.
        next_refresh: When the next refresh may take a token.
        is_shared: Whether other processes take tokens too.
        is_cut_off: Whether the count that several processes share is out of reach.
        is_degraded: Whether this process counts in degraded mode, because of that.
        is_settling: Whether all tokens are back, and other processes do not know it yet.
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
    def is_cut_off(self) -> bool: ...
    @property
    def is_degraded(self) -> bool: ...
    @property
    def is_settling(self) -> bool: ...
    @property
    def is_whole(self) -> bool: ...
    def room(self, now: float, kept: int) -> int: ...
    def room_at(self, now: float, kept: int) -> float | None: ...
    def want(self, count: int, kept: int) -> None: ...
    def take(self, now: float, kept: int = 0) -> int: ...
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
        next_refresh: When the next refresh may take a token; stored here for the scheduler.
    """

    __slots__ = ("_counted", "_returns", "limit", "next_refresh", "on_wire")

    is_cut_off = is_degraded = is_shared = is_settling = False

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.on_wire = 0
        self.next_refresh = 0.0
        self._returns: list[float] = []  # when tokens of ended requests return; ascending
        self._counted = 0  # requests that have started, without those put back

    def room(self, now: float, kept: int) -> int:
        """Tokens that can be taken now, without `kept` of them.

        Below 0 if more are out, or after the limit was lowered.
        """
        returns = self._returns
        if returns and returns[0] <= now:
            del returns[: bisect_right(returns, now)]
        return self.limit - kept - self.on_wire - len(returns)

    def room_at(self, now: float, kept: int) -> float | None:
        """When the next token can be taken.

        None where that needs a request on the wire to end.
        """
        nth = max(1, 1 - self.room(now, kept))
        return self._returns[nth - 1] if nth <= len(self._returns) else None

    def want(self, count: int, kept: int) -> None:
        """Note that `count` calls wait, which may take all tokens but `kept`.

        Does nothing: tokens return by themselves.
        """

    def take(self, now: float, kept: int = 0) -> int:
        """Take a token, for which there is `room`, for a request that leaves `kept` tokens.

        Returns a mark for `own`.
        """
        mark = self.on_wire + len(self._returns) - self._counted
        self.on_wire += 1
        self._counted += 1
        return mark

    def own(self, mark: int) -> int:
        """Most requests of this client in an answer's count, the request of the mark included."""
        return mark + self._counted

    def return_at(self, when: float) -> None:
        """Note that a request has ended, and that its token returns at `when`."""
        self.on_wire -= 1
        if self._returns and when < self._returns[-1]:
            insort(self._returns, when)
        else:
            self._returns.append(when)

    def put_back(self) -> None:
        """Return the token of a request that the server does not count, at once."""
        self.on_wire -= 1
        self._counted -= 1

    def returning(self, since: float, until: float) -> int:
        """How many tokens of ended requests return from one moment to another."""
        return bisect_right(self._returns, until) - bisect_left(self._returns, since)

    @property
    def is_whole(self) -> bool:
        """Whether all tokens were back at the last look. Such a bucket can be forgotten."""
        return not self.on_wire and not self._returns

    def available(self, now: float) -> int:
        """Tokens that could be taken now."""
        return max(0, self.room(now, 0))

    def returns(self, now: float, period: float) -> list[float]:
        """When each token can be taken, ascending, if the requests on the wire end now."""
        room = self.room(now, 0)
        times = sorted([*[now] * room, *[now + period] * self.on_wire, *self._returns])
        return times[max(0, -room) :]


def refresh_gap(bucket: Bucket, now: float, period: float, kept: int) -> float:
    """Seconds to the next refresh, so that refreshes are spread over the tokens that return.

    As many refreshes can follow at the same distance as tokens are left and return for them. At a
    shorter distance after a burst of other calls, refreshes would use up the rest and then stop
    until the tokens of the burst return.
    """
    returns = [when - now for when in bucket.returns(now, period) if when > now]
    spare = max(0, bucket.available(now) - kept) + 1
    step = 1 + len(returns) // _LOOKS
    gap = period / max(1, bucket.limit - kept)
    return max([gap, *(returns[index] / (spare + index) for index in range(0, len(returns), step))])


MakeBucket: TypeAlias = Callable[[Hashable | None, int, Callable[[Hashable | None], None]], Bucket]


def local_bucket(
    whose: Hashable | None, limit: int, wake: Callable[[Hashable | None], None]
) -> Bucket:
    """Tokens that are counted in this process."""
    return TokenBucket(limit)
