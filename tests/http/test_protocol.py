"""Requests out of keys, and errors out of responses: no loop, no clock, no socket."""

from __future__ import annotations

import pytest

from crustcredits import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    MissingKeyError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitError,
    UnexpectedResponseError,
    __version__,
)
from crustcredits._http.protocol import Responder, Response, request_headers, responder_of
from tests.http.responses import KEY, error


def test_a_request_carries_the_key_the_api_version_and_the_user_agent() -> None:
    """The API documents `Bearer`; both endpoints get the version."""
    assert request_headers(KEY) == {
        "Authorization": "Bearer sk-0123456789",
        "x-api-version": "2025-11-01",
        "user-agent": f"crustcredits/{__version__}",
    }


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
        (429, "<html>", RateLimitError, "the API refuses more requests for now"),
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


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        *((status, b"{}", Responder.API) for status in (200, 204, 299, 400, 401, 429, 499)),
        *((status, b'{"a": 1}', Responder.UNKNOWN) for status in (199, 300, 399, 500, 503)),
        *((status, b"<html>", Responder.GATEWAY) for status in (200, 302, 403, 429, 502)),
        *((403, body, Responder.GATEWAY) for body in (None, b"", b"[]", b'{"message": "cut')),
    ],
)
def test_only_a_json_object_with_a_2xx_or_4xx_is_the_apis_own(
    status: int, body: bytes | None, expected: Responder
) -> None:
    """Any other body is a gateway's; a JSON object with another status may be either's."""
    assert responder_of(Response(status, {}, body)) is expected
