"""Calls, answers and tokens for tests that drive a scheduler with plain numbers as time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.flow import Call, Flow
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import TokenBucket

OK = AttemptResult(status=200)
FAILED = AttemptResult(status=500)
LOST = AttemptResult(status=None)
INCOMPLETE = AttemptResult(status=None, incomplete=True)
UNSENT = AttemptResult(status=None, unsent=True)


def terms(**settings: object) -> SchedulerTerms:
    """Settings whose times are exact as floats: a token returns 60.5 s after the end."""
    return SchedulerTerms(**{"period": 60.5, "window": 60.0, "late": 8.0, **settings})  # type: ignore[arg-type]  # checked by each test


def served(used: int, limit: int = 300) -> AttemptResult:
    """A served answer that counts `used` requests."""
    return AttemptResult(status=200, limit=limit, remaining=limit - used)


def refused(
    wait: float | None = None, *, used: int | None = None, limit: int = 300
) -> AttemptResult:
    """A refusal, with counts where `used` is given."""
    if used is None:
        return AttemptResult(status=429, wait=wait)
    return AttemptResult(status=429, wait=wait, limit=limit, remaining=limit - used)


def call(name: str, flow: Flow, account: str | None = None) -> Call:
    """A call for a key of this name, which is an account of its own unless it declares one."""
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


def start_call(scheduler: Scheduler, each: Call, at: float) -> Attempt:
    """Put a call that starts at once."""
    scheduler.put(each)
    granted = scheduler.grant(at)
    assert isinstance(granted, Attempt)
    assert granted.call is each
    return granted


class OutsideTokens(TokenBucket):
    """Tokens of one scope, some of which other processes hold.

    Attributes:
        held: How many tokens other processes hold.
        wake: Tells the scheduler that tokens have come from outside.
        wanted: The number of waiting calls and of kept tokens, each time the bucket is told.
        taken: The moments at which a token was taken.
    """

    is_shared = True

    def __init__(self, limit: int, wake: Callable[[], None], held: int) -> None:
        super().__init__(limit)
        self.held = held
        self.wake = wake
        self.wanted: list[tuple[int, int]] = []
        self.taken: list[float] = []

    def room(self, now: float, kept: int) -> int:
        return super().room(now, kept) - self.held

    def room_at(self, now: float, kept: int) -> float | None:
        return None

    def want(self, count: int, kept: int) -> None:
        self.wanted.append((count, kept))

    def take(self, now: float, kept: int = 0) -> int:
        self.taken.append(now)
        return super().take(now, kept)


class Outside:
    """Makes the buckets of a scheduler, and keeps them by account.

    Args:
        held: How many tokens of each account other processes hold at first.
    """

    def __init__(self, held: dict[Hashable | None, int] | None = None) -> None:
        self.held = held or {}
        self.buckets: dict[Hashable | None, OutsideTokens] = {}

    def __call__(
        self, whose: Hashable | None, limit: int, wake: Callable[[Hashable | None], None]
    ) -> OutsideTokens:
        bucket = OutsideTokens(limit, lambda: wake(whose), self.held.get(whose, 0))
        self.buckets[whose] = bucket
        return bucket
