"""The one tree of exceptions.

Attributes, never the text, carry what a program needs; no secret gets in.

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
├── BucketsUnavailableError
├── CreditsRequirementError     this one and those below stand in `_report`, whose reports they hold
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
    """What each error can say of its call; see `CrustCreditsError`."""

    key_name: str | None
    attempts: int
    request_id: str | None
    rate_limit: RateLimitStatus | None


class CrustCreditsError(Exception):
    """Root of everything that this library raises.

    Attributes:
        message: What went wrong and what to do, in words, without the key's name.
        key_name: The label of the key it happened to, or None when no single key is to blame. Never
            its secret.
        attempts: How many requests were put on the wire for this call.
        request_id: The server's `x-request-id`, when an answer brought one.
        rate_limit: What the last answer said of the rate limit, or None.
        may_recover: Whether the same call may succeed later, with the same key: after an outage, a
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
        # The default calls the class with `args` alone, and keyword-only arguments without defaults
        # would be missing.
        return rebuild, (type(self), self.args, self.__dict__)


_ErrorT = TypeVar("_ErrorT", bound=CrustCreditsError)


def renamed(error: _ErrorT, key_name: str | None) -> _ErrorT:
    """A copy of an error that names this key, without a traceback."""
    twin = copy.copy(error)
    twin.key_name = key_name
    return twin


def rebuild(kind: type[_ErrorT], args: tuple[Any, ...], state: dict[str, Any]) -> _ErrorT:
    error = kind.__new__(kind, *args)
    # OSError, a base of APITimeoutError, leaves this to the __init__ that is not called here.
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigurationError(CrustCreditsError, ValueError):
    """An argument, a key, a file or an environment variable cannot be used.

    No request was made for it.
    """


class APIConnectionError(CrustCreditsError):
    """No whole answer came: name resolution, connecting, TLS, a reset, or a body cut short.

    Attributes:
        retryable: Whether it may pass, and is retried. False when the server's certificate cannot
            be verified.
    """

    def __init__(
        self, message: str, *, retryable: bool = True, **details: Unpack[ErrorDetails]
    ) -> None:
        super().__init__(message, **details)
        self.retryable: bool = retryable
        self.may_recover: bool = retryable


class APITimeoutError(CrustCreditsError, TimeoutError):
    """No connection, or no whole answer, came in time. Retried while the call's own time lasts."""

    may_recover: bool = True


class APIStatusError(CrustCreditsError):
    """The server answered with an error status.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.status = status
        # 408: the request took too long to arrive. 425: it came too early (RFC 8470).
        self.may_recover: bool = self.may_recover or status in {408, 425}

    def __str__(self) -> str:
        return f"{super().__str__()} (HTTP {self.status})"


class BadRequestError(APIStatusError):
    """400: the API rejects the request, for example for its `x-api-version`."""


class AuthenticationError(APIStatusError):
    """401: the API does not accept the key."""


class MissingKeyError(AuthenticationError):
    """401: no key reached the API.

    Something between here and there removed the `Authorization` header.
    """


class InvalidKeyError(AuthenticationError):
    """401: the API does not know the key: mistyped, revoked, or of another service."""


class PaymentRequiredError(APIStatusError):
    """402: the account is out of credits. Never retried."""


class PermissionDeniedError(APIStatusError):
    """403: the plan or the key's rights do not allow this."""


class RateLimitError(APIStatusError):
    """429: the server counts more requests than it allows.

    Attributes:
        retry_after: Seconds until the server expects to take another request: the longer of
            `x-ratelimit-reset`, which is at most the limit's period, and `Retry-After`, however
            long; None when it said neither.
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
        retry_after: Seconds that a 503 asks to wait in `Retry-After`; None when it does not.
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
    """A gateway, firewall or proxy answered 401, 402 or 403 in the API's place: the body is no JSON object. Retried.

    It says nothing of the key. After eight such answers in a row only one probe at a time is sent
    to the endpoint. Calls that have waited for it in vain have this error too, with `attempts` 0
    where no request was sent for them.

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
    """An answer came that is not what the API documents: not JSON, no number where credits belong, a redirect, too large.

    Attributes:
        status: The HTTP status it came with.
    """

    def __init__(self, message: str, *, status: int, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.status = status


class RateLimitWaitError(CrustCreditsError):
    """The rate limit would hold this call back beyond its deadline; it was not sent.

    Attributes:
        wait: Seconds it would have had to wait in all, at least.
    """

    may_recover: bool = True

    def __init__(self, message: str, *, wait: float, **details: Unpack[ErrorDetails]) -> None:
        super().__init__(message, **details)
        self.wait = wait


class BucketsUnavailableError(CrustCreditsError):
    """The count that several processes share is out of reach, so nothing was sent.

    With `on_outage="raise"` only.
    """

    may_recover: bool = True


class ClientClosedError(CrustCreditsError):
    """The client was closed before or during the call."""
