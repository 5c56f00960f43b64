"""The admission queue, one rule at a time and in random worlds, in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import zlib
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import TokenBucket
from tests import searches
from tests.ratelimit.calls import (
    FAILED,
    INCOMPLETE,
    LOST,
    OK,
    UNSENT,
    Pool,
    call,
    refused,
    start_call,
    started,
    terms,
)
from tests.ratelimit.worlds import (
    Client,
    Headers,
    Job,
    Key,
    Server,
    Sliding,
    by_account,
    by_key,
    full,
    keys,
    no_headers,
    only_reset,
    spans,
    together,
)
from tests.ratelimit.worlds import scheduler as scheduler_of
from tests.virtual import now, run


def popped(
    queue: FairQueue, draw: random.Random | None = None, *, draw_singles: bool = False
) -> Call:
    """The call that is taken out of a queue in which calls wait."""
    return queue.pop(draw, draw_singles=draw_singles)


# --- one rule at a time


def test_flows_take_turns_and_accounts_within_them() -> None:
    """Of an account the first call comes first; background flows come last."""
    queue, one, two, back = FairQueue(), Flow(), Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
    order = [
        ("r1", back, "r1"),
        ("a1", one, "a"),
        ("a2", one, "a"),
        ("b1", one, "b"),
        ("s1", two, "s1"),
        ("s2", two, "s2"),
    ]
    for name, flow, account in order:
        queue.push(call(name, flow, account))
    assert len(queue) == 6
    assert [popped(queue).key for _ in order] == ["a1", "s1", "b1", "s2", "a2", "r1"]
    assert not len(queue)


def test_a_draw_takes_calls_without_a_request_and_single_calls_keep_their_turns() -> None:
    """Each call is drawn once; calls that have left are passed over."""
    queue, flow, singles, draw = FairQueue(), Flow(), Flow(Kind.SINGLE), random.Random(1)
    calls = [call(str(number), flow, "one") for number in range(20)]
    calls[0].was_sent = True
    for each in calls:
        queue.push(each)
    queue.remove(calls[5])
    drawn = [popped(queue, draw).key for _ in range(18)]
    assert sorted(map(int, map(str, drawn))) == [number for number in range(1, 20) if number != 5]
    assert drawn != sorted(drawn, key=lambda name: int(str(name)))
    assert popped(queue, draw).key == "0"
    for name in ("x", "y"):
        queue.push(call(name, singles))
    assert popped(queue, draw).key == "x"
    assert popped(queue, draw, draw_singles=True).key == "y"


def test_a_flow_whose_calls_have_all_left_is_passed_over() -> None:
    """Nothing of the flow remains."""
    queue, gone, flow = FairQueue(), Flow(), Flow()
    left = call("left", gone)
    queue.push(left)
    queue.push(call("there", flow))
    queue.remove(left)
    assert popped(queue).key == "there"
    assert not len(queue)


def test_accounts_of_a_pool_take_turns_without_an_object_for_each_key() -> None:
    """They take turns with each other, with calls that have begun, and with other flows."""
    queue, pool, other = FairQueue(), Pool(["A", None, "A", None, "A", "B", "B"]), Flow()
    queue.push(call("first", pool, "C"))
    queue.push_pool(pool)
    queue.push(call("retry", pool, "p9"))
    queue.push(call("x", other))
    assert (queue.length, queue.lengths()) == (10, {pool: 9, other: 1})
    assert (queue.of_account("A", background=False), queue.of_account("C", background=False)) == (
        3,
        1,
    )
    order = [popped(queue).key for _ in range(10)]
    assert order == ["first", "x", "p0", "p1", "p3", "p5", "retry", "p2", "p6", "p4"]
    assert (queue.length, pool.waiting) == (0, 0)


def test_numbers_of_a_pool_are_drawn_taken_out_and_moved_to_another_queue() -> None:
    """Each is taken once, in any order, and the remaining numbers keep their turns."""
    queue, other, pool, draw = (
        FairQueue(),
        FairQueue(),
        Pool([None, "A", None, "A", None, "A", None, None]),
        random.Random(1),
    )
    queue.push_pool(pool)
    queue.push(call("fresh", pool))
    found = {popped(queue, draw).key for _ in range(3)}
    assert len(found) == 3
    left = {
        next(number for number in numbers if pool.waits(number))
        for numbers in ((1, 3, 5), (0, 2, 4, 6, 7))
    }
    for number in left:
        pool.take_out(number)
    other.push(call("there", pool, "Z"))
    other.push_pool(pool)
    assert queue.length + other.length == 9 - 3 - 2 + 1
    assert popped(other).key == "there"
    while other.length:
        found.add(popped(other).key)
    while queue.length:
        found.add(popped(queue).key)
    assert found == {"fresh", *(f"p{number}" for number in range(8) if number not in left)}
    empty = Pool([])
    other.push_pool(empty)
    assert other.length == 0
    other.push(call("after", Flow()))
    assert popped(other).key == "after"
    other.remove_pool(pool)  # nothing of it is left there
    one = Pool(["A", "A"])
    queue.push_pool(one)
    one.take_out(0)
    assert popped(queue).key == "p1"
    two = Pool(["A", None])
    queue.push_pool(two)
    two.take_out(0)
    assert popped(queue).key == "p1"


def test_a_pool_that_the_common_bucket_stops_waits_there_as_a_whole() -> None:
    """Its next call begins when a token returns.

    A pool that is given up wakes others, and leaves nothing.
    """
    scheduler, pool = (
        scheduler_of(SchedulerTerms(requests=2, scope="client"), pace=None),
        Pool([None] * 50),
    )
    scheduler.put_pool(pool)
    first = started(scheduler, 0.0)
    assert [request.call.key for request in first] == ["p0", "p1"]
    assert (pool.waiting, scheduler.quota(None, 0.0).waiting) == (47, 48)
    for request in first:
        scheduler.ended(request, OK, 1.0)
    assert [request.call.key for request in started(scheduler, 61.4)] == ["p2", "p3"]
    other = Pool([None] * 3)
    scheduler.put_pool(other)
    assert not started(scheduler, 61.5)
    scheduler.remove_pool(pool)
    scheduler.remove_pool(pool)
    assert scheduler.quota(None, 61.5).waiting == 3
    assert scheduler.hopeless(["a", "b"], 62.0, 61.5) == []


def test_an_answer_wakes_no_call_during_its_accounts_cooldown() -> None:
    """The token that would return belongs to the same account."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=2, scope="account"), pace=None), Flow()
    for name in ("a", "b", "c"):
        scheduler.put(call(name, flow, "A"))
    first, second = started(scheduler, 0.0)
    scheduler.ended(first, AttemptResult(status=429, wait=30.0), 1.0)
    scheduler.ended(second, AttemptResult(status=None, unsent=True), 1.0)
    assert not started(scheduler, 2.0)
    assert [request.call.key for request in started(scheduler, 31.0)] == ["c"]


