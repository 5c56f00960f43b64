"""`Alarm`: one timer of the running loop, which is set again and again."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """A timer for the next of many moments, in seconds of the loop's clock.

    Args:
        ring: Called at the moment, or a little before: uvloop's clock has ticks.

    Attributes:
        at: The moment; infinite if the alarm is not set. The handles of uvloop do not expose it.
    """

    __slots__ = ("_handle", "_ring", "at")

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._handle: asyncio.Handle | None = None
        self.at = math.inf

    def set(self, at: float) -> None:
        """Ring at this moment, and not before; never if it is infinite."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.at = at
        if at < math.inf:
            self._handle = asyncio.get_running_loop().call_at(at, self._on_time)

    def _on_time(self) -> None:
        self._handle, self.at = None, math.inf
        self._ring()
