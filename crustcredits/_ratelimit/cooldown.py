"""`EndpointCooldown`: the trial after a refusal, and the cooldown after a run of refused probes.

The cooldown of a single account after a 429 is `AccountQueue.cools_until`, which `feedback` sets.

A value: methods take the time as `now`. A trial may become a cooldown.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import attrs

# Refused probes in a row that start a cooldown, by the evidence of the counts in the answers.
_TOGETHER = 2
_AFTER_A_HOLD = 3
_UNKNOWN = 8
_APART = 24
# A trial doubles its width with each served answer, and ends beyond this one.
_OVER = 16
# Periods for which a past cooldown lowers the run that starts the next one.
_MEMORY = 2
# Seconds of a first cooldown without a stated wait; doubled with each refused probe, up to the
# longest.
_FIRST_HOLD = 0.25
_LONGEST_UNKNOWN = 8.0
# Most seconds by which a refused probe extends a cooldown, before doublings, unless the counts are
# known to be of all accounts together.
_WEAK_HOLD = 1.0
# Refused probes in a cooldown before its length doubles, in case the server counts refused requests
# too; and seconds of the longest.
_PATIENT = 8
_LONGEST_HOLD = 32.0
_MOST_DOUBLINGS = 10


@attrs.define(eq=False)
class Trial:
    """A state in which each request is a probe, with `width` probes at a time.

    Attributes:
        until: No probe starts before this time in a cooldown.
        account: The account whose refusal began the trial.
        is_of_several: Whether another account was refused since.
        width: Most probes on the wire.
        on_wire: Probes on the wire.
        refused: Refused probes in a row.
        is_cooldown: Whether the trial has become a cooldown of the endpoint.
        holds: Refused probes of the cooldown, the one that started it included.
        with_counts: Whether the refusal that started the last cooldown had counts.
    """

    until: float
    account: Hashable = None
    is_of_several: bool = False
    width: int = 1
    on_wire: int = 0
    refused: int = 0
    is_cooldown: bool = False
    holds: int = 0
    with_counts: bool = False

    def concerns_others_than(self, account: Hashable) -> bool:
        """Whether accounts other than this one are refused too."""
        return self.is_of_several or account != self.account


@attrs.frozen(kw_only=True)
class Evidence:
    """The evidence about a refusal, beside its own wait.

    Attributes:
        has_counts: Whether the refusal has counts.
        is_foreign: Whether served answers have counts and the refusal has none: something in front
            of the API refused.
        is_sure: Whether all accounts are known to be counted together.
        is_counted_apart: Whether an answer of the last period seemed to be of an account that is
            counted separately.
    """

    has_counts: bool
    is_foreign: bool
    is_sure: bool
    is_counted_apart: bool


class EndpointCooldown:
    """The effect of refusals on all calls of one endpoint.

    Attributes:
        trial: The trial under way, or None.
    """

    __slots__ = ("_held_at", "_period", "trial")

    def __init__(self, period: float) -> None:
        self._period = period
        self._held_at = -math.inf
        self.trial: Trial | None = None

    def refused(
        self,
        account: Hashable,
        probe: Trial | None,
        wait: float | None,
        evidence: Evidence,
        now: float,
    ) -> bool:
        """Note a refused request; `probe` is the trial in which it was sent.

        Returns whether this starts or extends a cooldown of the endpoint.
        """
        trial = self.trial = self.trial or Trial(now, account)
        trial.is_of_several = trial.concerns_others_than(account)
        if probe is trial:
            trial.refused += 1
        elif trial.is_cooldown:  # sent before the cooldown
            trial.until = max(trial.until, now + min(wait or 0.0, self._period))
            return False
        if not trial.is_cooldown and trial.refused < self._needed(evidence, now) - 1:
            return False
        again, trial.is_cooldown, trial.with_counts, trial.width = (
            trial.is_cooldown,
            True,
            evidence.has_counts,
            1,
        )
        trial.holds += 1
        self._held_at = now
        span = self._span(trial.holds, wait, again=again, sure=evidence.is_sure)
        trial.until = max(trial.until, now + min(span, self._period))
        return True

    def served(self, probe: Trial | None, *, apart: bool) -> None:
        """Note a served request; `apart` is whether its counts seem to be of its account only."""
        trial = self.trial
        if trial is None or (probe is not trial and not apart):
            return
        trial.width *= 2
        trial.refused = trial.holds = 0
        if trial.width > _OVER or (apart and (not trial.is_cooldown or trial.with_counts)):
            self.trial = None

    def _needed(self, evidence: Evidence, now: float) -> int:
        if evidence.is_sure:
            return _TOGETHER
        if evidence.is_foreign:
            return _UNKNOWN
        if evidence.is_counted_apart:
            return _APART
        return _AFTER_A_HOLD if self._held_at > now - _MEMORY * self._period else _UNKNOWN

    @staticmethod
    def _span(holds: int, wait: float | None, *, again: bool, sure: bool) -> float:
        """Seconds of the next cooldown."""
        span = (
            min(_LONGEST_UNKNOWN, _FIRST_HOLD * 2.0 ** min(_MOST_DOUBLINGS, holds - 1))
            if wait is None
            else wait
        )
        more = 2.0 ** min(_MOST_DOUBLINGS, max(0, holds - 1 - _PATIENT))
        if more > 1:  # a stated wait of 0 grows too
            span = max(span, _FIRST_HOLD)
        if again and not sure:
            return min(max(_LONGEST_HOLD, span), min(span, _WEAK_HOLD) * more)
        if more > 1:
            return max(span, min(_LONGEST_HOLD, span * more))
        return span
