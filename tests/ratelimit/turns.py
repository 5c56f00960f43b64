"""Calls and pools for the tests of the queues, by the letters of their accounts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow
from crustcredits._ratelimit.pool_flow import PoolFlow


class Pool(PoolFlow):
    """Numbers that become calls named p0, p1 ..."""

    def __init__(self, accounts: Sequence[str | None]) -> None:
        super().__init__(accounts)
        self.names = accounts

    def begin(self, number: int) -> Call:
        return Call(f"p{number}", self.names[number] or f"p{number}", self)


class Draws(random.Random):
    """Draws these places, and notes from how many calls each was drawn."""

    def __init__(self, places: tuple[int, ...]) -> None:
        super().__init__()
        self.places = list(places)
        self.counts: list[int] = []

    def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
        self.counts.append(start)
        return self.places.pop(0)


class Watched(Call):
    """A call of which it is known whether an object still refers to it."""

    __slots__ = ("__weakref__",)


def call(name: str, flow: Flow, account: str = "", *, was_sent: bool = False) -> Call:
    """A call; without an account its key is the account."""
    made = Call(name, account or name, flow)
    made.was_sent = was_sent
    return made


def pushed(queue: FairQueue, flow: Flow, names: str, *, was_sent: bool = False) -> list[Call]:
    """Calls with these names, the first letter of each is its account."""
    calls = [call(name, flow, name[0], was_sent=was_sent) for name in names.split()]
    for each in calls:
        queue.push(each)
    return calls


def popped(queue: FairQueue, count: int = 1_000) -> str:
    """The names of the next calls, or of all."""
    return " ".join(str(queue.pop().key) for _ in range(min(count, len(queue))))
