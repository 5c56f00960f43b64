"""Retry decisions and backoff."""

from __future__ import annotations

from typing import Any

import pytest

from crustcredits import (
    APIConnectionError,
    APITimeoutError,
    ConfigurationError,
    CrustCreditsError,
    InternalServerError,
    InvalidKeyError,
    PaymentRequiredError,
    RateLimitError,
    RateLimitWaitError,
    Retry,
    UnexpectedResponseError,
)
from crustcredits._http.retry import refresh_delay, retry_delay


def longest(low: float, high: float) -> float:
    """The longest delay that the jitter can draw."""
    assert low == 0
    return high


@pytest.mark.parametrize(
    "error", [APIConnectionError("x"), APITimeoutError("x"), InternalServerError("x", status=503)]
)
def test_transient_failures_are_retried_with_full_jitter(error: CrustCreditsError) -> None:
    """The bound doubles up to `backoff_max`, and `attempts` ends the retries."""
    retry = Retry(attempts=8, backoff=0.25, backoff_max=8.0)
    assert [retry_delay(retry, error, made, longest) for made in range(1, 9)] == [
        0.25,
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
        8.0,
        None,
    ]
    assert retry_delay(retry, error, 1, lambda low, high: low) == 0
    assert 0 <= (retry_delay(retry, error, 1) or 0) <= 0.25


@pytest.mark.parametrize(
    "error",
    [
        InvalidKeyError("x", status=401),
        PaymentRequiredError("x", status=402),
        UnexpectedResponseError("x", status=200),
    ],
)
def test_permanent_failures_are_not_retried(error: CrustCreditsError) -> None:
    """A retry would cost tokens and change nothing."""
    assert retry_delay(Retry(), error, 1, longest) is None


def test_a_refused_key_waits_the_servers_time_plus_jitter() -> None:
    """Keys refused together do not retry together."""
    retry = Retry(wait_max=65.0)
    assert retry_delay(retry, RateLimitError("x", retry_after=60.0), 1, longest) == 60.25
    assert retry_delay(retry, RateLimitError("x", retry_after=0.0), 2, longest) == 0.5
    assert retry_delay(retry, RateLimitError("x"), 2, longest) == 0.5


def test_a_refusal_that_asks_for_more_than_wait_max_is_raised() -> None:
    """The error carries the wait."""
    assert (
        retry_delay(Retry(wait_max=30.0), RateLimitError("x", retry_after=31.0), 1, longest) is None
    )


def test_many_attempts_do_not_overflow_the_backoff() -> None:
    """2.0 to the power of 1024 would."""
    assert retry_delay(Retry(attempts=10_000), APIConnectionError("x"), 9_000, longest) == 8.0


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"backoff": -1},
        {"backoff_max": float("inf")},
        {"wait_max": "60"},
    ],
)
def test_a_retry_with_an_unusable_value_is_refused(options: dict[str, Any]) -> None:
    """The error names the option."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retry(**options)


def test_a_background_refresh_backs_off_after_each_failure() -> None:
    """It waits the server's time, at most 60 s, plus jitter, without a last attempt."""
    retry = Retry(attempts=1, backoff=1.0, backoff_max=8.0, wait_max=5.0)
    down = InternalServerError("down", status=503)
    assert [
        refresh_delay(retry, down, failures, longest) for failures in (1, 2, 3, 4, 5, 2000)
    ] == [1, 2, 4, 8, 8, 8]
    assert refresh_delay(retry, RateLimitError("slow", retry_after=50.0), 1, longest) == 51
    assert refresh_delay(retry, RateLimitError("slow"), 1, longest) == 1
    assert (
        refresh_delay(
            retry, InternalServerError("slow", status=503, retry_after=86_400.0), 1, longest
        )
        == 61
    )


def test_a_call_that_was_not_sent_is_not_tried_again() -> None:
    """Its time is over, or nothing may be sent."""
    assert retry_delay(Retry(), RateLimitWaitError("x", wait=1.0), 1) is None
