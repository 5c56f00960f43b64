"""What the machines have in common that search for schedules, with hypothesis, in virtual time."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, TypeVar
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant

from tests.virtual import VirtualLoop

T = TypeVar("T")

PERIOD = 10.0
LATE = 3.0  # seconds that a request takes at most, and that a lost one arrives later at most
# Distances between arrivals are sums of floats.
EPSILON = 1e-4

MANY = settings(
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    report_multiple_bugs=False,
)


def within(times: Sequence[float], when: float, slack: float = EPSILON) -> int:
    """How many of them are in the window that ends then, which is so much shorter than a period."""
    return len(times) - bisect_right(times, when - PERIOD + slack)


class VirtualMachine(RuleBasedStateMachine):
    """Rules are what happens; what must be so is checked wherever it may come up."""

    instead: ClassVar[dict[str, Any]] = {}  # what is to be different in the library

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.problem: BaseException | None = None  # the first; it may have come up where nobody hears of it
        self.began = False
        self._different = ExitStack()
        for target, other in self.instead.items():
            self._different.enter_context(patch(target, other))

    def do(self, what: Coroutine[Any, Any, T]) -> T:
        """In the loop, and all that can happen at once happens."""
        return self.loop.run_until_complete(self._and_settle(what))

    async def _and_settle(self, what: Coroutine[Any, Any, T]) -> T:
        result = await what
        for _ in range(12):
            await asyncio.sleep(0)
        return result

    def check(self, holds: bool, said: str) -> None:
        """What must hold."""
        if not holds and self.problem is None:
            self.problem = AssertionError(said)
            raise self.problem

    def watch(self, task: asyncio.Task[None]) -> None:
        """What it raises is a problem."""
        task.add_done_callback(self._look_at)

    def _look_at(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and self.problem is None:
            self.problem = task.exception()

    @invariant()
    def nothing_has_gone_wrong(self) -> None:
        if self.problem is not None:
            raise self.problem

    def finish(self) -> None:
        """All becomes well, and what must be so then is so."""
        raise NotImplementedError

    async def give_up(self) -> None:
        """End what is under way."""
        raise NotImplementedError

    def teardown(self) -> None:
        try:
            if self.problem is None and self.began:
                self.finish()
                self.nothing_has_gone_wrong()
        finally:
            self.do(self.give_up())
            self.loop.close()
            self._different.close()
