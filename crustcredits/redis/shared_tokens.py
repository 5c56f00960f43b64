"""`SharedTokens`: what one process knows and has to say of tokens that several processes share.

Whoever counts for all of them is asked in messages, made and read here as values. How a message
travels, and when, is the link's. Tokens are alike, so whichever of this process's was granted first
is the next to go, whoever goes.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import attrs

from crustcredits.redis.local_tokens import FRESH, LocalTokens

# Tokens that one bucket asks for in a message, at the most.
MOST = 32
# Of what is to go in a second at the pace, the share that is asked for ahead.
_AHEAD = 0.15
# Seconds between two messages for tokens that were not there, so that one brings those that come
# home in between.
GAP = 0.05
# Seconds between two messages at the most, while somebody waits or tokens are out: so late may a
# loss of the count be noticed.
BEAT = 0.5
# Instead of the age of a request, of which to tell how many were counted: none is asked about.
_COUNTS_NOTHING = -1


@attrs.frozen
class Terms:
    """What holds for all tokens of one client: seconds from an attempt's end to its token's coming home, and that one takes."""

    period: float
    late: float
    pace: float | None
    share: float

    @property
    def lease(self) -> float:
        """Seconds after its grant that a token of which nothing is heard comes home: whoever has it cannot use it any more."""
        # It begins at the latest when it is stale, lasts as long as it may, and arrives as late as
        # it may.
        return FRESH + self.late + self.late + self.period

    @property
    def ahead(self) -> int:
        """Tokens that may be granted and not on the wire yet."""
        return MOST if self.pace is None else max(1, min(MOST, int(self.pace * _AHEAD)))


class Link(Protocol):
    """What carries the messages.

    Attributes:
        terms: What holds for all tokens.
        degraded: Whether it is broken, so that each process goes on by itself.
        settled: Whether it has been so for long enough that no other process has more than its
            share out.
        settles_at: When that is to be.
    """

    terms: Terms
    degraded: bool
    settled: bool
    settles_at: float

    def now(self) -> float:
        """The time."""
        ...

    def number(self, count: int) -> int:
        """The first of so many new numbers."""
        ...

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """These have something to say."""
        ...

    def keeps_an_eye_on(self, tokens: SharedTokens) -> None:
        """Of these some are in hand: `collect` is to be called until there are none."""
        ...


class Granted(NamedTuple):
    """A token of this process: its number, since when its lease counts, and whether this process gave it itself."""

    number: int
    at: float
    degraded: bool = False


@attrs.frozen
class _Sent:
    """What was in the message that is under way."""

    at: float
    first: int
    wanted: int
    homes: int
    returned: int


class SharedTokens:
    """The tokens of one bucket, as this process knows them.

    While the link works, those in hand are free. When it does not, this process counts by itself,
    for its share: for a period only as many as it had out itself when the link was lost, because
    the others may have had the rest.
    """

    def __init__(self, link: Link, name: str, limit: int) -> None:
        self.name = name
        self.epoch: int = 0  # the last one in which all of this was told
        self.not_before: float = (
            -math.inf
        )  # when it makes sense to ask again for what was not there
        self._link = link
        self.limit: int = limit
        self._own = LocalTokens(limit)  # of this process alone
        self._had = 0  # of these, how many were out when the link was lost
        self._hand: deque[Granted] = deque()
        self._on_wire: deque[Granted] = deque()
        self._ended: deque[tuple[int, float]] = deque()  # number and coming home
        self._unreported: list[tuple[int, float]] = []  # of these, what is still to be told
        self._returned: list[Granted] = []
        self._wanted = 0
        self._kept = 0  # of these, those that whoever waits leaves alone
        self._sent: _Sent | None = None
        self._others, self._others_until = (
            0,
            0.0,
        )  # what other processes had out when last heard, and when that has come home
        self._coming: list[float] = []  # when the next ones come home
        if link.degraded:
            self._own.resize(self._share())

    # --- for the bucket

    @property
    def free(self) -> int:
        """Tokens that can be taken now."""
        return self._own.free if self._link.degraded else len(self._hand)

    @property
    def available(self) -> int:
        """Tokens that could be had now, as far as is known; also those that have to be sent for."""
        if self._link.degraded:
            return self._own.available
        return max(0, self.limit - self._others_out(self._link.now()) - self._own_out())

    @property
    def degraded(self) -> bool:
        """Whether this process counts by itself."""
        return self._link.degraded

    @property
    def in_flight(self) -> int:
        """Tokens on the wire."""
        return self._own.in_flight

    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None:
        """Call `wake` when tokens have come, and `fail` when none can be had."""
        self._wake, self._fail = wake, fail

    def resize(self, limit: int) -> None:
        """So many there are from now on; more may be out."""
        if limit == self.limit:
            return
        self.limit = limit
        self.not_before = -math.inf
        if self._link.degraded:
            self._own.resize(self._share())

    def is_idle(self) -> bool:
        """Whether none is out, and nothing is to be said, so that they can be forgotten."""
        return self._own.is_idle() and not self._has_to_say()

    def is_settling(self) -> bool:
        """Whether none is out, and something is still to be said."""
        return self._own.is_idle() and self._has_to_say()

    def _has_to_say(self) -> bool:
        return bool(self._hand or self._unreported or self._returned or self._sent)

    def collect(self, now: float) -> None:
        """Make those free that have come home by `now`, and give back those that were in hand for too long."""
        self._own.collect(now)
        while self._ended and self._ended[0][1] <= now:
            self._ended.popleft()
        while self._hand and now - self._hand[0].at > FRESH:
            self._give_up(self._hand)

    def start(self, now: float) -> int:
        """One of the free ones goes onto the wire. Returns a mark for `own`."""
        mark = self._own.start(now)
        if self._link.degraded:
            self._on_wire.append(Granted(self._link.number(1), now, degraded=True))
            return mark
        self._on_wire.append(self._hand.popleft())
        if self.wants:
            self._link.say(self, at_once=True)
        return mark

    def end(self, home: float) -> None:
        """One has left the wire, and comes home then."""
        self._own.end(home)
        ended = self._on_wire.popleft().number, home
        self._ended.append(ended)
        if not self._link.degraded:
            self._unreported.append(ended)
            self._link.say(self, at_once=False)

    def unsend(self) -> None:
        """One has left the wire, and is free: the server does not count it here."""
        self._own.unsend()
        self._give_up(self._on_wire)

    def own(self, mark: int) -> int:
        """Requests of this process that the server can have counted when the one of that mark arrived, itself included."""
        return self._own.own(mark)

    def need(self, count: int, kept: int) -> None:
        """So many calls wait, and leave `kept` of the tokens alone: they are sent for.

        With 0 nobody waits any more.
        """
        self._wanted, self._kept = count, kept
        if not self._link.degraded and self.wants:
            self._link.say(self, at_once=True)

    def next_home(self, missing: int) -> float | None:
        """When so many more will be free; None where they are sent for, or not known."""
        return self._own.next_home(missing) if self._link.degraded else None

    def returns(self, now: float, period: float) -> list[float]:
        """An estimate: the others' may be used by the others again, and of the far ones nothing is known."""
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
        # More may be out than may. Of all, the next ones were told when they were wanted in vain.
        times = times[max(0, len(times) - capacity) :]
        for place, told in enumerate(self._coming[: len(times)]):
            times[place] = min(times[place], max(now, told))
        return times

    # --- for the link

    @property
    def has_in_hand(self) -> bool:
        """Whether there are tokens of Redis that wait for their use."""
        return bool(self._hand)

    @property
    def wants(self) -> bool:
        """Whether it has to ask for tokens: somebody waits, and not enough are on their way to the wire already."""
        return self._asked_for() > 0

    def holds(self, now: float) -> bool:
        """Whether whoever counts would let others have too many, if it forgot these, or too few, if it heard no more of them."""
        self.collect(now)
        return bool(self._hand or self._on_wire or self._ended or self._returned)

    def message(self, now: float, epoch: int, *, asks: bool) -> list[int]:
        """What it has to say, and with `asks` to ask for.

        All that it holds, if it has not told that in this epoch.
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
        """The message was understood, and this is the answer.

        No tokens are given for `pause` seconds.
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
        """It is not known whether the message was heard: what it may have brought goes back."""
        sent, self._sent = self._sent, None
        assert sent is not None
        self._returned += [
            Granted(number, sent.at) for number in range(sent.first, sent.first + sent.wanted)
        ]

    def fail(self) -> None:
        """Nobody can be asked: whoever waits is told."""
        self._wanted = 0
        self._fail()

    def let_go(self) -> None:
        """The client is closed: what is in hand goes back."""
        self._wanted = 0
        while self._hand:
            self._give_up(self._hand)

    def lose_touch(self) -> None:
        """The link has failed for the first time."""
        self.collect(self._link.now())
        self._had = self._own_out()

    def go_alone(self) -> None:
        """The link is broken: from now on this process counts by itself."""
        self.epoch = 0
        self._unreported.clear()
        self.change()

    def change(self) -> None:
        """The link is whole again, or has been broken for so long that the whole share may be used."""
        self.not_before = -math.inf
        self._own.resize(self._share())
        self._wake()

    # --- inside

    def _asked_for(self) -> int:
        """How many to ask for: not one by one, but half of those that may be on their way to the wire, or all that are wanted."""
        ahead = self._link.terms.ahead
        room = ahead - len(self._hand)
        return min(self._wanted, room) if room >= min(self._wanted, (ahead + 1) // 2) else 0

    def _own_out(self) -> int:
        return self._own.in_flight + len(self._own.homes())

    def _others_out(self, now: float) -> int:
        return self._others if now < self._others_until else 0

    @property
    def share(self) -> int:
        """What may be out of these, while this process is alone."""
        return self._share()

    def _share(self) -> int:
        """What may be out of these while this process is alone."""
        return self._whole_share() if self._link.settled else min(self._whole_share(), self._had)

    def _whole_share(self) -> int:
        return max(1, int(self.limit * self._link.terms.share))

    def _arrived(self, granted: Iterable[Granted]) -> None:
        self._hand.extend(granted)
        if self._hand:
            self._link.keeps_an_eye_on(self)
        self._wanted = 0  # whoever still waits says so
        self._wake()

    def _all_homes(self, now: float) -> list[tuple[int, float]]:
        under_way = (*self._hand, *self._on_wire)
        leased = [(token.number, token.at + self._link.terms.lease) for token in under_way]
        return [*self._ended, *leased]

    def _give_up(self, tokens: deque[Granted]) -> None:
        token = tokens.popleft()
        # Nobody else knows of one that this process has given itself, before it has been told.
        if self.epoch or self._sent is not None or not token.degraded:
            self._returned.append(token)
            self.not_before = -math.inf
            self._link.say(self, at_once=self.wants)  # whoever waits here can have it


def micro(seconds: float) -> int:
    """Seconds as whole microseconds."""
    return math.ceil(seconds * 1e6)