def test_waiting_calls_of_a_pool_are_given_up_with_the_bucket() -> None:
    """When the count that processes share is out of reach, each call of the pool is handed back."""
    scheduler, pool = (
        scheduler_of(SchedulerTerms(requests=1, scope="client"), pace=None),
        Pool([None] * 5),
    )
    scheduler.put_pool(pool)
    assert len(started(scheduler, 0.0)) == 1
    assert sorted(str(each.key) for each in scheduler.drain(None, 0.0)) == [
        "p1",
        "p2",
        "p3",
        "p4",
    ]
    assert scheduler.quota(None, 0.0).waiting == 0


def test_a_token_returns_a_period_after_its_request_has_ended() -> None:
    """Not after its start, and at once if the server does not count it."""
    bucket = TokenBucket(2)
    bucket.take(0.0)
    mark = bucket.take(1.0)
    assert (bucket.room(5.0, 0), bucket.is_whole) == (0, False)
    bucket.return_at(70.0)
    assert (bucket.room(69.9, 0), bucket.room_at(69.9, 0), bucket.room_at(69.9, 1)) == (
        0,
        70.0,
        None,
    )
    assert bucket.own(mark) == 2
    bucket.put_back()
    assert bucket.own(mark) == 1
    assert bucket.room(70.0, 0) == 2
    assert bucket.is_whole
    bucket.limit = 0
    assert bucket.room(71.0, 0) == 0


@pytest.mark.virtual
async def test_the_pace_is_cut_and_comes_back() -> None:
    """A cut halves it, and it recovers by 2 % of the configured rate per second.

    Without a pace the first cut sets one.
    """
    pace = Pace(100.0, 5.0)
    pace.cut(0.0)
    assert pace.current(0.0) == 50
    assert pace.wait(0.0) is None
    pace.take(0.0)
    assert pace.wait(0.0) == pytest.approx(0.02)
    assert pace.current(10.0) == pytest.approx(70)
    for _ in range(9):
        pace.cut(10.0)
    assert pace.current(10.0) == 5
    assert pace.current(100.0) == 100
    assert pace.wait(100.0) is None
    free = Pace(None, 5.0)
    assert free.wait(0.0) is None
    free.take(0.0)
    assert free.current(0.0) is None
    free.cut(0.0)
    assert free.current(0.0) == 50


@pytest.mark.virtual
async def test_a_call_that_is_given_up_makes_room_for_the_next() -> None:
    """It may wait for its turn or for its account, or have been let out by a common token."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=1, scope="client"), pace=None), Flow()
    calls = [call(name, flow) for name in "abcd"]
    for each in calls:
        scheduler.put(each)
    (first,) = started(scheduler, 0.0)
    scheduler.remove(calls[1], 1.0)
    scheduler.remove(calls[1], 1.0)
    scheduler.ended(first, OK, 1.0)
    assert scheduler.grant(1.0) == pytest.approx(61.3)
    assert calls[2].let_out_of is None
    (second,) = started(scheduler, 61.4)
    assert second.call is calls[2]
    # The next token lets out the last call. Before it starts it is given up, and the token is free
    # for another.
    scheduler.ended(second, AttemptResult(status=None, unsent=True), 62.0)
    assert calls[3].let_out_of is scheduler.permits.common
    scheduler.remove(calls[3], 62.0)
    another = call("e", flow)
    scheduler.put(another)
    assert [request.call for request in started(scheduler, 62.0)] == [another]


@pytest.mark.virtual
async def test_a_common_token_goes_to_the_next_call_during_an_accounts_cooldown() -> None:
    """The call that it has let out waits for its account, and blocks no call behind it."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=2, scope="client"), pace=None), Flow()
    for name, account in (("a1", "A"), ("b1", "B"), ("a2", "A")):
        scheduler.put(call(name, flow, account))
    first, second = started(scheduler, 0.0)
    assert (first.call.key, second.call.key) == ("a1", "b1")
    scheduler.put(call("c1", flow, "C"))
    assert started(scheduler, 0.5) == []
    scheduler.ended(second, AttemptResult(status=500), 1.0)
    scheduler.ended(first, AttemptResult(status=429, wait=30.0), 1.0)
    assert scheduler.grant(1.0) == 1.0
    (third,) = started(scheduler, 1.0)
    assert third.call.key == "c1"
    scheduler.ended(third, OK, 2.0)
    assert scheduler.grant(2.0) == 31.0
    assert started(scheduler, 31.0) == []
    (fourth,) = started(scheduler, 61.3)
    assert fourth.call.key == "a2"


