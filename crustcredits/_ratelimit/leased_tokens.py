"""`LeasedTokens`: the tokens of one scope where the count is in Redis.

A `Bucket` that leases its tokens from Redis.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable
from typing import Literal, Protocol, TypeAlias, cast

from crustcredits._errors import ConfigurationError
from crustcredits._validation import kind_of

CountedScope: TypeAlias = Literal["auto", "client", "account"]


class SharedTokens(Protocol):
    """The tokens of one bucket, as one process knows them.

    The protocol has more than 20 members because each is one fact that `LeasedTokens` reads, or one
    event that it reports.
    """

    @property
    def limit(self) -> int: ...
    def free(self, kept: int) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def share(self) -> int: ...
    @property
    def cut_off(self) -> bool: ...
    @property
    def degraded(self) -> bool: ...
    @property
    def available(self) -> int: ...
    def bind(self, wake: Callable[[], None], fail: Callable[[], None]) -> None: ...
    def resize(self, limit: int) -> None: ...
    def is_settling(self) -> bool: ...
    def is_idle(self) -> bool: ...
    def collect(self, now: float) -> None: ...
    def next_home(self, missing: int) -> float | None: ...
    def need(self, count: int, kept: int, kept_within: int = 0) -> None: ...
    def ask_later(self) -> None: ...
    def short_until(self, kept: int) -> float: ...
    def start(self, now: float, kept: int) -> int: ...
    def own(self, mark: int) -> int: ...
    def end(self, when: float) -> None: ...
    def unsend(self) -> None: ...
    def returns(self, now: float, period: float) -> list[float]: ...


class GateTokens(SharedTokens, Protocol):
    """The common tokens of permits that take one of an account too."""

    def room_to_ask(self, now: float, kept: int) -> int: ...
    def may_ask(self, count: int) -> bool: ...


class Backend(Protocol):
    """Where several processes count their tokens together.

    A client asks for each bucket anew, and forgets idle buckets. A backend may also share answers:
    then its attribute `answers` is an `AnswerStore` of the cache.
    """

    def open(self, *, period: float, late: float, pace: float | None, scope: CountedScope) -> None:
        """Register a client.

        Its tokens return `period` seconds after the end of their request. No request takes longer
        than `late` seconds, and `pace` requests start per second. The scope says which tokens a
        request takes: with `"auto"` one of its account and a common one.

        Raises:
            ConfigurationError: The backend cannot serve this client.
        """
        ...

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> SharedTokens:
        """The `limit` tokens of one bucket.

        It counts all requests to `path`, those of one account, or those of one key by its digest.
        """
        ...

    def gate(self, path: str, limit: int) -> GateTokens:
        """The `limit` common tokens of a path, for permits that take a token of an account too.

        They are made before the tokens of the accounts.
        """
        ...

    async def start(self) -> None:
        """Look at the place of the count when the client opens.

        Raises:
            ConfigurationError: It cannot count, and this does not heal.
        """
        ...

    async def close(self) -> None:
        """Close all that was opened for the client, which is closed now."""
        ...


def check_backend(backend: object) -> Backend | None:
    """Return the backend, or None; raise `ConfigurationError` for any other object."""
    methods = (
        getattr(backend, name, None) for name in ("open", "start", "tokens", "gate", "close")
    )
    if backend is not None and (isinstance(backend, type) or not all(map(callable, methods))):
        kind = f"the class {backend.__name__}" if isinstance(backend, type) else kind_of(backend)
        raise ConfigurationError(
            f"backend is {kind}, which cannot count tokens; pass a RedisBackend"
        )
    return cast("Backend | None", backend)


class LeasedTokens:
    """A `Bucket` of tokens that other processes take too.

    It leases a small stock of tokens, no larger than the pace can use in a moment, and more when
    calls wait. Unused tokens go back after a second. The class has more than 20 methods because
    `Bucket` asks for 18; most of them are one line long.

    Args:
        tokens: The tokens as this process knows them.
        wake: Called when tokens have come.
        fail: Called when no token can be leased, because Redis is out of reach.

    Attributes:
        kept_within: How many of the tokens that come with these the waiting calls leave.
    """

    __slots__ = ("_ends", "_tokens", "kept_within", "next_refresh")

    is_shared = True

    def __init__(
        self, tokens: SharedTokens, wake: Callable[[], None], fail: Callable[[], None]
    ) -> None:
        self._tokens = tokens
        self.kept_within = 0
        self.next_refresh = 0.0
        # When the tokens of ended requests return, as far as this process knows; ascending.
        self._ends: list[float] = []
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
    def is_cut_off(self) -> bool:
        """Whether the last message to Redis failed."""
        return self._tokens.cut_off

    @property
    def is_degraded(self) -> bool:
        """Whether this process counts in degraded mode."""
        return self._tokens.degraded

    @property
    def is_settling(self) -> bool:
        """Whether no token is out, and Redis has not been sent all reports of them."""
        return self._tokens.is_settling()

    @property
    def is_whole(self) -> bool:
        """Whether no token is out and no report of them is due."""
        return self._tokens.is_idle()

    def room(self, now: float, kept: int) -> int:
        """Leased tokens that calls may take now that leave `kept` tokens.

        In degraded mode, the tokens of this process's share without its part of `kept`.
        """
        self._tokens.collect(now)
        if self._ends and self._ends[0] <= now:
            del self._ends[: bisect_right(self._ends, now)]
        if not self._tokens.degraded:
            return self._tokens.free(kept)
        share = self._tokens.share
        return self._tokens.free(0) - min(kept * share // self.limit, max(0, share - 1))

    def room_at(self, now: float, kept: int) -> float | None:
        """When there is room; None while a lease is requested."""
        return self._tokens.next_home(max(1, 1 - self.room(now, kept)))

    def want(self, count: int, kept: int) -> None:
        """Lease tokens for `count` calls that wait, which leave `kept` tokens.

        With 0 no call waits any more.
        """
        self._tokens.need(count, kept, self.kept_within)

    def ask_later(self) -> None:
        """Lease nothing for now: the calls wait for the common tokens, and will ask again."""
        self._tokens.ask_later()

    def is_short(self, now: float, kept: int) -> bool:
        """Whether Redis has no token now for calls that leave `kept` tokens."""
        return not self._tokens.degraded and now < self._tokens.short_until(kept)

    def short_until(self, kept: int) -> float:
        """Until when Redis has no token for calls that leave `kept` tokens, as far as known."""
        return self._tokens.short_until(kept)

    def take(self, now: float, kept: int = 0) -> int:
        """As for `TokenBucket`."""
        return self._tokens.start(now, kept)

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
        """As for `TokenBucket`; another process may take the token."""
        self._tokens.unsend()

    def available(self, now: float) -> int:
        """Tokens that could be taken now, as far as is known."""
        self._tokens.collect(now)
        return self._tokens.available

    def returns(self, now: float, period: float) -> list[float]:
        """An estimate, because the next takers in other processes are unknown."""
        self._tokens.collect(now)
        return self._tokens.returns(now, period)


class PermitGate(LeasedTokens):
    """The common tokens where each of them comes together with one of an account.

    Its room is the number of calls that may ask for a permit now. A call asks when it begins to
    wait for its account.
    """

    __slots__ = ("_gate",)

    def __init__(
        self, tokens: GateTokens, wake: Callable[[], None], fail: Callable[[], None]
    ) -> None:
        super().__init__(tokens, wake, fail)
        self._gate = tokens

    def room(self, now: float, kept: int) -> int:
        """How many calls that leave `kept` tokens may ask for a permit.

        In degraded mode as for `LeasedTokens`.
        """
        room = super().room(now, kept)
        return room if self._tokens.degraded else self._gate.room_to_ask(now, kept)

    def room_at(self, now: float, kept: int) -> float | None:
        """When calls may ask again; None while answers to others are awaited."""
        if self._tokens.degraded:
            return super().room_at(now, kept)
        until = self._tokens.short_until(kept)
        return until if until > now else None

    def is_open(self, count: int) -> bool:
        """Whether `count` waiting calls may ask now, or a group of them."""
        return self._gate.may_ask(count)
