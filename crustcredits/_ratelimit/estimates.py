"""`Estimates`: the state of a queue for users, and when more calls are likely to start."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Hashable, Iterable

import attrs

from crustcredits._ratelimit.attempt import Attempt
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.cooldown import EndpointCooldown
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.feedback import Feedback
from crustcredits._ratelimit.flow import Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.quota import Quota
from crustcredits._ratelimit.reserve import kept_for_singles
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket, TokenBucket


class Estimates:
    """Reads the parts of a scheduler, and changes no decision of it.

    Args:
        terms: The settings of the scheduler.
        ready: Calls that no token has stopped so far.
        permits: The tokens, and the calls that wait for them.
        scope: The evidence about the scope that the server counts by.
        cooldown: The trials and cooldowns of the endpoint.
        feedback: The effects of ended requests.
        pace: How many requests start per second.
        slots: How many requests are on the wire at once.
    """

    def __init__(
        self,
        terms: SchedulerTerms,
        *,
        ready: FairQueue,
        permits: Permits,
        scope: ScopeDetection,
        cooldown: EndpointCooldown,
        feedback: Feedback,
        pace: Pace,
        slots: ConnectionSlots[Attempt],
    ) -> None:
        self._terms = terms
        self._ready = ready
        self._permits = permits
        self._scope = scope
        self._cooldown = cooldown
        self._feedback = feedback
        self._pace = pace
        self._slots = slots

    def quota(self, account: Hashable | None, now: float) -> Quota:
        """The quota of an account's bucket, or with None of the common bucket."""
        return self._common_quota(now) if account is None else self._account_quota(account, now)

    def likely_starts(
        self,
        flow: Flow,
        seconds: float,
        most: int,
        now: float,
        *,
        rivals: Collection[Flow] = (),
    ) -> tuple[int, float]:
        """How many more calls of a flow are likely to start within these seconds, up to `most`.

        An estimate. `rivals` are other flows that are filled likewise, so as many calls of each are
        expected. Returns the number, and the seconds until the first such call if the number is 0;
        0 seconds if that is not known.
        """
        waiting = self._ahead_of_starts()
        own = int(waiting.pop(flow, 0))
        others = list(waiting.values())
        expected = list((waiting | dict.fromkeys(rivals, math.inf)).values())
        most = bisect_right(
            range(1, most + 1), self._most_ahead(), key=lambda more: _in_turn(own + more, others)
        )
        if not most:
            return 0, 0.0
        quota = self._stream_quota(_in_turn(own + most, expected), now)
        first = quota.start_of(_in_turn(own + 1, others))
        if first > seconds:
            return 0, first - seconds
        starts = bisect_right(
            range(1, most + 1),
            seconds,
            key=lambda more: quota.start_of(_in_turn(own + more, expected)),
        )
        if own and not starts:
            return 0, quota.start_of(_in_turn(own + 1, expected)) - seconds
        return max(1, starts), 0.0

    def _ahead_of_starts(self) -> dict[Flow, float]:
        """How many foreground calls of each flow wait for a start or for a common token.

        Calls that wait for their own account or for a retry take no start from the others.
        """
        queued: Counter[Flow] = Counter(self._ready.lengths())
        for queue in self._permits.common.queues:
            queued.update(queue.lengths())
        return {flow: count for flow, count in queued.items() if flow.kind is not Kind.BACKGROUND}

    def _most_ahead(self) -> float:
        """Most calls that may wait for a start, for one more to have it soon.

        In a trial as many as probes may start; before the first answer as many as there are slots,
        because nothing is known of the time that answers take.
        """
        trial = self._cooldown.trial
        if trial is not None:
            return trial.width - trial.on_wire
        return math.inf if self._slots.usual is not None else self._slots.count

    def _stream_quota(self, calls: int, now: float) -> Quota:
        """The quota for this many calls of a stream, and of others in turn."""
        quota = self._without_tokens(now)
        if self._permits.counts_common:
            kept = self._kept_from_streams(now)
            if self._permits.common.bucket.available(now) - kept < calls:
                quota = attrs.evolve(self._common_quota(now), kept=kept)
        return attrs.evolve(quota, taken=self._slots.count - self._slots.free)

    def _kept_from_streams(self, now: float) -> int:
        """Free common tokens that no call of a stream may take now.

        The reserve for single calls, and the tokens kept until ten requests can witness.
        """
        bucket = self._permits.common.bucket
        kept = kept_for_singles(bucket, self._terms.reserve)
        if bucket.is_shared:  # it keeps none for witnesses
            return kept
        free = bucket.available(now)
        room = self._permits.common.room(Kind.MANY, now)
        return max(kept, free - max(0, room))

    def _without_tokens(self, now: float) -> Quota:
        """A quota that only the pace, the slots and a cooldown of the endpoint bound."""
        quota = self._quota(TokenBucket(1), 0.0, now)
        return attrs.evolve(quota, returns=(0.0,), period=0.0)

    def _common_quota(self, now: float) -> Quota:
        queued = self._queued()
        singles = sum(count for flow, count in queued.items() if flow.kind is Kind.SINGLE)
        lengths = [count for flow, count in queued.items() if flow.kind is Kind.MANY and count]
        waiting = singles + sum(lengths)
        return attrs.evolve(
            self._quota(self._permits.common.bucket, self._terms.reserve, now),
            waiting=waiting,
            refreshing=self._permits.refreshing + sum(queued.values()) - waiting,
            others=self._feedback.used_by_others if self._scope.is_together else 0,
            singles=singles,
            lengths=tuple(lengths),
        )

    def _account_quota(self, name: Hashable, now: float) -> Quota:
        account = self._permits.accounts.find(name)
        own = () if account is None else account.queues
        queues = (self._ready, *self._permits.common.queues, *own)
        waiting = sum(queue.of_account(name, background=False) for queue in queues)
        refreshing = sum(queue.of_account(name, background=True) for queue in queues)
        return attrs.evolve(
            self._quota(TokenBucket(self._terms.requests), 0.0, now)
            if account is None
            else self._quota(account.bucket, account.reserve, now, cools_until=account.cools_until),
            waiting=waiting,
            refreshing=refreshing + (0 if account is None else account.refreshing),
            singles=waiting,
        )

    def _quota(
        self, bucket: Bucket, reserve: float, now: float, *, cools_until: float = -math.inf
    ) -> Quota:
        """A quota without the calls that wait, with this reserve for single calls."""
        trial = self._cooldown.trial
        is_cooldown = trial is not None and trial.is_cooldown
        until = cools_until if trial is None else max(cools_until, trial.until)
        common = self._permits.common.bucket
        return Quota(
            limit=bucket.limit,
            free=bucket.available(now),
            in_flight=bucket.on_wire,
            cooldown=max(0.0, until - now) if until > now or is_cooldown else None,
            probing=trial is not None and trial.on_wire > 0,
            degraded=common.is_degraded,  # the same for all buckets, also those not made yet
            cut_off=common.is_cut_off,
            returns=tuple(max(0.0, when - now) for when in bucket.returns(now, self._terms.period)),
            period=self._terms.period,
            pace=self._pace.current(now),
            slots=self._slots.count,
            answer_seconds=self._slots.usual or 0.0,
            patience=self._slots.patience,
            kept=kept_for_singles(bucket, reserve),
        )

    def _queued(self) -> Counter[Flow]:
        """How many calls of each flow wait, in all queues."""
        queued = self._permits.lengths()
        queued.update(self._ready.lengths())
        return queued


def _in_turn(calls: int, others: Iterable[float]) -> int:
    """So many calls of one flow, and the calls of other flows that start in turn with them."""
    return calls + sum(int(min(calls, count)) for count in others)
