"""`Coordinator`: exchanges messages with Redis, with heartbeat and degraded mode.

`shared_tokens` decides the content of messages, `protocol` their form, and `exchange.lua` their
effect in Redis.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections import deque
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import attrs
from redis.exceptions import NoScriptError, RedisError

from crustcredits._errors import ConfigurationError
from crustcredits.redis.protocol import (
    SCRIPT,
    SHA,
    BucketReport,
    PermitRequest,
    Request,
    Response,
)
from crustcredits.redis.server_check import address_of, check_server, mistake
from crustcredits.redis.shared_tokens import BEAT, SharedTokens, Terms
from crustcredits.redis.window import Window

_log = logging.getLogger("crustcredits")

# Seconds that one Redis call may take.
_PATIENCE = 1.0
# Seconds without an answer before degraded mode. Until then all calls wait: requests that a process
# in degraded mode sends while Redis still serves the others are in addition to theirs.
_GRACE = 2.0
# Seconds for which the report of an ended attempt may wait for other reports; its lease covers it
# until then.
_REPORT = 0.1
# Seconds after a lost count in which no tokens are granted, so that every process can register its
# tokens: each sends a heartbeat every half second, which may take long, and registers with the next
# message.
PAUSE = BEAT + 2 * _PATIENCE
# Seconds without an answer after which another process, whose messages failed a little earlier, may
# be in degraded mode.
_OTHERS_ALONE = _GRACE - 1.5 * BEAT
# Most seconds between two messages of a strict process, and seconds without one after which the
# other processes leave its share to it.
_QUIET = 2.0
_SILENCE = 2.5 * _QUIET
# How many losses within how many seconds are logged although Redis answers between, and after how
# many seconds without such losses they are logged again.
_LOSSES, _LOSSES_WITHIN = 3, 10.0
_SAYS_LOSSES_EVERY = 60.0
# Most buckets in one message.
_BUCKETS = 64
# Seconds after which Redis forgets the marker of an idle prefix.
_LIFE = 86_400.0


@attrs.define
class _Message:
    """The buckets of a message, and the permits that it asks for."""

    now: float
    epoch: int
    indexes: dict[SharedTokens, int] = attrs.field(factory=dict)
    asks: list[tuple[SharedTokens, range, PermitRequest]] = attrs.field(factory=list)

    def add(self, tokens: SharedTokens) -> int:
        """Add a bucket, once. Returns its index."""
        if tokens not in self.indexes:
            self.indexes[tokens] = len(self.indexes)
            tokens.begin(self.now)
        return self.indexes[tokens]

    def ask(self, tokens: SharedTokens, numbers: range) -> None:
        """Ask for permits."""
        counting = [tokens] if tokens.within is None else [tokens, tokens.within]
        limits = [(self.add(each), each) for each in counting]
        request = PermitRequest(
            wanted=len(numbers),
            first=numbers.start,
            limits=[(index, each.ask(numbers, tokens)) for index, each in limits],
        )
        self.asks.append((tokens, numbers, request))

    def reports(self) -> list[BucketReport]:
        """The reports of all buckets."""
        return [tokens.report(self.now, self.epoch) for tokens in self.indexes]


class Coordinator:
    """Exchanges messages with Redis: one at a time, and none while there is nothing to report.

    See `Link`. It is long because the message loop and degraded mode share its state.
    """

    terms: Terms
    window: Window[SharedTokens]

    def __init__(self, client: Any, *, owned: bool, marker: str, raises: bool) -> None:
        self.degraded: bool = False
        self.settled: bool = False
        self.settles_at: float = 0.0
        self._client = client
        self._owned = owned
        self._marker = marker
        self._raises = raises
        self.closed: bool = False
        self._all: WeakSet[SharedTokens] = WeakSet()
        self._in_hand: set[SharedTokens] = set()  # buckets with granted tokens that wait for use
        # Buckets with something to report, each with its latest time.
        self._due: dict[SharedTokens, float] = {}
        self._soonest = math.inf  # earliest of these times
        self._process = ""  # made at first use, since a process may fork before
        self._epoch = 0
        # Buckets whose tokens are not registered in this epoch yet.
        self._untold: WeakSet[SharedTokens] = WeakSet()
        # Last Redis time in microseconds, and the loop's time at which it was asked for.
        self._clock: tuple[int, float] | None = None
        self._number = self._message_number = 0
        self._failing: float | None = None  # loop time of the first failure in a row
        self._gone = False  # failing for longer than the grace time
        # Tokens for which a lost message asked: the failure lasts until one that asks is answered.
        self._probe: SharedTokens | None = None
        self._losses: deque[float] = deque(maxlen=_LOSSES)  # when messages began to fail
        self._says_losses_at = -math.inf
        # No tokens may be granted for a while: Redis was out of reach for so long that other
        # processes may be in degraded mode.
        self._hold = False
        self._last = 0.0
        self._timer: asyncio.Handle | None = None
        self._due_at: float | None = None  # loop time of the timer; uvloop's handles do not give it
        self._settling: asyncio.Handle | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self, terms: Terms) -> None:
        """Serve a client on these terms."""
        self.terms, self.window = terms, Window[SharedTokens](terms.pace)

    def tokens(
        self, name: str, limit: int, *, within: SharedTokens | None = None, is_gate: bool = False
    ) -> SharedTokens:
        """The tokens of the bucket of that name: see `SharedTokens`."""
        tokens = SharedTokens(self, name, limit, within=within, is_gate=is_gate)
        self._all.add(tokens)
        return tokens

    async def start(self) -> None:
        """Look at the server, and exchange the first message.

        Returns without an error if Redis is out of reach: that is an outage.

        Raises:
            ConfigurationError: The server or its address has a mistake that does not heal.
        """
        _log.info(
            "counting in Redis at %s, prefix %s", address_of(self._client), self._marker[1:-7]
        )
        try:
            async with asyncio.timeout(_PATIENCE):
                await check_server(self._client)
                await self._greet()
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001  # any other error: the messages deal with it
            problem = mistake(error)
        else:
            return
        if problem is not None:
            raise problem

    async def _greet(self) -> None:
        """Send a message about no bucket: it tells whether the script may run."""
        self._process = self._process or secrets.token_hex(8)
        self._last = _now()
        message = _Message(self._last, self._epoch)
        request = self._request(message)
        self._heard(message, Response.decode(await self._call(request), request))
        self._arrange()

    async def close(self) -> None:
        """Send every queued report, and close the Redis client if it was opened here."""
        self.closed = True
        self._stop_timers()
        if self._task is not None:
            await asyncio.wait([self._task])
        for tokens in list(self._all):
            tokens.let_go()
        while self._due and self._failing is None:
            await self._exchange()
        if self._epoch and self._failing is None and self.terms.is_strict:
            await self._exchange()  # the others need not leave its share to it
        if self._owned:
            await self._client.aclose()

    # --- for the tokens

    @property
    def cut_off(self) -> bool:
        """Whether the last message failed."""
        return self._failing is not None

    def now(self) -> float:
        """Return the loop's time."""
        return _now()

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """Queue a message for these tokens."""
        if self.closed and at_once:  # no call is served after closing
            return
        now = _now()
        self._say_by(tokens, max(now, tokens.asks_from) if at_once else now + _REPORT)

    def _say_by(self, tokens: SharedTokens, due: float) -> None:
        if due < self._due.get(tokens, due + 1):
            self._due[tokens] = due
            self._soonest = min(self._soonest, due)
        self._arrange()

    def number(self, count: int) -> int:
        """Reserve `count` token numbers, unique within this process, and return the first."""
        self._number += count
        return self._number - count

    def keeps_an_eye_on(self, tokens: SharedTokens) -> None:
        """Watch these tokens, so that granted ones that stay unused are given back."""
        self._in_hand.add(tokens)

    # --- messages, one at a time

    def _arrange(self) -> None:
        """Set the timer for the next message, unless one is under way."""
        if self._task is not None or self.closed:
            return
        when = self._next_message()
        if when == self._due_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = (
            None if when is None else asyncio.get_running_loop().call_at(when, self._begin)
        )
        self._due_at = when

    def _next_message(self) -> float | None:
        if self._failing is not None:
            return self._last + BEAT
        beat = self._last + BEAT
        if self._soonest <= beat:
            return self._soonest
        now = _now()
        if self._due or self.window.waiters or any(tokens.holds(now) for tokens in self._all):
            return beat
        return self._last + _QUIET if self.terms.is_strict and self._epoch else None

    def _begin(self) -> None:
        self._timer = self._due_at = None
        self._task = asyncio.Task(self._exchange(), loop=asyncio.get_running_loop())
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._arrange()

    async def _exchange(self) -> None:
        now = _now()
        is_beat = now >= self._last + BEAT
        self._process = self._process or secrets.token_hex(8)
        for tokens in list(self._in_hand):
            tokens.collect(now)
            if not tokens.has_in_hand:
                self._in_hand.discard(tokens)
        if self._gone and not await self._is_back():
            return
        message = self._message(now, self._take_due(now, is_beat=is_beat))
        if not (message.indexes or is_beat or self.closed) and self._failing is None:
            return
        self._last = now
        request = self._request(message)
        try:
            async with asyncio.timeout(_PATIENCE):
                response = Response.decode(await self._call(request), request)
        except Exception as error:  # noqa: BLE001  # any error: no call may hang because of it
            if message.asks:
                self._probe = message.asks[0][0]
            self._lost(message, error)
        else:
            self._heard(message, response)

    async def _is_back(self) -> bool:
        """Whether Redis answers after an outage.

        A message of this process stops all others for a moment, so none is sent before.
        """
        self._last = _now()
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._client.ping()
        except Exception as error:  # noqa: BLE001  # as for a message
            self._probe = None  # no message at all is answered
            self._lost(_Message(self._last, self._epoch), error)
            return False
        return True

    def _take_due(self, now: float, *, is_beat: bool) -> list[SharedTokens]:
        """The buckets of the next message: those that are due, or nearly.

        A heartbeat also asks when tokens return for those with waiting calls.
        """
        batch: list[SharedTokens] = []
        for tokens in sorted(self._due, key=self._due.__getitem__):
            if len(batch) == _BUCKETS or (self._due[tokens] > now + _REPORT and not self.closed):
                break
            del self._due[tokens]
            if tokens.has_news(now, self._epoch):
                batch.append(tokens)
        self._soonest = min(self._due.values(), default=math.inf)
        if is_beat and not self.closed and self._failing is None:
            waiting = [tokens for tokens in self.window.waiters if tokens not in batch]
            batch += waiting[: _BUCKETS - len(batch)]
        return batch

    def _message(self, now: float, batch: Iterable[SharedTokens]) -> _Message:
        message = _Message(now, self._epoch)
        for tokens in batch:
            message.add(tokens)
        if self._failing is not None:
            # One permit is enough to see whether messages that ask arrive, and to give back.
            if self._probe is not None and not self.closed:
                message.ask(self._probe, self._numbers(1))
        elif not self.closed:
            for tokens in batch:
                if count := tokens.asks(now):
                    message.ask(tokens, self._numbers(count))
        return message

    def _numbers(self, count: int) -> range:
        first = self.number(count)
        return range(first, first + count)

    def _request(self, message: _Message) -> Request:
        now, terms = message.now, self.terms
        clock, asked = self._clock or (0, now)
        holds = self._hold or bool(self._untold.difference(message.indexes))
        self._message_number += 1
        return Request(
            marker=self._marker,
            process=self._process,
            number=self._message_number,
            epoch=self._epoch,
            fresh=secrets.randbits(52) + 1,
            holds=holds,
            clock=clock,
            age=now - asked,
            tolerance=2 * _PATIENCE,
            pause=PAUSE,
            lease=terms.lease,
            kept=2 * terms.late + _PATIENCE,
            life=_LIFE,
            is_strict=terms.is_strict,
            is_last=self.closed and not self._due,
            share=terms.share,
            shares=not (holds or self._gone),
            silence=_SILENCE,
            buckets=message.reports(),
            asks=[request for _, _, request in message.asks],
        )

    async def _call(self, request: Request) -> Any:
        names, said = request.encode()
        try:
            return await self._client.evalsha(SHA, len(names), *names, *said)
        except NoScriptError:  # unknown script, or SCRIPT FLUSH
            names, said = attrs.evolve(request, is_new=True).encode()
            return await self._client.eval(SCRIPT, len(names), *names, *said)

    def _heard(self, message: _Message, response: Response) -> None:
        now = _now()
        self._clock = response.clock, self._last
        self._hold = self._failing is not None and now - self._failing >= _OTHERS_ALONE
        self._come_back()
        if not response.is_known:
            _log.warning(
                "the rate limit's count in Redis was lost, or Redis's clock was set; this "
                "process registers its tokens again"
            )
        if response.epoch != self._epoch:
            self._epoch = response.epoch
            self._register(now)
        if not response.is_known:
            for tokens in message.indexes:
                tokens.unanswered()
                self._say_by(tokens, now)
            return
        self._untold.difference_update(message.indexes)
        self._take(message, response, now)

    def _take(self, message: _Message, response: Response, now: float) -> None:
        """Take the permits and the news of an answer."""
        granted: dict[SharedTokens, int] = {}
        for (tokens, numbers, _), count in zip(message.asks, response.granted, strict=True):
            granted[tokens] = count
            for each in (tokens, tokens.within):
                if each is not None:
                    each.granted(numbers, count)
        woken = [
            tokens
            for tokens, state in zip(message.indexes, response.buckets, strict=True)
            if tokens.answered(state, now, epoch=response.epoch, pause=response.pause)
        ]
        for tokens, count in granted.items():
            tokens.book(count)
        for tokens in woken:
            tokens.wake()
        for tokens in message.indexes:
            if tokens.wants:
                self.say(tokens, at_once=True)

    def _register(self, now: float) -> None:
        for tokens in list(self._all):
            if tokens.holds(now):
                self._untold.add(tokens)
                self._say_by(tokens, now)

    # --- without Redis

    def _lost(self, message: _Message, error: Exception) -> None:
        why = type(error).__name__ + (f": {error}" if isinstance(error, RedisError) else "")
        if self._failing is None:
            self._failing = self._last
            self._note_loss(why)
            for tokens in list(self._all):
                tokens.lose_touch()
        for tokens in message.indexes:
            tokens.unanswered()
        self._due |= dict.fromkeys(message.indexes, self._last)
        if _now() - self._failing < _GRACE:
            return
        if not self._gone:
            self._gone = True
            alone = "without a request" if self.terms.is_strict else "with its own returning tokens"
            later = (
                f"for {self._wait_alone:.0f} s {alone}, then with "
                f"{self.terms.share:.3g} of the limit"
            )
            effect = "calls fail" if self._raises else f"degraded mode, {later},"
            _log.warning("Redis is out of reach (%s); %s until it answers", why, effect)
        if self._raises:
            for tokens in list(self._all):
                tokens.fail()
        elif not self.degraded:
            self._go_alone(self._last if self.terms.is_strict else self._failing)

    def _note_loss(self, why: str) -> None:
        """Log when messages are lost again and again, although Redis answers between."""
        self._losses.append(self._last)
        if len(self._losses) < _LOSSES or self._last - self._losses[0] > _LOSSES_WITHIN:
            return
        if self._last >= self._says_losses_at:
            _log.warning(
                "Redis loses messages, the last one to %s; calls wait longer: look at the network "
                "between this process and Redis, and at Redis's log",
                why,
            )
        self._says_losses_at = self._last + _SAYS_LOSSES_EVERY

    def _go_alone(self, since: float) -> None:
        self.degraded = True
        # An attempt with a token of another process from before the outage may still arrive, and
        # then counts for a period.
        self.settles_at = since + self._wait_alone
        self._due.clear()
        for tokens in list(self._all):
            tokens.go_alone()
        if not self.closed:
            self._settling = asyncio.get_running_loop().call_at(self.settles_at, self._settle)

    @property
    def _wait_alone(self) -> float:
        """Seconds until all tokens that other processes may have for this one's share are back."""
        # A message of this process may be read so late that its age is still believed.
        return self.terms.lease + (_SILENCE + 2 * _PATIENCE if self.terms.is_strict else 0.0)

    def _settle(self) -> None:
        self.settled = True
        for tokens in list(self._all):
            tokens.change()

    def _come_back(self) -> None:
        self._failing = self._probe = None
        if self._gone:
            self._gone = False
            _log.warning("Redis answers again; the processes share one count of the rate limit")
        if self.degraded:
            self.degraded = self.settled = False
            if self._settling is not None:
                self._settling.cancel()
            for tokens in list(self._all):
                tokens.change()
            self._register(_now())

    def _stop_timers(self) -> None:
        for timer in (self._timer, self._settling):
            if timer is not None:
                timer.cancel()
        self._timer = self._due_at = self._settling = None


def hidden_name(whose: str | bytes | None) -> str:
    """Hash the tokens' owner for a key name: SHA-256 of an account name or of a key's digest."""
    if whose is None:
        return ""
    kind, text = ("key", whose) if isinstance(whose, bytes) else ("account", whose.encode())
    return f":{kind}:{hashlib.sha256(text).hexdigest()}"


def _now() -> float:
    return asyncio.get_running_loop().time()
