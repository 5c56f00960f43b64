"""`Buckets`: which token buckets a request takes its tokens from, and when one can be forgotten. It knows no HTTP."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TypeAlias

from crustcredits._claim import Claim
from crustcredits._errors import ConfigurationError
from crustcredits._keys import ApiKey
from crustcredits._learned import LearnedLimits
from crustcredits._limits import RateLimit, TokenBucket
from crustcredits._proof import Witnesses
from crustcredits._quota import Quota
from crustcredits._tokens import TokenStore

# What tells accounts apart: a declared name, or the digest of a key.
Account: TypeAlias = str | bytes
# All requests for a path, or those of one account or key.
Place: TypeAlias = str | tuple[str, Account]

# How many idle buckets are forgotten at one time, so that no call takes long for it.
_LOOKS = 1000
# So often: of all claims, one in so many looks for them.
_CLAIMS = 8
# Accounts that have to agree before what others seem to spend holds back all accounts of a bucket that may not be one at all.
_VOICES = 3


class Buckets:
    """One bucket for each endpoint and scope. Those that are as good as new are forgotten."""

    def __init__(self, limit: RateLimit, store: TokenStore, *, late: float) -> None:
        self._limit = limit
        self._period = limit.period * (1 + limit.margin)
        self._late = late
        self._store = store
        self._limits = LearnedLimits(limit)
        self._buckets: OrderedDict[Place, TokenBucket] = OrderedDict()
        self._claims = 0
        self._witnesses: dict[str, Witnesses] = {}
        store.open(period=self._period, late=late, pace=limit.pace)

    def __len__(self) -> int:
        return len(self._buckets)

    def claim(self, path: str, key: ApiKey) -> Claim:
        """What an attempt for `path` with `key` needs: a token of each bucket that may count it."""
        # Before any is looked up: what is handed out here is used at once, and not idle then.
        self._claims += 1
        if self._claims >= _CLAIMS:
            self._claims = 0
            self._forget_idle()
        account = account_of(key)
        if self._limit.scope != "auto":
            return Claim(account, (self._bucket(self.place(path, key)),), self._limits)
        # The account's own first: whoever waits for that holds back nobody else.
        own, common = self._bucket((path, account)), self._bucket(path)
        witnesses = self._witnesses.get(path)
        if witnesses is None:
            window = self._limit.period * (1 - self._limit.margin)
            witnesses = self._witnesses[path] = Witnesses(window, self._late)
        return Claim(account, (own, common), self._limits, witnesses)

    def place(self, path: str, key: ApiKey | None) -> Place:
        """What is equal for requests that share a bucket from the outset."""
        if self._limit.scope in {"auto", "client"} or key is None:
            return path
        return path, key.digest if self._limit.scope == "key" else account_of(key)

    def quota(self, path: str, key: ApiKey | None, *, pacing: int, refreshing: int) -> Quota:
        """What the bucket of `path` and `key` can still give, while `pacing` calls wait for the pace.

        Raises:
            ConfigurationError: Each key or account has a bucket of its own and no key was named.
        """
        scope = self._limit.scope
        if key is None and scope in {"account", "key"}:
            raise ConfigurationError(f"with scope {scope!r} each has a quota of its own; name the key: quota(key=…)")
        place = (path, account_of(key)) if scope == "auto" and key is not None else self.place(path, key)
        bucket = self._buckets.get(place) or TokenBucket(self._limits.of(place), self._period)
        return bucket.quota(self._limit.pace, self._limit.burst, pacing, refreshing)

    def _bucket(self, place: Place) -> TokenBucket:
        bucket = self._buckets.get(place)
        if bucket is None:
            bucket = self._buckets[place] = self._make(place)
        else:
            self._buckets.move_to_end(place)
        return bucket

    def _make(self, place: Place) -> TokenBucket:
        requests = self._limits.of(place)
        path, whose = (place, None) if isinstance(place, str) else place
        voices = _VOICES if self._limit.scope == "auto" and whose is None else 1
        tokens = self._store.tokens(path, whose, requests)
        return TokenBucket(requests, self._period, late=self._late, tokens=tokens, voices=voices, place=place)

    def _forget_idle(self) -> None:
        # The least recently used stand first. A busy one is looked at again later; a crowd of idle ones goes bit by bit.
        now, busy = asyncio.get_running_loop().time(), 0
        for _ in range(min(_LOOKS, len(self._buckets))):
            place, bucket = next(iter(self._buckets.items()))
            # Somebody may hold on to what stands for a path as a whole while it is idle; there are only two of these.
            if not isinstance(place, str) and bucket.idle(now):
                del self._buckets[place]
                continue
            self._buckets.move_to_end(place)
            busy += 1
            if busy == 2:
                return


def account_of(key: ApiKey) -> Account:
    """What tells accounts apart: the declared account, else the key itself."""
    return key.digest if key.account is None else key.account
