"""The scheduler against servers and failures that hypothesis generates, in time that is a number.

While no other client spends, no window of a server holds more than the limit. Every call ends,
flows and accounts take turns, and afterwards every counter is at zero. Each rule that is broken on
purpose is detected.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, ClassVar
from unittest.mock import patch

import attrs
import pytest
from aiolimiter import AsyncLimiter
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from crustcredits._ratelimit import (
    connection_slots,
    feedback,
    pace,
    permits,
    reserve,
)
from crustcredits._ratelimit.advertised_limit import AdvertisedLimit
from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.cooldown import EndpointCooldown, Trial
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.flow_queue import FlowQueue
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket, TokenBucket
from crustcredits._ratelimit.token_queue import AccountQueue, CommonQueue
from crustcredits._ratelimit.witnesses import LAG, WITNESSES, Witnesses
from tests import searches
from tests.ratelimit.servers import EPSILON, Rules, Window

# An abandoned request has hung for `LATE` seconds, long enough for the bound on hanging requests to
# matter.
PERIOD, LATE = 10.0, 5.0
ATTEMPTS = 12
SPARED = 4
# Seconds after which a request without an answer no longer counts, and the multiple of the slots
# that may be on the wire then.
PROMPT = 0.4
ON_WIRE = 9
# Starts a second that the first cut halves, where no pace is configured.
UNCUT = 100.0
# Most refused probes in a row before a cooldown, and seconds of the shortest cooldown.
RUN, HOLD = 24, 0.2
# Served probes in a row that end a trial: its width doubles from 1 to more than 16.
DOUBLINGS = 5
FATES = ["served"] * 5 + [
    "fails",
    "refused",
    "unsent",
    "lost",
    "lost late",
    "gateway",
    "passed on",
    "unavailable",
]
FATES_OF_MANY = ["refused", "lost", "lost late", "passed on", "gateway", "fails"]
# Seconds that no call waits.
NEVER = 10.0**9
# Seconds by which a wake-up may be late, because sums are rounded; and starts that one wake-up of
# the pace waits for.
MOMENT, GROUP = 1e-2, 3


class Clock:
    """The loop's time, for aiolimiter."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now


@attrs.define(eq=False)
class Job:
    """A call that has not ended."""

    number: int
    deadline: float
    attempts: int = 0
    on_wire: bool = False


class Pool(PoolFlow):
    """Keys that wait as numbers, each once."""

    __slots__ = ("accounts", "begun", "deadline", "is_given_up", "keys", "machine")

    def __init__(
        self, machine: Machine, keys: Sequence[int], accounts: int, deadline: float
    ) -> None:
        self.machine, self.accounts, self.deadline = machine, accounts, deadline
        self.keys = list(dict.fromkeys(keys))
        self.begun: set[int] = set()
        self.is_given_up = False
        super().__init__([key % accounts if accounts < 50 else None for key in self.keys])

    def numbers(self) -> list[int]:
        """The numbers that wait."""
        return [number for number in range(len(self.keys)) if self.waits(number)]

    def begin(self, number: int) -> Call:
        self.machine.demand(not self.is_given_up, "a number began after its pool was given up")
        self.machine.demand(number not in self.begun, "a number began twice")
        self.begun.add(number)
        return self.machine.call(self.keys[number], self.accounts, self, self.deadline)

    def account_of(self, number: int) -> Hashable:
        return account_of(self.keys[number], self.accounts)


def account_of(number: int, accounts: int) -> Hashable:
    """The declared account of a key; with 50 accounts each key is an account of its own."""
    return number % accounts if accounts < 50 else ("own", number)


class Turns:
    """Counts the turns of others while one waits with an unchanged number of calls."""

    def __init__(self) -> None:
        # For each: its calls, how often it was passed over, and the most that have waited with it.
        self.passed: dict[Hashable, tuple[int, int, int]] = {}

    def are_fair(self, who: Hashable, waiting: dict[Any, int], ahead: int) -> bool:
        """Note the turn of one, and return whether no other was passed over too often.

        Each has its turn after all others had theirs, and after the calls that are `ahead` of all.
        A call that begins to wait for a token instead of a start uses up a turn too.
        """
        passed = {}
        for each, length in waiting.items():
            if length and each != who:
                before, times, most = self.passed.get(each, (length, 0, 0))
                passed[each] = (
                    length,
                    times + 1 if before == length else 1,
                    max(most, len(waiting) + ahead),
                )
        self.passed = passed
        return all(times <= 2 * most + 2 for _, times, most in passed.values())