@pytest.mark.virtual
async def test_requests_that_hang_hold_up_no_others_up_to_a_bound() -> None:
    """Eight times as many requests may hang as there are slots."""
    scheduler, flow = (
        scheduler_of(SchedulerTerms(requests=1000, scope="account"), pace=None, slots=2),
        Flow(),
    )
    for number in range(30):
        scheduler.put(call(str(number), flow))
    hanging: list[Attempt] = []
    for turn in range(20):
        hanging += started(scheduler, turn / 2)
    assert len(hanging) == 2 + 2 * 8
    for request in hanging:
        scheduler.ended(request, AttemptResult(status=None), 10.0)
    assert len(started(scheduler, 10.0)) == 2


@pytest.mark.virtual
async def test_a_call_that_is_barred_is_handed_out_and_its_token_goes_to_the_next() -> None:
    """The caller of `grant` knows why, and may put the call again."""
    barred: set[str] = set()
    flow = Flow()
    scheduler = scheduler_of(
        SchedulerTerms(requests=1, scope="client"),
        pace=None,
        is_barred=lambda call, at: call.key in barred,
    )
    for name in "abcd":
        scheduler.put(call(name, flow))
    (first,) = started(scheduler, 0.0)
    scheduler.ended(first, OK, 1.0)
    barred |= {"b", "c"}
    handed_out = scheduler.grant(61.4)
    assert isinstance(handed_out, Call)
    assert handed_out.key == "b"
    assert isinstance(scheduler.grant(61.4), Call)
    (second,) = started(scheduler, 61.4)
    assert second.call.key == "d"
    barred.clear()
    scheduler.ended(second, AttemptResult(status=None, unsent=True), 62.0)
    scheduler.put(handed_out)
    assert [request.call for request in started(scheduler, 62.0)] == [handed_out]


@pytest.mark.virtual
async def test_a_call_that_gets_a_waiter_of_a_better_kind_moves_to_that_kind() -> None:
    """In any queue; a call that waits nowhere only changes its flow."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=1, scope="client"), pace=None), Flow()
    refreshes, singles = Flow(Kind.BACKGROUND), Flow(Kind.SINGLE)
    refresh, other = call("r", refreshes), call("o", flow)
    scheduler.put(call("first", flow))
    (first,) = started(scheduler, 0.0)
    scheduler.put(other)
    scheduler.put(refresh)
    assert started(scheduler, 0.5) == []
    assert scheduler.quota(None, 0.5).refreshing == 1
    scheduler.move(refresh, singles, 0.5)
    assert started(scheduler, 0.5) == []
    assert scheduler.quota(None, 0.5).refreshing == 0
    scheduler.move(first.call, singles, 0.5)
    scheduler.ended(first, OK, 1.0)
    assert [request.call for request in started(scheduler, 61.4)] == [refresh]


@pytest.mark.virtual
async def test_calls_that_wait_for_an_unreachable_bucket_are_given_up() -> None:
    """All calls that wait there, and no others."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=1, scope="auto"), pace=None), Flow()
    for name, account in (("a1", "A"), ("a2", "A"), ("b1", "B")):
        scheduler.put(call(name, flow, account))
    assert len(started(scheduler, 0.0)) == 1
    assert [each.key for each in scheduler.drain("A", 0.0)] == ["a2"]
    assert [each.key for each in scheduler.drain(None, 0.0)] == ["b1"]
    assert scheduler.drain("unknown", 0.0) == []
    assert scheduler.quota(None, 0.0).waiting == 0


