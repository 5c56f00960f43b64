"""`Coordinator`: the exchange of messages with Redis, and degraded mode while there is none.

The content of messages is decided in `shared_tokens`, their effect in Redis in `exchange.lua`.
Redis's clock is the only clock: all times in messages are spans. Neither keys nor values hold a
secret.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final
from weakref import WeakSet

from redis.exceptions import NoScriptError, RedisError

from crustcredits.redis.shared_tokens import BEAT, SharedTokens, Terms, micro

_log = logging.getLogger("crustcredits")

SCRIPT: Final = files("crustcredits.redis").joinpath("exchange.lua").read_text(encoding="utf-8")
SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

# Seconds that Redis may take to answer.
_PATIENCE = 1.0
# Seconds without an answer after which it counts as gone. Until then all wait: what a process
# spends by itself while the others are still served comes on top of what they spend.
_GRACE = 2.0
# Seconds that what has ended may wait for other things to be said; the lease covers for it until
# then.
_REPORT = 0.1
# Seconds after a loss of the count, or without an answer, in which no tokens are given, so that
# every process can say what it holds: each sends a message every half a second.
PAUSE = 2.5 * BEAT
# Buckets of one message at the most.
_BUCKETS = 64
# Seconds that the marker of an idle prefix is remembered.
_LIFE = 86_400.0


class Coordinator:
    """What carries the messages: one at a time, and none while there is nothing to say.

    See `Link`.
    """

    terms: Terms

    def __init__(self, client: Any, *, owned: bool, marker: str, raises: bool) -> None:
        self.degraded = self.settled = False
        self.settles_at = 0.0
        self._client = client
        self._owned = owned
        self._marker = marker
        self._raises = raises
        self.closed = False
        self._all: WeakSet[SharedTokens] = WeakSet()
        self._in_hand: set[SharedTokens] = set()  # of which some wait for their use
        self._due: dict[
            SharedTokens, float
        ] = {}  # who has something to say, and when at the latest
        self._soonest = math.inf  # of these times
        self._process = ""  # made when first needed, since a process may fork before
        self._epoch = 0
        self._untold: WeakSet[SharedTokens] = (
            WeakSet()
        )  # who has to say in this epoch what it holds
        self._clock: tuple[int, float] | None = (
            None  # what Redis's said last, in microseconds, and when it was asked
        )
        self._number = 0
        self._failing: float | None = None  # since when nothing was answered
        self._gone = False  # and that for too long
        # None may be given for a while: nothing was answered for so long that others may be alone.
        self._hold = False
        self._last = 0.0
        self._timer: asyncio.Handle | None = None
        self._due_at: float | None = None  # when it runs; uvloop's handles do not tell
        self._settling: asyncio.Handle | None = None
        self._task: asyncio.Task[None] | None = None

    def tokens(self, name: str, limit: int) -> SharedTokens:
        """The tokens of the bucket of that name."""
        tokens = SharedTokens(self, name, limit)
        self._all.add(tokens)
        return tokens

    async def close(self) -> None:
        """Say what is still to be said, and let the client go."""
        self.closed = True
        self._stop_timers()
        if self._task is not None:
            await asyncio.wait([self._task])
        for tokens in list(self._all):
            tokens.let_go()
        while self._due and self._failing is None:
            await self._exchange()
        if self._owned:
            await self._client.aclose()

    # --- for the tokens

    def now(self) -> float:
        """The loop's time."""
        return _now()

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """These have something to say."""
        if self.closed and at_once:  # nobody is served any more
            return
        now = _now()
        due = max(now, tokens.not_before) if at_once else now + _REPORT
        if due < self._due.get(tokens, due + 1):
            self._due[tokens] = due
            self._soonest = min(self._soonest, due)
        self._arrange()

    def number(self, count: int) -> int:
        """The first of so many new ones: no two tokens of a process have the same."""
        self._number += count
        return self._number - count

    def keeps_an_eye_on(self, tokens: SharedTokens) -> None:
        """Of these some are in hand, and go back when they are not used."""
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
        return beat if self._due or any(tokens.holds(now) for tokens in self._all) else None

    def _begin(self) -> None:
        self._timer = self._due_at = None
        self._task = asyncio.Task(self._exchange(), loop=asyncio.get_running_loop())
        self._task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._task = None
        self._arrange()

    async def _exchange(self) -> None:
        now = self._last = _now()
        self._process = self._process or secrets.token_hex(8)
        for tokens in list(self._in_hand):
            tokens.collect(now)
            if not tokens.has_in_hand:
                self._in_hand.discard(tokens)
        batch = sorted(self._due, key=self._due.__getitem__)[:_BUCKETS]
        for tokens in batch:
            del self._due[tokens]
        self._soonest = min(self._due.values(), default=math.inf)
        said = self._greeting(now, registers=bool(self._untold.difference(batch)))
        for tokens in batch:
            # What the first one in vain may bring is enough to be given back.
            said += tokens.message(now, self._epoch, asks=self._failing is None and not self.closed)
        try:
            async with asyncio.timeout(_PATIENCE):
                answers = _read(await self._call(self._keys(batch), said), len(batch))
        except Exception as error:  # noqa: BLE001  # a client of another loop, a script that is not ours: nobody may hang for it
            self._lost(
                batch,
                f"{type(error).__name__}: {error}"
                if isinstance(error, RedisError)
                else type(error).__name__,
            )
        else:
            self._heard(batch, answers)

    def _greeting(self, now: float, *, registers: bool) -> list[str | int]:
        """What a message says of its process."""
        told, asked = self._clock or (0, now)
        terms = self.terms
        said: list[str | int] = [
            self._process,
            self._epoch,
            int(self._hold or registers),
            secrets.randbits(52) + 1,
        ]
        said += [told, micro(now - asked), micro(2 * _PATIENCE), micro(PAUSE), micro(terms.lease)]
        return [*said, micro(2 * terms.late + _PATIENCE), int(_LIFE * 1e3)]

    def _keys(self, batch: Sequence[SharedTokens]) -> list[str]:
        return [
            self._marker,
            *(name for tokens in batch for name in (tokens.name, tokens.name + ":line")),
        ]

    async def _call(self, keys: Sequence[str], said: Sequence[str | int]) -> Any:
        try:
            return await self._client.evalsha(SHA, len(keys), *keys, *said)
        except NoScriptError:  # never heard of it, or SCRIPT FLUSH
            return await self._client.eval(SCRIPT, len(keys), *keys, *said)

    def _heard(self, batch: Sequence[SharedTokens], answers: Sequence[Sequence[int]]) -> None:
        (known, epoch, pause, clock), *of_buckets = answers
        now = _now()
        self._clock = clock, self._last
        self._hold = self._failing is not None and now - self._failing >= PAUSE
        self._come_back()
        if not known:
            _log.warning(
                "the count of the rate limit in Redis was lost, or its clock was set; this "
                "process says what it holds"
            )
        if epoch != self._epoch:
            self._epoch = epoch
            self._register(now)
        if not known:
            for tokens in batch:
                tokens.unanswered()
                self.say(tokens, at_once=True)
            return
        self._untold.difference_update(batch)
        for tokens, answer in zip(batch, of_buckets, strict=True):
            tokens.answered(answer, now, epoch=epoch, pause=pause / 1e6)
            if tokens.wants:
                self.say(tokens, at_once=True)

    def _register(self, now: float) -> None:
        for tokens in list(self._all):
            if tokens.holds(now):
                self._untold.add(tokens)
                self.say(tokens, at_once=True)

    # --- without Redis

    def _lost(self, batch: Sequence[SharedTokens], why: str) -> None:
        if self._failing is None:
            self._failing = self._last
            for tokens in list(self._all):
                tokens.lose_touch()
        for tokens in batch:
            tokens.unanswered()
        self._due |= dict.fromkeys(batch, self._last)
        if _now() - self._failing < _GRACE:
            return
        if not self._gone:
            self._gone = True
            later = (
                f"for {self.terms.lease:.0f} s with tokens of its own, then with "
                f"{self.terms.share:.3g} of the limit"
            )
            goes_on = "calls fail" if self._raises else f"this process goes on by itself, {later},"
            _log.warning("Redis is out of reach (%s); %s until it is back", why, goes_on)
        if self._raises:
            for tokens in list(self._all):
                tokens.fail()
        elif not self.degraded:
            self._go_alone(self._failing)

    def _go_alone(self, since: float) -> None:
        self.degraded = True
        # A request for which another process had its token then may still come, and counts for a
        # period.
        self.settles_at = since + self.terms.lease
        self._due.clear()
        for tokens in list(self._all):
            tokens.go_alone()
        if not self.closed:
            self._settling = asyncio.get_running_loop().call_at(self.settles_at, self._settle)

    def _settle(self) -> None:
        self.settled = True
        for tokens in list(self._all):
            tokens.change()

    def _come_back(self) -> None:
        self._failing = None
        if self._gone:
            self._gone = False
            _log.warning("Redis is back; the processes count together again")
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


def _read(answers: Any, buckets: int) -> list[list[int]]:
    """What Redis answered, or a `ValueError` or `TypeError` when that is no answer of the script's."""
    rows = [[int(number) for number in row] for row in answers]
    known, _, _, _ = rows[0]
    if len(rows) != 1 + (buckets if known else 0) or any(len(row) < 3 for row in rows):
        raise ValueError("not the script's answer")
    return rows


def _hidden(whose: str | bytes | None) -> str:
    """Whose the tokens are, as part of a name: the SHA-256 of an account's name or of a key's digest."""
    if whose is None:
        return ""
    kind, text = ("key", whose) if isinstance(whose, bytes) else ("account", whose.encode())
    return f":{kind}:{hashlib.sha256(text).hexdigest()}"


def _now() -> float:
    return asyncio.get_running_loop().time()
