"""`CircuitBreaker`: stops requests to an endpoint while a gateway answers in the API's place.

A value: it is told the time, in the running loop's seconds, and neither sends nor waits. It must not know keys.
"""

from __future__ import annotations

import logging

from crustcredits._errors import GatewayError

_log = logging.getLogger("crustcredits")

# Answers of a gateway in a row after which it opens.
_THRESHOLD = 8
# Seconds until the first probe after it has opened; twice as many after each probe that fails, up to the longest.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0


class CircuitBreaker:
    """Closed, every request may be sent. After eight answers of a gateway in a row it opens: then one probe at a time may.

    An answer of the API's own below 500 closes it. A request is a probe from right before it is sent until it ends, and no
    longer, so that waiting and retrying keep no other request from being one.

    Args:
        path: The path of the endpoint, for the log.
    """

    __slots__ = ("_failed_probes", "_in_a_row", "_next_probe", "_open", "_path", "_probing", "_status")

    def __init__(self, path: str) -> None:
        self._path = path
        self._in_a_row = 0
        self._open = False
        self._status = 0  # of the answer that opened it
        self._failed_probes = 0
        self._next_probe = 0.0
        self._probing = False

    def refusal(self, now: float) -> GatewayError | None:
        """Why a request must not be sent now, or None."""
        if not self._open or (now >= self._next_probe and not self._probing):
            return None
        said = f"not asked, because a gateway answered {self._in_a_row} requests in a row in the API's place"
        soon = "soon: a request is finding out whether the API is back" if self._probing else f"in {self._next_probe - now:.1f} s"
        return GatewayError(f"{said}; try again {soon}", status=self._status)

    def start(self) -> bool:
        """A request is sent that was not refused. Returns whether it is a probe, which `end` has to be told."""
        probe = self._open
        self._probing = self._probing or probe
        return probe

    def end(self, now: float, *, probe: bool) -> None:
        """The request has ended, whatever came of it. A probe without an answer of either kind puts off the next one."""
        if probe:
            self._probing = False
            if now >= self._next_probe:
                self._next_probe = now + self._pause()

    def api_answered(self) -> None:
        """The answer was the API's own."""
        if self._open:
            _log.info("%s: the API answers again", self._path)
        self._in_a_row = 0
        self._open = False

    def gateway_answered(self, error: GatewayError, now: float, *, probe: bool) -> None:
        """The answer was a gateway's."""
        self._in_a_row += 1
        if self._open and probe:
            self._failed_probes += 1
        elif self._open or self._in_a_row < _THRESHOLD:  # sent before it opened, or too few
            return
        else:
            self._failed_probes = 0
            _log.warning(
                "%s: a gateway answered %d requests in a row in the API's place; no key is asked until the API answers a probe",
                self._path,
                self._in_a_row,
            )
        self._open, self._status = True, error.status
        self._next_probe = now + self._pause()

    def _pause(self) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failed_probes, 60))
