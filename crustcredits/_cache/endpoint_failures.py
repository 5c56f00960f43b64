"""`EndpointFailures`: whether an endpoint is down for all keys.

The module does no I/O. Callers pass the time, in seconds of the running loop's clock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from crustcredits._errors import CrustCreditsError
from crustcredits._http.retry import Retry, refresh_delay

_log = logging.getLogger("crustcredits")

# Failures in a row, of different keys, after which an endpoint is taken to be down, and the seconds
# for which this holds. After that its state is unknown, and a caller has to wait for an answer.
_FAILURES = 3
DOWN = 60.0


class EndpointFailures:
    """Failures in a row on one endpoint that say nothing about the keys.

    Args:
        blocked: Returns the error that stops all requests on the endpoint now, or None.

    Attributes:
        failures: Failures, of different keys up to the threshold, then of any key.
        refresh_at: Earliest time of the next refresh.
    """

    __slots__ = ("_blocked", "_claimed_by", "_error", "_keys", "_last", "failures", "refresh_at")

    def __init__(self, blocked: Callable[[], CrustCreditsError | None]) -> None:
        self._blocked = blocked
        self._keys: set[bytes] = set()  # failed keys: one key's failures are not the endpoint's
        # The digest of the key whose refresh tests whether the endpoint answers again.
        self._claimed_by: bytes | None = None
        self.failures = 0
        self._error: CrustCreditsError | None = None
        self._last = 0.0
        self.refresh_at = 0.0

    def answered(self) -> None:
        """Record that the endpoint answered."""
        if self.is_down:
            _log.warning("the API answers again; cached balances are refreshed")
        self.failures = 0
        self._keys.clear()
        self._claimed_by = None
        self.refresh_at = 0.0

    def failed(
        self,
        digest: bytes,
        error: CrustCreditsError,
        retry: Retry,
        now: float,
        *,
        has_balance: Callable[[], bool],
    ) -> None:
        """Record that the endpoint gave no answer for this key."""
        before = self.failures
        if before < _FAILURES:
            self._keys.add(digest)
        self.failures = before + 1 if before >= _FAILURES else len(self._keys)
        self._claimed_by = None
        self._error, self._last = error, now
        if before < self.failures == _FAILURES:
            cached = "; one refresh at a time tests whether it answers" if has_balance() else ""
            _log.warning(
                "no balance from the API for %d keys in a row%s; last failure: %s",
                _FAILURES,
                cached,
                error,
            )
        if self.is_down:
            self.refresh_at = now + refresh_delay(retry, error, self.failures - _FAILURES + 1)

    @property
    def is_down(self) -> bool:
        """Whether enough keys have failed in a row, so that the endpoint is taken to be down."""
        return self.failures >= _FAILURES

    def claim(self, digest: bytes, now: float) -> None:
        """Let the refresh of one key test whether the endpoint answers again, and no other."""
        self._claimed_by, self.refresh_at = digest, now + DOWN

    def release(self, digest: bytes) -> None:
        """Let another refresh test the endpoint: that of this key said nothing about it."""
        if self._claimed_by == digest:
            self._claimed_by, self.refresh_at = None, 0.0

    def reason(self, now: float) -> CrustCreditsError | None:
        """The error for which the endpoint is down, or None."""
        return self._error if self.is_down and now - self._last < DOWN else self._blocked()

    @property
    def may_refresh(self) -> bool:
        """Whether a request would be sent."""
        return self._blocked() is None
