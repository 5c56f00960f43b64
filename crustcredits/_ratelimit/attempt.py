"""`Attempt`: a request on the wire; and `AttemptResult`: how it ended."""

from __future__ import annotations

import attrs

from crustcredits._ratelimit.cooldown import Trial
from crustcredits._ratelimit.flow import Call, Kind
from crustcredits._ratelimit.token_queue import AccountQueue


@attrs.define(eq=False)
class Attempt:
    """A request on the wire, which holds a token of each bucket that may count it.

    Attributes:
        call: The call for which it was sent.
        kind: The priority with which it started.
        started: When.
        own: The mark of its place in the count of its account.
        common: The mark of its place in the common count; None where accounts count apart.
        trial: The trial during which it started, or None.
        first: Whether it is the first request of its call.
        in_trial: Whether it counts as a probe on the wire.
        account: The tokens of its account.
    """

    call: Call
    kind: Kind
    started: float
    own: int
    common: int | None
    trial: Trial | None
    first: bool
    in_trial: bool
    account: AccountQueue

    def leave_trial(self) -> None:
        """Stop counting as a probe on the wire: the request has ended, or hangs."""
        if self.in_trial and self.trial is not None:
            self.trial.on_wire -= 1
            self.in_trial = False


@attrs.frozen(kw_only=True)
class AttemptResult:
    """How a request ended, as far as admission is concerned.

    Attributes:
        status: The HTTP status; None without a complete answer.
        by_gateway: Whether a gateway answered in the place of the API.
        limit: The limit that the answer states, or None.
        remaining: The rest of that limit that the answer states, or None.
        wait: Seconds that a refusal asks to wait, or None.
        unsent: Whether the request certainly never left.
        incomplete: Whether the headers of an answer came, but not its whole body: the server has
            counted the request, and has neither served nor refused it.
    """

    status: int | None
    by_gateway: bool = False
    limit: int | None = None
    remaining: int | None = None
    wait: float | None = None
    unsent: bool = False
    incomplete: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether an answer came, complete or not."""
        return self.status is not None or self.incomplete

    @property
    def is_served(self) -> bool:
        """Whether the API itself answered, and did not refuse or fail."""
        return (
            self.status is not None
            and not self.by_gateway
            and self.status < 500
            and self.status not in {408, 429}
        )

    @property
    def is_refused(self) -> bool:
        """Whether the request was refused: a 429, or a 503 that asks for a wait."""
        return self.status == 429 or (self.status == 503 and self.wait is not None)

    @property
    def may_come_late(self) -> bool:
        """Whether the server may count the request later than its end.

        True without an answer, and for the answer of a gateway, which may pass the request on
        later.
        """
        if not self.is_answered or self.status in {408, 502, 503, 504}:
            return True
        return self.by_gateway and self.status != 429

    @property
    def used(self) -> int | None:
        """Requests that the server has counted, according to the answer."""
        if self.limit is None or self.remaining is None or self.remaining > self.limit:
            return None
        return self.limit - self.remaining
