"""`Pools`: the keys of checks that wait for their turn, as numbers without a call each."""

from __future__ import annotations

from collections.abc import KeysView

from crustcredits._cache.shared_call import Pool, SharedCall
from crustcredits._cache.store import CacheKey


class Pools:
    """The pools under way."""

    def __init__(self) -> None:
        self._pools: list[Pool] = []

    def __bool__(self) -> bool:
        """Whether any pool is under way."""
        return bool(self._pools)

    def add(self, pool: Pool) -> None:
        """Add a pool."""
        self._pools.append(pool)

    def remove(self, pool: Pool) -> bool:
        """Remove a pool. Returns whether it was here: it is not after the client was closed."""
        if pool not in self._pools:
            return False
        self._pools.remove(pool)
        return True

    def clear(self) -> list[Pool]:
        """Remove and return all pools, without their early calls."""
        pools, self._pools = self._pools, []
        for pool in pools:
            self.release_early(pool)
        return pools

    def holds(self, cache_key: CacheKey) -> bool:
        """Whether a key waits in a pool for its turn."""
        return self._find(cache_key) is not None

    def holds_among(self, path: str, digests: KeysView[bytes]) -> set[bytes]:
        """The digests among these whose keys wait in a pool for their turn."""
        return {
            digest
            for pool in self._pools
            if pool.path == path
            for digest in pool.digests & digests
            if pool.number_of(digest) is not None
        }

    def begin_early(self, cache_key: CacheKey) -> SharedCall | None:
        """Make the call of a key that waits in a pool, because another caller asks about it too.

        The call waits in the pool. None if no pool has the key.
        """
        found = self._find(cache_key)
        if found is None:
            return None
        pool, number = found
        call = pool.make(number)
        call.early, pool.early[number] = found, call
        return call

    def release_early(self, pool: Pool) -> list[SharedCall]:
        """Take all early calls out of a pool, and return them."""
        calls = list(pool.early.values())
        pool.early.clear()
        for call in calls:
            call.early = None
        return calls

    def leave_early(self, call: SharedCall) -> None:
        """Take a call out of the pool in which it waits, if it waits in one."""
        if call.early is None:
            return
        pool, number = call.early
        call.early = None
        del pool.early[number]
        pool.take_out(number)

    def _find(self, cache_key: CacheKey) -> tuple[Pool, int] | None:
        path, digest = cache_key
        for pool in self._pools:
            number = pool.number_of(digest) if pool.path == path else None
            if number is not None:
                return pool, number
        return None
