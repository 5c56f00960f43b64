"""`Coordinator`: exchanges messages with Redis, with heartbeat and degraded mode.

`shared_tokens` decides the content of messages, `exchange.lua` their effect in Redis. Redis's clock
is the only shared clock, so all times in messages are durations. Neither keys nor values hold a
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

# Seconds that one Redis call may take.
_PATIENCE = 1.0
# Seconds without an answer before degraded mode. Until then all calls wait: requests that a process
# in degraded mode sends while Redis still serves the others are in addition to theirs.
_GRACE = 2.0
# Seconds for which the report of an ended attempt may wait for other reports; its lease covers it
# until then.
_REPORT = 0.1
# Seconds after a lost count, or without an answer, in which no tokens are granted, so that every
# process can register its tokens: each sends a heartbeat every half second.
PAUSE = 2.5 * BEAT
# Most buckets in one message.
_BUCKETS = 64
# Seconds after which Redis forgets the marker of an idle prefix.
_LIFE = 86_400.0


class Coordinator:
    """Exchanges messages with Redis: one at a time, and none while there is nothing to report.

    See `Link`. It is long because the message loop and degraded mode share its state.
    """

    terms: Terms

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
        self._number = 0
        self._failing: float | None = None  # loop time of the first failure in a row
        self._gone = False  # failing for longer than the grace time
        # No tokens may be granted for a while: Redis was out of reach for so long that other
        # processes may be in degraded mode.
        self._hold = False
        self._last = 0.0
        self._timer: asyncio.Handle | None = None
        self._due_at: float | None = None  # loop time of the timer; uvloop's handles do not give it
        self._settling: asyncio.Handle | None = None
        self._task: asyncio.Task[None] | None = None

    def tokens(self, name: str, limit: int) -> SharedTokens:
        """Return the tokens of the bucket of that name."""
        tokens = SharedTokens(self, name, limit)
        self._all.add(tokens)
        return tokens

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
        if self._owned:
            await self._client.aclose()

    # --- for the tokens

    def now(self) -> float:
        """Return the loop's time."""
        return _now()

    def say(self, tokens: SharedTokens, *, at_once: bool) -> None:
        """Queue a message for these tokens."""
        if self.closed and at_once:  # no call is served after closing
            return
        now = _now()
        due = max(now, tokens.not_before) if at_once else now + _REPORT
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
            # While Redis fails, no further tokens are asked for: the numbers of the first failed
            # message are enough to give back.
            said += tokens.message(now, self._epoch, asks=self._failing is None and not self.closed)
        try:
            async with asyncio.timeout(_PATIENCE):
                answers = _read(await self._call(self._keys(batch), said), len(batch))
        except Exception as error:  # noqa: BLE001  # any error: no call may hang because of it
            self._lost(
                batch,
                f"{type(error).__name__}: {error}"
                if isinstance(error, RedisError)
                else type(error).__name__,
            )
        else:
            self._heard(batch, answers)

    def _greeting(self, now: float, *, registers: bool) -> list[str | int]:
        """Return the part of a message that describes its process."""
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
        except NoScriptError:  # unknown script, or SCRIPT FLUSH
            return await self._client.eval(SCRIPT, len(keys), *keys, *said)

    def _heard(self, batch: Sequence[SharedTokens], answers: Sequence[Sequence[int]]) -> None:
        (known, epoch, pause, clock), *of_buckets = answers
        now = _now()
        self._clock = clock, self._last
        self._hold = self._failing is not None and now - self._failing >= PAUSE
        self._come_back()
        if not known:
            _log.warning(
                "the rate limit's count in Redis was lost, or Redis's clock was set; this "
                "process registers its tokens again"
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
                f"for {self.terms.lease:.0f} s with its own returning tokens, then with "
                f"{self.terms.share:.3g} of the limit"
            )
            effect = "calls fail" if self._raises else f"degraded mode, {later},"
            _log.warning("Redis is out of reach (%s); %s until it answers", why, effect)
        if self._raises:
            for tokens in list(self._all):
                tokens.fail()
        elif not self.degraded:
            self._go_alone(self._failing)

    def _go_alone(self, since: float) -> None:
        self.degraded = True
        # An attempt with a token of another process from before the outage may still arrive, and
        # then counts for a period.
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


def _read(answers: Any, buckets: int) -> list[list[int]]:
    """Parse Redis's answer; raise `ValueError` or `TypeError` if the script did not make it."""
    rows = [[int(number) for number in row] for row in answers]
    known, _, _, _ = rows[0]
    if len(rows) != 1 + (buckets if known else 0) or any(len(row) < 3 for row in rows):
        raise ValueError("the answer is not from the script")
    return rows


def hidden_name(whose: str | bytes | None) -> str:
    """Hash the tokens' owner for a key name: SHA-256 of an account name or of a key's digest."""
    if whose is None:
        return ""
    kind, text = ("key", whose) if isinstance(whose, bytes) else ("account", whose.encode())
    return f":{kind}:{hashlib.sha256(text).hexdigest()}"


def _now() -> float:
    return asyncio.get_running_loop().time()
