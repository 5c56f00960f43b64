"""`RedisBackend`: one quota for many processes, counted in Redis 6.2 or later, or Valkey."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias
from urllib.parse import parse_qs

from redis import Redis as SyncRedis
from redis import RedisCluster as SyncRedisCluster
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from crustcredits._cache.answer_store import AnswerStore
from crustcredits._errors import ConfigurationError
from crustcredits._ratelimit.leased_tokens import CountedScope
from crustcredits._validation import (
    Seconds,
    check_kind,
    check_number,
    hides_arguments,
    is_plain_function,
    kind_of,
)
from crustcredits._validation import (
    seconds as in_seconds,
)
from crustcredits.redis.coordinator import Coordinator, hidden_name
from crustcredits.redis.lease import Lease
from crustcredits.redis.shared_tokens import GateTokens, SharedTokens, Terms

if TYPE_CHECKING:
    Client: TypeAlias = "Redis | RedisCluster"

_MODES = ("local", "strict", "raise")

# Least and most seconds of a leader's lease.
_SHORTEST, _LONGEST = 0.01, 86_400.0


class RedisBackend:
    """Processes with the same prefix on the same Redis share one count.

    Use a backend for one client at a time: `CreditsClient(backend=RedisBackend("redis://…",
    fallback_share=1 / 4))`. While all processes reach Redis, or none does, they together send no
    more requests than the limit in any period. If a process dies, its tokens return after one
    lease: one period, two request timeouts and one second.

    Args:
        url_or_client: `redis://…`, `rediss://…` or `unix://…`; or a client of `redis.asyncio`, such
            as `RedisCluster`. The backend does not close a client that you pass.
        prefix: Start of every Redis key name. Use one for each quota, and another for each base
            URL. In a cluster, all names of a prefix are in one slot.
        on_outage: What a process does after Redis has not answered for 2.5 seconds. The log reports
            the start and the end of an outage once each; recovery is automatic.
            `"local"`: it counts by itself (degraded mode). For one lease it reuses only tokens that
            it already had, no more than its share. Then it uses its whole share. If other processes
            still reach Redis, the limit can be exceeded: by the requests that this process had sent
            within the last period, and after a lease by its share.
            `"strict"`: it sends nothing for one lease and seven seconds. Then it uses its share.
            The limit is never exceeded: the processes with Redis use only the sum of their own
            shares.
            `"raise"`: calls that need a token fail with `BackendUnavailableError`.
        fallback_share: The part of the limit that this process may use while Redis is out of reach,
            above 0 and at most 1. The shares of all processes must add up to no more than 1. With
            `"local"` it allows at least one request. Required for `"local"` and `"strict"`: divide
            1 by the number of your processes.
        share_answers: Whether the processes also share answers: one of them asks the API, and the
            others get its answer, each within its own `max_age`, `stale_while_revalidate`,
            `stale_if_error` and `max_error_age`. With `max_age=0` nothing is shared. An answer is
            found by HMAC-SHA256 of the endpoint, keyed by the API key, so Redis holds no key and no
            name. Every reader of Redis can read balances. An answer's age counts from the start of
            its request. Connection errors and gateway answers are not shared. A call waits while
            another process fetches its answer; a killed one costs five seconds. Redis keeps at most
            10,000 answers of at most 4 KiB.

    When the client opens (`async with`), mistakes that do not heal are a `ConfigurationError`: a
    wrong password or database, no right to run the script, a server that is too old, may evict keys
    (`maxmemory` with another policy than `noeviction`), or is no Redis. A server that is out of
    reach is an outage, also then.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    @hides_arguments
    def __init__(
        self,
        url_or_client: str | Client,
        *,
        prefix: str = "crustcredits",
        on_outage: Literal["local", "strict", "raise"] = "local",
        fallback_share: float | None = None,
        share_answers: bool = False,
    ) -> None:
        owned = isinstance(url_or_client, str)
        client: object = (
            _connect(url_or_client) if isinstance(url_or_client, str) else url_or_client
        )
        # The URL may hold a password, and tracebacks can print local variables.
        del url_or_client
        if isinstance(client, ConfigurationError):
            raise client
        if not isinstance(client, (Redis, RedisCluster)):
            raise _wrong_kind(client)
        check_kind("prefix", prefix, str)
        if not prefix or not prefix.isprintable() or set(prefix) & set("{}"):
            raise ConfigurationError("prefix must be non-empty printable text without braces")
        check_kind("share_answers", share_answers, bool)
        if on_outage not in _MODES:
            raise ConfigurationError("on_outage must be 'local', 'strict' or 'raise'")
        if fallback_share is not None:
            check_number("fallback_share", fallback_share, above=0, maximum=1)
        elif on_outage != "raise":
            raise ConfigurationError(
                "fallback_share is missing, the share of the limit that this process uses without "
                f"Redis; on_outage={on_outage!r} needs it: pass 1 divided by the number of your "
                "processes"
            )
        self._prefix = f"{{{prefix}}}:"
        self._share = 0.0 if on_outage == "raise" else fallback_share or 0.0
        self._is_strict = on_outage == "strict"
        self._opened = False
        self._gates: dict[str, GateTokens] = {}  # the common tokens by path
        self._leases: set[Lease] = set()  # held, or waited for
        self._client = client
        self._make_link = partial(
            Coordinator,
            client,
            owned=owned,
            prefix=prefix,
            raises=on_outage == "raise",
            shares_answers=share_answers,
        )
        self._link = self._make_link()

    @property
    def answers(self) -> AnswerStore | None:
        """The shared answers: see `Backend`."""
        return self._link.answers

    def open(self, *, period: float, late: float, pace: float | None, scope: CountedScope) -> None:
        """Bind this backend to a client: see `Backend`.

        Raises:
            ConfigurationError: Another client uses it and is not closed.
        """
        if self._opened:
            raise ConfigurationError(
                "this backend is in use by another client; make a new RedisBackend with the same "
                "prefix for each client"
            )
        self._opened = True
        self._gates.clear()
        if self._link.closed:
            self._link = self._make_link()
        self._link.open(
            Terms(
                period=period,
                late=late,
                pace=pace,
                share=self._share,
                scope=scope,
                is_strict=self._is_strict,
            )
        )

    async def start(self) -> None:
        """Look at the server: see `Backend`.

        Raises:
            ConfigurationError: Redis refuses the user or the database, or its script; or it is too
                old, may evict keys, or is no Redis.
        """
        await self._link.start()

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> SharedTokens:
        """The tokens of one bucket: see `Backend`."""
        within = self._gates.get(path) if self._link.terms.scope == "auto" else None
        name = f"{self._prefix}{path}{hidden_name(whose)}"
        return self._link.tokens(name, limit, within=None if whose is None else within)

    def gate(self, path: str, limit: int) -> GateTokens:
        """The common tokens of permits: see `Backend`."""
        self._gates[path] = gate = self._link.gate(f"{self._prefix}{path}", limit)
        return gate

    @hides_arguments
    def lease(
        self,
        name: str,
        *,
        seconds: Seconds = 10.0,
        on_lost: Callable[[], object] | None = None,
    ) -> Lease:
        """One leader among the processes with this prefix: `async with backend.lease("watcher")`.

        Entering waits until this process is the leader, and leaving lets another one be it. The
        lease needs no `CreditsClient`, and there is no degraded mode: without Redis there is no new
        leader, and the last one stops in time. Two leases of one name in one process compete like
        two processes.

        A process is the leader (`is_held`) for 0.9 of the lease's time from the moment at which it
        asked, by its own monotonic clock, and it renews the lease after each third. A killed leader
        is replaced within 1.2 times this time. A leader that leaves is replaced by a process that
        comes then, and by a waiting one within the same time.

        No two processes are leaders at one moment while Redis keeps its data and its clock runs
        evenly. After a restart without data, a failover that loses the lease, or a suspended
        machine, two may be for 0.9 of the time. So work with effects elsewhere sends
        `fencing_number` along, and the receiver refuses numbers below the highest that it has seen:
        then no step of an older term comes after one of a newer term. Numbers ascend, also when
        Redis loses its data, as they begin with its time in microseconds: they could go back only
        if Redis lost them and its clock was also set back, to before the last term began.

        Args:
            name: Non-empty printable text. It is part of a Redis key name and of log lines.
            seconds: The lease's time: a number of 0.01 to 86,400 seconds, or a `timedelta`. All
                processes should use the same.
            on_lost: A plain function without arguments, called once when the lease is lost before
                the block is left: another process holds it, Redis lost it or did not answer, this
                process stood still, or the backend was closed. Its errors are logged.

        Raises:
            ConfigurationError: An argument cannot be used.
        """
        check_kind("name", name, str)
        if not name or not name.isprintable():
            raise ConfigurationError("name must be non-empty printable text")
        span = in_seconds("seconds", seconds)
        check_number("seconds", span, minimum=_SHORTEST, maximum=_LONGEST, unit=" of seconds")
        if on_lost is not None and not is_plain_function(on_lost):
            raise ConfigurationError("on_lost must be a plain function, not a coroutine function")
        return Lease(
            self._client, self._prefix, name, seconds=span, on_lost=on_lost, active=self._leases
        )

    async def close(self) -> None:
        """Send the queued reports, if Redis is reachable, and close connections opened here.

        Leases end: a held one is released and counts as lost, and entering one that still waits
        fails with `ClientClosedError`. Afterwards another client may use this backend.
        """
        await asyncio.gather(*(lease.close() for lease in list(self._leases)))
        await self._link.close()
        self._opened = False


