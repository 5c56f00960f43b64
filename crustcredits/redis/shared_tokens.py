"""`SharedTokens`: one process's view of the tokens of a bucket that several processes share.

A process asks for permits: one token of each bucket that counts an attempt, or none of them. So no
process holds a token while it waits for another one. The link decides how and when messages travel.
Tokens are alike but for the reserve that they leave: of those that a call may use, the one granted
first is used first, and the one used first ends first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import attrs

from crustcredits._ratelimit.leased_tokens import Scope
from crustcredits.redis.local_tokens import FRESH, LocalTokens
from crustcredits.redis.protocol import BucketReport, BucketState
from crustcredits.redis.window import Window

# Most seconds from the return of a token to the message that asks for it, so that one message
# fetches all that return in between.
GAP = 0.15
# Most seconds between two messages while a call waits or tokens are out; a lost count is noticed
# within this time.
BEAT = 0.5


@attrs.frozen
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
        cut_off: Whether the last message failed.
        degraded: Whether each process counts by itself, because the link is broken.
        settled: Whether degraded mode has lasted so long that no other process has more than its
            share out.
        settles_at: The time at which `settled` becomes true.
    """

    terms: Terms
    window: Window[SharedTokens]
    degraded: bool
    settled: bool
    settles_at: float

    @property
    def cut_off(self) -> bool: ...

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


class Granted(NamedTuple):
    """One token of this process.

    Attributes:
        number: Its number, unique within the process.
        at: When its lease began.
        degraded: Whether the process granted it by itself.
        kept: How many tokens the call leaves for which it was asked.
    """

    number: int
    at: float
    degraded: bool = False
    kept: int = 0