@pytest.mark.virtual
async def test_a_quota_of_an_account_has_its_own_cooldown() -> None:
    """It counts the account's waiting calls; an account without calls has all its tokens."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=5, scope="account"), pace=None), Flow()
    first_call, second_call = call("a1", flow, "A"), call("a2", flow, "A")
    scheduler.put(first_call)
    (first,) = started(scheduler, 0.0)
    scheduler.ended(first, AttemptResult(status=429, wait=30.0), 1.0)
    scheduler.put(second_call)
    quota = scheduler.quota("A", 1.0)
    assert (quota.free, quota.waiting, quota.cooldown) == (5, 1, 30.0)
    assert (scheduler.quota("B", 1.0).free, scheduler.quota("B", 1.0).cooldown) == (5, None)


def test_a_queue_knows_whether_it_has_a_foreground_call() -> None:
    """A flow without calls does not count as foreground."""
    queue, flow = FairQueue(), Flow()
    left = call("left", flow)
    queue.push(left)
    seen = [queue.has_foreground]
    queue.remove(left)
    queue.push(call("r", Flow(Kind.BACKGROUND)))
    seen.append(queue.has_foreground)
    assert seen == [True, False]
    assert popped(queue).key == "r"


@pytest.mark.virtual
async def test_the_reserve_is_for_single_calls() -> None:
    """With a reserve a single call beside a large check hardly waits.

    Without one it waits for the next token.
    """
    for reserve, median, worst in ((0.1, 0.1, 1.0), (0.0, 40.0, 62.0)):
        client = Client(Server(lambda scope: Sliding(300)), SchedulerTerms(reserve=reserve))
        client.put(keys(5000), Flow())
        singles: list[Job] = []
        for number in range(40):
            await asyncio.sleep(7)
            singles += client.put(keys(1, f"me{number}-"), client.singles)
        await asyncio.sleep(100)
        took = [job.took for job in singles]
        assert statistics.median(took) <= median
        assert max(took) <= worst


@pytest.mark.virtual
async def test_the_reserve_of_an_account_of_several_keys_is_for_single_calls() -> None:
    """The reserve holds within a declared account of several keys too."""
    client = Client(
        Server(lambda scope: Sliding(300), by_account), SchedulerTerms(reserve=0.1, scope="account")
    )
    client.put(keys(2000, "d", lambda number: "D"), Flow())
    await asyncio.sleep(20)
    (single,) = client.put([("d7", "D")], client.singles)
    await asyncio.sleep(1)
    assert single.took < 0.1


@pytest.mark.virtual
async def test_background_calls_give_way_to_a_check() -> None:
    """A check that comes after refreshes is not delayed by them."""
    client = Client(Server(lambda scope: Sliding(300), by_key), SchedulerTerms())
    client.put(keys(2000, "r"), Flow(Kind.BACKGROUND))
    await asyncio.sleep(1)
    jobs = await client.check(keys(200), seconds=30)
    assert spans(jobs)[1] < 2.3


@pytest.mark.virtual
async def test_an_account_is_forgotten_after_a_last_answer_that_was_a_refusal() -> None:
    """When its cooldown is over."""
    scheduler, flow = scheduler_of(SchedulerTerms(scope="account"), pace=None), Flow()
    for number in range(20):
        scheduler.put(call(str(number), flow))
    at = 0.0
    while requests := started(scheduler, at):
        for request in requests:
            scheduler.ended(request, AttemptResult(status=429, wait=100.0), at + 0.1)
        at += 0.5
    for at, name in ((300.0, "later"), (500.0, "last")):
        scheduler.put(call(name, flow))
        for request in started(scheduler, at):
            scheduler.ended(request, OK, at + 0.1)
    assert len(scheduler.permits.accounts) == 1


@pytest.mark.virtual
async def test_single_calls_that_come_faster_than_the_limit_let_a_check_end() -> None:
    """Tokens go to both in turn."""
    client = Client(Server(lambda scope: Sliding(60)), SchedulerTerms(requests=60))
    client.put(keys(70, "first"), client.singles)
    check = client.put(keys(20, "check"), Flow())
    for number in range(300):
        client.put(keys(1, f"single{number}-"), client.singles)
        await asyncio.sleep(0.9)
    assert all(job.done is not None for job in check)


def test_calls_with_an_earlier_request_get_their_turn_while_new_ones_are_drawn() -> None:
    """Of four draws one goes by turn, where single calls are drawn too."""
    queue, singles, draw = FairQueue(), Flow(Kind.SINGLE), random.Random(1)
    asked = call("asked", singles)
    asked.was_sent = True
    queue.push(asked)
    for number in range(8):
        queue.push(call(str(number), singles))
    assert "asked" in [popped(queue, draw, draw_singles=True).key for _ in range(4)]


@pytest.mark.virtual
async def test_idle_accounts_are_forgotten() -> None:
    """When their tokens are back and no cooldown is on."""
    client = Client(Server(lambda scope: Sliding(300), by_key), SchedulerTerms())
    await client.check(keys(200))
    assert len(client.scheduler.permits.accounts) == 200
    await asyncio.sleep(65)
    await client.check(keys(1, "other"))
    assert len(client.scheduler.permits.accounts) == 1


@pytest.mark.virtual
async def test_an_answer_that_contradicts_what_was_counted_does_not_lower_the_limit() -> None:
    """One key in fifty states another limit."""

    numbers = itertools.count(1)

    def headers(limit: int, remaining: int, reset: float, *, served: bool) -> Headers:
        number = next(numbers)
        return (
            {"limit": 30, "remaining": 29, "wait": 1}
            if number % 50 == 0
            else full(limit, remaining, reset, served=served)
        )

    jobs = await Client(
        Server(lambda scope: Sliding(300), headers=headers), SchedulerTerms()
    ).check(keys(600))
    assert spans(jobs)[1] < 1.1 * 63.3


# --- random worlds


def world(seed: int) -> dict[str, Any]:
    """Run a random pool, server and failures, without other clients. Returns the results."""
    draw = random.Random(seed)
    limit = draw.choice([1, 2, 5, 11, 12, 13, 20, 60, 100])
    count = draw.randrange(1, 5 * limit + 5)
    kind = draw.choice(["together", "apart", "declared"])
    accounts = draw.choice([1, 3, 10, 50])
    pool = keys(
        count, "k", (lambda number: f"a{number % accounts}") if kind == "declared" else None
    )
    if draw.random() < 0.4:  # keys come again, some of them often
        pool = [pool[int(count * draw.random() ** draw.choice([1, 3]))] for _ in range(count)]
    scope = {"together": together, "apart": by_key, "declared": by_account}[kind]
    lag = draw.choice([0.0, 0.0, 0.5, 1.4]) if kind == "together" else 0.0
    trouble = draw.choice(["", "", "noise", "refusals", "both"])

    def dice(key: Key, at: float, digits: int, sides: int) -> bool:
        return zlib.crc32(f"{key[0]} {round(at, digits)}".encode()) % sides == 0

    def special(key: Key, at: float) -> tuple[int | None, Headers] | None:
        if trouble in {"noise", "both"}:
            for digits, sides, status in ((3, 10, 500), (2, 17, None), (1, 23, 503)):
                if dice(key, at, digits, sides):
                    return status, {}
        if trouble in {"refusals", "both"} and dice(key, at, 2, 9):
            return 429, draw.choice([{"wait": 1}, {}, {"limit": limit, "remaining": 0, "wait": 2}])
        return None

    pace = draw.choice([None, 5.0, 100.0, 1000.0])
    terms = SchedulerTerms(
        requests=limit,
        reserve=draw.choice([0.0, 0.0, 0.1, 0.3]),
        scope=draw.choice(["auto", "client"]) if kind != "apart" else "auto",
    )
    seconds = draw.choice([(0.0, 0.0), (0.0, 0.02), (0.05, 0.3), (0.0, 3.0), (0.0, 9.0)])
    headers = draw.choice([full, full, only_reset, no_headers])
    flows = draw.choice([1, 3])
    kinds = [draw.choice([Flow(), Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)]) for _ in range(flows)]
    starts = sorted(draw.uniform(0, 90) for _ in range(flows))

    async def play() -> dict[str, Any]:
        server = Server(
            lambda scope: Sliding(limit, lag=lag),
            scope,
            seconds,
            headers,
            special if trouble else None,
            seed,
        )
        client = Client(server, terms, seed, pace)
        jobs: list[Job] = []
        for part, (flow, start) in enumerate(zip(kinds, starts, strict=True)):
            await asyncio.sleep(start - now())
            jobs += client.put(pool[part::flows], flow)
        async with asyncio.timeout(30_000):
            await client.idle.wait()
        counters = server.counters.values()
        return {
            "open": sum(job.done is None for job in jobs),
            "worst": max(
                (counter.worst for counter in counters if isinstance(counter, Sliding)), default=0
            )
            - limit,
            "refused": sum(counter.refused for counter in counters if isinstance(counter, Sliding)),
            "on_wire": client.on_wire,
            "most": client.most_on_wire,
        }

    return run(play())


@given(st.integers(0, 10**6))
@settings(max_examples=searches.examples(150))
def test_no_window_exceeds_the_limit_and_every_call_ends(seed: int) -> None:
    """With any delays, failures, lags and flows.

    While no other client spends, the window itself refuses nothing.
    """
    came = world(seed)
    assert came["open"] == came["on_wire"] == 0
    assert came["refused"] == 0
    assert came["worst"] <= 0
    assert came["most"] <= 32 * 9


@pytest.mark.parametrize(
    ("adopts", "limits"), [("lower", [30, 300]), ("any", [30, 1_200]), ("never", [300, 300])]
)
def test_adopt_server_limit_decides_which_stated_limit_is_followed(
    adopts: Any, limits: list[int]
) -> None:
    """A lower limit by default; a higher one, or none, if configured."""
    found = []
    for stated in (30, 1_200):
        scheduler, flow = (
            scheduler_of(SchedulerTerms(scope="account", adopts=adopts), pace=None),
            Flow(),
        )
        scheduler.put(call("a", flow))
        (request,) = started(scheduler, 0.0)
        scheduler.ended(request, AttemptResult(status=200, limit=stated, remaining=stated - 1), 0.1)
        found.append(scheduler.quota("a", 0.1).limit)
    assert found == limits


def starts_by_period(scheduler: Scheduler, periods: int) -> list[list[Attempt]]:
    """The requests that start in each period, if each is answered at once."""
    starts: list[list[Attempt]] = []
    for period in range(periods):
        starts.append(started(scheduler, 60.4 * period))
        for request in starts[-1]:
            scheduler.ended(request, OK, 60.4 * period + 0.01)
    return starts


@pytest.mark.virtual
@pytest.mark.parametrize(
    ("requests", "calls", "expected"),
    [
        (2, ["mA", "mA", "sA", "sA", "sA", "sA", "sA"], [2, 2, 2, 1]),
        (3, ["sA", "mA", "sA", "sA", "sA", "mA", "mB", "sA"], [3, 3, 2, 0]),
    ],
    ids=["account", "common"],
)
async def test_a_token_that_a_check_may_not_take_goes_to_a_single_call(
    requests: int, calls: list[str], expected: list[int]
) -> None:
    """A call of the check was let out, and then waits again for a token of either bucket."""
    scheduler, flows = (
        scheduler_of(SchedulerTerms(requests=requests, reserve=0.3), pace=None),
        {"m": Flow(), "s": Flow(Kind.SINGLE)},
    )
    for number, of in enumerate(calls):
        scheduler.put(call(str(number), flows[of[0]], of[1]))
    assert [len(starts) for starts in starts_by_period(scheduler, 4)] == expected


@pytest.mark.virtual
async def test_a_token_that_let_out_a_call_is_taken_by_no_other() -> None:
    """Calls of one account pass it only once, although their token returns in the same moment."""
    scheduler, flow, singles = (
        scheduler_of(SchedulerTerms(requests=1), pace=None),
        Flow(),
        Flow(Kind.SINGLE),
    )
    for number in range(8):
        scheduler.put(call(str(number), singles, "A"))
    scheduler.put(call("check", flow, "B"))
    starts = starts_by_period(scheduler, 9)
    assert [len(requests) for requests in starts] == [1] * 9
    assert "check" in [request.call.key for requests in starts[:3] for request in requests]


@pytest.mark.virtual
async def test_an_answer_of_any_account_raises_the_limit_again() -> None:
    """If all are counted together, even an answer of an account without an earlier lower limit."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=12, scope="client"), pace=None), Flow()
    limits: list[int] = []
    for number, said in enumerate((6, 12)):
        scheduler.put(call(str(number), flow))
        (request,) = started(scheduler, number)
        scheduler.ended(
            request,
            AttemptResult(status=200, limit=said, remaining=said - 1 - number),
            number + 0.01,
        )
        limits.append(scheduler.quota(None, number + 0.01).limit)
    assert limits == [6, 12]


