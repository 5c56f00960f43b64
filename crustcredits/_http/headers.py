"""The headers of a response: the rate limit's status, the server's wait and the request id.

This module must not know bodies or errors. It takes the time of arrival, and reads no clock.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from crustcredits._http.redaction import clean
from crustcredits._keys.api_key import ApiKey
from crustcredits._rate_limit_status import RateLimitStatus


def read_details(headers: Mapping[str, str], key: ApiKey) -> dict[str, Any]:
    """The fields that models and errors take from the headers of every response."""
    return {
        "request_id": clean(headers.get("x-request-id"), key),
        "rate_limit": read_rate_limit(headers),
    }


def read_rate_limit(headers: Mapping[str, str]) -> RateLimitStatus | None:
    """The `x-ratelimit-*` headers, or None when none of them is a number.

    Source: Crustdata's best-practices page.
    """
    limit = _whole(headers.get("x-ratelimit-limit"))
    remaining = _whole(headers.get("x-ratelimit-remaining"))
    reset = _seconds(headers.get("x-ratelimit-reset"))
    if reset is not None and math.isinf(reset):  # JSON has no infinity
        reset = None
    if limit is None and remaining is None and reset is None:
        return None
    return RateLimitStatus(limit=limit, remaining=remaining, reset=reset)


def read_refusal_wait(headers: Mapping[str, str], *, now: datetime, period: float) -> float | None:
    """Seconds that a refusal (429) asks to wait; None when its headers name no wait.

    The longer of `x-ratelimit-reset`, "wait that many seconds" (best-practices page), and
    `Retry-After`. A slot of a window frees within the window, so a reset counts as at most
    `period` seconds, even where the server sends an epoch.
    """
    reset = _seconds(headers.get("x-ratelimit-reset"))
    reset_wait = None if reset is None else min(max(reset, 0.0), period)
    waits = [wait for wait in (reset_wait, read_retry_after(headers, now=now)) if wait is not None]
    return max(waits, default=None)


def read_retry_after(headers: Mapping[str, str], *, now: datetime) -> float | None:
    """Seconds that `Retry-After` asks to wait, from seconds or a date; None without a usable one.

    Gateways send this header; for the API it is unverified. The wait is not tied to a window, so
    its length has no bound.
    """
    wait = _seconds(headers.get("Retry-After"))
    if wait is None:
        wait = _seconds_until(headers.get("Retry-After"), now)
    return None if wait is None or math.isinf(wait) else max(wait, 0.0)


def _seconds(text: str | None) -> float | None:
    if text is not None and len(text) < _SHORT_NUMBER and text.isascii() and text.isdigit():
        return _short_seconds(text)
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return None if math.isnan(seconds) else seconds


def _whole(text: str | None) -> int | None:
    if text is None or len(text) >= 20 or not (text.isascii() and text.isdigit()):
        return None
    return _short_number(text) if len(text) < _SHORT_NUMBER else int(text)


# Numbers with fewer digits are parsed once and memoized: most responses repeat the same few.
_SHORT_NUMBER = 7
_short_number = functools.lru_cache(maxsize=1_024)(int)
_short_seconds = functools.lru_cache(maxsize=1_024)(float)


def _seconds_until(date: str | None, now: datetime) -> float | None:
    try:
        moment = parsedate_to_datetime(date or "")
        return (moment.replace(tzinfo=moment.tzinfo or UTC) - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
