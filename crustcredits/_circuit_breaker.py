"""`CircuitBreaker`: stops requests to an endpoint while a gateway answers in the API's place.

A value: it is told the time, in the running loop's seconds, and neither asks nor waits. It must not know keys; a call is told
from others by its place.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

from crustcredits._errors import GatewayError

_log = logging.getLogger("crustcredits")

# Answers of a gateway in a row after which it opens.
_THRESHOLD = 8
# Seconds until the first probe after it has opened; twice as many after each probe that fails, up to the longest.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """Closed, every call may be sent. After eight answers of a gateway in a row it opens: then one probe at a time may.

    An answer of the API's own closes it again.
    """

    __slots__ = ("_failed_probes", "_in_a_row", "_next_probe", "_opened_by", "_probe")

    def __init__(self) -> None:
        self._in_a_row = 0
        self._opened_by: GatewayError | None = None
        self._failed_probes = 0
        self._next_probe = 0.0
        self._probe: Hashable = None

    def succeeded(self) -> None:
        """The API itself answered."""
        if self._opened_by is not None:
            _log.info("the API answers again, and no gateway in its place")
        self._in_a_row = 0
        self._opened_by = self._probe = None

    def failed(self, place: Hashable, error: GatewayError, now: float) -> bool:
        """A gateway answered the call in that place. Returns whether the breaker has opened by that, or opened anew."""
        self._in_a_row += 1
        if self._opened_by is not None:
            if self._probe != place:  # sent before it opened
                return False
            self._failed_probes += 1
        elif self._in_a_row < _THRESHOLD:
            return False
        else:
            self._failed_probes = 0
            _log.warning("a gateway answered %d requests in a row; no key is asked until the API answers a probe", self._in_a_row)
        self._opened_by, self._probe = error, None
        self._next_probe = now + min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failed_probes, 60))
        return True

    def given_up(self, place: Hashable) -> None:
        """The call in that place ended without an answer. If it was the probe, the next call may be."""
        if self._probe == place:
            self._probe = None

    def blocks(self, place: Hashable) -> GatewayError | None:
        """Why the call in that place must not be sent again, or None."""
        return None if self._opened_by is None or self._probe == place else self._not_asked(self._opened_by)

    def refuses(self, place: Hashable, now: float) -> GatewayError | None:
        """Why a new call in that place must not be sent, or None. While the breaker is open, one that may is the probe."""
        if self._opened_by is not None and self._probe is None and now >= self._next_probe:
            self._probe = place
        return self.blocks(place)

    def _not_asked(self, error: GatewayError) -> GatewayError:
        said = f"not asked, because a gateway answered the last {self._in_a_row} requests in the API's place; try again later"
        return GatewayError(said, status=error.status)
