"""The tokens of one process where the count is elsewhere, without that place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


class Tokens:
    """Tokens of one process without a store. Each request to the store is noted in `log`."""

    def __init__(self, limit: int = 10, free: int = 0) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.limit, self.unused = limit, free
        self.in_flight = self.share = self.available = 0
        self.cut_off = self.degraded = self.settling = self.idle = False
        self.coming: list[float] = []
        self.not_before = -math.inf
        self.askable = 0

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        self.wake, self.fail = wake, fail

    def resize(self, limit: int) -> None:
        self.limit = limit

    def is_settling(self) -> bool:
        return self.settling

    def is_idle(self) -> bool:
        return self.idle

    def collect(self, now: float) -> None:
        """Tokens that return by now are free and available."""
        self.log.append(("collect", now))
        back = sum(when <= now for when in self.coming)
        del self.coming[:back]
        self.unused += back
        self.available += back

    def next_home(self, missing: int) -> float | None:
        return self.coming[missing - 1] if missing <= len(self.coming) else None

    def need(self, count: int, kept: int, kept_within: int = 0) -> None:
        self.log.append(("need", count, kept, kept_within))

    def ask_later(self) -> None:
        self.log.append(("ask later",))

    def short_until(self, kept: int) -> float:
        return self.not_before

    def may_ask(self, count: int) -> bool:
        return self.askable > 0

    def room_to_ask(self, now: float, kept: int) -> int:
        return self.askable - kept

    def free(self, kept: int) -> int:
        return self.unused

    def start(self, now: float, kept: int) -> int:
        self.log.append(("start", now, kept))
        self.unused -= 1
        self.in_flight += 1
        return 40 + self.in_flight

    def own(self, mark: int) -> int:
        return mark - 40

    def end(self, when: float) -> None:
        self.log.append(("end", when))
        self.in_flight -= 1
        self.coming = sorted([*self.coming, when])

    def unsend(self) -> None:
        self.log.append(("unsend",))
        self.in_flight -= 1

    def returns(self, now: float, period: float) -> list[float]:
        return [*self.coming, *[now + period] * self.in_flight]
