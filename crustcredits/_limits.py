"""The rate limit: `RateLimit` is what is asked for, `TokenBucket` what holds calls back.

A token comes back one period after its attempt has *ended*. The server counts arrivals; an attempt arrives somewhere
between its start and its end; so the next use of the same token arrives more than one period later, whatever the delays,
and no window of one period ever holds more arrivals than there are tokens. Counted from the start that would be false:
two starts one period apart can arrive closer together, when the first was slow.

It knows nothing of HTTP. Time is the running loop's.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Hashable
from functools import partial
from typing import Any, Literal

import attrs
from aiolimiter import AsyncLimiter

from crustcredits._checks import Number, Whole, init_hides_arguments
from crustcredits._debt import Debt, Told
from crustcredits._errors import BucketsUnavailableError, ConfigurationError
from crustcredits._line import Line
from crustcredits._pause import Pause
from crustcredits._quota import Quota, grant_time
from crustcredits._tokens import LocalTokens, Tokens
from crustcredits._turn import Turn

Scope = Literal["auto", "client", "account", "key"]
_SCOPES = ("auto", "client", "account", "key")
Follow = Literal["down", "both"]


def _check_scope(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _SCOPES:
        raise ConfigurationError(f"scope is one of {', '.join(map(repr, _SCOPES))}")


def _check_follow(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in ("down", "both"):
        raise ConfigurationError("follow is 'down' or 'both'")


@init_hides_arguments
@attrs.frozen(kw_only=True)
class RateLimit:
    """The limit to keep: `requests` in any `period` seconds, for each endpoint.

    Attributes:
        requests: Requests that the server allows in any one period. 300 by Crustdata's credits page.
        period: Seconds that each request counts for after its arrival.
        margin: A share of the period that is added to it, against clocks that run at different rates and clocks that are coarse:
            uvloop's ticks in milliseconds.
        scope: What the server is taken to count by, which is not documented: `"client"`, all keys together, the cautious
            reading; `"account"`, the keys that declare one account together and each other key for itself; `"key"`, each key
            for itself. `"auto"` begins as `"client"`, and goes on as `"account"` with each request whose answer proves
            that the server counts it so.
        pace: Calls a second to start at the most, over all scopes, spread evenly: "spreading traffic evenly is safer than
            bursting" (Crustdata's best-practices page). None for no such bound.
        follow: What to do when the API says another limit (`x-ratelimit-limit`) than `requests`: a lower one is followed at
            once; a higher one only with `"both"`, because it may speak of another limit, such as a key's over all endpoints.

    Raises:
        ConfigurationError: A value is not of that range.
    """

    requests: int = attrs.field(default=300, validator=Whole(1))
    period: float = attrs.field(default=60.0, validator=Number(above=0))
    margin: float = attrs.field(default=0.005, validator=Number(minimum=0, maximum=1))
    scope: Scope = attrs.field(default="auto", validator=_check_scope)
    pace: float | None = attrs.field(default=100.0, validator=Number(above=0, optional=True))
    follow: Follow = attrs.field(default="down", validator=_check_follow)

    @property
    def burst(self) -> float:
        """Calls that the pace lets start at once: those of a twentieth of a second."""
        return 0.0 if self.pace is None else max(1.0, self.pace / 20)

    def limiter(self) -> AsyncLimiter | None:
        """What sets the pace. aiolimiter's period is its burst too, so it is given one as short as the burst."""
        return None if self.pace is None else AsyncLimiter(self.burst, self.burst / self.pace)


# A share of the tokens that what nobody waits for leaves alone, so that whoever comes next need not wait: one in so many.
_RESERVE = 10
# Of the tokens that are out, how many are looked at to tell how fast refreshes may follow each other.
_LOOKS = 100


