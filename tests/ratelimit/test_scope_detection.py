"""The scope that the server counts by, as far as its answers prove it."""

from __future__ import annotations

from crustcredits._ratelimit.scope_detection import ScopeDetection

LATE = 10.0


def prove(own: int, used: int, others: int = 10, ended: float = 1.0, started: float = 5.0) -> bool:
    """Whether an answer proves its account, after `others` requests that ended at one time."""
    scope = ScopeDetection(60.0, LATE, proves=True)
    for _ in range(others):
        scope.served(0.0, ended)
    return scope.told(used, own, started, started + 0.1)[0]


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
