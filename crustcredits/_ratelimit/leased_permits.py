"""`LeasedPermits`: the permits of one endpoint where several processes count together in Redis.

A call asks for a whole permit and waits for its account meanwhile: Redis grants a token of each
scope or none, so no process holds one token while it waits for the other. Calls that may not ask
yet wait for the common tokens, in their order.
"""

from __future__ import annotations

from crustcredits._ratelimit.flow import KINDS, Call, Kind
from crustcredits._ratelimit.leased_tokens import LeasedTokens, PermitGate
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.reserve import kept_from
from crustcredits._ratelimit.token_queue import AccountQueue, TokenQueue


class LeasedPermits(Permits):
    """As `Permits`, for tokens of accounts that are leased from Redis.

    In degraded mode, in which this process counts alone, it is as `Permits`.
    """

    def admit(self, call: Call, now: float) -> AccountQueue | None:
        """As for `Permits`."""
        if self.common.bucket.is_degraded:
            return super().admit(call, now)
        account = self.accounts.of(call)
        if account.key != call.key:
            account.has_several_keys = True
        if account.room(call.flow.kind, now) > 0:
            return account
        if self._must_not_ask(account, call.flow.kind, now) or self.common.admits(call, now):
            self._wait_for_account(account, call, now)
        else:
            self._wait_for_common(account, call, now)
        return None

    def release(self, queue: TokenQueue, now: float) -> None:
        """As for `Permits`; calls that waited for the common tokens ask for a permit."""
        if self.common.bucket.is_degraded:
            super().release(queue, now)
        elif queue is self.common:
            self._let_ask(now)
        else:
            self._release_account(queue, now)

    def _must_not_ask(self, account: AccountQueue, kind: Kind, now: float) -> bool:
        """Whether a call has to wait for its own account, even if tokens are free."""
        return now < account.cools_until or _is_short(account, kind, now)

    def _let_ask(self, now: float) -> None:
        common, gate = self.common, self.common.bucket
        if not common.has_waiters:
            return
        if len(common) and isinstance(gate, PermitGate) and not gate.is_open(len(common)):
            self._arm(common, now)  # requests come in groups
            return
        is_again = False
        for call in list(common.release(now)):
            common.take_back(call)
            account = self.accounts.of(call)
            if account.room(call.flow.kind, now) > 0:
                self._ready.push(call)
                continue
            is_again = is_again or self._must_not_ask(account, call.flow.kind, now)
            self._wait_for_account(account, call, now)
        if not len(common):
            common.has_waiters = False
            common.bucket.want(0, 0)
        elif is_again:  # these calls took no room
            self._release_at(common, now)
        else:
            self._arm(common, now)

    def _release_account(self, account: TokenQueue, now: float) -> None:
        super().release(account, now)
        kind, bucket = _best_kind(account), account.bucket
        if kind is None or not isinstance(bucket, LeasedTokens):
            return
        if _is_short(account, kind, now):
            return
        others_wait = self.counts_common and self.common.has_waiters
        if not others_wait and not self._is_common_short(kind, now):
            return
        # Other calls may have their turn at the common tokens before these.
        for call in reversed(list(account.drain())):
            self._park(call, -1)
            self.common.push(call, first=True)
        account.has_waiters = False
        bucket.ask_later()
        self._release_at(self.common, now)

    def _is_common_short(self, kind: Kind, now: float) -> bool:
        gate = self.common.bucket
        return isinstance(gate, LeasedTokens) and gate.is_short(now, self.common.kept(kind, now))

    def _arm(self, queue: TokenQueue, now: float) -> None:
        kind, bucket = _best_kind(queue), queue.bucket
        if queue is self.common or kind is None or not isinstance(bucket, LeasedTokens):
            super()._arm(queue, now)
            return
        bucket.kept_within = self.common.kept(kind, now)
        super()._arm(queue, now)
        moment = bucket.short_until(kept_from(kind, bucket, queue.reserve))
        if self.counts_common and now < moment and not now < queue.releases_at <= moment:
            self._release_at(queue, moment)


def _best_kind(queue: TokenQueue) -> Kind | None:
    for kind, waiting in zip(KINDS, queue.queues, strict=False):  # there are none before the first
        if waiting.length:
            return kind
    return None


def _is_short(queue: TokenQueue, kind: Kind, now: float) -> bool:
    bucket = queue.bucket
    kept = kept_from(kind, bucket, queue.reserve)
    return isinstance(bucket, LeasedTokens) and bucket.is_short(now, kept)