class TokenBucket:
    """Tokens for the requests of one scope on one endpoint: one for each attempt that goes onto the wire.

    Whoever takes a token with `acquire` puts it back `unused`, or calls `start` and, when the attempt is over, exactly one of
    `ended`, `abandoned` and `unsent`. First come, first served; nobody waits while a token is free, but for a pause. Turns
    that nobody wants, because they only refresh what is known, go behind all others: one at a time and evenly over the
    period, so that what was asked in one burst is not refreshed in one; and they leave a tenth of the tokens alone, of more
    than one.

    Args:
        requests: How many tokens there are.
        period: Seconds after its attempt's end that a token comes home.
        late: Seconds that a token stays out longer when its attempt was given up on and may still arrive.
        tokens: Who counts them; by default this process.
        voices: How many accounts have to agree that others spend the quota too.
        place: What tells it from other buckets.
    """

    __slots__ = (
        "_asks",
        "_deaf_until",
        "_debt",
        "_due",
        "_late",
        "_line",
        "_newest",
        "_next_refresh",
        "_pause",
        "_period",
        "_probe",
        "_probe_comes",
        "_requests",
        "_reserve",
        "_timer",
        "_tokens",
        "_unsure",
        "place",
        "voices",
    )

    def __init__(
        self,
        requests: int,
        period: float,
        *,
        late: float = 0.0,
        tokens: Tokens | None = None,
        voices: int = 1,
        place: Hashable = None,
    ) -> None:
        self.place = place
        self._requests = requests
        self._period = period
        self._late = late
        self._tokens = tokens or LocalTokens(requests)
        self._tokens.bind(self._news, self._fail)
        self.voices = voices
        self._reserve = _reserve_of(requests)
        self._line = Line()
        self._next_refresh = 0.0
        self._timer: asyncio.Handle | None = None  # one for all waiters
        self._due: float | None = None  # when it runs; uvloop's handles do not tell
        self._pause = Pause()
        self._debt: Debt | None = None  # what others seem to have spent
        self._newest = -math.inf  # the start of the request whose answer told of the count last
        self._deaf_until = -math.inf
        self._probe = 0  # 1 while a probe is out: there is never more than one
        self._probe_comes = False  # its token has been sent for
        self._asks = False  # some have been sent for
        self._unsure: list[Turn] = []  # those that began to wait when it was not known for how long

    def try_acquire(self) -> bool:
        """Take a token if one is free and nobody waits. The uncontended way, kept short: every call goes it."""
        tokens = self._tokens
        if tokens.free > 0 and self._pause.until is None and not self._line.waiting:
            tokens.take()
            return True
        return False

    async def acquire(self, turn: Turn | None = None, *, again: bool = False) -> int:
        """Take a token, waiting for one if need be. Returns 1 for a probe's token and 0 for any other, to be given back.

        `turn` is who waits, and told so. With `again`, for one whose token had to go back, it waits before those who have
        had none.
        """
        if (turn is None or turn.wanted) and self.try_acquire():
            return 0
        turn = turn or Turn()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._collect(now)
        waiter: asyncio.Future[int] = loop.create_future()
        turn.waiter = waiter
        behind = self._line.waiting and self._timer is not None and self._tokens.free <= 0 and not self._asks
        self._line.join(turn, again=again)
        if not behind:  # otherwise it changes nothing: somebody waits already for the next that comes home
            self._wake()
        try:
            if not waiter.done():
                turn.joins(self)
                if self._asks:
                    self._unsure.append(turn)
            return await waiter
        except asyncio.CancelledError:
            self._leave(turn, waiter)
            raise
        finally:
            turn.waiter = None
            turn.leaves()

    def is_stale(self) -> bool:
        """Whether a token has been taken for so long, and not started, that it is due to others."""
        return self._tokens.is_stale(asyncio.get_running_loop().time())

    def may_start(self, token: int, now: float) -> bool:
        """Whether the token may still go onto the wire; not when a pause has begun, or others have spent it meanwhile."""
        if token == 1:
            return not self._tokens.is_stale(now)
        return self._pause.until is None and self._tokens.may_start(now)

    def start(self, now: float | None = None) -> int:
        """A token goes onto the wire. Returns a mark of that moment, for `heard` and `own`."""
        return self._tokens.start(asyncio.get_running_loop().time() if now is None else now)

    def ended(self, token: int = 0, now: float | None = None) -> None:
        """The attempt has ended with an answer: the server counted it before now."""
        self._end(token, self._period, now)

    def abandoned(self, token: int = 0, now: float | None = None) -> None:
        """The attempt was given up on (timeout, cancellation, reset); it may still arrive within the `late` seconds."""
        self._end(token, self._period + self._late, now)

    def unsent(self, token: int = 0) -> None:
        """The attempt certainly never left, or the server counts it elsewhere: its token is free at once."""
        self._tokens.unsend()
        self._freed(token)

    def unused(self, token: int = 0) -> None:
        """There was no attempt: the token is free at once."""
        self._tokens.untake()
        self._freed(token)

    def own(self, mark: int) -> int:
        """Requests of this process that the server can have counted when that one arrived, itself included."""
        return self._tokens.own(mark)

    def follow(self, requests: int) -> None:
        """So many tokens there are from now on."""
        if requests != self._requests:
            self._requests, self._reserve = requests, _reserve_of(requests)
            self._resize()
            self._wake()

    def heard(self, told: Told, mark: int) -> None:
        """An attempt, with this mark, was told so much of the server's count.

        What is more than all who share these tokens can have had counted is others'. As many tokens are held back for them, until
        a newer answer says otherwise, or all of it must have aged out. The answer to the newest request knows most.
        """
        if told.started < self._newest or told.at < self._deaf_until:
            return
        self._newest = told.started
        if self._debt is not None or told.used > self._tokens.own(mark):
            self._tokens.spent(mark, told.started, partial(self._owe, told))

    def disproved(self, now: float) -> None:
        """The server does not count together all those who take tokens here: for a period nothing it tells is taken for debt."""
        self._deaf_until = now + self._period
        if self._debt is not None:
            self._debt = None
            self._resize()
            self._wake()

    def succeeded(self) -> None:
        """The server served a request: whatever was refused before, the bucket as a whole is not."""
        if self._pause.succeeded():
            self._wake()

    def refused(self, account: Hashable, wait: float | None) -> bool:
        """An attempt for `account` was refused (429) and told to come back in `wait` seconds. Returns whether this pauses it.

        When the last three accounts, with no success between, were told the same moment, it does: see `Pause`.
        """
        paused = self._pause.until is not None
        wait = None if wait is None else min(wait, self._period)  # by then every slot of the window is free
        if self._pause.refused(account, asyncio.get_running_loop().time(), wait):
            self._wake()
        return self._pause.until is not None and not paused

    def idle(self, now: float) -> bool:
        """Whether it is as good as new, so that it can be forgotten."""
        self._collect(now)
        held = self._pause.until is not None or (self._debt is not None and self._debt.amount)
        return self._tokens.is_idle() and not (self._line or held)

    def quota(self, pace: float | None = None, burst: float = 0.0, pacing: int = 0, refreshing: int = 0) -> Quota:
        """What it can still give; `pacing` calls have their token and wait for the pace, `refreshing` ones are refreshes."""
        now = asyncio.get_running_loop().time()
        self._collect(now)
        return Quota(
            limit=self._requests,
            free=self._tokens.available,
            in_flight=self._tokens.in_flight,
            waiting=self._line.waiting,
            refreshing=refreshing,
            debt=self._debt.amount if self._debt is not None else 0,
            paused=None if self._pause.until is None else max(0.0, self._pause.until - now),
            probing=bool(self._probe),
            alone=self._tokens.alone,
            returns=tuple(max(0.0, time - now) for time in self._returns(now)),
            period=self._period,
            pace=pace,
            burst=burst,
            pacing=pacing,
        )

    def expected(self, turn: Turn, now: float) -> float:
        """When a turn that waits here gets its token, as things stand: those ahead stay, what is under way ends now."""
        if turn.waiter is None or turn.waiter.done():
            return now
        return max(now, grant_time(self._returns(now), self._line.ahead_of(turn), self._period))

    def move_up(self, turn: Turn) -> None:
        """Somebody wants it now: it goes to the end of those that are wanted."""
        if self._line.move_up(turn):
            self._wake()

    # --- inside

    def _end(self, token: int, after: float, now: float | None) -> None:
        home = (asyncio.get_running_loop().time() if now is None else now) + after
        self._tokens.end(home)
        if token:
            self._probe = 0
        # Nothing is free by this; it can only be the first to come home, or the probe that others waited for.
        if token or self._due is None or home < self._due:
            self._wake()

    def _freed(self, token: int) -> None:
        if token:
            self._probe = 0
            if self._debt is not None:
                self._debt.not_probed(asyncio.get_running_loop().time())
        self._wake()

    def _collect(self, now: float) -> None:
        self._tokens.collect(now)
        if self._debt is not None and now >= self._debt.until:
            self._debt = None
            self._resize()

    def _owe(self, told: Told, own: int) -> None:
        if told.at < self._deaf_until:  # since the number was asked for
            return
        debt = self._debt = self._debt or Debt(self.voices)
        before = debt.amount
        debt.hear(told, own, period=self._period, spacing=self._period / self._requests)
        if before or debt.amount:
            self._resize()
            self._wake()

    def _resize(self) -> None:
        self._tokens.resize(self._requests, self._debt.amount if self._debt is not None else 0)

    def _wake(self) -> None:
        """Hand free tokens to those who wait, in order, and set the one timer for the next that comes home."""
        line = self._line
        if not line:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._collect(now)
        self._asks = False
        if not self._is_open(now):
            self._need_none(now)
        else:
            paused = self._pause.until is not None
            while line.waiting and self._tokens.free > 0 and not (paused and self._probe):
                self._grant(line.next())
            if line.waiting:
                self._asks = self._tokens.need(line.waiting) is None
                self._find_out(now)
            else:
                self._grant_refreshes(now)
        self._set_timer(loop, now)

    def _is_open(self, now: float) -> bool:
        """Whether there is no pause, or it is over and no probe is out."""
        return self._pause.until is None or (now >= self._pause.until and not self._probe)

    def _grant_refreshes(self, now: float) -> None:
        line = self._line
        while line.refreshes and now >= self._next_refresh and self._is_open(now) and self._tokens.need(1, -self._reserve):
            if self._grant(line.next_refresh()):
                self._next_refresh = now + self._refresh_gap(now)

    def _find_out(self, now: float) -> None:
        """Let one go beyond the debt, where the debt is all that keeps it, and it is time for that."""
        debt = self._debt
        if debt is None or not debt.amount or now < debt.probe_at or self._probe:
            return
        there = self._tokens.need(1, debt.amount)
        if there is None:
            debt.probed()
            self._probe_comes = True
        while there and self._line.waiting:
            if self._grant(self._line.next(), probe=True):
                debt.probed()
                return

    def _need_none(self, now: float) -> None:
        """Nobody waits for a token, or may have one."""
        self._tokens.need(0)
        if self._probe_comes and self._debt is not None:
            self._debt.not_probed(now)
        self._probe_comes = False

    def _news(self) -> None:
        """Those who keep the tokens have heard of them."""
        self._wake()
        unsure, self._unsure = self._unsure, []
        for turn in unsure:
            if turn.waiter is not None and not turn.waiter.done():
                turn.on_wait()

    def _fail(self) -> None:
        """No token can be had: whoever waits for one is told."""
        self._unsure.clear()
        line = self._line
        while line:
            turn = line.next() if line.waiting else line.next_refresh()
            if turn.waiter is not None and not turn.waiter.done():
                turn.waiter.set_exception(
                    BucketsUnavailableError("the count that the processes share is out of reach, as the log says; nothing was sent")
                )

    def _refresh_gap(self, now: float) -> float:
        """Seconds to the next refresh, such that as many follow at the same distance as tokens are left and come home for them.

        Sooner, and after a burst of others they would use up what is left and then stop until the burst comes home.
        """
        homes = self._tokens.homes()
        spare = max(0, self._tokens.available - self._reserve) + 1
        step = 1 + len(homes) // _LOOKS
        gap = self._period / (self._requests - self._reserve)
        return max([gap, *((homes[place] - now) / (spare + place) for place in range(0, len(homes), step))])

    def _grant(self, turn: Turn, *, probe: bool = False) -> bool:
        waiter = turn.waiter
        if waiter is None or waiter.done():  # cancelled in this very turn of the loop
            return False
        self._tokens.take()
        if probe or self._probe_comes or self._pause.until is not None:
            self._probe, self._probe_comes = 1, False
            waiter.set_result(1)
        else:
            waiter.set_result(0)
        return True

    def _set_timer(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        when = self._next_chance(now)
        if when == self._due:
            return
        self._stop_timer()
        if when is not None:
            self._timer, self._due = loop.call_at(when, self._on_timer), when

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._due = None

    def _on_timer(self) -> None:
        self._timer = self._due = None
        self._wake()

    def _next_chance(self, now: float) -> float | None:
        """When whoever is next could have a token. None: nobody waits, or something else has to happen first."""
        paused, wanted = self._pause.until, self._line.waiting > 0
        if not self._line or (paused is not None and self._probe):
            return None
        when = self._next_free(0 if wanted else self._reserve, probes=wanted)
        if when is None:
            return None
        return max(when, now if wanted else self._next_refresh, paused or now)

    def _next_free(self, reserve: int, *, probes: bool) -> float | None:
        missing = reserve + 1 - self._tokens.free
        when = self._tokens.next_home(missing)
        debt = self._debt
        without = None if debt is None or not debt.amount else self._tokens.next_home(missing, debt.amount)
        if debt is None or without is None:
            return when
        opens = max(without, min(debt.until, debt.probe_at if probes and not self._probe else math.inf))
        return opens if when is None else min(when, opens)

    def _leave(self, turn: Turn, waiter: asyncio.Future[int]) -> None:
        """Give up waiting, and hand on a token that came in the same moment."""
        self._line.leave(turn)
        if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
            self.unused(waiter.result())
        elif not self._line:
            self._need_none(asyncio.get_running_loop().time())
            self._stop_timer()

    def _returns(self, now: float) -> list[float]:
        """When each token comes home, ascending, taking what is under way to end now and pause and debt to end in time."""
        times = self._tokens.returns(now, self._period)
        if self._debt is not None and self._debt.amount:
            opens = now if self._probe else max(now, min(self._debt.until, self._debt.probe_at))
            times = sorted([*times, *[opens] * self._debt.amount])
        paused = self._pause.until
        return times if paused is None else [max(time, paused) for time in times]


def _reserve_of(requests: int) -> int:
    return math.ceil(requests / _RESERVE) if requests > 1 else 0
