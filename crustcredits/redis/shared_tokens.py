"""`SharedTokens`: one process's view of the tokens of a bucket that several processes share.

A process asks for permits: one token of each bucket that counts an attempt, or none of them. So no
process holds a token while it waits for another one. The link decides how and when messages travel.
`granted_tokens` holds what Redis granted, and `bucket_view` what it said last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs

from crustcredits._ratelimit.leased_tokens import Scope
from crustcredits.redis.bucket_view import BucketView
from crustcredits.redis.granted_tokens import GrantedTokens
from crustcredits.redis.local_tokens import FRESH, LocalTokens
from crustcredits.redis.protocol import BucketReport, BucketState
from crustcredits.redis.window import Window

# Most seconds between two messages while a call waits or tokens are out; a lost count is noticed
# within this time.
BEAT = 0.5
# Most buckets in one message.
BUCKETS = 64


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
    scope: Scope = "client"

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
        opens_at: Redis grants nothing before this time, because the count was lost.
        settles_at: The time at which `settled` becomes true.
    """

    terms: Terms
    window: Window[SharedTokens]
    opens_at: float

    @property
    def cut_off(self) -> bool:
        """Whether the last message failed."""
        ...

    @property
    def degraded(self) -> bool:
        """Whether each process counts by itself, because Redis is out of reach."""
        ...

    @property
    def settled(self) -> bool:
        """Whether degraded mode has lasted so long that no other process uses this one's share."""
        ...

    @property
    def settles_at(self) -> float:
        """The time at which `settled` becomes true."""
        ...

    def now(self) -> float:
        """Return the loop's time."""
        ...

    def number(self, count: int) -> int:
        """Reserve `count` new token numbers, and return the first."""
        ...

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """Queue a message for these tokens."""
        ...

    def keeps_an_eye_on(self, tokens: SharedTokens) -> None:
        """Watch these tokens: `collect` is called until none is granted and unused."""
        ...


@attrs.define
class _Sent:
    """What the message under way asks for.

    Attributes:
        at: When it was sent.
        asks: The numbers of the permits asked for, by request, and how many tokens each leaves.
        waits: Permits that calls wait for besides.
        short: How many tokens those leave that wait besides, or were not granted in full.
    """

    at: float
    asks: dict[range, int] = attrs.field(factory=dict)
    waits: int = 0
    short: list[int] = attrs.field(factory=list)


