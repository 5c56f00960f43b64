"""Calls with a deadline: which certainly cannot start in time, and which are too late to send."""

from __future__ import annotations

import math

import pytest

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.flow import Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from tests.ratelimit.calls import OK, Outside, Pool, call, refused, start_call, started, terms
from tests.ratelimit.worlds import scheduler as scheduler_of

# --- the earliest start


@pytest.mark.virtual
async def test_the_earliest_start_is_predicted_only_when_certain() -> None:
    """A cooldown and a returning token are certain.

    While a request is on the wire nothing is certain, because its token may return at once.
    """
    scheduler, flow = scheduler_of(SchedulerTerms(requests=1, scope="client"), pace=None), Flow()
    one, two = call("one", flow), call("two", flow)
    scheduler.put(one)
    assert scheduler.earliest(one.account, 0.0) == 0.0
    (first,) = started(scheduler, 0.0)
    scheduler.put(two)
    assert scheduler.earliest(two.account, 0.5) == 0.5
    scheduler.ended(first, OK, 1.0)
    assert scheduler.earliest(two.account, 1.0) == pytest.approx(61.3)
    scheduler.put(one)
    (second,) = started(scheduler, 61.4)
    assert second.call is two
    scheduler.ended(second, AttemptResult(status=429, wait=200.0), 61.5)
    scheduler.put(two)
    assert scheduler.earliest(two.account, 61.5) == 261.5
    assert scheduler.earliest(one.account, 61.5) == 61.5


@pytest.mark.parametrize("scope", ["auto", "client", "account"])
def test_a_free_token_or_one_on_the_wire_may_be_had_now(scope: str) -> None:
    """However late the tokens of ended requests return."""
    scheduler, flow = scheduler_of(terms(requests=2, scope=scope), pace=None), Flow()
    first, second = (start_call(scheduler, call(name, flow, "A"), 0.0) for name in ("a1", "a2"))
    assert scheduler.earliest("A", 0.5) == 0.5
    scheduler.ended(first, OK, 1.0)
    assert scheduler.earliest("A", 1.0) == 1.0  # one is on the wire
    scheduler.ended(second, OK, 2.0)
    assert scheduler.earliest("A", 2.0) == 61.5
    assert scheduler.earliest("A", 61.5) == 61.5  # one is free, and one returns later
    assert scheduler.earliest("A", 61.75) == 61.75


@pytest.mark.parametrize(("scope", "moment"), [("client", 61.5), ("auto", 61.5), ("account", 3.0)])
def test_an_empty_common_bucket_delays_all_accounts(scope: str, moment: float) -> None:
    """Unless accounts are counted separately. An account that is not known has all its tokens."""
    scheduler = scheduler_of(terms(requests=1, scope=scope), pace=None)
    common = scheduler.permits.common.bucket
    common.take(0.0)  # by another process, where the count is shared
    common.return_at(61.5)
    assert scheduler.earliest("unknown", 3.0) == moment
    assert scheduler.hopeless(["a", "b"], 61.0, 3.0) == ([] if scope == "account" else [0, 1])


def test_the_latest_of_tokens_and_cooldown_decides() -> None:
    """The account's token, its cooldown, and the common token."""
    scheduler, flow = scheduler_of(terms(requests=1, scope="client"), pace=None), Flow()
    scheduler.ended(start_call(scheduler, call("a", flow), 0.0), refused(10.0), 1.0)
    assert scheduler.earliest("a", 1.0) == 11.0
    assert scheduler.hopeless(["a", "b"], 10.5, 1.0) == [0]
    assert scheduler.hopeless(["b", "a"], 10.5, 1.0) == [1]
    assert scheduler.hopeless(["a"], 11.0, 1.0) == []
    scheduler.ended(start_call(scheduler, call("b", flow), 2.0), OK, 2.5)
    assert [scheduler.earliest(name, 3.0) for name in ("a", "b", "c")] == [63.0] * 3


def test_a_token_whose_return_is_unknown_may_come_now() -> None:
    """Another process may return it at any moment."""
    scheduler = scheduler_of(terms(requests=1), pace=None, make_bucket=Outside({None: 1, "a": 1}))
    each = call("a", Flow())
    scheduler.put(each)
    assert scheduler.grant(0.0) is None
    assert scheduler.earliest("a", 1.0) == 1.0
    each.deadline = 1.0
    assert not scheduler.is_hopeless(each, 1.0)
    assert scheduler.is_hopeless(each, 1.5)


# --- calls without hope


