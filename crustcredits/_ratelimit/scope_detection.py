"""`ScopeDetection`: what the server counts by, as far as its answers prove it. Arithmetic only.

The proof is that of `witnesses`: ten requests of other accounts are missing from a count in which
they would stand if all accounts were counted together. Nothing is concluded for other requests.
"""

from __future__ import annotations

import math

from crustcredits._ratelimit.witnesses import LAG, WITNESSES, Witnesses

# Served answers in a row that tell of more than their own account's requests, which say that all
# accounts are counted together.
_TOGETHER = 10
# Periods in which nothing is proven after a hold against the proof; doubled each time, up to the
# most.
_DOUBT = 10
_MOST_DOUBT = 160


class ScopeDetection:
    """What the answers on one endpoint say of the scope that the server counts by.

    Args:
        period: Seconds for which the server counts a request.
        late: Seconds that a request takes at the most.
        proves: Whether a proof is asked for: with scope `"auto"`.

    Attributes:
        has_seen_counts: Whether a served answer has told counts.
    """

    __slots__ = (
        "_alone_at",
        "_doubt",
        "_in_a_row",
        "_late",
        "_no_proof_before",
        "_period",
        "_proves",
        "_witnesses",
        "has_seen_counts",
    )

    def __init__(self, period: float, late: float, *, proves: bool) -> None:
        self._period = period
        self._late = late
        self._proves = proves
        self._witnesses = Witnesses(period, late)
        self._alone_at = -math.inf
        self._in_a_row = 0
        self._no_proof_before = -math.inf
        self._doubt = 0
        self.has_seen_counts = False

    @property
    def is_together(self) -> bool:
        """Whether the last served answers all told of more than their own account's requests."""
        return self._in_a_row >= _TOGETHER

    def is_alone(self, now: float) -> bool:
        """Whether in the last period an answer told of no more than its own account's requests, with others of ours missing."""
        return self._alone_at > now - self._period

    def can_witness(self, now: float) -> bool:
        """Whether ten requests can witness for one that starts and ends now."""
        return self._witnesses.standing(now, now) >= WITNESSES

    def can_witness_at(self, now: float) -> float | None:
        """When ten can, if no other answer comes before; None where another answer is needed."""
        return self._witnesses.settles(now)

    def ended_before(self, started: float, now: float) -> int:
        """Answers of the last period that had come when a request started."""
        return self._witnesses.standing(started + LAG, now)

    def served(self, started: float, now: float) -> None:
        """A served answer without counts came: its request can witness."""
        self._witnesses.add(started, now)

    def told(self, used: int, own: int, started: float, now: float) -> tuple[bool, bool]:
        """A served answer told that `used` requests were counted, of which at most `own` are its account's.

        Returns whether this proves that its account is counted apart, and the weaker sign that it
        is (`is_alone`).
        """
        self.has_seen_counts = True
        if used > own:
            self._in_a_row += 1
            self._witnesses.add(started, now)
            return False, False
        self._in_a_row = 0
        alone = own <= self.ended_before(started, now)
        if alone:
            self._alone_at = now
        proved = (
            self._proves
            and now >= self._no_proof_before
            and self._witnesses.prove(used, own, started, now)
        )
        self._witnesses.add(started, now)
        return proved, alone

    def contradicted(self, now: float) -> None:
        """A refusal with counts made a hold while answers seemed alone: the counts may speak of another limit."""
        if self._proves and now >= self._no_proof_before and self.is_alone(now):
            self._doubt = min(_MOST_DOUBT, 2 * self._doubt or _DOUBT)
            self._no_proof_before = now + self._doubt * self._period
