"""How a request ended, as far as admission is concerned, and the probes of a trial."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.cooldown import Trial
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import TokenBucket
from crustcredits._ratelimit.token_queue import AccountQueue


@pytest.mark.parametrize(
    ("status", "by_gateway", "wait", "expected"),
    [
        # No answer: the request may arrive later.
        (None, False, None, "late"),
        # The API itself.
        (200, False, None, "served"),
        (401, False, None, "served"),
        (402, False, None, "served"),
        (499, False, None, "served"),
        (408, False, None, "late"),
        (429, False, None, "refused"),
        (429, False, 5.0, "refused"),
        (500, False, None, ""),
        (500, False, 5.0, ""),
        (502, False, None, "late"),
        (503, False, None, "late"),
        (503, False, 5.0, "refused late"),
        (503, False, 0.0, "refused late"),
        (504, False, None, "late"),
        # Something in front of it.
        (200, True, None, "late"),
        (403, True, None, "late"),
        (429, True, None, "refused"),
        (500, True, None, "late"),
        (503, True, 5.0, "refused late"),
    ],
)
def test_the_status_tells_whether_a_request_was_served_refused_or_may_come_late(
    status: int | None, *, by_gateway: bool, wait: float | None, expected: str
) -> None:
    result = AttemptResult(status=status, by_gateway=by_gateway, wait=wait)
    named = {
        "served": result.is_served,
        "refused": result.is_refused,
        "late": result.may_come_late,
    }
    assert " ".join(name for name, value in named.items() if value) == expected


def test_an_incomplete_answer_was_neither_served_nor_refused_and_does_not_come_late() -> None:
    """The server has counted the request before it began to answer."""
    result = AttemptResult(status=None, incomplete=True)
    assert result.is_answered
    assert [result.is_served, result.is_refused, result.may_come_late] == [False] * 3


@pytest.mark.parametrize(
    ("limit", "remaining", "used"),
    [
        (300, 299, 1),
        (300, 0, 300),
        (300, 300, 0),
        (300, 301, None),
        (300, None, None),
        (None, 299, None),
        (None, None, None),
        (0, 0, 0),
    ],
)
def test_the_count_of_an_answer_is_its_limit_less_the_rest(
    limit: int | None, remaining: int | None, used: int | None
) -> None:
    """None if either is missing, or if they contradict each other."""
    assert AttemptResult(status=200, limit=limit, remaining=remaining).used == used


def attempt(trial: Trial | None) -> Attempt:
    """A request on the wire, which is a probe if there is a trial."""
    account = AccountQueue("a", "key", TokenBucket(300), SchedulerTerms())
    call = Call("key", "a", Flow())
    return Attempt(
        call,
        Kind.MANY,
        0.0,
        0,
        None,
        trial,
        first=True,
        in_trial=trial is not None,
        account=account,
    )


def test_a_probe_leaves_its_trial_once() -> None:
    """When it hangs, or when it ends; the other probes stay."""
    trial = Trial(0.0, "a", on_wire=3)
    request = attempt(trial)
    for _ in range(2):
        request.leave_trial()
        assert (trial.on_wire, request.in_trial) == (2, False)
    assert request.trial is trial


def test_a_request_outside_of_a_trial_leaves_none() -> None:
    request = attempt(None)
    request.leave_trial()
    assert not request.in_trial
