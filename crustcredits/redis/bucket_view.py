"""`BucketView`: the last answer of Redis about one bucket. No I/O; times are the running loop's."""

from __future__ import annotations

import math
from bisect import bisect_right

from crustcredits.redis.protocol import BucketState

# Most seconds from the return of a token to the message that asks for it, so that one message
# fetches all that return in between.
GAP = 0.15


class BucketView:
    """What one process knows of a bucket in Redis.

    Attributes:
        others_until: When the tokens have returned that other processes had out.
        is_in_line: Whether Redis counts this process among the ones that wait for the bucket.
        coming: When the next tokens return, ascending.
    """

    def __init__(self) -> None:
        self.is_in_line: bool = False
        self.coming: list[float] = []
        self.others_until: float = 0.0
        self._others = 0
        # By the number of tokens that calls leave: until when there are none for them.
        self._short: dict[int, float] = {}

    def hear(
        self, state: BucketState, now: float, *, own: int, period: float, is_short: bool
    ) -> None:
        """Take the state of the bucket; `own` tokens are this process's.

        `is_short` says that not all permits were granted.
        """
        self._others, self.others_until = max(0, state.out - own), now + period
        self.coming = [now + seconds for seconds in state.returns]
        self.is_in_line = is_short or state.missing > 0 or state.free > 0

    def others_out(self, now: float) -> int:
        """How many tokens other processes have out, as far as known."""
        return self._others if now < self.others_until else 0

    def has_come(self, now: float) -> int | None:
        """How many tokens have returned since; None if no return was told."""
        return bisect_right(self.coming, now) if self.coming else None

    def short_until(self, kept: int) -> float:
        """Until when there is no token for calls that leave `kept` tokens, as far as known."""
        if not self._short:  # the usual case, at little cost
            return -math.inf
        return max((when for most, when in self._short.items() if most <= kept), default=-math.inf)

    def note_short(self, kept: int, now: float, otherwise: float) -> None:
        """Note that there is no token now for calls that leave `kept` tokens.

        They ask for the tokens that return next, and for the ones that follow at once. Where no
        return was told, they ask at `otherwise`.
        """
        if not self.coming:
            self._short[kept] = otherwise
            return
        first = max(now, self.coming[0])
        self._short[kept] = max(first, self.coming[bisect_right(self.coming, first + GAP) - 1])

    def forget_short(self) -> None:
        """Note that there may be tokens for all calls."""
        self._short.clear()
