"""Bodies: exact numbers, their bounds, and all that is not a document."""

from __future__ import annotations

import decimal
from decimal import Decimal

import pytest

from crustcredits import APIConnectionError, UnexpectedResponseError
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import Response, read_response
from tests.http.responses import KEY, NOW, balance, error


@pytest.mark.parametrize(
    "text", ["9406", "138940.37", "12345678901234567890.123456", "0", "-3.5", "1E+3", "0.10"]
)
def test_credits_are_exact_to_the_last_digit(text: str) -> None:
    """The number never passes through a binary float."""
    found = balance(f'{{"credits": {text}}}')
    assert found.credits == Decimal(text)
    assert str(found.credits) == str(Decimal(text))
    assert (found.key, found.checked_at, found.request_id, found.rate_limit) == (
        KEY,
        NOW,
        None,
        None,
    )


def test_a_byte_order_mark_and_unknown_fields_are_ignored() -> None:
    """Only missing credits are a failure."""
    assert balance('\ufeff {"credits": 1, "plan": "pro"} ').credits == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "something that is not JSON"),
        ("<html>", "something that is not JSON"),
        ('{"credits": 1', "something that is not JSON"),
        (b"\xff\xfe", "something that is not JSON"),
        ("[" * 60_000, "something that is not JSON"),
        ("[1]", "no number of credits"),
        ("{}", "no number of credits"),
        ('{"credits": null}', "no number of credits"),
        ('{"credits": true}', "no number of credits"),
        ('{"credits": "9406"}', "no number of credits"),
        ('{"credits": NaN}', "a number that cannot be credits"),
        ('{"credits": Infinity}', "a number that cannot be credits"),
        ('{"credits": 1E+999999999}', "a number that cannot be credits"),
        ('{"credits": 1e-99}', "a number that cannot be credits"),
        ('{"credits": 1E+99999999999999999999}', "a number that cannot be credits"),
        ('{"credits": 0E-50000000}', "a number that cannot be credits"),
        (f'{{"credits": {"9" * 5000}}}', "a number that cannot be credits"),
        (None, "more than 64 KiB"),
    ],
)
def test_a_body_without_a_balance_is_an_unexpected_response(
    body: str | bytes | None, said: str
) -> None:
    """A missing number never counts as zero."""
    found = error(body, x_request_id="r-1")
    assert isinstance(found, UnexpectedResponseError)
    assert said in str(found)
    assert (found.status, found.request_id) == (200, "r-1")


def test_an_undelimited_body_that_is_cut_short_is_a_connection_error() -> None:
    """A complete body of the wrong shape is still an unexpected response."""
    for body in (
        b"",
        b'{"credits": 94',
        b'{"account": {"credits": 1}',
        b'{"cred',
        "\ufeff{".encode(),
    ):
        found = read_response(
            USER_CREDITS, KEY, Response(200, {}, body, framed=False), now=NOW, period=60.0
        )
        assert isinstance(found, APIConnectionError)
        assert "the body is cut short" in str(found)
    whole: list[tuple[bytes | None, bool]] = [
        (None, False),
        (b"<html>", False),
        (b'{"credits": 94', True),
        (b"{}", False),
        (b'{"credits": NaN}', False),
    ]
    whole += [
        (b'{"credits": 1, "credits": 2}', False),
        (b"{'credits': 1}", False),
        (b"[" * 60_000, False),
    ]
    for other, framed in whole:
        found = read_response(
            USER_CREDITS, KEY, Response(200, {}, other, framed=framed), now=NOW, period=60.0
        )
        assert isinstance(found, UnexpectedResponseError)


@pytest.mark.parametrize("text", ["1e99999999999999999999", "1E+999999999", "NaN"])
def test_parsing_does_not_depend_on_the_callers_decimal_context(text: str) -> None:
    """A context without traps would make a NaN of invalid text."""
    with decimal.localcontext(decimal.ExtendedContext):
        assert isinstance(error(f'{{"credits": {text}}}'), UnexpectedResponseError)
    with decimal.localcontext(decimal.Context(prec=2)):
        assert balance('{"credits": 138940.37}').credits == Decimal("138940.37")


def test_json_with_a_duplicate_name_is_refused() -> None:
    """The API does not document which of the two would be right."""
    found = error('{"credits": 1, "credits": 2}')
    assert isinstance(found, UnexpectedResponseError)
    assert "JSON in which a name occurs twice" in str(found)
    assert isinstance(
        error('{"account": {"credits": 1, "a": {"b": 1, "b": 2}}}', path=ACCOUNT_CREDITS),
        UnexpectedResponseError,
    )
