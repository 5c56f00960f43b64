"""`Pause`: when refusals (429) hold back all who take tokens of a bucket, and until when. A value; it knows no clock."""

from __future__ import annotations

import math
from collections.abc import Hashable

# Three refused accounts in a row are a pattern, one or two are their own trouble.
_REFUSALS_TO_PAUSE = 3
# `x-ratelimit-reset` comes in whole seconds, so answers that mean one moment can differ by almost this much.
_SAME_MOMENT = 1.0


class Pause:
    """The last accounts that were refused with no success between, and the pause that they make.

    One refused account holds back nobody else, because it may be hammered from elsewhere. When the last three were told the same
    moment, it is the window that they share: then the bucket pauses until then, and after that lets one probe at a time
    through until a success ends it.

    Attributes:
        until: Until when nobody goes, and then one at a time. None without a pause.
    """

    __slots__ = ("_refused", "until")

    def __init__(self) -> None:
        self.until: float | None = None
        self._refused: dict[Hashable, float] = {}  # the moments they were told

    def refused(self, account: Hashable, now: float, wait: float | None) -> bool:
        """`account` was told to come back in `wait` seconds. Returns whether the pause has changed by that.

        An unknown moment agrees with none.
        """
        moment = math.nan if wait is None else now + wait
        self._refused.pop(account, None)
        self._refused[account] = moment
        if len(self._refused) > _REFUSALS_TO_PAUSE:
            del self._refused[next(iter(self._refused))]
        begins = self.until is None and len(self._refused) == _REFUSALS_TO_PAUSE and self._agree()
        goes_on = self.until is not None and wait is not None
        if begins or goes_on:
            self.until = max(self.until or 0.0, moment)
        return begins or goes_on

    def succeeded(self) -> bool:
        """The server served a request: whatever was refused before, the bucket as a whole is not. Returns whether a pause ends."""
        paused = self.until is not None
        self.until = None
        self._refused.clear()
        return paused

    def _agree(self) -> bool:
        moments = self._refused.values()
        return not any(map(math.isnan, moments)) and max(moments) - min(moments) <= _SAME_MOMENT
