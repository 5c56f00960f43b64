"""`Coordinator`: exchanges messages with Redis, one at a time, with a heartbeat.

`shared_tokens` decides the content of messages, `protocol` their form, and `exchange.lua` their
effect in Redis. `outage` has the reaction to a missing answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections.abc import Coroutine, Iterable
from typing import Any
from weakref import WeakSet

import attrs
from redis.exceptions import NoScriptError, RedisError, ResponseError

from crustcredits._errors import ConfigurationError
from crustcredits.redis.agenda import REPORT, Agenda
from crustcredits.redis.outage import Outage
from crustcredits.redis.protocol import (
    SCRIPT,
    SHA,
    AnswersPart,
    BadReplyError,
    BucketReport,
    PermitRequest,
    Request,
    Response,
)
from crustcredits.redis.server_check import address_of, check_server, mistake
from crustcredits.redis.shared_answers import AnswersInMessage, SharedAnswers
from crustcredits.redis.shared_tokens import GateTokens, SharedTokens, Terms
from crustcredits.redis.timing import BEAT, BUCKETS, LEAST_OUTAGE, PATIENCE, QUIET, SILENCE, STILL
from crustcredits.redis.window import Window

_log = logging.getLogger("crustcredits")

# After a lost count, or an outage of all processes, Redis grants nothing for this many seconds.
# Each process registers its tokens in this time. Each of three messages may take as long as the
# patience: one that is under way, one that finds the loss, and one that registers.
PAUSE = 3 * PATIENCE
# Seconds after which Redis forgets the marker of an idle prefix.
_LIFE = 86_400.0


@attrs.define
class _Message:
    """The buckets of a message, the permits that it asks for, and its part about shared answers.

    `leaves` is as in `Request`.
    """

    now: float
    epoch: int
    leaves: bool = True
    answers: AnswersInMessage | None = None
    indexes: dict[SharedTokens, int] = attrs.field(factory=dict)
    asks: list[tuple[SharedTokens, range, PermitRequest]] = attrs.field(factory=list)

    def add(self, tokens: SharedTokens) -> int:
        """Add a bucket, once. Returns its index."""
        if tokens not in self.indexes:
            self.indexes[tokens] = len(self.indexes)
            tokens.messages.begin(self.now)
        return self.indexes[tokens]

    def ask(self, tokens: SharedTokens, numbers: range) -> None:
        """Ask for permits."""
        limits = [(self.add(tokens), tokens.messages.ask(numbers, tokens.demand.kept))]
        if (within := tokens.within) is not None:
            index = self.add(within)
            limits.append((index, within.messages.ask(numbers, tokens.demand.kept_within)))
        request = PermitRequest(wanted=len(numbers), first=numbers.start, limits=limits)
        self.asks.append((tokens, numbers, request))

    def reports(self) -> list[BucketReport]:
        """The reports of all buckets."""
        return [tokens.messages.report(self.now, self.epoch) for tokens in self.indexes]


class Coordinator:
    """Exchanges messages with Redis, one at a time.

    No message is sent while there is nothing to report. This class is the `Link` of `SharedTokens`.
    It is long because one loop of messages owns the name of the process, its epoch, its clock and
    its timer.

    Args:
        client: The client of redis-py.
        owned: Whether the client was made for this coordinator, which closes it then.
        prefix: What the names of all keys in Redis begin with, in braces.
        raises: Whether calls fail while Redis is out of reach.
        shares_answers: Whether answers are shared.

    Attributes:
        answers: The shared answers; None if none are shared.
        process: The name of this process in Redis; empty before the first message.
        outage: Whether Redis answers.
        closed: Whether `close` was called.
    """

    terms: Terms
    window: Window[SharedTokens]

    def __init__(
        self, client: Any, *, owned: bool, prefix: str, raises: bool, shares_answers: bool = False
    ) -> None:
        self._client = client
        self._owned = owned
        self._prefix = prefix
        self._marker = f"{{{prefix}}}:epoch"
        self.closed: bool = False
        self.answers: SharedAnswers | None = (
            SharedAnswers(self._arrange) if shares_answers else None
        )
        self._all: WeakSet[SharedTokens] = WeakSet()
        self.outage: Outage = Outage(lambda: list(self._all), raises=raises)
        self.opens_at: float = -math.inf
        self._in_hand: set[SharedTokens] = set()  # buckets with granted tokens that wait for use
        self._agenda = Agenda()
        self.process: str = ""  # made at first use, since a process may fork before
        self._epoch = 0
        # Buckets whose tokens are not registered in this epoch yet.
        self._unregistered: WeakSet[SharedTokens] = WeakSet()
        # Last Redis time in microseconds, and the loop's time at which it was asked for.
        self._clock: tuple[int, float] | None = None
        self._clock_heard = 0.0  # when that answer arrived
        self._number = self._message_number = 0
        # The tokens that a lost message requested. The outage lasts until Redis answers such a
        # request.
        self._probe: SharedTokens | None = None
        self._is_listed = False  # whether Redis may list this process as one with tokens out
        self._last = self._last_beat = 0.0
        self._timer: asyncio.Handle | None = None
        self._due_at: float | None = None  # loop time of the timer; uvloop's handles do not give it
        self._task: asyncio.Task[None] | None = None

    def open(self, terms: Terms) -> None:
        """Serve a client on these terms."""
        self.terms, self.window = terms, Window[SharedTokens](terms.pace)
        self.outage.open(lease=terms.lease, share=terms.share, is_strict=terms.is_strict)

    def tokens(self, name: str, limit: int, *, within: SharedTokens | None = None) -> SharedTokens:
        """A new view of the bucket of that name; its messages go through this coordinator."""
        tokens = SharedTokens(self, name, limit, within=within)
        self._all.add(tokens)
        return tokens

    def gate(self, name: str, limit: int) -> GateTokens:
        """A new view of the common tokens of that name, for `within` of an account's tokens."""
        gate = GateTokens(self, name, limit)
        self._all.add(gate)
        return gate

    async def start(self) -> None:
        """Look at the server, and exchange the first message.

        Returns without an error if Redis is out of reach: that is an outage.

        Raises:
            ConfigurationError: The server or its address has a mistake that does not heal.
        """
        _log.info(
            "this process counts in Redis at %s, prefix %s", address_of(self._client), self._prefix
        )
        try:
            async with asyncio.timeout(PATIENCE):
                await check_server(self._client)
                if self._task is None and not self._epoch:  # no message is on its way yet
                    self._stop_timer()
                    await self._begin(self._greet())
        except ConfigurationError:
            raise
        except Exception as error:  # noqa: BLE001  # any other error is an outage
            problem = mistake(error)
            if problem is None and self._task is None:
                self._last = _now()
                self._lost(_Message(self._last, self._epoch), error)
                self._arrange()
        else:
            return
        if problem is not None:
            raise problem

    async def _greet(self) -> None:
        """Send a message about no bucket: it tells whether the script may run."""
        self._name_process()
        self._last = _now()
        message = _Message(self._last, self._epoch)
        request = self._request(message)
        self._heard(message, Response.decode(await self._call(request), request))

    async def close(self) -> None:
        """Send every queued report, and close the Redis client if it was opened here."""
        self.closed = True
        self._stop_timer()
        self.outage.close()
        if self._task is not None:
            await asyncio.wait([self._task])
        for tokens in list(self._all):
            tokens.let_go()
        answers = self.answers
        while self.outage.since is None and (
            self._agenda or (answers is not None and answers.has_operations)
        ):
            await self._exchange()
        if self.outage.since is None and self._is_listed:
            await self._exchange()  # tells the others that this process has ended
        if self._owned:
            await self._client.aclose()

    # --- for the tokens

    def now(self) -> float:
        """The time now, by the running loop's clock; every time in `Link` is one of this clock."""
        return _now()

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """Queue a message for these tokens."""
        if self.closed and at_once:  # no call is served after closing
            return
        now = _now()
        self._say_by(tokens, max(now, tokens.asks_from) if at_once else now + REPORT)

    def _say_by(self, tokens: SharedTokens, due: float) -> None:
        self._agenda.add(tokens, due)
        self._arrange()

    def _name_process(self) -> None:
        self.process = self.process or secrets.token_hex(8)

    def number(self, count: int) -> int:
        """Reserve `count` token numbers, unique within this process, and return the first."""
        self._number += count
        return self._number - count

    def watch(self, tokens: SharedTokens) -> None:
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
        self._timer = None if when is None else asyncio.get_running_loop().call_at(when, self._send)
        self._due_at = when

    def _next_message(self) -> float | None:
        if self.outage.since is not None:
            return self._last + BEAT
        soonest = self._agenda.soonest
        if self.answers is not None:
            soonest = min(soonest, self.answers.due)
        beat = (self._last_beat if self.window.waiters else self._last) + BEAT
        if soonest <= beat:
            return soonest
        now = _now()
        if self._agenda or self.window.waiters or (self.answers and self.answers.is_busy):
            return beat
        if any(tokens.has_out(now) for tokens in self._all):
            return beat
        if self.terms.is_strict and self._epoch:
            return self._last + QUIET
        return beat if self._is_listed else None

    def _send(self) -> None:
        self._timer = self._due_at = None
        self._begin(self._exchange())

    def _begin(self, message: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Send one message in a task of its own."""
        self._task = asyncio.Task(message, loop=asyncio.get_running_loop())
        self._task.add_done_callback(self._end)
        return self._task

    def _end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._arrange()

    async def _exchange(self) -> None:
        now = _now()
        is_beat = now >= self._last_beat + BEAT
        self._name_process()
        for tokens in list(self._in_hand):
            tokens.collect(now)
            if not tokens.has_unused:
                self._in_hand.discard(tokens)
        if self.outage.is_long and not await self._is_back():
            return
        message = self._message(now, self._take_due(now, is_beat=is_beat))
        is_due = is_beat or self.outage.since is not None
        if self.answers is not None and self.answers.is_busy:
            message.answers = self.answers.take(now)
            is_due = True
        if not (message.indexes or is_due or self.closed):
            return
        self._last = now
        if is_beat:
            self._last_beat = now
        request = self._request(message)
        try:
            async with asyncio.timeout(PATIENCE):
                response = Response.decode(await self._call(request), request)
        except Exception as error:  # noqa: BLE001  # any error: no call may hang because of it
            if message.asks:
                self._probe = message.asks[0][0]
            self._lost(message, error)
        else:
            self._heard(message, response)

    async def _is_back(self) -> bool:
        """Whether Redis answers after an outage, and whether its count is still the same."""
        self._last = _now()
        try:
            async with asyncio.timeout(PATIENCE):
                epoch = await self._client.hget(self._marker, "epoch")
        except ResponseError:
            epoch = None  # the script repairs the marker
        except Exception as error:  # noqa: BLE001  # as for a message
            self._probe = None  # no message at all is answered
            self._lost(_Message(self._last, self._epoch), error)
            return False
        if self._epoch and epoch not in (str(self._epoch), str(self._epoch).encode()):
            self._say_count_is_lost(PAUSE)
            self._epoch = 0  # the next message registers
        self._register(self._last)
        return True

    def _take_due(self, now: float, *, is_beat: bool) -> list[SharedTokens]:
        """The buckets of the next message: all that are due, or nearly.

        A heartbeat also asks about buckets with waiting calls. If one message cannot hold them all,
        the next heartbeat continues.
        """
        batch = self._agenda.take(now, self._epoch, all_due=self.closed)
        if is_beat and not self.closed and self.outage.since is None:
            waiting = [tokens for tokens in self.window.waiters if tokens not in batch]
            batch += (turn := waiting[: BUCKETS - len(batch)])
            for tokens in turn:
                self.window.goes_last(tokens)
        return batch

    def _message(self, now: float, batch: Iterable[SharedTokens]) -> _Message:
        message = _Message(now, self._epoch)
        for tokens in batch:
            message.add(tokens)
        if self.outage.since is not None:
            # One permit is enough to test the way to Redis. It is given back.
            if self._probe is not None and not self.closed:
                message.ask(self._probe, self._numbers(1))
        elif not self.closed:
            for tokens in batch:
                if count := tokens.messages.reserve_permits(now):
                    message.ask(tokens, self._numbers(count))
        return message

    def _numbers(self, count: int) -> range:
        first = self.number(count)
        return range(first, first + count)

    def _request(self, message: _Message) -> Request:
        now, terms = message.now, self.terms
        clock, asked = self._clock or (0, now)
        stops_grants = self._has_to_register(message)
        message.leaves = self._leaves(message)
        self._is_listed = self._is_listed or not message.leaves
        self._message_number += 1
        return Request(
            marker=self._marker,
            process=self.process,
            number=self._message_number,
            epoch=self._epoch,
            fresh=secrets.randbits(52) + 1,
            stops_grants=stops_grants,
            still=STILL,
            grace=LEAST_OUTAGE,
            clock=clock,
            age=now - asked,
            tolerance=2 * PATIENCE,
            pause=PAUSE,
            lease=terms.lease,
            retention=2 * terms.late + PATIENCE,
            life=_LIFE,
            is_strict=terms.is_strict,
            leaves=message.leaves,
            share=terms.share,
            lends_share=not (stops_grants or self.outage.is_long),
            silence=SILENCE,
            answers=self._answers_of(message),
            buckets=message.reports(),
            asks=[request for _, _, request in message.asks],
        )

    def _answers_of(self, message: _Message) -> AnswersPart | None:
        if self.answers is None or message.answers is None:
            return None
        return self.answers.part(message.answers, self._redis_time)

    def _redis_time(self, moment: float) -> int:
        """Redis's clock at a moment, or an earlier time; long ago if it is unknown."""
        clock, _ = self._clock or (0, 0.0)
        return max(0, clock + math.floor((moment - self._clock_heard) * 1e6))

    def _leaves(self, message: _Message) -> bool:
        if self.closed:
            return not self._agenda
        if self.terms.is_strict or message.asks:
            return False
        return not any(tokens.has_out(message.now) for tokens in self._all)

    async def _call(self, request: Request) -> Any:
        names, said = request.encode()
        try:
            return await self._client.evalsha(SHA, len(names), *names, *said)
        except NoScriptError:  # unknown script, or SCRIPT FLUSH
            return await self._client.eval(SCRIPT, len(names), *names, *said)

    def _heard(self, message: _Message, response: Response) -> None:
        now = _now()
        self._clock, self._clock_heard = (response.clock, self._last), now
        if self.answers is not None:
            self.answers.come_back()
        self.opens_at = now + response.pause if response.pause else -math.inf
        self._is_listed = not message.leaves
        self._probe = None
        was_alone = self.outage.ended()
        if was_alone:
            self._register(now)
        if response.epoch != self._epoch:
            self._epoch = response.epoch
            self._register(now)
        if not response.is_known:
            self._count_is_lost(message, response)
            return
        if self.answers is not None and message.answers is not None:
            self.answers.heard(message.answers, response.answers, message.now)
        self._unregistered.difference_update(message.indexes)
        self._take(message, response, now)
        if was_alone:
            # Attempts that began while this message was under way are not in it.
            for tokens in message.indexes:
                tokens.messages.epoch = 0
            self._register(now)

    def _count_is_lost(self, message: _Message, response: Response) -> None:
        """Redis did nothing. Register all tokens, then repeat the message."""
        self._say_count_is_lost(response.pause)
        for tokens in message.indexes:
            tokens.messages.unanswered()
            self._say_by(tokens, _now())
        if self.answers is not None and message.answers is not None:
            self.answers.lost(message.answers)

    def _say_count_is_lost(self, pause: float) -> None:
        _log.warning(
            "prefix %s: Redis lost the rate limit's count, or its clock jumped; no call starts for "
            "%.1f s while each process registers its tokens; if it repeats, look for restarts, "
            "failovers, evictions and clock changes",
            self._prefix,
            pause,
        )

    def _take(self, message: _Message, response: Response, now: float) -> None:
        """Take the permits and the news of an answer."""
        granted: dict[SharedTokens, int] = {}
        for (tokens, numbers, _), count in zip(message.asks, response.granted, strict=True):
            granted[tokens] = count
            for each in (tokens, tokens.within):
                if each is not None:
                    each.messages.granted(numbers, count)
        woken = [
            tokens
            for tokens, state in zip(message.indexes, response.buckets, strict=True)
            if tokens.messages.answered(state, now, epoch=response.epoch)
        ]
        for tokens, count in granted.items():
            tokens.demand.answered(count)
        for tokens in woken:
            tokens.wake()
        for tokens in message.indexes:
            if tokens.wants:
                self.say(tokens, at_once=True)

    def _register(self, now: float) -> None:
        for tokens in list(self._all):
            if tokens.has_out(now):
                self._unregistered.add(tokens)
                self._say_by(tokens, now)

    def _has_to_register(self, message: _Message) -> bool:
        """Whether tokens are out that neither Redis knows nor this message reports."""
        for tokens in list(self._unregistered):
            if not tokens.has_out(message.now):
                self._unregistered.discard(tokens)
        return bool(self._unregistered.difference(message.indexes))

    def _lost(self, message: _Message, error: Exception) -> None:
        why = _why(error)
        for tokens in message.indexes:
            tokens.messages.unanswered()
        self._agenda.add_again(message.indexes, self._last)
        if self.answers is not None and message.answers is not None:
            self.answers.lost(message.answers)
        if self.outage.lost(self._last, why):
            self._agenda.clear()
        if self.answers is not None and self.outage.is_long:
            self.answers.give_up()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._due_at = None


def hidden_name(whose: str | bytes | None) -> str:
    """Hash the tokens' owner for a key name: SHA-256 of an account name or of a key's digest."""
    if whose is None:
        return ""
    kind, text = ("key", whose) if isinstance(whose, bytes) else ("account", whose.encode())
    return f":{kind}:{hashlib.sha256(text).hexdigest()}"


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no reply within {PATIENCE:g} s"
    if isinstance(error, BadReplyError):
        return str(error)
    return type(error).__name__ + (f": {error}" if isinstance(error, RedisError) else "")


def _now() -> float:
    return asyncio.get_running_loop().time()