def test_calls_that_certainly_start_after_a_deadline_are_known() -> None:
    """Calls of an account without a token or in a cooldown, and all behind an empty bucket."""
    scheduler, flow = scheduler_of(SchedulerTerms(requests=1, scope="account"), pace=None), Flow()
    for name in ("spent", "cooling", "on the wire"):
        scheduler.put(call(name, flow))
    spent, cooling, _ = started(scheduler, 0.0)
    scheduler.ended(spent, OK, 1.0)
    scheduler.ended(cooling, AttemptResult(status=429, wait=30.0), 1.0)
    names = ["new", "spent", "cooling", "on the wire"]
    assert scheduler.hopeless(names, 31.0, 2.0) == [1]
    assert scheduler.hopeless(names, 30.9, 2.0) == [1, 2]
    assert scheduler.hopeless(names, 61.3, 2.0) == []
    assert scheduler.earliest("spent", 2.0) == pytest.approx(61.3)
    assert scheduler.earliest("new", 2.0) == 2.0
    together, flow = scheduler_of(SchedulerTerms(requests=1, scope="client"), pace=None), Flow()
    together.put(call("one", flow))
    (one,) = started(together, 0.0)
    assert together.hopeless(["a", "b"], 5.0, 1.0) == []
    together.ended(one, OK, 1.0)
    assert together.hopeless(["a", "b"], 61.2, 1.0) == [0, 1]
    assert together.hopeless(["a", "b"], 61.3, 1.0) == []
    assert together.earliest("a", 1.0) == pytest.approx(61.3)


def test_a_call_that_certainly_misses_its_deadline_is_handed_out_in_order() -> None:
    """It leaves nothing behind, and the call behind it waits on."""
    parked: list[int] = []
    scheduler, flow = (
        scheduler_of(terms(requests=1, scope="account"), pace=None),
        Flow(on_parked=parked.append),
    )
    scheduler.ended(start_call(scheduler, call("first", flow, "A"), 0.0), OK, 1.0)
    hopeless, patient, endless = (call(name, flow, "A") for name in ("h", "p", "e"))
    hopeless.deadline, patient.deadline = 61.25, 61.5
    for each in (hopeless, patient, endless):
        scheduler.put(each)
    assert scheduler.is_hopeless(hopeless, 2.0)
    assert not scheduler.is_hopeless(patient, 2.0)
    assert not scheduler.is_hopeless(endless, 2.0)
    assert scheduler.grant(2.0) is hopeless
    assert hopeless.queue is None
    assert scheduler.grant(2.0) == 61.5
    assert scheduler.quota("A", 2.0).waiting == 2
    assert parked == [1, -1, 1, 1]


# --- calls that are late


def test_a_call_is_not_sent_when_its_time_is_nearly_over_and_others_wait() -> None:
    """Without others it is tried, until its time is over."""
    flow = Flow()
    late, other = call("late", flow), call("other", flow)
    late.deadline = 10.3
    for others in (True, False):
        scheduler = scheduler_of(SchedulerTerms(requests=2, scope="client"), pace=None)
        scheduler.put(first := call("first", Flow()))
        (request,) = started(scheduler, 0.0)
        scheduler.ended(request, OK, 0.2)  # so a usual answer takes 0.2 s
        scheduler.put(late)
        if others:
            scheduler.put(other)
        assert not scheduler.is_late(first, 10.0)
        assert scheduler.is_late(late, 10.3)
        assert not scheduler.is_late(late, 9.9)
        granted = scheduler.grant(10.0)
        assert (granted is late) is others
        assert isinstance(granted, Attempt) is not others
        late.queue = None
        late.was_sent = False


def scheduler_with(
    *,
    scope: str = "account",
    requests: int = 300,
    reserve: float = 0.0,
    slots: int = 32,
    rate: float | None = None,
    cut_at: float | None = None,
    usual: float | None = 0.125,
) -> tuple[Scheduler, ConnectionSlots[Attempt]]:
    """A scheduler, and slots in which an answer usually takes so many seconds.

    The pace is `rate`, halved at `cut_at`.
    """
    pace = Pace(rate, 5.0)
    if cut_at is not None:
        pace.cut(cut_at)
    taken = ConnectionSlots[Attempt](slots)
    taken.usual = usual
    scheduler = Scheduler(
        terms(requests=requests, scope=scope, reserve=reserve),
        pace=pace,
        slots=taken,
        seed=1,
    )
    return scheduler, taken


@pytest.mark.parametrize(
    ("usual", "left", "late"),
    [
        (0.125, 0.25, False),
        (0.125, 0.1875, True),
        (0.125, 0.0, True),
        (0.125, -1.0, True),
        (1.0, 0.5, False),
        (1.0, 0.375, True),
        (None, 0.001, False),
        (None, 0.0, True),
        (0.125, math.inf, False),
    ],
)
def test_a_call_is_late_with_less_time_than_two_usual_answers(
    usual: float | None, left: float, *, late: bool
) -> None:
    """At most 0.4 s, where another call waits for the only slot; without an answer so far never."""
    scheduler, _ = scheduler_with(slots=1, usual=usual)
    flow = Flow()
    scheduler.put(call("other", flow))
    each = call("late", flow)
    each.deadline = 8.0 + left
    assert scheduler.is_late(each, 8.0) is late


