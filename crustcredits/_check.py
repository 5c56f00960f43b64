"""`PoolCheck`: one call for each secret of a pool, and one outcome for each key in its order.

Keys that wait for their turn are numbers in the admission queue, so a pool costs a few bytes for
each key. The module must not know requests or limits.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from array import array
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

from crustcredits._cache.policy import NEW, CachePolicy
from crustcredits._cache.single_flight import (
    FanOutWaiter,
    Pool,
    SharedCall,
    SingleFlight,
    WaitTerms,
)
from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import ApiKey, Uniqueness, UnusableKey
from crustcredits._models import Outcome, Unknown, outcome_for
from crustcredits._ratelimit.fair_queue import Flow

Key: TypeAlias = ApiKey | UnusableKey

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


class PoolCheck:
    """One check of a pool: each secret is asked about once.

    The class has many methods because the queue and the waiters call back into one shared state.

    Args:
        calls: The calls to join or to open.
        path: The endpoint.
        pool: The keys. Several may be names of one secret.
        freshness: How old answers may be.
        deadline: When all outcomes must be there, in seconds of the running loop's clock; None for
            no bound.
        on_outcome: Called with each outcome as it lands.
    """

    def __init__(
        self,
        calls: SingleFlight,
        path: str,
        pool: Sequence[Key],
        *,
        freshness: CachePolicy,
        deadline: float | None,
        on_outcome: Callable[[Outcome[Any]], object] | None,
    ) -> None:
        self._calls = calls
        self._path = path
        self._keys = pool
        # The same keys: only places that hold an `ApiKey` are read from it.
        self._usable = cast("Sequence[ApiKey]", pool)
        self._freshness = freshness
        self._deadline = math.inf if deadline is None else deadline
        self._on_outcome = on_outcome
        self._began = asyncio.get_running_loop().time()
        self._patience = WaitTerms(self._began, self._deadline, falls_back=False)
        self._landed: list[Outcome[Any] | None] = [None] * len(pool)
        self._first: dict[bytes, int] = {}  # the first place of each secret
        self._again: defaultdict[bytes, list[int]] = defaultdict(list)  # its other places
        # Outcomes for which `on_outcome` is still due.
        self._reported: deque[Outcome[Any]] = deque()
        self._begun: dict[int, FanOutWaiter] = {}  # places that await their outcome
        self._joins = Flow()  # of joined calls that had no waiter before
        self._waiting: _Waiting | None = None  # keys that wait for their turn
        self._waiter: asyncio.Future[None] | None = None
        self._is_over = False  # whether the deadline has passed
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
        await self._fail_late(self._first.values())
        self._report()
        return cast("list[Outcome[Any]]", self._landed)

    def end(self, error: BaseException) -> None:
        """End the check with `error`."""
        self._error = self._error or error
        self._wake()

    async def _take_known(self) -> list[int]:
        """Take the cached outcomes, and return the places of the other keys, each secret once."""
        unknown: list[int] = []
        asks = self._freshness is NEW
        for place, key in enumerate(self._keys):
            if place % _SLICE == _SLICE - 1:
                self._report()
                await asyncio.sleep(0)
            if isinstance(key, UnusableKey):
                self._take(place, Unknown(key=key, error=key.error))
                continue
            outcome = None if asks else self._calls.known(self._path, key, self._freshness)
            if outcome is not None:
                self._take(place, outcome)
            elif self._first.setdefault(key.digest, place) == place:
                unknown.append(place)
            else:
                self._again[key.digest].append(place)
        return unknown

    async def _ask(self, places: list[int]) -> None:
        """Queue the keys; join the calls of keys that other callers ask about already."""
        if self._has_ended() or asyncio.get_running_loop().time() >= self._deadline:
            return
        # No await until the keys are queued, so that no other check asks about one of them
        # meanwhile.
        joins: list[int] = []
        if self._calls.are_under_way:
            joins = [
                place for place in places if self._calls.is_asked(self._path, self._usable[place])
            ]
            places = sorted(set(places).difference(joins))
        hopeless: list[int] = []
        if self._deadline < math.inf:
            keys = [self._usable[place] for place in places]
            hopeless = [
                places[number] for number in self._calls.hopeless(self._path, keys, self._deadline)
            ]
            places = sorted(set(places).difference(hopeless)) if hopeless else places
        if places:
            self._waiting = _Waiting(self, self._path, array("I", places))
            self._calls.enter_pool(self._waiting)
        await self._fail_late(hopeless)
        for number, place in enumerate(joins, start=1):
            if number % _SLICE == 0:
                self._report()
                await asyncio.sleep(0)
            if self._has_ended():
                return
            self._join(place)

    def _has_ended(self) -> bool:
        """Whether no more keys are asked about."""
        return self._error is not None or self._is_over

    def _join(self, place: int) -> None:
        """Share the call under way for a key, or a balance that arrived since this check began."""
        heard = self._calls.heard_since(self._path, self._usable[place], self._began)
        if heard is None:
            waiter = self._waiter_for(place)
            self._calls.begin(self._path, waiter, self._deadline, self._joins)
        else:
            self._take_for_all(place, heard)

    def _waiter_for(self, place: int) -> FanOutWaiter:
        waiter = FanOutWaiter(
            self._calls,
            self._usable[place],
            self._freshness,
            self._began,
            partial(self._land, place),
        )
        self._begun[place] = waiter
        return waiter

    async def _wait(self) -> None:
        """Wait for all outcomes; after the deadline, only for the calls that had begun."""
        while self._error is None:
            self._report()
            if self._is_over and self._waiting is not None:
                self._calls.leave_pool(self._waiting)
                self._waiting = None
            if not self._begun and (self._waiting is None or not self._waiting.waiting):
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        raise self._error

    def _on_deadline(self) -> None:
        self._is_over = True
        self._wake()

    def _give_up(self) -> None:
        """Leave nothing under way."""
        begun, self._begun = list(self._begun.values()), {}
        if self._waiting is not None:
            self._calls.leave_pool(self._waiting, begun)
            self._waiting = None
        else:
            for waiter in begun:
                waiter.give_up()

    async def _fail_late(self, places: Iterable[int]) -> None:
        """Fail the keys that have no turn before the deadline."""
        failed = 0
        for place in places:
            if self._landed[place] is None:
                self._take_for_all(place, self._too_late(place))
                failed += 1
                if failed % _SLICE == 0:
                    self._report()
                    await asyncio.sleep(0)

    def _too_late(self, place: int) -> Outcome[Any]:
        return self._calls.too_late(self._path, self._usable[place], self._freshness, self._began)

    # --- called by the queue and by waiters

    def make(self, place: int, flow: Pool, context: contextvars.Context) -> SharedCall:
        """The call of the key at `place`, at its turn."""
        return self._calls.take_turn(
            self._path, self._waiter_for(place), self._patience, flow, context
        )

    def place_of(self, digest: bytes) -> int | None:
        """The place of a secret."""
        return self._first.get(digest)

    def account_at(self, place: int) -> Hashable | None:
        """The declared account of the key at `place`."""
        return self._usable[place].account if self._calls.counts_accounts else None

    def _land(self, place: int, landed: Outcome[Any] | BaseException) -> None:
        self._begun.pop(place, None)
        if isinstance(landed, BaseException):
            self.end(landed)
            return
        if self._again:
            self._take_for_all(place, landed)
        else:
            self._take(place, landed)
        if self._on_outcome is not None or not self._begun:
            self._wake()

    def _take_for_all(self, place: int, outcome: Outcome[Any]) -> None:
        """Take the outcome of a secret, under each of its names."""
        for each in (place, *self._again.get(self._usable[place].digest, ())):
            self._take(each, outcome)

    def _take(self, place: int, outcome: Outcome[Any]) -> None:
        key = self._keys[place]
        self._landed[place] = outcome = outcome if outcome.key is key else outcome_for(key, outcome)
        if self._on_outcome is not None:
            self._reported.append(outcome)

    def _report(self) -> None:
        while self._reported and self._on_outcome is not None:
            self._on_outcome(self._reported.popleft())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Waiting(Pool):
    """The keys of a pool that wait for their turn."""

    __slots__ = ("_check", "_context", "places")

    def __init__(self, check: PoolCheck, path: str, places: array[int]) -> None:
        super().__init__(path, [check.account_at(place) for place in places])
        self._check = check
        self._context = contextvars.copy_context()
        self.places = places  # ascending

    def make(self, number: int) -> SharedCall:
        return self._check.make(self.places[number], self, self._context.copy())

    def of_account(self, account: Hashable) -> int:
        if isinstance(account, bytes):  # a key without a declared account
            return int(self.number_of(account) is not None)
        return super().of_account(account)

    def number_of(self, digest: bytes) -> int | None:
        place = self._check.place_of(digest)
        if place is None:
            return None
        number = bisect_left(self.places, place)
        is_there = number < len(self.places) and self.places[number] == place and self.waits(number)
        return number if is_there else None
