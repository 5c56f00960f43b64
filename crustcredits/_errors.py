"""The one tree of exceptions. Attributes, never the text, carry what a program needs; no secret gets in.

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
├── InsufficientCreditsError
└── ClientClosedError
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from decimal import Decimal

    from crustcredits._models import RateLimitStatus


class CrustCreditsError(Exception):
    """Root of everything that this library raises.

    Attributes:
        message: What went wrong and what to do, in words, without the key's name.
        key_name: The label of the key it happened to, or None when no single key is to blame. Never its secret.
        attempts: How many requests were put on the wire for this call.
        request_id: The server's `x-request-id`, when an answer brought one.
        rate_limit: What the last answer said of the rate limit, or None.
    """

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

    def under(self, key_name: str | None) -> Self:
        """A copy that names this key, without a traceback."""
        error = copy.copy(self)
        error.key_name = key_name
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args` alone, and keyword-only arguments without defaults would be missing.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[CrustCreditsError], args: tuple[Any, ...], state: dict[str, Any]) -> CrustCreditsError:
    error = kind.__new__(kind, *args)
    error.args = args  # OSError, a base of APITimeoutError, leaves this to the __init__ that is not called here.
    error.__dict__.update(state)
    return error


class ConfigurationError(CrustCreditsError, ValueError):
    """An argument, a key, a file or an environment variable cannot be used; no request was made for it."""


class APIConnectionError(CrustCreditsError):
    """No whole answer came: name resolution, connecting, TLS, a reset, or a body cut short.

    Attributes:
        retryable: Whether it may pass, and is retried. False when the server's certificate cannot be verified.
    """

    def __init__(self, message: str, *, retryable: bool = True, **details: Any) -> None:
        super().__init__(message, **details)
        self.retryable = retryable


class APITimeoutError(CrustCreditsError, TimeoutError):
    """No connection, or no whole answer, came in time. Retried while the call's own time lasts."""


class APIStatusError(CrustCreditsError):
    """The server answered with an error status.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status

    def __str__(self) -> str:
        return f"{super().__str__()} (HTTP {self.status})"


class BadRequestError(APIStatusError):
    """400: the API rejects the request, for example for its `x-api-version`."""


class AuthenticationError(APIStatusError):
    """401: the API does not accept the key."""


class MissingKeyError(AuthenticationError):
    """401: no key reached the API; something between here and there removed the `Authorization` header."""


class InvalidKeyError(AuthenticationError):
    """401: the API does not know the key: mistyped, revoked, or of another service."""


class PaymentRequiredError(APIStatusError):
    """402: the account is out of credits. Never retried."""


class PermissionDeniedError(APIStatusError):
    """403: the plan or the key's rights do not allow this."""


class RateLimitError(APIStatusError):
    """429: the server counts more requests than it allows.

    Attributes:
        retry_after: Seconds until the server expects to take another request: the longer of `x-ratelimit-reset`, which is at most
            the limit's period, and `Retry-After`, however long; None when it said neither.
    """

    def __init__(self, message: str, *, status: int = 429, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message, status=status, **details)
        self.retry_after = retry_after


class InternalServerError(APIStatusError):
    """5xx: the server or a gateway before it failed. Retried.

    Attributes:
        retry_after: Seconds that a 503 asks to wait in `Retry-After`; None when it does not.
    """

    def __init__(self, message: str, *, status: int, retry_after: float | None = None, **details: Any) -> None:
        super().__init__(message, status=status, **details)
        self.retry_after = retry_after


class GatewayError(CrustCreditsError):
    """A gateway, firewall or proxy answered 401, 402 or 403 in the API's place: the body is no JSON object. Retried.

    It says nothing of the key. After eight such answers in a row no key is asked on the endpoint for a while; calls that
    end for this reason have this error too, and are not retried.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, message: str, *, status: int, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status

    def __str__(self) -> str:
        return f"{super().__str__()} (HTTP {self.status})"


class UnexpectedResponseError(CrustCreditsError):
    """An answer came that is not what the API documents: not JSON, no number where credits belong, a redirect, too large.

    Attributes:
        status: The HTTP status it came with.
    """

    def __init__(self, message: str, *, status: int, **details: Any) -> None:
        super().__init__(message, **details)
        self.status = status


class RateLimitWaitError(CrustCreditsError):
    """The rate limit would hold this call back beyond its deadline; it was not sent.

    Attributes:
        wait: Seconds it would have had to wait in all, as things stood.
    """

    def __init__(self, message: str, *, wait: float, **details: Any) -> None:
        super().__init__(message, **details)
        self.wait = wait


class BucketsUnavailableError(CrustCreditsError):
    """The count that several processes share is out of reach, so nothing was sent; with `on_outage="raise"` only."""


class InsufficientCreditsError(CrustCreditsError):
    """A pool holds fewer credits than a batch needs; `CreditsClient.require` raises it.

    Attributes:
        needed: Credits that were asked for, with the margin.
        available: Credits known to be there; what is unknown counts as nothing.
        unknown: The labels of the keys that could not be checked.
        stale: The labels of the keys whose balance is an old one.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: Decimal,
        available: Decimal,
        unknown: tuple[str, ...] = (),
        stale: tuple[str, ...] = (),
        **details: Any,
    ) -> None:
        super().__init__(message, **details)
        self.needed = needed
        self.available = available
        self.unknown = unknown
        self.stale = stale


class ClientClosedError(CrustCreditsError):
    """The client was closed before or during the call."""
