"""The bucket under random delays, failures, refreshes and cancellations, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from typing import Literal

import attrs
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from crustcredits._limits import TokenBucket
from crustcredits._quota import grant_time
from crustcredits._turn import Turn
from tests.searches import examples
from tests.virtual import now, run

PERIOD = 10.0
LATE = 3.0
# Distances between arrivals are sums of floats.
EPSILON = 1e-6


@attrs.frozen
class Caller:
    """One that wants a token, and what becomes of its attempt."""

    joins: float
    travel: float  # from start to arrival
    answer: float  # from arrival to end
    fate: Literal["ended", "abandoned", "unused"]
    straggles: float  # an abandoned attempt arrives so long after its end; above LATE: never
    gives_up: float | None = None  # seconds until it is cancelled, wherever it is
    told: float | None = None  # refused, and told to come back in so many seconds
    wanted: bool = True  # or only a refresh
    wanted_after: float | None = None  # a refresh that somebody wants after so many seconds


def seconds(most: int) -> st.SearchStrategy[float]:
    """Often whole halves, so that things coincide."""
    return st.integers(0, most * 2).map(lambda halves: halves / 2) | st.floats(0, most)


CALLERS = st.lists(
    st.builds(
        Caller,
        joins=seconds(30),
        travel=seconds(4),
        answer=seconds(4),
        fate=st.sampled_from(["ended", "ended", "ended", "abandoned", "unused"]),
        straggles=seconds(4),
        gives_up=st.none() | seconds(30),
        told=st.none() | st.sampled_from([3.0, 3.0, 3.5, 9.0]),
        wanted=st.booleans(),
        wanted_after=st.none() | seconds(20),
    ),
    min_size=1,
    max_size=25,
)


class World:
    """Callers, a bucket, and what a server would see of them."""

    def __init__(self, bucket: TokenBucket) -> None:
        self.bucket = bucket
        self.arrivals: list[float] = []
        self.wanted: list[int] = []  # in the order in which somebody came to wait for them
        self.granted: list[int] = []
        self.refreshed: list[int] = []
        self.cancelled: set[int] = set()

    async def call(self, number: int, caller: Caller) -> None:
        await asyncio.sleep(caller.joins)
        task = asyncio.create_task(self._attempt(number, caller))
        if caller.gives_up is not None:
            asyncio.get_running_loop().call_later(caller.gives_up, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            self.cancelled.add(number)

    async def _attempt(self, number: int, caller: Caller) -> None:
        turn = Turn()
        turn.wanted = caller.wanted
        if caller.wanted:
            self.wanted.append(number)
        elif caller.wanted_after is not None:
            asyncio.get_running_loop().call_later(caller.wanted_after, self._want, number, turn)
        token = await self.bucket.acquire(turn)
        (self.granted if turn.wanted else self.refreshed).append(number)
        await self._travel(number, caller, token)

    def _want(self, number: int, turn: Turn) -> None:
        if turn.waiter is not None and not turn.waiter.done():
            self.wanted.append(number)
            turn.want()

    async def _travel(self, number: int, caller: Caller, token: int) -> None:
        if caller.fate == "unused":
            self.bucket.unused(token)
            return
        started = now()
        self.bucket.start()
        try:
            await asyncio.sleep(caller.travel)
            if caller.fate == "abandoned":
                self._straggle(now() + caller.straggles)
                self.bucket.abandoned(token)
                return
            self.arrivals.append(now())
            await asyncio.sleep(caller.answer)
        except asyncio.CancelledError:
            # Given up on while under way: it arrives when it would have, if that is soon enough.
            if now() < started + caller.travel:
                self._straggle(started + caller.travel)
            self.bucket.abandoned(token)
            raise
        if caller.told is None:
            self.bucket.succeeded()
        else:
            self.bucket.refused(number, caller.told)
        self.bucket.ended(token)

    def _straggle(self, arrives: float) -> None:
        if arrives <= now() + LATE:
            self.arrivals.append(arrives)


async def play(bucket: TokenBucket, tokens: int, callers: list[Caller]) -> World:
    world = World(bucket)
    watch = asyncio.create_task(watch_for_idling(bucket))
    await asyncio.gather(*(world.call(number, caller) for number, caller in enumerate(callers)))
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    await asyncio.sleep(PERIOD + LATE + 1)
    bucket.succeeded()
    assert bucket.idle(now()), "a token is lost"
    assert bucket.quota().free == tokens
    return world


async def watch_for_idling(bucket: TokenBucket) -> None:
    while True:
        quota = bucket.quota()
        assert quota.paused is not None or not (quota.free and quota.waiting), "somebody waits while a token is free"
        await asyncio.sleep(0.37)


class Watched(TokenBucket):
    """Looks at each refresh in the moment of its grant."""

    __slots__ = ("_last",)

    def _grant(self, turn: Turn, *, probe: bool = False) -> bool:
        granted = super()._grant(turn, probe=probe)
        if granted and not turn.wanted:
            assert not self._line.waiting, "a refresh went before somebody who waits"
            assert self._tokens.free >= (self._requests > 1) * self._requests / 10, "a refresh took of the last tenth"
            assert now() - getattr(self, "_last", -PERIOD) >= PERIOD / self._requests, "refreshes are not spread"
            self._last = now()
        return granted


def check(bucket: type[TokenBucket], tokens: int, callers: list[Caller]) -> None:
    world = run(play(bucket(tokens, PERIOD, late=LATE), tokens, callers))
    arrivals = sorted(world.arrivals)
    for first, last in zip(arrivals, arrivals[tokens:], strict=False):
        assert last - first >= PERIOD - EPSILON, f"{tokens + 1} arrivals within {last - first} s"
    assert world.granted == [number for number in world.wanted if number in set(world.granted)], "somebody was overtaken"
    assert {*world.granted, *world.refreshed, *world.cancelled} == set(range(len(callers))), "somebody starved"


FEW_TOKENS = st.integers(1, 4) | st.sampled_from([10, 20])


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])
@given(tokens=FEW_TOKENS, callers=CALLERS)
@example(tokens=1, callers=[Caller(0, 4, 0, "ended", 0), Caller(0, 0, 0, "ended", 0)])
def test_no_window_holds_more_than_the_tokens_and_nobody_is_lost_or_overtaken(tokens: int, callers: list[Caller]) -> None:
    """Whatever delays, failures, refusals, cancellations and refreshes do, the server never sees more than the limit."""
    check(Watched, tokens, callers)


class CountsFromTheStart(TokenBucket):
    """The rule broken: a token comes back one period after its attempt's start."""

    __slots__ = ("_starts",)

    async def acquire(self, turn: Turn | None = None, *, again: bool = False) -> int:
        token = await super().acquire(turn, again=again)
        self._started().append(now())
        return token

    def _started(self) -> list[float]:
        if not hasattr(self, "_starts"):
            self._starts: list[float] = []
        return self._starts

    def ended(self, token: int = 0, now: float | None = None) -> None:
        when = asyncio.get_running_loop().time()
        self._end(token, self._period - (when - self._started().pop(0)), when)


def test_a_token_that_comes_back_one_period_after_the_start_is_found_out() -> None:
    """The property is worth something: with the rule broken it fails."""

    @settings(max_examples=300, database=None, derandomize=True, phases=[Phase.generate])
    @given(tokens=FEW_TOKENS, callers=CALLERS)
    def property_of_the_broken(tokens: int, callers: list[Caller]) -> None:
        only_ended = [attrs.evolve(caller, fate="ended", gives_up=None, told=None, wanted=True) for caller in callers]
        check(CountsFromTheStart, tokens, only_ended)

    with pytest.raises(AssertionError, match=r"arrivals within"):
        property_of_the_broken()


@given(
    times=st.lists(st.floats(0, 100), min_size=1, max_size=8).map(sorted),
    ahead=st.integers(0, 60),
    period=st.floats(1, 50),
)
def test_the_grant_time_is_that_of_playing_it_through(times: list[float], ahead: int, period: float) -> None:
    """How long a wait takes as things stand is exact, also when tokens come home late by more than a period."""
    homes = list(times)
    heapq.heapify(homes)
    for _ in range(ahead):
        heapq.heapreplace(homes, homes[0] + period)
    assert grant_time(times, ahead, period) == pytest.approx(homes[0])
