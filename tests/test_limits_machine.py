"""Debt and scope against a model of the server: whatever is asked, lost, cancelled, and spent by others, in virtual time.

The machine asks for keys as the client does, with real buckets and claims. It also is the network and the server: it says when
each request arrives, and what becomes of it. What it asserts:

- *Never above the limit.* Where the client's reading of who is counted together is the server's, or wider, no window of one
  period ever holds more of our requests than the limit, refused ones included. While nobody else spends, none is refused and
  no bucket has debt. The server may count by something narrower; with "auto" it may count all together, by account or by key.
- *Bounded.* With others spending, no window that ends with a refused request of ours holds more of these than of others':
  it is refused when the window holds `limit` counted ones, and no more than `limit` of all, counted or refused, are ours.
- *Debt is what the rule says*, told anew from a list of all requests that were ever sent; where one may find out whether it is
  over, one does. (With "auto" several have to agree, and there is no such list here.)
- *No deadlock.* When nobody spends any more, all who wait finish within as many periods as their number needs, and three more: for
  what the others have spent, for what was given up on, for a pause. Then all buckets are as good as new.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Literal, TypeVar

import attrs
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test

from crustcredits import (
    ApiKey,
    Balance,
    CrustCreditsError,
    InternalServerError,
    InvalidKeyError,
    RateLimit,
    RateLimitError,
    RateLimitStatus,
)
from crustcredits._buckets import Buckets, account_of
from crustcredits._claim import Claim
from crustcredits._limits import Scope, TokenBucket
from crustcredits._quota import Quota
from crustcredits._tokens import LocalStore
from crustcredits._turn import Turn
from tests.machines import EPSILON, LATE, MANY, PERIOD, VirtualMachine, within
from tests.searches import examples
from tests.told import balance
from tests.virtual import now

T = TypeVar("T")

PATH = "/user/credits"
MARGIN = 0.005
STRETCHED = PERIOD * (1 + MARGIN)
# Two keys of one declared account, one of another, and some that say nothing; of these the last two share an account too.
POOL = [
    ApiKey("secret-0", name="0", account="acme"),
    ApiKey("secret-1", name="1", account="acme"),
    ApiKey("secret-2", name="2", account="other"),
    *(ApiKey(f"secret-{number}", name=str(number)) for number in range(3, 8)),
]

Counting = Literal["all together", "by account", "by key", "by what is not declared"]
GROUPS: dict[Counting, Callable[[ApiKey], Hashable]] = {
    "all together": lambda key: None,
    "by account": account_of,
    "by key": lambda key: key.digest,
    "by what is not declared": lambda key: "hidden" if key.name in {"2", "6", "7"} else account_of(key),
}
# What the server may count by, so that the limit is kept with each scope.
KEPT: dict[Scope, set[Counting]] = {
    "client": set(GROUPS),
    "account": {"by account", "by key"},
    "key": {"by key"},
    "auto": {"all together", "by account", "by key"},
}
Said = Literal["truth", "nothing", "another limit"]
ANOTHER = RateLimitStatus(limit=1_000_000, remaining=0, reset=1.0)


@attrs.define
class Window:
    """What one group of keys has sent."""

    counted: list[float] = attrs.field(factory=list)  # by whomever
    others: list[float] = attrs.field(factory=list)  # of these, other people's
    arrived: list[float] = attrs.field(factory=list)  # ours, whether or not they were counted
    refused: list[float] = attrs.field(factory=list)  # of these, those that were not


@attrs.define
class Server:
    """It counts each group of keys in a sliding window of its own; what it knows may lag behind by so many seconds."""

    limit: int
    group: Callable[[ApiKey], Hashable]
    lag: float
    windows: defaultdict[Hashable, Window] = attrs.field(factory=lambda: defaultdict(Window))

    def arrive(self, key: ApiKey, when: float) -> tuple[bool, RateLimitStatus]:
        """One of our requests. Returns whether it is refused, and what it is told."""
        window = self.windows[self.group(key)]
        window.arrived.append(when)
        refused, status = self._count(window, when)
        if refused:
            window.refused.append(when)
        return refused, status

    def spend(self, group: Hashable, when: float) -> None:
        """One of somebody else's."""
        window = self.windows[group]
        refused, _ = self._count(window, when)
        if not refused:
            window.others.append(when)

    def _count(self, window: Window, when: float) -> tuple[bool, RateLimitStatus]:
        oldest = bisect_right(window.counted, when - PERIOD)
        known = bisect_right(window.counted, when - self.lag) - oldest
        refused = known >= self.limit
        if not refused:
            window.counted.append(when)
            known += not self.lag
        reset = window.counted[oldest] + PERIOD - when if oldest < len(window.counted) else PERIOD
        return refused, RateLimitStatus(limit=self.limit, remaining=max(0, self.limit - known), reset=math.ceil(reset))


