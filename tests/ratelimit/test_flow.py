"""A new call and a new flow."""

from __future__ import annotations

import math

from crustcredits._ratelimit.flow import Call, Flow, Kind


def test_a_new_call_has_sent_no_request_and_waits_nowhere() -> None:
    """It has no deadline. Its flow has the callback for calls that wait for their account."""
    parked: list[int] = []
    flow = Flow(Kind.SINGLE, parked.append)
    new = Call("k", "A", flow)
    assert (new.key, new.account, new.flow) == ("k", "A", flow)
    assert (new.was_sent, new.spared, new.deadline) == (False, 0, math.inf)
    assert (new.let_out_of, new.queue) == (None, None)
    assert flow.on_parked is not None
    flow.on_parked(1)
    assert parked == [1]


def test_a_flow_is_by_default_that_of_a_check() -> None:
    assert (Flow().kind, Flow().on_parked) == (Kind.MANY, None)
