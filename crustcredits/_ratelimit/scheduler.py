"""`Scheduler`: the one admission queue of an endpoint, which decides what starts next.

A call starts when, at one moment, no hold is on, the trial has room, a connection slot is free, the pace allows it, its account has
a token and is not cooling down, and the common bucket has a token for it. All is taken then. Every decision is a
function of values and of the time it is told; timers and tasks are its caller's, who asks again at the moment that `grant` names.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Hashable
from typing import Literal

import attrs

from crustcredits._ratelimit.cooldown import EndpointCooldown, Evidence, Trial
from crustcredits._ratelimit.fair_queue import Call, FairQueue
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.token_bucket import TokenBucket

# Of the common bucket this share is not given before ten requests can witness; in smaller buckets nothing is kept so.
_TENTH = 0.1
_SMALLEST_WITH_A_TENTH = 11
# Refusals of probes, and refusals of something in front of the API, that cost a call no attempt.
_SPARED = 4
# Of so many last probes of calls that were never asked, the share that something in front refused and that halves the pace.
_LATELY = 16
_FOREIGN_SHARE = 0.4
# A request that hangs stops counting, and so many times the slots may hang.
_HANGING_SHARE = 8


@attrs.frozen(kw_only=True)
class Terms:
    """What a scheduler keeps to.

    Attributes:
        requests: Requests that the server allows in any one period, within one scope.
        period: Seconds after its end for which a request counts, the margin included.
        window: Seconds for which the server counts a request, without it.
        late: Seconds that a request takes at the most, and that one that was given up on may still arrive after.
        scope: What the server counts by; with `"auto"` all together, but for what a proof says.
        pace: Starts per second; None for no bound.
        slots: Requests on the wire at once.
        reserve: The share of a bucket's tokens that only single calls may take.
    """

    requests: int = 300
    period: float = 60.3
    window: float = 60.0
    late: float = 10.0
    scope: Literal["auto", "client", "account"] = "auto"
    pace: float | None = 100.0
    slots: int = 32
    reserve: float = 0.0


@attrs.frozen(kw_only=True)
class Answer:
    """How a request ended, as far as admission goes.

    Attributes:
        status: The HTTP status; None without an answer.
        is_html: Whether the body is no JSON object: then something in front of the API answered.
        limit: The limit that the answer told, or None.
        remaining: What it said is left of that, or None.
        wait: Seconds that a refusal asks to wait, or None.
        unsent: Whether the request certainly never left.
    """

    status: int | None
    is_html: bool = False
    limit: int | None = None
    remaining: int | None = None
    wait: float | None = None
    unsent: bool = False

    @property
    def is_served(self) -> bool:
        """Whether the API itself answered, and did not refuse or fail."""
        return self.status is not None and not self.is_html and self.status < 500 and self.status not in {408, 429}

    @property
    def is_refused(self) -> bool:
        """Whether it was refused: a 429, or a 503 that asks for a wait."""
        return self.status == 429 or (self.status == 503 and self.wait is not None)

    @property
    def may_come_late(self) -> bool:
        """Whether nobody knows when the server counts it: no answer, or one of a gateway, which may pass the request on later."""
        return self.status in {None, 408, 502, 503, 504} or (self.is_html and self.status != 429)

    @property
    def used(self) -> int | None:
        """Requests that the server has counted, by its own word."""
        if self.limit is None or self.remaining is None or self.remaining > self.limit:
            return None
        return self.limit - self.remaining


@attrs.define(eq=False)
class Request:
    """A request on the wire, which holds a token of each bucket that may count it."""

    call: Call
    started: float
    own: int  # the account's mark
    common: int | None
    trial: Trial | None
    first: bool
    in_trial: bool
    hangs: bool = False


class _Account:
    """The tokens of one account, and the calls that wait for them. Forgotten when all is back and nobody waits."""

    __slots__ = ("bucket", "cools_until", "ends", "key", "shared", "timer", "waiting")

    def __init__(self, requests: int, key: Hashable) -> None:
        self.bucket = TokenBucket(requests)
        self.key = key
        self.shared = False  # whether calls of several keys have asked for its tokens
        self.cools_until = -math.inf
        self.timer = -math.inf
        self.waiting: tuple[FairQueue, FairQueue] | None = None  # single calls, and others
        self.ends: deque[tuple[float, float]] = deque()  # starts and ends of its served requests of the last period

    def queue(self, call: Call) -> FairQueue:
        if self.waiting is None:
            self.waiting = FairQueue(), FairQueue()
        return self.waiting[not call.flow.single]

    @property
    def waiters(self) -> int:
        return 0 if self.waiting is None else len(self.waiting[0]) + len(self.waiting[1])

    def ended_before(self, started: float, since: float) -> int:
        """Served requests of the account that started after `since` and had ended when another started."""
        while self.ends and self.ends[0][0] <= since:
            self.ends.popleft()
        return sum(end <= started for _, end in self.ends)


class Scheduler:
    """The admission queue of one endpoint. It is long because all that a start needs is decided in one moment.

    Args:
        terms: What it keeps to.
        seed: Of the draws among calls of a trial; random by default.
    """

    def __init__(self, terms: Terms, seed: int | None = None) -> None:
        self._terms = terms
        self._random = random.Random(seed)
        self._ready = FairQueue()
        self._accounts: dict[Hashable, _Account] = {}
        self._common = TokenBucket(terms.requests)
        self._counts_common = terms.scope != "account"
        self._common_waiting = FairQueue(), FairQueue()  # single calls, and others
        self._common_timer = -math.inf
        self._scope = ScopeDetection(terms.window, terms.late, proves=terms.scope == "auto")
        self._cooldown = EndpointCooldown(terms.window)
        self._pace = Pace(terms.pace, terms.requests / terms.window)
        self._lately: deque[bool] = deque(maxlen=_LATELY)
        self._moments: list[tuple[float, int, _Account | None]] = []  # of tokens that return to buckets with waiters
        self._idle: list[tuple[float, int, Hashable]] = []  # when accounts may be forgotten
        self._ids = itertools.count()
        self._active = 0
        self._hanging = 0

    # --- calls

    def put(self, call: Call) -> None:
        """A call enters the queue, for its first attempt or for another."""
        account = self._account(call)
        if account.key != call.key:
            account.shared = True
        self._ready.push(call)

    def remove(self, call: Call, now: float) -> None:
        """A call that waits is given up. Nothing, if it does not wait."""
        if call.queue is not None:
            call.queue.remove(call)
        if call.called:
            call.called = False
            self._release_common(now)

    def grant(self, now: float) -> Request | float | None:
        """The next request that starts now; else when to ask again, if nothing happens before; None without such a moment.

        Ask until there is no request, after everything that is told to the scheduler.
        """
        self._release_due(now)
        until: float | None = None
        while len(self._ready):
            if self._active >= self._terms.slots:
                break
            trial = self._cooldown.trial
            if trial is not None and (now < trial.until or trial.on_wire >= trial.width):
                until = trial.until if now < trial.until else None
                break
            until = self._pace.wait(now)
            if until is not None:
                break
            draw = None if trial is None else self._random
            call = self._ready.pop(draw, draw_singles=trial is not None and trial.is_held)
            if self._may_start(call, now):
                return self._start(call, trial, now)
        return min((moment for moment in (until, self._next_moment()) if moment is not None), default=None)

    def hangs(self, request: Request) -> None:
        """A request has been without an answer for so long that it stops counting."""
        if request.in_trial and request.trial is not None:
            request.trial.on_wire -= 1
            request.in_trial = False
        if not request.hangs and self._hanging < _HANGING_SHARE * self._terms.slots:
            request.hangs = True
            self._active -= 1
            self._hanging += 1

    def ended(self, request: Request, answer: Answer, now: float) -> bool:
        """A request has ended. Returns whether this attempt is not to be counted against its call."""
        if request.hangs:
            self._hanging -= 1
        else:
            self._active -= 1
        if request.in_trial and request.trial is not None:
            request.trial.on_wire -= 1
        account = self._account(request.call)
        proved, alone = self._learn(request, account, answer, now) if answer.is_served else (False, False)
        self._return_tokens(request, account, answer, proved, now)
        foreign = answer.is_refused and answer.used is None and self._scope.has_seen_counts
        if request.first and request.trial is not None and answer.status is not None:
            self._lately.append(foreign)
        spared = False
        if answer.is_refused:
            spared = self._refused(request, account, answer, foreign, now)
        elif answer.is_served:
            self._cooldown.served(request.trial, alone=alone)
        self._release(account, now)
        if self._counts_common:
            self._release_common(now)
        self._forget_idle(now)
        return spared

    # --- may it start

    def _account(self, call: Call) -> _Account:
        account = self._accounts.get(call.account)
        if account is None:
            account = self._accounts[call.account] = _Account(self._terms.requests, call.key)
        return account

    def _forget_idle(self, now: float) -> None:
        """Forget accounts whose tokens are all back."""
        while self._idle and self._idle[0][0] <= now:
            _, _, name = heapq.heappop(self._idle)
            account = self._accounts.get(name)
            if account is None or account.waiters or now < account.cools_until:
                continue
            account.bucket.free(now)
            if account.bucket.is_whole:
                del self._accounts[name]

    def _may_start(self, call: Call, now: float) -> bool:
        """Whether its buckets have a token for it. If not, it waits at the bucket that stops it, and blocks nobody behind it."""
        account = self._account(call)
        if self._account_room(account, call.flow.single, now) <= 0:
            account.queue(call).push(call)
            self._arm(account, now)
            if call.called:
                call.called = False  # the token goes to the next
                self._common_timer = now
                heapq.heappush(self._moments, (now, next(self._ids), None))
            return False
        if self._counts_common:
            waiting = self._common_waiting[not call.flow.single]
            if self._common_room(call.flow.single, now) <= 0 or (len(waiting) and not call.called):
                waiting.push(call)
                self._arm_common(now)
                return False
        return True

    def _start(self, call: Call, trial: Trial | None, now: float) -> Request:
        self._pace.take(now)
        account = self._account(call)
        own = account.bucket.take(now)
        common = self._common.take(now) if self._counts_common else None
        first, call.was_asked, call.called = not call.was_asked, True, False
        self._active += 1
        if trial is not None:
            trial.on_wire += 1
        return Request(call, now, own, common, trial, first, trial is not None)

    def _kept(self, bucket: TokenBucket) -> int:
        """Tokens that only single calls may take."""
        return min(bucket.limit - 1, math.ceil(self._terms.reserve * bucket.limit))

    def _tenth(self, now: float) -> int:
        """Tokens of the common bucket that nobody takes before ten requests can witness, so that a proof is always possible."""
        most = self._common.limit - self._kept(self._common)
        if self._terms.scope != "auto" or most <= _SMALLEST_WITH_A_TENTH or self._scope.can_witness(now):
            return 0
        return math.ceil(most * _TENTH)

    def _common_room(self, single: bool, now: float) -> int:
        free = self._common.free(now) - (0 if single else self._kept(self._common))
        return free - self._tenth(now) if free > 0 else free

    def _account_room(self, account: _Account, single: bool, now: float) -> int:
        if now < account.cools_until:
            return 0
        kept = self._kept(account.bucket) if account.shared and not single else 0
        return account.bucket.free(now) - kept

    # --- waking those who wait

    def _next_moment(self) -> float | None:
        return self._moments[0][0] if self._moments else None

    def _release_due(self, now: float) -> None:
        while self._moments and self._moments[0][0] <= now:
            _, _, account = heapq.heappop(self._moments)
            if account is None:
                self._release_common(now)
            else:
                self._release(account, now)

    def _arm(self, account: _Account, now: float) -> None:
        """Set the moment at which the account has room again."""
        if now < account.cools_until:
            moment: float | None = account.cools_until
        else:
            single = account.waiting is not None and len(account.waiting[0]) > 0
            room = account.bucket.free(now) if single else self._account_room(account, False, now)
            moment = account.bucket.nth_return(max(1, 1 - room))
        if moment is not None and not now < account.timer <= moment:
            account.timer = moment
            heapq.heappush(self._moments, (moment, next(self._ids), account))

    def _release(self, account: _Account, now: float) -> None:
        """Let as many of its waiters stand for a start as the account has room for."""
        if account.waiting is None or not account.waiters:
            return
        for single, waiting in zip((True, False), account.waiting, strict=True):
            for _ in range(min(self._account_room(account, single, now), len(waiting))):
                self._ready.push(waiting.pop())
        if account.waiters:
            self._arm(account, now)

    def _arm_common(self, now: float) -> None:
        moments: list[float | None] = []
        for single, waiting in zip((True, False), self._common_waiting, strict=True):
            if len(waiting):
                room = self._common_room(single, now)
                moments.append(self._common.nth_return(max(1, 1 - room)))
                if room <= 0 < room + self._tenth(now):
                    moments.append(self._scope.can_witness_at(now))
        moment = min((each for each in moments if each is not None), default=None)
        if moment is not None and not now < self._common_timer <= moment:
            self._common_timer = moment
            heapq.heappush(self._moments, (moment, next(self._ids), None))

    def _release_common(self, now: float) -> None:
        singles, others = self._common_waiting
        first = max(0, min(self._common_room(True, now), len(singles)))
        rest = max(0, min(self._common_room(False, now) - first, len(others)))
        for waiting, count in ((singles, first), (others, rest)):
            for _ in range(count):
                call = waiting.pop()
                call.called = True
                self._ready.push(call)
        if len(singles) or len(others):
            self._arm_common(now)

    # --- what an ended request teaches

    def _learn(self, request: Request, account: _Account, answer: Answer, now: float) -> tuple[bool, bool]:
        """Returns whether a served answer proves that its account is counted apart, and the weaker sign of it."""
        used = answer.used
        seen = self._scope.ended_before(request.started, now)
        seen_of_account = account.ended_before(request.started, now - self._terms.window)
        proved = alone = False
        if used is None or answer.limit is None:
            self._scope.served(request.started, now)
        else:
            own = account.bucket.own(request.own)
            proved, alone = self._scope.told(used, own, request.started, now)
            proved = proved and request.common is not None
            self._follow(account.bucket, answer.limit, used, seen_of_account)
            self._follow(self._common, answer.limit, used, seen)  # a proof has used < seen
        account.ends.append((request.started, now))
        return proved, alone

    def _follow(self, bucket: TokenBucket, limit: int, used: int, seen: int) -> None:
        """An answer speaks of a bucket when it has counted all that had ended there; then a lower limit is its limit."""
        bucket.limit = self._terms.requests if used < seen else min(limit, self._terms.requests)

    def _return_tokens(self, request: Request, account: _Account, answer: Answer, proved: bool, now: float) -> None:
        gone = answer.status == 429 or answer.unsent
        when = now + self._terms.period + (self._terms.late if answer.may_come_late else 0.0)
        if gone:
            account.bucket.put_back()
        else:
            account.bucket.return_at(when)
        heapq.heappush(self._idle, (max(now if gone else when, account.cools_until), next(self._ids), request.call.account))
        if request.common is None:
            return
        if gone or proved:
            self._common.put_back()
        else:
            self._common.return_at(when)

    def _refused(self, request: Request, account: _Account, answer: Answer, foreign: bool, now: float) -> bool:
        """Returns whether the refusal costs its call no attempt."""
        if answer.wait is not None:
            account.cools_until = max(account.cools_until, now + answer.wait)
        spared = (request.trial is not None or foreign) and request.call.spared < _SPARED
        request.call.spared += spared
        if foreign and len(self._lately) == _LATELY and sum(self._lately) > _FOREIGN_SHARE * _LATELY:
            self._pace.cut(now)
            self._lately.clear()
        sure = not foreign and (self._scope.is_together or self._terms.scope == "client")
        alone = self._scope.is_alone(now)
        evidence = Evidence(has_counts=answer.used is not None, is_foreign=foreign, is_sure=sure, is_alone=alone)
        if self._cooldown.refused(request.trial, answer.wait, evidence, now):
            self._pace.cut(now)
            if evidence.has_counts:
                self._scope.contradicted(now)
        return spared
