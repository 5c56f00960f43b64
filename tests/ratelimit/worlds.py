"""Worlds for the scheduler in virtual time: servers, neighbours, and a client without sockets.

The servers count in different ways.
"""

from __future__ import annotations

import asyncio
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Protocol

import attrs

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from tests.virtual import now

Key = tuple[str, str]  # its name, and the account that it declares
Headers = dict[str, float]


class Counter(Protocol):
    """How a server counts one scope."""

    limit: int

    def hit(self, at: float) -> tuple[bool, int, float]:
        """Count an arrival: whether it is served, the remaining number, seconds until the next."""
        ...


class Sliding:
    """An exact sliding window; its count may lag."""

    def __init__(self, limit: int, period: float = 60.0, lag: float = 0.0) -> None:
        self.limit, self.period, self.lag = limit, period, lag
        self.served: deque[float] = deque()
        self.worst = 0
        self.refused = 0

    def hit(self, at: float) -> tuple[bool, int, float]:
        while self.served and self.served[0] <= at - self.period:
            self.served.popleft()
        known = bisect_right(self.served, at - self.lag) if self.lag else len(self.served)
        ok = known < self.limit
        if ok:
            self.served.append(at)
            self.worst = max(self.worst, len(self.served))
            known += not self.lag
        self.refused += not ok
        oldest = self.served[0] if self.served else at
        return ok, max(0, self.limit - known), oldest + self.period - at


class Saturated:
    """A window that other clients fill: a share of the requests is served."""

    def __init__(self, limit: int, seed: str, share: float = 0.1) -> None:
        self.limit, self.share = limit, share
        self.random = random.Random(seed)

    def hit(self, at: float) -> tuple[bool, int, float]:
        return self.random.random() < self.share, 0, self.random.uniform(0, 60.0 / self.limit)


class Leaky:
    """A leaky bucket: an even rate, and a burst."""

    def __init__(self, limit: int, burst: int, period: float = 60.0) -> None:
        self.limit, self.gap, self.burst = limit, period / limit, burst
        self.full_at = 0.0

    def hit(self, at: float) -> tuple[bool, int, float]:
        due = max(self.full_at, at)
        allowed = due + self.gap - self.burst * self.gap
        if allowed - at > 1e-9:
            return False, 0, allowed - at
        self.full_at = due + self.gap
        return (
            True,
            int((self.burst * self.gap - (self.full_at - at)) / self.gap + 1e-9),
            self.full_at - at,
        )


def full(limit: int, remaining: int, reset: float, *, served: bool) -> Headers:
    """All documented headers."""
    return {"limit": limit, "remaining": remaining, "wait": max(1, math.ceil(reset))}


def only_reset(limit: int, remaining: int, reset: float, *, served: bool) -> Headers:
    """A refusal states its wait, and there are no other headers."""
    return {} if served else {"wait": max(1, math.ceil(reset))}


def no_headers(limit: int, remaining: int, reset: float, *, served: bool) -> Headers:
    return {}


def together(key: Key) -> Hashable:
    """All keys are counted together."""
    return None


def by_key(key: Key) -> Hashable:
    return key[0]


def by_account(key: Key) -> Hashable:
    return key[1]


Special = Callable[[Key, float], tuple[int | None, Headers] | None]


@attrs.define(eq=False)
class Server:
    """A server that counts by `scope`, and answers between the two `seconds`.

    The answers of `special` come first, where it gives one.
    """

    count: Callable[[Any], Counter]
    scope: Callable[[Key], Hashable] = together
    seconds: tuple[float, float] = (0.0, 0.02)
    headers: Callable[..., Headers] = full
    special: Special | None = None
    seed: int = 1
    refused: int = 0
    counters: dict[Hashable, Counter] = attrs.field(factory=dict)
    random: random.Random = attrs.field(
        init=False, default=attrs.Factory(lambda self: random.Random(self.seed), takes_self=True)
    )

    def counter(self, scope: Hashable) -> Counter:
        if scope not in self.counters:
            self.counters[scope] = self.count(scope)
        return self.counters[scope]

    def arrive(self, key: Key) -> tuple[int | None, Headers]:
        said = None if self.special is None else self.special(key, now())
        if said is None:
            counter = self.counter(self.scope(key))
            served, remaining, reset = counter.hit(now())
            said = (
                (200 if served else 429),
                self.headers(counter.limit, remaining, reset, served=served),
            )
        self.refused += said[0] == 429
        return said

    def neighbour(self, rate: float, scope: Hashable = None) -> None:
        """Another client sends `rate` requests per second."""
        loop = asyncio.get_running_loop()

        def ask() -> None:
            self.counter(scope).hit(now())
            loop.call_later(1 / rate, ask)

        loop.call_later(self.random.uniform(0, 1 / rate), ask)


