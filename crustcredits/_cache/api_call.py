"""`ApiCall`: one call on its way to an answer; and `Resumptions`: the calls that resume later.

The modules that send requests see a call through this class, and know of its waiters only what the
class declares.
"""

from __future__ import annotations

import asyncio
import contextvars
import enum
import heapq
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator

from crustcredits._cache.answer_store import StoredAnswer
from crustcredits._cache.circuit_breaker import Sent
from crustcredits._cache.policy import NEW
from crustcredits._errors import CrustCreditsError
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance
from crustcredits._ratelimit.attempt import Attempt
from crustcredits._ratelimit.flow import Call, Flow, Kind


class Stage(enum.Enum):
    """The way of a call to an answer that processes share."""

    TO_LOOK_UP = "it looks for a shared answer at its turn"
    LOOKS = "it looks for one"
    FETCHES = "it fetches the answer for all processes"


class AttemptTask(asyncio.Task[None]):
    """The task of one request.

    A task that is cancelled before its first step runs nothing of its coroutine, so the task itself
    reports its cancellation.
    """

    on_cancelled: Callable[[asyncio.Task[None]], object]

    def cancel(self, msg: object = None) -> bool:
        self.add_done_callback(self.on_cancelled)
        return super().cancel(msg)


class ApiCall(Call, ABC):
    """One call on its way to an answer. Times are in seconds of the running loop's clock.

    Attributes:
        path: The endpoint.
        api_key: The key that is asked about.
        is_foreground: Whether a waiter awaits the answer. Otherwise the call is not retried: it is
            a background refresh, or its waiters have left.
        attempts: Requests put on the wire for the call, including the current one.
        last: The error of the attempt before, or of the circuit breaker that holds it back;
            or None.
        failing_since: When the first attempt failed, or None.
        barred_since: Since when the circuit breaker has held it back, or None.
        task: The task of the request on the wire, or None.
        request: The scheduler's record of the request.
        probe: The circuit breaker's record of the request, if it is a probe.
        entered: When the call began.
        resumes: When the call enters the queue again, while it waits for a retry or for a probe;
            None otherwise.
        ticket: The number of its entry in `Resumptions`; 0 without one.
        is_parked: Whether it waits for a retry, or for the answer of another process.
        stage: Its way to a shared answer; None if it asks the API for itself.
        policy: How old a shared answer may be for each waiter.
    """

    __slots__ = (
        "api_key",
        "attempts",
        "barred_since",
        "context",
        "entered",
        "failing_since",
        "is_foreground",
        "is_parked",
        "last",
        "path",
        "policy",
        "probe",
        "request",
        "resumes",
        "stage",
        "task",
        "ticket",
    )

    request: Attempt
    probe: Sent | None

    def __init__(
        self,
        cache_key: tuple[str, bytes],
        key: ApiKey,
        account: Hashable,
        flow: Flow,
        context: contextvars.Context,
    ) -> None:
        self.path, digest = cache_key
        super().__init__(digest, account, flow)
        self.api_key = key
        self.is_foreground = flow.kind is not Kind.BACKGROUND
        self.attempts = 0
        self.last: CrustCreditsError | None = None
        self.failing_since: float | None = None
        self.task: AttemptTask | None = None
        self.entered = 0.0
        self.resumes: float | None = None
        self.barred_since: float | None = None
        self.context = context
        self.is_parked = False
        self.ticket = 0
        self.stage: Stage | None = None
        self.policy = NEW

    def park(self, *, parks: bool) -> None:
        """Record that the call begins or ends its wait for a retry, and notify its flow."""
        if self.is_parked is not parks:
            self.is_parked = parks
            if self.flow.on_parked is not None:
                self.flow.on_parked(1 if parks else -1)

    @abstractmethod
    def patience(self, now: float) -> float:
        """Seconds until the latest deadline of a waiter."""

    @abstractmethod
    def can_fall_back(self) -> bool:
        """Whether every waiter has a stale answer that may stand in."""

    @abstractmethod
    def on_late(self) -> None:
        """Called when no waiter has time left for an answer."""

    @abstractmethod
    def on_wait(self) -> None:
        """Called when the call has begun to wait for something other than its turn."""

    @abstractmethod
    def on_end(self, result: Balance | CrustCreditsError) -> None:
        """Called with the result when the call has ended."""

    @abstractmethod
    def on_stored(self, answer: StoredAnswer) -> bool:
        """Called with a shared answer. Returns whether it was young enough to end the call."""

    @abstractmethod
    def on_broken_off(self, error: BaseException | None) -> None:
        """Called when the request was cancelled from outside or failed unexpectedly."""


class Resumptions:
    """The calls that wait for a retry or for a probe, by the time at which each resumes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ApiCall]] = []
        self._tickets = itertools.count(1)

    @property
    def next_at(self) -> float:
        """When the next call resumes, or an earlier moment; infinite without one."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, call: ApiCall, at: float) -> None:
        """Let a call resume later."""
        call.resumes, call.ticket = at, next(self._tickets)
        heapq.heappush(self._heap, (at, call.ticket, call))
        call.on_wait()

    def drop(self, call: ApiCall) -> None:
        """Let a call resume no more: it was given up, or has resumed."""
        call.resumes, call.ticket = None, 0

    def due(self, now: float) -> Iterator[ApiCall]:
        """Take out the calls that resume now."""
        while self._heap:
            at, ticket, call = self._heap[0]
            waits = ticket == call.ticket  # False if it was given up, or has resumed before
            if waits and at > now:
                return
            heapq.heappop(self._heap)
            if waits:
                yield call
