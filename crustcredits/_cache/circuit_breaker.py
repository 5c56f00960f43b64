"""`CircuitBreaker`: stops requests to an endpoint while a gateway answers in the API's place.

The class does no I/O and never waits. Callers pass the time, in seconds of the running loop's
clock.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import attrs

from crustcredits._errors import GatewayError

_log = logging.getLogger("crustcredits")

# Gateway answers in a row that open the circuit breaker.
_THRESHOLD = 8
# Seconds from opening to the first probe. Each probe that a gateway answers doubles the delay, up
# to the longest.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
# Most keys that are remembered as answered by the API.
_REMEMBERED = 1_000
# Once a gateway has answered the probes of this many different keys, it is taken to refuse all.
_KEYS = 3


@attrs.frozen
class Sent:
    """A request on the wire: returned by `CircuitBreaker.start`, and passed to `end`."""

    at: float
    whose: Hashable
    is_probe: bool


class CircuitBreaker:
    """Lets every request pass while closed, and one probe at a time while open.

    Eight gateway answers in a row open the circuit breaker. Only a request sent after the row began
    extends the row, so requests on the wire together count once. An answer of the API's own below
    500 closes it. A probe that ends without an answer of either kind closes it too, but one more
    gateway answer opens it again.

    A gateway may refuse some keys only, and these must not delay the others. So a key that the API
    answered last may be a probe at once, until a gateway has answered three such probes in a row.
    After a gateway has answered a key's probe, other keys may probe first. Another such answer
    delays no other key, while fewer than two other keys stand back.

    Args:
        path: The path of the endpoint, for the log.

    Attributes:
        is_open: Whether the circuit breaker is open.
        failed_probes: Probes that a gateway has answered since the API last answered.
    """

    __slots__ = (
        "_answered",
        "_disappointed",
        "_in_a_row",
        "_is_announced",
        "_next_probe",
        "_path",
        "_probe",
        "_refused",
        "_row_began",
        "_status",
        "failed_probes",
        "is_open",
    )

    def __init__(self, path: str) -> None:
        self._path = path
        self._answered: dict[Hashable, None] = {}  # keys that the API answered last
        self._disappointed = 0  # failed probes of these keys, in a row
        self._in_a_row = 0
        self._row_began = 0.0
        self.is_open = False
        self._is_announced = False  # whether the log says that it is open
        self._status = 0  # HTTP status of the last gateway answer
        self._next_probe = 0.0
        # Keys with a failed probe, and the time until which each of them stands back.
        self._refused: dict[Hashable, float] = {}
        self.failed_probes = 0
        self._probe: Sent | None = None  # on the wire, without an answer so far

    @property
    def is_probing(self) -> bool:
        """Whether a probe is on the wire."""
        return self._probe is not None

    def refusal(self, now: float, whose: Hashable = None) -> GatewayError | None:
        """The error for a request for this key now, or None if it may be sent."""
        if not self.is_open or (now >= self.next_probe(whose) and not self.is_probing):
            return None
        soon = (
            "while a probe is on the wire"
            if self.is_probing
            else f"for another {max(0.0, self.next_probe(whose) - now):.1f} s"
        )
        state = (
            f"not sent: the circuit breaker is open {soon}, because a gateway answered "
            f"{_THRESHOLD} requests in a row in the API's place"
        )
        return GatewayError(
            f"{state}; look for a proxy or firewall between here and the API, or try again later",
            status=self._status,
        )

    def next_probe(self, whose: Hashable) -> float:
        """Earliest time at which a request for this key may be a probe, if none is on the wire."""
        if whose in self._answered:
            return 0.0
        return max(self._next_probe, self._refused.get(whose, self._next_probe))

    def start(self, now: float, whose: Hashable) -> Sent:
        """Record that a request is sent that was not refused."""
        sent = Sent(now, whose, self.is_open)
        if sent.is_probe:
            self._probe = sent
        return sent

    def end(self, sent: Sent, now: float) -> None:
        """Record that the request has ended, with or without an answer."""
        if sent is self._probe:  # neither the API nor a gateway answered it
            self._probe = None
            self.is_open, self._in_a_row, self._row_began = False, _THRESHOLD - 1, now

    def api_answered(self, whose: Hashable = None) -> None:
        """Record that the answer for this key was the API's own."""
        if whose is not None:
            self._answered[whose] = None
            if len(self._answered) > _REMEMBERED:
                del self._answered[next(iter(self._answered))]
        self._disappointed = 0
        if not self._in_a_row:
            return
        if self._is_announced:
            _log.warning("%s: circuit breaker closed: the API answers again", self._path)
        self._is_announced = False
        self._in_a_row = self.failed_probes = self._status = 0
        self.is_open = False
        self._probe = None
        self._refused.clear()

    def gateway_answered(self, sent: Sent, error: GatewayError, now: float) -> None:
        """Record that a gateway answered the request."""
        is_probe = sent is self._probe
        self._forget_answer(sent.whose, is_probe=is_probe)
        if self.is_open and not is_probe:  # sent before the circuit breaker opened
            return
        if self._in_a_row and not is_probe and sent.at < self._row_began:
            return
        if not self._in_a_row:
            self._row_began = now
        self._in_a_row += 1
        self._status = error.status
        if is_probe:
            self._probe = None
            others = sum(until > now for until in self._refused.values())
            again = sent.whose in self._refused and others < _KEYS - 1
            self.failed_probes += 1
            if sent.whose is not None:
                self._refused[sent.whose] = now + (1 if again else 2) * self._pause()
            if again:  # says nothing new about other keys
                return
        elif self._in_a_row < _THRESHOLD:
            return
        elif not self.failed_probes:
            self._is_announced = True
            _log.warning(
                "%s: circuit breaker open: a gateway answered %d requests in a row in the "
                "API's place; only probes are sent until the API answers one; "
                "look for a proxy or firewall between here and the API",
                self._path,
                self._in_a_row,
            )
        self.is_open = True
        self._next_probe = now + self._pause()

    def _forget_answer(self, whose: Hashable, *, is_probe: bool) -> None:
        """Record that the API's answer for this key is no longer the last one.

        After three failed probes of such keys in a row, no key may probe early.
        """
        if whose in self._answered:
            del self._answered[whose]
            self._disappointed += is_probe
            if self._disappointed == _KEYS:
                self._answered.clear()

    def _pause(self) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self.failed_probes, 60))
