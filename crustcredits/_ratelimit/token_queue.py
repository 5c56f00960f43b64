"""`TokenQueue`: the tokens of one scope, and the calls that wait for them.

The scope is one account (`AccountQueue`), or all accounts together (`CommonQueue`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence

from crustcredits._ratelimit import reserve
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import KINDS, Call, Flow, Kind
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket, refresh_gap
from crustcredits._ratelimit.witnesses import WITNESSES

# The fraction of the common bucket that is not given before ten requests can witness; a smaller
# bucket keeps none.
_TENTH = 0.1
_LARGEST_WITHOUT_A_TENTH = 11
_LARGEST_SHARED_WITHOUT_A_TENTH = 99


class TokenQueue(ABC):
    """The tokens of one scope, and the calls that wait for them, by kind.

    A call that is let out goes back to the queue of ready calls, and stands for a token until it
    starts or is dropped. Otherwise each answer would let another call out for the same token.

    Args:
        bucket: The tokens.
        terms: The settings of the scheduler.

    Attributes:
        bucket: The tokens.
        let_out: Foreground calls that were let out and have not started.
        refreshes_let_out: Background calls likewise.
        has_waiters: Whether calls have begun to wait since the queue was last found empty.
        releases_at: The next moment at which it lets calls out.
    """

    __slots__ = (
        "_last",
        "_queues",
        "_reserve",
        "bucket",
        "has_waiters",
        "let_out",
        "refreshes_let_out",
        "releases_at",
    )

    def __init__(self, bucket: Bucket, terms: SchedulerTerms) -> None:
        self.bucket = bucket
        self.let_out = self.refreshes_let_out = 0
        self.has_waiters = False
        self.releases_at = -math.inf
        self._reserve = terms.reserve
        self._queues: Sequence[FairQueue] = ()  # by kind, once a call has waited
        self._last = Kind.MANY  # the kind of the foreground call that was let out last

    def __len__(self) -> int:
        """How many calls wait."""
        return sum(map(len, self._queues))

    @property
    def reserve(self) -> float:
        """The fraction of the tokens that only single calls may take."""
        return self._reserve

    @property
    def queues(self) -> Sequence[FairQueue]:
        """The waiting calls by kind; empty before the first."""
        return self._queues

    @abstractmethod
    def room(self, kind: Kind, now: float) -> int:
        """How many calls of this kind may take a token now."""

    @abstractmethod
    def next_room(self, now: float) -> float | None:
        """When a waiting call may take a token; None if another event has to happen first.

        Also tells the bucket how many calls wait.
        """

    def waiting(self, kind: Kind) -> int:
        """How many calls of this kind wait."""
        return self._queues[kind].length if self._queues else 0

    def of_flow(self, flow: Flow) -> int:
        """How many calls of a flow wait."""
        return self._queues[flow.kind].of_flow(flow) if self._queues else 0

    def waits_before(self, kind: Kind) -> bool:
        """Whether a call of a better kind waits."""
        return any(queue.length for queue in self._queues[:kind])

    def holds(self, call: Call) -> bool:
        """Whether a call waits here."""
        return call.queue in self._queues

    def push(self, call: Call, *, first: bool = False) -> None:
        """Let a call wait, with `first` before the others of its flow."""
        self._of_kind(call.flow.kind).push(call, first=first)

    def push_pool(self, pool: PoolFlow) -> None:
        """Let all numbers of a pool wait."""
        self._of_kind(pool.kind).push_pool(pool)

    def drain(self) -> Iterator[Call]:
        """Take out all waiting calls."""
        for queue in self._queues:
            while queue.length:
                yield queue.pop()

    def release(self, now: float) -> Iterator[Call]:
        """Take out the calls for which there is room."""
        rooms = [self.room(kind, now) for kind in KINDS]
        while (kind := self._next_kind(rooms)) is not None:
            call = self._queues[kind].pop()
            call.let_out_of = self
            if kind is Kind.BACKGROUND:
                self.refreshes_let_out += 1
            else:
                self.let_out += 1
            yield call

    def take_back(self, call: Call) -> bool:
        """Note that a call does not stand for a token any more.

        Returns whether it was let out of this queue.
        """
        if call.let_out_of is not self:
            return False
        call.let_out_of = None
        if call.flow.kind is Kind.BACKGROUND:
            self.refreshes_let_out -= 1
        else:
            self.let_out -= 1
        return True

    def space_refreshes(self, now: float, period: float) -> None:
        """Note that a refresh has taken a token: the next one may take one a little later."""
        kept = reserve.kept_from(Kind.BACKGROUND, self.bucket, self.reserve)
        self.bucket.next_refresh = now + refresh_gap(self.bucket, now, period, kept)

    def _wanted(self, best: Kind, kept: int, now: float) -> int:
        """How many tokens the waiting calls need now; `best` is their best kind.

        Only those calls count that leave no more than `kept` tokens, and refreshes one at a time.
        """
        if best is Kind.BACKGROUND:
            return int(now >= self.bucket.next_refresh)
        wanted = 0
        for kind in KINDS:
            waiting = self.waiting(kind)
            if waiting and reserve.kept_from(kind, self.bucket, self.reserve) <= kept:
                wanted += waiting
        return wanted

    def _next_kind(self, rooms: Sequence[int]) -> Kind | None:
        """The kind of the next call to let out: single ones and others in turn, refreshes last.

        A background call that was let out may have to wait; it keeps no foreground call waiting.
        """
        single, many = (
            self.waiting(kind) > 0 and rooms[kind] > self.let_out
            for kind in (Kind.SINGLE, Kind.MANY)
        )
        if single and not (many and self._last is Kind.SINGLE):
            self._last = Kind.SINGLE
            return Kind.SINGLE
        if many:
            self._last = Kind.MANY
            return Kind.MANY
        out = self.let_out + self.refreshes_let_out
        if self.waiting(Kind.BACKGROUND) and rooms[Kind.BACKGROUND] > out:
            return Kind.BACKGROUND
        return None

    def _of_kind(self, kind: Kind) -> FairQueue:
        self.has_waiters = True
        if not self._queues:
            self._queues = tuple(FairQueue() for _ in KINDS)
        return self._queues[kind]


class AccountQueue(TokenQueue):
    """The tokens of one account, and the calls that only they stop.

    Args:
        name: The account; for a key without a declared account the key itself.
        key: The first key that asked for its tokens.
        bucket: The tokens.
        terms: The settings of the scheduler.

    Attributes:
        name: The account.
        key: The first key.
        has_several_keys: Whether calls of several keys have asked for its tokens. If not, a check
            may take all of them: its calls are of one key.
        refreshing: Background calls on the wire.
        cools_until: No call starts before this time, because a call was refused.
        idles_at: When it is checked again whether the account can be forgotten; None if no check is
            planned.
    """

    __slots__ = ("cools_until", "has_several_keys", "idles_at", "key", "name", "refreshing")

    def __init__(
        self, name: Hashable, key: Hashable, bucket: Bucket, terms: SchedulerTerms
    ) -> None:
        super().__init__(bucket, terms)
        self.name = name
        self.key = key
        self.has_several_keys = False
        self.refreshing = 0
        self.cools_until = -math.inf
        self.idles_at: float | None = None

    @property
    def reserve(self) -> float:
        """As for `TokenQueue`; 0 where all calls are of one key."""
        return self._reserve if self.has_several_keys else 0.0

    def room(self, kind: Kind, now: float) -> int:
        """As for `TokenQueue`."""
        if now < self.cools_until:
            return 0
        if kind is not Kind.BACKGROUND and not self._reserve:  # the usual case, at little cost
            return self.bucket.room(now, 0)
        kept = reserve.kept_from(kind, self.bucket, self.reserve)
        return reserve.room(kind, self.bucket, kept, now)

    def next_room(self, now: float) -> float | None:
        """As for `TokenQueue`."""
        moments: list[float | None] = []
        for kind in KINDS:
            if not self.waiting(kind):
                continue
            if now < self.cools_until:
                moments.append(self.cools_until)
                break
            kept = reserve.kept_from(kind, self.bucket, self.reserve)
            if not moments:
                self.bucket.want(self._wanted(kind, kept, now), kept)
            moments.append(reserve.room_at(kind, self.bucket, kept, now))
        return min((each for each in moments if each is not None), default=None)


class CommonQueue(TokenQueue):
    """The tokens of all accounts together, and the calls that only they stop.

    Args:
        bucket: The tokens.
        terms: The settings of the scheduler.
        scope: The evidence about the scope that the server counts by.
    """

    __slots__ = ("_scope", "_withholds")

    def __init__(self, bucket: Bucket, terms: SchedulerTerms, scope: ScopeDetection) -> None:
        super().__init__(bucket, terms)
        self._scope = scope
        self._withholds = terms.scope == "auto"

    def room(self, kind: Kind, now: float) -> int:
        """As for `TokenQueue`."""
        kept = reserve.kept_from(kind, self.bucket, self._reserve)
        free = reserve.room(kind, self.bucket, kept, now)
        if free > 0 and (tenth := self._tenth(now)):
            return reserve.room(kind, self.bucket, kept + tenth, now)
        return free

    def admits(self, call: Call, now: float) -> bool:
        """Whether a call may take a token now, ahead of no call that waits or was let out."""
        kind = call.flow.kind
        if call.let_out_of is not self and (
            self.waiting(kind) or (self.let_out and self.room(kind, now) <= self.let_out)
        ):
            return False
        # Usually so much is free that the tokens kept for witnesses, which cost more to find out,
        # do not matter.
        if kind is not Kind.BACKGROUND:
            kept = reserve.kept_from(kind, self.bucket, self._reserve) if self._reserve else 0
            rest = self.bucket.limit * _TENTH
            if not self.bucket.is_shared and self.bucket.room(now, kept) > 1 + rest:
                return True
        return self.room(kind, now) > 0

    def next_room(self, now: float) -> float | None:
        """As for `TokenQueue`."""
        moments: list[float | None] = []
        tenth, best = self._tenth(now), None
        if tenth:
            moments.append(self._scope.can_witness_at(now))
        for kind in KINDS:
            if not self.waiting(kind):
                continue
            kept = reserve.kept_from(kind, self.bucket, self._reserve)
            if best is None:
                best = kind
                self.bucket.want(self._wanted(kind, kept, now), kept + tenth)
            if tenth and self.bucket.room(now, kept) > 0:
                kept += tenth
            moments.append(reserve.room_at(kind, self.bucket, kept, now))
        if best is None:
            self.bucket.want(0, 0)
        return min((each for each in moments if each is not None), default=None)

    def kept(self, kind: Kind, now: float) -> int:
        """Tokens that a call of this kind leaves now: its reserve, and the last tenth."""
        return reserve.kept_from(kind, self.bucket, self._reserve) + self._tenth(now)

    def _tenth(self, now: float) -> int:
        """Tokens that no call takes before ten requests can witness, so that a proof is possible.

        Of a bucket that other processes share, a process without ten answers may take half of them:
        the others may have used all other tokens before it began. A small one keeps none: it has
        not ten answers for each process.
        """
        if not self._withholds:
            return 0
        is_shared = self.bucket.is_shared
        most = self.bucket.limit - reserve.kept_for_singles(self.bucket, self._reserve)
        largest = _LARGEST_SHARED_WITHOUT_A_TENTH if is_shared else _LARGEST_WITHOUT_A_TENTH
        if most <= largest or self._scope.can_witness(now):
            return 0
        tenth = math.ceil(most * _TENTH)
        is_new = is_shared and self._scope.ended_before(now, now) < WITNESSES
        return tenth // 2 if is_new else tenth
