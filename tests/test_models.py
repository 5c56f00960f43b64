"""Errors, models and outcomes as values."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import attrs
import pytest

import crustcredits
from crustcredits import (
    Account,
    ApiKey,
    APITimeoutError,
    Balance,
    ConfigurationError,
    CrustCreditsError,
    InvalidKeyError,
    Known,
    RateLimitStatus,
    Report,
    Unknown,
)
from crustcredits._models import outcome_for

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = ApiKey("sk-0123456789", name="prod", account="acme")
STATUS = RateLimitStatus(limit=300, remaining=299, reset=60.0)

REQUIREMENT = {"needed": Decimal(5), "available": Decimal("1.5"), "report": Report([])}
EXAMPLE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "APIStatusError": {"status": 418},
    "BadRequestError": {"status": 400},
    "AuthenticationError": {"status": 401},
    "MissingKeyError": {"status": 401},
    "InvalidKeyError": {"status": 401},
    "PaymentRequiredError": {"status": 402},
    "PermissionDeniedError": {"status": 403},
    "RateLimitError": {"status": 429, "retry_after": 7.0},
    "InternalServerError": {"status": 500},
    "UnexpectedResponseError": {"status": 200},
    "GatewayError": {"status": 403},
    "RateLimitWaitError": {"wait": 3.5},
    "CreditsRequirementError": REQUIREMENT,
    "InsufficientCreditsError": REQUIREMENT,
    "CreditsUnknownError": REQUIREMENT | {"deciding": ()},
}
ERRORS = [
    value
    for value in vars(crustcredits).values()
    if inspect.isclass(value) and issubclass(value, CrustCreditsError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_pickles_and_copies_with_its_attributes(kind: type[CrustCreditsError]) -> None:
    """The text survives as well."""
    arguments = EXAMPLE_ARGUMENTS.get(kind.__name__, {})
    error = kind(
        "it broke", key_name="prod", attempts=3, request_id="r-1", rate_limit=STATUS, **arguments
    )
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):  # noqa: S301  # our own bytes
        assert type(twin) is kind
        assert vars(twin) == vars(error)
        assert (str(twin), repr(twin)) == (str(error), repr(error))
    assert "prod: it broke" in str(error)


def test_the_tree_of_errors_is_the_documented_one() -> None:
    """The module docstring draws it."""
    from crustcredits import _errors

    documented = _errors.__doc__ or ""
    for kind in ERRORS:
        assert kind.__name__ in documented
        parent = kind.__bases__[0]
        assert parent is Exception or parent in ERRORS
    assert issubclass(APITimeoutError, TimeoutError)
    assert issubclass(ConfigurationError, ValueError)


def test_a_balance_converts_to_json_data() -> None:
    """Credits as text, times in UTC, the key by its label."""
    at = NOON.astimezone(timezone(timedelta(hours=2)))
    balance = Balance(
        key=KEY, credits=Decimal("138940.37"), checked_at=at, request_id="r-1", rate_limit=STATUS
    )
    assert balance.to_dict() == {
        "key": "acme/prod",
        "account": "acme",
        "credits": "138940.37",
        "checked_at": "2026-01-01T12:00:00Z",
        "stale": False,
        "request_id": "r-1",
        "rate_limit": {"limit": 300, "remaining": 299, "reset": 60.0},
    }


def test_an_account_converts_to_json_data() -> None:
    """Numbers in fields as sent are text, too."""
    account = Account(
        key=KEY,
        credits=Decimal("1E+3"),
        checked_at=NOON,
        recurring_credits=Decimal(0),
        recurring_credits_refresh_date=NOON,
        wallets=[{"left": Decimal("1.50"), "kind": None}],
        extra={"plan": {"price": Decimal("9.99"), "seats": [Decimal(3)]}},
    )
    assert hash(account) == hash(copy.copy(account))
    plain = account.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["credits"] == "1000"
    assert plain["recurring_credits"] == "0"
    assert plain["recurring_credits_refresh_date"] == "2026-01-01T12:00:00Z"
    assert plain["wallets"] == [{"left": "1.50", "kind": None}]
    assert plain["credit_topups"] is None
    assert plain["extra"] == {"plan": {"price": "9.99", "seats": ["3"]}}
    assert plain["rate_limit"] is None


@pytest.mark.parametrize(
    "record",
    [Balance, Account, Known, Unknown, RateLimitStatus, crustcredits.Quota, crustcredits.RateLimit],
)
def test_records_are_frozen_and_keyword_only(record: type) -> None:
    """Results do not change."""
    parameters = inspect.signature(record).parameters.values()
    assert {parameter.kind for parameter in parameters} == {inspect.Parameter.KEYWORD_ONLY}
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        RateLimitStatus().limit = 1  # type: ignore[misc]  # the mistake under test


def good() -> Known[Balance]:
    balance = Balance(
        key=KEY, credits=Decimal(7), checked_at=NOON, request_id="r-1", rate_limit=STATUS
    )
    return Known(balance=balance, attempts=2)


def bad() -> Unknown:
    error = InvalidKeyError(
        "no such key", status=401, key_name="prod", request_id="r-2", rate_limit=STATUS
    )
    return Unknown(key=KEY, error=error, checked_at=NOON, attempts=1, source="fetched")


def test_an_outcome_with_a_balance_is_ok() -> None:
    """It repeats the fields of the balance."""
    outcome = good()
    assert outcome.ok
    assert outcome.credits == 7
    assert outcome.result() is outcome.balance
    assert (outcome.request_id, outcome.rate_limit) == ("r-1", STATUS)
    assert outcome.to_dict() | {"rate_limit": None} == {
        "key": "acme/prod",
        "account": "acme",
        "ok": True,
        "stale": False,
        "attempts": 2,
        "source": "fetched",
        "credits": "7",
        "checked_at": "2026-01-01T12:00:00Z",
        "request_id": "r-1",
        "rate_limit": None,
        "error": None,
    }


def test_a_stale_outcome_has_a_balance_and_an_error() -> None:
    """It is ok and stale at the same time."""
    outcome = attrs.evolve(
        good(),
        balance=attrs.evolve(good().result(), stale=True),
        error=bad().error,
        source="cached",
    )
    assert outcome.ok
    assert outcome.stale
    assert not attrs.evolve(bad()).stale
    plain = outcome.to_dict()
    assert (plain["credits"], plain["ok"], plain["stale"], plain["source"]) == (
        "7",
        True,
        True,
        "cached",
    )
    assert plain["error"] == {"type": "InvalidKeyError", "message": "prod: no such key (HTTP 401)"}


def test_an_outcome_with_an_error_has_unknown_credits() -> None:
    """Unknown is not zero."""
    outcome = bad()
    assert not outcome.ok
    assert outcome.credits is None
    with pytest.raises(InvalidKeyError):
        outcome.result()
    plain = outcome.to_dict()
    assert plain["credits"] is None
    assert plain["error"] == {"type": "InvalidKeyError", "message": "prod: no such key (HTTP 401)"}
    assert plain["rate_limit"] == STATUS.to_dict()
    assert plain["request_id"] == "r-2"


def test_an_error_before_any_response_has_no_response_fields() -> None:
    """It has no request id and no rate limit."""
    outcome = Unknown(key=KEY, error=ConfigurationError("x"))
    assert outcome.to_dict()["rate_limit"] is None
    assert (outcome.request_id, outcome.rate_limit, outcome.source, outcome.attempts) == (
        None,
        None,
        "none",
        0,
    )


def test_an_outcome_is_renamed_for_a_key_with_the_same_secret() -> None:
    """Its balance and its error are renamed, and the first outcome is unchanged."""
    other = ApiKey("sk-0123456789", name="other")
    outcome, failed = outcome_for(other, good()), outcome_for(other, bad())
    assert outcome.key is outcome.result().key is other
    assert failed.error is not None
    assert str(failed.error) == "other: no such key (HTTP 401)"
    assert str(bad().error).startswith("prod: ")
    same = good()
    assert outcome_for(KEY, same) is same


@pytest.mark.parametrize("wrong", [None, "bad", ValueError("x")])
def test_every_outcome_holds_a_balance_or_an_error(wrong: Any) -> None:
    """Values of other types are refused."""
    with pytest.raises(TypeError):
        Unknown(key=KEY, error=wrong)
    with pytest.raises(TypeError):
        attrs.evolve(bad(), error=wrong)
    with pytest.raises((TypeError, AttributeError)):
        Known(balance=wrong)
