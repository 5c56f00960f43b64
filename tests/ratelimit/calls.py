"""Calls and pools for tests that drive a scheduler with plain numbers as time."""

from __future__ import annotations

from collections.abc import Sequence

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.fair_queue import Call, Flow, PoolFlow
from crustcredits._ratelimit.scheduler import Scheduler

OK = AttemptResult(status=200)


def call(name: str, flow: Flow, account: str | None = None) -> Call:
    return Call(name, account or name, flow)


class Pool(PoolFlow):
    """Numbers that become calls of the same name."""

    def __init__(self, accounts: Sequence[str | None]) -> None:
        super().__init__(accounts)
        self.names = accounts

    def begin(self, number: int) -> Call:
        name = self.names[number]
        return Call(f"p{number}", f"p{number}" if name is None else name, self)


def started(scheduler: Scheduler, at: float) -> list[Attempt]:
    """The attempts that start at a time."""
    requests: list[Attempt] = []
    while isinstance(granted := scheduler.grant(at), Attempt):
        requests.append(granted)
    return requests
