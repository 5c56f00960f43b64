"""Requests and responses as values: no loop, no clock, no socket."""

from __future__ import annotations

import decimal
import json
import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from crustcredits import (
    Account,
    APIConnectionError,
    ApiKey,
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    Balance,
    ConfigurationError,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    MissingKeyError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitError,
    RateLimitStatus,
    UnexpectedResponseError,
    __version__,
)
from crustcredits._http.addresses import (
    ACCOUNT_CREDITS,
    USER_CREDITS,
    parse_base_url,
    proxy_problem,
)
from crustcredits._http.environment import api_origin
from crustcredits._http.protocol import Response, read_response, request_headers

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = ApiKey("sk-0123456789", name="prod")


def read(
    body: str | bytes | None, *, status: int = 200, path: str = USER_CREDITS, **headers: str
) -> Balance | CrustCreditsError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body.encode() if isinstance(body, str) else body
    return read_response(path, KEY, Response(status, named, raw), now=NOW, period=60.0)


def balance(body: str, **headers: str) -> Balance:
    result = read(body, **headers)  # type: ignore[arg-type]  # headers only
    assert isinstance(result, Balance)
    return result


def account(**fields: Any) -> Account:
    result = read(json.dumps({"account": {"credits": 1} | fields}), path=ACCOUNT_CREDITS)
    assert isinstance(result, Account)
    return result


def error(body: str | bytes | None, **options: Any) -> CrustCreditsError:
    result = read(body, **options)
    assert isinstance(result, CrustCreditsError)
    assert result.key_name == "prod"
    return result


# --- requests


def test_a_request_carries_the_key_the_api_version_and_the_user_agent() -> None:
    """The API documents `Bearer`; both endpoints get the version."""
    assert request_headers(KEY) == {
        "Authorization": "Bearer sk-0123456789",
        "x-api-version": "2025-11-01",
        "user-agent": f"crustcredits/{__version__}",
    }


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://api.crustdata.com", "https://api.crustdata.com"),
        ("https://API.crustdata.com/", "https://api.crustdata.com"),
        (" https://proxy.example:8443 ", "https://proxy.example:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.3.2.1", "http://127.3.2.1"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_a_base_url_is_an_origin(given: str, origin: str) -> None:
    """https to any host, or http to loopback."""
    assert parse_base_url(given) == origin
    assert proxy_problem(given.strip()) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://api.crustdata.com", "is plain http"),
        ("http://127.0.0.1.example", "is plain http"),
        ("https://api.crustdata.com/v2", "has a path, query or fragment"),
        ("https://api.crustdata.com?x=1", "has a path, query or fragment"),
        ("https://api.crustdata.com#x", "has a path, query or fragment"),
        ("https://user:sk-secret@api.crustdata.com", "holds credentials"),
        ("api.crustdata.com", "has no http"),
        ("ftp://api.crustdata.com", "has no http"),
        ("https://", "has no http"),
        ("https://api crustdata.com", "has white space"),
        ("https://api.crustdata.com:port", "is not a URL"),
        ("https://a..b", "is not a URL"),
        (b"https://api.crustdata.com", "must be a str, not bytes"),
    ],
)
def test_any_other_base_url_is_refused_with_the_reason(given: str, said: str) -> None:
    """The URL is not repeated, because it may hold credentials."""
    refusal = parse_base_url(given)
    assert isinstance(refusal, ConfigurationError)
    assert f"base_url {said}" in str(refusal)
    assert "sk-secret" not in str(refusal)


@pytest.mark.parametrize("given", [5, "", "proxy", "ftp://proxy", "http://[", "http://"])
def test_a_proxy_that_is_not_a_url_is_refused(given: object) -> None:
    """The value is not repeated, because it may hold credentials."""
    assert "give it as http://host:port" in str(proxy_problem(given))
    assert proxy_problem(None) is None


