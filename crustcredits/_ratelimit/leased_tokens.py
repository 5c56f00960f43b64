"""`LeasedTokens`: the tokens of one scope where the count is in Redis.

A `Bucket` whose tokens have to be sent for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import Protocol, cast

from crustcredits._errors import ConfigurationError


class SharedTokens(Protocol):
    """The tokens of one bucket, as one process knows them."""

    @property
    def limit(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def share(self) -> int: ...
    @property
    def degraded(self) -> bool: ...
    @property
    def available(self) -> int: ...
    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None: ...
    def resize(self, limit: int) -> None: ...
    def is_settling(self) -> bool: ...
    def is_idle(self) -> bool: ...
    def collect(self, now: float) -> None: ...
    def next_home(self, nth: int) -> float | None: ...
    def need(self, count: int, kept: int) -> None: ...
    def start(self, now: float) -> int: ...
    def own(self, mark: int) -> int: ...
    def end(self, when: float) -> None: ...
    def unsend(self) -> None: ...
    def returns(self, now: float, period: float) -> list[float]: ...


class TokenStore(Protocol):
    """Where several processes count their tokens together.

    A client asks it for each bucket anew, and forgets idle ones.
    """

    def open(self, *, period: float, late: float, pace: float | None) -> None:
        """A client begins to use it.

        Its tokens return `period` seconds after their request's end, no request takes longer than
        `late`, and `pace` of them begin in a second.

        Raises:
            ConfigurationError: It cannot serve this client.
        """
        ...

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> SharedTokens:
        """The `limit` tokens of one bucket: of all requests to `path`, or of those of one account, or of one key by its digest."""
        ...

    async def close(self) -> None:
        """The client is closed: whatever was opened for it has to be closed too."""
        ...


def check_store(store: object) -> TokenStore | None:
    """It, if it is one, or None. Raises `ConfigurationError` otherwise."""
    methods = (getattr(store, name, None) for name in ("open", "tokens", "close"))
    if store is not None and (isinstance(store, type) or not all(map(callable, methods))):
        kind = (
            f"the class {store.__name__}"
            if isinstance(store, type)
            else f"a {type(store).__name__}"
        )
        raise ConfigurationError(f"buckets is RedisBuckets(url), not {kind}")
    return cast("TokenStore | None", store)


class LeasedTokens:
    """A `Bucket` of tokens that other processes take too.

    It has a stock of tokens in hand, no larger than what the pace can use in a moment, and sends
    for more when somebody waits. Those that are not used go back after a second.

    Args:
        tokens: What this process knows of them.
        wake: Called when some have come.
        fail: Called when none can be had, because the count is out of reach.
    """

    __slots__ = ("_ends", "_tokens", "next_refresh")

    is_shared = True

    def __init__(
        self, tokens: SharedTokens, wake: Callable[[], None], fail: Callable[[], None]
    ) -> None:
        self._tokens = tokens
        self.next_refresh = 0.0
        self._ends: list[
            float
        ] = []  # when the tokens of ended requests return, as far as this process knows; ascending
        tokens.bind(wake, fail)

    @property
    def limit(self) -> int:
        """How many tokens there are, in all processes together."""
        return self._tokens.limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._tokens.resize(limit)

    @property
    def on_wire(self) -> int:
        """Tokens of this process's requests that have not ended."""
        return self._tokens.in_flight

    @property
    def is_degraded(self) -> bool:
        """Whether this process counts by itself."""
        return self._tokens.degraded

    @property
    def is_settling(self) -> bool:
        """Whether none is out, and something is still to be said of them."""
        return self._tokens.is_settling()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is to be said of them."""
        return self._tokens.is_idle()

    def room(self, now: float, kept: int) -> int:
        """Tokens in hand: what is kept is left with Redis.

        Alone, those of this process's share but for its part of `kept`.
        """
        self._tokens.collect(now)
        if self._ends and self._ends[0] <= now:
            del self._ends[: bisect_right(self._ends, now)]
        if not self._tokens.degraded:
            return self._tokens.free
        share = self._tokens.share
        return self._tokens.free - min(kept * share // self.limit, max(0, share - 1))

    def room_at(self, now: float, kept: int) -> float | None:
        """When there is room; None while it is sent for."""
        return self._tokens.next_home(max(1, 1 - self.room(now, kept)))

    def want(self, count: int, kept: int) -> None:
        """So many calls wait, and leave `kept` alone: tokens are sent for.

        With 0 nobody waits any more.
        """
        self._tokens.need(count, kept)

    def take(self, now: float) -> int:
        """As for `TokenBucket`."""
        return self._tokens.start(now)

    def own(self, mark: int) -> int:
        """As for `TokenBucket`."""
        return self._tokens.own(mark)

    def return_at(self, when: float) -> None:
        """As for `TokenBucket`."""
        self._tokens.end(when)
        insort(self._ends, when)

    def returning(self, since: float, until: float) -> int:
        """As for `TokenBucket`, of this process's requests."""
        del self._ends[: bisect_left(self._ends, since)]
        return bisect_right(self._ends, until)

    def put_back(self) -> None:
        """As for `TokenBucket`; another process may take it."""
        self._tokens.unsend()

    def available(self, now: float) -> int:
        """Tokens that could be had now, as far as is known."""
        self._tokens.collect(now)
        return self._tokens.available

    def returns(self, now: float, period: float) -> list[float]:
        """An estimate: what other processes may take again is not known."""
        self._tokens.collect(now)
        return self._tokens.returns(now, period)
