"""Invented processes that want to be the leader: each has a loop and a clock of its own.

They are killed, stopped, and slow; messages and answers are late or lost; Redis is out of reach or
loses its data. Each rule that is broken on purpose is found.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import attrs
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crustcredits.redis import lease as module
from tests.redis.lua import EPOCH, FakeRedis, connected
from tests.searches import examples

SPAN = 2.0
# The slowest clock still leaves a tenth of the lease's time for its error.
RATES = [0.92, 1.0, 1.1]
# Seconds after which a change that is due is taken for missing.
SOON = 0.02


class _Selector(selectors.DefaultSelector):
    """Does not wait."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(0)


class ProcessLoop(asyncio.SelectorEventLoop):
    """The loop of one process. It runs when it is told to."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.time = clock  # type: ignore[method-assign]  # its own clock
        super().__init__(_Selector())

    def step(self) -> None:
        """Run all callbacks that are due."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]  # asyncio's own
                return

    @property
    def due(self) -> float:
        """When it has something to do, by its own clock."""
        if self._ready:  # type: ignore[attr-defined]  # as above
            return -math.inf
        timers = self._scheduled  # type: ignore[attr-defined]  # as above
        return min((timer.when() for timer in timers if not timer.cancelled()), default=math.inf)


class Numbering(FakeRedis):
    """It also checks that each new term has a higher number.

    Attributes:
        terms: The number of each term, by its holder.
        holders: The holder of each process.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.terms: dict[str, int] = {}
        self.holders: dict[str, str] = {}

    async def evalsha(self, process: str, sha: str, count: int, *said: str | int) -> Any:
        self.holders[process] = str(said[count])
        return await super().evalsha(process, sha, count, *said)

    def execute(self, keys: Sequence[Any], said: Sequence[str | int], **script: Any) -> Any:
        answer = super().execute(keys, said, **script)
        holder, number = str(said[0]), answer[0]
        if number and self.terms.get(holder) != number:
            if number <= max(self.terms.values(), default=0):
                self.faults.append("the number went back")
            self.terms[holder] = number
        return answer


@attrs.define(eq=False)
class Candidate:
    """A process that wants to be the leader."""

    name: str
    loop: ProcessLoop
    rate: float
    lease: module.Lease
    leaves: asyncio.Event
    task: asyncio.Task[None]
    lost: list[int]
    is_stopped: bool = False
    ended_at: float | None = None  # when its term was first seen as over
    was_leader: bool = False


class Machine(RuleBasedStateMachine):
    """Time passes for all of them, and Redis has the only true clock."""

    lease: ClassVar[ModuleType] = module

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.redis = Numbering(clock=lambda: EPOCH + self.now)
        self.travel: dict[str, float] = {}
        self.redis.latency = lambda process: self.travel.get(process, 0.001)
        self.candidates: list[Candidate] = []
        self.names = map("process {}".format, count())
        self.one_leader_from = 0.0

    # --- processes

    @initialize(
        rates=st.lists(st.sampled_from(RATES), min_size=1, max_size=3),
        answers_lost=st.sampled_from([0, 0, 4]),
        seconds=st.sampled_from([0.0, 0.5]),
    )
    def processes_come(self, rates: list[float], answers_lost: int, seconds: float) -> None:
        """The first one before the others."""
        self.redis.lose_answers = answers_lost
        for rate in rates:
            self.a_process_comes(rate)
            self.play(seconds)

    @precondition(lambda self: len(self.candidates) < 4)
    @rule(rate=st.sampled_from(RATES))
    def a_process_comes(self, rate: float) -> None:
        name, loop = next(self.names), ProcessLoop(lambda: self.now * rate)
        lost: list[int] = []
        backend = connected(self.redis, name=name)
        with patch("crustcredits.redis.backend.Lease", self.lease.Lease):
            one = backend.lease("watcher", seconds=SPAN, on_lost=lambda: lost.append(1))
        leaves = asyncio.Event()

        async def work() -> None:
            async with one:
                await leaves.wait()

        task = loop.create_task(work())
        self.candidates.append(Candidate(name, loop, rate, one, leaves, task, lost))
        self.play(0.0)

    @precondition(lambda self: self.candidates)
    @rule(which=st.integers(0, 3))
    def a_process_is_killed(self, which: int) -> None:
        self.kill(self.candidates[which % len(self.candidates)])

    @precondition(lambda self: self.candidates)
    @rule(which=st.integers(0, 3), seconds=st.sampled_from([0.0, 0.1, SPAN]))
    def a_process_leaves(self, which: int, seconds: float) -> None:
        one = self.candidates[which % len(self.candidates)]
        one.loop.call_soon(one.leaves.set if one.was_leader else one.task.cancel)
        self.play(seconds)

    @precondition(lambda self: self.candidates)
    @rule(which=st.integers(0, 3))
    def a_process_is_stopped_or_goes_on(self, which: int) -> None:
        one = self.candidates[which % len(self.candidates)]
        one.is_stopped = not one.is_stopped
        self.play(0.0)

    @precondition(lambda self: self.leader() is not None)
    @rule(travel=st.sampled_from([0.001, 0.3]), seconds=st.sampled_from([0.0, 1.0, 1.2]))
    def the_leader_is_stopped_for_long(self, travel: float, seconds: float) -> None:
        leader = self.leader()
        assert leader is not None
        self.travel[leader.name] = travel
        self.play(seconds)
        leader.is_stopped = True
        self.play(1.3 * SPAN)
        leader.is_stopped = False
        self.play(0.0)

    # --- time and messages

    @rule(seconds=st.sampled_from([0.001, 0.1, 0.3, 0.7, 1.0, 2.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.play(seconds)

    @precondition(lambda self: self.candidates)
    @rule(which=st.integers(0, 3), seconds=st.sampled_from([0.0, 0.1, 0.3]))
    def messages_take(self, which: int, seconds: float) -> None:
        """Those of one process, one way."""
        self.travel[self.candidates[which % len(self.candidates)].name] = seconds

    @rule(answers=st.integers(1, 4))
    def answers_are_lost(self, answers: int) -> None:
        self.redis.lose_answers = answers

    @rule(messages=st.integers(1, 3))
    def messages_are_repeated(self, messages: int) -> None:
        self.redis.repeat = messages

    # --- Redis

    @rule()
    def redis_is_out_of_reach_or_back(self) -> None:
        self.redis.down = not self.redis.down

    @rule(seconds=st.sampled_from([0.1, 1.0, SPAN]), late=st.booleans())
    def redis_stalls(self, seconds: float, late: bool) -> None:
        self.redis.stall()
        self.play(seconds)
        self.redis.resume(late=late)
        self.play(0.0)

    @rule()
    def redis_loses_its_data(self) -> None:
        """An earlier leader cannot know, so there may be two until its time is over."""
        self.redis.flush()
        self.redis.flush_scripts()
        self.one_leader_from = self.now + SPAN

    # --- what must hold when nothing fails

    @precondition(lambda self: self.candidates)
    @rule(then=st.sampled_from(["killed", "leaves", "stopped"]))
    def nothing_fails_any_more(self, then: str) -> None:
        self.redis.down, self.redis.lose_answers, self.redis.repeat = False, 0, 0
        self.travel.clear()
        for one in self.candidates:
            one.is_stopped = False
        self.play(SPAN)  # a loss of the lease is noticed
        for one in [one for one in self.candidates if one.lost]:
            one.loop.call_soon(one.leaves.set)
        self.play(2 * SPAN)
        leader = self.leader()
        if not self.candidates:
            return
        assert leader is not None, "nobody is the leader"
        self.play(3 * SPAN)
        assert self.leader() is leader, "the leader lost its lease without a cause"
        if then == "killed":
            self.kill(leader)
            self.play(1.2 * SPAN)
            assert not self.candidates or self.leader() is not None, "the takeover was late"
        elif then == "stopped":
            leader.is_stopped = True
            self.play(1.3 * SPAN)
            other = self.leader()
            leader.is_stopped = False
            self.play(2 * SPAN)
            assert self.leader() is other, "a process that was stopped took the lease away"
        else:
            leader.loop.call_soon(leader.leaves.set)
            self.play(SOON)
            assert self.redis.holders[leader.name] not in self.redis.text(), (
                "the lease was not released"
            )

    # --- the world

    def leader(self) -> Candidate | None:
        return next((one for one in self.candidates if one.lease.is_held), None)

    def kill(self, one: Candidate) -> None:
        """End it. No further message of its reaches Redis."""
        self.candidates.remove(one)
        self.redis.cut.add(one.name)
        self.travel[one.name] = 0.0  # the failed release takes no time
        for task in asyncio.all_tasks(one.loop):
            task.cancel()
        one.loop.step()
        assert not asyncio.all_tasks(one.loop)
        one.loop.close()

    def play(self, seconds: float) -> None:
        """Let time pass, with everything that is due."""
        end = self.now + seconds
        while True:
            ready = [one for one in self.candidates if not one.is_stopped]
            due = min((one.loop.due / one.rate for one in ready), default=math.inf)
            if due > end:
                break
            self.now = max(self.now, due)
            for one in ready:
                if one.loop.due <= self.now * one.rate + 1e-9:
                    one.loop.step()
                if not asyncio.all_tasks(one.loop):
                    self.forget(one)
            self.check()
            self.now += 1e-6
        self.now = max(self.now, end)
        self.check()

    def forget(self, one: Candidate) -> None:
        self.candidates.remove(one)
        if not one.task.cancelled():
            one.task.result()
        one.loop.close()

    def check(self) -> None:
        held = [one for one in self.candidates if one.lease.is_held]
        assert len(held) <= 1 or self.now < self.one_leader_from, "two are leaders"
        for one in held:
            assert one.ended_at is None, "a lost lease came back"
            holder = self.redis.holders[one.name]
            assert self.redis.terms[holder] == one.lease.fencing_number, "not its number"
            one.was_leader = True
        for one in self.candidates:
            assert len(one.lost) <= 1, "the loss was reported twice"
            if one.is_stopped:
                one.ended_at = self.now if one.ended_at is not None else None
            elif one.was_leader and one not in held and not one.leaves.is_set():
                one.ended_at = one.ended_at or self.now
                assert one.lost or self.now - one.ended_at < SOON, "the loss was not reported"
        assert self.redis.faults == []

    def teardown(self) -> None:
        for one in list(self.candidates):
            self.kill(one)


def search(machine: type[Machine], usual: int, **options: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(usual),
            stateful_step_count=40,
            database=None,
            suppress_health_check=list(HealthCheck),
            **options,
        ),
    )


def test_there_is_one_leader_whatever_happens() -> None:
    """And each has a higher number than the one before; a killed one is replaced in time."""
    search(Machine, 60)


BREAKS = {
    "valid for longer than Redis keeps it": ("py", "_VALID = 0.9", "_VALID = 1.4"),
    "valid from the answer": (
        "py",
        "self._may_hold = number > 0",
        "self._may_hold, valid_until = number > 0, _Moment(self._loop.time() + valid, 1e12)",
    ),
    "valid until a timer says no": ("py", "and self._loop.time() < until.loop", ""),
    "not renewed": ("py", "_RENEWAL = 1 / 3", "_RENEWAL = 2.0"),
    "the loss is not noticed": ("py", "end.reschedule(until.loop)", "pass"),
    "not released": ("py", "if self._may_hold:", "if False:"),
    "candidates wait too long": ("py", "left + _MILLISECOND", "2 * left + _MILLISECOND"),
    "another's lease is taken": ("lua", "== 'acquire' and not value", "== 'acquire'"),
    "another's lease is released": (
        "lua",
        "'release' then\n    if is_own",
        "'release' then\n    if true",
    ),
    "numbers begin again": ("lua", "if next_number < now then", "if false then"),
}


READS_SCRIPT = 'files("crustcredits.redis").joinpath("lease.lua").read_text(encoding="utf-8")'


def broken(file: str, old: str, new: str) -> ModuleType:
    """The module with one change, in itself or in its script."""
    path = Path(module.__file__)
    texts = {
        kind: path.with_suffix(f".{kind}").read_text(encoding="utf-8") for kind in ("py", "lua")
    }
    assert texts[file].count(old) == texts["py"].count(READS_SCRIPT) == 1
    texts[file] = texts[file].replace(old, new)
    source = texts["py"].replace(READS_SCRIPT, repr(texts["lua"]))
    made = ModuleType(f"{module.__name__}_broken")
    exec(compile(source, "lease", "exec"), vars(made))  # noqa: S102  # a change on purpose
    return made


@pytest.mark.thorough
@pytest.mark.parametrize("name", BREAKS)
def test_a_rule_that_is_broken_is_found(name: str) -> None:
    """The search can fail."""
    machine = type("Broken", (Machine,), {"lease": broken(*BREAKS[name])})
    with pytest.raises(AssertionError):
        search(machine, 400, phases=[Phase.generate], derandomize=True)
