"""`TokenBucket`: the requests of one scope that the server may count. A value: it is told the time, and nobody waits in it."""

from __future__ import annotations

from bisect import bisect_right, insort


class TokenBucket:
    """`limit` tokens, one for each request. A token returns one period after its request has ended.

    The server counts a request when it arrives, somewhere between its start and its end. Counted from the end, two requests that
    use one token arrive more than a period apart, whatever the delays.

    Attributes:
        limit: How many tokens there are. It may be changed at any time.
        on_wire: Tokens of requests that have not ended.
    """

    __slots__ = ("_counted", "_returns", "limit", "on_wire")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.on_wire = 0
        self._returns: list[float] = []  # of the tokens of ended requests; ascending
        self._counted = 0  # requests that have started and were not taken back

    def free(self, now: float) -> int:
        """Tokens that can be taken now; below 0 where the limit was lowered meanwhile."""
        returned = bisect_right(self._returns, now)
        if returned:
            del self._returns[:returned]
        return self.limit - self.on_wire - len(self._returns)

    def take(self, now: float) -> int:
        """A request starts. Returns a mark for `own`."""
        self.free(now)
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
        insort(self._returns, when)

    def put_back(self) -> None:
        """The server does not count a request; its token returns now."""
        self.on_wire -= 1
        self._counted -= 1

    def nth_return(self, nth: int) -> float | None:
        """When the `nth` of the tokens that are out returns, counted from 1; None while its request has not ended."""
        return self._returns[nth - 1] if 0 < nth <= len(self._returns) else None

    @property
    def is_whole(self) -> bool:
        """Whether all tokens are there, as of the last look. Such a bucket can be forgotten."""
        return not self.on_wire and not self._returns
