"""The API without I/O: builds a request from a key, and reads a response as a model or an error.

A response is (status, headers, body, now). This module must not know aiohttp, asyncio or a clock.
It holds every fact of the API that the library relies on, with its source.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Context, Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Final
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

import attrs

from crustcredits import _errors
from crustcredits._errors import (
    APIConnectionError,
    APIStatusError,
    ConfigurationError,
    CrustCreditsError,
    GatewayError,
    RateLimitError,
    UnexpectedResponseError,
)
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Account, Balance
from crustcredits._rate_limit_status import RateLimitStatus
from crustcredits._version import __version__

_log = logging.getLogger("crustcredits")

DEFAULT_BASE_URL: Final = "https://api.crustdata.com"
BASE_URL_VARIABLE: Final = "CRUSTDATA_API_URL"

USER_CREDITS: Final = "/user/credits"
ACCOUNT_CREDITS: Final = "/account/credits"

# API introduction: a missing version "can default to the latest"; API reference: /account/credits
# answers 400 without one.
API_VERSION: Final = "2025-11-01"

# Bytes. A balance is a few hundred bytes; a body near this bound is not a balance.
MAX_BODY: Final = 64 * 1024

# `1E+999999999` and 5,000-digit integers are valid JSON, and would stall or break arithmetic. No
# balance comes near these bounds.
MAX_NUMBER_TEXT: Final = 64
MAX_EXPONENT: Final = 64

# Levels of nesting: deeper than any account, and shallow enough to print and copy.
MAX_DEPTH: Final = 16

_MAX_MESSAGE = 300
_USER_AGENT = f"crustcredits/{__version__}"


@attrs.frozen(slots=True)
class Response:
    """One response; `body` is None when it was larger than `MAX_BODY`.

    `framed` is whether the headers delimit the body. Otherwise the end of the connection delimits
    it, so a lost connection can cut the body short unnoticed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes | None
    framed: bool = True


def request_headers(key: ApiKey) -> dict[str, str]:
    """The headers of a request; built right before sending, because they hold the secret."""
    return {
        "Authorization": f"Bearer {key.get_secret_value()}",
        "x-api-version": API_VERSION,
        "user-agent": _USER_AGENT,
    }


def parse_base_url(
    base_url: str | None, environ: Mapping[str, str] | None = None
) -> str | ConfigurationError:
    """The origin to send to: the argument, else `CRUSTDATA_API_URL`, else the API's own.

    Returns an error when the URL is not `https://host[:port]`; plain `http` is accepted for
    loopback only. The error is not raised, because the URL may hold credentials.
    """
    source = "base_url"
    if base_url is None:
        base_url = (os.environ if environ is None else environ).get(
            BASE_URL_VARIABLE, ""
        ).strip() or DEFAULT_BASE_URL
        source = BASE_URL_VARIABLE
    origin, problem = _origin_or_problem(base_url)
    return (
        origin
        if problem is None
        else ConfigurationError(f"{source} {problem}; give it as https://host or https://host:port")
    )


def proxy_from_env(origin: str) -> str | None:
    """The proxy for `origin` from the environment: `HTTPS_PROXY` and the like, else None.

    None also when `NO_PROXY` excludes the origin, and for plain http, which stays on this machine:
    a proxy elsewhere would see the key.
    """
    parts = urlsplit(origin)
    if parts.scheme != "https" or proxy_bypass(f"{parts.hostname}:{parts.port or 443}"):
        return None
    proxies = getproxies_environment()
    proxy = proxies.get("https") or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def proxy_problem(proxy: object, source: str = "proxy") -> ConfigurationError | None:
    """The problem of a proxy's URL, or None; the URL may hold credentials and is not repeated."""
    if proxy is None:
        return None
    try:
        parts = urlsplit(proxy) if isinstance(proxy, str) else None
        usable = (
            parts is not None
            and parts.scheme in {"http", "https"}
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ValueError:  # also from an invalid port
        usable = False
    remedy = "" if source == "proxy" else ", or exclude the API with NO_PROXY=api.crustdata.com"
    return (
        None
        if usable
        else ConfigurationError(
            f"{source} is not an http(s) URL; give it as http://host:port{remedy}"
        )
    )


def _origin_or_problem(base_url: object) -> tuple[str, str | None]:
    if not isinstance(base_url, str):
        return "", f"must be a str, not {type(base_url).__name__}"
    try:
        parts = urlsplit(base_url.strip())
        port = "" if parts.port is None else f":{parts.port}"
        (parts.hostname or "").encode("idna")
    except ValueError:
        return "", "is not a URL"
    problem = _url_problem(parts)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}", problem


