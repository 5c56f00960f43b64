"""`Turn`: where one call stands on its way to an answer. Whoever makes it wait writes here; those who wait for it read.

It neither waits nor sends, and knows nobody by name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import asyncio

    from crustcredits._errors import CrustCreditsError


class Queue(Protocol):
    """What a turn waits in."""

    def expected(self, turn: Turn, now: float) -> float:
        """When it is to come out, as things stand."""
        ...

    def move_up(self, turn: Turn) -> None:
        """Somebody waits for it now."""
        ...


class Turn:
    """One call's way through queue, wire and backoff. Times are the running loop's.

    Attributes:
        wanted: Whether somebody waits for the answer. Otherwise it only refreshes what is known, and gives way.
        since: What orders those that only refresh: since when nothing new is known.
        attempts: Requests put on the wire for it, the one under way included.
        last: Why the attempt before failed, or None.
        failing_since: When its first attempt failed, or None.
        on_wire: Whether a request is under way.
        waiter: What it waits for in its queue, if it waits in one.
    """

    # Most calls neither wait nor fail: what they never change stands here once for all.
    wanted = True
    since = 0.0
    attempts = 0
    last: CrustCreditsError | None = None
    failing_since: float | None = None
    on_wire = False
    waiter: asyncio.Future[int] | None = None
    _queue: Queue | None = None
    _until = 0.0

    def on_wait(self) -> None:
        """It has just begun to wait; for those who have to know."""

    def can_fall_back(self) -> bool:
        """Whether all who wait for it have an older answer that may stand in."""
        return False

    def patience(self, now: float) -> float:
        """Seconds for which somebody still waits for it, at the most."""
        return math.inf

    def joins(self, queue: Queue) -> None:
        """It begins to wait in `queue`."""
        self._queue = queue
        self.on_wait()

    def leaves(self) -> None:
        """It waits in no queue any more."""
        self._queue = None

    def waits(self, until: float) -> None:
        """It begins to wait until then at least."""
        self._until = until
        self.on_wait()

    def earliest(self, now: float) -> float:
        """When its next attempt can start, as things stand."""
        if self._queue is not None:
            return self._queue.expected(self, now)
        return max(now, self._until)

    def want(self) -> None:
        """Somebody waits for it from now on."""
        self.wanted = True
        if self._queue is not None:
            self._queue.move_up(self)