@attrs.define
class _Sent:
    """Contents of the message under way."""

    at: float
    homes: int
    returned: int
    # The numbers of the permits asked for, by request, and how many tokens each request leaves.
    asks: dict[range, int] = attrs.field(factory=dict)
    waits: int = 0  # permits that calls wait for besides
    # How many tokens those leave that wait besides, or were not granted in full.
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
        is_gate: Whether permits are never asked for these tokens alone.
    """

    def __init__(
        self,
        link: Link,
        name: str,
        limit: int,
        *,
        within: SharedTokens | None = None,
        is_gate: bool = False,
    ) -> None:
        self.name = name
        self.within = within
        self._is_gate = is_gate
        self.epoch: int = 0  # the last one in which all tokens were registered
        # Until when there are no tokens for calls that leave so many.
        self._short: dict[int, float] = {}
        self._link = link
        self.limit: int = limit
        self._own = LocalTokens(limit)  # the count of this process
        self._had = 0  # used tokens of this process when the link failed
        self._hand: deque[Granted] = deque()
        self._on_wire: deque[Granted] = deque()
        self._ended: deque[tuple[int, float]] = deque()  # number and return time
        self._unreported: list[tuple[int, float]] = []  # of these, those to report
        self._returned: list[Granted] = []
        self._wanted = 0
        self._asked = 0  # of these, those that the window counts
        # Tokens that the waiting calls leave, here and in `within`.
        self._kept = self._kept_within = 0
        self._sent: _Sent | None = None
        # Used tokens of other processes at the last answer, and when these have returned.
        self._others, self._others_until = 0, 0.0
        self._coming: list[float] = []  # when the next tokens return
        self._waits_in_line = False  # in Redis, as one of the waiting processes
        if link.degraded:
            self._own.resize(self.share)

    # --- for the bucket

    def free(self, kept: int) -> int:
        """Number of tokens that calls which leave `kept` tokens can use now.

        In degraded mode `kept` does not count: the caller subtracts it.
        """
        if self._link.degraded:
            return self._own.free
        return sum(token.kept >= kept for token in self._hand) if kept else len(self._hand)

    @property
    def available(self) -> int:
        """Number of tokens that could be had now, as far as known, including those to ask for."""
        if self._link.degraded:
            return self._own.available
        return max(0, self.limit - self._others_out(self._link.now()) - self._own_out())

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

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """Call `wake` when tokens have arrived, and `fail` when none can be had."""
        self._wake, self._fail = wake, fail

    def resize(self, limit: int) -> None:
        """Set the number of tokens; more may be out."""
        if limit == self.limit:
            return
        self.limit = limit
        self._short.clear()
        if self._link.degraded:
            self._own.resize(self.share)

    def is_idle(self) -> bool:
        """Whether no token is out and nothing is queued, so that the bucket can be forgotten."""
        return self._own.is_idle() and not self._has_to_say()

    def is_settling(self) -> bool:
        """Whether no token is out, but a report is still queued."""
        return self._own.is_idle() and self._has_to_say()

    def _has_to_say(self) -> bool:
        return bool(self._hand or self._unreported or self._returned or self._sent)

    def collect(self, now: float) -> None:
        """Free tokens whose return time has come, and give back expired granted ones."""
        self._own.collect(now)
        while self._ended and self._ended[0][1] <= now:
            self._ended.popleft()
        while self._hand and now - self._hand[0].at > FRESH:
            self._drop_unused()

    def start(self, now: float, kept: int) -> int:
        """Use one free token for an attempt; return a mark for `own`.

        The call leaves `kept` tokens. A token that was asked for by a call that leaves fewer is not
        for it.
        """
        mark = self._own.start(now)
        if self._link.degraded:
            self._on_wire.append(Granted(self._link.number(1), now, degraded=True))
            return mark
        token = self._hand[0]
        if not self._is_gate:
            token = min(self._hand, key=lambda each: (each.kept < kept, each.kept, each.at))
        self._hand.remove(token)
        self._on_wire.append(token)
        if not self._is_gate:
            self._link.window.used()
        return mark

    def end(self, when: float) -> None:
        """End one attempt; its token returns at `when`."""
        self._own.end(when)
        ended = self._on_wire.popleft().number, when
        self._ended.append(ended)
        if not self._link.degraded:
            self._unreported.append(ended)
            self._link.say(self, at_once=False)

    def unsend(self) -> None:
        """End one attempt that the server does not count here; its token goes back to Redis."""
        self._own.unsend()
        self._give_up(self._on_wire)

    def own(self, mark: int) -> int:
        """Most requests of this process that the server can have counted at that mark's arrival.

        The request of that mark is included.
        """
        return self._own.own(mark)

    def need(self, count: int, kept: int, kept_within: int = 0) -> None:
        """Ask for permits for `count` waiting calls. With 0 no call waits any more.

        The calls leave `kept` of these tokens, and `kept_within` of the others that a permit takes.
        """
        self._wanted, self._kept, self._kept_within = count, kept, kept_within
        window = self._link.window
        window.waits(self, count)
        if not count and self._waits_in_line:
            self._link.say(self, at_once=False)  # other processes need not wait for this one
        if self._is_gate or self._link.degraded:
            return
        self._count_asked(0 if self._link.now() < self.asks_from else self._to_ask())
        if self.wants:
            self._link.say(self, at_once=True)

    def ask_later(self) -> None:
        """Ask for nothing until `need` says so; the process keeps its place among the others."""
        self._waits_in_line = False
        self._want_nothing()

    @property
    def asks_from(self) -> float:
        """When the waiting calls ask: at once, unless there are no tokens for such calls."""
        return self.short_until(self._kept)

    def short_until(self, kept: int) -> float:
        """Until when Redis has no token for calls that leave `kept` tokens, as far as known."""
        return max((when for most, when in self._short.items() if most <= kept), default=-math.inf)

    def room_to_ask(self, now: float, kept: int) -> int:
        """For how many more permits calls may ask that leave `kept` of these tokens."""
        room = self._link.window.room
        if now < self.short_until(kept):
            return 0
        return min(room, max(1, bisect_right(self._coming, now))) if self._coming else room

    def may_ask(self, count: int) -> bool:
        """Whether there is room for so many more permits, or for a group of them."""
        return self._link.window.allows(count)

    def room_came(self) -> None:
        """Note that more permits may be asked for."""
        if self._is_gate:
            if self._link.window.allows(self._wanted):
                self._wake()
        elif self.wants and not self._link.degraded and self._link.now() >= self.asks_from:
            self._count_asked(self._to_ask())
            self._link.say(self, at_once=True)

    def next_home(self, missing: int) -> float | None:
        """Time at which `missing` more tokens are free; None if unknown or asked for."""
        return self._own.next_home(missing) if self._link.degraded else None

    def returns(self, now: float, period: float) -> list[float]:
        """Estimate when tokens return, ascending.

        Other processes may use theirs again, and nothing is known of tokens in the far future.
        """
        if self._link.degraded:
            times = self._own.returns(now, period)
            return sorted(
                [*times, *[max(now, self._link.settles_at)] * (self._whole_share() - len(times))]
            )
        capacity, free = self.limit, self.available
        others = [self._others_until] * self._others_out(now)
        times = sorted(
            [*[now] * free, *[now + period] * self._own.in_flight, *self._own.homes(), *others]
        )
        # More may be out than the limit. The last answer gave the exact times of the next ones.
        times = times[max(0, len(times) - capacity) :]
        for place, told in enumerate(self._coming[: len(times)]):
            times[place] = min(times[place], max(now, told))
        return times

    # --- for the link

    @property
    def has_in_hand(self) -> bool:
        """Whether granted tokens of Redis wait for their use."""
        return bool(self._hand)

    @property
    def wants(self) -> bool:
        """Whether to ask for permits: a call waits, and there is room in the window."""
        return self._to_ask() > 0

    def holds(self, now: float) -> bool:
        """Whether this process has tokens that Redis must know about."""
        self.collect(now)
        return bool(self._hand or self._on_wire or self._ended or self._returned)

    def has_news(self, now: float, epoch: int) -> bool:
        """Whether a message about this bucket is of use."""
        return bool(
            self._unreported
            or self._returned
            or (self._waits_in_line and not self._wanted)
            or (self._to_ask() and now >= self.asks_from)
            or (self.epoch != epoch and self.holds(now))
        )

    def begin(self, now: float) -> None:
        """Begin a message that reports about this bucket."""
        self.collect(now)
        lease = self._link.terms.lease
        self._returned = [token for token in self._returned if now < token.at + lease]
        self._sent = _Sent(now, len(self._unreported), len(self._returned))

    def asks(self, now: float) -> int:
        """How many permits the message asks for: none before tokens return."""
        count = 0 if now < self.asks_from else self._to_ask()
        self._count_asked(count)
        return count

    def ask(self, numbers: range, asking: SharedTokens) -> int:
        """Note the permits that the message asks for. Returns how many tokens may be out."""
        sent = self._sent
        assert sent is not None
        kept = asking._kept if asking is self else asking._kept_within
        sent.asks[numbers] = kept
        return self.limit - kept

    def report(self, now: float, epoch: int) -> BucketReport:
        """The part of the message that is about this bucket, when it is known what it asks for.

        Registers every token that is out, if that has not been done in this epoch.
        """
        sent = self._sent
        assert sent is not None
        homes = self._unreported if epoch and epoch == self.epoch else self._all_homes(now)
        if self._is_gate or not sent.asks:
            sent.waits = min(self._wanted, self._link.window.size)
        if sent.waits:
            sent.short.append(self._kept)
        return BucketReport(
            name=self.name,
            waits=sent.waits,
            most=self.limit - self._kept,
            returns=[(number, home - now) for number, home in homes],
            unused=[token.number for token in self._returned],
        )

    def granted(self, numbers: range, count: int) -> None:
        """Take the first `count` permits of a request."""
        sent = self._sent
        assert sent is not None
        kept = sent.asks[numbers]
        self._hand.extend(Granted(number, sent.at, kept=kept) for number in numbers[:count])
        if count:
            self._link.keeps_an_eye_on(self)
        if count < len(numbers):
            sent.short.append(kept)

    def answered(self, state: BucketState, now: float, *, epoch: int, pause: float) -> bool:
        """Take the answer to the message under way, after what was granted.

        No tokens are granted for `pause` seconds. Returns whether calls may have to be woken.
        """
        sent, self._sent = self._sent, None
        assert sent is not None
        self.epoch = epoch
        del self._unreported[: sent.homes], self._returned[: sent.returned]
        self._others = max(0, state.out - self._own_out() - len(self._hand))
        self._others_until = now + self._link.terms.period
        self._coming = [now + seconds for seconds in state.returns]
        self._waits_in_line = state.missing > 0 or state.free > 0
        if not sent.asks and not sent.waits:
            return False
        if pause:
            self._short = {0: now + pause}
        elif state.free:
            self._short.clear()
        elif state.missing:
            self._short[min(sent.short)] = self._next_returns(now)
        if sent.asks and not self._is_gate:
            self._wanted = 0  # calls that still wait ask again
            self._link.window.waits(self, 0)
        return True

    def _next_returns(self, now: float) -> float:
        """When to ask for the tokens that return next, with those that follow at once.

        Where that is unknown, the next heartbeat tells.
        """
        if not self._coming:
            return now + 2 * BEAT
        first = max(now, self._coming[0])
        return max(first, self._coming[bisect_right(self._coming, first + GAP) - 1])

    def book(self, given: int) -> None:
        """Count the permits that the answer brought as unused, and no more as asked for."""
        asked, self._asked = self._asked, 0
        self._link.window.answered(asked, given)

    def wake(self) -> None:
        """Wake the waiting calls after an answer."""
        self._wake()

    def unanswered(self) -> None:
        """Give back the tokens that the message may have brought: Redis may have received it."""
        sent, self._sent = self._sent, None
        assert sent is not None
        self._returned += [Granted(number, sent.at) for asked in sent.asks for number in asked]
        self._count_asked(0)

    def fail(self) -> None:
        """Fail every waiting call: Redis is out of reach."""
        self._want_nothing()
        self._fail()

    def let_go(self) -> None:
        """Give back every granted token, because the client is closed."""
        self._want_nothing()
        while self._hand:
            self._drop_unused()

    def lose_touch(self) -> None:
        """Note how many tokens are out at the first failure of the link."""
        self.collect(self._link.now())
        self._had = self._own_out()

    def go_alone(self) -> None:
        """Enter degraded mode."""
        self.epoch = 0
        self._unreported.clear()
        self._count_asked(0)
        self.change()

    def change(self) -> None:
        """Adapt to the start or the end of degraded mode, or to the use of the whole share."""
        self._short.clear()
        self._own.resize(self.share)
        self._wake()

    # --- inside

    def _to_ask(self) -> int:
        """How many permits to ask for now."""
        return 0 if self._is_gate else self._link.window.share_of(self._wanted, self._asked)

    def _count_asked(self, count: int) -> None:
        """Let the window count that many permits as asked for."""
        more, self._asked = count - self._asked, count
        if more:
            self._link.window.asked_for(more)

    def _want_nothing(self) -> None:
        self._wanted = 0
        self._link.window.waits(self, 0)
        self._count_asked(0)

    def _own_out(self) -> int:
        return self._own.in_flight + len(self._own.homes())

    def _others_out(self, now: float) -> int:
        return self._others if now < self._others_until else 0

    @property
    def share(self) -> int:
        """Number of tokens that may be out in degraded mode."""
        if self._link.settled:
            return self._whole_share()
        return 0 if self._link.terms.is_strict else min(self._whole_share(), self._had)

    def _whole_share(self) -> int:
        terms = self._link.terms
        return max(0 if terms.is_strict else 1, int(self.limit * terms.share))

    def _drop_unused(self) -> None:
        """Give back the oldest granted token."""
        self._give_up(self._hand)
        if not self._is_gate:
            self._link.window.used()

    def _all_homes(self, now: float) -> list[tuple[int, float]]:
        under_way = (*self._hand, *self._on_wire)
        leased = [(token.number, token.at + self._link.terms.lease) for token in under_way]
        return [*self._ended, *leased]

    def _give_up(self, tokens: deque[Granted]) -> None:
        token = tokens.popleft()
        # Redis does not know a token that this process granted by itself and has not registered.
        if self.epoch or self._sent is not None or not token.degraded:
            self._returned.append(token)
            self._short.clear()
            self._link.say(self, at_once=self.wants)  # a call that waits here can have it