def _url_problem(parts: SplitResult) -> str | None:
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return "has no http(s) scheme and host"
    if re.search(r"[\s\x00-\x20\x7f]", parts.netloc):
        return "has white space in its host"
    if "@" in parts.netloc:
        return "holds credentials; keys are given to each call, never in the URL"
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        return "has a path, query or fragment; the client adds the paths of the API itself"
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        return (
            "is plain http, which would show every key to the network; use https (http is for "
            "loopback only)"
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def read_response(
    path: str, key: ApiKey, response: Response, *, now: datetime, period: float
) -> Balance | CrustCreditsError:
    """Read a response: a `Balance`, an `Account` for `ACCOUNT_CREDITS`, or the error, not raised.

    `now` is the time of arrival; `period`, in seconds, bounds the wait that `x-ratelimit-reset` may
    ask for.
    """
    if response.status != 200:
        return _read_failure(key, response, now, period)
    document, problem = _parse(response.body)
    if problem is not None and _is_cut_short(response):
        message = "the connection failed while the answer came (the body is cut short)"
        return APIConnectionError(
            message, key_name=key.label, **read_details(response.headers, key)
        )
    if problem is None:
        document, problem = (
            _user_of(document) if path == USER_CREDITS else _account_of(document, key)
        )
    credits = document.get("credits") if isinstance(document, dict) else None
    if not isinstance(credits, Decimal):
        message = f"the API answered with {problem or 'no number of credits'}"
        return UnexpectedResponseError(
            message, key_name=key.label, status=200, **read_details(response.headers, key)
        )
    request_id, rate_limit = (
        _clean(response.headers.get("x-request-id"), key),
        read_rate_limit(response.headers),
    )
    model, more = (
        (Account, _account_fields(document, key)) if path == ACCOUNT_CREDITS else (Balance, {})
    )
    return model(
        key=key,
        credits=credits,
        checked_at=now,
        request_id=request_id,
        rate_limit=rate_limit,
        **more,
    )


def read_details(headers: Mapping[str, str], key: ApiKey) -> dict[str, Any]:
    """The fields that models and errors take from the headers of every response."""
    return {
        "request_id": _clean(headers.get("x-request-id"), key),
        "rate_limit": read_rate_limit(headers),
    }


# --- numbers and documents

# Our own context: under a caller's context without traps, invalid text would become a NaN.
_CONTEXT = Context(traps=[InvalidOperation])


class _UnusableNumberError(ValueError):
    pass


class _TwiceError(ValueError):
    pass


def _number(text: str) -> Decimal:
    if len(text) > MAX_NUMBER_TEXT:
        raise _UnusableNumberError
    try:
        number = Decimal(text, _CONTEXT)
    except InvalidOperation:  # an exponent of twenty digits
        raise _UnusableNumberError from None
    # Applies to zero as well: written out, 0E-50000000 takes 50 MB.
    if abs(number.adjusted()) > MAX_EXPONENT:
        raise _UnusableNumberError
    return number


def _no_constant(text: str) -> Any:
    raise _UnusableNumberError


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise _TwiceError
    return document


# JSON's white space, and a byte-order mark.
_AROUND_JSON = " \t\r\n\ufeff"
_DECODER = json.JSONDecoder(
    parse_float=_number, parse_int=_number, parse_constant=_no_constant, object_pairs_hook=_once
)
# `raw_decode` without the cost of one more function call.
_scan: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]


def _parse(body: bytes | None) -> tuple[Any, str | None]:
    if body is None:
        return None, f"more than {MAX_BODY // 1024} KiB, which is too large for a balance"
    try:
        text = body.decode().strip(_AROUND_JSON)
        document, end = _scan(text, 0)
        return (document, None) if end == len(text) else (None, "something that is not JSON")
    except _TwiceError:
        return None, "JSON with a duplicate name"
    except _UnusableNumberError:
        return None, "a number that cannot be credits (NaN, infinite or absurdly long)"
    except (ValueError, RecursionError, StopIteration):
        return None, "something that is not JSON"


def _is_cut_short(response: Response) -> bool:
    """Whether a body ended with the connection, in the middle of an object."""
    if response.framed or response.body is None:
        return False
    text = response.body.decode(errors="replace").strip(_AROUND_JSON)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return not text or (text[0] == "{" and (error.pos >= len(text) or text[-1] != "}"))
    except (ValueError, RecursionError):
        return False
    return False


