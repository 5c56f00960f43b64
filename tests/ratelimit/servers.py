"""Servers for the machine of `test_machine`: they count in different ways."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Hashable
from typing import Literal

import attrs

# Distances between arrivals are sums of floats.
EPSILON = 1e-6
# Most seconds before its first request for which a window counts a neighbour's requests.
_BEFORE = 20.0


@attrs.frozen(kw_only=True)
class Rules:
    """How a server counts, and the counts in its answers.

    Attributes:
        limit: Requests that it serves in a period.
        period: Seconds of the period.
        scope: The scope with a count of its own. The accounts of a hidden group share one count
            without declaring it.
        window: Whether the window slides, or begins anew with each period, or slides beside a
            window of one second with a lower limit.
        lag: Seconds by which its count lags behind the arrivals.
        counts_refused: Whether requests that it refuses count too.
        neighbour: Requests per second that another client sends, in each scope.
        tells: The counts in its answers: true ones, none, those of the short window, or a wrong
            limit that the server does not count by.
    """

    limit: int
    period: float
    scope: Literal["together", "account", "key", "group"]
    window: Literal["sliding", "fixed", "two"] = "sliding"
    lag: float = 0.0
    counts_refused: bool = False
    neighbour: float = 0.0
    tells: Literal["counts", "nothing", "short", "wrong"] = "counts"

    @property
    def short_limit(self) -> int:
        """The limit of the shorter of two windows."""
        return max(1, self.limit // 4)

    @property
    def is_honest(self) -> bool:
        """Whether the proof's assumptions hold for the counts.

        The counts are about the limit that refuses, and a request counts for a whole period.
        """
        return self.window != "fixed" and self.tells in {"counts", "nothing"}

    def scope_of(self, account: Hashable, number: int) -> Hashable:
        """The scope in which a request for a key counts."""
        if self.scope == "together":
            return None
        if self.scope == "group":
            return (account if isinstance(account, int) else number) % 2
        return account if self.scope == "account" else (account, number)


@attrs.frozen
class Verdict:
    """The answer to a request on its arrival."""

    is_served: bool
    limit: int | None
    remaining: int | None
    wait: int


class Window:
    """The count of one scope."""

    def __init__(self, rules: Rules, now: float) -> None:
        self.rules = rules
        self.counted: deque[float] = deque()
        self.neighbour_at = now - _BEFORE

    def arrive(self, now: float, *, serves_all: bool) -> Verdict:
        """Count a request that arrives."""
        rules = self.rules
        if rules.neighbour and not serves_all:
            self._let_neighbour_ask(now)
        self._forget(now)
        known, lately = self._known(now), self._since(now - 1.0)
        is_short = rules.window == "two" and lately >= rules.short_limit
        served = serves_all or (known < rules.limit and not is_short)
        if served or (rules.counts_refused and not is_short):
            self.counted.append(now)
            known, lately = self._known(now), lately + 1
        limit, used = rules.limit, known
        if rules.tells == "short":
            limit, used = rules.short_limit, lately
        elif rules.tells == "wrong" and not serves_all:
            limit, used = max(1, rules.limit // 2), 1
        wait = 1 if is_short or not self.counted else self._room_at() - now
        says = rules.tells != "nothing"
        return Verdict(
            served,
            limit if says else None,
            max(0, limit - used) if says else None,
            max(1, math.ceil(wait)),
        )

    def _known(self, now: float) -> int:
        return bisect_right(self.counted, now - self.rules.lag)

    def _since(self, when: float) -> int:
        return len(self.counted) - bisect_right(self.counted, when + EPSILON)

    def _forget(self, now: float) -> None:
        period = self.rules.period
        oldest = (
            math.floor(now / period) * period - 2 * EPSILON
            if self.rules.window == "fixed"
            else now - period
        )
        while self.counted and self.counted[0] <= oldest + EPSILON:
            self.counted.popleft()

    def _room_at(self) -> float:
        period = self.rules.period
        first = self.counted[0]
        return (
            (math.floor(first / period) + 1) * period
            if self.rules.window == "fixed"
            else first + period
        )

    def _let_neighbour_ask(self, now: float) -> None:
        gap = 1 / self.rules.neighbour
        self.neighbour_at = max(self.neighbour_at, now - _BEFORE)
        while self.neighbour_at + gap <= now:
            self.neighbour_at += gap
            self._forget(self.neighbour_at)
            if len(self.counted) < self.rules.limit:
                self.counted.append(self.neighbour_at)