def test_the_base_url_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument wins, and errors name the variable."""
    monkeypatch.delenv("CRUSTDATA_API_URL", raising=False)
    assert api_origin(None) == "https://api.crustdata.com"
    monkeypatch.setenv("CRUSTDATA_API_URL", " ")
    assert api_origin(None) == "https://api.crustdata.com"
    monkeypatch.setenv("CRUSTDATA_API_URL", " http://localhost:1 ")
    assert api_origin(None) == "http://localhost:1"
    assert api_origin("https://other.example") == "https://other.example"
    monkeypatch.setenv("CRUSTDATA_API_URL", "http://api.crustdata.com")
    assert "CRUSTDATA_API_URL is plain http" in str(api_origin(None))


# --- balances


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


# --- accounts


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
    assert "prod: the account's recurring_credits_refresh_date is no date" in caplog.text


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


def test_a_secret_echoed_by_the_server_is_masked() -> None:
    """In values and names, URL-quoted and in another case."""
    echo = KEY.get_secret_value()
    found = account(
        api_key=echo,
        wallets=[{f"of {echo}": [echo.upper()]}],
        recurring_credits_frequency=f"x{echo}",
        credit_topups=[1],
    )
    assert "sk-0123456789" not in repr(found).lower()
    assert found.extra == {"api_key": "***"}
    foreign = read_response(
        USER_CREDITS,
        KEY,
        Response(403, {}, f'{{"message": "é {echo.upper()}"}}'.encode()),
        now=NOW,
        period=60.0,
    )
    assert "***" in str(foreign)
    assert echo not in str(foreign).lower()
    quoted = ApiKey("sk/0123456789+x", name="prod")
    refused = read_response(
        USER_CREDITS,
        quoted,
        Response(403, {}, b'{"message": "SK%2F0123456789%2bX"}'),
        now=NOW,
        period=60.0,
    )
    assert str(refused) == "prod: *** (HTTP 403)"


def test_an_account_nested_too_deeply_is_an_unexpected_response() -> None:
    """Printing or copying it would exceed the recursion limit."""
    assert account(wallets=[[[[[[{"a": [1]}]]]]]]).wallets
    nested: Any = 1
    for _ in range(600):
        nested = [nested]
    assert "nested" in str(
        error(json.dumps({"account": {"credits": 1, "wallets": nested}}), path=ACCOUNT_CREDITS)
    )


@pytest.mark.parametrize(
    "body", ['{"credits": null}', '{"account": null}', '{"account": {}}', "[]"]
)
def test_an_account_without_credits_is_an_unexpected_response(body: str) -> None:
    """An account without its balance is of no use."""
    assert isinstance(error(body, path=ACCOUNT_CREDITS), UnexpectedResponseError)


# --- headers


def test_the_rate_limit_is_read_from_every_response() -> None:
    """Balances and errors carry it, with the request id."""
    headers = {
        "x_ratelimit_limit": "30",
        "x_ratelimit_remaining": "29",
        "x_ratelimit_reset": "60",
        "x_request_id": "r-9",
    }
    expected = RateLimitStatus(limit=30, remaining=29, reset=60.0)
    good, bad = balance('{"credits": 1}', **headers), error("{}", status=401, **headers)
    assert (
        (good.rate_limit, good.request_id) == (bad.rate_limit, bad.request_id) == (expected, "r-9")
    )


@pytest.mark.parametrize("nonsense", ["", "many", "-1", "1.5", "NaN", "\u0663", "9" * 30])
def test_rate_limit_headers_that_are_not_numbers_are_left_out(nonsense: str) -> None:
    """They are neither believed nor raised."""
    found = balance('{"credits": 1}', x_ratelimit_limit=nonsense, x_ratelimit_remaining="3")
    assert found.rate_limit == RateLimitStatus(limit=None, remaining=3, reset=None)
    assert balance('{"credits": 1}', x_ratelimit_limit=nonsense).rate_limit is None
    assert balance('{"credits": 1}', x_ratelimit_reset="inf").rate_limit is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"x_ratelimit_reset": "7"}, 7.0),
        ({"x_ratelimit_reset": "7", "Retry_After": "30"}, 30.0),
        ({"x_ratelimit_reset": "30", "Retry_After": "7"}, 30.0),
        ({"x_ratelimit_reset": "0.5"}, 0.5),
        ({"x_ratelimit_reset": "-3"}, 0.0),
        ({"x_ratelimit_reset": "1767268800"}, 60.0),
        ({"x_ratelimit_reset": "inf"}, 60.0),
        ({"x_ratelimit_reset": "soon", "Retry_After": "30"}, 30.0),
        ({"x_ratelimit_reset": "nan", "Retry_After": "120"}, 120.0),
        ({"Retry_After": "3600"}, 3600.0),
        ({"Retry_After": "inf"}, None),
        ({"Retry_After": "Thu, 01 Jan 2026 12:00:20 GMT"}, 20.0),
        ({"Retry_After": "Thu, 01 Jan 2026 12:00:20 -0000"}, 20.0),
        ({"Retry_After": "Thu, 01 Jan 2026 11:00:00 GMT"}, 0.0),
        ({"Retry_After": "Thu, 01 Jan 2099 12:00:00 GMT"}, 2_303_683_200.0),
        ({"Retry_After": "later"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_the_longer_of_the_reset_and_the_retry_after_header(
    headers: dict[str, str], seconds: float | None
) -> None:
    """The reset counts as at most the window."""
    found = error('{"message": "slow down"}', status=429, **headers)
    assert isinstance(found, RateLimitError)
    assert found.retry_after == seconds


# --- failures


@pytest.mark.parametrize(
    ("status", "body", "kind", "said"),
    [
        (
            400,
            '{"error": {"type": "x", "message": "no version", "metadata": {}}}',
            BadRequestError,
            "no version",
        ),
        (401, '{"message": "Missing API key in request"}', MissingKeyError, "Missing API key"),
        (401, '{"message": "Invalid API key in request"}', InvalidKeyError, "Invalid API key"),
        (401, '{"detail": "Who are you?"}', AuthenticationError, "Who are you?"),
        (401, "{}", AuthenticationError, "does not accept the key"),
        (
            402,
            '{"error": {"type": "insufficient_credits", "message": "none left"}}',
            PaymentRequiredError,
            "none left",
        ),
        (
            403,
            '{"error": {"type": "permission_error", "reason": "not yours"}}',
            PermissionDeniedError,
            "not yours",
        ),
        (404, '{"description": "gone"}', APIStatusError, "gone"),
        (418, '{"reason": "teapot"}', APIStatusError, "teapot"),
        (429, "<html>", RateLimitError, "over its rate limit"),
        (429, '{"error": "slow down"}', RateLimitError, "slow down"),
        (500, '{"non_field_errors": ["broken"]}', InternalServerError, "broken"),
        (502, "<html>502</html>", InternalServerError, "a gateway before it failed"),
        (503, None, InternalServerError, "a gateway before it failed"),
        (599, '{"non_field_errors": []}', InternalServerError, "a gateway before it failed"),
    ],
)
def test_each_error_status_has_its_own_error_class(
    status: int, body: str | None, kind: type[APIStatusError], said: str
) -> None:
    """The message is the API's own where the body has one."""
    found = error(body, status=status)
    assert type(found) is kind
    assert isinstance(found, APIStatusError)
    assert found.status == status
    assert said in str(found)
    assert str(found).startswith("prod: ")
    assert str(found).endswith(f"(HTTP {status})")


