"""`SharedTokens`: one process's view of the tokens of a bucket that several processes share.

A process asks for permits: one token of each bucket that counts an attempt, or none of them. So no
process holds a token while it waits for another one. The link decides how and when messages travel.
`granted_tokens` holds the tokens that Redis granted, `bucket_view` its last answer, and
`bucket_messages` the messages about the bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import attrs

from crustcredits._ratelimit.leased_tokens import CountedScope
from crustcredits.redis.bucket_messages import BucketMessages
from crustcredits.redis.bucket_view import BucketView
from crustcredits.redis.granted_tokens import GrantedTokens
from crustcredits.redis.local_tokens import FRESH, LocalTokens
from crustcredits.redis.outage import Outage
from crustcredits.redis.window import Demand, Window


@attrs.frozen(kw_only=True)
class Terms:
    """Terms of all tokens of one client, in seconds.

    Attributes:
        period: From the end of an attempt to the return of its token.
        late: Longest duration of an attempt.
        pace: Starts a second; None without a limit.
        share: Share of the limit in degraded mode.
        is_strict: Whether all processes together use no more than their shares.
        scope: The scope that the server counts by; with `"auto"` an attempt takes two tokens.
    """

    period: float
    late: float
    pace: float | None
    share: float
    is_strict: bool = False
    scope: CountedScope = "client"

    @property
    def lease(self) -> float:
        """Seconds after its grant at which Redis takes back a token without a report.

        No process can use the token any more by then.
        """
        # Worst case: the attempt starts when the token is just about to expire, lasts as long as it
        # may, and arrives as late as it may.
        return FRESH + self.late + self.late + self.period


class Link(Protocol):
    """Carries the messages.

    Attributes:
        terms: The terms of all tokens.
        window: How many permits may be asked for.
        outage: Whether Redis answers. If not, each process counts by itself.
        opens_at: Redis grants nothing before this time, because the count was lost.
    """

    terms: Terms
    window: Window[SharedTokens]
    outage: Outage
    opens_at: float

    def now(self) -> float:
        """The time now, by the running loop's clock."""
        ...

    def number(self, count: int) -> int:
        """Reserve `count` new token numbers, and return the first."""
        ...

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """Queue a message for these tokens."""
        ...

    def watch(self, tokens: SharedTokens) -> None:
        """Watch these tokens: `collect` is called until none is granted and unused."""
        ...


