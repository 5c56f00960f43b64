"""Processes that share their tokens in Redis, against a model of the API: whatever is asked, lost and broken, in virtual time.

The machine is the processes, the network, the API, other people, and whatever happens to Redis: it loses everything, falls back to
an earlier state on another server, is out of reach for all or for one, hangs, loses answers and hears messages twice.
What it asserts:

- *Never above the limit.* While nobody else spends, no window of one period ever holds more of our requests than the limit, of
  all processes together, and none is refused. Left out is what nobody can promise: a process that is gone cannot say after a
  loss what it has sent; one that alone is cut off, for more than a moment, adds its share to what others spend; and one that
  has slept through an outage may be the first to speak after it.
- *Bounded.* With others spending, no window that ends with a refused request of ours holds more of these than of others'.
- *No deadlock, no leak.* When all is well again and nobody else spends, all who wait finish in their time, and then neither Redis
  nor any process has anything out or anything left to say.
- *No busy loop*: messages keep their distance.

All that was said to Redis is then said again to a real server, with the clock of then: it gives the same answers, keeps the same,
and for as long.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import attrs
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from redis import Redis

from crustcredits import BucketsUnavailableError
from crustcredits._debt import Told
from crustcredits._shared import GAP, SharedTokens
from crustcredits._tokens import FRESH
from crustcredits.redis import _SCRIPT, _SHA
from tests.lua import EPOCH, FakeRedis, SortedSet, between, opening
from tests.machines import EPSILON, LATE, MANY, PERIOD, VirtualMachine, within
from tests.processes import Worker, worker
from tests.searches import examples
from tests.servers import RedisServer
from tests.virtual import now

T = TypeVar("T")

LEASE = PERIOD + 2 * LATE + FRESH
# Seconds in which every process has noticed what has happened to Redis: it speaks, is not answered in time, and tries again.
NOTICED = 4.0
MOST_PROCESSES = 3

# --- what was said to Redis, and a real server that is told the same


@attrs.frozen
class Said:
    """One message that the script answered, or with `error` refused. Times to live are in milliseconds."""

    now: int  # microseconds of Redis's clock
    keys: tuple[str, ...]
    said: tuple[str, ...]
    answer: Any
    before: dict[str, int]  # what lives then, and for how long
    after: dict[str, int]


@attrs.frozen
class Became:
    """All is replaced by this, on a server that is the one that wrote it or another."""

    state: dict[str, SortedSet | dict[str, str]]
    same_server: bool


Event: TypeAlias = "Said | Became"


class RecordedRedis(FakeRedis):
    """It remembers what was said to it, and what it became."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.events: list[Event] = []
        self.kept: dict[str, Any] = {}  # after the last of them

    def execute(self, keys: Sequence[Any], said: Sequence[str | int], *, sha: str = "", script: str | None = None) -> Any:
        before = self.lives()
        answer = super().execute(keys, said, sha=sha, script=script)
        self.events.append(Said(self._now, tuple(keys), tuple(map(str, said)), answer, before, self.lives()))
        self.kept = {key: plain(value) for key, value in self._values.items()}
        return answer

    def flush(self) -> None:
        super().flush()
        self.events.append(Became({}, same_server=True))
        self.kept = {}

    def roll_back(self, state: Any) -> None:
        super().roll_back(state)
        self.events.append(Became({key: value.copy() for key, value in state[0].items()}, same_server=False))
        self.kept = {key: plain(value) for key, value in self._values.items()}

    def is_reachable(self) -> bool:
        return not self.down and self._stalled is None

    def lives(self) -> dict[str, int]:
        self._look_at_clock()
        return {key: self._pttl(key) for key in self.keys()}


def opened_and_recorded(*, clock: Callable[[], float] = lambda: EPOCH, **options: Any) -> RecordedRedis:
    """A server that has been in use for a while."""
    redis = RecordedRedis(clock=clock, **options)
    keys, said = opening()
    redis.execute(keys, said, sha=_SHA, script=_SCRIPT)
    return redis


def plain(value: SortedSet | dict[str, str]) -> dict[str, Any]:
    return dict(value.scores) if isinstance(value, SortedSet) else {field: text for field, text in value.items() if field != "run"}


