"""`ScopeDetection`: the scope that the server counts by, as far as its answers prove it.

The proof is that of `witnesses`: ten requests of other accounts are missing from a count that would
include them if all accounts were counted together. Nothing is concluded for other requests.
Arithmetic only.
"""

from __future__ import annotations

import math

from crustcredits._ratelimit.witnesses import LAG, WITNESSES, Witnesses

# Served answers in a row that count more than their own account's requests, as evidence that all
# accounts are counted together.
_TOGETHER = 10
# Periods without proofs after a cooldown that contradicts a proof; doubled each time, up to the
# most.
_DOUBT = 10
_MOST_DOUBT = 160


class ScopeDetection:
    """Evidence in the answers of one endpoint about the scope that the server counts by.

    Args:
        period: Seconds for which the server counts a request.
        late: Most seconds that a request takes.
        proves: Whether proofs are looked for: with scope `"auto"`.

    Attributes:
        has_seen_counts: Whether a served answer had counts.
    """

    __slots__ = (
        "_apart_at",
        "_doubt",
        "_in_a_row",
        "_no_proof_before",
        "_period",
        "_proves",
        "_witnesses",
        "has_seen_counts",
    )

    def __init__(self, period: float, late: float, *, proves: bool) -> None:
        self._period = period
        self._proves = proves
        self._witnesses = Witnesses(period, late)
        self._apart_at = -math.inf
        self._in_a_row = 0
        self._no_proof_before = -math.inf
        self._doubt = 0
        self.has_seen_counts = False

    @property
    def is_together(self) -> bool:
        """Whether the last served answers all counted more than their own account's requests."""
        return self._in_a_row >= _TOGETHER

    def is_counted_apart(self, now: float) -> bool:
        """Whether a recent answer counted its account's requests apart, and none of our other ones.

        Recent means within the last period.
        """
        return self._apart_at > now - self._period

    def can_witness(self, now: float) -> bool:
        """Whether ten requests can witness for one that starts and ends now."""
        return self._witnesses.standing(now, now) >= WITNESSES

    def can_witness_at(self, now: float) -> float | None:
        """When ten requests can witness, if no other answer comes before.

        None where another answer is needed.
        """
        return self._witnesses.stand_at(now)

    def ended_before(self, started: float, now: float) -> int:
        """Answers of the last period that had come when a request started."""
        return self._witnesses.standing(started + LAG, now)

    def served(self, started: float, now: float) -> None:
        """Note a served answer without counts: its request can witness."""
        self._witnesses.add(started, now)

    def counted(self, used: int, own: int, started: float, now: float) -> tuple[bool, bool]:
        """Note a served answer that counts `used` requests, at most `own` of them of its account.

        Returns whether this proves that its account is counted separately, and the weaker sign that
        it is (`is_counted_apart`).
        """
        self.has_seen_counts = True
        if used > own:
            self._in_a_row += 1
            self._witnesses.add(started, now)
            return False, False
        self._in_a_row = 0
        apart = own <= self.ended_before(started, now)
        if apart:
            self._apart_at = now
        proved = (
            self._proves
            and now >= self._no_proof_before
            and self._witnesses.proves(used, own, started, now)
        )
        self._witnesses.add(started, now)
        return proved, apart

    def contradicted(self, now: float) -> None:
        """Note a refusal with counts that started a cooldown, against an answer counted alone.

        The counts may be of another limit.
        """
        if self._proves and now >= self._no_proof_before and self.is_counted_apart(now):
            self._doubt = min(_MOST_DOUBT, 2 * self._doubt or _DOUBT)
            self._no_proof_before = now + self._doubt * self._period
