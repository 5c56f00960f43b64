"""`SharedTokens`: one process's view of the tokens of a bucket that several processes share.

Messages to Redis are made and read here as values; the link decides how and when they travel.
Tokens are alike, so the token granted first is used first.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import attrs

from crustcredits.redis.local_tokens import FRESH, LocalTokens

# Most tokens that one bucket asks for in a message.
MOST = 32
# Share of one second's starts, at the configured pace, that is asked for ahead.
_AHEAD = 0.15
# Seconds between two messages for missing tokens, so that one message fetches all that return in
# between.
GAP = 0.05
# Most seconds between two messages while a call waits or tokens are out; a lost count is noticed
# within this time.
BEAT = 0.5
# In the place of a request's age: count nothing for this bucket.
_COUNTS_NOTHING = -1


@attrs.frozen
class Terms:
    """Terms of all tokens of one client, in seconds.

    Attributes:
        period: From the end of an attempt to the return of its token.
        late: Longest duration of an attempt.
        pace: Starts a second; None without a limit.
        share: Share of the limit in degraded mode.
    """

    period: float
    late: float
    pace: float | None
    share: float

    @property
    def lease(self) -> float:
        """Seconds after its grant at which Redis takes back a token without a report.

        No process can use the token any more by then.
        """
        # Worst case: the attempt starts when the token is just about to expire, lasts as long as it
        # may, and arrives as late as it may.
        return FRESH + self.late + self.late + self.period

    @property
    def ahead(self) -> int:
        """Most tokens that may be granted and not used yet."""
        return MOST if self.pace is None else max(1, min(MOST, int(self.pace * _AHEAD)))


class Link(Protocol):
    """Carries the messages.

    Attributes:
        terms: The terms of all tokens.
        degraded: Whether each process counts by itself, because the link is broken.
        settled: Whether degraded mode has lasted so long that no other process has more than its
            share out.
        settles_at: The time at which `settled` becomes true.
    """

    terms: Terms
    degraded: bool
    settled: bool
    settles_at: float

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
    """

    number: int
    at: float
    degraded: bool = False


@attrs.frozen
class _Sent:
    """Contents of the message under way."""

    at: float
    first: int
    wanted: int
    homes: int
    returned: int


