"""The scheduler against servers and trouble that hypothesis invents, in time that is a number.

While nobody else spends, no window of a server holds more than the limit. Every call ends, and afterwards every counter is at
zero.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.fair_queue import Call, Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Attempt, AttemptResult, Scheduler, SchedulerTerms
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.token_bucket import TokenBucket
from tests import searches

PERIOD, LATE = 10.0, 3.0
SLOTS = 3
# Distances between arrivals are sums of floats.
EPSILON = 1e-6
FATES = ["served", "served", "served", "served", "fails", "refused", "unsent", "lost", "lost late", "gateway"]


class Unpaced(Pace):
    """A pace needs a loop; and it only delays."""

    def cut(self, now: float) -> None:
        pass


class Machine(RuleBasedStateMachine):
    """Calls come, are given up, or are wanted by somebody better; time passes; answers come as they will."""

    different: ClassVar[tuple[Any, str, Any] | None] = None  # what is broken on purpose

    def __init__(self) -> None:
        super().__init__()
        self.now, self.moment = 0.0, math.inf
        self.failed = False
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.open: dict[Call, int] = {}  # and how many attempts each had
        self.windows: defaultdict[Hashable, deque[float]] = defaultdict(deque)
        self.counts = "together"
        self.trips: deque[tuple[float, float, str]] = (
            deque()
        )  # how long the next requests take, when they arrive, and what comes of them
        self.singles, self.refreshes = Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
        self.check = Flow()
        self.patch = None if self.different is None else patch.object(*self.different)
        if self.patch is not None:
            self.patch.start()

    @initialize(
        requests=st.sampled_from([1, 2, 5, 12, 20]),
        scope=st.sampled_from(["auto", "auto", "client", "account"]),
        counts=st.sampled_from(["together", "apart"]),
        reserve=st.sampled_from([0.0, 0.0, 0.3]),
    )
    def begin(self, requests: int, scope: Any, counts: str, reserve: float) -> None:
        self.counts = "apart" if scope == "account" else counts
        self.requests = requests
        terms = SchedulerTerms(requests=requests, period=PERIOD, window=PERIOD, late=LATE, scope=scope, reserve=reserve)
        self.slots = ConnectionSlots[Attempt](SLOTS)
        self.scheduler = Scheduler(terms, pace=Unpaced(None, 1.0), slots=self.slots, seed=1)

    @rule(
        count=st.integers(1, 30), first=st.integers(0, 40), accounts=st.sampled_from([1, 3, 50]), kind=st.sampled_from(list(Kind))
    )
    def calls_come(self, count: int, first: int, accounts: int, kind: Kind) -> None:
        flow = {Kind.SINGLE: self.singles, Kind.MANY: self.check, Kind.BACKGROUND: self.refreshes}[kind]
        for number in range(first, first + count):
            call = Call(number, number % accounts if accounts < 50 else ("own", number), flow)
            self.open[call] = 0
            self.scheduler.put(call)
        self.pump()

    @rule()
    def another_check_comes(self) -> None:
        self.check = Flow()

    @rule(trips=st.lists(st.tuples(st.floats(0, LATE), st.floats(0, 1), st.sampled_from(FATES)), min_size=1, max_size=12))
    def the_server_will_be_so(self, trips: list[tuple[float, float, str]]) -> None:
        self.trips.extend(trips)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.3, 1.0, 2.5, 9.9, 10.1, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.play(self.now + seconds)

    @precondition(lambda self: any(call.queue is not None for call in self.open))
    @rule(place=st.integers(0, 10**6), which=st.sampled_from(["given up", "wanted"]))
    def one_that_waits(self, place: int, which: str) -> None:
        waiting = [call for call in self.open if call.queue is not None]
        call = waiting[place % len(waiting)]
        if which == "given up":
            del self.open[call]
            self.scheduler.remove(call, self.now)
        else:
            self.scheduler.move(call, self.singles, self.now)
        self.pump()

    # --- the driver

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def pump(self) -> None:
        while isinstance(granted := self.scheduler.grant(self.now), Attempt):
            self.send(granted)
        assert not isinstance(granted, Call)
        self.moment = math.inf if granted is None else granted

    def play(self, until: float) -> None:
        for _ in range(20_000):
            next_event = self.events[0][0] if self.events else math.inf
            when = min(next_event, max(self.moment, self.now))
            if when > until:
                break
            self.now = max(self.now, when)
            if next_event <= self.now:
                heapq.heappop(self.events)[2]()
            self.pump()
        else:
            raise AssertionError("it goes round and round")
        self.now = max(self.now, until) if until < math.inf else self.now

    def send(self, request: Attempt) -> None:
        self.open[request.call] += 1
        whole, share, fate = self.trips.popleft() if self.trips else (0.01, 0.5, "served")
        assert len(self.slots) <= SLOTS * 9, "more are on the wire than may be"
        if fate == "unsent":
            self.at(self.now + whole, lambda: self.end(request, AttemptResult(status=None, unsent=True)))
        elif fate in {"lost", "lost late"}:
            arrives = self.now + (share * LATE if fate == "lost" else LATE + share * LATE)
            self.at(arrives, lambda: self.arrive(request))
            self.at(self.now + LATE, lambda: self.end(request, AttemptResult(status=None)))
        elif fate == "refused":  # by something else than the window
            self.at(self.now + whole, lambda: self.end(request, AttemptResult(status=429, wait=share * 5 or None)))
        else:
            self.at(self.now + share * whole, lambda: self.arrive(request, fate, self.now + (1 - share) * whole))

    def arrive(self, request: Attempt, fate: str = "", back: float | None = None) -> None:
        window = self.windows[request.call.account if self.counts == "apart" else None]
        while window and window[0] <= self.now - PERIOD + EPSILON:
            window.popleft()
        window.append(self.now)
        if len(window) > self.requests:
            self.failed = True
            raise AssertionError("the server saw more than the limit")
        if back is None:
            return
        remaining = self.requests - len(window)
        answers = {
            "served": AttemptResult(status=200, limit=self.requests, remaining=remaining),
            "fails": AttemptResult(status=500),
            "gateway": AttemptResult(status=403, is_html=True),
        }
        self.at(back, lambda: self.end(request, answers[fate]))

    def end(self, request: Attempt, answer: AttemptResult) -> None:
        spared = self.scheduler.ended(request, answer, self.now)
        call = request.call
        attempts = self.open.get(call, 0)
        if answer.is_served or attempts - spared >= 12:
            self.open.pop(call, None)
        else:
            self.at(self.now + 0.1, lambda: self.scheduler.put(call))

    def teardown(self) -> None:
        try:
            if hasattr(self, "scheduler") and not self.failed:
                self.finish()
        finally:
            if self.patch is not None:
                self.patch.stop()

    def finish(self) -> None:
        """From now on the server serves all; then all calls end, and when all has aged out nothing is left."""
        self.trips.clear()
        self.play(self.now + 100 * PERIOD + len(self.open) * 3 * PERIOD)
        assert not self.open, "a call was left over"
        self.play(self.now + 2 * PERIOD + 2 * LATE)
        self.scheduler.put(last := Call("last", "last", self.singles))
        self.open[last] = 0
        self.pump()
        self.play(self.now + 2 * PERIOD)
        assert not self.open
        scheduler = self.scheduler
        quota = scheduler.quota(None, self.now)
        assert (quota.free, quota.in_flight, quota.waiting, quota.refreshing) == (self.requests, 0, 0, 0), "a token was left over"
        assert (scheduler._called, scheduler._refreshing, len(self.slots), scheduler._parked) == (0, 0, 0, {})
        assert len(scheduler._accounts) <= 1
        trial = scheduler._cooldown.trial
        assert trial is None or trial.on_wire == 0


SEARCH = settings(stateful_step_count=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def test_the_limit_holds_every_call_ends_and_nothing_is_left_over() -> None:
    """Whatever hypothesis invents."""
    run_state_machine_as_test(Machine, settings=settings(SEARCH, max_examples=searches.examples(150)))


def _early(self: TokenBucket, when: float) -> None:
    _RETURN_AT(self, when - 0.02 * PERIOD)


def _at_once(self: TokenBucket, when: float) -> None:
    self.put_back()


def _never(self: TokenBucket, when: float) -> None:
    self.on_wire -= 1
    insort(self._returns, when + 10**9)


_RETURN_AT = TokenBucket.return_at


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ((TokenBucket, "return_at", _early), "more than the limit"),
        ((TokenBucket, "return_at", _at_once), "more than the limit"),
        ((TokenBucket, "return_at", _never), "left over"),
        ((AttemptResult, "may_come_late", property(lambda self: False)), "more than the limit"),
        ((Scheduler, "_release", lambda self, account, now: None), "left over"),
        ((Scheduler, "_release_common", lambda self, now: None), "left over"),
        ((ScopeDetection, "told", lambda self, *rest: (True, True)), "more than the limit"),
        ((Attempt, "leave_trial", lambda self: None), "left over"),
    ],
    ids=["early", "at once", "never", "late ones", "accounts", "common", "proof", "probes"],
)
def test_a_rule_that_is_broken_is_found_out(broken: tuple[Any, str, Any], said: str) -> None:
    """Each breaks the promise, or leaves a call over."""

    class Broken(Machine):
        different = broken

    search = settings(
        SEARCH,
        max_examples=400,
        stateful_step_count=40,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError, match=said):
        run_state_machine_as_test(Broken, settings=search)
