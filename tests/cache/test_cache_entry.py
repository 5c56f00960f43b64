"""Cache entries without a client: which balance is the answer at a time."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from crustcredits import Account, ApiKey, APITimeoutError, Balance, Retry, Unknown
from crustcredits._cache.policy import NEW
from crustcredits._cache.store import BalanceCache

KEY = ApiKey("secret-0", name="prod")
CACHE_KEY = ("/user/credits", KEY.digest)


@pytest.mark.parametrize(("began", "source"), [(4.0, "cached"), (5.0, None)])
def test_a_balance_that_arrives_beside_the_failure_is_the_answer(
    began: float, source: str | None
) -> None:
    """It came after the call had begun, in the moment of its failure. An older one is no answer."""
    cache = BalanceCache(10, Retry(), lambda path: None)
    policy = NEW.given(max_age=0, stale_if_error=0)
    balance = Balance(key=KEY, credits=Decimal(7), checked_at=datetime.now(UTC))
    cache.succeeded(CACHE_KEY, balance, 5.0)
    entry = cache.find(CACHE_KEY)
    assert entry is not None
    failure = Unknown(key=KEY, error=APITimeoutError("late", key_name="prod"))
    found = entry.instead_of(failure, policy, began, 5.0)
    assert (None if found is None else found.source) == source


def test_a_refresh_date_that_has_passed_by_the_time_of_the_answer_changes_nothing() -> None:
    """If the API still names a past date, its answer is as fresh as any other."""
    cache, at = BalanceCache(10, Retry(), lambda path: None), datetime.now(UTC)
    account = Account(key=KEY, credits=Decimal(5), checked_at=at, recurring_credits_refresh_date=at)
    path = ("/account/credits", KEY.digest)
    cache.succeeded(path, account, 5.0)
    entry = cache.find(path)
    assert entry is not None
    found = entry.answer(NEW.given(max_age=3600), 6.0)
    assert found is not None
    assert (found.result(), found.stale) == (account, False)