class SharedTokens:
    """One process's view of the tokens of a bucket.

    While the link works, granted tokens are free. In degraded mode this process counts by itself,
    for its share. For one lease it uses at most as many as it had out when the link failed. Other
    processes may have used the rest. This class is long because a bucket answers to the scheduler
    and to the link.

    Args:
        link: Carries the messages.
        name: The bucket's name in Redis.
        limit: How many tokens there are.
        within: The tokens that each permit for this bucket takes too, or None.

    Attributes:
        granted: The tokens that Redis granted.
        view: What Redis said last.
        demand: The calls that wait.
        messages: The messages about this bucket.
    """

    _is_gate: ClassVar[bool] = False

    def __init__(
        self, link: Link, name: str, limit: int, *, within: SharedTokens | None = None
    ) -> None:
        self.name = name
        self.within = within
        self.limit: int = limit
        self.granted: GrantedTokens = GrantedTokens(link.terms.lease)
        self.view: BucketView = BucketView()
        self.demand: Demand[SharedTokens] = Demand(link.window, self, asks=not self._is_gate)
        self.messages: BucketMessages = BucketMessages(self, link.window, link.terms.period)
        self._link = link
        self._own = LocalTokens(limit)  # the count of this process
        self._had = 0  # used tokens of this process when the link failed
        if link.outage.is_degraded:
            self._own.resize(self.share)

    # --- for the bucket

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """Call `wake` when tokens have arrived, and `fail` when none can be had."""
        self.wake: Callable[[], None] = wake
        self._fail = fail

    def resize(self, limit: int) -> None:
        """Set the number of tokens; more may be out."""
        if limit == self.limit:
            return
        self.limit = limit
        self.view.forget_short()
        if self._link.outage.is_degraded:
            self._own.resize(self.share)

    def free(self, kept: int) -> int:
        """Number of tokens that calls which leave `kept` tokens can use now.

        In degraded mode `kept` does not count: the caller subtracts it.
        """
        return self._own.free if self._link.outage.is_degraded else self.granted.free(kept)

    @property
    def available(self) -> int:
        """Tokens that are free now, as far as this process knows."""
        if self._link.outage.is_degraded:
            return self._own.available
        return max(0, self.limit - self.view.others_out(self._link.now()) - self._own.out)

    @property
    def cut_off(self) -> bool:
        """Whether the last message failed."""
        return self._link.outage.since is not None

    @property
    def degraded(self) -> bool:
        """Whether this process counts by itself."""
        return self._link.outage.is_degraded

    @property
    def in_flight(self) -> int:
        """Number of tokens used by attempts under way."""
        return self._own.in_flight

    @property
    def share(self) -> int:
        """Number of tokens that may be out in degraded mode."""
        if self._link.outage.is_settled:
            return self._whole_share
        return 0 if self._link.terms.is_strict else min(self._whole_share, self._had)

    def is_idle(self) -> bool:
        """Whether no token is out and nothing is queued, so that the bucket can be forgotten."""
        return self._own.is_idle() and not self._has_to_say

    def is_settling(self) -> bool:
        """Whether no token is out, but a report is still queued."""
        return self._own.is_idle() and self._has_to_say

    def collect(self, now: float) -> None:
        """Free tokens whose return time has come, and give back expired granted ones."""
        self._own.collect(now)
        self.granted.forget_returned(now)
        while self.granted.has_expired(now):
            self._drop_unused()

    def start(self, now: float, kept: int) -> int:
        """Use one free token for an attempt; return a mark for `own`.

        The call leaves `kept` tokens. It takes no token that was requested for a call with a
        smaller reserve.
        """
        mark = self._own.start(now)
        if self._link.outage.is_degraded:
            self.granted.take_own(self._link.number(1), now)
        else:
            self._take(kept)
        return mark

    def end(self, when: float) -> None:
        """End one attempt; its token returns at `when`."""
        self._own.end(when)
        is_reported = not self._link.outage.is_degraded
        self.granted.end(when, is_reported=is_reported)
        if is_reported:
            self._link.say(self, at_once=False)

    def unsend(self) -> None:
        """End one attempt that the server does not count here; its token goes back to Redis."""
        self._own.unsend()
        self._gave_back(self.granted.give_back_taken(is_known=self._is_known))

    def own(self, mark: int) -> int:
        """Most requests of this process that the server can have counted at that mark's arrival.

        The request of that mark is included.
        """
        return self._own.own(mark)

    def next_home(self, missing: int) -> float | None:
        """Time at which `missing` more tokens are free; None if unknown or asked for."""
        return self._own.next_home(missing) if self._link.outage.is_degraded else None

    def returns(self, now: float, period: float) -> list[float]:
        """Estimate when tokens return, ascending.

        Other processes may use theirs again, and nothing is known of tokens in the far future.
        """
        if self._link.outage.is_degraded:
            times = self._own.returns(now, period)
            later = max(now, self._link.outage.settles_at)
            return sorted([*times, *[later] * (self._whole_share - len(times))])
        free, others = self.available, self.view.others_out(now)
        times = sorted(
            [
                *[now] * free,
                *[now + period] * self._own.in_flight,
                *self._own.homes(),
                *[self.view.others_until] * others,
            ]
        )
        # More may be out than the limit. The last answer gave the exact times of the next ones.
        times = times[max(0, len(times) - self.limit) :]
        for place, told in enumerate(self.view.coming[: len(times)]):
            times[place] = min(times[place], max(now, told))
        return times

    # --- waiting calls

    def need(self, count: int, kept: int, kept_within: int = 0) -> None:
        """Ask for permits for `count` waiting calls. With 0 no call waits any more.

        The calls leave `kept` of these tokens, and `kept_within` of the others that a permit takes.
        """
        self.demand.change(count, kept, kept_within)
        if not count and self.view.is_in_line:
            self._link.say(self, at_once=False)  # other processes need not wait for this one
        if self._link.outage.is_degraded:
            return
        self.demand.ask(0 if self._link.now() < self.asks_from else self.demand.permits)
        if self.wants:
            self._link.say(self, at_once=True)

    def ask_later(self) -> None:
        """Ask for nothing until `need` says so; the process keeps its place among the others."""
        self.view.is_in_line = False
        self.demand.end()

    @property
    def asks_from(self) -> float:
        """When the waiting calls ask: at once, unless there are no tokens for such calls."""
        return max(self._link.opens_at, self.view.short_until(self.demand.kept))

    def short_until(self, kept: int) -> float:
        """Until when Redis has no token for calls that leave `kept` tokens, as far as known."""
        return self.view.short_until(kept)

    def room_came(self) -> None:
        """Note that more permits may be asked for."""
        if self.wants and not self._link.outage.is_degraded and self._link.now() >= self.asks_from:
            self.demand.ask(self.demand.permits)
            self._link.say(self, at_once=True)

    # --- for the link

    @property
    def own_out(self) -> int:
        """Number of tokens that Redis counts as out and that are this process's."""
        return self._own.out + len(self.granted.unused)

    @property
    def has_unused(self) -> bool:
        """Whether granted tokens of Redis wait for their use."""
        return bool(self.granted.unused)

    @property
    def wants(self) -> bool:
        """Whether to ask for permits: a call waits, and there is room in the window.

        Where a permit takes two tokens, a return triggers no request here, because other calls may
        be ahead at the second bucket.
        """
        if not self.demand.permits:
            return False
        short_until = self.view.short_until(self.demand.kept)
        return self.within is None or self._link.now() >= short_until

    def watch_unused(self) -> None:
        """Let the link call `collect` until no granted token is unused."""
        self._link.watch(self)

    def has_out(self, now: float) -> bool:
        """Whether this process has tokens that Redis must know about."""
        self.collect(now)
        return not self.granted.is_empty

    def fail(self) -> None:
        """Fail every waiting call: Redis is out of reach."""
        self.demand.end()
        self._fail()

    def let_go(self) -> None:
        """Give back every granted token, because the client is closed."""
        self.demand.end()
        while self.has_unused:
            self._drop_unused()

    def lose_touch(self) -> None:
        """Note how many tokens are out at the first failure of the link."""
        self.collect(self._link.now())
        self._had = self._own.out

    def go_alone(self) -> None:
        """Enter degraded mode; its waiting calls are woken when all tokens have done so."""
        self.messages.epoch = 0
        self.granted.forget_reports()
        self.demand.ask(0)
        self.change()

    def change(self) -> None:
        """Adapt to the start or the end of degraded mode, or to the use of the whole share."""
        self.view.forget_short()
        self._own.resize(self.share)

    # --- inside

    def _take(self, kept: int) -> None:
        self.granted.take_for(kept)
        self.demand.used()

    def _drop_unused(self) -> None:
        """Give back the oldest granted token."""
        self._gave_back(self.granted.give_back_unused(is_known=self._is_known))
        self.demand.used()

    @property
    def _has_to_say(self) -> bool:
        granted = self.granted
        return granted.has_reports or self.has_unused or self.messages.is_under_way

    @property
    def _is_known(self) -> bool:
        """Whether Redis knows of the tokens of this process, or soon will."""
        return bool(self.messages.epoch) or self.messages.is_under_way

    @property
    def _whole_share(self) -> int:
        terms = self._link.terms
        return max(0 if terms.is_strict else 1, int(self.limit * terms.share))

    def _gave_back(self, must_tell: bool) -> None:
        if must_tell:
            self.view.forget_short()
            self._link.say(self, at_once=self.wants)  # a call that waits here can have it


class GateTokens(SharedTokens):
    """The common tokens where each of them comes together with one of an account.

    Permits are never asked for these tokens alone: the tokens of an account ask for both.
    """

    _is_gate = True

    def room_to_ask(self, now: float, kept: int) -> int:
        """For how many more permits calls may ask that leave `kept` of these tokens."""
        if now < self.short_until(kept):
            return 0
        room, come = self._link.window.room, self.view.has_come(now)
        return room if come is None else min(room, max(1, come))

    def may_ask(self, count: int) -> bool:
        """Whether there is room for `count` more permits, or for a group of them."""
        return self._link.window.allows(count)

    def short_until(self, kept: int) -> float:
        """As for `SharedTokens`. Until Redis grants permits again, no call asks."""
        return max(self._link.opens_at, super().short_until(kept))

    def room_came(self) -> None:
        """As for `SharedTokens`."""
        if self.may_ask(self.demand.wanted):
            self.wake()

    def _take(self, kept: int) -> None:
        self.granted.take_first()