@attrs.define(eq=False)
class Job:
    """One call of a client, with the time and the status of its end."""

    key: Key
    call: Call
    began: float
    attempts: int = 0
    done: float | None = None
    status: int | None = None
    requests: int = 0

    @property
    def good(self) -> bool:
        return self.status == 200

    @property
    def took(self) -> float:
        assert self.done is not None, "every call ends"
        return self.done - self.began


def scheduler(
    terms: SchedulerTerms,
    pace: float | None = 100.0,
    slots: int = 32,
    seed: int = 1,
    **options: Any,
) -> Scheduler:
    """A scheduler of one endpoint without others."""
    least = terms.requests / terms.window
    return Scheduler(
        terms, pace=Pace(pace, least), slots=ConnectionSlots(slots), seed=seed, **options
    )


class Client:
    """A client with a scheduler: it sends granted requests, and retries failed ones."""

    def __init__(
        self, server: Server, terms: SchedulerTerms, seed: int = 7, pace: float | None = 100.0
    ) -> None:
        self.server, self.terms = server, terms
        self.scheduler = scheduler(terms, pace, seed=seed)
        self.random = random.Random(seed)
        self.jobs: dict[Call, Job] = {}
        self.singles = Flow(Kind.SINGLE)
        self.open = 0
        self.sent = 0
        self.on_wire = 0
        self.most_on_wire = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._timer: asyncio.TimerHandle | None = None

    def put(self, keys: Iterable[Key], flow: Flow) -> list[Job]:
        jobs = [Job(key, Call(key, key[1], flow), now()) for key in keys]
        for job in jobs:
            self.jobs[job.call] = job
            self.scheduler.put(job.call)
        self.open += len(jobs)
        if jobs:
            self.idle.clear()
        self.pump()
        return jobs

    async def check(
        self, keys: Sequence[Key], flow: Flow | None = None, seconds: float = 3000.0
    ) -> list[Job]:
        """Ask for all keys, and wait until each call has ended, or for `seconds`."""
        jobs = self.put(keys, flow or Flow())
        try:
            async with asyncio.timeout(seconds):
                await self.idle.wait()
        except TimeoutError:
            pass
        return jobs

    def pump(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while isinstance(granted := self.scheduler.grant(now()), Attempt):
            self._send(granted)
        assert not isinstance(granted, Call), "none is barred"
        if granted is not None:
            self._timer = loop.call_at(max(granted, now()), self.pump)

    def _send(self, request: Attempt) -> None:
        loop, server = asyncio.get_running_loop(), self.server
        job = self.jobs[request.call]
        job.attempts += 1
        job.requests += 1
        self.sent += 1
        self.on_wire += 1
        self.most_on_wire = max(self.most_on_wire, self.on_wire)
        whole = server.random.uniform(*server.seconds)
        travel = server.random.uniform(0, whole)
        loop.call_later(travel, self._arrive, request, job, request.started + whole)

    def _arrive(self, request: Attempt, job: Job, back: float) -> None:
        status, said = self.server.arrive(job.key)
        when = request.started + self.terms.late if status is None else back
        asyncio.get_running_loop().call_at(when, self._answer, request, job, status, said)

    def _answer(self, request: Attempt, job: Job, status: int | None, said: Headers) -> None:
        self.on_wire -= 1
        wait = said.get("wait") if status in {429, 503} else None
        limit, remaining = said.get("limit"), said.get("remaining")
        answer = AttemptResult(
            status=status,
            by_gateway=bool(said.get("html")),
            limit=None if limit is None else int(limit),
            remaining=None if remaining is None else int(remaining),
            wait=wait,
        )
        self.scheduler.ended(request, answer, now())
        if answer.is_served:
            self._end(job, 200)
        elif job.attempts - job.call.spared >= 4 or (wait or 0.0) > 65.0:
            self._end(job, status or 0)
        else:
            jitter = self.random.uniform(0, min(8.0, 0.25 * 2.0 ** min(10, job.attempts - 1)))
            asyncio.get_running_loop().call_later((wait or 0.0) + jitter, self._again, job)
        self.pump()

    def _again(self, job: Job) -> None:
        self.scheduler.put(job.call)
        self.pump()

    def _end(self, job: Job, status: int) -> None:
        job.done, job.status = now(), status
        self.open -= 1
        if not self.open:
            self.idle.set()


def keys(count: int, prefix: str = "k", account: Callable[[int], str] | None = None) -> list[Key]:
    """Keys by number, each an account of its own unless `account` names one."""
    return [
        (f"{prefix}{number}", account(number) if account else f"{prefix}{number}")
        for number in range(count)
    ]


def spans(jobs: Sequence[Job]) -> tuple[float, float]:
    """Seconds until the first and until the last good answer."""
    took = [job.took for job in jobs if job.good]
    return (min(took), max(took)) if took else (math.nan, math.nan)
