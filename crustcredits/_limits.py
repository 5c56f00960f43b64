"""The rate limit: `RateLimit` is what is asked for, `TokenBucket` what holds calls back, `Buckets` one for each scope.

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
from typing import Any, Literal

import attrs
from aiolimiter import AsyncLimiter

from crustcredits._checks import Number, Whole, check_whole
from crustcredits._errors import ConfigurationError, RateLimitWaitError
from crustcredits._keys import ApiKey

Scope = Literal["client", "account", "key"]
_SCOPES = ("client", "account", "key")

# Three refused accounts in a row are a pattern, one or two are their own trouble.
_REFUSALS_TO_PAUSE = 3
# `x-ratelimit-reset` comes in whole seconds, so answers that mean one moment can differ by almost this much.
_SAME_MOMENT = 1.0


def _check_scope(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _SCOPES:
        raise ConfigurationError(f"scope is one of {', '.join(map(repr, _SCOPES))}, not {value!r}")


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

    def limiter(self) -> AsyncLimiter | None:
        """What sets the pace. aiolimiter's period is its burst too, so the period is cut to a twentieth of a second's calls."""
        if self.pace is None:
            return None
        burst = max(1.0, self.pace / 20)
        return AsyncLimiter(burst, burst / self.pace)


@attrs.frozen(kw_only=True)
class Quota:
    """What one bucket can still give, as it stood when asked.

    Attributes:
        limit: Tokens it has in all: requests in any one period.
        free: Tokens that can be taken now.
        in_flight: Tokens taken by calls under way.
        waiting: Calls that wait for a token.
    """

    limit: int
    free: int
    in_flight: int
    waiting: int
    _returns: tuple[float, ...] = attrs.field(alias="returns", repr=False)
    _period: float = attrs.field(alias="period", repr=False)
    _pace: float | None = attrs.field(alias="pace", repr=False)
    _burst: float = attrs.field(alias="burst", repr=False)

    def seconds_for(self, requests: int) -> float:
        """Seconds until the last of those that wait and of `requests` more could start, if what is under way ends now.

        Raises:
            ConfigurationError: `requests` is not a whole number of at least 0.
        """
        check_whole("requests", requests, minimum=0)
        ahead = self.waiting + requests - 1
        if ahead < 0:
            return 0.0
        starts = self._paced(self._returns[: ahead + 1])
        slowest = 0.0 if self._pace is None else (ahead + 1 - self._burst) / self._pace
        return max(grant_time(starts, ahead, self._period), slowest)

    def _paced(self, times: tuple[float, ...]) -> list[float]:
        """When the first uses of the tokens could start: as they come home, and no faster than the pace."""
        starts = list(times)
        if self._pace is not None:
            burst = int(self._burst)
            for place in range(burst, len(starts)):
                starts[place] = max(starts[place], starts[place - burst] + burst / self._pace)
        return starts


def grant_time(times: tuple[float, ...] | list[float], ahead: int, period: float) -> float:
    """When the one behind `ahead` others gets a token, if each is used in no time and comes back one period later.

    `times`, ascending, are when the tokens come home; all of those that exist.
    """
    first, count = times[0], len(times)
    if times[-1] - first < period:
        return times[ahead % count] + ahead // count * period
    # A token that comes home late by whole periods misses as many rounds, and keeps its place in the ones after.
    missed = [int((time - first) // period) for time in times]
    rounds = 0
    while rounds < missed[-1]:
        present = bisect_right(missed, rounds)
        if ahead < present:
            break
        ahead -= present
        rounds += 1
    places = sorted(time - late * period for time, late in zip(times, missed, strict=True) if late <= rounds)
    return places[ahead % len(places)] + (rounds + ahead // len(places)) * period


class TokenBucket:
    """Tokens for the requests of one scope on one endpoint: one for each attempt that goes onto the wire.

    Whoever takes a token with `acquire` gives it back in exactly one of three ways: `ended`, `abandoned` or `unused`.
    First come, first served; nobody waits while a token is free, but for a pause.

    Args:
        requests: How many tokens there are.
        period: Seconds after its attempt's end that a token comes home.
        late: Seconds that a token stays out longer when its attempt was given up on and may still arrive.
    """

    __slots__ = (
        "_agreeing",
        "_epoch",
        "_free",
        "_home",
        "_in_flight",
        "_late",
        "_moment",
        "_paused",
        "_period",
        "_refused",
        "_requests",
        "_tickets",
        "_timer",
        "_waiters",
    )

    def __init__(self, requests: int, period: float, *, late: float = 0.0) -> None:
        self._requests = requests
        self._period = period
        self._late = late
        self._free = requests
        self._in_flight = 0
        self._home: list[float] = []  # when the tokens that are out, and not in flight, come home; ascending
        self._waiters: OrderedDict[asyncio.Future[None], int] = OrderedDict()  # each with its ticket, in order
        self._tickets = 0
        self._timer: asyncio.TimerHandle | None = None  # one for all waiters: a timer for each costs more the more there are
        self._refused: set[Hashable] = set()  # accounts refused since the last success
        self._moment = 0.0  # the moment that the first of these refusals named
        self._agreeing = True  # whether all of them named that moment
        self._paused: float | None = None  # until when, and then one at a time
        self._epoch = 0  # counts pauses

    @property
    def epoch(self) -> int:
        """What `paused_since` wants to know, to be read when a token was taken."""
        return self._epoch

    def try_acquire(self) -> bool:
        """Take a token if one is free and nobody waits. The uncontended way, kept short: every call goes it."""
        if self._free and not self._waiters and self._paused is None:
            self._free -= 1
            self._in_flight += 1
            return True
        return False

    async def acquire(self, deadline: float | None = None) -> None:
        """Take a token, waiting for one if need be.

        Raises:
            RateLimitWaitError: The token cannot come before `deadline`, a loop time; at once where that is certain.
        """
        if self.try_acquire():
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._collect(began)
        if not self._waiters and self._may_grant(began):
            self._take()
            return
        if deadline is not None:
            self._refuse_hopeless(began, began, deadline, len(self._waiters))
        await self._wait(loop, began, deadline)

    def ended(self) -> None:
        """The attempt has ended with an answer: the server counted it before now."""
        self._give_back(self._period)

    def abandoned(self) -> None:
        """The attempt was given up on (timeout, cancellation, reset); it may still arrive within the `late` seconds."""
        self._give_back(self._period + self._late)

    def unused(self) -> None:
        """The attempt certainly never left: its token is free at once."""
        self._in_flight -= 1
        self._free += 1
        self._wake()

    def succeeded(self) -> None:
        """An answer other than a refusal came: whatever was refused before, the bucket as a whole is not."""
        if not self._refused:
            return
        self._refused.clear()
        self._agreeing = True
        if self._paused is not None:
            self._paused = None
            self._wake()

    def refused(self, account: Hashable, wait: float | None) -> None:
        """An attempt for `account` was refused (429) and told to come back in `wait` seconds.

        One refused account holds back nobody else, because it may be hammered from elsewhere. When three or more are
        refused with no success between, and all were told the same moment, it is the window that they share: then the
        bucket pauses until then, and lets one attempt at a time through until a success ends it.
        """
        now = asyncio.get_running_loop().time()
        moment = math.nan if wait is None else now + wait
        if not self._refused:
            self._moment = moment
        # As the oldest requests age out the moment moves on; an unknown moment (nan) agrees with none.
        self._agreeing = self._agreeing and abs(moment - self._moment) <= _SAME_MOMENT
        self._refused.add(account)
        if self._paused is not None or (self._agreeing and len(self._refused) >= _REFUSALS_TO_PAUSE):
            self._paused = max(self._paused or 0.0, now if wait is None else moment)
            self._epoch += 1
            self._wake()

    def paused_since(self, epoch: int) -> bool:
        """Whether a pause began after the token of that `epoch` was taken: then it had better go back unused."""
        return self._paused is not None and epoch != self._epoch

    def idle(self, now: float) -> bool:
        """Whether it is as good as new, so that it can be forgotten."""
        self._collect(now)
        return self._free == self._requests and not self._waiters and self._paused is None

    def quota(self, pace: float | None, burst: float) -> Quota:
        """What it can still give."""
        now = asyncio.get_running_loop().time()
        self._collect(now)
        return Quota(
            limit=self._requests,
            free=self._free,
            in_flight=self._in_flight,
            waiting=len(self._waiters),
            returns=tuple(max(0.0, time - now) for time in self._returns(now)),
            period=self._period,
            pace=pace,
            burst=burst,
        )

    # --- inside

    def _take(self) -> None:
        self._free -= 1
        self._in_flight += 1

    def _give_back(self, after: float) -> None:
        self._in_flight -= 1
        insort(self._home, asyncio.get_running_loop().time() + after)
        if self._waiters:
            self._wake()

    def _collect(self, now: float) -> None:
        home = bisect_right(self._home, now)
        if home:
            del self._home[:home]
            self._free += home

    def _may_grant(self, now: float) -> bool:
        if self._paused is not None and (now < self._paused or self._in_flight):
            return False
        return self._free > 0

    def _wake(self) -> None:
        """Hand free tokens to those who wait, in order, and set the one timer for the next that comes home."""
        if not self._waiters:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._collect(now)
        while self._waiters and self._may_grant(now):
            waiter = self._waiters.popitem(last=False)[0]
            if not waiter.done():  # cancelled in this very turn of the loop
                self._take()
                waiter.set_result(None)
        self._set_timer(loop, now)

    def _set_timer(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        when = self._next_chance(now) if self._waiters else None
        if self._timer is not None:
            if self._timer.when() == when:
                return
            self._timer.cancel()
        self._timer = None if when is None else loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._wake()

    def _next_chance(self, now: float) -> float | None:
        # None: an attempt under way has to end first, and that will wake us.
        token = now if self._free else self._home[0] if self._home else None
        if token is None or self._paused is None:
            return token
        return None if self._in_flight else max(token, self._paused)

    async def _wait(self, loop: asyncio.AbstractEventLoop, began: float, deadline: float | None) -> None:
        waiter = loop.create_future()
        self._tickets += 1
        self._waiters[waiter] = self._tickets
        self._set_timer(loop, began)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter
        except TimeoutError:
            ahead = self._ahead_of(waiter)
            self._leave(waiter)
        except asyncio.CancelledError:
            self._leave(waiter)
            raise
        else:
            return
        self._raise_wait(began, loop.time(), ahead)

    def _ahead_of(self, waiter: asyncio.Future[None]) -> int:
        # By tickets, because counting would cost more the more there are; those who left in between are counted too.
        ticket = self._waiters.get(waiter)
        return 0 if ticket is None else ticket - next(iter(self._waiters.values()))

    def _leave(self, waiter: asyncio.Future[None]) -> None:
        """Give up waiting, and hand on a token that came in the same moment."""
        self._waiters.pop(waiter, None)
        if waiter.done() and not waiter.cancelled():
            self.unused()
        elif not self._waiters and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _returns(self, now: float) -> list[float]:
        """When each token comes home, ascending, taking what is under way to end now and a pause to end in time."""
        times = [now] * self._free + [now + self._period] * self._in_flight + self._home
        if self._paused is not None:
            times = [max(time, self._paused) for time in times]
        return sorted(times)

    def _grant_time(self, now: float, ahead: int) -> float:
        return grant_time(self._returns(now), ahead, self._period)

    def _refuse_hopeless(self, began: float, now: float, deadline: float, ahead: int) -> None:
        if self._grant_time(now, ahead) > deadline:
            self._raise_wait(began, now, ahead)

    def _raise_wait(self, began: float, now: float, ahead: int) -> None:
        wait = max(self._grant_time(now, ahead), now) - began
        raise RateLimitWaitError(
            f"the rate limit of {self._requests} requests would hold this call back for {wait:.1f} s, beyond its deadline; "
            "allow it more time, or ask for fewer keys at once",
            wait=wait,
        )


class Buckets:
    """One bucket for each endpoint and scope. Those that are as good as new are forgotten."""

    def __init__(self, limit: RateLimit, *, late: float) -> None:
        self._limit = limit
        self._period = limit.period * (1 + limit.margin)
        self._late = late
        self._buckets: OrderedDict[Hashable, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def bucket(self, path: str, key: ApiKey) -> TokenBucket:
        """The bucket that a request for `path` with `key` takes its token from."""
        place = self._place(path, key)
        bucket = self._buckets.get(place)
        if bucket is None:
            self._forget_idle()
            bucket = self._buckets[place] = TokenBucket(self._limit.requests, self._period, late=self._late)
        self._buckets.move_to_end(place)
        return bucket

    def _place(self, path: str, key: ApiKey | None) -> Hashable:
        if self._limit.scope == "client" or key is None:
            return path
        return path, key.digest if self._limit.scope == "key" else account_of(key)

    def quota(self, path: str, key: ApiKey | None) -> Quota:
        """What the bucket of `path` and `key` can still give.

        Raises:
            ConfigurationError: Each key or account has a bucket of its own and no key was named.
        """
        if key is None and self._limit.scope != "client":
            raise ConfigurationError(f"with scope {self._limit.scope!r} each has a quota of its own; name the key: quota(key=…)")
        bucket = self._buckets.get(self._place(path, key)) or TokenBucket(self._limit.requests, self._period)
        pace = self._limit.pace
        return bucket.quota(pace, 0.0 if pace is None else max(1.0, pace / 20))

    def _forget_idle(self) -> None:
        # Two looks for each new bucket are enough to keep only those of the last period; a busy one is looked at again later.
        now = asyncio.get_running_loop().time()
        for _ in range(min(2, len(self._buckets))):
            place, bucket = next(iter(self._buckets.items()))
            if bucket.idle(now):
                del self._buckets[place]
            else:
                self._buckets.move_to_end(place)


def account_of(key: ApiKey) -> Hashable:
    """What tells accounts apart: the declared account, else the key itself."""
    return key.digest if key.account is None else key.account
