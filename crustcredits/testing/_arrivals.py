"""`Arrivals`: counts the requests that reach the fake API against its limit, and records them."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping

import attrs

from crustcredits._errors import ConfigurationError


@attrs.frozen(kw_only=True)
class Arrival:
    """One request as it reached the sandbox.

    Attributes:
        at: The running loop's time of arrival.
        key: The label of the key, or None if no known key was sent.
        path: The path of the request.
        headers: As sent. They hold the secret, so they do not print.
        refused: Whether it was answered 429 because the window was full.
    """

    at: float
    key: str | None
    path: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    refused: bool


class Arrivals:
    """Counts arrivals in windows that slide, one for each endpoint and scope.

    Args:
        limit: Arrivals that a window holds.
        period: Seconds of a window.
        record: Whether every arrival is recorded.

    Attributes:
        recorded: Every arrival, in order; empty without `record`.
        requests: Number of arrivals.
        refused: Arrivals in a full window.
    """

    def __init__(self, *, limit: int, period: float, record: bool) -> None:
        self.recorded: list[Arrival] = []
        self.requests = 0
        self.refused = 0
        self._limit = limit
        self._period = period
        self._record = record
        self._windows: defaultdict[Hashable, deque[float]] = defaultdict(deque)

    def count(
        self, path: str, headers: Mapping[str, str], scope: Hashable, label: str | None
    ) -> tuple[bool, dict[str, str]]:
        """Count an arrival, unless the window is full.

        Returns whether it is full, and the headers of every answer.
        """
        now = asyncio.get_running_loop().time()
        window = self._windows[path, scope]
        while window and window[0] <= now - self._period:
            window.popleft()
        refused = len(window) >= self._limit
        if not refused:
            window.append(now)
        self.requests += 1
        self.refused += refused
        if self._record:
            self.recorded.append(
                Arrival(at=now, key=label, path=path, headers=headers, refused=refused)
            )
        return refused, {
            "x-ratelimit-limit": str(self._limit),
            "x-ratelimit-remaining": str(self._limit - len(window)),
            "x-ratelimit-reset": str(math.ceil(self._period - (now - window[0]))),
            "x-request-id": f"sandbox-{self.requests}",
            "x-credits-used": "0",
        }

    def worst_window(self) -> int:
        """The most arrivals on one endpoint within any one period.

        Raises:
            ConfigurationError: Arrivals are not recorded.
        """
        if not self._record:
            raise ConfigurationError(
                "the worst window is unknown, because arrivals are not recorded; use record=True"
            )
        times: defaultdict[str, list[float]] = defaultdict(list)
        for arrival in self.recorded:
            times[arrival.path].append(arrival.at)
        return max((_most_within(self._period, each) for each in times.values()), default=0)


def _most_within(period: float, times: list[float]) -> int:
    most, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - period:
            first += 1
        most = max(most, last - first + 1)
    return most
