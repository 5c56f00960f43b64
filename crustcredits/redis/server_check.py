"""Mistakes of a server or its URL that do not heal, found when a client opens."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from redis.asyncio import RedisCluster
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoPermissionError,
    ResponseError,
)

from crustcredits._errors import ConfigurationError

_log = logging.getLogger("crustcredits")

_OLDEST = (6, 2)
# All commands of the three scripts, and of this package.
_COMMANDS = (
    "EVALSHA, EVAL, INFO, TIME, GET, SET, DEL, INCR, PTTL, PEXPIRE, HGET, HMGET, HGETALL, HSET, "
    "HSETNX, HDEL, ZADD, ZREM, ZCARD, ZCOUNT, ZSCORE, ZRANGEBYSCORE and ZREMRANGEBYSCORE"
)


def address_of(client: Any) -> str:
    """Where a client connects to, without credentials."""
    if isinstance(client, RedisCluster):
        return "a cluster"
    settings = client.connection_pool.connection_kwargs
    place = settings.get("path") or f"{settings.get('host')}:{settings.get('port')}"
    return f"{place}, database {settings.get('db') or 0}"


def mistake(error: BaseException) -> ConfigurationError | None:
    """The error for a mistake that does not heal; None for an outage, which may."""
    if isinstance(error, AuthenticationError):
        return ConfigurationError(
            "Redis refuses the user name or the password; set the right ones in the URL"
        )
    if isinstance(error, NoPermissionError) or "user executing the script" in str(error):
        return ConfigurationError(
            "the Redis user has no right to run the script; allow it the commands "
            f"{_COMMANDS} on all keys of the prefix"
        )
    if isinstance(error, InvalidResponse):
        return ConfigurationError("the server at this address is not a Redis; correct the URL")
    if isinstance(error, ResponseError) and "DB index" in str(error):
        return ConfigurationError(
            "Redis has no database of this number; use another number at the end of the URL"
        )
    # redis-py makes an outage of any error at the begin of a connection.
    return None if error.__cause__ is None else mistake(error.__cause__)


async def check_server(client: Any) -> None:
    """Look at the version and the memory of a server.

    A user without the right to INFO is not told anything.

    Raises:
        ConfigurationError: The server is too old, or may evict the count.
    """
    try:
        servers = _each(await client.info("server")), _each(await client.info("memory"))
    except NoPermissionError:
        return
    for server in servers[0]:
        version = str(server.get("redis_version", ""))
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is not None and tuple(map(int, numbers.groups())) < _OLDEST:
            raise ConfigurationError(f"Redis {version} is too old; use 6.2 or later, or Valkey")
    for memory in servers[1]:
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if policy == "noeviction":
            continue
        if int(memory.get("maxmemory", 0)) > 0:
            raise ConfigurationError(
                "Redis may evict the rate limit's count and leases, because its maxmemory-policy "
                f"is {policy}; set noeviction, or use another Redis"
            )
        _log.warning(
            "Redis may evict the rate limit's count and leases once maxmemory is set, because its "
            "maxmemory-policy is %s; set noeviction",
            policy,
        )


def _each(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The answers of all nodes of a cluster, or of the one server."""
    nodes = [value for value in answer.values() if isinstance(value, Mapping)]
    return nodes if len(nodes) == len(answer) else [answer]