# The script, but for the clock: that is what is said after everything else.
CLOCKED = """
local server = redis
local redis = {pcall = server.pcall, call = function(name, ...)
    if name == 'TIME' then
        return {ARGV[#ARGV - 1], ARGV[#ARGV]}
    end
    return server.call(name, ...)
end}
"""


class Replay:
    """A real server that is told all of it again. It is not told how time went by, but how long each key is to live."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.script = client.register_script(CLOCKED + _SCRIPT)
        self.run = client.info("server")["run_id"]

    def all(self, events: Sequence[Event]) -> None:
        self.client.flushall()
        for event in events:
            if isinstance(event, Said):
                self.say(event)
            else:
                self.become(event)

    def say(self, said: Said) -> None:
        clock = str(said.now // 1_000_000), str(said.now % 1_000_000)
        with self.client.pipeline() as pipeline:
            for name in self.names():
                if name in said.before:
                    pipeline.pexpire(name, max(1, said.before[name]))
                else:
                    pipeline.delete(name)
            self.script(said.keys, [*said.said, *clock], client=pipeline)
            for key in said.after:
                pipeline.pttl(key)
            results = pipeline.execute()
        lives = results[len(results) - len(said.after) :]
        assert results[-1 - len(said.after)] == said.answer
        assert dict(zip(said.after, lives, strict=True)) == pytest.approx(said.after, abs=900)

    def become(self, event: Became) -> None:
        self.client.flushall()
        for key, value in event.state.items():
            if isinstance(value, SortedSet):
                self.client.zadd(key, value.scores)
            else:
                name = {} if "run" not in value else {"run": self.run if event.same_server else "another"}
                self.client.hset(key, mapping=value | name)

    def names(self) -> list[str]:
        return list(self.client.scan_iter())

    def contents(self) -> dict[str, Any]:
        return {name: self._value(name) for name in self.names()}

    def _value(self, name: str) -> dict[str, Any]:
        if self.client.type(name) == "zset":
            return dict(self.client.zrange(name, 0, -1, withscores=True))
        return {field: text for field, text in self.client.hgetall(name).items() if field != "run"}


@pytest.fixture(scope="module", autouse=True)
def replay() -> Iterator[Replay]:
    """The real server, for this module alone: it is flushed."""
    server = RedisServer()
    with Redis(unix_socket_path=str(server.socket), decode_responses=True) as client:
        Processes.replay = Replay(client)
        yield Processes.replay
        Processes.replay = None
    server.remove()


# --- the API


@attrs.define
class Api:
    """It counts all requests together in one sliding window."""

    limit: int
    counted: list[float] = attrs.field(factory=list)  # by whomever
    others: list[float] = attrs.field(factory=list)  # of these, other people's
    arrived: list[float] = attrs.field(factory=list)  # ours, whether or not they were counted
    refused: list[float] = attrs.field(factory=list)  # of these, those that were not

    def arrive(self, when: float) -> tuple[bool, int, float]:
        """One of ours: whether it is refused, how many are counted, and when the next slot is free."""
        self.arrived.append(when)
        refused = self._count(when)
        if refused:
            self.refused.append(when)
        oldest = self.counted[-within(self.counted, when, 0.0)]
        return refused, min(self.limit, within(self.counted, when, 0.0)), oldest + PERIOD - when

    def spend(self, when: float) -> None:
        """One of somebody else's."""
        if not self._count(when):
            self.others.append(when)

    def _count(self, when: float) -> bool:
        refused = within(self.counted, when) >= self.limit
        if not refused:
            self.counted.append(when)
        return refused


# --- the processes

Ends = Literal["answered", "lost", "straggling", "unsent"]


@attrs.define(eq=False)
class Process:
    """One of them, and who asks in it."""

    worker: Worker
    requests: dict[asyncio.Task[None], None] = attrs.field(factory=dict)  # in the order in which they were asked for
    here: bool = True

    @property
    def alone(self) -> bool:
        return self.worker.buckets._link.alone