class SharedTokens:
    """One process's view of the tokens of a bucket.

    While the link works, granted tokens are free. In degraded mode this process counts by itself,
    for its share. For one lease it uses at most as many as it had out when the link failed, because
    other processes may have used the rest. It has many methods because it serves its bucket and the
    link.

    Args:
        link: Carries the messages.
        name: The bucket's name in Redis.
        limit: How many tokens there are.
        within: The tokens that each permit for this bucket takes too, or None.

    Attributes:
        epoch: The last epoch in which all tokens were registered; 0 for none.
    """

    def __init__(
        self, link: Link, name: str, limit: int, *, within: SharedTokens | None = None
    ) -> None:
        self.name = name
        self.within = within
        self.limit = limit
        self.epoch: int = 0
        self._link = link
        self._own = LocalTokens(limit)  # the count of this process
        self._granted = GrantedTokens(link.terms.lease)
        self._view = BucketView()
        self._had = 0  # used tokens of this process when the link failed
        self._wanted = 0
        self._asked = 0  # of these, those that the window counts
        # Tokens that the waiting calls leave, here and in `within`.
        self._kept = self._kept_within = 0
        self._sent: _Sent | None = None
        if link.degraded:
            self._own.resize(self.share)

    # --- for the bucket

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """Call `wake` when tokens have arrived, and `fail` when none can be had."""
        self._wake, self._fail = wake, fail

    def resize(self, limit: int) -> None:
        """Set the number of tokens; more may be out."""
        if limit == self.limit:
            return
        self.limit = limit
        self._view.forget_short()
        if self._link.degraded:
            self._own.resize(self.share)

    def free(self, kept: int) -> int:
        """Number of tokens that calls which leave `kept` tokens can use now.

        In degraded mode `kept` does not count: the caller subtracts it.
        """
        return self._own.free if self._link.degraded else self._granted.free(kept)

    @property
    def available(self) -> int:
        """Number of tokens that could be had now, as far as known, including those to ask for."""
        if self._link.degraded:
            return self._own.available
        return max(0, self.limit - self._view.others_out(self._link.now()) - self._own.out)

    @property
    def cut_off(self) -> bool:
        """Whether the last message failed."""
        return self._link.cut_off

    @property
    def degraded(self) -> bool:
        """Whether this process counts by itself."""
        return self._link.degraded

    @property
    def in_flight(self) -> int:
        """Number of tokens used by attempts under way."""
        return self._own.in_flight

    @property
    def share(self) -> int:
        """Number of tokens that may be out in degraded mode."""
        if self._link.settled:
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
        self._granted.forget_returned(now)
        while self._granted.has_expired(now):
            self._drop_unused()

    def start(self, now: float, kept: int) -> int:
        """Use one free token for an attempt; return a mark for `own`.

        The call leaves `kept` tokens. A token that was asked for by a call that leaves fewer is not
        for it.
        """
        mark = self._own.start(now)
        if self._link.degraded:
            self._granted.take_own(self._link.number(1), now)
        else:
            self._take(kept)
        return mark

    def end(self, when: float) -> None:
        """End one attempt; its token returns at `when`."""
        self._own.end(when)
        is_reported = not self._link.degraded
        self._granted.end(when, is_reported=is_reported)
        if is_reported:
            self._link.say(self, at_once=False)

    def unsend(self) -> None:
        """End one attempt that the server does not count here; its token goes back to Redis."""
        self._own.unsend()
        self._gave_back(self._granted.give_back_taken(is_known=self._is_known))

    def own(self, mark: int) -> int:
        """Most requests of this process that the server can have counted at that mark's arrival.

        The request of that mark is included.
        """
        return self._own.own(mark)

    def next_home(self, missing: int) -> float | None:
        """Time at which `missing` more tokens are free; None if unknown or asked for."""
        return self._own.next_home(missing) if self._link.degraded else None

    def returns(self, now: float, period: float) -> list[float]:
        """Estimate when tokens return, ascending.

        Other processes may use theirs again, and nothing is known of tokens in the far future.
        """
        if self._link.degraded:
            times = self._own.returns(now, period)
            later = max(now, self._link.settles_at)
            return sorted([*times, *[later] * (self._whole_share - len(times))])
        free, others = self.available, self._view.others_out(now)
        times = sorted(
            [
                *[now] * free,
                *[now + period] * self._own.in_flight,
                *self._own.homes(),
                *[self._view.others_until] * others,
            ]
        )
        # More may be out than the limit. The last answer gave the exact times of the next ones.
        times = times[max(0, len(times) - self.limit) :]
        for place, told in enumerate(self._view.coming[: len(times)]):
            times[place] = min(times[place], max(now, told))
        return times

    # --- waiting calls

    def need(self, count: int, kept: int, kept_within: int = 0) -> None:
        """Ask for permits for `count` waiting calls. With 0 no call waits any more.

        The calls leave `kept` of these tokens, and `kept_within` of the others that a permit takes.
        """
        self._wanted, self._kept, self._kept_within = count, kept, kept_within
        self._link.window.waits(self, count)
        if not count and self._view.is_in_line:
            self._link.say(self, at_once=False)  # other processes need not wait for this one
        if self._link.degraded:
            return
        self._count_asked(0 if self._link.now() < self.asks_from else self._to_ask())
        if self.wants:
            self._link.say(self, at_once=True)

    def ask_later(self) -> None:
        """Ask for nothing until `need` says so; the process keeps its place among the others."""
        self._view.is_in_line = False
        self._want_nothing()

    @property
    def asks_from(self) -> float:
        """When the waiting calls ask: at once, unless there are no tokens for such calls."""
        return max(self._link.opens_at, self._view.short_until(self._kept))

    def short_until(self, kept: int) -> float:
        """Until when Redis has no token for calls that leave `kept` tokens, as far as known."""
        return self._view.short_until(kept)

    def room_came(self) -> None:
        """Note that more permits may be asked for."""
        if self.wants and not self._link.degraded and self._link.now() >= self.asks_from:
            self._count_asked(self._to_ask())
            self._link.say(self, at_once=True)

    # --- for the link

    @property
    def has_unused(self) -> bool:
        """Whether granted tokens of Redis wait for their use."""
        return bool(self._granted.unused)

    @property
    def wants(self) -> bool:
        """Whether to ask for permits: a call waits, and there is room in the window.

        Where a permit takes two tokens, calls do not ask by themselves when tokens return: other
        calls may have their turn at the second token before.
        """
        if not self._wanted or not self._to_ask():
            return False
        return self.within is None or self._link.now() >= self.asks_from

    def holds(self, now: float) -> bool:
        """Whether this process has tokens that Redis must know about."""
        self.collect(now)
        return not self._granted.is_empty

    def next_news(self, now: float, epoch: int) -> float | None:
        """When a message about this bucket is of use; None if another event has to happen first."""
        if (
            self._granted.has_reports
            or (self._view.is_in_line and not self._wanted)
            or (self.epoch != epoch and self.holds(now))
        ):
            return now
        return max(now, self.asks_from) if self.wants else None

    def begin(self, now: float) -> None:
        """Begin a message that reports about this bucket."""
        self.collect(now)
        self._granted.begin_report(now)
        self._sent = _Sent(now)

    def asks(self, now: float) -> int:
        """How many permits the message asks for: none before tokens return."""
        count = 0 if now < self.asks_from else self._to_ask()
        self._count_asked(count)
        return count

    def ask(self, numbers: range, asking: SharedTokens) -> int:
        """Note the permits that the message asks for. Returns how many tokens may be out."""
        kept = asking._kept if asking is self else asking._kept_within
        self._message.asks[numbers] = kept
        return self.limit - kept

    def report(self, now: float, epoch: int) -> BucketReport:
        """The part of the message that is about this bucket, when it is known what it asks for.

        Registers every token that is out, if that has not been done in this epoch.
        """
        sent = self._message
        if not self._answers_all(sent):
            sent.waits = min(self._wanted, self._link.window.size)
        if sent.waits:
            sent.short.append(self._kept)
        return BucketReport(
            name=self.name,
            waits=sent.waits,
            most=self.limit - self._kept,
            returns=self._granted.returns(now, all_tokens=not epoch or epoch != self.epoch),
            unused=self._granted.given_back(),
        )

    def granted(self, numbers: range, count: int) -> None:
        """Take the first `count` permits of a request."""
        sent = self._message
        kept = sent.asks[numbers]
        self._granted.grant(numbers[:count], sent.at, kept)
        if count:
            self._link.keeps_an_eye_on(self)
        if count < len(numbers):
            sent.short.append(kept)

    def answered(self, state: BucketState, now: float, *, epoch: int) -> bool:
        """Take the answer to the message under way, after what was granted.

        Returns whether calls may have to be woken.
        """
        sent, self._sent = self._message, None
        self.epoch = epoch
        self._granted.reported()
        own = self._own.out + len(self._granted.unused)
        self._view.hear(state, now, own=own, period=self._link.terms.period)
        if not sent.asks and not sent.waits:
            return False
        if state.free:
            self._view.forget_short()
        elif state.missing:
            # Where Redis does not know when tokens return, a heartbeat tells.
            beats = max(1.0, len(self._link.window.waiters) / BUCKETS)
            self._view.note_short(min(sent.short), now, otherwise=now + 2 * BEAT * beats)
        if self._answers_all(sent):
            self._wanted = 0  # calls that still wait ask again
            self._link.window.waits(self, 0)
        return True

    def book(self, given: int) -> None:
        """Count the permits that the answer brought as unused, and no more as asked for."""
        asked, self._asked = self._asked, 0
        self._link.window.answered(asked, given)

    def wake(self) -> None:
        """Wake the waiting calls after an answer."""
        self._wake()

    def unanswered(self) -> None:
        """Give back the tokens that the message may have brought: Redis may have received it."""
        sent, self._sent = self._message, None
        for numbers in sent.asks:
            self._granted.give_back_lost(numbers, sent.at)
        self._count_asked(0)

    def fail(self) -> None:
        """Fail every waiting call: Redis is out of reach."""
        self._want_nothing()
        self._fail()

    def let_go(self) -> None:
        """Give back every granted token, because the client is closed."""
        self._want_nothing()
        while self.has_unused:
            self._drop_unused()

    def lose_touch(self) -> None:
        """Note how many tokens are out at the first failure of the link."""
        self.collect(self._link.now())
        self._had = self._own.out

    def go_alone(self) -> None:
        """Enter degraded mode."""
        self.epoch = 0
        self._granted.forget_reports()
        self._count_asked(0)
        self.change()

    def change(self) -> None:
        """Adapt to the start or the end of degraded mode, or to the use of the whole share."""
        self._view.forget_short()
        self._own.resize(self.share)
        self._wake()

    # --- inside: what differs for `GateTokens`

    def _take(self, kept: int) -> None:
        self._granted.take_for(kept)
        self._link.window.used()

    def _to_ask(self) -> int:
        """How many permits to ask for now."""
        return self._link.window.share_of(self._wanted, self._asked)

    def _answers_all(self, sent: _Sent) -> bool:
        """Whether the answer is about all calls that waited when the message was sent."""
        return bool(sent.asks)

    def _drop_unused(self) -> None:
        """Give back the oldest granted token."""
        self._gave_back(self._granted.give_back_unused(is_known=self._is_known))
        self._link.window.used()

    # --- inside

    @property
    def _message(self) -> _Sent:
        """The message under way."""
        assert self._sent is not None
        return self._sent

    @property
    def _has_to_say(self) -> bool:
        granted = self._granted
        return granted.has_reports or self.has_unused or self._sent is not None

    @property
    def _is_known(self) -> bool:
        """Whether Redis knows of the tokens of this process, or soon will."""
        return bool(self.epoch) or self._sent is not None

    @property
    def _whole_share(self) -> int:
        terms = self._link.terms
        return max(0 if terms.is_strict else 1, int(self.limit * terms.share))

    def _gave_back(self, must_tell: bool) -> None:
        if must_tell:
            self._view.forget_short()
            self._link.say(self, at_once=self.wants)  # a call that waits here can have it

    def _count_asked(self, count: int) -> None:
        """Let the window count that many permits as asked for."""
        more, self._asked = count - self._asked, count
        if more:
            self._link.window.asked_for(more)

    def _want_nothing(self) -> None:
        self._wanted = 0
        self._link.window.waits(self, 0)
        self._count_asked(0)


class GateTokens(SharedTokens):
    """The common tokens where each of them comes together with one of an account.

    Permits are never asked for these tokens alone: the tokens of an account ask for both.
    """

    def room_to_ask(self, now: float, kept: int) -> int:
        """For how many more permits calls may ask that leave `kept` of these tokens."""
        if now < self.short_until(kept):
            return 0
        room, come = self._link.window.room, self._view.has_come(now)
        return room if come is None else min(room, max(1, come))

    def may_ask(self, count: int) -> bool:
        """Whether there is room for so many more permits, or for a group of them."""
        return self._link.window.allows(count)

    def short_until(self, kept: int) -> float:
        """As for `SharedTokens`; nobody asks before Redis grants permits again."""
        return max(self._link.opens_at, super().short_until(kept))

    def room_came(self) -> None:
        """As for `SharedTokens`."""
        if self.may_ask(self._wanted):
            self._wake()

    def _take(self, kept: int) -> None:
        self._granted.take_first()

    def _to_ask(self) -> int:
        return 0

    def _answers_all(self, sent: _Sent) -> bool:
        return False

    def _drop_unused(self) -> None:
        self._gave_back(self._granted.give_back_unused(is_known=self._is_known))
