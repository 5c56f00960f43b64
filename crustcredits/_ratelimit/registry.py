"""`Accounts`: the accounts of an endpoint that have tokens out or calls that wait.

Eviction of idle buckets: an account is forgotten when all its tokens are back and no call waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

from crustcredits._ratelimit.flow import Call
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket
from crustcredits._ratelimit.token_queue import AccountQueue

# Seconds until a bucket is checked again after all its tokens are back, but not yet reported to
# other processes.
_SETTLES = 2.0
# Most accounts that one call checks.
_LOOKS = 1_000


class Accounts:
    """The known accounts by name.

    Args:
        terms: The settings of the scheduler.
        make_bucket: Makes the tokens of an account.
    """

    __slots__ = ("_by_name", "_idle", "_make_bucket", "_terms")

    def __init__(self, terms: SchedulerTerms, make_bucket: Callable[[Hashable], Bucket]) -> None:
        self._terms = terms
        self._make_bucket = make_bucket
        self._by_name: dict[Hashable, AccountQueue] = {}
        # Accounts that may be forgotten, nearly in the order of their moments.
        self._idle: deque[AccountQueue] = deque()

    def __len__(self) -> int:
        """How many accounts are known."""
        return len(self._by_name)

    def find(self, name: Hashable) -> AccountQueue | None:
        """A known account, or None."""
        return self._by_name.get(name)

    def of(self, call: Call) -> AccountQueue:
        """The account of a call."""
        account = self._by_name.get(call.account)
        if account is None:
            account = self._by_name[call.account] = AccountQueue(
                call.account, call.key, self._make_bucket(call.account), self._terms
            )
        return account

    def forget_if_unused(self, account: AccountQueue, now: float) -> None:
        """Note that a call has left without a request, and forget an account that is not in use."""
        is_in_use = account.let_out or account.refreshes_let_out or len(account)
        if account.idles_at is None and not is_in_use and account.cools_until <= now:
            account.bucket.room(now, 0)
            if account.bucket.is_whole:
                self._by_name.pop(account.name, None)
                return
        self.forget_later(account, now)

    def forget_later(self, account: AccountQueue, when: float) -> None:
        """Plan a check whether an account can be forgotten, unless one is planned.

        The check comes at `when`, or later while the account cools down.
        """
        if account.idles_at is None:
            account.idles_at = max(when, account.cools_until)
            self._idle.append(account)

    def forget_idle(self, now: float) -> None:
        """Forget accounts whose tokens are all back.

        An account that takes longer goes to the end, so that it delays no other.
        """
        for _ in range(min(_LOOKS, len(self._idle))):
            account = self._idle[0]
            assert account.idles_at is not None, "a check is planned"
            if account.idles_at > now:
                if account.idles_at > now + self._terms.period:
                    self._idle.rotate(-1)
                return
            self._idle.popleft()
            account.idles_at = None
            if account.let_out or account.refreshes_let_out or len(account):
                continue
            account.bucket.room(now, 0)
            if now < account.cools_until:
                self.forget_later(account, now)
            elif account.bucket.is_whole:
                del self._by_name[account.name]
            elif account.bucket.is_settling:
                self.forget_later(account, now + _SETTLES)
            elif not account.bucket.on_wire:
                self.forget_later(account, account.bucket.returns(now, 0.0)[-1])