@attrs.define(eq=False)
class Request:
    """One that asks for a key, and where it is."""

    key: ApiKey
    turn: Turn
    straggles: float | None  # given up on before it arrived, it does so after so many seconds, or never
    task: asyncio.Task[None] | None = None
    started: float = math.inf
    fate: asyncio.Future[Fate] | None = None  # once it is on the wire
    told: tuple[bool, RateLimitStatus] | None = None  # once it has arrived
    home: float = math.inf  # when its token comes home, once it has ended


@attrs.frozen
class Fate:
    """How a request ends: with an answer of this status and these headers, or given up on, or without ever having left."""

    kind: Literal["answered", "abandoned", "unsent"]
    status: int = 200
    headers: RateLimitStatus | None = None


@attrs.define
class Debts:
    """What one bucket should know of others, by the rule, from a list of all requests that were ever sent."""

    sent: list[Request] = attrs.field(factory=list)
    newest: float = -math.inf
    amount: int = 0
    until: float = -math.inf

    def hear(self, request: Request, headers: RateLimitStatus, when: float) -> None:
        """Only the answer to the newest request sets it; of what was counted, ours is what had not come home when it started."""
        assert headers.limit is not None
        assert headers.remaining is not None
        own = sum(other.home > request.started for other in self.sent)
        if request.started >= self.newest:
            self.newest, self.until = request.started, when + STRETCHED
            self.amount = max(0, headers.limit - headers.remaining - own)

    def end(self, request: Request, fate: Fate, when: float) -> None:
        """It has ended so."""
        if fate.kind == "answered" and fate.headers is not None and fate.headers.limit != ANOTHER.limit:
            self.hear(request, fate.headers, when)
        if fate.kind == "unsent":
            self.sent.remove(request)
        else:
            request.home = when + (STRETCHED + LATE if fate.kind == "abandoned" else STRETCHED)