@pytest.mark.parametrize(
    ("room", "ready", "late"),
    [
        ({"slots": 2}, 1, False),
        ({"slots": 2}, 2, True),
        ({"requests": 2, "scope": "client"}, 1, False),
        ({"requests": 2, "scope": "client"}, 2, True),
        ({"requests": 2, "scope": "account"}, 31, False),
        ({"requests": 2, "scope": "account"}, 32, True),
        ({"rate": 8.0}, 1, False),  # two starts in 0.25 s
        ({"rate": 8.0}, 2, True),
        ({"rate": 9.0}, 2, False),  # a third one may begin
        ({"rate": 9.0}, 3, True),
        ({"rate": 16.0, "cut_at": 8.0}, 1, False),
        ({"rate": 16.0, "cut_at": 8.0}, 2, True),
        (
            {"requests": 4, "scope": "client", "reserve": 0.5},
            1,
            False,
        ),  # two are kept
        ({"requests": 4, "scope": "client", "reserve": 0.5}, 2, True),
        ({"slots": 4, "rate": 8.0, "requests": 3, "scope": "client"}, 2, True),
        ({"slots": 4, "rate": 16.0, "requests": 3, "scope": "client"}, 3, True),
        ({"slots": 4, "rate": 16.0, "requests": 3, "scope": "client"}, 2, False),
    ],
)
def test_starts_are_scarce_when_as_many_calls_are_ready_as_can_start(
    room: dict[str, object], ready: int, *, late: bool
) -> None:
    """Before an answer can come, as slots, common tokens and the pace allow."""
    scheduler, _ = scheduler_with(**room)  # type: ignore[arg-type]  # checked by the function
    flow, refreshes = Flow(), Flow(Kind.BACKGROUND)
    for number in range(ready):
        scheduler.put(call(str(number), flow))
        scheduler.put(call(f"refresh{number}", refreshes))
    each = call("late", flow)
    each.deadline = 8.125
    assert scheduler.is_late(each, 8.0) is late


@pytest.mark.parametrize(("ready", "late"), [(3, False), (4, True)])
def test_the_reserve_is_room_for_single_calls(ready: int, *, late: bool) -> None:
    """Starts are scarce for them only when all tokens are spoken for."""
    scheduler, _ = scheduler_with(requests=4, scope="client", reserve=0.5)
    singles = Flow(Kind.SINGLE)
    for number in range(ready):
        scheduler.put(call(str(number), singles))
    each = call("late", singles)
    each.deadline = 8.125
    assert scheduler.is_late(each, 8.0) is late


def test_without_another_call_of_its_flow_starts_are_never_scarce() -> None:
    """Even if no slot is free: flows take turns, so the calls of others take no start from it."""
    scheduler, slots = scheduler_with(slots=1)
    flow = Flow()
    start_call(scheduler, call("on the wire", flow), 7.9)
    assert slots.free == 0
    each = call("late", flow)
    each.deadline = 8.125
    assert not scheduler.is_late(each, 8.0)
    scheduler.put(call("of another flow", Flow()))
    assert not scheduler.is_late(each, 8.0)
    scheduler.put(call("other", flow))
    assert scheduler.is_late(each, 8.0)


def test_a_key_of_a_pool_is_late_only_when_its_time_is_over() -> None:
    """All keys of a pool have one deadline: no other key has more use of the token."""
    scheduler, _ = scheduler_with(slots=1)
    pool = Pool([None, None, None])
    scheduler.put_pool(pool)
    each = pool.begin(0)
    each.deadline = 8.125
    assert not scheduler.is_late(each, 8.0)
    assert scheduler.is_late(each, 8.125)


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.MANY])
def test_starts_are_scarce_while_a_call_of_the_flow_waits_for_the_common_bucket(
    kind: Kind,
) -> None:
    """Not for the calls of another flow."""
    scheduler, _ = scheduler_with(requests=2, scope="client")
    flow = Flow(kind)
    for name in ("a", "b"):
        start_call(scheduler, call(name, flow), 7.9)
    scheduler.put(call("waits", flow))
    assert started(scheduler, 8.0) == []
    each, other = call("late", flow), call("of another flow", Flow(kind))
    each.deadline = other.deadline = 8.125
    assert scheduler.is_late(each, 8.0)
    assert not scheduler.is_late(other, 8.0)


def test_a_late_call_gives_its_common_token_to_the_next() -> None:
    """In an overload a token is not spent on an answer that comes too late."""
    scheduler, _ = scheduler_with(requests=1, scope="client")
    flow = Flow()
    first = start_call(scheduler, call("first", flow), 0.0)
    late, other, third = (call(name, flow) for name in ("late", "other", "third"))
    for each in (late, other, third):
        scheduler.put(each)
    assert started(scheduler, 0.0) == []
    scheduler.ended(first, OK, 0.125)
    late.deadline = 60.75
    assert scheduler.grant(60.625) is late
    assert late.let_out_of is None
    (request,) = started(scheduler, 60.625)
    assert request.call is other
