"""`Quota`: the tokens that a bucket can still give, as a value, and when its tokens return.

It knows no clock.
"""

from __future__ import annotations

import attrs

from crustcredits._validation import check_whole, hides_arguments

# Most starts at one moment.
_BURST = 5
# Seconds after which a request without an answer no longer holds a connection slot, in a quota made
# by hand.
_HANGS_AFTER = 0.4


def _all_taken_now(quota: Quota) -> tuple[float, ...]:
    return (0.0,) * quota.free + (quota._period,) * (quota.limit - quota.free)  # noqa: SLF001  # a default of this class


@attrs.frozen(kw_only=True)
class Quota:
    """The tokens that one bucket could still give at the time of the call.

    In tests `Quota(limit=300, free=20)` makes one by hand.

    Attributes:
        limit: Tokens in all, at least 1: requests in any one period.
        free: Tokens that can be taken now.
        in_flight: Tokens of requests on the wire.
        waiting: Foreground calls that wait for their turn.
        refreshing: Background calls, which only refresh a cache entry, waiting or under way.
        cooldown: Seconds until a cooldown ends, in which no call starts because accounts in a row
            were refused; 0 while a probe tests whether it is over, None without a cooldown.
        probing: Whether a probe is under way that tests whether the server refuses all.
        degraded: Whether this process counts in degraded mode, because the count that several
            processes share is out of reach.
        cut_off: Whether its last message to that count had no answer. Calls wait or fail then, or
            degraded mode begins soon.
    """

    limit: int
    free: int
    in_flight: int = 0
    waiting: int = 0
    refreshing: int = 0
    cooldown: float | None = None
    probing: bool = False
    degraded: bool = False
    cut_off: bool = False
    _period: float = attrs.field(alias="period", default=60.0, repr=False)
    # Seconds until each token can be taken. In a quota made by hand all tokens that are not free
    # were taken just now.
    _returns: tuple[float, ...] = attrs.field(
        alias="returns", default=attrs.Factory(_all_taken_now, takes_self=True), repr=False
    )
    _pace: float | None = attrs.field(alias="pace", default=None, repr=False)
    _slots: int = attrs.field(alias="slots", default=32, repr=False)
    # Slots that are taken now, where the estimate does not assume that these requests end now.
    _taken: int = attrs.field(alias="taken", default=0, repr=False)
    _answer_seconds: float = attrs.field(alias="answer_seconds", default=0.0, repr=False)
    # Seconds after which a request without an answer no longer holds its slot; equal quotas have
    # equal answer times, on which it depends.
    _patience: float = attrs.field(alias="patience", default=_HANGS_AFTER, eq=False, repr=False)
    # Requests of other clients in the last count.
    _others: int = attrs.field(alias="others", default=0, repr=False)
    _singles: int = attrs.field(alias="singles", default=0, repr=False)  # single calls that wait
    _kept: int = attrs.field(alias="kept", default=0, repr=False)  # the reserve for single calls
    # Lengths of the other flows that wait.
    _lengths: tuple[int, ...] = attrs.field(alias="lengths", default=(), repr=False)

    @hides_arguments
    def seconds_for(self, requests: int) -> float:
        """An estimate: seconds until the last of `requests` more keys of a check starts.

        They start after the single calls that wait, take turns with other checks and streams, and
        leave the reserve (`RateLimit.reserve`) to single calls. The estimate assumes that the
        requests under way end now, and that other clients spend as much as the server's last count
        shows.

        Raises:
            ConfigurationError: `requests` is not a whole number of at least 0.
        """
        check_whole("requests", requests, minimum=0)
        return (
            self.start_of(
                requests + self._singles + sum(min(requests, length) for length in self._lengths)
            )
            if requests
            else 0.0
        )

    def start_of(self, count: int) -> float:
        """An estimate: seconds until the last of the next `count` calls starts, of all callers."""
        if not count:
            return 0.0
        # In degraded mode the share of this process may be smaller than the reserve.
        kept = min(self._kept, len(self._returns) - 1)
        times = [_nth(self._returns[kept:], count - 1, self._period), self.cooldown or 0.0]
        if self._pace is not None:
            times.append((count - min(_BURST, max(1.0, self._pace))) / self._pace)
        answer = min(self._answer_seconds, self._patience)
        times.append((count + self._taken - self._slots) * answer / self._slots)
        if self._others:
            missing = count - max(0, self.free - self._kept)
            times.append(missing * self._period / max(1, self.limit - self._others))
        return max(times)


def _nth(returns: tuple[float, ...], index: int, period: float) -> float:
    """When the call at this index gets a token, if each token is used at once.

    A used token returns one period later.
    """
    rounds, index = divmod(index, len(returns))
    return returns[index] + rounds * period
