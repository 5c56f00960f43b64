"""`CircuitBreaker`: stops requests to an endpoint while a gateway answers in the API's place.

A value: it is told the time, in the running loop's seconds, and neither sends nor waits.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable

import attrs

from crustcredits._errors import GatewayError

_log = logging.getLogger("crustcredits")

# Answers of a gateway in a row after which it opens.
_THRESHOLD = 8
# Seconds until the first probe after it has opened; twice as many after each probe that a gateway
# answers, up to the longest.
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
# Keys that the API has answered are remembered, so many.
_REMEMBERED = 1_000
# Different keys whose probes a gateway has answered, from which on it is taken to refuse all.
_KEYS = 3


@attrs.frozen
class Sent:
    """A request on its way, as `CircuitBreaker.start` returns it and `end` wants it back."""

    at: float
    whose: Hashable
    is_probe: bool


class CircuitBreaker:
    """Closed, every request may be sent.

    After eight answers of a gateway in a row it opens: then one probe at a time may.

    Only requests that were sent after the row had begun make it longer, so that those on the wire
    together count once. An answer of the API's own below 500 closes it. A probe that ends without
    an answer of either kind closes it too, but one more answer of a gateway opens it again.

    A gateway may refuse some keys alone, which must hold up no others. So a key that the API has
    answered last may be a probe at once, until a gateway has answered three such probes in a row. A
    key whose probe a gateway has answered lets other keys go first, and another such answer puts
    off nobody else, while less than two other keys stand back.

    Args:
        path: The path of the endpoint, for the log.

    Attributes:
        is_open: Whether it is open.
        failed_probes: Probes that a gateway has answered since the API did.
    """

    __slots__ = (
        "_answered",
        "_disappointed",
        "_in_a_row",
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
        self._answered: dict[Hashable, None] = {}  # keys that the API has answered last
        self._disappointed = 0  # of these, whose probes a gateway has answered in a row
        self._in_a_row = 0
        self._row_began = 0.0
        self.is_open = False
        self._status = 0  # of the last answer of a gateway
        self._next_probe = 0.0
        self._refused: dict[
            Hashable, float
        ] = {}  # whose probes a gateway has answered, and until when they stand back
        self.failed_probes = 0
        self._probe: Sent | None = None  # on the wire, and without an answer yet

    @property
    def is_probing(self) -> bool:
        """Whether a probe is on the wire."""
        return self._probe is not None

    def refusal(self, now: float, whose: Hashable = None) -> GatewayError | None:
        """Why no request for this key may be sent now, or None."""
        if not self.is_open or (now >= self.next_probe(whose) and not self.is_probing):
            return None
        soon = (
            "while a probe is on the wire"
            if self.is_probing
            else f"for {max(0.0, self.next_probe(whose) - now):.1f} s"
        )
        said = (
            f"not asked {soon}, because a gateway answered {_THRESHOLD} requests in a row in "
            "the API's place"
        )
        return GatewayError(
            f"{said}; look for a proxy or firewall between here and the API, or try again",
            status=self._status,
        )

    def next_probe(self, whose: Hashable) -> float:
        """When a request for this key may be a probe, unless one is on the wire then."""
        if whose in self._answered:
            return 0.0
        return max(self._next_probe, self._refused.get(whose, self._next_probe))

    def start(self, now: float, whose: Hashable) -> Sent:
        """A request is sent that was not refused."""
        sent = Sent(now, whose, self.is_open)
        if sent.is_probe:
            self._probe = sent
        return sent

    def end(self, sent: Sent, now: float) -> None:
        """The request has ended, whatever came of it."""
        if sent is self._probe:  # neither the API nor a gateway has answered it
            self._probe = None
            self.is_open, self._in_a_row, self._row_began = False, _THRESHOLD - 1, now

    def api_answered(self, whose: Hashable = None) -> None:
        """The answer for this key was the API's own."""
        if whose is not None:
            self._answered[whose] = None
            if len(self._answered) > _REMEMBERED:
                del self._answered[next(iter(self._answered))]
        self._disappointed = 0
        if not self._in_a_row:
            return
        if self._in_a_row >= _THRESHOLD - 1 and self._status:
            _log.info("%s: the API answers again", self._path)
        self._in_a_row = self.failed_probes = self._status = 0
        self.is_open = False
        self._probe = None
        self._refused.clear()

    def gateway_answered(self, sent: Sent, error: GatewayError, now: float) -> None:
        """The answer was a gateway's."""
        is_probe = sent is self._probe
        self._forget_answer(sent.whose, is_probe=is_probe)
        if self.is_open and not is_probe:  # sent before it opened
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
            if again:  # which is no news of the others
                return
        elif self._in_a_row < _THRESHOLD:
            return
        elif not self.failed_probes:
            _log.warning(
                "%s: a gateway answered %d requests in a row in the API's place; no key is "
                "asked until the API answers a probe; "
                "look for a proxy or firewall between here and the API",
                self._path,
                self._in_a_row,
            )
        self.is_open = True
        self._next_probe = now + self._pause()

    def _forget_answer(self, whose: Hashable, *, is_probe: bool) -> None:
        """The API's answer for this key is not the last.

        After three probes of such keys nobody's is worth anything.
        """
        if whose in self._answered:
            del self._answered[whose]
            self._disappointed += is_probe
            if self._disappointed == _KEYS:
                self._answered.clear()

    def _pause(self) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self.failed_probes, 60))