class Processes(VirtualMachine):
    """Up to three processes, Redis, the network, the API and other people."""

    replay: ClassVar[Replay | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process] = []
        self.begun = 0
        self.harmed = -math.inf  # when something has happened to Redis last
        self.gone = -math.inf  # when a process was there last that is not now
        self.whole = True  # nothing has happened to Redis yet
        self.skew = 0.0
        self.earlier: Any = None

    @initialize(
        limit=st.sampled_from([3, 4, 6, 9]),
        latency=st.sampled_from([0.0, 0.01, 0.3]),
        raises=st.sampled_from(["local", "local", "raise"]),
        pace=st.sampled_from([None, None, 3.0]),
        alone=st.booleans(),
        seed=st.integers(0, 9),
    )
    def begin(self, *, limit: int, latency: float, raises: str, pace: float | None, alone: bool, seed: int) -> None:
        self.api = Api(limit)
        self.redis = opened_and_recorded(latency=between(0.0, latency, seed), clock=self.clock)
        self.options: dict[str, Any] = {"limit": limit, "on_outage": raises, "pace": pace}
        self.alone = alone
        self.began = True
        self.start()
        self.start()

    def clock(self) -> float:
        return EPOCH + self.skew + self.loop.time()

    # --- what can happen to processes

    @precondition(lambda self: len(self.processes) < MOST_PROCESSES and self.loop.time() >= self.gone + LEASE)
    @rule()
    def start(self) -> None:
        """One more; where there may be only so many shares, those of the ones that are gone are free again."""
        self.do(self._start())

    async def _start(self) -> None:
        self.begun += 1
        one = worker(
            self.redis,
            name=f"process {self.begun}",
            period=PERIOD,
            late=LATE,
            share=1 / MOST_PROCESSES,
            **self.options,
        )
        self.processes.append(Process(one))

    @rule(
        which=st.integers(0, MOST_PROCESSES - 1),
        count=st.integers(1, 10),
        ends=st.sampled_from(["answered", "answered", "answered", "lost", "straggling", "unsent"]),
        before=st.sampled_from([0.0, 0.0, 0.0, 0.5, 0.99, 1.2]),
        takes=st.sampled_from([0.0, 0.02, 0.5, 1.5, LATE]),
    )
    def ask(self, *, which: int, count: int, ends: Ends, before: float, takes: float) -> None:
        """Some requests of one process, each of which waits so long for a place on the wire, and takes so long there."""
        if self.processes:
            self.do(self._ask(self.processes[which % len(self.processes)], count, ends, before, takes))

    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        """A request, wherever it is."""
        tasks = [task for process in self.processes for task in process.requests]
        if tasks:
            self.do(self._cancel([tasks[which % len(tasks)]]))

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 2.5, 5.0, PERIOD, LEASE]) | st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.do(asyncio.sleep(seconds))

    @precondition(lambda self: len(self.processes) > 1 and self.is_well())
    @rule(which=st.integers(0, MOST_PROCESSES - 1), vanishes=st.booleans())
    def end(self, *, which: int, vanishes: bool) -> None:
        """One of them is gone, with or without a word. What it has sent arrives all the same."""
        process = self.processes.pop(which % len(self.processes))
        self.gone = self.loop.time()
        if vanishes:
            process.here = False
            process.worker.vanish()
        self.do(self._cancel(list(process.requests)))
        if not vanishes:
            self.do(process.worker.close())

    def is_well(self) -> bool:
        """Whether all processes have told Redis all that they have."""
        return self.loop.time() >= self.harmed + NOTICED and not any(process.alone for process in self.processes)

    @precondition(lambda self: not self.alone)
    @rule(count=st.integers(1, 9))
    def others_spend(self, count: int) -> None:
        """So many requests that are none of ours."""
        for _ in range(count):
            self.api.spend(self.loop.time())

    # --- what can happen to Redis

    @precondition(lambda self: self.loop.time() >= self.gone + LEASE + LATE)
    @rule(kind=st.sampled_from(["flush", "restart", "scripts"]))
    def lose(self, kind: str) -> None:
        """It has lost everything, or the script only, or both."""
        if kind != "scripts":
            self.harm()
            self.redis.flush()
        if kind != "flush":
            self.redis.flush_scripts()

    @rule()
    def remember(self) -> None:
        """A replica is as far as this."""
        self.earlier = self.redis.snapshot()

    @precondition(lambda self: self.earlier is not None and self.loop.time() >= self.gone + LEASE + LATE)
    @rule(skew=st.sampled_from([0.0, -1.5, 1.5]))
    def fail_over(self, skew: float) -> None:
        """It takes over, with a clock of its own."""
        self.harm()
        self.skew = skew
        self.redis.roll_back(self.earlier)

    @precondition(lambda self: self.redis.is_reachable() and not any(process.alone for process in self.processes))
    @rule(hangs=st.booleans(), seconds=st.sampled_from([0.3, 0.9, 1.5, 2.2, 3.0, 6.0, LEASE + 3, 2 * LEASE]), late=st.booleans())
    def go_away(self, *, hangs: bool, seconds: float, late: bool) -> None:
        """It does not answer anybody for a while. All notice: whoever has slept is not kept from spending when it is back."""
        self.harm()
        self.do(self._go_away(seconds, hangs=hangs, late=late))

    async def _go_away(self, seconds: float, *, hangs: bool, late: bool) -> None:
        if hangs:
            self.redis.stall()
        else:
            self.redis.down = True
        asyncio.get_running_loop().call_later(seconds, self._come_back, late)
        for process in self.processes:
            await self._ask(process, 1, "answered", 0.0, 0.02)

    def _come_back(self, late: bool) -> None:
        self.harm()
        self.redis.down = False
        self.redis.resume(late=late)

    @rule(which=st.integers(0, MOST_PROCESSES - 1), seconds=st.sampled_from([0.3, 0.9]))
    def cut_off(self, which: int, seconds: float) -> None:
        """One process cannot connect for a moment."""
        name = self.processes[which % len(self.processes)].worker.name
        self.harm()
        self.redis.cut.add(name)
        self.loop.call_later(seconds, self._reconnect, name)

    def _reconnect(self, name: str) -> None:
        self.harm()
        self.redis.cut.discard(name)

    @rule(lost=st.integers(0, 2), twice=st.integers(0, 2))
    def disturb(self, lost: int, twice: int) -> None:
        """So many answers are lost, and so many messages come twice."""
        self.harm()
        self.redis.lose_answers, self.redis.repeat = lost, twice

    def harm(self) -> None:
        self.harmed, self.whole = self.loop.time(), False

    # --- what must be so

    @invariant()
    def there_is_no_debt_without_others(self) -> None:
        if self.alone and self.whole:
            debts = [process.worker.bucket._debt for process in self.processes]
            self.check(not any(debt.amount for debt in debts if debt is not None), "debt, and nobody else spends")

    def teardown(self) -> None:
        super().teardown()
        if self.problem is None and self.replay is not None:
            self.replay.all(self.redis.events)
            assert self.replay.contents() == self.redis.kept

    def finish(self) -> None:
        """All is well again: all who wait finish, and then nothing is left of it."""
        self.redis.lose_answers = self.redis.repeat = 0
        self.redis.cut.clear()
        self._come_back(late=True)
        waiting = sum(len(process.requests) for process in self.processes)
        # What was spent by those that are gone or alone, or is held back, and what is under way; then so many rounds of all.
        ends = self.loop.time() + 2 * LEASE + 3 * PERIOD + math.ceil(waiting / self.api.limit) * (PERIOD + LATE + 2)
        while any(process.requests for process in self.processes):
            self.nothing_has_gone_wrong()
            self.check(self.loop.time() < ends, "somebody waits for ever")
            self.do(asyncio.sleep(0.5))
        self.do(asyncio.sleep(2 * LEASE))
        self.check(self.redis.out() == 0, "Redis has tokens out that nobody has")
        for process in self.processes:
            self.do(self._is_as_good_as_new(process.worker))
        for name, messages in self.redis.messages_of.items():
            self.check(messages <= 10 + self.loop.time() / GAP, f"{name} does not stop talking")
        self.check(not self.redis.faults, str(self.redis.faults))

    async def _is_as_good_as_new(self, worker: Worker) -> None:
        self.check(worker.bucket.idle(now()), "a bucket is not as good as new")
        self.check(worker.bucket.quota().free == self.api.limit, "a token is lost")

    async def give_up(self) -> None:
        tasks = [task for process in self.processes for task in process.requests]
        await self._cancel(tasks)
        await asyncio.gather(*tasks, return_exceptions=True)
        for process in self.processes:
            await process.worker.close()

    # --- how it happens

    async def _cancel(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _ask(self, process: Process, count: int, ends: Ends, before: float, takes: float) -> None:
        for _ in range(count):
            task = asyncio.create_task(self._run(process, ends, before, takes))
            process.requests[task] = None
            task.add_done_callback(process.requests.pop)
            self.watch(task)

    async def _run(self, process: Process, ends: Ends, before: float, takes: float) -> None:
        """As `_asker` does it, without a pool of places on the wire."""
        bucket = process.worker.bucket
        try:
            token = await self._admit(process, before)
        except BucketsUnavailableError:
            self.check(now() < self.harmed + NOTICED or not self.redis.is_reachable(), "no token, and Redis is well")
            return
        started, mark = now(), bucket.start()
        told: list[tuple[bool, int, float]] = []
        arrives = {"answered": takes / 2, "lost": takes}.get(ends)
        if arrives:
            asyncio.get_running_loop().call_later(arrives, self._arrive, told)
        elif arrives is not None:
            self._arrive(told)
        try:
            await asyncio.sleep(LATE if ends == "lost" else takes)
        except asyncio.CancelledError:
            if process.here:
                bucket.abandoned(token)
            raise
        finally:
            if ends == "straggling":
                asyncio.get_running_loop().call_later(LATE, self._arrive, told)
        if ends == "unsent":
            bucket.unsent(token)
        elif ends == "answered":
            refused, used, reset = told[0]
            bucket.heard(Told(None, started, now(), used, reset), mark)
            if refused:
                bucket.refused(None, reset)
            else:
                bucket.succeeded()
            bucket.ended(token)
        else:
            bucket.abandoned(token)

    async def _admit(self, process: Process, before: float) -> int:
        bucket, again = process.worker.bucket, False
        while True:
            token = await bucket.acquire(again=again)
            try:
                await asyncio.sleep(before)
            except asyncio.CancelledError:
                if process.here:
                    bucket.unused(token)
                raise
            if bucket.may_start(token, now()):
                return token
            bucket.unused(token)
            again, before = True, 0.0

    def _arrive(self, told: list[tuple[bool, int, float]]) -> None:
        """One of our requests has come to the API, and what must be so of its window is."""
        when = now()
        told.append(self.api.arrive(when))
        spent = within(self.api.others, when, -EPSILON)
        ours = within(self.api.arrived, when)
        self.check(spent > 0 or ours <= self.api.limit, "more than the limit arrived within a period")
        if told[0][0]:
            self.check(within(self.api.refused, when) <= spent, "more were refused than others have spent")


TestProcesses = pytest.mark.timeout(600)(Processes.TestCase)  # what fails takes minutes to be made small
TestProcesses.settings = settings(MANY, max_examples=examples(15))


class GivesAtOnce(Processes):
    """As if all processes had told all they have in the moment of a loss."""

    instead: ClassVar = {"crustcredits.redis._PAUSE": 0.0}


class ForgetsWhatIsOut(Processes):
    """As if a loss were none."""

    instead: ClassVar = {"crustcredits.redis._Link._register": lambda self, now: None}


class LeasesForAPeriod(Processes):
    """As if a request arrived when its token is granted."""

    instead: ClassVar = {"crustcredits._shared.Terms.lease": PERIOD}


class HasItsShareAtOnce(Processes):
    """As if the others had not spent theirs yet."""

    instead: ClassVar = {"crustcredits._shared.SharedTokens._share": SharedTokens._whole_share}


@pytest.mark.thorough
@pytest.mark.timeout(180)  # up to 500 examples, slow where coverage is measured
@pytest.mark.parametrize("broken", [GivesAtOnce, ForgetsWhatIsOut, LeasesForAPeriod, HasItsShareAtOnce])
def test_a_broken_rule_is_found_out(broken: type[Processes]) -> None:
    """The machine is worth something: with a rule broken it fails."""
    found = settings(MANY, max_examples=500, database=None, derandomize=True, phases=[Phase.generate])
    with pytest.raises(AssertionError, match=r"more than the limit arrived|more were refused"):
        run_state_machine_as_test(broken, settings=found)


def test_a_real_server_that_answers_otherwise_is_found_out(replay: Replay) -> None:
    """The comparison is worth something too."""
    redis = opened_and_recorded()
    keys, said = opening()
    redis.execute(keys, said, sha=_SHA)
    replay.all(redis.events)
    first, second = redis.events
    assert isinstance(second, Said)
    for wrong in (attrs.evolve(second, answer=[[1, 2, 0, 0]]), attrs.evolve(second, after={keys[0]: 1000})):
        with pytest.raises(AssertionError):
            replay.all([first, wrong])
