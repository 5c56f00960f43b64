"""`Permits`: the tokens of all scopes of one endpoint, and the calls that wait for them.

A permit is the right to send one attempt: a token of the call's account and, unless accounts are
counted separately, a common one. A call waits for the token that it lacks, and blocks no call
behind it.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable

from crustcredits._ratelimit import reserve
from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.registry import Accounts
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket, MakeBucket
from crustcredits._ratelimit.token_queue import AccountQueue, CommonQueue, TokenQueue


class Permits:
    """The tokens of one endpoint.

    Args:
        terms: The settings of the scheduler.
        scope: The evidence about the scope that the server counts by.
        ready: The queue to which calls go back when they may have a token.
        make_bucket: Makes the tokens of an account, or of all together (None).

    Attributes:
        accounts: The tokens of each account.
        common: The tokens of all accounts together.
        counts_common: Whether an attempt takes one of the common tokens.
        refreshing: Background calls on the wire.
    """

    def __init__(
        self,
        terms: SchedulerTerms,
        *,
        scope: ScopeDetection,
        ready: FairQueue,
        make_bucket: MakeBucket,
    ) -> None:
        def make(name: Hashable | None) -> Bucket:
            return make_bucket(name, terms.requests, self._wake)

        self._terms = terms
        self._ready = ready
        self.accounts = Accounts(terms, make)
        self.common = CommonQueue(make(None), terms, scope)
        self.counts_common = terms.scope != "account"
        self.refreshing = 0
        self._parked: dict[Flow, int] = {}  # calls of each flow that wait for their own account
        # When tokens return to queues with waiters.
        self._moments: list[tuple[float, int, TokenQueue]] = []
        self._ids = itertools.count()

    # --- calls

    def admit(self, call: Call, now: float) -> AccountQueue | None:
        """The call's account, if there is a token of each scope for the call.

        Otherwise the call waits for the token that it lacks.
        """
        account = self.accounts.of(call)
        if account.key != call.key:
            account.has_several_keys = True
        if account.room(call.flow.kind, now) <= 0:
            self._wait_for_account(account, call, now)
            return None
        if self.counts_common and not self.common.admits(call, now):
            self._wait_for_common(account, call, now)
            return None
        return account

    def take(self, call: Call, account: AccountQueue, now: float) -> tuple[int, int | None]:
        """Take the tokens of a call that is admitted.

        Returns the mark of its place in the count of its account, and in the common count.
        """
        kept = self._kept(account, call.flow.kind)
        own = account.bucket.take(now, kept)
        common = None
        if self.counts_common:
            common = self.common.bucket.take(now, self._kept(self.common, call.flow.kind))
        if call.let_out_of is not None:
            self._take_back(call)
        if call.flow.kind is Kind.BACKGROUND:
            self.refreshing += 1
            account.refreshing += 1
            for queue in (account, self.common) if self.counts_common else (account,):
                queue.space_refreshes(now, self._terms.period)
                if len(queue):
                    self._arm(queue, now)
        return own, common

    def remove(self, call: Call, now: float) -> bool:
        """Remove a call that waits. Returns whether another call may start because of that."""
        account = self.accounts.find(call.account)
        if account is not None and account.holds(call):
            self._park(call, -1)
        if call.queue is not None:
            call.queue.remove(call)
        let_out_of = self._take_back(call)
        if account is not None:
            self.accounts.forget_if_unused(account, now)
            self.release(account, now)
        if let_out_of is self.common:
            self.release(self.common, now)
        return let_out_of is not None

    def drop(self, call: Call, now: float) -> None:
        """Forget a call that was ready, which is not sent now.

        The common token that let it out goes to the next call.
        """
        account = self.accounts.find(call.account)
        if self._take_back(call) is self.common:
            self._release_at(self.common, now)
        if account is not None:
            self.accounts.forget_if_unused(account, now)
            self.release(account, now)

    def give_up(self, whose: Hashable | None, now: float, most: int | None = None) -> list[Call]:
        """Remove and return the calls that wait for a token of this account, or a common one."""
        queue = self.common if whose is None else self.accounts.find(whose)
        given_up = [] if queue is None else list(itertools.islice(queue.drain(), most))
        for call in given_up:
            if queue is not self.common:
                self._park(call, -1)
            account = self.accounts.find(call.account)
            if account is not None:
                self.accounts.forget_if_unused(account, now)
                self.release(account, now)
        return given_up

    def lengths(self) -> Counter[Flow]:
        """How many calls of each flow wait for a token."""
        waiting = Counter(self._parked)
        for queue in self.common.queues:
            waiting.update(queue.lengths())
        return waiting

    # --- waking waiting calls

    @property
    def next_moment(self) -> float:
        """When `release_due` has to be called; infinite if no call waits for a known moment."""
        return self._moments[0][0] if self._moments else math.inf

    def release_due(self, now: float) -> None:
        """Let out the calls whose tokens have returned."""
        while self._moments and self._moments[0][0] <= now:
            self.release(heapq.heappop(self._moments)[2], now)

    def release(self, queue: TokenQueue, now: float) -> None:
        """Let out as many waiting calls as there is room for."""
        if not queue.has_waiters:
            return
        calls = list(queue.release(now))
        # Calls that still wait for their account may not take the tokens for which these stand.
        first = queue is not self.common and len(queue) > 0
        for call in reversed(calls) if first else calls:
            if queue is not self.common:
                self._park(call, -1)
            self._ready.push(call, first=first)
        if len(queue):
            self._arm(queue, now)
        else:
            queue.has_waiters = False
            queue.bucket.want(0, 0)

    # --- predictions

    def earliest(self, name: Hashable, now: float) -> float:
        """The earliest time at which a call of this account can have its tokens."""
        account = self.accounts.find(name)
        moment = now if account is None else max(account.cools_until, _sure(account.bucket, now))
        return max(moment, _sure(self.common.bucket, now)) if self.counts_common else moment

    def hopeless(self, names: Iterable[Hashable], deadline: float, now: float) -> list[int]:
        """The indexes of the names whose calls certainly have no tokens before the deadline."""
        is_late = self.counts_common and _sure(self.common.bucket, now) > deadline
        return [
            index
            for index, name in enumerate(names)
            if is_late
            or (
                (account := self.accounts.find(name)) is not None
                and max(account.cools_until, _sure(account.bucket, now)) > deadline
            )
        ]

    # --- inside

    def _kept(self, queue: TokenQueue, kind: Kind) -> int:
        """Tokens that a call of this kind leaves, where that decides which one it takes."""
        if kind is Kind.SINGLE or not queue.bucket.is_shared:
            return 0
        return reserve.kept_from(kind, queue.bucket, queue.reserve)

    def _wait_for_account(self, account: AccountQueue, call: Call, now: float) -> None:
        let_out_of = self._take_back(call)
        if let_out_of is self.common:
            self._release_at(self.common, now)
        account.push(call)
        self._park(call, 1)
        if let_out_of is account:  # its token may serve a call of a better kind
            self.release(account, now)
        else:
            self._arm(account, now)

    def _wait_for_common(self, account: AccountQueue, call: Call, now: float) -> None:
        let_out_of = self._take_back(call)
        self.common.push(call)
        if isinstance(call.flow, PoolFlow) and call.flow.queue is self._ready:
            self.common.push_pool(call.flow)  # no other call of the pool could start now
        if let_out_of is self.common:  # as above
            self.release(self.common, now)
            return
        self._arm(self.common, now)
        if let_out_of is account and account.waits_before(call.flow.kind):
            self.release(account, now)

    def _take_back(self, call: Call) -> TokenQueue | None:
        """Note that a call does not stand for a token any more.

        Returns the queue that had let it out.
        """
        if call.let_out_of is None:
            return None
        if self.common.take_back(call):
            return self.common
        account = self.accounts.of(call)
        account.take_back(call)
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

    def _arm(self, queue: TokenQueue, now: float) -> None:
        """Set the moment at which the queue has room again for one of its waiting calls."""
        moment = queue.next_room(now)
        if moment is not None and not now < queue.releases_at <= moment:
            self._release_at(queue, moment)

    def _release_at(self, queue: TokenQueue, moment: float) -> None:
        queue.releases_at = moment
        heapq.heappush(self._moments, (moment, next(self._ids), queue))

    def _wake(self, name: Hashable | None) -> None:
        """Note that the tokens of an account, or the common ones, changed outside the scheduler.

        A lease has arrived, or none will arrive.
        """
        queue = self.common if name is None else self.accounts.find(name)
        if queue is not None:  # otherwise no call waits any more, and the account was forgotten
            self._release_at(queue, -math.inf)


def _sure(bucket: Bucket, now: float) -> float:
    """The earliest time at which a token can be had, with certainty.

    A request on the wire may return one at any moment, and so may another process.
    """
    if bucket.on_wire or bucket.room(now, 0) > 0 or (bucket.is_shared and not bucket.is_degraded):
        return now
    return bucket.room_at(now, 0) or now
