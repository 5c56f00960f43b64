"""`Buckets`: which token bucket a request takes its token from, and when one can be forgotten. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable

from crustcredits._errors import ConfigurationError
from crustcredits._keys import ApiKey
from crustcredits._limits import RateLimit, TokenBucket
from crustcredits._quota import Quota

# How many idle buckets are forgotten at one time, so that no call takes long for it.
_LOOKS = 1000


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
        place = self.place(path, key)
        if place is not path:
            self._forget_idle()
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = TokenBucket(self._limit.requests, self._period, late=self._late)
        self._buckets.move_to_end(place)
        return bucket

    def place(self, path: str, key: ApiKey | None) -> Hashable:
        """What is equal for requests that share a bucket."""
        if self._limit.scope == "client" or key is None:
            return path
        return path, key.digest if self._limit.scope == "key" else account_of(key)

    def quota(self, path: str, key: ApiKey | None, *, pacing: int, refreshing: int) -> Quota:
        """What the bucket of `path` and `key` can still give, while `pacing` calls wait for the pace.

        Raises:
            ConfigurationError: Each key or account has a bucket of its own and no key was named.
        """
        if key is None and self._limit.scope != "client":
            raise ConfigurationError(f"with scope {self._limit.scope!r} each has a quota of its own; name the key: quota(key=…)")
        bucket = self._buckets.get(self.place(path, key)) or TokenBucket(self._limit.requests, self._period)
        return bucket.quota(self._limit.pace, self._limit.burst, pacing, refreshing)

    def _forget_idle(self) -> None:
        # The least recently used stand first. A busy one is looked at again later; a crowd of idle ones goes bit by bit.
        now, busy = asyncio.get_running_loop().time(), 0
        for _ in range(min(_LOOKS, len(self._buckets))):
            place, bucket = next(iter(self._buckets.items()))
            if bucket.idle(now):
                del self._buckets[place]
                continue
            self._buckets.move_to_end(place)
            busy += 1
            if busy == 2:
                return


def account_of(key: ApiKey) -> Hashable:
    """What tells accounts apart: the declared account, else the key itself."""
    return key.digest if key.account is None else key.account
