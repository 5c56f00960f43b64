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
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, Literal, TypeAlias

import attrs
from aiolimiter import AsyncLimiter

from crustcredits._checks import Number, Whole
from crustcredits._errors import ConfigurationError
from crustcredits._quota import Quota, grant_time
from crustcredits._turn import Turn

Scope = Literal["client", "account", "key"]
_SCOPES = ("client", "account", "key")

# Three refused accounts in a row are a pattern, one or two are their own trouble.
_REFUSALS_TO_PAUSE = 3
# `x-ratelimit-reset` comes in whole seconds, so answers that mean one moment can differ by almost this much.
_SAME_MOMENT = 1.0


def _check_scope(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _SCOPES:
        raise ConfigurationError(f"scope is one of {', '.join(map(repr, _SCOPES))}")


@attrs.frozen(kw_only=True)
class RateLimit:
    """The limit to keep: `requests` in any `period` seconds, for each endpoint.

    Attributes:
        requests: Requests that the server allows in any one period. 300 by Crustdata's credits page.
        period: Seconds that each request counts for after its arrival.
        margin: A share of the period that is added to it, against clocks that run at different rates.
        scope: What the server is taken to count by: `"client"`, all keys together, the cautious reading; `"account"`, the
            keys that declare one account together and each other key for itself; `"key"`, each key for itself. Which of
            them is true is not documented.
        pace: Calls a second to start at the most, over all scopes, spread evenly: "spreading traffic evenly is safer than
            bursting" (Crustdata's best-practices page). None for no such bound.

    Raises:
        ConfigurationError: A value is not of that range.
    """

    requests: int = attrs.field(default=300, validator=Whole(1))
    period: float = attrs.field(default=60.0, validator=Number(above=0))
    margin: float = attrs.field(default=0.005, validator=Number(minimum=0, maximum=1))
    scope: Scope = attrs.field(default="client", validator=_check_scope)
    pace: float | None = attrs.field(default=100.0, validator=Number(above=0, optional=True))

    @property
    def burst(self) -> float:
        """Calls that the pace lets start at once: those of a twentieth of a second."""
        return 0.0 if self.pace is None else max(1.0, self.pace / 20)

    def limiter(self) -> AsyncLimiter | None:
        """What sets the pace. aiolimiter's period is its burst too, so it is given one as short as the burst."""
        return None if self.pace is None else AsyncLimiter(self.burst, self.burst / self.pace)


# Who waits, in order, each with its ticket.
_Queue: TypeAlias = "OrderedDict[Turn, int]"

# A share of the tokens that what nobody waits for leaves alone, so that whoever comes next need not wait: one in so many.
_RESERVE = 10
# Of the tokens that are out, how many are looked at to tell how fast refreshes may follow each other.
_LOOKS = 100


class TokenBucket:
    """Tokens for the requests of one scope on one endpoint: one for each attempt that goes onto the wire.

    Whoever takes a token with `acquire` gives it back in exactly one of three ways: `ended`, `abandoned` or `unused`.
    First come, first served; nobody waits while a token is free, but for a pause. Turns that nobody wants, because they
    only refresh what is known, go behind all others: one at a time and evenly over the period, so that what was asked in
    one burst is not refreshed in one; and they leave a tenth of the tokens alone, of more than one.

    Args:
        requests: How many tokens there are.
        period: Seconds after its attempt's end that a token comes home.
        late: Seconds that a token stays out longer when its attempt was given up on and may still arrive.
    """

    __slots__ = (
        "_again",
        "_free",
        "_home",
        "_in_flight",
        "_late",
        "_next_refresh",
        "_paused",
        "_period",
        "_probe",
        "_refreshes",
        "_refused",
        "_requests",
        "_reserve",
        "_tickets",
        "_timer",
        "_waiters",
    )

    def __init__(self, requests: int, period: float, *, late: float = 0.0) -> None:
        self._requests = requests
        self._period = period
        self._late = late
        self._free = requests
        self._reserve = math.ceil(requests / _RESERVE) if requests > 1 else 0
        self._in_flight = 0
        self._home: list[float] = []  # when the tokens that are out, and not in flight, come home; ascending
        self._waiters: _Queue = OrderedDict()
        self._again: _Queue = OrderedDict()  # those whom a pause sent back, before all others
        self._refreshes: _Queue = OrderedDict()  # those that nobody wants, behind all others
        self._next_refresh = 0.0
        self._tickets = 0
        self._timer: asyncio.TimerHandle | None = None  # one for all waiters
        self._refused: dict[Hashable, float] = {}  # the last accounts refused since a success, and the moments they were told
        self._paused: float | None = None  # until when, and then one probe at a time
        self._probe = 0  # 1 while a probe is out: there is never more than one

    def try_acquire(self) -> bool:
        """Take a token if one is free and nobody waits. The uncontended way, kept short: every call goes it."""
        if self._free and not self._waiters and not self._again and self._paused is None:
            self._free -= 1
            self._in_flight += 1
            return True
        return False

    async def acquire(self, turn: Turn | None = None, *, again: bool = False) -> int:
        """Take a token, waiting for one if need be. Returns 1 for a probe's token and 0 for any other, to be given back.

        `turn` is who waits, and told so. With `again`, for one that gave its token back because of a pause, it waits before
        those who have had none.
        """
        if (turn is None or turn.wanted) and self.try_acquire():
            return 0
        turn = turn or Turn()
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._collect(now)
        self._enqueue(turn, again=again)
        self._wake()
        waiter = turn.waiter
        assert waiter is not None
        try:
            if not waiter.done():
                turn.joins(self)
            return await waiter
        except asyncio.CancelledError:
            self._leave(turn, waiter)
            raise
        finally:
            turn.waiter = None
            turn.leaves()

    def ended(self, token: int = 0) -> None:
        """The attempt has ended with an answer: the server counted it before now."""
        self._give_back(token, self._period)

    def abandoned(self, token: int = 0) -> None:
        """The attempt was given up on (timeout, cancellation, reset); it may still arrive within the `late` seconds."""
        self._give_back(token, self._period + self._late)

    def unused(self, token: int = 0) -> None:
        """The attempt certainly never left: its token is free at once."""
        self._in_flight -= 1
        self._free += 1
        if token:
            self._probe = 0
        self._wake()

    def succeeded(self) -> None:
        """The server served a request: whatever was refused before, the bucket as a whole is not."""
        if not self._refused:
            return
        self._refused.clear()
        if self._paused is not None:
            self._paused = None
            self._wake()

    def refused(self, account: Hashable, wait: float | None) -> bool:
        """An attempt for `account` was refused (429) and told to come back in `wait` seconds. Returns whether this pauses it.

        One refused account holds back nobody else, because it may be hammered from elsewhere. When the last three, with no
        success between, were told the same moment, it is the window that they share: then the bucket pauses until then, and
        lets one probe at a time through until a success ends it. An unknown moment agrees with none.
        """
        now = asyncio.get_running_loop().time()
        moment = math.nan if wait is None else now + wait
        self._refused.pop(account, None)
        self._refused[account] = moment
        if len(self._refused) > _REFUSALS_TO_PAUSE:
            del self._refused[next(iter(self._refused))]
        pauses = self._paused is None and len(self._refused) == _REFUSALS_TO_PAUSE and self._agree()
        if pauses or (self._paused is not None and wait is not None):
            self._paused = max(self._paused or 0.0, moment)
            self._wake()
        return pauses

    def _agree(self) -> bool:
        moments = self._refused.values()
        return not any(map(math.isnan, moments)) and max(moments) - min(moments) <= _SAME_MOMENT

    def held(self, token: int) -> bool:
        """Whether a pause has begun since the token was taken: then it had better go back unused."""
        return self._paused is not None and not token

    def idle(self, now: float) -> bool:
        """Whether it is as good as new, so that it can be forgotten."""
        self._collect(now)
        return self._free == self._requests and not (self._waiters or self._again or self._refreshes or self._paused)

    def quota(self, pace: float | None = None, burst: float = 0.0, pacing: int = 0, refreshing: int = 0) -> Quota:
        """What it can still give; `pacing` calls have their token and wait for the pace, `refreshing` ones are refreshes."""
        now = asyncio.get_running_loop().time()
        self._collect(now)
        return Quota(
            limit=self._requests,
            free=self._free,
            in_flight=self._in_flight,
            waiting=len(self._waiters) + len(self._again),
            refreshing=refreshing,
            returns=tuple(max(0.0, time - now) for time in self._returns(now)),
            period=self._period,
            pace=pace,
            burst=burst,
            pacing=pacing,
        )

    def expected(self, turn: Turn, now: float) -> float:
        """When a turn that waits here gets its token, as things stand: those ahead stay, what is under way ends now."""
        waiter = turn.waiter
        return (
            now if waiter is None or waiter.done() else max(now, grant_time(self._returns(now), self._ahead_of(turn), self._period))
        )

    def move_up(self, turn: Turn) -> None:
        """Somebody wants it now: it goes to the end of those that are wanted."""
        if self._refreshes.pop(turn, None):
            self._waiters[turn] = self._ticket()
            self._wake()

    # --- inside

    def _enqueue(self, turn: Turn, *, again: bool) -> None:
        turn.waiter = asyncio.get_running_loop().create_future()
        queue = self._refreshes if not turn.wanted else self._again if again else self._waiters
        queue[turn] = self._ticket()

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    def _take(self) -> int:
        self._free -= 1
        self._in_flight += 1
        if self._paused is None:
            return 0
        self._probe = 1
        return self._probe

    def _give_back(self, token: int, after: float) -> None:
        self._in_flight -= 1
        home = asyncio.get_running_loop().time() + after
        insort(self._home, home)
        if token:
            self._probe = 0
        # Nothing is free by this; it can only be the first to come home, or the probe that others waited for.
        if self._timer is None or home < self._timer.when():
            self._wake()

    def _collect(self, now: float) -> None:
        home = bisect_right(self._home, now)
        if home:
            del self._home[:home]
            self._free += home

    def _may_grant(self, now: float, reserve: int = 0) -> bool:
        if self._paused is not None and (now < self._paused or self._probe):
            return False
        return self._free > reserve

    def _wake(self) -> None:
        """Hand free tokens to those who wait, in order, and set the one timer for the next that comes home."""
        if not (self._again or self._waiters or self._refreshes):
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._collect(now)
        while (queue := self._again or self._waiters) and self._may_grant(now):
            self._grant(queue.popitem(last=False)[0])
        while self._refreshes and not queue and now >= self._next_refresh and self._may_grant(now, self._reserve):
            if self._grant(self._refreshes.popitem(last=False)[0]):
                self._next_refresh = now + self._refresh_gap(now)
        self._set_timer(loop, now)

    def _refresh_gap(self, now: float) -> float:
        """Seconds to the next refresh, such that as many follow at the same distance as tokens are left and come home for them.

        Sooner, and after a burst of others they would use up what is left and then stop until the burst comes home.
        """
        spare = self._free - self._reserve + 1
        step = 1 + len(self._home) // _LOOKS
        gap = self._period / (self._requests - self._reserve)
        return max([gap, *((self._home[place] - now) / (spare + place) for place in range(0, len(self._home), step))])

    def _grant(self, turn: Turn) -> bool:
        waiter = turn.waiter
        if waiter is None or waiter.done():  # cancelled in this very turn of the loop
            return False
        waiter.set_result(self._take())
        return True

    def _set_timer(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        when = self._next_chance(now)
        if self._timer is not None:
            if self._timer.when() == when:
                return
            self._timer.cancel()
        self._timer = None if when is None else loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake()

    def _next_chance(self, now: float) -> float | None:
        """When whoever is next could have a token. None: nobody waits, or an attempt under way has to end first."""
        if self._again or self._waiters:
            missing, earliest = 1 - self._free, now
        elif self._refreshes:
            missing, earliest = self._reserve + 1 - self._free, max(now, self._next_refresh)
        else:
            return None
        if missing > len(self._home) or (self._paused is not None and self._probe):
            return None
        return max(earliest, self._home[missing - 1] if missing > 0 else now, self._paused or now)

    def _ahead_of(self, turn: Turn) -> int:
        if turn in self._again:
            return _ahead_in(self._again, turn)
        return len(self._again) + (_ahead_in(self._waiters, turn) if turn in self._waiters else len(self._waiters))

    def _leave(self, turn: Turn, waiter: asyncio.Future[int]) -> None:
        """Give up waiting, and hand on a token that came in the same moment."""
        self._again.pop(turn, None)
        self._waiters.pop(turn, None)
        self._refreshes.pop(turn, None)
        if waiter.done() and not waiter.cancelled():
            self.unused(waiter.result())
        elif not (self._again or self._waiters or self._refreshes) and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _returns(self, now: float) -> list[float]:
        """When each token comes home, ascending, taking what is under way to end now and a pause to end in time."""
        times = [now] * self._free + [now + self._period] * self._in_flight + self._home
        if self._paused is not None:
            times = [max(time, self._paused) for time in times]
        return sorted(times)


def _ahead_in(queue: _Queue, turn: Turn) -> int:
    # By tickets, because counting would cost more the more there are; some of those who left in between are counted too.
    return min(queue[turn] - next(iter(queue.values())), len(queue) - 1)
