"""`ConnectionSlots`: how many requests are on the wire at once, and what becomes of those that hang there.

A request that has been without an answer for so long that it must be called hanging stops counting,
so that hanging keys hold up no others; how many may hang beside the others is bounded too. A value:
it is told the time.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

_RequestT = TypeVar("_RequestT", bound=Hashable)

# Seconds without an answer that a healthy API does not need for one number, and, where it is slow
# for all, how many times its usual answer.
_PATIENCE = 0.4
_PATIENCE_TIMES = 4.0
# How many requests may hang and not count, as a multiple of those that count.
HANGING_SHARE = 8
# Of the usual time of an answer, the share that each answer changes.
_NEWEST_SHARE = 0.1


class ConnectionSlots(Generic[_RequestT]):
    """Slots for `count` requests on the wire at once, beside those that hang.

    Attributes:
        count: Slots there are.
        free: Slots that can be taken now.
        usual: Seconds that an answer takes, as a moving average; None before the first.
    """

    __slots__ = ("_hanging", "_late", "_patience", "_prompt", "count", "free", "usual")

    def __init__(self, count: int) -> None:
        self.count = self.free = count
        self.usual: float | None = None
        self._patience = _PATIENCE  # seconds after which a request without an answer hangs
        self._prompt: dict[_RequestT, float] = {}  # when each began; the oldest first
        self._late: dict[
            _RequestT, float
        ] = {}  # they hang, and count, because too many others hang
        self._hanging: dict[_RequestT, float] = {}

    def __len__(self) -> int:
        """Requests on the wire, hanging or not."""
        return len(self._prompt) + len(self._late) + len(self._hanging)

    def take(self, request: _RequestT, now: float) -> None:
        """A request goes onto the wire."""
        self._prompt[request] = now
        self.free -= 1

    def release(self, request: _RequestT, now: float, *, answered: bool) -> None:
        """A request has ended. Whether the server `answered` tells how long its answers take."""
        began = self._prompt.pop(request, None)
        if began is None:
            began = self._late.pop(request, None)
        if began is None:
            began = self._hanging.pop(request)
        else:
            self.free += 1
        if answered:
            took = now - began
            self.usual = (
                took
                if self.usual is None
                else (1 - _NEWEST_SHARE) * self.usual + _NEWEST_SHARE * took
            )
            self._patience = max(_PATIENCE, _PATIENCE_TIMES * self.usual)
        if self._late:
            self._let_hang()

    def overdue(self, now: float) -> list[_RequestT]:
        """Requests that have begun to hang since the last look."""
        found: list[_RequestT] = []
        for request, began in self._prompt.items():
            if began + self._patience > now:
                break
            found.append(request)
        for request in found:
            self._late[request] = self._prompt.pop(request)
        if found:
            self._let_hang()
        return found

    def next_overdue(self) -> float | None:
        """When the next request begins to hang, if no answer comes before.

        None when there is none.
        """
        return next(iter(self._prompt.values())) + self._patience if self._prompt else None

    def _let_hang(self) -> None:
        while self._late and len(self._hanging) < HANGING_SHARE * self.count:
            request = next(iter(self._late))
            self._hanging[request] = self._late.pop(request)
            self.free += 1
