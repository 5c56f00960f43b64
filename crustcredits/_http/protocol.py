"""The API without I/O: builds a request from a key, and reads a response as a model or an error.

A response is its status, headers and body; the time of its arrival is passed beside it.
`headers.py`, `documents.py` and `account_document.py` read its parts, and `redaction.py` cleans
them. This module must not know aiohttp, asyncio or a clock.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any, Final, TypeAlias

import attrs

from crustcredits import _errors
from crustcredits._errors import (
    APIConnectionError,
    APIStatusError,
    CrustCreditsError,
    GatewayError,
    RateLimitError,
    UnexpectedResponseError,
)
from crustcredits._http.account_document import account_fields, account_of, user_of
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.documents import is_cut_short, parse, parse_leniently
from crustcredits._http.headers import (
    read_details,
    read_rate_limit,
    read_refusal_wait,
    read_retry_after,
)
from crustcredits._http.redaction import clean
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Account, Balance
from crustcredits._version import __version__

# API introduction: a missing version "can default to the latest"; API reference: /account/credits
# answers 400 without one.
API_VERSION: Final = "2025-11-01"

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


def read_response(
    path: str, key: ApiKey, response: Response, *, now: datetime, period: float
) -> Balance | CrustCreditsError:
    """Read a response: a `Balance`, an `Account` for `ACCOUNT_CREDITS`, or the error, not raised.

    `now` is the time of arrival; `period`, in seconds, bounds the wait that `x-ratelimit-reset` may
    ask for.
    """
    if response.status != 200:
        return _read_failure(key, response, now, period)
    document, problem = parse(response.body)
    if problem is not None and not response.framed and is_cut_short(response.body):
        message = (
            "the connection failed while the answer came (the body is cut short); check the "
            "network, or try again"
        )
        return APIConnectionError(
            message, key_name=key.label, **read_details(response.headers, key)
        )
    if problem is None:
        if path == USER_CREDITS:
            document = user_of(document)
        else:
            document, problem = account_of(document, key)
    credits = document.get("credits") if isinstance(document, dict) else None
    if not isinstance(credits, Decimal):
        message = f"the API answered with {problem or 'no number of credits'}; {_CHECK_ADDRESS}"
        return UnexpectedResponseError(
            message, key_name=key.label, status=200, **read_details(response.headers, key)
        )
    request_id, rate_limit = (
        clean(response.headers.get("x-request-id"), key),
        read_rate_limit(response.headers),
    )
    model, more = (
        (Account, account_fields(document, key)) if path == ACCOUNT_CREDITS else (Balance, {})
    )
    return model(
        key=key,
        credits=credits,
        checked_at=now,
        request_id=request_id,
        rate_limit=rate_limit,
        **more,
    )


# --- failures

# The class, the state and the remedy; the API's own text comes between state and remedy.
_ErrorText: TypeAlias = tuple[type[APIStatusError], str, str]
_STATUS_ERRORS: Final[dict[int, _ErrorText]] = {
    400: (
        _errors.BadRequestError,
        "the API rejects the request",
        "update crustcredits, or look for a proxy that changes headers",
    ),
    402: (
        _errors.PaymentRequiredError,
        "the account is out of credits",
        "top it up, or use a key of another account",
    ),
    403: (
        _errors.PermissionDeniedError,
        "the plan or the key's rights do not allow the request",
        "change them, or use another key",
    ),
}
_NOT_ACCEPTED: Final[_ErrorText] = (
    _errors.AuthenticationError,
    "the API does not accept the key",
    "correct or replace the key",
)
_INVALID: Final[_ErrorText] = (
    _errors.InvalidKeyError,
    "the API does not know the key",
    "correct or replace the key",
)
_MISSING: Final[_ErrorText] = (
    _errors.MissingKeyError,
    "no key reached the API",
    "look for a proxy that removes the Authorization header",
)
_TRANSIENT: Final[_ErrorText] = (APIStatusError, "the API answered with an error", "try again")
_CHECK_ADDRESS: Final = (
    "check the address of the API, look for a proxy before it, or update crustcredits"
)
_OTHER: Final[_ErrorText] = (APIStatusError, "the API answered with an error", _CHECK_ADDRESS)

# Statuses that speak about the key; from a gateway they do not.
_OF_THE_KEY = (401, 402, 403)
_NOT_THE_API = (
    "a gateway answered in the API's place: the body is not a JSON object, so the key was not "
    "checked; look for a proxy or firewall between here and the API"
)


class Responder(enum.Enum):
    """What has sent a response without a balance."""

    API = "the API itself"
    GATEWAY = "a gateway, firewall or captive portal in the API's place"
    UNKNOWN = "the API, or a gateway that reports its failure"


def responder_of(response: Response) -> Responder:
    """What has sent a response without a balance.

    Gateways send HTML pages and empty bodies: only a JSON object speaks for the API. With a status
    other than 2xx and 4xx it does not show that the API works.
    """
    if not isinstance(parse_leniently(response.body), dict):
        return Responder.GATEWAY
    is_own = 200 <= response.status <= 299 or 400 <= response.status <= 499
    return Responder.API if is_own else Responder.UNKNOWN


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
            f"the API answered with {kind_of_answer} (HTTP {status}); {_CHECK_ADDRESS}",
            status=status,
            **details,
        )
    if status in _OF_THE_KEY and responder_of(response) is Responder.GATEWAY:
        # The gateway's own rate-limit headers are dropped: they are not the API's.
        return GatewayError(
            _NOT_THE_API, status=status, key_name=key.label, request_id=details["request_id"]
        )
    text = clean(_message(parse_leniently(response.body)), key)
    if status >= 500:
        wait = read_retry_after(response.headers, now=now) if status == 503 else None
        message = _sentence("the API or a gateway before it failed", text, _when(wait))
        return _errors.InternalServerError(message, status=status, retry_after=wait, **details)
    if status == 429:
        wait = read_refusal_wait(response.headers, now=now, period=period)
        message = _sentence("the API refuses more requests for now", text, _when(wait))
        return RateLimitError(message, retry_after=wait, **details)
    kind, state, remedy = (
        _authentication_error(text)
        if status == 401
        else _STATUS_ERRORS.get(status, _TRANSIENT if status in {408, 425} else _OTHER)
    )
    return kind(_sentence(state, text, remedy), status=status, **details)


def _sentence(state: str, text: str | None, remedy: str) -> str:
    """State, cause and remedy; the cause is the server's own text, if any."""
    return f"{state}; {remedy}" if text is None else f"{state} ({text}); {remedy}"


def _when(wait: float | None) -> str:
    return "try again later" if wait is None else f"try again in {wait:.1f} s"


def _authentication_error(text: str | None) -> tuple[type[APIStatusError], str, str]:
    # The vendor's texts are "Missing API key in request" and "Invalid API key in request".
    words = (text or "").lower()
    if "missing" in words:
        return _MISSING
    return _INVALID if "invalid" in words else _NOT_ACCEPTED


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
