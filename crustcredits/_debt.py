"""`Debt`: what somebody else has spent of a bucket's quota, as the server's own count tells it.

An answer's `x-ratelimit-*` headers say how many requests the server has counted in its window. What is more than this bucket's
own can have been counted there is somebody else's: another process, the vendor's dashboard. It is a value with a date: nothing here
waits or knows a clock.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import NamedTuple

import attrs


class Told(NamedTuple):
    """What one answer told of the server's count. Times are the loop's, spans in seconds.

    Attributes:
        account: Whose request it answered.
        started: When that request began.
        at: When the answer had come.
        used: Requests that the server had counted in its window, this one included.
        reset: Until one slot is free, or None when it did not say.
    """

    account: Hashable
    started: float
    at: float
    used: int
    reset: float | None


@attrs.define
class Debt:
    """Tokens that a bucket holds back, and until when.

    Where several accounts draw on one bucket of which it is not known that the server counts them together, the last `voices`
    different ones have to agree, and the least counts: one key that is hammered from elsewhere is no reason to hold back
    the others.

    Attributes:
        amount: Tokens held back.
        until: When it ends, if no newer answer comes: all that the server had counted then has aged out.
        probe_at: When one request may find out, where the debt is all that holds the bucket shut: the server said that a
            slot becomes free then. Infinite when it did not say, or one is finding out.
        finding_out: Whether one has gone to find out, and nothing was told since.
    """

    voices: int
    amount: int = 0
    until: float = -math.inf
    probe_at: float = math.inf
    finding_out: bool = False
    _told: dict[Hashable, tuple[int, float]] = attrs.field(factory=dict)  # of others, and when

    def hear(self, told: Told, own: int, *, period: float, spacing: float) -> None:
        """An answer told this, and so many of the requests can have been this bucket's own. They come in the order of their starts.

        `spacing` is how far apart, on the average, slots become free: what is said in whole seconds can say 0.
        """
        self._told.pop(told.account, None)
        self._told[told.account] = max(0, told.used - own), told.at
        if len(self._told) > self.voices:
            del self._told[next(iter(self._told))]
        amounts = [others for others, at in self._told.values() if told.at - at < period]
        self.amount = min(amounts) if len(amounts) == self.voices else 0
        self.finding_out = False
        self.until = told.at + period
        self.probe_at = math.inf if told.reset is None else told.at + max(told.reset, spacing)

    def probed(self) -> None:
        """One has gone to find out."""
        self.probe_at, self.finding_out = math.inf, True

    def not_probed(self, now: float) -> None:
        """It has not, after all."""
        if self.finding_out:
            self.probe_at, self.finding_out = now, False
