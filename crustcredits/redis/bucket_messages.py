"""`BucketMessages`: the messages of a process about one bucket, and the answers.

A message is made in this order: `begin`, `reserve_permits` and `ask` for each request, `report`.
After an answer come `granted` and `answered`, after a failure comes `unanswered`.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import attrs

from crustcredits.redis.bucket_view import BucketView
from crustcredits.redis.granted_tokens import GrantedTokens
from crustcredits.redis.protocol import BucketReport, BucketState
from crustcredits.redis.timing import BEAT, BUCKETS
from crustcredits.redis.window import Demand, Waiter, Window


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


class Reported(Waiter, Protocol):
    """The tokens that the messages are about: `SharedTokens`."""

    name: str
    limit: int
    granted: GrantedTokens
    view: BucketView

    @property
    def demand(self) -> Demand[Any]: ...
    @property
    def own_out(self) -> int: ...
    @property
    def wants(self) -> bool: ...
    @property
    def asks_from(self) -> float: ...
    def collect(self, now: float) -> None: ...
    def has_out(self, now: float) -> bool: ...
    def watch_unused(self) -> None: ...


class BucketMessages:
    """The messages about the tokens of one bucket.

    Args:
        tokens: The tokens, which own this object.
        window: How many permits the client may ask for.
        period: From the end of an attempt to the return of its token, in seconds.

    Attributes:
        epoch: The last epoch in which all tokens were registered; 0 for none.
    """

    def __init__(self, tokens: Reported, window: Window[Any], period: float) -> None:
        self.epoch: int = 0
        self._tokens: Reported = weakref.proxy(tokens)
        self._window = window
        self._period = period
        self._sent: _Sent | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether a message was sent and has no answer yet."""
        return self._sent is not None

    def next_news(self, now: float, epoch: int) -> float | None:
        """When a message about this bucket is of use; None if another event has to happen first."""
        tokens = self._tokens
        if (
            tokens.granted.has_reports
            or (tokens.view.is_in_line and not tokens.demand.wanted)
            or (not self._is_registered(epoch) and tokens.has_out(now))
        ):
            return now
        return max(now, tokens.asks_from) if tokens.wants else None

    def begin(self, now: float) -> None:
        """Begin a message that reports about this bucket."""
        self._tokens.collect(now)
        self._tokens.granted.begin_report(now)
        self._sent = _Sent(now)

    def reserve_permits(self, now: float) -> int:
        """Let the window count the permits that the message asks for; none before tokens return.

        Returns how many.
        """
        demand = self._tokens.demand
        demand.ask(0 if now < self._tokens.asks_from else demand.permits)
        return demand.asked

    def ask(self, numbers: range, kept: int) -> int:
        """Note the permits that the message asks for, whose calls leave `kept` tokens.

        Returns how many tokens may be out.
        """
        self._under_way.asks[numbers] = kept
        return self._tokens.limit - kept

    def report(self, now: float, epoch: int) -> BucketReport:
        """The part of the message that is about this bucket, when its requests are known.

        Registers every token that is out, if that has not been done in this epoch.
        """
        sent, tokens = self._under_way, self._tokens
        if not self._is_about_all(sent):
            sent.waits = min(tokens.demand.wanted, self._window.size)
        if sent.waits:
            sent.short.append(tokens.demand.kept)
        return BucketReport(
            name=tokens.name,
            waits=sent.waits,
            most=tokens.limit - tokens.demand.kept,
            returns=tokens.granted.returns(now, all_tokens=not self._is_registered(epoch)),
            unused=tokens.granted.given_back(),
        )

    def granted(self, numbers: range, count: int) -> None:
        """Take the first `count` permits of a request."""
        sent = self._under_way
        kept = sent.asks[numbers]
        self._tokens.granted.grant(numbers[:count], sent.at, kept)
        if count:
            self._tokens.watch_unused()
        if count < len(numbers):
            sent.short.append(kept)

    def answered(self, state: BucketState, now: float, *, epoch: int) -> bool:
        """Take the answer to the message under way, after `granted`.

        Returns whether calls may have to be woken.
        """
        sent, self._sent = self._under_way, None
        tokens, view = self._tokens, self._tokens.view
        self.epoch = epoch
        tokens.granted.reported()
        view.hear(
            state,
            now,
            own=tokens.own_out,
            period=self._period,
            is_short=bool(sent.short),
        )
        if not sent.asks and not sent.waits:
            return False
        if state.free:
            view.forget_short()
        elif state.missing:
            # Where Redis does not know when tokens return, a heartbeat tells.
            beats = max(1.0, len(self._window.waiters) / BUCKETS)
            view.note_short(min(sent.short), now, otherwise=now + 2 * BEAT * beats)
        if self._is_about_all(sent):
            tokens.demand.met()
        return True

    def unanswered(self) -> None:
        """Give back the tokens that the message may have brought: Redis may have received it."""
        sent, self._sent = self._under_way, None
        for numbers in sent.asks:
            self._tokens.granted.give_back_lost(numbers, sent.at)
        self._tokens.demand.ask(0)

    def _is_registered(self, epoch: int) -> bool:
        """Whether all tokens were registered in this epoch; 0 is none."""
        return epoch == self.epoch != 0

    def _is_about_all(self, sent: _Sent) -> bool:
        """Whether the message asks for permits for all calls that wait."""
        return bool(sent.asks) and self._tokens.demand.asks

    @property
    def _under_way(self) -> _Sent:
        assert self._sent is not None
        return self._sent
