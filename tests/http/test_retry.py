"""When to try again, and after how long."""

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
    """The longest that the jitter can draw."""
    assert low == 0
    return high


@pytest.mark.parametrize(
    "error", [APIConnectionError("x"), APITimeoutError("x"), InternalServerError("x", status=503)]
)
def test_what_may_pass_is_tried_again_with_full_jitter(error: CrustCreditsError) -> None:
    """The bound doubles each time up to the maximum, and the attempts are counted."""
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
def test_what_will_not_pass_is_not_tried_again(error: CrustCreditsError) -> None:
    """It would cost tokens and change nothing."""
    assert retry_delay(Retry(), error, 1, longest) is None


def test_a_refused_key_waits_what_it_was_told_and_a_jitter_more() -> None:
    """So that keys refused together do not come back together."""
    retry = Retry(wait_max=65.0)
    assert retry_delay(retry, RateLimitError("x", retry_after=60.0), 1, longest) == 60.25
    assert retry_delay(retry, RateLimitError("x", retry_after=0.0), 2, longest) == 0.5
    assert retry_delay(retry, RateLimitError("x"), 2, longest) == 0.5


def test_a_refusal_that_asks_for_too_long_a_wait_is_raised() -> None:
    """The error carries the wait."""
    assert (
        retry_delay(Retry(wait_max=30.0), RateLimitError("x", retry_after=31.0), 1, longest) is None
    )


def test_endless_attempts_do_not_overflow() -> None:
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
def test_a_retry_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    """At once, by name."""
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Retry(**options)


def test_a_refresh_pauses_after_each_failure() -> None:
    """For what the server asked and a jitter whose bound doubles up to the cap.

    There is no last time.
    """
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
