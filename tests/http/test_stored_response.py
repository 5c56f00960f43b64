"""Responses that are kept outside the process: what comes back, and what is never kept."""

from __future__ import annotations

import pytest

from crustcredits import ApiKey
from crustcredits._http.protocol import Response
from crustcredits._http.stored_response import MAX_STORED, load_response, store_response

KEY = ApiKey("sk-secret+value", name="prod")


def response(body: bytes | None, **headers: str) -> Response:
    return Response(200, headers, body)


def test_a_response_comes_back_with_the_headers_that_are_read() -> None:
    sent = response(
        b'{"credits": 7.50}', **{"x-request-id": "r1", "x-ratelimit-limit": "300", "server": "x"}
    )
    stored = store_response(sent, KEY)
    assert stored is not None
    back = load_response(stored)
    assert back == Response(
        200, {"x-request-id": "r1", "x-ratelimit-limit": "300"}, b'{"credits": 7.50}'
    )


@pytest.mark.parametrize(
    "body",
    [
        None,
        b"\xff\xfe",
        b'{"echo": "SK-secret+VALUE"}',
        b'{"echo": "sk-secret%2Bvalue"}',
        b'{"echo": "sk-secret\\u002bvalue"}',
        b"x" * (MAX_STORED + 1),
        b'"' * (MAX_STORED - 100),
    ],
    ids=["too large", "no text", "secret", "quoted", "escaped", "large", "large in JSON"],
)
def test_a_response_that_must_not_be_kept_is_none(body: bytes | None) -> None:
    assert store_response(response(body), KEY) is None


def test_a_secret_in_a_header_is_never_kept() -> None:
    assert store_response(response(b"{}", **{"x-request-id": "for sk-secret+value"}), KEY) is None


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"status": "200", "headers": {}, "body": ""}',
        b'{"status": 200, "headers": [], "body": ""}',
        b'{"status": 200, "headers": {"a": 1}, "body": ""}',
        b'{"status": 200, "headers": {}, "body": 1}',
        b'{"status": 200, "headers": {}, "body": "\\ud800"}',
    ],
)
def test_bytes_of_another_kind_are_no_response(stored: bytes) -> None:
    assert load_response(stored) is None