# --- when to ask again


def cooled_down(scheduler: Scheduler, at: float, wait: float) -> None:
    """Let two accounts be refused, which starts a cooldown with the scope `client`."""
    for name in ("refused1", "refused2"):
        request = start_call(scheduler, call(name, Flow()), at)
        scheduler.ended(request, refused(wait), at)


def test_an_empty_queue_needs_no_wake_up() -> None:
    """Neither does one whose only call is on the wire."""
    scheduler = scheduler_of(terms(), pace=None)
    assert scheduler.grant(0.0) is None
    start_call(scheduler, call("a", Flow()), 0.0)
    assert scheduler.grant(0.0) is None


def test_during_a_cooldown_of_the_endpoint_no_call_starts() -> None:
    """It is asked again at its end, or earlier for a token that returns."""
    scheduler, flow = scheduler_of(terms(scope="client", requests=2), pace=None), Flow()
    cooled_down(scheduler, 1.0, 20.0)
    scheduler.put(call("a", flow))
    assert scheduler.holds_back
    assert scheduler.grant(2.0) == 21.0
    assert scheduler.grant(20.5) == 21.0
    (probe,) = started(scheduler, 21.0)
    assert (probe.in_trial, probe.trial) == (True, scheduler.cooldown.trial)
    assert not scheduler.holds_back