class Limits(VirtualMachine):
    """The client, the network, the server and other people."""

    scope: Scope | None = None
    counting: Counting | None = None
    lag: float | None = None
    # The proof is sound with any number of witnesses; three come up more often than ten.
    instead: ClassVar[dict[str, Any]] = {"crustcredits._proof.WITNESSES": 3}

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[Request, None] = {}  # in the order in which they were asked for
        self.on_wire: dict[Request, None] = {}
        self.debts: defaultdict[Hashable, Debts] = defaultdict(Debts)  # by the place of the bucket

    @initialize(
        scope=st.sampled_from(["auto", "auto", "client", "account", "key"]),
        counting=st.sampled_from(list(GROUPS)),
        limit=st.sampled_from([1, 2, 3, 5, 15, 15, 20]),
        more=st.sampled_from([0, 0, 0, 4]),
        lag=st.sampled_from([0.0, 0.0, 0.5, 1.4]),
        slots=st.integers(1, 30),
        alone=st.booleans(),
    )
    def begin(self, *, scope: Scope, counting: Counting, limit: int, more: int, lag: float, slots: int, alone: bool) -> None:
        scope, counting, lag = self.scope or scope, self.counting or counting, self.lag or lag
        self.reading = scope
        rate_limit = RateLimit(requests=limit + more, period=PERIOD, margin=MARGIN, scope=scope)
        self.server = Server(limit, GROUPS[counting], lag)
        self.slots = asyncio.Semaphore(slots)
        self.kept = more == 0 and counting in KEPT[scope]  # the client's reading is the server's, or wider
        self.alone = alone
        self.buckets = self.do(self._make(rate_limit))
        self.began = True

    async def _make(self, rate_limit: RateLimit) -> Buckets:
        return Buckets(rate_limit, LocalStore(), late=LATE)

    # --- what can happen

    @rule(
        first=st.integers(0, len(POOL) - 1),
        count=st.integers(1, 12),
        of_one=st.booleans(),
        wanted=st.sampled_from([True, True, True, False]),
        straggles=st.none() | st.sampled_from([0.0, 1.0, LATE]),
    )
    def ask(self, *, first: int, count: int, of_one: bool, wanted: bool, straggles: float | None) -> None:
        """For some keys, or for one of them as often."""
        self.do(self._ask(first, count, of_one=of_one, wanted=wanted, straggles=straggles))

    @rule(first=st.integers(0, len(POOL) - 1), count=st.integers(1, 8), of_one=st.booleans())
    def serve(self, *, first: int, count: int, of_one: bool) -> None:
        """The same, and whatever is under way then has its answer."""
        self.do(self._ask(first, count, of_one=of_one, wanted=True, straggles=None))
        self.do(self._answer_all())

    @rule(which=st.integers(0, 30))
    def want(self, which: int) -> None:
        """Somebody waits for what was only a refresh."""
        unwanted = [request for request in self.requests if not request.turn.wanted]
        if unwanted:
            self.do(self._want(unwanted[which % len(unwanted)]))

    @precondition(lambda self: self.on_wire)
    @rule(which=st.integers(0, 30))
    def arrive(self, which: int) -> None:
        """A request comes to the server, and its answer is on its way."""
        self.do(self._arrive(self._flying(which)))

    @precondition(lambda self: self.on_wire)
    @rule(
        which=st.integers(0, 30),
        status=st.sampled_from([200, 200, 200, 401, 500]),
        said=st.sampled_from(["truth", "truth", "truth", "nothing", "another limit"]),
    )
    def answer(self, which: int, status: int, said: Said) -> None:
        """It has an answer."""
        self.do(self._answer(self._flying(which), status, said))

    @precondition(lambda self: self.on_wire)
    @rule()
    def answer_all(self) -> None:
        """All of those under way have one."""
        self.do(self._answer_all())

    @precondition(lambda self: self.on_wire)
    @rule(which=st.integers(0, 30))
    def lose(self, which: int) -> None:
        """It is given up on; whether it arrives nobody knows."""
        self.do(self._lose(self._flying(which)))

    @precondition(lambda self: self.on_wire)
    @rule(which=st.integers(0, 30))
    def never_leave(self, which: int) -> None:
        """There was no connection."""
        self.do(self._never_leave(self._flying(which)))

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        """Wherever it is."""
        self.do(self._cancel(list(self.requests)[which % len(self.requests)]))

    @rule(seconds=st.sampled_from([0.01, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, PERIOD / 2, PERIOD, PERIOD + LATE]) | st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.do(asyncio.sleep(seconds))

    @precondition(lambda self: not self.alone)
    @rule(count=st.integers(1, 25), which=st.integers(0, len(POOL) - 1))
    def others_spend(self, count: int, which: int) -> None:
        """So many requests of one group that are none of ours."""
        for _ in range(count):
            self.server.spend(self.server.group(POOL[which]), self.loop.time())

    # --- what must be so

    @invariant()
    def nobody_waits_while_a_token_is_free(self) -> None:
        for quota in self.loop.run_until_complete(self._quotas()):
            waits = quota.free and quota.waiting and quota.paused is None
            self.check(not waits, "somebody waits while a token is free")

    @invariant()
    def somebody_finds_out_when_it_is_time(self) -> None:
        for bucket, quota in zip(self._all_buckets(), self.loop.run_until_complete(self._quotas()), strict=True):
            debt = bucket._debt
            if debt is not None and debt.amount and quota.waiting and quota.paused is None and not quota.probing:
                may = debt.probe_at <= self.loop.time() and bucket._tokens.free + debt.amount > 0
                self.check(not may, "it is time, and nobody finds out whether the debt is over")

    @invariant()
    def debt_is_what_the_rule_says(self) -> None:
        if self.reading == "auto":
            return
        for bucket, quota in zip(self._all_buckets(), self.loop.run_until_complete(self._quotas()), strict=True):
            debt = self.debts[bucket.place]
            self.check(quota.debt == (debt.amount if self.loop.time() < debt.until else 0), "another debt than the rule says")

    @invariant()
    def there_is_no_debt_without_others(self) -> None:
        if self.alone and self.kept:
            debts = [bucket._debt for bucket in self._all_buckets()]
            self.check(not any(debt.amount for debt in debts if debt is not None), "debt, and nobody else spends")

    def finish(self) -> None:
        """Nobody spends any more: all who wait finish, and a round of all keys leaves every bucket as good as new."""
        self._finish()
        self.do(asyncio.sleep(PERIOD))
        for number in range(len(POOL)):
            self.do(self._ask(number, 1, of_one=True, wanted=True, straggles=None))
            self._finish()
        self.do(asyncio.sleep(PERIOD * 1.005 + LATE + 1))
        idle = all(bucket.idle(self.loop.time()) for bucket in self._all_buckets())
        self.check(idle, "a bucket is not as good as new")
        for quota in self.loop.run_until_complete(self._quotas()):
            self.check((quota.free, quota.debt, quota.in_flight) == (quota.limit, 0, 0), "a token is lost")

    def _finish(self) -> None:
        a_round = max(1, self.server.limit - math.ceil(self.server.limit / 10))  # refreshes leave a tenth alone
        rounds = math.ceil(len(self.requests) / a_round) + 3
        ends = self.loop.time() + rounds * (PERIOD + LATE)
        while self.requests:
            self.nothing_has_gone_wrong()
            self.check(self.loop.time() < ends, "somebody waits for ever")
            while self.on_wire:
                self.do(self._answer_all())
            self.do(asyncio.sleep(0.25))

    async def give_up(self) -> None:
        tasks = [request.task for request in self.requests if request.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- how it happens

    def _all_buckets(self) -> list[TokenBucket]:
        return list(self.buckets._buckets.values())

    async def _quotas(self) -> list[Quota]:
        return [bucket.quota() for bucket in self._all_buckets()]

    def _flying(self, which: int) -> Request:
        return list(self.on_wire)[which % len(self.on_wire)]

    async def _ask(self, first: int, count: int, *, of_one: bool, wanted: bool, straggles: float | None) -> None:
        for number in range(count):
            turn = Turn()
            turn.wanted = wanted
            request = Request(POOL[(first + (0 if of_one else number)) % len(POOL)], turn, straggles)
            self.requests[request] = None
            request.task = asyncio.create_task(self._run(request))
            self.watch(request.task)

    async def _want(self, request: Request) -> None:
        request.turn.want()

    async def _run(self, request: Request) -> None:
        """As `_asker` does it, without a pace."""
        try:
            claim = self.buckets.claim(PATH, request.key)
            await self._admit(claim, request)
            claim.start()
            known = all(self.buckets._buckets.get(bucket.place) is bucket for bucket in claim._buckets)  # type: ignore[call-overload]
            self.check(known, "a bucket was forgotten while it was used")
            request.started = now()
            self._model(claim).sent.append(request)
            self.on_wire[request] = None
            request.fate = asyncio.get_running_loop().create_future()
            deadline = asyncio.get_running_loop().call_later(LATE, self._settle_fate, request, Fate("abandoned"))
            fate = Fate("abandoned")  # unless it is another, when it is cancelled
            try:
                fate = await request.fate
            finally:
                deadline.cancel()
                del self.on_wire[request]
                self.slots.release()
                self._end(claim, request, fate)
        finally:
            del self.requests[request]

    def _model(self, claim: Claim) -> Debts:
        return self.debts[claim._buckets[-1].place]

    def _end(self, claim: Claim, request: Request, fate: Fate) -> None:
        self._model(claim).end(request, fate, now())
        if fate.kind == "answered":
            claim.answered(fate.status, result_of(fate.status, fate.headers))
        elif fate.kind == "unsent":
            claim.unsent()
        else:
            if request.told is None and request.straggles is not None:
                asyncio.get_running_loop().call_later(request.straggles, self._count, request)
            claim.abandoned()

    async def _admit(self, claim: Claim, request: Request) -> None:
        again = False
        while True:
            try:
                await claim.acquire(request.turn, again=again)
                await self.slots.acquire()
            except BaseException:
                claim.put_back()
                raise
            if claim.may_start():
                return
            self.slots.release()
            again = True

    def _settle_fate(self, request: Request, fate: Fate) -> None:
        if request.fate is not None and not request.fate.done():
            request.fate.set_result(fate)

    async def _arrive(self, request: Request) -> None:
        if request.told is None:
            self._count(request)

    def _count(self, request: Request) -> None:
        """The server counts it, and what must be so of its window is."""
        when = now()
        request.told = self.server.arrive(request.key, when)
        window = self.server.windows[self.server.group(request.key)]
        if not self.kept:
            return
        self.check(within(window.arrived, when) <= self.server.limit, "more than the limit arrived within a period")
        if request.told[0]:
            spent = within(window.others, when, -EPSILON)
            self.check(within(window.refused, when) <= spent, "more were refused than others have spent")

    async def _answer(self, request: Request, status: int, said: Said) -> None:
        await self._arrive(request)
        assert request.told is not None
        refused, truth = request.told
        headers = {"truth": truth, "nothing": None, "another limit": ANOTHER}[said]
        self._settle_fate(request, Fate("answered", 429 if refused else status, headers))

    async def _answer_all(self) -> None:
        for request in list(self.on_wire):
            await self._answer(request, 200, "truth")

    async def _lose(self, request: Request) -> None:
        self._settle_fate(request, Fate("abandoned"))

    async def _never_leave(self, request: Request) -> None:
        if request.told is None:
            self._settle_fate(request, Fate("unsent"))

    async def _cancel(self, request: Request) -> None:
        assert request.task is not None
        request.task.cancel()


def result_of(status: int, headers: RateLimitStatus | None) -> Balance | CrustCreditsError:
    """What an answer is read as."""
    if status == 429:
        return RateLimitError("refused", retry_after=None if headers is None else headers.reset, rate_limit=headers)
    if status == 401:
        return InvalidKeyError("no such key", status=status, rate_limit=headers)
    if status == 500:
        return InternalServerError("broken", status=status, rate_limit=headers)
    return attrs.evolve(balance(), rate_limit=headers)


TestLimits = pytest.mark.timeout(600)(Limits.TestCase)  # what fails takes minutes to be made small
TestLimits.settings = settings(MANY, max_examples=examples(40))


class ComesHomeEarly(Limits):
    """As if each attempt had ended as long before its end as it can have taken."""

    scope, counting = "client", "all together"
    instead: ClassVar = Limits.instead | {
        "crustcredits._limits.TokenBucket.ended": lambda self, token, now: self._end(token, self._period - LATE, now),
    }


class ForgetsTheLost(Limits):
    """As if what was given up on could arrive no more."""

    scope, counting = "client", "all together"
    instead: ClassVar = Limits.instead | {"crustcredits._limits.TokenBucket.abandoned": TokenBucket.ended}


class BelievesAtOnce(Limits):
    """As if the server's count never lagged."""

    scope, counting, lag = "auto", "all together", 1.4
    instead: ClassVar = Limits.instead | {"crustcredits._proof.LAG": -0.1}


class NeedsNoWitness(Limits):
    """As if a small count were proof enough."""

    scope, counting = "auto", "all together"
    instead: ClassVar = {"crustcredits._proof.WITNESSES": -1000}


class IsDeaf(Limits):
    """As if nobody else were there."""

    scope, counting = "client", "all together"
    instead: ClassVar = Limits.instead | {"crustcredits._limits.TokenBucket.heard": lambda self, told, mark: None}


@pytest.mark.thorough
@pytest.mark.timeout(180)  # up to 500 examples, slow where coverage is measured
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (ComesHomeEarly, "more than the limit arrived"),
        (ForgetsTheLost, "more than the limit arrived"),
        (BelievesAtOnce, "more than the limit arrived"),
        (NeedsNoWitness, "more than the limit arrived"),
        (IsDeaf, "another debt than the rule says"),
    ],
)
def test_a_broken_rule_is_found_out(broken: type[Limits], said: str) -> None:
    """The machine is worth something: with a rule broken it fails."""
    found = settings(MANY, max_examples=500, database=None, derandomize=True, phases=[Phase.generate])
    with pytest.raises(AssertionError, match=said):
        run_state_machine_as_test(broken, settings=found)