class SharedTokens:
    """One process's view of the tokens of a bucket.

    While the link works, granted tokens are free. In degraded mode this process counts by itself,
    for its share. For one lease it uses at most as many as it had out when the link failed, because
    other processes may have used the rest. It has many methods because it serves its bucket and the
    link.
    """

    def __init__(self, link: Link, name: str, limit: int) -> None:
        self.name = name
        self.epoch: int = 0  # the last one in which all tokens were registered
        # When it makes sense to ask again for tokens that were not there.
        self.not_before: float = -math.inf
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
        self._kept = 0  # of the limit, the reserve that the waiting calls may not use
        self._sent: _Sent | None = None
        # Used tokens of other processes at the last answer, and when these have returned.
        self._others, self._others_until = 0, 0.0
        self._coming: list[float] = []  # when the next tokens return
        if link.degraded:
            self._own.resize(self._share())

    # --- for the bucket

    @property
    def free(self) -> int:
        """Number of tokens that can be used now."""
        return self._own.free if self._link.degraded else len(self._hand)

    @property
    def available(self) -> int:
        """Number of tokens that could be had now, as far as known, including those to ask for."""
        if self._link.degraded:
            return self._own.available
        return max(0, self.limit - self._others_out(self._link.now()) - self._own_out())

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
        self.not_before = -math.inf
        if self._link.degraded:
            self._own.resize(self._share())

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
            self._give_up(self._hand)

    def start(self, now: float) -> int:
        """Use one free token for an attempt; return a mark for `own`."""
        mark = self._own.start(now)
        if self._link.degraded:
            self._on_wire.append(Granted(self._link.number(1), now, degraded=True))
            return mark
        self._on_wire.append(self._hand.popleft())
        if self.wants:
            self._link.say(self, at_once=True)
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
        """End one attempt that the server does not count here; its token is free at once."""
        self._own.unsend()
        self._give_up(self._on_wire)

    def own(self, mark: int) -> int:
        """Most requests of this process that the server can have counted at that mark's arrival.

        The request of that mark is included.
        """
        return self._own.own(mark)

    def need(self, count: int, kept: int) -> None:
        """Ask for tokens for `count` waiting calls, which may not use `kept` of the limit.

        With 0 no call waits any more.
        """
        self._wanted, self._kept = count, kept
        if not self._link.degraded and self.wants:
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
        """Whether to ask for tokens: a call waits, and too few are granted already."""
        return self._asked_for() > 0

    def holds(self, now: float) -> bool:
        """Whether this process has tokens that Redis must know about."""
        self.collect(now)
        return bool(self._hand or self._on_wire or self._ended or self._returned)

    def message(self, now: float, epoch: int, *, asks: bool) -> list[int]:
        """Return this bucket's part of a message, with `asks` also asking for tokens.

        Registers every token that is out, if that has not been done in this epoch.
        """
        self.collect(now)
        terms = self._link.terms
        self._returned = [token for token in self._returned if now < token.at + terms.lease]
        homes = self._unreported if epoch == self.epoch else self._all_homes(now)
        wanted = self._asked_for() if asks else 0
        self._sent = _Sent(
            now, self._link.number(wanted), wanted, len(self._unreported), len(self._returned)
        )
        said = [
            wanted,
            self.limit - self._kept,
            self._sent.first,
            _COUNTS_NOTHING,
            len(homes),
            len(self._returned),
        ]
        for number, home in homes:
            said += (number, micro(home - now))
        return said + [token.number for token in self._returned]

    def answered(self, answer: Sequence[int], now: float, *, epoch: int, pause: float) -> None:
        """Take the answer to the message under way.

        No tokens are granted for `pause` seconds.
        """
        sent, self._sent = self._sent, None
        assert sent is not None
        self.epoch = epoch
        del self._unreported[: sent.homes], self._returned[: sent.returned]
        given, out, _, *coming = answer
        self._others, self._others_until = (
            max(0, out - given - self._own_out() - len(self._hand)),
            now + self._link.terms.period,
        )
        self._coming = [now + micro / 1e6 for micro in coming]
        if given < sent.wanted:
            comes = self._coming[0] if self._coming else now + BEAT
            self.not_before = min(max(now + GAP, comes), now + BEAT) if not pause else now + pause
        if sent.wanted:
            self._arrived(Granted(sent.first + place, sent.at) for place in range(given))

    def unanswered(self) -> None:
        """Give back the tokens that the message may have brought: Redis may have received it."""
        sent, self._sent = self._sent, None
        assert sent is not None
        self._returned += [
            Granted(number, sent.at) for number in range(sent.first, sent.first + sent.wanted)
        ]

    def fail(self) -> None:
        """Fail every waiting call: Redis is out of reach."""
        self._wanted = 0
        self._fail()

    def let_go(self) -> None:
        """Give back every granted token, because the client is closed."""
        self._wanted = 0
        while self._hand:
            self._give_up(self._hand)

    def lose_touch(self) -> None:
        """Note how many tokens are out at the first failure of the link."""
        self.collect(self._link.now())
        self._had = self._own_out()

    def go_alone(self) -> None:
        """Enter degraded mode."""
        self.epoch = 0
        self._unreported.clear()
        self.change()

    def change(self) -> None:
        """Adapt to the end of degraded mode, or to the use of the whole share."""
        self.not_before = -math.inf
        self._own.resize(self._share())
        self._wake()

    # --- inside

    def _asked_for(self) -> int:
        """Number of tokens to ask for: all that are wanted, or at least half of the ahead limit."""
        ahead = self._link.terms.ahead
        room = ahead - len(self._hand)
        return min(self._wanted, room) if room >= min(self._wanted, (ahead + 1) // 2) else 0

    def _own_out(self) -> int:
        return self._own.in_flight + len(self._own.homes())

    def _others_out(self, now: float) -> int:
        return self._others if now < self._others_until else 0

    @property
    def share(self) -> int:
        """Number of tokens that may be out in degraded mode."""
        return self._share()

    def _share(self) -> int:
        """Number of tokens that may be out in degraded mode."""
        return self._whole_share() if self._link.settled else min(self._whole_share(), self._had)

    def _whole_share(self) -> int:
        return max(1, int(self.limit * self._link.terms.share))

    def _arrived(self, granted: Iterable[Granted]) -> None:
        self._hand.extend(granted)
        if self._hand:
            self._link.keeps_an_eye_on(self)
        self._wanted = 0  # calls that still wait ask again
        self._wake()

    def _all_homes(self, now: float) -> list[tuple[int, float]]:
        under_way = (*self._hand, *self._on_wire)
        leased = [(token.number, token.at + self._link.terms.lease) for token in under_way]
        return [*self._ended, *leased]

    def _give_up(self, tokens: deque[Granted]) -> None:
        token = tokens.popleft()
        # Redis does not know a token that this process granted by itself and has not registered.
        if self.epoch or self._sent is not None or not token.degraded:
            self._returned.append(token)
            self.not_before = -math.inf
            self._link.say(self, at_once=self.wants)  # a call that waits here can have it


def micro(seconds: float) -> int:
    """Convert seconds to whole microseconds."""
    return math.ceil(seconds * 1e6)