def _connect(url: str) -> Redis | ConfigurationError:
    try:
        # The coordinator decides about retries.
        client = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
        # Build one connection now, so that redis-py rejects an unknown URL option here and not at
        # the first call.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError, RedisError) as error:
        if option := _option(url, error):
            return ConfigurationError(
                f"url_or_client has the option {option!r}, which redis-py refuses; correct the "
                "option, or leave it out"
            )
        return ConfigurationError(
            "url_or_client is not a Redis URL, or has an option that redis-py does not know; use "
            "redis://host:port/number"
        )
    return client


def _option(url: str, error: Exception) -> str:
    """The name of the URL's option that an error of redis-py is about; empty if unknown."""
    query = url.partition("?")[2]
    if "@" in query:  # the "?" may be part of the password
        return ""
    names = re.findall(r"['`](\w+)['`]", str(error))
    return next((name for name in parse_qs(query) if name in names), "")


def _wrong_kind(client: object) -> ConfigurationError:
    if client is None:
        return ConfigurationError(
            "url_or_client is None; set the variable that should hold the Redis URL"
        )
    kind = kind_of(client)
    if not isinstance(client, (bool, int, float, bytes, list, tuple, dict, set)):
        kind += f" of {type(client).__module__}"
    remedy = ""
    for name, synchronous in (("Redis", SyncRedis), ("RedisCluster", SyncRedisCluster)):
        if isinstance(client, synchronous):
            remedy = f"; use redis.asyncio.{name} in place of redis.{name}"
    return ConfigurationError(
        f"url_or_client must be a URL or a redis.asyncio client, not {kind}{remedy}"
    )
