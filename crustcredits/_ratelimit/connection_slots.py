"""`ConnectionSlots`: the bound on concurrency, which counts requests on the wire.

A request without an answer for too long is called hanging. It gives its slot back, so that hanging
keys hold up no others. The number of hanging requests is bounded too. A value: methods take the
time as `now`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

_RequestT = TypeVar("_RequestT", bound=Hashable)

# A request hangs after this many seconds without an answer, more than a healthy API needs for one
# number; where the API is slow for all, after this multiple of its usual answer time.
_PATIENCE = 0.4
_PATIENCE_TIMES = 4.0
# How many requests may hang without a slot, as a multiple of the slots.
HANGING_SHARE = 8
# The weight of the newest answer in the moving average of answer times.
_NEWEST_SHARE = 0.1


class ConnectionSlots(Generic[_RequestT]):
    """Slots for `count` requests on the wire at once, beside the hanging ones.

    Attributes:
        count: Slots in all.
        free: Slots that can be taken now.
        usual: Seconds that an answer takes, as a moving average; None before the first.
        patience: Seconds after which a request without an answer hangs.
    """

    __slots__ = ("_hanging", "_late", "_prompt", "count", "free", "patience", "usual")

    def __init__(self, count: int) -> None:
        self.count = self.free = count
        self.usual: float | None = None
        self.patience = _PATIENCE
        self._prompt: dict[_RequestT, float] = {}  # start times; the oldest first
        # Start times of requests that hang and still hold a slot, because too many others hang.
        self._late: dict[_RequestT, float] = {}
        self._hanging: dict[_RequestT, float] = {}

    def __len__(self) -> int:
        """Requests on the wire, hanging or not."""
        return len(self._prompt) + len(self._late) + len(self._hanging)

    def take(self, request: _RequestT, now: float) -> None:
        """Note that a request starts, and take a slot."""
        self._prompt[request] = now
        self.free -= 1

    def release(self, request: _RequestT, now: float, *, answered: bool) -> None:
        """Note that a request has ended; `answered` ones update the usual time of an answer."""
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
            self.patience = max(_PATIENCE, _PATIENCE_TIMES * self.usual)
        if self._late:
            self._let_hang()

    def overdue(self, now: float) -> list[_RequestT]:
        """Requests that have begun to hang since the last call."""
        found: list[_RequestT] = []
        for request, began in self._prompt.items():
            if began + self.patience > now:
                break
            found.append(request)
        for request in found:
            self._late[request] = self._prompt.pop(request)
        if found:
            self._let_hang()
        return found

    def next_overdue(self) -> float | None:
        """When the next request begins to hang, if no answer comes before.

        None without such a request.
        """
        return next(iter(self._prompt.values())) + self.patience if self._prompt else None

    def _let_hang(self) -> None:
        while self._late and len(self._hanging) < HANGING_SHARE * self.count:
            request = next(iter(self._late))
            self._hanging[request] = self._late.pop(request)
            self.free += 1
