"""The scope that the server counts by, as far as its answers prove it."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.scope_detection import ScopeDetection

PERIOD, LATE = 60.0, 10.0


def prove(own: int, used: int, others: int = 10, ended: float = 1.0, started: float = 5.0) -> bool:
    """Whether an answer proves its account, after `others` requests that ended at one time."""
    scope = ScopeDetection(PERIOD, LATE, proves=True)
    for _ in range(others):
        scope.served(0.0, ended)
    return scope.counted(used, own, started, started + 0.1)[0]


def test_ten_requests_that_are_missing_from_a_count_prove_its_account() -> None:
    """No proof follows from nine, or from requests that may not be counted yet or have aged out.

    Nor where requests of others may be in the count.
    """
    assert prove(1, 1)
    assert not prove(1, 1, others=9)
    assert not prove(1, 2)
    assert not prove(2, 1)
    assert prove(2, 2, others=11)
    assert not prove(1, 1, ended=4.0)
    assert not prove(1, 1, started=60.0)


def scope_with(witnesses: int, ended: float = 1.0, *, proves: bool = True) -> ScopeDetection:
    """Evidence after served answers without counts, all from 0 s until `ended`."""
    scope = ScopeDetection(PERIOD, LATE, proves=proves)
    for _ in range(witnesses):
        scope.served(0.0, ended)
    return scope


def test_nothing_is_proven_where_no_proof_is_looked_for() -> None:
    """The weaker sign is noted all the same."""
    scope = scope_with(10, proves=False)
    assert scope.counted(1, 1, 5.0, 5.1) == (False, True)
    assert scope.is_counted_apart(5.1)


def test_answers_with_counts_witness_too() -> None:
    """Those that count others, and those that prove."""
    scope = scope_with(8)
    assert scope.counted(9, 1, 0.0, 1.0) == (False, False)
    assert not scope.can_witness(4.0)
    assert scope.counted(1, 1, 0.0, 1.0) == (False, False)
    assert scope.can_witness(4.0)


def test_a_scope_has_seen_counts_after_an_answer_with_one() -> None:
    scope, seen = scope_with(10), []
    for _ in range(2):
        seen.append(scope.has_seen_counts)
        scope.counted(1, 1, 5.0, 5.1)
    assert seen == [False, True]


def test_ten_answers_in_a_row_that_count_others_mean_all_are_counted_together() -> None:
    """One that counts its own account's requests at most ends the row."""
    scope, together = scope_with(0), []
    for used in (*[2] * 11, 1, *[2] * 9):
        scope.counted(used, 1, 0.0, 1.0)
        together.append(scope.is_together)
    assert together == [*[False] * 9, True, True, *[False] * 10]


@pytest.mark.parametrize(
    ("own", "ended", "apart"), [(3, 5.0, True), (4, 5.0, False), (3, 5.1, False)]
)
def test_an_answer_that_counts_its_own_account_at_most_is_a_weak_sign(
    own: int, ended: float, *, apart: bool
) -> None:
    """If at least as many requests of any account had ended before it began."""
    scope = scope_with(3, ended)
    assert scope.ended_before(5.0, 5.2) == (3 if ended <= 5.0 else 0)
    assert scope.counted(1, own, 5.0, 5.2) == (False, apart)
    assert scope.is_counted_apart(5.2) is apart


def test_the_weak_sign_is_good_for_a_period() -> None:
    """And there is none before the first answer."""
    scope = scope_with(1)
    assert not scope.is_counted_apart(0.0)
    scope.counted(1, 1, 5.0, 5.5)
    assert scope.is_counted_apart(65.0)
    assert not scope.is_counted_apart(65.5)


def test_ten_requests_can_witness_when_a_count_must_have_them() -> None:
    """From 1.5 s after the tenth has ended until a period after the first has begun."""
    scope = scope_with(9)
    assert not scope.can_witness(50.0)
    assert scope.can_witness_at(50.0) is None
    scope.served(0.5, 2.0)
    assert scope.can_witness_at(2.0) == pytest.approx(3.5)
    assert [scope.can_witness(now) for now in (3.4, 3.5, 60.0, 60.1)] == [False, True, True, False]
    assert scope.can_witness_at(60.1) is None


def contradict_at(scope: ScopeDetection, now: float) -> None:
    """An answer that counts its account apart, and then a refusal that contradicts it."""
    for _ in range(11):
        scope.served(now - 8.0, now - 7.0)
    scope.counted(1, 1, now - 1.0, now)
    scope.contradicted(now)


def proves_at(scope: ScopeDetection, now: float) -> bool:
    """Whether an answer proves its account, when ten requests can witness."""
    for _ in range(11):
        scope.served(now - 8.0, now - 7.0)
    return scope.counted(1, 1, now - 1.0, now)[0]


def test_no_proof_is_accepted_for_ten_periods_after_a_contradiction() -> None:
    """And for twice as long after the next, up to 160 periods."""
    scope, now = scope_with(0), 100.0
    for periods in (10, 20, 40, 80, 160, 160):
        contradict_at(scope, now)
        now += periods * PERIOD
        assert not proves_at(scope, now - 20.0)
    assert proves_at(scope, now)


def test_a_proof_is_accepted_from_the_tenth_period_on() -> None:
    scope = scope_with(0)
    contradict_at(scope, 100.0)
    assert not proves_at(scope, 690.0)
    assert proves_at(scope, 700.0)


def test_a_contradiction_while_no_proof_is_accepted_changes_nothing() -> None:
    """It follows from the same answers as the first."""
    scope = scope_with(0)
    contradict_at(scope, 100.0)
    contradict_at(scope, 500.0)
    assert not proves_at(scope, 690.0)
    assert proves_at(scope, 700.0)


def test_a_refusal_contradicts_only_a_recent_sign() -> None:
    """After a period another client may have spent the limit."""
    scope = scope_with(10)
    scope.contradicted(0.0)
    assert scope.counted(1, 1, 5.0, 5.5) == (True, True)
    scope.contradicted(65.5)
    assert proves_at(scope, 80.0)
    scope.contradicted(139.0)
    assert not proves_at(scope, 160.0)
