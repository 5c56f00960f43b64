"""`Witnesses`: the proof that the server counts one account's requests apart from the others'.

Nobody documents whether the limit is counted by key, by account or for the caller as a whole. So all keys share one bucket, the
cautious reading, and a request's token leaves it early only on proof. The proof is a contradiction. Let *j* be an answer that tells
of `used` counted requests, and *i* be this client's answers, of whatever account, that

- ended at least `LAG` before *j* started, so that a count that lags by no more had them when *j* arrived, and
- started within one period before *j* ended, so that they were still in *j*'s window.

If the server counted all accounts together, it would have counted at least these. `used` must therefore be no less than their
number. When it is at least `WITNESSES` less, the reading is wrong for *j*. And when `used` is no more than what this client
itself has sent for *j*'s account, none of the others need be in that count. Both together are the rule: `used <= own` and
`own + WITNESSES <= standing`. It implies that at least `WITNESSES` of the witnesses are of other accounts, since no more than
`own` are of *j*'s own.

It assumes that the server counts a request before it answers it, or within `LAG` of that; that a request counts for a whole period;
and that the numbers speak of the limit in question, which is why only answers count whose `x-ratelimit-limit` is the
configured one. It does not assume that the others are counted apart from each other: nothing is concluded for them. Keys that
share an account and do not say so tell of each other's requests, `used` is more than `own`, and they stay.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

# Seconds by which the server's count may lag behind its answers.
LAG = 1.5
# How many requests have to be missing from a count, so that it is no accident of two or three.
WITNESSES = 10
# Those that nobody can name any more are dropped when there are so many of them.
_CHUNK = 512


class Witnesses:
    """The answered requests of this client on one endpoint, of the last period."""

    __slots__ = ("_ends", "_late", "_period", "_starts")

    def __init__(self, period: float, late: float) -> None:
        self._period = period
        self._late = late  # no request takes longer
        self._starts: list[float] = []
        self._ends: list[float] = []  # both ascending, so that they need not belong together

    def add(self, started: float, ended: float) -> None:
        """The server has counted a request: its answer said so. They come in the order of their ends."""
        insort(self._starts, started)
        self._ends.append(ended)
        if len(self._ends) > _CHUNK and self._ends[_CHUNK] < started - self._period - self._late - LAG:
            # For whoever asks from now on they are settled and aged, which comes to nothing.
            del self._ends[:_CHUNK], self._starts[:_CHUNK]

    def standing(self, started: float, now: float) -> int:
        """At least so many are in the count that an answer told which started then and has just come, if all count together."""
        settled = bisect_right(self._ends, started - LAG)
        # Of these, the ones that may have aged out; whichever started so early and ended later makes it only less.
        aged = bisect_left(self._starts, now - self._period)
        return settled - aged

    def prove(self, used: int, own: int, started: float, now: float) -> bool:
        """Whether an answer that told of `used` requests shows that the server counts its account apart."""
        return used <= own and own + WITNESSES <= self.standing(started, now)
