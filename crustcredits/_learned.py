"""`LearnedLimits`: what the API has said of its limits, apart from the buckets, which are forgotten when they are idle."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Hashable

import attrs

from crustcredits._limits import RateLimit, TokenBucket

_log = logging.getLogger("crustcredits")

# So many limits other than the configured one are remembered; the least recently heard go first.
_ROOM = 10_000
# No plan comes near this many requests in a period; what says so is no limit.
_MOST = 1_000_000


@attrs.frozen
class _Heard:
    limit: int
    at: float


class LearnedLimits:
    """The limit of each bucket: the configured one, until the API says another in `x-ratelimit-limit`.

    A lower one is followed at once. A higher one, up to the configured one or with `follow="both"` beyond it, when no lower
    one was heard of the same bucket for a period: keys of several plans may share a bucket. Where several accounts draw on a
    bucket of which it is not known that the server counts them together, the last few that were heard have to agree:
    one key of a smaller plan is no reason to hold back the others.
    """

    def __init__(self, limit: RateLimit) -> None:
        self.configured = limit.requests
        self._most = _MOST if limit.follow == "both" else limit.requests
        self._period = limit.period
        self._followed = self.configured  # as the log was told
        self._heard: OrderedDict[Hashable, _Heard] = OrderedDict()
        self._voices: dict[Hashable, dict[Hashable, int]] = {}  # by place and account, the last ones

    def of(self, place: Hashable) -> int:
        """The limit of the bucket in that place."""
        heard = self._heard.get(place)
        return self.configured if heard is None else heard.limit

    def hear(self, bucket: TokenBucket, account: Hashable, limit: int, now: float) -> bool:
        """An answer for `account` said that limit. Returns whether it speaks of the one that `bucket`, of its, now keeps.

        A higher limit than may be followed is taken for another one.
        """
        if not 1 <= limit <= self._most:
            return False
        place = bucket.place
        if bucket.voices > 1:
            agreed = self._agreed(place, account, limit, bucket.voices)
            if agreed != self.of(place):
                self._follow(bucket, agreed, now)
        elif limit != self.configured or self._heard:
            before = self._heard.get(place)
            if limit <= self.of(place) or now - (-math.inf if before is None else before.at) >= self._period:
                self._follow(bucket, limit, now)
        return limit == self.of(place)

    def _agreed(self, place: Hashable, account: Hashable, limit: int, voices: int) -> int:
        """What the last accounts were told, or of that what is nearest to the configured limit."""
        told = self._voices.setdefault(place, {})
        told.pop(account, None)
        told[account] = limit
        if len(told) > voices:
            del told[next(iter(told))]
        if len(told) < voices:
            return self.configured
        return min(max(told.values()), max(min(told.values()), self.configured))

    def _follow(self, bucket: TokenBucket, limit: int, now: float) -> None:
        place = bucket.place
        if limit != self.of(place) and limit != self._followed:
            _log.info("the API says that its limit is %d requests, not %d; it is followed", limit, self.of(place))
            self._followed = limit
        self._heard[place] = _Heard(limit, now)
        self._heard.move_to_end(place)
        if limit == self.configured == self._most:
            del self._heard[place]
        elif len(self._heard) > _ROOM:
            self._heard.popitem(last=False)
        bucket.follow(limit)
