"""`SharedCall`: one call under way, and its waiters; and `Pool`: keys that wait for a call each."""

from __future__ import annotations

import contextvars
import math
from abc import abstractmethod
from collections.abc import Hashable, KeysView, Sequence
from typing import Any, NamedTuple, Protocol

from crustcredits._cache.answer_store import StoredAnswer
from crustcredits._cache.api_call import ApiCall
from crustcredits._cache.policy import NEW, CachePolicy
from crustcredits._cache.store import CacheKey
from crustcredits._errors import CrustCreditsError
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance, Outcome
from crustcredits._ratelimit.flow import Flow
from crustcredits._ratelimit.pool_flow import PoolFlow

_NO_FLOW = Flow()  # of calls that have ended


class Waiter(Protocol):
    """The waiter of a call: a future, or a key of a fan-out."""

    def done(self) -> bool: ...
    def set_result(self, result: Outcome[Any], /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...
    def cancel(self) -> object: ...


class WaitTerms(NamedTuple):
    """The terms of a wait.

    Attributes:
        began: Its start, in seconds of the loop's clock.
        deadline: Its end.
        falls_back: Whether a stale answer may end it.
        own_timer: Whether the waiter's owner ends it at the deadline.
        policy: How old its answer may be.
    """

    began: float
    deadline: float
    falls_back: bool
    own_timer: bool = False
    policy: CachePolicy = NEW


class EndsWaiters(Protocol):
    """Ends the waiters of a call that have no time left: `Waiters`."""

    def time_out_all(self, call: SharedCall) -> None: ...
    def time_out_hopeless(self, call: SharedCall) -> None: ...


class EndsCalls(Protocol):
    """Ends a call: `Completion`."""

    def end(self, call: SharedCall, result: Balance | CrustCreditsError) -> None: ...
    def end_stored(self, call: SharedCall, answer: StoredAnswer) -> bool: ...
    def break_off(self, call: SharedCall, error: BaseException | None) -> None: ...


class SharedCall(ApiCall):
    """One call under way, and its waiters.

    Attributes:
        cache_key: Where its answer is cached.
        first: The waiter that began the call; None for a refresh.
        waiters: The waiters, and the terms of each.
        early: The pool in which the call waits for its turn, and its number there; or None.
    """

    __slots__ = ("_completion", "_timeouts", "cache_key", "early", "first", "waiters")

    def __init__(
        self,
        timeouts: EndsWaiters,
        completion: EndsCalls,
        cache_key: CacheKey,
        key: ApiKey,
        *,
        account: Hashable,
        flow: Flow,
        context: contextvars.Context,
    ) -> None:
        super().__init__(cache_key, key, account, flow, context)
        self._timeouts = timeouts
        self._completion = completion
        self.cache_key = cache_key
        self.first: Waiter | None = None
        self.waiters: dict[Waiter, WaitTerms] = {}
        self.early: tuple[Pool, int] | None = None

    def release_references(self) -> None:
        """Hold on to no waiter and no check: a deadline may keep an ended call in memory."""
        self.first = None
        self.waiters = {}
        self.flow = _NO_FLOW

    @property
    def is_refresh(self) -> bool:
        """Whether the call only refreshes a cache entry, without a waiter."""
        return self.first is None and not self.is_foreground

    def can_fall_back(self) -> bool:
        return all(terms.falls_back for terms in self.waiters.values())

    def patience(self, now: float) -> float:
        return max((terms.deadline for terms in self.waiters.values()), default=math.inf) - now

    def on_late(self) -> None:
        self._timeouts.time_out_all(self)

    def on_wait(self) -> None:
        self._timeouts.time_out_hopeless(self)

    def on_end(self, result: Balance | CrustCreditsError) -> None:
        self._completion.end(self, result)

    def on_stored(self, answer: StoredAnswer) -> bool:
        return self._completion.end_stored(self, answer)

    def on_broken_off(self, error: BaseException | None) -> None:
        self._completion.break_off(self, error)


class Pool(PoolFlow):
    """Keys of one check that wait for their turn.

    Attributes:
        path: The endpoint.
        early: Calls of numbers that still wait, made because other callers ask for their keys too.
    """

    __slots__ = ("early", "path")

    def __init__(self, path: str, accounts: Sequence[Hashable | None]) -> None:
        super().__init__(accounts)
        self.path = path
        self.early: dict[int, SharedCall] = {}

    def begin(self, number: int) -> SharedCall:
        call = self.early.pop(number, None)
        if call is None:
            return self.make(number)
        call.early = None
        return call

    @abstractmethod
    def make(self, number: int) -> SharedCall:
        """Make the call of a number."""

    @property
    @abstractmethod
    def digests(self) -> KeysView[bytes]:
        """The digests of the keys of the check, whether they wait or not."""

    @abstractmethod
    def number_of(self, digest: bytes) -> int | None:
        """The number of the key with this digest, if it waits in the pool; else None."""
