"""`Streams`: the streams with a timeout on one endpoint, which ask for their likely starts."""

from __future__ import annotations

from crustcredits._ratelimit.estimates import Estimates
from crustcredits._ratelimit.flow import Flow

# A stream whose next key waits asks again for its likely starts within this time, in seconds.
_ASKS_AGAIN = 2.0


class Streams:
    """The streams that share the starts of one endpoint.

    Args:
        estimates: The estimates of the endpoint's scheduler.
    """

    def __init__(self, estimates: Estimates) -> None:
        self._estimates = estimates
        self._asked: dict[Flow, float] = {}  # when each stream has asked last

    def likely_starts(self, flow: Flow, seconds: float, most: int, now: float) -> tuple[int, float]:
        """How many more calls of a stream are likely to start within these seconds, up to `most`.

        Other streams that ask too are expected to start as many. Returns the number, and the
        seconds until the first such call if the number is 0.
        """
        rivals = [
            each for each, at in self._asked.items() if each is not flow and at > now - _ASKS_AGAIN
        ]
        self._asked[flow] = now
        return self._estimates.likely_starts(flow, seconds, most, now, rivals=rivals)

    def end(self, flow: Flow) -> None:
        """Expect no further call of a stream."""
        self._asked.pop(flow, None)
