"""The answer of a service to a failed check, without I/O: an HTTP status and fixed texts.

The API's text and status go to the log only; callers of the service never see them. This module
must not know FastAPI.
"""

from __future__ import annotations

import math
from typing import Any, Final

import attrs

from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    BackendUnavailableError,
    BadRequestError,
    ClientClosedError,
    ConfigurationError,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    MissingKeyError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitError,
    RateLimitWaitError,
    UnexpectedResponseError,
)
from crustcredits._models import credits_text
from crustcredits._report import (
    CreditsRequirementError,
    CreditsUnknownError,
    InsufficientCreditsError,
)


@attrs.frozen(kw_only=True)
class Problem:
    """A problem document of RFC 9457.

    Attributes:
        status: The HTTP status of the service's answer.
        type: `urn:crustcredits:` and the name of the error's class.
        title: The problem, the same for all errors of a class.
        key: The label of the failed key, or None.
        retry_after: Whole seconds after which a retry may succeed; None if unknown.
        more: Further members.
    """

    status: int
    type: str
    title: str
    key: str | None = None
    retry_after: int | None = None
    more: dict[str, Any] = attrs.field(factory=dict)

    def document(self) -> dict[str, Any]:
        """Return the members for JSON, without those that are None."""
        members = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "key": self.key,
            "retry_after": self.retry_after,
        }
        return {name: value for name, value in members.items() if value is not None} | self.more


# The first matching class counts. The API's 401, 402 and 403 are about this service's keys and not
# about its callers, so callers get a bad gateway.
_ANSWERS: Final[tuple[tuple[type[CrustCreditsError], int, str], ...]] = (
    (InsufficientCreditsError, 409, "The credits are too few"),
    (CreditsUnknownError, 503, "The known credits are too few, and some are unknown"),
    (RateLimitError, 503, "The credits API refuses more requests for now"),
    (RateLimitWaitError, 503, "The rate limit of the credits API would delay the request too long"),
    (
        BackendUnavailableError,
        503,
        "The shared count of the rate limit is out of reach",
    ),
    (GatewayError, 503, "A gateway answers in the credits API's place"),
    (APITimeoutError, 504, "The credits API did not answer in time"),
    (APIConnectionError, 503, "The credits API cannot be reached"),
    (ClientClosedError, 503, "The service is shutting down"),
    (ConfigurationError, 500, "The service or one of its keys is configured wrongly"),
    (InvalidKeyError, 502, "The credits API does not know the key"),
    (MissingKeyError, 502, "No key reached the credits API"),
    (PaymentRequiredError, 502, "The key's account is out of credits"),
    (PermissionDeniedError, 502, "The plan or the key's rights do not allow the request"),
    (BadRequestError, 502, "The credits API rejects the request"),
    (InternalServerError, 502, "The credits API failed"),
    (UnexpectedResponseError, 502, "The credits API gave an unexpected answer"),
    (CrustCreditsError, 502, "The credits could not be checked"),
)

# Seconds for a refusal without a wait: by then every token of a one-minute window is free.
_WINDOW = 60
# Seconds until a retry during an outage of unknown length.
_OUTAGE = 5
# Most seconds of a `Retry-After`, also for a wait without end.
_LONGEST = 86_400.0


def problem_of(error: CrustCreditsError) -> Problem:
    """Return the problem document for `error`."""
    status, title = next(
        (status, title) for kind, status, title in _ANSWERS if isinstance(error, kind)
    )
    more: dict[str, Any] = {}
    if isinstance(error, CreditsUnknownError) and not error.may_recover:
        status = 502  # the API or the key's own text is at fault: a retry does not help
    if isinstance(error, CreditsRequirementError):
        more = {
            "needed": credits_text(error.needed),
            "available": credits_text(error.available),
            "unknown": list(error.unknown),
            "stale": list(error.stale),
        }
    return Problem(
        status=status,
        type=f"urn:crustcredits:{type(error).__name__}",
        title=title,
        key=error.key_name,
        retry_after=_retry_after(error),
        more=more,
    )


def _asked(error: CrustCreditsError) -> int:
    wait = error.retry_after if isinstance(error, InternalServerError) else None
    return _OUTAGE if wait is None else _whole(wait)


def _whole(seconds: float) -> int:
    return max(1, math.ceil(min(seconds, _LONGEST)))


def _retry_after(error: CrustCreditsError) -> int | None:
    if isinstance(error, RateLimitWaitError):
        return _whole(error.wait)
    if isinstance(error, RateLimitError):
        return _WINDOW if error.retry_after is None else _whole(error.retry_after)
    if isinstance(error, CreditsUnknownError):
        # One key that recovers may decide.
        return min(
            (_retry_after(each) or _asked(each) for each in error.deciding if each.may_recover),
            default=None,
        )
    return None
