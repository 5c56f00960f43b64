"""Calls with a deadline: which certainly cannot start in time, and which are too late to send."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.fair_queue import Flow
from crustcredits._ratelimit.terms import SchedulerTerms
from tests.ratelimit.calls import OK, call, started
from tests.ratelimit.worlds import scheduler as scheduler_of


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


def test_which_calls_certainly_start_after_a_deadline() -> None:
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


def test_a_call_is_not_sent_when_its_time_is_nearly_over_and_others_wait() -> None:
    """Without others it is tried, until its time is over."""
    late, other = call("late", Flow()), call("other", Flow())
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
        late.was_asked = False