def test_waiting_calls_are_let_out_during_a_cooldown_of_the_endpoint() -> None:
    """It is asked again at the moment at which one of them may be ready."""
    scheduler, flow = scheduler_of(terms(scope="client"), pace=None), Flow()
    scheduler.ended(start_call(scheduler, call("a1", flow, "A"), 0.0), refused(61.0), 0.0)
    scheduler.put(waits := call("a2", flow, "A"))
    assert scheduler.grant(1.0) == 61.0
    scheduler.ended(start_call(scheduler, call("b", flow), 50.0), refused(30.0), 50.0)
    assert scheduler.grant(51.0) == 61.0
    scheduler.put(call("ready", flow))
    assert scheduler.grant(51.0) == 61.0
    assert waits.queue is not scheduler.ready
    assert scheduler.grant(61.0) == 80.0
    assert waits.queue is scheduler.ready


def test_a_trial_has_as_many_probes_on_the_wire_as_it_is_wide() -> None:
    """The next one starts when one has ended, or hangs."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow()
    scheduler.ended(start_call(scheduler, call("a", flow), 0.0), refused(), 0.0)
    for name in "bcdefg":
        scheduler.put(call(name, flow))
    (first,) = started(scheduler, 1.0)
    assert scheduler.grant(1.0) == 1.4
    assert scheduler.grant(1.25) == 1.4
    scheduler.ended(first, OK, 1.25)
    assert scheduler.cooldown.trial is not None
    assert len(started(scheduler, 1.25)) == 2  # twice as wide
    assert scheduler.cooldown.trial.on_wire == 2
    assert len(started(scheduler, 1.75)) == 2  # the first two hang
    assert scheduler.cooldown.trial.on_wire == 2


def test_a_probe_that_hung_counts_no_more_when_it_ends() -> None:
    """Its place in the trial was given to another."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow()
    scheduler.ended(start_call(scheduler, call("a", flow), 0.0), refused(), 0.0)
    hangs = start_call(scheduler, call("hangs", flow), 1.0)
    other = start_call(scheduler, call("other", flow), 1.5)
    assert (hangs.in_trial, other.in_trial) == (False, True)
    scheduler.ended(hangs, FAILED, 2.0)
    assert scheduler.cooldown.trial is not None
    assert scheduler.cooldown.trial.on_wire == 1
    scheduler.ended(other, FAILED, 2.0)
    assert scheduler.cooldown.trial.on_wire == 0


