"""`PoolCheck`: one call for each secret of a pool, and one outcome for each key in its order.

Keys that wait for their turn are numbers in the admission queue, so a pool costs a few bytes for
each key. The module must not know requests; of limits it only asks which keys are without hope.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, KeysView, Sequence
from functools import partial
from typing import Any, cast

from crustcredits._cache.lookup import FanOutWaiter, Lookup
from crustcredits._cache.policy import NEW, CachePolicy
from crustcredits._cache.shared_call import Pool, SharedCall, WaitTerms
from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import ApiKey, Key, UnusableKey
from crustcredits._keys.key_pool import Uniqueness
from crustcredits._models import Outcome, Unknown, outcome_for
from crustcredits._ratelimit.flow import Flow

# Keys that are handled before other tasks run: a few milliseconds of work.
_SLICE = 1_000


async def read_pool(source: Iterable[Key]) -> list[Key]:
    """The keys of a pool. Other tasks run meanwhile.

    Raises:
        ConfigurationError: Two different keys have one label, or one secret has two accounts.
    """
    pool: list[Key] = []
    taken = Uniqueness()
    for key in source:
        problem = None if isinstance(key, UnusableKey) else taken.take(key)
        if problem is not None:
            raise ConfigurationError(problem, key_name=key.label)
        pool.append(key)
        if len(pool) % _SLICE == 0:
            await asyncio.sleep(0)
    return pool


class _Outcomes:
    """The outcomes of a pool, one for each key in its order.

    Args:
        keys: The keys. Several may be names of one secret.
        on_outcome: Called by `report` with each outcome.

    Attributes:
        keys: The keys.
        first: The first index of each secret that is asked about.
        are_reported: Whether `report` does anything.
    """

    def __init__(
        self, keys: Sequence[Key], on_outcome: Callable[[Outcome[Any]], object] | None
    ) -> None:
        self.keys = keys
        self.first: dict[bytes, int] = {}
        self.are_reported = on_outcome is not None
        self._on_outcome = on_outcome
        self._landed: list[Outcome[Any] | None] = [None] * len(keys)
        self._again: defaultdict[bytes, list[int]] = defaultdict(list)  # further indexes
        self._unreported: deque[Outcome[Any]] = deque()

    def all(self) -> list[Outcome[Any]]:
        """All outcomes: none is missing."""
        return cast("list[Outcome[Any]]", self._landed)

    def lacks(self, index: int) -> bool:
        """Whether the outcome of a key is missing."""
        return self._landed[index] is None

    def await_one(self, index: int, key: ApiKey) -> bool:
        """Await the outcome of a key. Returns whether no other name of its secret awaits it."""
        if self.first.setdefault(key.digest, index) == index:
            return True
        self._again[key.digest].append(index)
        return False

    def take_for_all(self, index: int, outcome: Outcome[Any]) -> None:
        """Take the outcome of a secret, under each of its names."""
        self.take(index, outcome)
        if self._again:
            for each in self._again.get(self.keys[index].digest, ()):
                self.take(each, outcome)

    def take(self, index: int, outcome: Outcome[Any]) -> None:
        """Take the outcome of one key."""
        key = self.keys[index]
        self._landed[index] = outcome = outcome if outcome.key is key else outcome_for(key, outcome)
        if self.are_reported:
            self._unreported.append(outcome)

    def report(self) -> None:
        """Pass on the outcomes that have landed since the last report."""
        while self._unreported and self._on_outcome is not None:
            self._on_outcome(self._unreported.popleft())


class PoolCheck:
    """One check of a pool: each secret is asked about once.

    Args:
        lookup: Answers from the cache, and from calls to join or to open.
        path: The endpoint.
        pool: The keys. Several may be names of one secret.
        policy: How old answers may be.
        deadline: When all outcomes must be there, in seconds of the running loop's clock; None for
            no bound.
        on_outcome: Called with each outcome as it lands.
    """

    def __init__(
        self,
        lookup: Lookup,
        path: str,
        pool: Sequence[Key],
        *,
        policy: CachePolicy,
        deadline: float | None,
        on_outcome: Callable[[Outcome[Any]], object] | None,
    ) -> None:
        self._lookup, self._calls = lookup, lookup.calls
        self._endpoint = lookup.calls.endpoints[path]
        self._path = path
        # The same keys: only indexes that hold an `ApiKey` are read from it.
        self._usable = cast("Sequence[ApiKey]", pool)
        self._policy = policy
        self._deadline = math.inf if deadline is None else deadline
        self._began = asyncio.get_running_loop().time()
        self._terms = WaitTerms(
            self._began, self._deadline, falls_back=False, own_timer=True, policy=policy
        )
        self._outcomes = _Outcomes(pool, on_outcome)
        self._begun: dict[int, FanOutWaiter] = {}  # indexes that await their outcome
        self._joins = Flow()  # of joined calls that had no waiter before
        self._waiting: _Waiting | None = None  # keys that wait for their turn
        self._waiter: asyncio.Future[None] | None = None
        self._is_past_deadline = False
        self._error: BaseException | None = None

    async def outcomes(self) -> list[Outcome[Any]]:
        """One outcome for each key; an error for each key without an answer in time.

        Raises:
            ClientClosedError: The client was closed meanwhile.
        """
        loop = asyncio.get_running_loop()
        # The timer decides that the deadline has passed: uvloop's may run a little before the clock
        # reaches it.
        timer = (
            loop.call_at(self._deadline, self._on_deadline) if self._deadline < math.inf else None
        )
        try:
            await self._ask(await self._take_known())
            await self._wait()
        finally:
            self._give_up()
            if timer is not None:
                timer.cancel()
        await self._fail_late(self._outcomes.first.values())
        self._outcomes.report()
        return self._outcomes.all()

    def end(self, error: BaseException) -> None:
        """End the check with `error`."""
        self._error = self._error or error
        self._wake()

    async def _take_known(self) -> list[int]:
        """Take the cached outcomes, and return the indexes of the other keys, each secret once."""
        unknown: list[int] = []
        asks = self._policy is NEW
        for index, key in enumerate(self._outcomes.keys):
            if index % _SLICE == _SLICE - 1:
                self._outcomes.report()
                await asyncio.sleep(0)
                asks = asks or self._error is not None  # then no refresh may begin
            if isinstance(key, UnusableKey):
                self._outcomes.take(index, Unknown(key=key, error=key.error))
                continue
            outcome = None if asks else self._lookup.cached(self._path, key, self._policy)
            if outcome is not None:
                self._outcomes.take(index, outcome)
            elif self._outcomes.await_one(index, key):
                unknown.append(index)
        return unknown

    async def _ask(self, indexes: list[int]) -> None:
        """Queue the keys; join the calls of keys that other callers ask about already."""
        if self._has_ended() or asyncio.get_running_loop().time() >= self._deadline:
            return
        # No await until the keys are queued, so that no other check asks about one of them
        # meanwhile.
        joins: list[int] = []
        if not self._calls.under_way.is_idle:
            asked = self._calls.under_way.asked_among(self._path, self.first.keys())
            joins = sorted(self.first[digest] for digest in asked)
            indexes = sorted(set(indexes).difference(joins)) if joins else indexes
        hopeless: list[int] = []
        if self._deadline < math.inf and not self._calls.may_find(self._policy):
            keys = [self._usable[index] for index in indexes]
            numbers = self._endpoint.hopeless(
                keys, self._deadline, asyncio.get_running_loop().time()
            )
            hopeless = [indexes[number] for number in numbers]
            indexes = sorted(set(indexes).difference(hopeless)) if hopeless else indexes
        if indexes:
            self._waiting = _Waiting(self, self._path, array("I", indexes))
            self._calls.enter_pool(self._waiting)
        await self._fail_late(hopeless)
        for number, index in enumerate(joins, start=1):
            if number % _SLICE == 0:
                self._outcomes.report()
                await asyncio.sleep(0)
            if self._has_ended():
                return
            self._join(index)

    def _has_ended(self) -> bool:
        """Whether the check asks about no further key."""
        return self._error is not None or self._is_past_deadline

    def _join(self, index: int) -> None:
        """Share the call under way for a key, or a balance that arrived since this check began."""
        arrived = self._lookup.arrived_since(self._path, self._usable[index], self._began)
        if arrived is None:
            waiter = self._waiter_for(index)
            self._lookup.begin(self._path, waiter, self._deadline, self._joins, own_timer=True)
        else:
            self._outcomes.take_for_all(index, arrived)

    def _waiter_for(self, index: int) -> FanOutWaiter:
        waiter = FanOutWaiter(
            self._lookup,
            self._usable[index],
            self._policy,
            self._began,
            partial(self._land, index),
        )
        self._begun[index] = waiter
        return waiter

    async def _wait(self) -> None:
        """Wait for all outcomes; after the deadline, only for stale answers that may stand in."""
        while self._error is None:
            self._outcomes.report()
            if self._is_past_deadline:
                await self._time_out()
            if not self._begun and (self._waiting is None or not self._waiting.waiting):
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise self._error

    async def _time_out(self) -> None:
        """End the wait for all keys without an outcome: the deadline has passed."""
        if self._waiting is not None:
            self._calls.leave_pool(self._waiting)
            self._waiting = None
        for number, waiter in enumerate([*self._begun.values()], start=1):
            assert waiter.call is not None, "a waiter without an outcome has a call"
            self._calls.waiters.time_out(waiter.call, waiter)
            if number % _SLICE == 0:
                self._outcomes.report()
                await asyncio.sleep(0)

    def _on_deadline(self) -> None:
        self._is_past_deadline = True
        self._wake()

    def _give_up(self) -> None:
        """Leave nothing under way."""
        begun, self._begun = list(self._begun.values()), {}
        if self._waiting is not None:
            self._calls.leave_pool(self._waiting, [waiter.give_up for waiter in begun])
            self._waiting = None
        else:
            for waiter in begun:
                waiter.give_up()

    async def _fail_late(self, indexes: Iterable[int]) -> None:
        """Fail the keys that have no turn before the deadline."""
        failed = 0
        for index in indexes:
            if self._outcomes.lacks(index):
                self._outcomes.take_for_all(index, self._too_late(index))
                failed += 1
                if failed % _SLICE == 0:
                    self._outcomes.report()
                    await asyncio.sleep(0)

    def _too_late(self, index: int) -> Outcome[Any]:
        return self._lookup.too_late(self._path, self._usable[index], self._policy, self._began)

    # --- called by the queue and by waiters

    def make(self, index: int, flow: Pool, context: contextvars.Context) -> SharedCall:
        """The call of the key at `index`, at its turn."""
        return self._lookup.open_for_pool(
            self._path, self._waiter_for(index), self._terms, flow, context
        )

    @property
    def first(self) -> dict[bytes, int]:
        """The first index of each secret."""
        return self._outcomes.first

    def account_at(self, index: int) -> Hashable | None:
        """The declared account of the key at `index`."""
        return self._usable[index].account if self._endpoint.counts_accounts else None

    def _land(self, index: int, landed: Outcome[Any] | BaseException) -> None:
        self._begun.pop(index, None)
        if isinstance(landed, BaseException):
            self.end(landed)
            return
        self._outcomes.take_for_all(index, landed)
        if self._outcomes.are_reported or not self._begun:
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Waiting(Pool):
    """The keys of a pool that wait for their turn."""

    __slots__ = ("_check", "_context", "indexes")

    def __init__(self, check: PoolCheck, path: str, indexes: array[int]) -> None:
        super().__init__(path, [check.account_at(index) for index in indexes])
        self._check = check
        self._context = contextvars.copy_context()
        self.indexes = indexes  # ascending

    def make(self, number: int) -> SharedCall:
        return self._check.make(self.indexes[number], self, self._context.copy())

    def of_account(self, account: Hashable) -> int:
        if isinstance(account, bytes):  # a key without a declared account
            return int(self.number_of(account) is not None)
        return super().of_account(account)

    @property
    def digests(self) -> KeysView[bytes]:
        return self._check.first.keys()

    def number_of(self, digest: bytes) -> int | None:
        index = self._check.first.get(digest)
        if index is None:
            return None
        number = bisect_left(self.indexes, index)
        is_there = (
            number < len(self.indexes) and self.indexes[number] == index and self.waits(number)
        )
        return number if is_there else None