@pytest.mark.parametrize("status", [204, 301, 302, 307, 600])
def test_a_redirect_or_an_undocumented_status_is_an_unexpected_response(status: int) -> None:
    """No redirect is followed, and an empty success is no balance."""
    found = error("", status=status)
    assert isinstance(found, UnexpectedResponseError)
    assert found.status == status


def test_a_message_of_the_server_is_made_fit_for_a_log_line() -> None:
    """It is one bounded line, and an echoed secret is masked."""
    said = json.dumps({"message": "bad key sk-0123456789\n\x1b[31m" + "x" * 1000})
    found = error(said, status=401, x_request_id="r sk-0123456789")
    assert "sk-0123456789" not in str(found) + str(found.request_id)
    assert "bad key ***" in str(found)
    assert str(found).isprintable()
    assert len(found.message) <= 300
    assert found.request_id == "r ***"
    assert error("{}", status=401, x_request_id="\x00 \x01").request_id is None


@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize(
    "body", ["", "<html>Just a moment...</html>", '"no"', '["no"]', '{"message": "cut', None]
)
def test_401_402_and_403_without_a_json_object_are_gateway_errors(
    status: int, body: str | None
) -> None:
    """Only a JSON object speaks for the API."""
    found = error(body, status=status, x_request_id="r-1")
    assert type(found) is GatewayError
    assert (found.status, found.request_id, found.rate_limit) == (status, "r-1", None)
    assert str(found).startswith("prod: a gateway answered in the API's place")
    assert str(found).endswith(f"(HTTP {status})")


def test_a_503_asks_to_wait_by_retry_after_only() -> None:
    """Its `x-ratelimit-reset` is about the window, not about the outage."""
    found = error("", status=503, Retry_After="17", x_ratelimit_reset="60")
    assert isinstance(found, InternalServerError)
    assert found.retry_after == 17
    without = error("", status=503, x_ratelimit_reset="60")
    assert isinstance(without, InternalServerError)
    assert without.retry_after is None


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
    whole: list[tuple[bytes, bool]] = [
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
    for body, framed in whole:
        found = read_response(
            USER_CREDITS, KEY, Response(200, {}, body, framed=framed), now=NOW, period=60.0
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
    assert "JSON with a duplicate name" in str(found)
    assert isinstance(
        error('{"account": {"credits": 1, "a": {"b": 1, "b": 2}}}', path=ACCOUNT_CREDITS),
        UnexpectedResponseError,
    )


def test_a_lone_surrogate_is_replaced() -> None:
    """No encoding could write it, and the balance is kept."""
    found = read(
        '{"account": {"credits": 1, "plan\\ud800": "a\\udfffb", "wallets": ["\\ud83d\\ude00"]}}',
        path=ACCOUNT_CREDITS,
    )
    assert isinstance(found, Account)
    assert found.extra == {"plan\ufffd": "a\ufffdb"}
    assert found.wallets == ["\U0001f600"]
    json.dumps(found.to_dict(), ensure_ascii=False).encode()


def test_both_response_shapes_are_read_at_both_endpoints() -> None:
    """Both shapes have been seen at both."""
    assert balance('{"account": {"credits": 7}}').credits == 7
    assert balance('{"credits": 7, "account": {"credits": 8}}').credits == 7
    flat = read('{"credits": 7, "recurring_credits": 9}', path=ACCOUNT_CREDITS)
    assert isinstance(flat, Account)
    assert (flat.credits, flat.recurring_credits, flat.extra) == (Decimal(7), Decimal(9), {})
