"""`Scheduler`: the admission queue of an endpoint, which decides the call that starts next.

A call starts only without a cooldown of its endpoint or its account. The trial must have room, a
connection slot must be free, and the pace must allow the start. The account's bucket and the common
bucket must have a token each. The call takes all of them in that one moment.

Every decision is a function of values and the time `now`. The dispatcher has the timers and tasks,
and asks again at the moment that `grant` names. Both endpoints of a client share the pace and the
slots.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, TypeAlias

import attrs

from crustcredits._ratelimit.advertised_limit import AdvertisedLimit
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.cooldown import EndpointCooldown, Evidence, Trial
from crustcredits._ratelimit.fair_queue import Call, FairQueue, Flow, Kind, PoolFlow
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.quota import Quota
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.token_bucket import Bucket, TokenBucket, refresh_gap

_log = logging.getLogger("crustcredits")

# The share of the common bucket that is not given before ten requests can witness; a smaller bucket
# keeps no such share.
_TENTH = 0.1
_SMALLEST_WITH_A_TENTH = 11
# Refusals that cost a call no attempt: of probes while other accounts are refused too, and by
# something in front of the API.
_SPARED = 4
# Last probes of calls without an earlier request, and the share of them refused by something in
# front of the API that halves the pace.
_LATELY = 16
_FOREIGN_SHARE = 0.4
# Seconds until a bucket is checked again after all its tokens are back, but not yet reported to
# other processes.
_SETTLES = 2.0
# The queue that has let a call out.
_BY_ACCOUNT, _BY_COMMON = 1, 2
# The share of the tokens that refreshes leave, so that the next foreground call need not wait; and
# the divisor that gives the refreshes' part of the slots.
_REFRESHES_KEEP = 0.1
_REFRESHES_ON_WIRE = 4
# Most calls that one `grant` passes over.
_LOOKS = 1_000
# A call is not sent if less time is left than this multiple of the usual answer time, and at most
# these seconds. Otherwise, in an overload, the next call is always the one that expires next, and
# each token is spent without a use.
_ANSWERS = 2.0
_SHORT = 0.4
# Accounts that have to state another limit before it holds back all, where accounts may be counted
# separately.
_VOICES = 3


@attrs.frozen(kw_only=True)
class SchedulerTerms:
    """The settings that a scheduler keeps to.

    Attributes:
        requests: Requests that the server allows in any one period, within one scope.
        period: Seconds after its end for which a request counts, the margin included.
        window: Seconds for which the server counts a request, without the margin.
        late: Most seconds that a request takes, and most seconds after which an abandoned one may
            still arrive.
        scope: The scope that the server counts by; with `"auto"` all together, except where a proof
            shows otherwise.
        reserve: The share of a bucket's tokens that only single calls may take.
        adopts: Which other limit is followed when the server states one: a lower one, any, or none.
    """

    requests: int = 300
    period: float = 60.3
    window: float = 60.0
    late: float = 10.0
    scope: Literal["auto", "client", "account"] = "auto"
    reserve: float = 0.0
    adopts: Literal["lower", "any", "never"] = "lower"


@attrs.frozen(kw_only=True)
class AttemptResult:
    """How a request ended, as far as admission is concerned.

    Attributes:
        status: The HTTP status; None without an answer.
        is_html: Whether the body is no JSON object: then something in front of the API answered.
        limit: The limit that the answer states, or None.
        remaining: The rest of that limit that the answer states, or None.
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
        return (
            self.status is not None
            and not self.is_html
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
        return self.status in {None, 408, 502, 503, 504} or (self.is_html and self.status != 429)

    @property
    def used(self) -> int | None:
        """Requests that the server has counted, according to the answer."""
        if self.limit is None or self.remaining is None or self.remaining > self.limit:
            return None
        return self.limit - self.remaining


@attrs.define(eq=False)
class Attempt:
    """A request on the wire, which holds a token of each bucket that may count it."""

    call: Call
    kind: Kind
    started: float
    own: int  # the account's mark
    common: int | None
    trial: Trial | None
    first: bool
    in_trial: bool
    account: _Account

    def leave_trial(self) -> None:
        """Stop counting as a probe on the wire: the request has ended, or hangs."""
        if self.in_trial and self.trial is not None:
            self.trial.on_wire -= 1
            self.in_trial = False


class _Account:
    """The tokens of one account, and the calls that wait for them.

    Forgotten when all tokens are back and no call waits.
    """

    __slots__ = (
        "bucket",
        "called",
        "cools_until",
        "idles_at",
        "key",
        "refreshing",
        "shared",
        "timer",
        "waiting",
    )

    def __init__(self, bucket: Bucket, key: Hashable) -> None:
        self.bucket = bucket
        self.key = key
        self.refreshing = 0  # background calls on the wire
        self.called = 0  # calls that were let out of its queue and have not started
        self.shared = False  # whether calls of several keys have asked for its tokens
        self.cools_until = -math.inf
        self.timer = -math.inf
        self.idles_at: float | None = None  # when it is checked again, to be forgotten
        self.waiting: tuple[FairQueue, ...] | None = None  # by kind

    def queue(self, call: Call) -> FairQueue:
        if self.waiting is None:
            self.waiting = tuple(FairQueue() for _ in Kind)
        return self.waiting[call.flow.kind]

    @property
    def waiters(self) -> int:
        return 0 if self.waiting is None else sum(map(len, self.waiting))

    def waits_before(self, kind: Kind) -> bool:
        """Whether a call of a better kind waits for its tokens."""
        return self.waiting is not None and any(
            self.waiting[better].length for better in range(kind)
        )


MakeBucket: TypeAlias = Callable[[Hashable | None, int, Callable[[Hashable | None], None]], Bucket]


def local_bucket(
    whose: Hashable | None, limit: int, wake: Callable[[Hashable | None], None]
) -> Bucket:
    """Tokens that are counted in this process."""
    return TokenBucket(limit)


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
        is_barred: Whether a call may not be sent at all now. `grant` then hands the call out and
            forgets it.

    Attributes:
        is_barring: Whether `is_barred` has to be asked.
    """

    def __init__(
        self,
        terms: SchedulerTerms,
        *,
        pace: Pace,
        slots: ConnectionSlots[Attempt],
        seed: int | None = None,
        make_bucket: MakeBucket = local_bucket,
        is_barred: Callable[[Call, float], bool] | None = None,
    ) -> None:
        self._terms = terms
        self._random = random.Random(seed)
        self._make_bucket = make_bucket
        self._is_barred = is_barred
        self.is_barring = is_barred is not None
        self._ready = FairQueue()
        self._accounts: dict[Hashable, _Account] = {}
        self._common = make_bucket(None, terms.requests, self._came)
        self._counts_common = terms.scope != "account"
        self._waits_for_common = False
        self._common_waiting = tuple(FairQueue() for _ in Kind)
        self._parked: dict[Flow, int] = {}  # calls of each flow that wait for their own account
        self._common_timer = -math.inf
        self._adopts = terms.adopts != "never"
        self._own_limit = AdvertisedLimit(terms.requests, follows_higher=terms.adopts == "any")
        voices = _VOICES if terms.scope == "auto" else 1
        self._common_limit = AdvertisedLimit(
            terms.requests, follows_higher=terms.adopts == "any", voices=voices
        )
        self._scope = ScopeDetection(terms.window, terms.late, proves=terms.scope == "auto")
        self._cooldown = EndpointCooldown(terms.window)
        self._pace = pace
        self._slots = slots
        self._lately: deque[bool] = deque(maxlen=_LATELY)
        # When tokens return to buckets with waiters.
        self._moments: list[tuple[float, int, _Account | None]] = []
        # Accounts that may be forgotten, nearly in the order of their moments.
        self._idle: deque[tuple[Hashable, _Account]] = deque()
        self._ids = itertools.count()
        self._refreshing = 0  # background calls on the wire
        # Calls that were let out of the common bucket's queue and have not started.
        self._called = 0
        self._called_in_background = 0  # background calls among them
        self._last_let_out = Kind.MANY
        self._others = 0  # requests of the last count that were not this client's

    # --- calls

    def put(self, call: Call) -> None:
        """Add a call to the queue, for its first attempt or for another."""
        self._ready.push(call)

    def put_pool(self, pool: PoolFlow) -> None:
        """Add the calls of a collection of known size to the queue, without an object each."""
        self._ready.push_pool(pool)

    def remove_pool(self, pool: PoolFlow) -> None:
        """Remove the calls of a pool that have not begun."""
        if pool.queue is not None:
            pool.queue.remove_pool(pool)

    def remove(self, call: Call, now: float) -> bool:
        """Remove a call that waits.

        Does nothing for other calls. Returns whether another call may start because of that.
        """
        if call.queue is None:
            return False
        account = self._accounts.get(call.account)
        if account is not None and account.waiting is not None and call.queue in account.waiting:
            self._park(call, -1)
        call.queue.remove(call)
        self._left(call, now)
        called = self._uncall(call)
        self._release_of(call, now)
        if called == _BY_COMMON:
            self._release_common(now)
        return called != 0

    def move(self, call: Call, flow: Flow, now: float) -> None:
        """Move a call to another flow, at whose end it waits if it waits at all."""
        waits = call.queue is not None
        self.remove(call, now)
        call.flow = flow
        if waits:
            self.put(call)

    @property
    def holds_back(self) -> bool:
        """Whether foreground calls are ready to start.

        After a `grant` without a start, something stops them all.
        """
        return self._ready.has_foreground

    def give_up(self, whose: Hashable | None, now: float) -> list[Call]:
        """Remove and return the calls that wait for a token of this account.

        With None those that wait for the common bucket.
        """
        account = None if whose is None else self._accounts.get(whose)
        queues = self._common_waiting if whose is None else (account and account.waiting) or ()
        given_up: list[Call] = []
        for queue in queues:
            while queue.length:
                call = queue.pop()
                if account is not None:
                    self._park(call, -1)
                self._left(call, now)
                given_up.append(call)
        return given_up

    def grant(self, now: float) -> Attempt | Call | float | None:
        """Start the next request, hand out a call that must not be sent, or say when to ask again.

        Returns None without such a moment. The caller asks until no request comes, and again after
        each other method. One call of `grant` looks at most at a thousand calls, so that other
        tasks run in between.
        """
        if self._moments and self._moments[0][0] <= now:
            self._release_due(now)
        until: float | None = None
        for _ in range(_LOOKS):
            if not self._ready.length:
                break
            trial = self._cooldown.trial
            is_held, until = self._is_held(trial, now)
            if is_held:
                break
            found = self._take(trial, now)
            if found is not None:
                return found
        else:
            return now
        if self._moments and (until is None or self._moments[0][0] < until):
            return self._moments[0][0]
        return until

    def _take(self, trial: Trial | None, now: float) -> Attempt | Call | None:
        """Start the next call in turn, or hand it out if it must not be sent.

        None if it waits in another queue now.
        """
        call = (
            self._ready.pop()
            if trial is None
            else self._ready.pop(self._random, draw_singles=trial.is_held)
        )
        if self._is_refused(call, now):
            self._forget(call, now)
            return call
        account = self._admissible(call, now)
        if account is not None:
            return self._start(call, account, trial, now)
        if call.deadline < math.inf and self.is_hopeless(call, now):
            self.remove(call, now)
            return call
        return None

    def _is_held(self, trial: Trial | None, now: float) -> tuple[bool, float | None]:
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
        if self._refreshing * _REFRESHES_ON_WIRE < self._slots.count:
            return False, None
        return not self._ready.has_foreground, None

    def ended(self, request: Attempt, answer: AttemptResult, now: float) -> bool:
        """Note that a request has ended.

        Returns whether this attempt is not counted against its call.
        """
        self._slots.release(request, now, answered=answer.status is not None)
        if request.in_trial:
            request.leave_trial()
        account = request.account
        if request.kind is Kind.BACKGROUND:
            self._refreshing -= 1
            account.refreshing -= 1
        spared = False
        if answer.is_served:
            self._served(request, account, answer, now)
        else:
            spared = self._not_served(request, account, answer, now)
        if account.waiting is not None:
            self._release(account, now)
        if self._waits_for_common:
            self._release_common(now)
        self._forget_idle(now)
        return spared

    # --- predictions

    def earliest(self, name: Hashable, now: float) -> float:
        """The earliest time at which a request of this account can start.

        For a call that waits.
        """
        account = self._accounts.get(name)
        moment = (
            now if account is None else max(now, account.cools_until, _sure(account.bucket, now))
        )
        return max(moment, _sure(self._common, now)) if self._counts_common else moment

    def _is_refused(self, call: Call, now: float) -> bool:
        """Whether the next call in turn must not be sent."""
        if call.deadline < math.inf and self.is_late(call, now):
            return True
        return self.is_barring and self._is_barred is not None and self._is_barred(call, now)

    def is_hopeless(self, call: Call, now: float) -> bool:
        """Whether a call certainly does not start before its deadline."""
        return self.earliest(call.account, now) > call.deadline

    def is_late(self, call: Call, now: float) -> bool:
        """Whether a call's waiters leave before an answer, while other calls need the token."""
        left = call.deadline - now
        if left <= 0:
            return True
        needed = min(_ANSWERS * (self._slots.usual or 0.0), _SHORT)
        return left < needed and self._is_scarce(needed, now)

    def _is_scarce(self, seconds: float, now: float) -> bool:
        """Whether more foreground calls wait than could start in these seconds."""
        if self._common_waiting[Kind.SINGLE].length or self._common_waiting[Kind.MANY].length:
            return True
        room = self._slots.free
        if self._counts_common:
            room = min(room, self._common_room(Kind.SINGLE, now))
        rate = self._pace.current(now)
        if rate is not None:
            room = min(room, math.ceil(rate * seconds))
        return self._ready.foreground >= max(1, room)

    def hopeless(self, names: Iterable[Hashable], deadline: float, now: float) -> list[int]:
        """The numbers of the calls that certainly do not start before the deadline."""
        is_late = self._counts_common and _sure(self._common, now) > deadline
        known = self._accounts
        return [
            number
            for number, name in enumerate(names)
            if is_late
            or (
                name in known
                and max(known[name].cools_until, _sure(known[name].bucket, now)) > deadline
            )
        ]

    def quota(self, account: Hashable | None, now: float) -> Quota:
        """The quota of an account's bucket, or with None of the common bucket."""
        known = self._accounts.get(account)
        if account is None:
            bucket = self._common
            queued = self._queued()
            singles = sum(count for flow, count in queued.items() if flow.kind is Kind.SINGLE)
            lengths = [count for flow, count in queued.items() if flow.kind is Kind.MANY and count]
            waiting = singles + sum(lengths)
            refreshing = self._refreshing + sum(queued.values()) - waiting
            until = -math.inf
        else:
            bucket = TokenBucket(self._terms.requests) if known is None else known.bucket
            queues = (
                self._ready,
                *self._common_waiting,
                *(() if known is None else known.waiting or ()),
            )
            waiting = sum(queue.of_account(account, background=False) for queue in queues)
            refreshing = sum(queue.of_account(account, background=True) for queue in queues)
            refreshing += 0 if known is None else known.refreshing
            singles, lengths = waiting, []
            until = -math.inf if known is None else known.cools_until
        trial = self._cooldown.trial
        if trial is not None and trial.is_held:
            until = max(until, trial.until)
        return Quota(
            limit=bucket.limit,
            free=bucket.available(now),
            in_flight=bucket.on_wire,
            waiting=waiting,
            refreshing=refreshing,
            cooldown=max(0.0, until - now)
            if until > now or (trial is not None and trial.is_held)
            else None,
            probing=trial is not None and trial.on_wire > 0,
            degraded=bucket.is_degraded,
            returns=tuple(max(0.0, when - now) for when in bucket.returns(now, self._terms.period)),
            period=self._terms.period,
            pace=self._pace.current(now),
            slots=self._slots.count,
            answer_seconds=self._slots.usual or 0.0,
            others=self._others if account is None and self._scope.is_together else 0,
            singles=singles,
            lengths=tuple(lengths),
        )

    # --- the conditions of a start

    def _account(self, call: Call) -> _Account:
        account = self._accounts.get(call.account)
        if account is None:
            bucket = self._make_bucket(call.account, self._terms.requests, self._came)
            account = self._accounts[call.account] = _Account(bucket, call.key)
        return account

    def _park(self, call: Call, step: int) -> None:
        """Note that a call begins to wait for its account (1), or waits there no more (-1)."""
        flow = call.flow
        parked = self._parked.get(flow, 0) + step
        if parked:
            self._parked[flow] = parked
        else:
            del self._parked[flow]
        if flow.on_parked is not None:
            flow.on_parked(step)

    def _queued(self) -> dict[Flow, int]:
        """How many calls of each flow wait, in all queues."""
        queued = Counter(self._parked)
        for queue in (self._ready, *self._common_waiting):
            queued.update(queue.lengths())
        return queued

    def _forget(self, call: Call, now: float) -> None:
        """Forget a call that was ready, which is not sent now.

        The common token that let it out goes to the next call.
        """
        self._left(call, now)
        if self._uncall(call) == _BY_COMMON:
            self._call_next(now)
        self._release_of(call, now)

    def _left(self, call: Call, now: float) -> None:
        account = self._accounts.get(call.account)
        if account is not None:
            self._idles(account, call.account, max(now, account.cools_until))

    def _uncall(self, call: Call) -> int:
        """Note that a call that was let out of a queue no longer stands for a start.

        Returns which queue that was.
        """
        called, call.called = call.called, 0
        if called == _BY_COMMON:
            self._called -= 1
            self._called_in_background -= call.flow.kind is Kind.BACKGROUND
        elif called == _BY_ACCOUNT:
            self._account(call).called -= 1
        return called

    def _call_next(self, now: float) -> None:
        self._common_timer = now
        heapq.heappush(self._moments, (now, next(self._ids), None))

    def _idles(self, account: _Account, name: Hashable, when: float) -> None:
        """Plan a check at `when` whether an account can be forgotten, unless one is planned."""
        if account.idles_at is None:
            account.idles_at = when
            self._idle.append((name, account))

    def _forget_idle(self, now: float) -> None:
        """Forget accounts whose tokens are all back.

        An account that takes longer goes to the end, so that it delays no other.
        """
        for _ in range(min(_LOOKS, len(self._idle))):
            name, account = self._idle[0]
            assert account.idles_at is not None, "it is among them"
            if account.idles_at > now:
                if account.idles_at > now + self._terms.period:
                    self._idle.rotate(-1)
                return
            self._idle.popleft()
            account.idles_at = None
            if account.waiters or account.called:
                continue
            account.bucket.room(now, 0)
            if now < account.cools_until:
                self._idles(account, name, account.cools_until)
            elif account.bucket.is_whole:
                del self._accounts[name]
            elif account.bucket.is_settling:
                self._idles(account, name, now + _SETTLES)
            elif not account.bucket.on_wire:
                self._idles(account, name, account.bucket.returns(now, 0.0)[-1])

    def _admissible(self, call: Call, now: float) -> _Account | None:
        """The call's account, if its buckets have a token for it.

        Otherwise the call waits at the bucket that stops it, and blocks no call behind it.
        """
        account, kind = self._account(call), call.flow.kind
        if account.key != call.key:
            account.shared = True
        if now < account.cools_until or not self._has_room(
            account.bucket, kind, now, shared=account.shared
        ):
            called = self._uncall(call)
            if called == _BY_COMMON:
                self._call_next(now)
            account.queue(call).push(call)
            self._park(call, 1)
            if called == _BY_ACCOUNT:  # its token may serve a call of a better kind
                self._release(account, now)
            else:
                self._arm(account, now)
            return None
        if self._counts_common:
            waiting = self._common_waiting[kind]
            is_behind = call.called != _BY_COMMON and (
                waiting.length > 0 or (self._called > 0 and self._are_spoken_for(kind, now))
            )
            if is_behind or not self._has_common_room(kind, now):
                called = self._uncall(call)
                self._waits_for_common = True
                waiting.push(call)
                if isinstance(call.flow, PoolFlow) and call.flow.queue is self._ready:
                    waiting.push_pool(call.flow)  # none of the others could start either
                if called == _BY_COMMON:  # as above
                    self._release_common(now)
                else:
                    self._arm_common(now)
                    if called == _BY_ACCOUNT and account.waits_before(kind):
                        self._release(account, now)
                return None
        return account

    def _are_spoken_for(self, kind: Kind, now: float) -> bool:
        """Whether foreground calls let out before stand for all common tokens of this kind."""
        called = self._called - self._called_in_background
        return called > 0 and self._common_room(kind, now) <= called

    def _start(self, call: Call, account: _Account, trial: Trial | None, now: float) -> Attempt:
        self._pace.take(now)
        own = account.bucket.take(now)
        common = self._common.take(now) if self._counts_common else None
        first, call.was_asked = not call.was_asked, True
        if call.called:
            self._uncall(call)
        kind = call.flow.kind
        if kind is Kind.BACKGROUND:
            self._refreshing += 1
            account.refreshing += 1
            for bucket in (account.bucket, self._common):
                kept = self._kept_from(kind, bucket)
                bucket.next_refresh = now + refresh_gap(bucket, now, self._terms.period, kept)
            if account.waiters:
                self._arm(account, now)
            if self._common_waiting[kind].length:
                self._arm_common(now)
        request = Attempt(call, kind, now, own, common, trial, first, trial is not None, account)
        self._slots.take(request, now)
        if trial is not None:
            trial.on_wire += 1
        return request

    def _kept(self, bucket: Bucket) -> int:
        """Tokens that only single calls may take."""
        return min(bucket.limit - 1, math.ceil(self._terms.reserve * bucket.limit))

    def _kept_from(self, kind: Kind, bucket: Bucket, *, shared: bool = True) -> int:
        """Tokens of a bucket that calls of this kind leave.

        A check may take all tokens of an account that is not `shared`: its calls are of one key.
        """
        if kind is Kind.SINGLE:
            return 0
        kept = self._kept(bucket) if shared and self._terms.reserve else 0
        if kind is Kind.BACKGROUND:
            kept = max(kept, min(bucket.limit - 1, math.ceil(_REFRESHES_KEEP * bucket.limit)))
        return kept

    def _tenth(self, now: float) -> int:
        """Tokens of the common bucket that no call takes before ten requests can witness.

        A proof is always possible so. A bucket that other processes share keeps none: they would
        leave none to a process that cannot prove anything yet.
        """
        most = self._common.limit - self._kept(self._common)
        if (
            self._terms.scope != "auto"
            or self._common.is_shared
            or most <= _SMALLEST_WITH_A_TENTH
            or self._scope.can_witness(now)
        ):
            return 0
        return math.ceil(most * _TENTH)

    def _has_common_room(self, kind: Kind, now: float) -> bool:
        # Usually so much is free that the tokens kept for witnesses, which cost more to find out,
        # do not matter.
        common = self._common
        if kind is Kind.BACKGROUND:
            return self._common_room(kind, now) > 0
        free = common.room(now, self._kept_from(kind, common) if self._terms.reserve else 0)
        return free > 0 and (free > 1 + common.limit * _TENTH or self._common_room(kind, now) > 0)

    def _common_room(self, kind: Kind, now: float) -> int:
        free = self._common.room(now, self._kept_from(kind, self._common))
        if free > 0 and (tenth := self._tenth(now)):
            free = self._common.room(now, self._kept_from(kind, self._common) + tenth)
        return _spaced(free, kind, self._common, now)

    def _has_room(self, bucket: Bucket, kind: Kind, now: float, *, shared: bool) -> bool:
        """Whether an account's bucket has a token for a call of this kind."""
        if kind is Kind.BACKGROUND or self._terms.reserve:
            return (
                _spaced(
                    bucket.room(now, self._kept_from(kind, bucket, shared=shared)),
                    kind,
                    bucket,
                    now,
                )
                > 0
            )
        return bucket.room(now, 0) > 0

    def _account_room(self, account: _Account, kind: Kind, now: float) -> int:
        if now < account.cools_until:
            return 0
        free = account.bucket.room(
            now, self._kept_from(kind, account.bucket, shared=account.shared)
        )
        return _spaced(free, kind, account.bucket, now)

    # --- waking waiting calls

    def _release_due(self, now: float) -> None:
        while self._moments and self._moments[0][0] <= now:
            _, _, account = heapq.heappop(self._moments)
            if account is None:
                self._release_common(now)
            else:
                self._release(account, now)

    def _arm(self, account: _Account, now: float) -> None:
        """Set the moment at which the account has room again for one of its waiting calls."""
        moments: list[float | None] = []
        for kind, waiting in zip(Kind, account.waiting or (), strict=True):
            if not len(waiting):
                continue
            if now < account.cools_until:
                moments.append(account.cools_until)
                break
            kept = self._kept_from(kind, account.bucket, shared=account.shared)
            if not moments:
                account.bucket.want(account.waiters, kept)
            moments.append(_room_at(account.bucket, kind, kept, now))
        moment = min((each for each in moments if each is not None), default=None)
        if moment is not None and not now < account.timer <= moment:
            account.timer = moment
            heapq.heappush(self._moments, (moment, next(self._ids), account))

    def _came(self, name: Hashable | None) -> None:
        """Note that the tokens of an account, or the common ones, changed outside the scheduler.

        They have come unexpectedly, or will not come by themselves.
        """
        account = None if name is None else self._accounts.get(name)
        if account is not None:
            account.timer = -math.inf
        elif name is None:
            self._common_timer = -math.inf
        else:  # no call waits any more, and the account was forgotten
            return
        heapq.heappush(self._moments, (-math.inf, next(self._ids), account))

    def _next_kind(
        self, waiting: Sequence[FairQueue], rooms: Sequence[int], called: int, in_background: int
    ) -> Kind | None:
        """The kind of the next call to let out: single ones and others in turn, refreshes last."""
        # A background call that was let out may have to wait; it keeps no foreground call waiting.
        foreground = called - in_background
        single, many = (
            waiting[kind].length > 0 and rooms[kind] > foreground
            for kind in (Kind.SINGLE, Kind.MANY)
        )
        if single and not (many and self._last_let_out is Kind.SINGLE):
            self._last_let_out = Kind.SINGLE
            return Kind.SINGLE
        if many:
            self._last_let_out = Kind.MANY
            return Kind.MANY
        return (
            Kind.BACKGROUND
            if waiting[Kind.BACKGROUND].length and rooms[Kind.BACKGROUND] > called
            else None
        )

    def _release_of(self, call: Call, now: float) -> None:
        account = self._accounts.get(call.account)
        if account is not None:
            self._release(account, now)

    def _release(self, account: _Account, now: float) -> None:
        """Let out as many of its waiting calls as the account has room for."""
        if account.waiting is None or not account.waiters:
            return
        rooms = [self._account_room(account, kind, now) for kind in Kind]
        while (kind := self._next_kind(account.waiting, rooms, account.called, 0)) is not None:
            call = account.waiting[kind].pop()
            self._park(call, -1)
            call.called = _BY_ACCOUNT
            account.called += 1
            self._ready.push(call)
        if account.waiters:
            self._arm(account, now)
        else:
            account.bucket.want(0, 0)

    def _arm_common(self, now: float) -> None:
        moments: list[float | None] = []
        tenth, kept_by_best = self._tenth(now), None
        if tenth:
            moments.append(self._scope.can_witness_at(now))
        for kind, waiting in zip(Kind, self._common_waiting, strict=True):
            if not len(waiting):
                continue
            kept = self._kept_from(kind, self._common)
            if kept_by_best is None:
                kept_by_best = kept + tenth
            if tenth and self._common.room(now, kept) > 0:
                kept += tenth
            moments.append(_room_at(self._common, kind, kept, now))
        self._common.want(sum(map(len, self._common_waiting)), kept_by_best or 0)
        moment = min((each for each in moments if each is not None), default=None)
        if moment is not None and not now < self._common_timer <= moment:
            self._common_timer = moment
            heapq.heappush(self._moments, (moment, next(self._ids), None))

    def _release_common(self, now: float) -> None:
        if not self._waits_for_common:
            return
        rooms = [self._common_room(kind, now) for kind in Kind]
        while (
            kind := self._next_kind(
                self._common_waiting, rooms, self._called, self._called_in_background
            )
        ) is not None:
            call = self._common_waiting[kind].pop()
            call.called = _BY_COMMON
            self._called += 1
            self._called_in_background += kind is Kind.BACKGROUND
            self._ready.push(call)
        if any(map(len, self._common_waiting)):
            self._arm_common(now)
        else:
            self._waits_for_common = False
            self._common.want(0, 0)

    # --- effects of an ended request

    def _served(
        self, request: Attempt, account: _Account, answer: AttemptResult, now: float
    ) -> None:
        proved, alone = self._learn(request, account, answer, now)
        self._return_tokens(request, account, now + self._terms.period, proved=proved)
        if self._cooldown.trial is not None:
            self._cooldown.served(request.trial, alone=alone)
        if request.trial is not None:
            self._on_probe(request, foreign=False)

    def _not_served(
        self, request: Attempt, account: _Account, answer: AttemptResult, now: float
    ) -> bool:
        """Returns whether this attempt is not counted against its call."""
        self._take_back(request, account, answer, now)
        is_refused = answer.is_refused
        foreign = is_refused and answer.used is None and self._scope.has_seen_counts
        if answer.status is not None:
            self._on_probe(request, foreign=foreign)
        return is_refused and self._refused(request, account, answer, foreign, now)

    def _learn(
        self, request: Attempt, account: _Account, answer: AttemptResult, now: float
    ) -> tuple[bool, bool]:
        """Returns whether a served answer proves a separate count, and the weaker sign."""
        used, limit, started = answer.used, answer.limit, request.started
        proved = alone = False
        if used is None or limit is None:
            self._scope.served(started, now)
        else:
            if self._adopts and (
                limit != account.bucket.limit
                or limit != self._common.limit
                or self._common_limit.is_news(limit)
            ):
                self._hear(request, account, limit, used, now)
            own = account.bucket.own(request.own)
            proved, alone = self._scope.told(used, own, started, now)
            if request.common is None:
                proved = False
            elif used > own:  # otherwise none of them need be others'
                self._others = max(0, used - self._common.own(request.common))
        return proved, alone

    def _hear(self, request: Attempt, account: _Account, limit: int, used: int, now: float) -> None:
        """Note an answer with an unusual limit, or one that follows such an answer."""
        name, period, window = request.call.account, self._terms.period, self._terms.window
        # Tokens return a period after the end. A request that ended so long ago may not be in the
        # server's window any more.
        aged = now + period - window + min(self._terms.late, window / 2)
        seen_of_account = account.bucket.returning(aged, request.started + period)
        account.bucket.limit = self._own_limit.hear(name, limit, used, seen_of_account)
        # A proof has fewer used than seen.
        followed = self._common_limit.hear(
            name, limit, used, self._scope.ended_before(request.started, now)
        )
        if followed != self._common.limit:
            _log.info(
                "the rate limit is now %d requests instead of %d: the API states it; to keep the "
                "configured one, set adopt_server_limit='never'",
                followed,
                self._common.limit,
            )
            self._common.limit = followed

    def _take_back(
        self, request: Attempt, account: _Account, answer: AttemptResult, now: float
    ) -> None:
        """Return the tokens of a request: at once if the server does not count it.

        Later if the time at which the server counts it is unknown.
        """
        if answer.status == 429 or answer.unsent:
            account.bucket.put_back()
            if request.common is not None:
                self._common.put_back()
            self._idles(account, request.call.account, max(now, account.cools_until))
        else:
            when = now + self._terms.period + (self._terms.late if answer.may_come_late else 0.0)
            self._return_tokens(request, account, when)

    def _return_tokens(
        self, request: Attempt, account: _Account, when: float, *, proved: bool = False
    ) -> None:
        account.bucket.return_at(when)
        if account.idles_at is None:
            self._idles(account, request.call.account, max(when, account.cools_until))
        if request.common is None:
            return
        if proved:
            self._common.put_back()
        else:
            self._common.return_at(when)

    def _on_probe(self, request: Attempt, *, foreign: bool) -> None:
        """Note for a call's first probe whether something in front of the API refused it."""
        if request.trial is not None and request.first:
            self._lately.append(foreign)

    def _refused(
        self, request: Attempt, account: _Account, answer: AttemptResult, foreign: bool, now: float
    ) -> bool:
        """Returns whether the refusal costs its call no attempt."""
        if answer.wait is not None:
            account.cools_until = max(account.cools_until, now + answer.wait)
        trial = request.trial
        expected = foreign or (
            trial is not None and trial.concerns_others_than(request.call.account)
        )
        spared = expected and request.call.spared < _SPARED
        request.call.spared += spared
        if (
            foreign
            and len(self._lately) == _LATELY
            and sum(self._lately) > _FOREIGN_SHARE * _LATELY
        ):
            self._pace.cut(now)
            self._lately.clear()
        sure = not foreign and (self._scope.is_together or self._terms.scope == "client")
        alone = self._scope.is_alone(now)
        evidence = Evidence(
            has_counts=answer.used is not None, is_foreign=foreign, is_sure=sure, is_alone=alone
        )
        was_held = self._cooldown.trial is not None and self._cooldown.trial.is_held
        if self._cooldown.refused(request.call.account, trial, answer.wait, evidence, now):
            self._pace.cut(now)
            if not was_held and self._cooldown.trial is not None:
                span = max(0.0, self._cooldown.trial.until - now)
                _log.info(
                    "endpoint cooldown of %.1f s: other clients spend the same rate limit; then "
                    "one probe at a time starts until one is served",
                    span,
                )
            if evidence.has_counts:
                self._scope.contradicted(now)
        return spared


def _sure(bucket: Bucket, now: float) -> float:
    """The earliest time at which a token can be had, with certainty.

    A request on the wire may return one at any moment.
    """
    return now if bucket.on_wire or bucket.room(now, 0) > 0 else bucket.room_at(now, 0) or now


def _spaced(free: int, kind: Kind, bucket: Bucket, now: float) -> int:
    """Of the tokens that are free for calls of this kind, those for now: refreshes are spaced."""
    if kind is not Kind.BACKGROUND:
        return free
    return min(free, 1) if now >= bucket.next_refresh else 0


def _room_at(bucket: Bucket, kind: Kind, kept: int, now: float) -> float | None:
    """When calls of this kind have room; None if another event has to happen first."""
    if kind is not Kind.BACKGROUND:
        return bucket.room_at(now, kept)
    # With room another refresh has been let out, unless it is too early for one.
    if bucket.room(now, kept) > 0:
        return bucket.next_refresh if bucket.next_refresh > now else None
    moment = bucket.room_at(now, kept)
    return None if moment is None else max(moment, bucket.next_refresh)
