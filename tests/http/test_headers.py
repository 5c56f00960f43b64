"""The rate limit's status, and the wait that a response asks for."""

from __future__ import annotations

import pytest

from crustcredits import InternalServerError, RateLimitError, RateLimitStatus
from tests.http.responses import balance, error


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


def test_a_503_asks_to_wait_by_retry_after_only() -> None:
    """Its `x-ratelimit-reset` is about the window, not about the outage."""
    found = error("", status=503, Retry_After="17", x_ratelimit_reset="60")
    assert isinstance(found, InternalServerError)
    assert found.retry_after == 17
    without = error("", status=503, x_ratelimit_reset="60")
    assert isinstance(without, InternalServerError)
    assert without.retry_after is None