def test_without_a_free_slot_no_call_starts() -> None:
    """It is asked again when a request begins to hang; never if all hang that may."""
    scheduler, flow = scheduler_of(terms(), pace=None, slots=1), Flow()
    first = start_call(scheduler, call("first", flow), 1.0)
    scheduler.put(call("second", flow))
    assert scheduler.grant(1.25) == 1.4
    scheduler.ended(first, OK, 1.25)
    assert len(started(scheduler, 1.25)) == 1
    for number in range(20):
        scheduler.put(call(str(number), flow))
    at = 1.25
    while isinstance(moment := scheduler.grant(at), Attempt | float):
        at = moment if isinstance(moment, float) else at
    assert moment is None
    assert scheduler.quota(None, at).in_flight == 9
    assert scheduler.holds_back


def test_a_request_hangs_only_when_its_slot_is_needed() -> None:
    """Until then an answer may show that the API is slow for all."""
    scheduler, flow = scheduler_of(terms(), pace=None, slots=3), Flow()
    slow = start_call(scheduler, call("slow", flow), 0.0)
    start_call(scheduler, call("as slow", flow), 10.0)
    start_call(scheduler, call("third", flow), 11.0)
    scheduler.ended(slow, OK, 11.0)
    start_call(scheduler, call("fourth", flow), 11.0)
    scheduler.put(call("fifth", flow))
    assert scheduler.grant(11.0) == 10.0 + 4 * 11.0


@pytest.mark.virtual
async def test_the_pace_names_the_moment_of_the_next_start() -> None:
    """Calls start in groups."""
    scheduler, flow = scheduler_of(terms(), pace=10.0), Flow()
    for number in range(20):
        scheduler.put(call(str(number), flow))
    assert len(started(scheduler, 0.0)) == 5
    assert scheduler.grant(0.0) == pytest.approx(0.3)


