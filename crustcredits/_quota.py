"""`Quota`: what a bucket can still give, as a value, and the arithmetic of when its tokens come. It knows no clock."""

from __future__ import annotations

from bisect import bisect_right

import attrs

from crustcredits._checks import check_whole, hides_arguments


def _all_taken_now(quota: Quota) -> tuple[float, ...]:
    return (0.0,) * quota.free + (quota._period,) * (quota.limit - quota.free)  # noqa: SLF001  # a default of this class


@attrs.frozen(kw_only=True)
class Quota:
    """What one bucket can still give, as it stood when asked. In tests `Quota(limit=300, free=20)` makes one by hand.

    Attributes:
        limit: Tokens it has in all: requests in any one period.
        free: Tokens that can be taken now.
        in_flight: Tokens taken by calls under way.
        waiting: Calls that wait for a token.
        refreshing: Calls that only refresh an answer that is kept, waiting or under way.
        debt: Tokens held back because others spend the quota too, by the server's count.
        paused: Seconds until a pause ends, in which no call has its turn because accounts in a row were refused; 0 while a
            probe is to show that it is over, None without a pause.
        alone: Whether the count that several processes share is out of reach, so that this one counts by itself.
        probing: Whether one call has gone ahead of others to find out whether a pause or a debt is over.
    """

    limit: int
    free: int
    in_flight: int = 0
    waiting: int = 0
    refreshing: int = 0
    debt: int = 0
    paused: float | None = None
    probing: bool = False
    alone: bool = False
    _period: float = attrs.field(alias="period", default=60.0, repr=False)
    # When the tokens come home. One made by hand is as if those that are not free had all been taken just now.
    _returns: tuple[float, ...] = attrs.field(alias="returns", default=attrs.Factory(_all_taken_now, takes_self=True), repr=False)
    _pace: float | None = attrs.field(alias="pace", default=None, repr=False)
    _burst: float = attrs.field(alias="burst", default=0.0, repr=False)
    _pacing: int = attrs.field(alias="pacing", default=0, repr=False)

    @hides_arguments
    def seconds_for(self, requests: int) -> float:
        """Seconds until the last of those that wait and of `requests` more could start, if what is under way ends now.

        Raises:
            ConfigurationError: `requests` is not a whole number of at least 0.
        """
        check_whole("requests", requests, minimum=0)
        ahead = self.waiting + requests - 1
        if ahead < 0:
            return 0.0 if self._pace is None else self._pacing / self._pace
        starts = self._paced(self._returns[: ahead + 1])
        slowest = 0.0 if self._pace is None else (self._pacing + ahead + 1 - self._burst) / self._pace
        return max(grant_time(starts, ahead, self._period), slowest)

    def _paced(self, times: tuple[float, ...]) -> list[float]:
        """When the first uses of the tokens could start: as they come home, and no faster than the pace."""
        starts = list(times)
        if self._pace is not None:
            burst, first = int(self._burst), self._pacing / self._pace
            starts[:burst] = [max(time, first) for time in starts[:burst]]
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
