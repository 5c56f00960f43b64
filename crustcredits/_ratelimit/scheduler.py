"""`Scheduler`: the admission queue of an endpoint, which decides the call that starts next.

A call starts only without a cooldown of its endpoint or its account. The trial must have room, a
connection slot must be free, and the pace must allow the start. The account's bucket and the common
bucket must have a token each. The call takes all of them in that one moment.

It does no I/O and never waits: methods take the time as `now`, and only the pace reads the loop's
clock, through aiolimiter. The dispatcher has the timers and tasks, and asks again at the moment
that `grant` names. Both endpoints of a client share the pace and the slots.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.cooldown import EndpointCooldown, Trial
from crustcredits._ratelimit.estimates import Estimates
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.feedback import Feedback
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.quota import Quota
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import MakeBucket, local_bucket
from crustcredits._ratelimit.token_queue import AccountQueue

# The divisor that gives the refreshes' part of the slots.
_REFRESHES_ON_WIRE = 4
# Most calls that one `grant` passes over.
_LOOKS = 1_000
# Where starts are scarce, a call needs the time of this many usual answers, and no more than these
# seconds. Otherwise the next call is always the one that expires next, and each token is spent
# without a use.
_ANSWERS = 2.0
_SHORT = 0.4


class Scheduler:
    """The admission queue of one endpoint.

    The class is long because a start is decided, with all its conditions, in one moment.

    Args:
        terms: The settings it keeps to.
        pace: How many requests start per second.
        slots: How many requests are on the wire at once.
        seed: Seed of the draws among calls of a trial; random by default.
        make_bucket: Makes the tokens of an account, or of all together (None). It is given the
            limit, and a function to call with the account when new tokens have come.
        make_permits: Makes the permits out of them.
        is_barred: Whether a call may not be sent at all now. `grant` then hands the call out and
            forgets it.

    Attributes:
        is_barring: Whether `is_barred` has to be asked.
        looks: Calls that the last `grant` has looked at without starting them.
        ready: Calls that no token has stopped so far.
        permits: The tokens, and the calls that wait for them.
        cooldown: The trials and cooldowns of the endpoint.
        estimates: The state for users, and when more calls are likely to start.
    """

    def __init__(
        self,
        terms: SchedulerTerms,
        *,
        pace: Pace,
        slots: ConnectionSlots[Attempt],
        seed: int | None = None,
        make_bucket: MakeBucket = local_bucket,
        make_permits: type[Permits] = Permits,
        is_barred: Callable[[Call, float], bool] | None = None,
    ) -> None:
        self._random = random.Random(seed)
        self._is_barred = is_barred
        self.is_barring = is_barred is not None
        self._pace = pace
        self._slots = slots
        self._scope = ScopeDetection(terms.window, terms.late, proves=terms.scope == "auto")
        self.ready = FairQueue()
        self.cooldown = EndpointCooldown(terms.window)
        self.permits = make_permits(
            terms, scope=self._scope, ready=self.ready, make_bucket=make_bucket
        )
        self._feedback = Feedback(
            terms, permits=self.permits, scope=self._scope, cooldown=self.cooldown, pace=pace
        )
        self.estimates = Estimates(
            terms,
            ready=self.ready,
            permits=self.permits,
            scope=self._scope,
            cooldown=self.cooldown,
            feedback=self._feedback,
            pace=pace,
            slots=slots,
        )
        self.looks = 0

    # --- calls

    def put(self, call: Call) -> None:
        """Add a call to the queue, for its first attempt or for another."""
        self.ready.push(call)

    def put_pool(self, pool: PoolFlow) -> None:
        """Add the calls of a collection of known size to the queue, without an object each."""
        self.ready.push_pool(pool)

    def remove_pool(self, pool: PoolFlow) -> None:
        """Remove the calls of a pool that have not begun."""
        if pool.queue is not None:
            pool.queue.remove_pool(pool)

    def remove(self, call: Call, now: float) -> bool:
        """Remove a call that waits.

        Does nothing for other calls. Returns whether another call may start because of that.
        """
        return call.queue is not None and self.permits.remove(call, now)

    def move(self, call: Call, flow: Flow, now: float) -> None:
        """Move a call to another flow. A waiting call goes to the end of that flow."""
        waits = call.queue is not None
        self.remove(call, now)
        call.flow = flow
        if waits:
            self.put(call)

    def drain(self, whose: Hashable | None, now: float, most: int | None = None) -> list[Call]:
        """Take out the calls that wait for a token of this account, up to `most`.

        With None the ones that wait for the common bucket.
        """
        return self.permits.give_up(whose, now, most)

    @property
    def holds_back(self) -> bool:
        """Whether foreground calls are ready to start.

        After a `grant` without a start, something stops them all.
        """
        return self.ready.has_foreground

    # --- starts and ends

    def grant(self, now: float, most: int = _LOOKS) -> Attempt | Call | float | None:
        """Start the next request, hand out a call that must not be sent, or say when to ask again.

        Returns None without such a moment. The caller asks until no request comes, and again after
        each other method. One call of `grant` looks at `most` calls, so that other tasks run in
        between.
        """
        permits = self.permits
        self.looks = 0
        if permits.next_moment <= now:
            permits.release_due(now)
        until: float | None = None
        while self.looks < most:
            if not self.ready.length:
                break
            trial = self.cooldown.trial
            is_blocked, until = self._is_blocked(trial, now)
            if is_blocked:
                break
            found = self._take(trial, now)
            if isinstance(found, Attempt):
                return found
            self.looks += 1
            if found is not None:
                return found
        else:
            return now
        moment = permits.next_moment
        if until is None:
            return moment if moment < math.inf else None
        return min(moment, until)

    def ended(self, request: Attempt, answer: AttemptResult, now: float) -> None:
        """Note that a request has ended. A refusal may count as spared for its call."""
        self._slots.release(request, now, answered=answer.is_answered)
        if request.in_trial:
            request.leave_trial()
        account, permits = request.account, self.permits
        if request.kind is Kind.BACKGROUND:
            permits.refreshing -= 1
            account.refreshing -= 1
        if answer.is_served:
            self._feedback.served(request, answer, now)
        else:
            self._feedback.not_served(request, answer, now)
        if account.has_waiters:
            permits.release(account, now)
        if permits.common.has_waiters:
            permits.release(permits.common, now)
        permits.accounts.forget_idle(now)

    def _is_blocked(self, trial: Trial | None, now: float) -> tuple[bool, float | None]:
        """Whether no call of this endpoint may start, and until when.

        The second is None if that depends on another event.
        """
        if trial is not None or self._slots.free <= 0:
            for request in self._slots.overdue(now):
                request.leave_trial()
        if trial is not None and now < trial.until:
            return True, trial.until
        if self._slots.free <= 0 or (trial is not None and trial.on_wire >= trial.width):
            return True, self._slots.next_overdue()
        until = self._pace.wait(now)
        if until is not None:
            return True, until
        if self.permits.refreshing * _REFRESHES_ON_WIRE < self._slots.count:
            return False, None
        return not self.ready.has_foreground, None

    def _take(self, trial: Trial | None, now: float) -> Attempt | Call | None:
        """Start the next call in turn, or hand it out if it must not be sent.

        None if it waits in another queue now.
        """
        call = (
            self.ready.pop()
            if trial is None
            else self.ready.pop(self._random, draw_singles=trial.is_cooldown)
        )
        if self._must_not_start(call, now):
            self.permits.drop(call, now)
            return call
        account = self.permits.admit(call, now)
        if account is not None:
            return self._start(call, account, trial, now)
        if call.deadline < math.inf and self.is_hopeless(call, now):
            self.remove(call, now)
            return call
        return None

    def _start(self, call: Call, account: AccountQueue, trial: Trial | None, now: float) -> Attempt:
        self._pace.take(now)
        own, common = self.permits.take(call, account, now)
        first, call.was_sent = not call.was_sent, True
        kind = call.flow.kind
        request = Attempt(call, kind, now, own, common, trial, first, trial is not None, account)
        self._slots.take(request, now)
        if trial is not None:
            trial.on_wire += 1
        return request

    # --- deadlines

    def earliest(self, name: Hashable, now: float) -> float:
        """The earliest time at which a request of this account can start.

        For a call that waits.
        """
        return self.permits.earliest(name, now)

    def hopeless(self, names: Iterable[Hashable], deadline: float, now: float) -> list[int]:
        """The indexes of the names whose calls certainly do not start before the deadline."""
        return self.permits.hopeless(names, deadline, now)

    def is_hopeless(self, call: Call, now: float) -> bool:
        """Whether a call certainly does not start before its deadline."""
        return self.permits.earliest(call.account, now) > call.deadline

    def is_late(self, call: Call, now: float) -> bool:
        """Whether a call's waiters leave before an answer, while other calls need the token."""
        left = call.deadline - now
        if left <= 0:
            return True
        needed = min(_ANSWERS * (self._slots.usual or 0.0), _SHORT)
        return left < needed and self._is_scarce(call.flow, needed, now)

    def _is_scarce(self, flow: Flow, seconds: float, now: float) -> bool:
        """Whether more calls of a flow wait than could start in these seconds.

        Flows take turns, so the calls of other flows take no start from it.
        """
        if isinstance(flow, PoolFlow):  # all have one deadline: none has more use of the token
            return False
        common, room = self.permits.common, self._slots.free
        if self.permits.counts_common:
            if common.of_flow(flow):
                return True
            room = min(room, common.room(flow.kind, now))
        rate = self._pace.current(now)
        if rate is not None:
            room = min(room, math.ceil(rate * seconds))
        return self.ready.of_flow(flow) >= max(1, room)

    def _must_not_start(self, call: Call, now: float) -> bool:
        """Whether the next call in turn must not be sent."""
        if call.deadline < math.inf and self.is_late(call, now):
            return True
        return self.is_barring and self._is_barred is not None and self._is_barred(call, now)

    def quota(self, account: Hashable | None, now: float) -> Quota:
        """The quota of an account's bucket, or with None of the common bucket."""
        return self.estimates.quota(account, now)
