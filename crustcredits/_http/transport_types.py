"""`Transport`: sends one attempt; and `Failure`: how one ended without a response. No I/O."""

from __future__ import annotations

import enum
from typing import Protocol

import attrs

from crustcredits._errors import CrustCreditsError
from crustcredits._http.protocol import Response
from crustcredits._keys.api_key import ApiKey


class Fate(enum.Enum):
    """The end of an attempt, as it matters for the server's count of requests."""

    UNSENT = "it certainly never left"
    ANSWERED = "the server counted it before it answered"
    ABANDONED = "it was given up on, and may still arrive"


@attrs.frozen
class Failure:
    """An attempt without a complete response."""

    error: CrustCreditsError
    fate: Fate


class Transport(Protocol):
    """Sends requests."""

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        """Send one request and read the complete response within `timeout` seconds."""
        ...

    async def close(self) -> None:
        """Release all connections."""
        ...