@pytest.mark.parametrize(("slots", "most"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_refreshes_take_a_quarter_of_the_slots(slots: int, most: int) -> None:
    """The next one starts when one has ended. Calls with a waiter take the others."""
    scheduler = scheduler_of(terms(), pace=None, slots=slots)
    refreshes, on_wire = Flow(Kind.BACKGROUND), list[Attempt]()
    for number in range(12):
        scheduler.put(call(str(number), refreshes))
        on_wire += started(scheduler, float(number) * 0.3)
    assert len(on_wire) == most
    assert scheduler.grant(3.5) is None
    assert not scheduler.holds_back
    for each in on_wire[1:]:
        scheduler.ended(each, OK, 3.5)


def test_one_look_for_a_start_passes_over_a_thousand_calls() -> None:
    """Then other tasks run, and it goes on at once."""
    scheduler, flow = scheduler_of(terms(requests=1, scope="account"), pace=None), Flow()
    request = start_call(scheduler, call("first", flow, "A"), 0.0)
    for number in range(1999):
        scheduler.put(call(str(number), flow, "A"))
    assert scheduler.grant(1.0) == 1.0
    assert scheduler.ready.length == 999
    assert scheduler.grant(1.0) is None
    assert scheduler.ready.length == 0
    scheduler.ended(request, OK, 1.0)
    assert scheduler.grant(1.0) == 61.5


# --- which call starts


def test_an_attempt_tells_with_which_permit_it_was_sent() -> None:
    """And whether it is the first of its call."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow(Kind.SINGLE)
    each = call("a", flow, "A")
    first = start_call(scheduler, each, 1.5)
    assert (first.kind, first.started, first.first, first.trial, first.in_trial) == (
        Kind.SINGLE,
        1.5,
        True,
        None,
        False,
    )
    assert first.account is scheduler.permits.accounts.find("A")
    assert first.account.bucket.own(first.own) == 1
    assert first.common is not None
    scheduler.ended(first, FAILED, 2.0)
    assert each.was_sent
    assert not start_call(scheduler, each, 3.0).first


def probes(seed: int, kind: Kind, *, held: bool) -> list[object]:
    """The keys of twenty calls in the order of their probes, `held` in a cooldown."""
    scope = "client" if held else "auto"  # in which two refusals are not enough for a cooldown
    scheduler, flow = scheduler_of(terms(scope=scope), pace=None, seed=seed), Flow(kind)
    cooled_down(scheduler, 0.0, 0.0)
    assert scheduler.cooldown.trial is not None
    assert scheduler.cooldown.trial.is_cooldown is held
    for number in range(20):
        scheduler.put(call(str(number), flow))
    keys_: list[object] = []
    while scheduler.ready.length:
        at = 1.0 + len(keys_) / 8
        (request,) = started(scheduler, at)
        keys_.append(request.call.key)
        scheduler.ended(request, FAILED, at)
    return keys_


@pytest.mark.parametrize(
    ("kind", "held", "is_drawn"),
    [
        (Kind.MANY, False, True),
        (Kind.MANY, True, True),
        (Kind.SINGLE, False, False),
        (Kind.SINGLE, True, True),
    ],
)
def test_probes_are_drawn_among_the_calls_of_a_flow(
    kind: Kind, *, held: bool, is_drawn: bool
) -> None:
    """By the seed; single calls only in a cooldown of the endpoint, and else in turn."""
    in_turn, order = [str(number) for number in range(20)], probes(1, kind, held=held)
    assert (order != in_turn) is is_drawn
    assert sorted(map(str, order)) == sorted(in_turn)
    assert order == probes(1, kind, held=held)
    assert (order != probes(2, kind, held=held)) is is_drawn


# --- ends


@pytest.mark.parametrize("answer", [OK, FAILED, INCOMPLETE])
def test_only_an_answer_tells_how_long_answers_take(answer: AttemptResult) -> None:
    """A request without one may have taken any time."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow()
    scheduler.ended(start_call(scheduler, call("a", flow), 0.0), answer, 0.5)
    scheduler.ended(start_call(scheduler, call("b", flow), 0.0), LOST, 8.0)
    quota = scheduler.quota(None, 8.0)
    assert quota == attrs.evolve(quota, answer_seconds=0.5)


@pytest.mark.parametrize("answer", [OK, FAILED, INCOMPLETE, LOST, UNSENT])
def test_an_attempt_that_was_not_refused_is_counted(answer: AttemptResult) -> None:
    """Against its call, which has a few."""
    scheduler = scheduler_of(terms(), pace=None)
    request = start_call(scheduler, call("a", Flow()), 0.0)
    scheduler.ended(request, answer, 0.5)
    assert request.call.spared == 0


@pytest.mark.parametrize("scope", ["account", "client"])
def test_a_token_that_returns_at_once_lets_a_waiting_call_out(scope: str) -> None:
    """Of its account, or of all together."""
    scheduler, flow = scheduler_of(terms(requests=1, scope=scope), pace=None), Flow()
    request = start_call(scheduler, call("a", flow, "A"), 0.0)
    scheduler.put(waits := call("b", flow, "A" if scope == "account" else "B"))
    assert scheduler.grant(0.0) is None
    scheduler.ended(request, UNSENT, 1.0)
    assert waits.queue is scheduler.ready
    assert [each.call for each in started(scheduler, 1.0)] == [waits]


def test_a_call_that_waits_is_removed_once() -> None:
    """From any queue. Another call may start if it stood for a token."""
    scheduler, flow = scheduler_of(terms(requests=1), pace=None), Flow()
    first = start_call(scheduler, call("first", flow, "A"), 0.0)
    own, common, ready = call("own", flow, "A"), call("common", flow), call("ready", flow)
    for each in (own, common):
        scheduler.put(each)
    assert started(scheduler, 0.0) == []
    scheduler.put(ready)
    assert [scheduler.remove(each, 0.0) for each in (own, ready, first.call)] == [False] * 3
    assert scheduler.quota(None, 0.0).waiting == 1
    scheduler.ended(first, UNSENT, 1.0)
    assert scheduler.remove(common, 1.0)
    assert not scheduler.remove(common, 1.0)
    assert scheduler.quota(None, 1.0).waiting == 0


@pytest.mark.parametrize("barred", [True, False])
def test_each_call_is_checked_for_a_bar_only_while_bars_are_on(*, barred: bool) -> None:
    """With them each call is asked for at its turn, unless that is switched off."""
    asked: list[tuple[object, float]] = []

    def is_barred(each: Call, at: float) -> bool:
        asked.append((each.key, at))
        return False

    scheduler = scheduler_of(terms(), pace=None, is_barred=is_barred if barred else None)
    assert scheduler.is_barring is barred
    start_call(scheduler, call("a", Flow()), 1.5)
    assert asked == ([("a", 1.5)] if barred else [])
    scheduler.is_barring = False
    start_call(scheduler, call("b", Flow()), 2.5)
    assert len(asked) == barred


def test_a_call_that_is_moved_waits_at_the_end_of_the_other_flow() -> None:
    """A common token that had let it out goes to the next call."""
    scheduler, flow, singles = (
        scheduler_of(terms(requests=1, scope="client"), pace=None),
        Flow(),
        Flow(Kind.SINGLE),
    )
    first = start_call(scheduler, call("first", flow), 0.0)
    moved, other = call("moved", flow), call("other", flow)
    for each in (moved, other):
        scheduler.put(each)
    assert started(scheduler, 0.0) == []
    scheduler.ended(first, UNSENT, 1.0)
    let_out_of = [moved.let_out_of, other.let_out_of]
    scheduler.move(moved, singles, 1.0)
    assert (moved.flow, moved.queue) == (singles, scheduler.ready)
    let_out_of += [moved.let_out_of, other.let_out_of]
    common = scheduler.permits.common
    assert let_out_of == [common, None, None, common]
    scheduler.move(first.call, singles, 1.0)
    assert (first.call.flow, first.call.queue) == (singles, None)
