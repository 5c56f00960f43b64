"""Answers of the fake API: the documented ones, and those of faults. No time and no counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import attrs

from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import API_VERSION
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import credits_text
from crustcredits.testing._faults import PLAIN, Fault

PATHS = (USER_CREDITS, ACCOUNT_CREDITS)


@attrs.frozen(kw_only=True)
class Answer:
    """The answer to one request, and the fault of its connection, if any."""

    status: int
    headers: Mapping[str, str]
    body: str
    kind: str = "application/json"
    fault: Fault | None = None
    label: str | None = None  # of the key, if known


@attrs.frozen(kw_only=True)
class Request:
    """A request that was counted.

    Attributes:
        method: Its method.
        path: Its path.
        headers: Its headers. They hold the secret, so they do not print.
        key: Its key, if known.
        answer_headers: The headers of every answer to it.
    """

    method: str
    path: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    key: ApiKey | None
    answer_headers: Mapping[str, str]


def json_answer(status: int, document: Any, headers: Mapping[str, str]) -> Answer:
    """An answer with a JSON document."""
    return Answer(status=status, headers=headers, body=_json_text(document))


def refusal(headers: Mapping[str, str], wait: int) -> Answer:
    """An ordered 429, which asks for a wait of so many seconds."""
    said = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(wait)}
    answer = json_answer(429, {"message": "Too many requests"}, {**headers, **said})
    return attrs.evolve(answer, fault=Fault.REFUSED)


def plain_fault(fault: Fault, headers: Mapping[str, str]) -> Answer | None:
    """The answer of a fault that is a plain answer, or None."""
    if fault not in PLAIN:
        return None
    status, kind, text = PLAIN[fault]
    return Answer(status=status, headers=headers, body=text, kind=kind, fault=fault)


def unauthorized(request: Request) -> Answer:
    """The answer to a request whose key is missing, unknown or revoked."""
    kind = "Invalid" if "Authorization" in request.headers else "Missing"
    return json_answer(401, {"message": f"{kind} API key in request"}, request.answer_headers)


def documented(request: Request, account: Mapping[str, Any]) -> Answer:
    """The answer of an endpoint, as the API's documents say; `account` is that of the key."""
    headers = request.answer_headers
    if request.path == USER_CREDITS:
        return json_answer(200, {"credits": account["credits"]}, headers)
    if request.headers.get("x-api-version") != API_VERSION:
        error = {
            "type": "invalid_request",
            "message": "Missing or wrong x-api-version header",
            "metadata": {},
        }
        return json_answer(400, {"error": error}, headers)
    return json_answer(200, {"account": account}, headers)


def _json_text(value: Any) -> str:
    # The standard encoder cannot write a Decimal without losing digits.
    if isinstance(value, Decimal):
        return credits_text(value)
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(name)}: {_json_text(part)}" for name, part in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json_text, value)) + "]"
    return json.dumps(value)