def _user_of(document: Any) -> tuple[Any, str | None]:
    """The object that holds the credits: the document, or the account in it.

    Both shapes have been seen at both addresses.
    """
    if (
        isinstance(document, dict)
        and "credits" not in document
        and isinstance(document.get("account"), dict)
    ):
        return document["account"], None
    return document, None


def _account_of(document: Any, key: ApiKey) -> tuple[Any, str | None]:
    account = document.get("account") if isinstance(document, dict) else None
    if account is None and isinstance(document, dict) and "credits" in document:
        account = document  # the flat shape; see `_user_of`
    if not isinstance(account, dict):
        return None, "no account"
    if _is_deeper(account, MAX_DEPTH):
        return None, "an absurdly nested account"
    return _without_secret(account, key), None


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [part for item in level for part in _parts(item)]
    return bool(level)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


# A lone surrogate: JSON can escape it, but no encoding can write it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_secret(value: Any, key: ApiKey) -> Any:
    """A part of a document as sent, with the secret masked and lone surrogates replaced."""
    if isinstance(value, str):
        return _hide(_SURROGATE.sub("\ufffd", value), key)
    if isinstance(value, dict):
        return {
            _without_secret(name, key): _without_secret(part, key) for name, part in value.items()
        }
    return [_without_secret(part, key) for part in value] if isinstance(value, list) else value


def _account_fields(account: dict[str, Any], key: ApiKey) -> dict[str, Any]:
    fields = {
        name: account[name]
        for name, kind in _ACCOUNT_FIELDS.items()
        if isinstance(account.get(name), kind)
    }
    kept = {"credits", *fields, *(name for name in _ACCOUNT_FIELDS if account.get(name) is None)}
    # An informational field must not cost the balance: a field of an undocumented kind goes into
    # `extra` as sent.
    extra = {name: value for name, value in account.items() if name not in kept}
    for name in extra.keys() & _ACCOUNT_FIELDS.keys():
        _log.warning(
            "%s: the account's %s is not of the documented kind; read it in extra",
            key.label,
            name,
        )
    _read_refresh_date(fields, extra, key)
    return fields | {"extra": extra}


# API reference, the fields of /account/credits. Sub-fields of wallets and top-ups are not
# documented.
_ACCOUNT_FIELDS: Final[dict[str, type]] = {
    "recurring_credits": Decimal,
    "recurring_credits_frequency": str,
    "recurring_credits_refresh_date": str,
    "credit_rollover": bool,
    "wallets": list,
    "credit_topups": list,
}


def _read_refresh_date(fields: dict[str, Any], extra: dict[str, Any], key: ApiKey) -> None:
    name = "recurring_credits_refresh_date"
    if name not in fields:
        return
    text = fields.pop(name)
    try:
        date = datetime.fromisoformat(text.strip())
        # API reference: an ISO timestamp such as 2026-09-01T00:00:00Z. Without an offset it is
        # read as UTC.
        fields[name] = date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):
        extra[name] = text
        _log.warning(
            "%s: the account's recurring_credits_refresh_date is no date; read it in extra",
            key.label,
        )


# --- headers


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


def read_retry_after(headers: Mapping[str, str], *, now: datetime, period: float) -> float | None:
    """Seconds that a refusal (429) asks to wait; None when its headers name no wait.

    The longer of `x-ratelimit-reset`, "wait that many seconds" (best-practices page), and
    `Retry-After`. A slot of a window frees within the window, so a reset counts as at most
    `period` seconds, even where the server sends an epoch.
    """
    reset = _seconds(headers.get("x-ratelimit-reset"))
    slot = None if reset is None else min(max(reset, 0.0), period)
    waits = [wait for wait in (slot, read_wait(headers, now=now)) if wait is not None]
    return max(waits, default=None)


def read_wait(headers: Mapping[str, str], *, now: datetime) -> float | None:
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


# --- failures

_STATUS_ERRORS: Final[dict[int, tuple[type[APIStatusError], str]]] = {
    400: (_errors.BadRequestError, "the API rejects the request"),
    401: (_errors.AuthenticationError, "the API does not accept the key"),
    402: (_errors.PaymentRequiredError, "the account is out of credits"),
    403: (_errors.PermissionDeniedError, "the plan or the key's rights do not allow this"),
    429: (RateLimitError, "the API refused the request: over its rate limit"),
}


# These statuses speak for the API only with a JSON object as body: HTML pages come from gateways,
# firewalls and captive portals.
_OF_THE_KEY = (401, 402, 403)
_NOT_THE_API = (
    "a gateway answered in the API's place: the body is not a JSON object, so the key was not "
    "checked; look for a proxy or firewall between here and the API"
)


