"""`RedisBuckets`: one quota for many processes, counted in Redis 6.2 or later, or Valkey."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from crustcredits._errors import ConfigurationError
from crustcredits._validation import check_kind, check_number, hides_arguments
from crustcredits.redis.coordinator import Coordinator, _hidden
from crustcredits.redis.shared_tokens import SharedTokens, Terms

if TYPE_CHECKING:
    Client: TypeAlias = "Redis | RedisCluster"

_log = logging.getLogger("crustcredits")


class RedisBuckets:
    """Token buckets that all processes share which use the same prefix on the same Redis.

    Give it to one client at a time: `CreditsClient(buckets=RedisBuckets("redis://…"))`. It keeps
    the same promise as buckets in the process: no window of one period ever holds more requests
    than the limit, of all processes together, while they reach Redis or none does. A process that
    dies with tokens in its hands breaks nothing: they come home after a period, two request
    timeouts and a second.

    Args:
        url_or_client: `redis://…`, `rediss://…` or `unix://…`, or a client of `redis.asyncio`,
            `RedisCluster` included, which is never closed here.
        prefix: What the names of the keys begin with: one for each quota, so another for another
            base URL. They lie in one slot of a cluster.
        on_outage: What to do when Redis has not answered for two seconds. With `"local"` this
            process goes on with its share of the limit: until all that others may have sent has
            aged out, a period, two request timeouts and a second, only out of tokens of its own
            that come home, and then with the whole share. It says so once in the log, and comes
            back by itself. With `"raise"` calls that need a token fail with
            `BucketsUnavailableError`.
        share: This process's share of the limit while it is alone, above 0 and at most 1; one
            request at least. Those of all processes together should be no more than 1.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    @hides_arguments
    def __init__(
        self,
        url_or_client: str | Client,
        *,
        prefix: str = "crustcredits",
        on_outage: Literal["local", "raise"] = "local",
        share: float = 1 / 4,
    ) -> None:
        owned = isinstance(url_or_client, str)
        client: object = (
            _connect(url_or_client) if isinstance(url_or_client, str) else url_or_client
        )
        del (
            url_or_client
        )  # It may hold a password, and tracebacks are printed with local variables.
        if isinstance(client, ConfigurationError):
            raise client
        if not isinstance(client, (Redis, RedisCluster)):
            raise _wrong_kind(client)
        check_kind("prefix", prefix, str)
        if not prefix or not prefix.isprintable() or set(prefix) & set("{}"):
            raise ConfigurationError("prefix is printable text without braces, and not empty")
        if on_outage not in ("local", "raise"):
            raise ConfigurationError("on_outage is 'local' or 'raise'")
        check_number("share", share, above=0, maximum=1)
        self._prefix = f"{{{prefix}}}:"
        self._share = share
        self._opened = False
        self._make_link = partial(
            Coordinator,
            client,
            owned=owned,
            marker=self._prefix + "epoch",
            raises=on_outage == "raise",
        )
        self._link = self._make_link()

    def open(self, *, period: float, late: float, pace: float | None) -> None:
        """A client begins to use it: see `TokenStore`.

        Raises:
            ConfigurationError: Another client uses it, which is not closed.
        """
        if self._opened:
            raise ConfigurationError(
                "these buckets have a client already; make new RedisBuckets, with the same "
                "prefix, for each"
            )
        self._opened = True
        if self._link.closed:
            self._link = self._make_link()
        self._link.terms = Terms(period=period, late=late, pace=pace, share=self._share)

    def tokens(self, path: str, whose: str | bytes | None, limit: int) -> SharedTokens:
        """The tokens of one bucket: see `TokenStore`."""
        return self._link.tokens(f"{self._prefix}{path}{_hidden(whose)}", limit)

    async def close(self) -> None:
        """Say what is still to be said, if Redis is there, and close the connections, if they are ours.

        Then another client may use it.
        """
        await self._link.close()
        self._opened = False


def _connect(url: str) -> Redis | ConfigurationError:
    try:
        client = Redis.from_url(
            url, retry=Retry(NoBackoff(), 0)
        )  # when it is asked again is decided here
        # Now, and not at the first call, it is to say that it does not know an option of the URL.
        client.connection_pool.connection_class(**client.connection_pool.connection_kwargs)
    except (TypeError, ValueError, RedisError):
        return ConfigurationError(
            "the URL is none of Redis, or has an option that redis-py does not know: "
            "redis://host:port/number"
        )
    return client


def _wrong_kind(client: object) -> ConfigurationError:
    if client is None:
        return ConfigurationError(
            "url_or_client is None; is the variable set that should hold the URL of Redis?"
        )
    kind = f"{type(client).__module__.partition('.')[0]}.{type(client).__qualname__}"
    return ConfigurationError(f"url_or_client is a URL, or a client of redis.asyncio, not a {kind}")