class Machine(RuleBasedStateMachine):
    """Calls come, are given up, expire, or get a waiter of a better kind; time passes.

    Answers come in any order. The class is long because hypothesis takes all rules of a state
    machine from one class.
    """

    broken: ClassVar[Any] = None  # the patch that breaks a rule on purpose
    worlds: ClassVar[tuple[str, ...]] = (
        *["plain"] * 5,
        *(
            "lag",
            "lag",
            "silent",
            "fixed",
            "two",
            "short",
            "group",
            "group",
            "neighbour",
            "neighbour counts",
            "lower",
            "higher",
            "wrong",
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.moment = Clock(), math.inf
        self.failed = self.is_calm = False
        self.vain = 0  # grants without a start, since the last event
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.open: dict[Call, Job] = {}
        self.pools: list[Pool] = []
        self.on_wire: dict[Attempt, None] = {}
        self.windows: dict[Hashable, Window] = {}
        self.arrivals: defaultdict[Hashable, deque[tuple[float, Attempt]]] = defaultdict(deque)
        self.proven: set[Attempt] = set()
        # Starts, ends and accounts of served requests.
        self.served: list[tuple[float, float, Hashable]] = []
        self.unserved: list[tuple[float, Hashable]] = []  # ends and accounts of the others
        self.not_before: dict[
            Hashable, float
        ] = {}  # the latest prediction of an account's next start
        self.flow_turns, self.account_turns = Turns(), defaultdict[Flow, Turns](Turns)
        self.level, self.last_start = 0.0, -math.inf
        self.quiet_until = -math.inf
        # Attempts that started since a refusal, until one is served.
        self.probes: list[Attempt] | None = None
        self.trial: Trial | None = None
        self.refused_probes = self.served_probes = 0
        # Seconds of the next requests, share of them until arrival, and fate.
        self.trips: deque[tuple[float, float, str]] = deque()
        self.singles, self.refreshes = Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
        self.check = Flow()
        clock = self.clock
        self.patches = [patch.object(AsyncLimiter, "_loop", property(lambda limiter: clock))]
        if self.broken is not None:
            self.patches.append(patch.object(*self.broken))
        for each in self.patches:
            each.start()

    @property
    def now(self) -> float:
        return self.clock.now

    @initialize(
        requests=st.sampled_from([1, 2, 5, 12, 20, 40]),
        scope=st.sampled_from(["auto", "auto", "client", "account"]),
        counts=st.sampled_from(["together", "account", "key"]),
        reserve=st.sampled_from([0.0, 0.0, 0.3]),
        world=st.integers(0, 10**6),
        rate=st.sampled_from([None, None, 2.0, 20.0]),
        slots=st.sampled_from([3, 3, 2, 1]),
    )
    def begin(
        self,
        *,
        requests: int,
        scope: Any,
        counts: Any,
        reserve: float,
        world: int,
        rate: float | None,
        slots: int,
    ) -> None:
        name = self.worlds[world % len(self.worlds)]
        if name == "group" and scope == "account":
            scope = "auto"
        if scope == "account" and counts == "together":
            counts = "account"
        self.requests, self.reserve, self.rate = requests, reserve, rate
        self.server = _rules(name, requests, counts)
        terms = SchedulerTerms(
            requests=requests,
            period=PERIOD,
            window=PERIOD,
            late=LATE,
            scope=scope,
            reserve=reserve,
            adopts="any" if name == "higher" else "lower",
        )
        self.terms = terms
        self.most = max(requests, self.server.limit) if terms.adopts == "any" else requests
        self.pace = Pace(rate, requests / PERIOD)
        self.slots = ConnectionSlots[Attempt](slots)
        self.scheduler = Scheduler(terms, pace=self.pace, slots=self.slots, seed=1)

    # --- events

    @rule(
        count=st.integers(1, 30),
        first=st.integers(0, 40),
        accounts=st.sampled_from([1, 3, 50]),
        kind=st.sampled_from(list(Kind)),
        patience=st.sampled_from([NEVER, NEVER, 0.5, 5.0, 30.0]),
    )
    def calls_come(
        self, count: int, first: int, accounts: int, kind: Kind, patience: float
    ) -> None:
        flow = {Kind.SINGLE: self.singles, Kind.MANY: self.check, Kind.BACKGROUND: self.refreshes}[
            kind
        ]
        for number in range(first, first + count):
            self.enter(self.call(number, accounts, flow, self.now + patience))

    @rule(
        keys=st.lists(st.integers(0, 25), min_size=1, max_size=40),
        accounts=st.sampled_from([1, 3, 50]),
        patience=st.sampled_from([NEVER, NEVER, 5.0]),
    )
    def a_pool_comes(self, keys: list[int], accounts: int, patience: float) -> None:
        pool = Pool(self, keys, accounts, self.now + patience)
        self.pools.append(pool)
        self.scheduler.put_pool(pool)
        if patience < NEVER:
            self.at(pool.deadline, partial(self.give_up_pool, pool))
        self.pump()

    @rule()
    def another_check_comes(self) -> None:
        self.check = Flow()

    @rule(
        trips=st.lists(
            st.tuples(st.floats(0, LATE), st.floats(0, 1), st.sampled_from(FATES)),
            min_size=1,
            max_size=12,
        )
    )
    def the_next_requests_fare_so(self, trips: list[tuple[float, float, str]]) -> None:
        self.trips.extend(trips)

    @rule(count=st.sampled_from([6, 40]), fate=st.sampled_from(FATES_OF_MANY))
    def many_requests_fare_so(self, count: int, fate: str) -> None:
        self.trips.extend([(0.05, 0.5, fate)] * count)

    @rule(seconds=st.sampled_from([0.0, 0.001, 0.3, 1.0, 2.5, 9.9, 10.1, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.play(self.now + seconds)

    @precondition(lambda self: any(call.queue is not None for call in self.open))
    @rule(place=st.integers(0, 10**6), which=st.sampled_from(["given up", "wanted"]))
    def one_that_waits(self, place: int, which: str) -> None:
        waiting = [call for call in self.open if call.queue is not None]
        call = waiting[place % len(waiting)]
        if which == "wanted":
            self.scheduler.move(call, self.singles, self.now)
            self.pump()
            return
        del self.open[call]
        if self.scheduler.remove(call, self.now):
            self.pump()
        else:
            self.check_that_no_admissible_call_waits()

    @precondition(lambda self: any(pool.waiting for pool in self.pools))
    @rule(place=st.integers(0, 10**6), which=st.sampled_from(["given up", "wanted", "too late"]))
    def one_of_a_pool(self, place: int, which: str) -> None:
        waiting = [pool for pool in self.pools if pool.waiting]
        pool = waiting[place % len(waiting)]
        if which == "given up":
            self.give_up_pool(pool)
            self.pump()
            return
        numbers = list(pool.numbers())
        number = numbers[place % len(numbers)]
        pool.take_out(number)
        if which == "too late":
            pool.begun.add(number)
        else:
            self.enter(pool.begin(number))

    # --- the driver

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.numbers), what))

    def call(self, number: int, accounts: int, flow: Flow, deadline: float) -> Call:
        account = account_of(number, accounts)
        call = Call((account, number), account, flow)
        self.open[call] = Job(number, deadline)
        if deadline < NEVER:
            self.at(deadline, partial(self.expire, call))
        return call

    def enter(self, call: Call) -> None:
        """Let a call enter, or refuse it if it certainly does not start before its deadline."""
        if self.scheduler.earliest(call.account, self.now) > self.open[call].deadline:
            del self.open[call]
            return
        is_behind = self.scheduler.holds_back
        self.scheduler.put(call)
        if not is_behind:
            self.pump()

    def expire(self, call: Call) -> None:
        """End a call at its deadline. A request on the wire runs to its end."""
        job = self.open.get(call)
        if job is not None and not job.on_wire:
            del self.open[call]
            self.scheduler.remove(call, self.now)

    def give_up_pool(self, pool: Pool) -> None:
        if pool in self.pools:
            self.pools.remove(pool)
            pool.is_given_up = True
            self.scheduler.remove_pool(pool)

    def pump(self) -> None:
        self.failed = True  # until this method has run to its end
        self.vain += 1
        while isinstance(granted := self.scheduler.grant(self.now), Attempt):
            self.vain = 0
            self.send(granted)
        assert not isinstance(granted, Call)
        self.moment = math.inf if granted is None else granted
        self.check_that_no_admissible_call_waits()
        self.note_predictions()
        self.failed = False

    def play(self, until: float) -> None:
        for _ in range(20_000):
            next_event = self.events[0][0] if self.events else math.inf
            when = min(next_event, max(self.moment, self.now))
            if when > until:
                break
            self.clock.now = max(self.now, when)
            if next_event <= self.now:
                self.vain, self.failed = 0, True
                heapq.heappop(self.events)[2]()
            self.pump()
            self.demand(self.vain <= 20 + 2 * len(self.open), "the scheduler polls")
        else:
            self.demand(False, "the clock does not advance")
        self.clock.now = max(self.now, until) if until < math.inf else self.now

    def send(self, request: Attempt) -> None:
        self.check_order(request)
        self.check_tokens(request)
        self.check_slots()
        self.check_pace()
        self.check_refusals(request)
        self.demand(
            self.now >= self.not_before.get(request.call.account, 0.0) - EPSILON,
            "a call started before its predicted earliest start",
        )
        job = self.open[request.call]
        job.attempts += 1
        job.on_wire = True
        self.on_wire[request] = None
        whole, share, fate = self.trips.popleft() if self.trips else (0.01, 0.5, "served")
        back = self.now + whole
        if fate == "unsent":
            self.at(back, partial(self.end, request, AttemptResult(status=None, unsent=True)))
        elif fate in {"lost", "lost late"}:
            arrives = self.now + (share * LATE if fate == "lost" else LATE + share * LATE)
            self.at(arrives, partial(self.arrive, request))
            self.at(self.now + LATE, partial(self.end, request, AttemptResult(status=None)))
        elif fate == "passed on":  # a gateway answers, and passes the request on later
            self.at(back, partial(self.end, request, AttemptResult(status=502)))
            self.at(back + share * LATE, partial(self.arrive, request))
        elif fate == "refused":  # by something in front of the window
            self.at(
                back,
                partial(
                    self.end,
                    request,
                    AttemptResult(status=429, wait=0.25 + share * 5 if share else None),
                ),
            )
        else:
            self.at(self.now + share * whole, partial(self.arrive, request, fate, back))

    def arrive(self, request: Attempt, fate: str = "", back: float | None = None) -> None:
        number = request.call.key[1] if isinstance(request.call.key, tuple) else 0
        scope = self.server.scope_of(request.call.account, number)
        self.check_window(scope, request)
        if scope not in self.windows:
            self.windows[scope] = Window(self.server, self.now)
        verdict = self.windows[scope].arrive(self.now, serves_all=self.is_calm)
        if verdict.is_served:
            self.arrivals[scope].append((self.now, request))
        if back is None:
            return
        if verdict.is_served:
            answers = {
                "served": AttemptResult(
                    status=200, limit=verdict.limit, remaining=verdict.remaining
                ),
                "fails": AttemptResult(status=500),
                "gateway": AttemptResult(status=403, by_gateway=True),
                "unavailable": AttemptResult(status=503, wait=1.0),
            }
            answer = answers[fate]
        else:
            answer = AttemptResult(
                status=429,
                limit=verdict.limit,
                remaining=verdict.remaining,
                wait=float(verdict.wait),
            )
        self.at(back, partial(self.end, request, answer))

    def end(self, request: Attempt, answer: AttemptResult) -> None:
        before, common = self.scheduler.cooldown.trial, self.common
        holds, rate = (0 if before is None else before.holds), self.pace.current(self.now)
        out = common.limit - common.room(self.now, 0)
        self.scheduler.ended(request, answer, self.now)
        del self.on_wire[request]
        if answer.is_served:
            if self.terms.scope == "auto" and common.limit - common.room(self.now, 0) < out:
                self.proven.add(request)
            self.check_limits(request, answer)
            self.served.append((request.started, self.now, request.call.account))
        else:
            self.unserved.append((self.now, request.call.account))
        self.learn(request, answer, before)
        trial = self.scheduler.cooldown.trial
        if (
            rate is not None
            and trial is not None
            and trial.holds > (holds if trial is before else 0)
        ):
            least = min(self.requests / PERIOD, self.highest_rate or math.inf)
            self.demand(
                (self.pace.current(self.now) or math.inf) <= max(least, rate / 2) + EPSILON,
                "a cooldown does not cut the pace",
            )
        self.end_attempt(request.call, answer)

    def end_attempt(self, call: Call, answer: AttemptResult) -> None:
        job = self.open[call]
        job.on_wire = False
        self.demand(call.spared <= SPARED, "refusals cost a call no attempt without a bound")
        counted = job.attempts - call.spared
        if answer.is_served or counted >= ATTEMPTS or self.now >= job.deadline:
            del self.open[call]
        else:
            self.at(self.now + 0.1, partial(self.again, call))

    def again(self, call: Call) -> None:
        if call in self.open:
            self.scheduler.put(call)

    # --- the promises

    def demand(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.failed = True
            raise AssertionError(otherwise)

    def check_window(self, scope: Hashable, request: Attempt) -> None:
        """Where the proof's assumptions hold, all requests count.

        Elsewhere all count except those with a common token that a proof returned early.
        """
        if self.server.neighbour:
            return
        window = self.arrivals[scope]
        while window and window[0][0] <= self.now - PERIOD + EPSILON:
            window.popleft()
        is_sound = self.terms.scope != "auto" or (
            self.server.scope != "group" and self.server.is_honest
        )
        count = len(window) if is_sound else sum(each not in self.proven for _, each in window)
        self.demand(count < self.most, "a server window holds more than the limit")

    def check_order(self, request: Attempt) -> None:
        """Foreground before background.

        Flows take turns, and in a flow accounts take turns, unless a trial draws among them.
        """
        ready, flow = self.scheduler.ready, request.call.flow
        ahead = len(self.scheduler.permits.common)
        waiting = {
            each: length
            for each, length in ready.lengths().items()
            if length and each.kind is not Kind.BACKGROUND
        }
        if request.kind is Kind.BACKGROUND:
            self.demand(not waiting, "a background call started before a foreground call")
            return
        self.demand(self.flow_turns.are_fair(flow, waiting, ahead), "a flow was passed over")
        if request.in_trial:
            self.account_turns.pop(flow, None)
            return
        accounts = Counter(
            call.account for call in self.open if call.queue is ready and call.flow is flow
        )
        if isinstance(flow, Pool) and flow.queue is ready:
            accounts.update(map(flow.account_of, flow.numbers()))
        self.demand(
            self.account_turns[flow].are_fair(request.call.account, accounts, ahead),
            "an account was passed over",
        )

    def check_tokens(self, request: Attempt) -> None:
        """Check the reserve for single calls, and the last tenth.

        Ten requests can witness before the last tenth of the common bucket is given.
        """
        buckets: list[Bucket] = [self.common] if request.common is not None else []
        if request.account.has_several_keys:
            buckets.append(request.account.bucket)
        for bucket in buckets if request.kind is not Kind.SINGLE else ():
            kept = min(bucket.limit - 1, math.ceil(self.reserve * bucket.limit))
            self.demand(
                bucket.room(self.now, 0) >= kept,
                "a token of the reserve for single calls was taken",
            )
        limit = self.common.limit
        most = limit - min(limit - 1, math.ceil(self.reserve * limit))
        if self.terms.scope == "auto" and most > 11:
            witnesses = sum(
                end <= self.now - LAG and start >= self.now - PERIOD
                for start, end, _ in self.served
            )
            left = self.common.room(self.now, 0)
            self.demand(
                witnesses >= WITNESSES or left >= math.ceil(most / 10),
                "the last tenth was given before ten requests could witness",
            )

    def check_slots(self) -> None:
        prompt = sum(self.now - request.started < PROMPT - EPSILON for request in self.on_wire)
        self.demand(prompt < self.slots.count, "more requests than slots")
        self.demand(
            len(self.on_wire) < ON_WIRE * self.slots.count, "more requests on the wire than allowed"
        )

    @property
    def highest_rate(self) -> float | None:
        """The configured rate; without one, the rate that the first cut halves."""
        if self.rate is None and self.pace.current(self.now) is not None:
            return max(self.requests / PERIOD, UNCUT)
        return self.rate

    def check_pace(self) -> None:
        """A rate that is cut and recovers begins with another burst."""
        rate = self.highest_rate
        if rate is None:
            return
        burst = min(5.0, max(1.0, rate))
        self.level = max(0.0, self.level - rate * (self.now - self.last_start)) + 1
        self.last_start = self.now
        self.demand(self.level <= 2 * burst + 1 + 1e-2, "the pace is exceeded")

    def check_refusals(self, request: Attempt) -> None:
        """After a refusal one request at a time starts, and a run of refusals is a cooldown."""
        self.demand(self.now >= self.quiet_until, "a run of refusals starts no cooldown")
        if self.probes is not None:
            prompt = (
                each
                for each in self.probes
                if each in self.on_wire and self.now - each.started < PROMPT - EPSILON
            )
            self.demand(next(prompt, None) is None, "a refusal starts no trial")
            self.probes.append(request)

    def check_limits(self, request: Attempt, answer: AttemptResult) -> None:
        """A limit is followed only where the counts beside it agree with the answers before it."""
        used, limit, account = answer.used, answer.limit, request.call.account
        if used is None or limit is None:
            return
        since, started = self.now - PERIOD, request.started
        # A request that ended near the end of the period may have arrived before it.
        seen = sum(
            since + LATE < end <= started and whose == account for _, end, whose in self.served
        )
        if used < seen:
            self.demand(
                request.account.bucket.limit == self.requests,
                "a limit was followed that the counts contradict",
            )
        # Some of those that ended in the last period may have aged out, and requests without an
        # answer may have been counted.
        most = sum(since < end <= started and whose == account for _, end, whose in self.served)
        most += sum(since - LATE < end and whose == account for end, whose in self.unserved)
        if used >= most and self.terms.adopts != "any":
            self.demand(
                request.account.bucket.limit == min(limit, self.requests),
                "a lower limit was not followed",
            )
        is_plain = (
            self.server.is_honest
            and not self.server.lag
            and not self.is_calm
            and self.terms.adopts != "any"
        )
        if is_plain and self.terms.scope == "client" and self.server.scope == "together":
            self.demand(
                self.common.limit == min(limit, self.requests),
                "a lower limit was not followed",
            )

    def learn(self, request: Attempt, answer: AttemptResult, before: Trial | None) -> None:
        """Follow the trial: note the effect of an answer on it."""
        trial = self.scheduler.cooldown.trial
        if trial is not self.trial:
            self.trial, self.refused_probes, self.served_probes = trial, 0, 0
        if answer.is_served:
            self.quiet_until, self.probes = -math.inf, None
            self.refused_probes = 0
            self.served_probes += request.trial is not None and request.trial is before
            self.demand(
                trial is not before or before is None or self.served_probes < DOUBLINGS,
                "served probes end no trial",
            )
        elif answer.is_refused:
            self.served_probes = 0
            if before is None:
                self.probes = []
            self.refused_probes += request.trial is not None and request.trial is before
            if self.refused_probes >= RUN and request.trial is before:
                self.quiet_until = self.now + HOLD

    def check_that_no_admissible_call_waits(self) -> None:
        """Without a trial, a foreground call starts if a slot, tokens and the pace allow it."""
        scheduler, permits, now = self.scheduler, self.scheduler.permits, self.now
        grace = MOMENT + GROUP / (self.pace.current(now) or math.inf)
        if (
            scheduler.cooldown.trial is not None
            or self.moment <= now + grace
            or self.pace.wait(now) is not None
        ):
            return
        patience = max(PROMPT, 4 * (self.slots.usual or 0.0))
        prompt = sum(now - request.started < patience for request in self.on_wire)
        if prompt >= self.slots.count or len(self.on_wire) >= ON_WIRE * self.slots.count:
            return
        for kind in (Kind.SINGLE, Kind.MANY):
            if permits.counts_common and permits.common.room(kind, now) <= 0:
                continue
            waiting = {
                call.account
                for call in self.open
                if call.queue is not None and call.flow.kind is kind
            }
            if kind is Kind.MANY:
                waiting.update(
                    pool.account_of(number) for pool in self.pools for number in pool.numbers()[:1]
                )
            for name in waiting:
                account = permits.accounts.find(name)
                has_room = account is None or account.room(kind, now) > 0
                self.demand(not has_room, "an admissible call was left over")

    @property
    def common(self) -> Bucket:
        """The tokens of all accounts together."""
        return self.scheduler.permits.common.bucket

    def note_predictions(self) -> None:
        """Note the predicted earliest start of some accounts."""
        waiting = (call.account for call in self.open if call.queue is not None)
        for account in set(itertools.islice(waiting, 5)):
            said = self.scheduler.earliest(account, self.now)
            self.not_before[account] = max(said, self.not_before.get(account, 0.0))

    def teardown(self) -> None:
        try:
            if hasattr(self, "scheduler") and not self.failed:
                self.finish()
        finally:
            for each in self.patches:
                each.stop()

    def finish(self) -> None:
        """Let the server serve all requests from now on.

        Then all calls end, and after all tokens have returned nothing is left.
        """
        self.trips.clear()
        self.is_calm = True
        left = len(self.open) + sum(pool.waiting for pool in self.pools)
        self.play(self.now + (100 + 3 * left) * PERIOD)
        self.demand(not self.open, "a call was left over")
        self.demand(not any(pool.waiting for pool in self.pools), "a number was left over")
        self.demand(
            all(len(pool.begun) == len(pool.keys) for pool in self.pools), "a number was left over"
        )
        self.play(self.now + 2 * PERIOD + 2 * LATE)
        for number in range(6):  # more than end a trial
            self.enter(self.call(number, 50, self.singles, NEVER))
            self.play(self.now + 6 * PERIOD)
        self.demand(not self.open, "a call was left over")
        self.play(self.now + 2 * PERIOD)
        self.enter(self.call(99, 50, self.singles, NEVER))
        self.play(self.now + 2 * PERIOD)
        self.check_that_nothing_is_left_over()

    def check_that_nothing_is_left_over(self) -> None:
        scheduler, common = self.scheduler, self.scheduler.permits.common
        quota = scheduler.quota(None, self.now)
        self.demand(
            (quota.free, quota.in_flight, quota.waiting, quota.refreshing)
            == (quota.limit, 0, 0, 0),
            "a token was left over",
        )
        if self.server.limit == self.requests and self.server.tells != "short":
            self.demand(quota.limit == self.requests, "a wrong limit was left over")
        self.demand(not self.events, "a timer was left over")
        self.demand(
            (common.let_out, common.refreshes_let_out, len(self.slots)) == (0, 0, 0),
            "a queue entry was left over",
        )
        self.demand(not len(scheduler.ready), "a queue entry was left over")
        self.demand(not len(scheduler.permits.common), "a queue entry was left over")
        self.demand(len(scheduler.permits.accounts) <= 1, "an account was left over")
        self.demand(scheduler.cooldown.trial is None, "a trial was left over")


def _rules(name: str, requests: int, scope: Any) -> Rules:
    plain = Rules(limit=requests, period=PERIOD, scope=scope)
    worlds = {
        "plain": plain,
        "lag": attrs.evolve(plain, lag=1.0),
        "silent": attrs.evolve(plain, tells="nothing"),
        "fixed": attrs.evolve(plain, window="fixed"),
        "two": attrs.evolve(plain, window="two"),
        "short": attrs.evolve(plain, window="two", tells="short"),
        "group": attrs.evolve(plain, scope="group", counts_refused=True),
        "neighbour": attrs.evolve(plain, neighbour=0.6 * requests / PERIOD),
        "neighbour counts": attrs.evolve(
            plain, neighbour=2 * requests / PERIOD, counts_refused=True
        ),
        "lower": attrs.evolve(plain, limit=max(1, requests // 2)),
        "higher": attrs.evolve(plain, limit=2 * requests),
        "wrong": attrs.evolve(plain, tells="wrong"),
    }
    return worlds[name]


SEARCH = settings(
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_limit_holds_every_call_ends_and_nothing_is_left_over() -> None:
    """In every world that hypothesis generates."""
    run_state_machine_as_test(
        Machine, settings=settings(SEARCH, max_examples=searches.examples(150))
    )


def _early(self: TokenBucket, when: float) -> None:
    _RETURN_AT(self, when - 0.02 * PERIOD)


def _at_once(self: TokenBucket, when: float) -> None:
    self.put_back()


def _never(self: TokenBucket, when: float) -> None:
    self.on_wire -= 1
    insort(self._returns, when + 10**9)


def _same_flow_again(self: FairQueue, *draw: Any, **how: Any) -> Call | None:
    found = _POP(self, *draw, **how)
    (self._foreground or self._background).rotate(1)
    return found


def _same_account_again(self: FlowQueue) -> Call | int:
    found = _NEXT(self)
    self.turns.rotate(1)
    return found


def _background_first(self: FairQueue, *draw: Any, **how: Any) -> Call | None:
    if not any(self._flow_queues[flow].length for flow in self._background):
        return _POP(self, *draw, **how)
    with patch.object(self, "_foreground", deque()):
        return _POP(self, *draw, **how)


def _loses_pools(self: FairQueue, pool: PoolFlow) -> None:
    if pool.queue is None:
        _PUSH_POOL(self, pool)
    else:
        pool.queue.remove_pool(pool)


def _refused_without_trial(self: EndpointCooldown, *rest: Any) -> bool:
    return False


def _never_held(self: EndpointCooldown, account: Hashable, *rest: Any) -> bool:
    self.trial = self.trial or Trial(-math.inf, account)
    return False


def _believes(self: AdvertisedLimit, account: Hashable, limit: int, used: int, seen: int) -> int:
    return max(1, min(limit, self._configured))


def _believes_nothing(
    self: AdvertisedLimit, account: Hashable, limit: int, used: int, seen: int
) -> int:
    return self._configured


def _sure_but_for_the_wire(bucket: Bucket, now: float) -> float:
    return now if bucket.room(now, 0) > 0 else bucket.room_at(now, 0) or now


def _ten_times_as_fast(most: float, period: float) -> AsyncLimiter:
    return AsyncLimiter(most, period / 10)


def _polls(self: Scheduler, now: float) -> Attempt | Call | float | None:
    granted = _GRANT(self, now)
    return (
        min(granted or math.inf, now + 0.01)
        if not isinstance(granted, (Attempt, Call)) and self.permits.common.has_waiters
        else granted
    )


_RETURN_AT, _POP, _NEXT, _PUSH_POOL, _GRANT = (
    TokenBucket.return_at,
    FairQueue.pop,
    FlowQueue.next,
    FairQueue.push_pool,
    Scheduler.grant,
)
BROKEN: dict[str, tuple[Any, str, Any, str]] = {
    "R1 flows": (FairQueue, "pop", _same_flow_again, "a flow was passed over"),
    "R1 accounts": (
        FlowQueue,
        "next",
        _same_account_again,
        "an account was passed over",
    ),
    "R1 background": (FairQueue, "pop", _background_first, "a background call started before"),
    "R2 pools": (FairQueue, "push_pool", _loses_pools, "left over"),
    "R3 early": (TokenBucket, "return_at", _early, "more than the limit"),
    "R3 at once": (TokenBucket, "return_at", _at_once, "more than the limit"),
    "R3 never": (TokenBucket, "return_at", _never, "left over"),
    "R3 late ones": (
        AttemptResult,
        "may_come_late",
        property(lambda self: False),
        "more than the limit",
    ),
    "R4 proof": (
        ScopeDetection,
        "counted",
        lambda self, *rest: (True, True),
        "more than the limit",
    ),
    "R4 witnesses": (
        Witnesses,
        "proves",
        lambda self, used, own, *rest: used <= own,
        "more than the limit",
    ),
    "R4 tenth": (CommonQueue, "_tenth", lambda self, now: 0, "before ten requests could witness"),
    "R5 reserve": (
        reserve,
        "kept_for_singles",
        lambda bucket, share: 0,
        "reserve for single calls",
    ),
    "R6 no trial": (
        EndpointCooldown,
        "refused",
        _refused_without_trial,
        "a refusal starts no trial",
    ),
    "R6 trial without end": (
        EndpointCooldown,
        "served",
        lambda self, *rest, **how: None,
        "end no trial",
    ),
    "R6 no hold": (
        EndpointCooldown,
        "refused",
        _never_held,
        "run of refusals starts no cooldown|a flow was passed over",
    ),
    "R6 probes": (Attempt, "leave_trial", lambda self: None, "left over"),
    "R6 spared": (feedback, "_SPARED", 10**6, "cost a call no attempt"),
    "R7 pace": (pace, "AsyncLimiter", _ten_times_as_fast, "pace is exceeded"),
    "R7 cut": (Pace, "cut", lambda self, now: None, "does not cut the pace"),
    "R8 believed": (AdvertisedLimit, "note", _believes, "that the counts contradict"),
    "R8 not believed": (AdvertisedLimit, "note", _believes_nothing, "was not followed"),
    "R9 earliest": (
        permits,
        "_sure",
        _sure_but_for_the_wire,
        "before its predicted earliest start",
    ),
    "R10 none may hang": (
        ConnectionSlots,
        "_let_hang",
        lambda self: None,
        "an admissible call was left over",
    ),
    "R10 all may hang": (connection_slots, "HANGING_SHARE", 10**6, "more requests on the wire"),
    "R10 more than slots": (connection_slots, "_PATIENCE", 0.1, "more requests than slots"),
    "R11 accounts": (AccountQueue, "release", lambda self, now: iter(()), "left over"),
    "R11 common": (CommonQueue, "release", lambda self, now: iter(()), "left over"),
    "R11 polls": (Scheduler, "grant", _polls, "the scheduler polls"),
}
# The kinds of server that show a broken rule, where not all do.
WORLDS = {
    "R3 late ones": ("plain",),
    "R4 proof": ("plain",),
    "R4 witnesses": ("plain",),
    "R6 no hold": ("neighbour counts",),
    "R6 spared": ("neighbour counts",),
    "R8 believed": ("wrong",),
    "R8 not believed": ("lower",),
}


@pytest.mark.thorough
@pytest.mark.parametrize("rule_broken", BROKEN)
def test_each_broken_rule_is_detected(rule_broken: str) -> None:
    """Each broken rule breaks a promise, or leaves a call over."""
    where, name, instead, said = BROKEN[rule_broken]

    class Broken(Machine):
        broken = where, name, instead
        worlds = WORLDS.get(rule_broken, Machine.worlds)

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
