"""The fields of an account, and the shapes of its document."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from crustcredits import Account, UnexpectedResponseError
from crustcredits._http.addresses import ACCOUNT_CREDITS
from tests.http.responses import account, balance, error, read


def test_an_account_keeps_the_apis_field_names() -> None:
    """Values become decimals and an aware time; lists stay as sent."""
    found = account(
        recurring_credits=150000,
        recurring_credits_frequency="monthly",
        recurring_credits_refresh_date="2026-09-01T00:00:00Z",
        credit_rollover=True,
        wallets=[{"kind": "recurring", "left": 1.5}],
        credit_topups=[],
        plan={"name": "pro"},
    )
    assert found.recurring_credits == Decimal(150000)
    assert found.recurring_credits_frequency == "monthly"
    assert found.recurring_credits_refresh_date == datetime(2026, 9, 1, tzinfo=UTC)
    assert found.credit_rollover is True
    assert found.wallets == [{"kind": "recurring", "left": Decimal("1.5")}]
    assert found.credit_topups == []
    assert found.extra == {"plan": {"name": "pro"}}


def test_absent_and_null_account_fields_are_none() -> None:
    """Only unknown fields land in `extra`."""
    found = account(recurring_credits=None)
    assert found.recurring_credits is None
    assert found.recurring_credits_refresh_date is None
    assert found.wallets is found.credit_topups is None
    assert found.extra == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-09-01T02:00:00+02:00", datetime(2026, 9, 1, tzinfo=UTC)),
        ("2026-09-01 00:00:00", datetime(2026, 9, 1, tzinfo=UTC)),
        ("2026-09-01", datetime(2026, 9, 1, tzinfo=UTC)),
        ("2026-09-01T00:00:00.123456Z", datetime(2026, 9, 1, 0, 0, 0, 123456, tzinfo=UTC)),
    ],
)
def test_the_refresh_date_is_an_aware_time_in_utc(text: str, expected: datetime) -> None:
    """Any offset is converted; a time without an offset is read as UTC."""
    found = account(recurring_credits_refresh_date=text).recurring_credits_refresh_date
    assert found == expected
    assert found.tzinfo is UTC


@pytest.mark.parametrize("text", ["soon", "", "2026-13-01", "0001-01-01T00:00:00+23:59"])
def test_an_unparsable_refresh_date_keeps_the_balance(
    text: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The date is None, a warning is logged, and `extra` holds the text."""
    found = account(recurring_credits_refresh_date=text)
    assert found.credits == 1
    assert found.recurring_credits_refresh_date is None
    assert found.extra == {"recurring_credits_refresh_date": text}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert (
        "prod: recurring_credits_refresh_date is None, because the API sent no ISO date"
        in caplog.text
    )


def test_a_field_of_an_undocumented_kind_keeps_the_balance(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The field lands in `extra` as sent, with a warning."""
    found = account(
        recurring_credits="150000",
        credit_rollover=0,
        wallets={"a": 1},
        recurring_credits_refresh_date=7,
    )
    assert (found.recurring_credits, found.credit_rollover, found.wallets) == (None, None, None)
    assert found.recurring_credits_refresh_date is None
    assert set(found.extra) == {
        "recurring_credits",
        "credit_rollover",
        "wallets",
        "recurring_credits_refresh_date",
    }
    assert len(caplog.records) == 4


def test_an_account_nested_too_deeply_is_an_unexpected_response() -> None:
    """Printing or copying it would exceed the recursion limit."""
    assert account(wallets=[[[[[[{"a": [1]}]]]]]]).wallets
    nested: Any = 1
    for _ in range(600):
        nested = [nested]
    assert "more than 16 levels" in str(
        error(json.dumps({"account": {"credits": 1, "wallets": nested}}), path=ACCOUNT_CREDITS)
    )


@pytest.mark.parametrize(
    "body", ['{"credits": null}', '{"account": null}', '{"account": {}}', "[]"]
)
def test_an_account_without_credits_is_an_unexpected_response(body: str) -> None:
    """An account without its balance is of no use."""
    assert isinstance(error(body, path=ACCOUNT_CREDITS), UnexpectedResponseError)


def test_both_response_shapes_are_read_at_both_endpoints() -> None:
    """Both shapes have been seen at both."""
    assert balance('{"account": {"credits": 7}}').credits == 7
    assert balance('{"credits": 7, "account": {"credits": 8}}').credits == 7
    flat = read('{"credits": 7, "recurring_credits": 9}', path=ACCOUNT_CREDITS)
    assert isinstance(flat, Account)
    assert (flat.credits, flat.recurring_credits, flat.extra) == (Decimal(7), Decimal(9), {})
