"""`SchedulerTerms.of`: what a scheduler derives from a configured limit."""

from __future__ import annotations

from typing import Any

import pytest

from crustcredits import RateLimit
from crustcredits._ratelimit.terms import SchedulerTerms


def test_the_margin_is_on_the_side_of_fewer_requests() -> None:
    """A token returns a little later than the server forgets a request, and proves less."""
    limit = RateLimit(
        requests=20, period=8.0, margin=0.25, reserve=0.5, adopt_server_limit="any", scope="client"
    )
    assert SchedulerTerms.of(limit, late=3.0) == SchedulerTerms(
        requests=20, period=10.0, window=6.0, late=3.0, scope="client", reserve=0.5, adopts="any"
    )


@pytest.mark.parametrize(
    ("scope", "counts"),
    [("auto", "auto"), ("client", "client"), ("account", "account"), ("key", "account")],
)
def test_each_key_is_an_account_of_its_own_where_keys_are_counted(scope: Any, counts: str) -> None:
    """So the scheduler knows three scopes."""
    assert SchedulerTerms.of(RateLimit(scope=scope), late=10.0).scope == counts
