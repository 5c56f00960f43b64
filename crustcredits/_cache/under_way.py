"""`UnderWay`: the calls under way, by key and endpoint."""

from __future__ import annotations

from collections.abc import KeysView

from crustcredits._cache.pools import Pools
from crustcredits._cache.shared_call import SharedCall
from crustcredits._cache.store import CacheKey


class UnderWay:
    """The calls under way: for each key and endpoint one that further callers join.

    An outdated call continues for its own waiters, and no new waiter joins it: it was on the wire
    when its cache entry was invalidated.

    Args:
        pools: The keys that wait for their turn without a call.
    """

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._joinable: dict[CacheKey, SharedCall] = {}
        self._outdated: set[SharedCall] = set()

    def __contains__(self, call: SharedCall) -> bool:
        """Whether a call has not ended."""
        return self._joinable.get(call.cache_key) is call or call in self._outdated

    def all(self) -> list[SharedCall]:
        """The calls, also outdated ones."""
        return [*self._joinable.values(), *self._outdated]

    def find(self, cache_key: CacheKey) -> SharedCall | None:
        """The call for this key that further callers join, or None."""
        return self._joinable.get(cache_key)

    def add(self, call: SharedCall) -> None:
        """Let further callers join a call."""
        self._joinable[call.cache_key] = call

    def remove(self, call: SharedCall) -> bool:
        """Forget a call. Returns whether further callers would have joined it."""
        if call in self._outdated:
            self._outdated.remove(call)
            return False
        del self._joinable[call.cache_key]
        return True

    def outdate(self, digest: bytes | None) -> list[CacheKey]:
        """Let no further caller join a request on the wire for a key, or for any key.

        Returns the cache keys of these calls.
        """
        outdated = [
            cache_key
            for cache_key, call in self._joinable.items()
            if call.task is not None and digest in {None, cache_key[1]}
        ]
        self._outdated.update(map(self._joinable.pop, outdated))
        return outdated

    @property
    def is_idle(self) -> bool:
        """Whether a caller can join no call, and no pool is under way."""
        return not self._joinable and not self._pools

    def is_asked(self, cache_key: CacheKey) -> bool:
        """Whether a call for this key is under way, or waits for its turn in a pool."""
        return cache_key in self._joinable or (bool(self._pools) and self._pools.holds(cache_key))

    def is_on_wire(self, cache_key: CacheKey) -> bool:
        """Whether a request for this key is on the wire, which further callers join."""
        call = self._joinable.get(cache_key)
        return call is not None and call.task is not None

    def asked_among(self, path: str, digests: KeysView[bytes]) -> set[bytes]:
        """The digests among these for which `is_asked` holds."""
        asked = self._pools.holds_among(path, digests) if self._pools else set[bytes]()
        if len(digests) < len(self._joinable):
            asked.update(digest for digest in digests if (path, digest) in self._joinable)
        else:
            asked.update(
                digest for each, digest in self._joinable if each == path and digest in digests
            )
        return asked