def is_apis_own(response: Response) -> bool:
    """Whether a response without a balance is the API's own: a JSON object with a 2xx or 4xx."""
    own = 200 <= response.status <= 299 or 400 <= response.status <= 499
    return own and isinstance(_parse_leniently(response.body), dict)


def is_json_object(response: Response) -> bool:
    """Whether a body is a JSON object, at any status; gateways do not send JSON objects."""
    return isinstance(_parse_leniently(response.body), dict)


def _parse_leniently(body: bytes | None) -> Any:
    """The document of an error, without checks of numbers and names; None when it is not JSON."""
    try:
        return json.loads(body or b"")
    except (ValueError, RecursionError):
        return None


def _read_failure(
    key: ApiKey, response: Response, now: datetime, period: float
) -> CrustCreditsError:
    status = response.status
    details: dict[str, Any] = {"key_name": key.label, **read_details(response.headers, key)}
    if not 400 <= status <= 599:
        kind_of_answer = (
            "a redirect, which is not followed because it would send the key to another address"
            if 300 <= status <= 399
            else "an undocumented status"
        )
        return UnexpectedResponseError(
            f"the API answered with {kind_of_answer} (HTTP {status})", status=status, **details
        )
    document = _parse_leniently(response.body)
    if status in _OF_THE_KEY and not isinstance(document, dict):
        # The gateway's own rate-limit headers are dropped: they are not the API's.
        return GatewayError(
            _NOT_THE_API, status=status, key_name=key.label, request_id=details["request_id"]
        )
    message = _clean(_message(document), key)
    if status >= 500:
        wait = read_wait(response.headers, now=now) if status == 503 else None
        message = message or "the API or a gateway before it failed"
        return _errors.InternalServerError(message, status=status, retry_after=wait, **details)
    kind, default = _STATUS_ERRORS.get(status, (APIStatusError, "the API answered with an error"))
    if kind is RateLimitError:
        wait = read_retry_after(response.headers, now=now, period=period)
        return RateLimitError(message or default, retry_after=wait, **details)
    if kind is _errors.AuthenticationError:
        kind = _authentication_error(message)
    return kind(message or default, status=status, **details)


def _authentication_error(message: str | None) -> type[APIStatusError]:
    # The vendor's texts are "Missing API key in request" and "Invalid API key in request".
    words = (message or "").lower()
    if "missing" in words:
        return _errors.MissingKeyError
    return _errors.InvalidKeyError if "invalid" in words else _errors.AuthenticationError


def _message(document: Any) -> str | None:
    """The text of an error, from the first filled of the places that the vendor's client reads."""
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    nested = error if isinstance(error, dict) else {}
    errors = document.get("non_field_errors")
    listed = errors[0] if isinstance(errors, list) and errors else None
    named = (document.get(name) for name in ("detail", "description", "reason"))
    candidates = (
        document.get("message"),
        nested.get("message"),
        nested.get("reason"),
        *named,
        error,
        listed,
    )
    return next((text for text in candidates if isinstance(text, str) and text.strip()), None)


# Text that URL quoting leaves unchanged (RFC 3986, unreserved characters).
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")


def _clean(text: str | None, key: ApiKey) -> str | None:
    """Text from the server, fit for a log line: one line, at most 300 characters, secret masked."""
    if text is None:
        return None
    if (
        len(text) <= _MAX_MESSAGE and text.isascii() and text.isprintable() and "%" not in text
    ):  # the short way for most values, such as a request id
        secret = key.get_secret_value()
        if secret.isascii() and secret.lower() not in text.lower():
            return text.strip() or None
    hidden = _hide(text, key)[:_MAX_MESSAGE]
    if not hidden.isprintable():
        hidden = "".join(char if char.isprintable() else " " for char in hidden)
    return hidden.strip() or None


def _hide(text: str, key: ApiKey) -> str:
    """The text with the secret masked, also where it is URL-quoted or in another case."""
    secret = key.get_secret_value()
    if len(text) < len(secret):
        return text
    forms = {secret} if _UNRESERVED.fullmatch(secret) else {secret, quote(secret, safe="")}
    if (
        text.isascii() and secret.isascii()
    ):  # outside ASCII a letter's other case can be longer, or an ASCII letter
        lower = text.lower()
        forms = {form for form in forms if form.lower() in lower}
    for form in forms:
        text = re.sub(re.escape(form), "***", text, flags=re.IGNORECASE)
    return text
