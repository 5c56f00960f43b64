"""The tree of all exceptions.

Programs read the attributes, never the text. No error holds a secret.

CrustCreditsError
├── ConfigurationError          (also a ValueError)
├── APIConnectionError
├── APITimeoutError             (also a TimeoutError)
├── APIStatusError
│   ├── BadRequestError             400
│   ├── AuthenticationError         401
│   │   ├── MissingKeyError
│   │   └── InvalidKeyError
│   ├── PaymentRequiredError        402
│   ├── PermissionDeniedError       403
│   ├── RateLimitError              429
│   └── InternalServerError         5xx
├── GatewayError                401, 402 and 403 that are not the API's
├── UnexpectedResponseError
├── RateLimitWaitError
├── BackendUnavailableError
├── CreditsRequirementError     this branch is defined in `_report`: its errors hold a report
│   ├── InsufficientCreditsError
│   └── CreditsUnknownError
└── ClientClosedError
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

if TYPE_CHECKING:
    from crustcredits._rate_limit_status import RateLimitStatus


class ErrorDetails(TypedDict, total=False):
    """The attributes that every error can carry; see `CrustCreditsError`."""

    key_name: str | None
    attempts: int
    request_id: str | None
    rate_limit: RateLimitStatus | None


class CrustCreditsError(Exception):
    """Root of all errors that this library raises.

    Attributes:
        message: The state, the cause and the remedy in words, without the key's label.
        key_name: The label of the failed key, never its secret. None when no single key is to
            blame.
        attempts: Number of requests that were put on the wire for this call.
        request_id: The server's `x-request-id`, when a response carried one.
        rate_limit: The rate limit in the headers of the last response, or None.
        may_recover: Whether the same call may succeed later with the same key: after an outage, a
            timeout or a wait.
    """

    may_recover: bool = False

    def __init__(
        self,
        message: str,
        *,
        key_name: str | None = None,
        attempts: int = 0,
        request_id: str | None = None,
        rate_limit: RateLimitStatus | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.key_name = key_name
        self.attempts = attempts
        self.request_id = request_id
        self.rate_limit = rate_limit

    def __str__(self) -> str:
        return self.message if self.key_name is None else f"{self.key_name}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` only; required keyword arguments would be missing.
        return rebuild, (type(self), self.args, self.__dict__)


_ErrorT = TypeVar("_ErrorT", bound=CrustCreditsError)


def renamed(error: _ErrorT, key_name: str | None) -> _ErrorT:
    """A copy of an error with this `key_name` and without a traceback."""
    twin = copy.copy(error)
    twin.key_name = key_name
    return twin


def rebuild(kind: type[_ErrorT], args: tuple[Any, ...], state: dict[str, Any]) -> _ErrorT:
    error = kind.__new__(kind, *args)
    # OSError, a base of APITimeoutError, sets `args` in its __init__, which is not called here.
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(CrustCreditsError, ValueError):
    """An argument, a key, a file or an environment variable cannot be used. No request was sent."""


class APIConnectionError(CrustCreditsError):
    """No complete response: name resolution, connecting, TLS, a reset, or a body cut short.

    Attributes:
        retryable: Whether the failure may pass, and is retried. False when the server's certificate
            cannot be verified.
    """

    def __init__(
        self, message: str, *, retryable: bool = True, **details: Unpack[ErrorDetails]
    ) -> None:
        super().__init__(message, **details)
        self.retryable: bool = retryable
        self.may_recover: bool = retryable


class APITimeoutError(CrustCreditsError, TimeoutError):
    """No connection, or no complete response, in time. Retried until the call's own deadline."""

    may_recover: bool = True


class APIStatusError(CrustCreditsError):
    """The server answered with an error status.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.status = status
        # 408: the request took too long to arrive. 425: the request came too early (RFC 8470).
        self.may_recover: bool = self.may_recover or status in {408, 425}

    def __str__(self) -> str:
        return f"{super().__str__()} (HTTP {self.status})"


class BadRequestError(APIStatusError):
    """400: the API rejects the request, for example for its `x-api-version`."""


class AuthenticationError(APIStatusError):
    """401: the API does not accept the key."""


class MissingKeyError(AuthenticationError):
    """401: no key reached the API. The `Authorization` header was removed on the way."""


class InvalidKeyError(AuthenticationError):
    """401: the API does not know the key: mistyped, revoked, or of another service."""


class PaymentRequiredError(APIStatusError):
    """402: the account is out of credits. Never retried."""


class PermissionDeniedError(APIStatusError):
    """403: the plan or the key's rights do not allow the request."""


class RateLimitError(APIStatusError):
    """429: the server counts more requests than it allows.

    Attributes:
        retry_after: Seconds until the server expects to accept another request: the longer of
            `x-ratelimit-reset`, capped at the limit's period, and `Retry-After`, without a cap.
            None without both headers.
    """

    may_recover: bool = True

    def __init__(
        self,
        message: str,
        *,
        status: int = 429,
        retry_after: float | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, status=status, **details)
        self.retry_after = retry_after


class InternalServerError(APIStatusError):
    """5xx: the server or a gateway before it failed. Retried.

    Attributes:
        retry_after: Seconds from the `Retry-After` of a 503; None without one.
    """

    may_recover: bool = True

    def __init__(
        self,
        message: str,
        *,
        status: int,
        retry_after: float | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, status=status, **details)
        self.retry_after = retry_after


class GatewayError(CrustCreditsError):
    """401, 402 or 403 from a gateway, firewall or proxy in the API's place. Retried.

    The body is not a JSON object, so the status tells nothing about the key. Eight such answers in
    a row open the circuit breaker of the endpoint: only one probe at a time is sent. Calls that
    waited for a failed probe raise this error too, with `attempts` 0 where no request was sent.

    Attributes:
        status: The HTTP status.
    """

    may_recover: bool = True

    def __init__(self, message: str, *, status: int, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.status = status

    def __str__(self) -> str:
        return f"{super().__str__()} (HTTP {self.status})"


class UnexpectedResponseError(CrustCreditsError):
    """A response that the API does not document.

    It is not JSON, has no number of credits, is too large, or is a redirect.

    Attributes:
        status: The HTTP status of the response.
    """

    def __init__(self, message: str, *, status: int, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.status = status


class RateLimitWaitError(CrustCreditsError):
    """The rate limit would delay the call beyond its deadline. No request was sent.

    Attributes:
        wait: Least seconds of the whole wait.
    """

    may_recover: bool = True

    def __init__(self, message: str, *, wait: float, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.wait = wait


class BackendUnavailableError(CrustCreditsError):
    """The count that several processes share is out of reach, so no request was sent.

    Raised with `on_outage="raise"` only.
    """

    may_recover: bool = True


class ClientClosedError(CrustCreditsError):
    """The client was closed before or during the call."""
