"""A process that calls the API all the time, and says how each call ended.

Run with `python -m tests.redis.outage_worker SETTINGS`. It ends when its input is closed, so it
does not outlive the process that started it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

import attrs
import uvloop
from redis.asyncio import Redis, RedisCluster

from crustcredits import ApiKey, CreditsClient, CrustCreditsError, RateLimit
from crustcredits.redis import RedisBackend

# Seconds from a failed call to the next one: without Redis, calls may fail at once.
_BREATH = 0.05


@attrs.frozen(kw_only=True)
class Settings:
    """What a worker does.

    Attributes:
        loop: The event loop: `asyncio` or `uvloop`.
        api: The base URL of the API.
        redis: The URL of Redis, or of a node of the cluster.
        is_cluster: Whether it is a cluster.
        prefix: The prefix of the names in Redis.
        on_outage: As for `RedisBackend`.
        share: `fallback_share`, likewise.
        limit: Requests in a period.
        period: Seconds.
        request_timeout: Seconds.
        timeout: Seconds that a call may take.
        keys: Secrets of the keys. Each has one call at a time.
    """

    loop: str
    api: str
    redis: str
    is_cluster: bool = False
    prefix: str
    on_outage: str
    share: float
    limit: int
    period: float
    request_timeout: float
    timeout: float
    keys: list[str]


class _Lines(logging.Handler):
    """Writes the log to the output."""

    def emit(self, record: logging.LogRecord) -> None:
        _say(kind="log", at=time.monotonic(), text=record.getMessage())


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def _backend(settings: Settings) -> RedisBackend:
    given: str | Redis | RedisCluster = settings.redis
    if settings.is_cluster:
        given = RedisCluster.from_url(settings.redis)
    return RedisBackend(
        given,
        prefix=settings.prefix,
        on_outage=settings.on_outage,  # type: ignore[arg-type]  # any text: the backend checks it
        fallback_share=settings.share,
    )


async def _call(client: CreditsClient, key: ApiKey, settings: Settings) -> None:
    while True:
        began = time.monotonic()
        outcome = "answered"
        try:
            await client.balance(key, timeout=settings.timeout)
        except CrustCreditsError as error:
            outcome = type(error).__name__
        _say(kind="call", began=began, at=time.monotonic(), outcome=outcome)
        if outcome != "answered":
            await asyncio.sleep(_BREATH)


async def _main(settings: Settings) -> None:
    logging.getLogger("crustcredits").addHandler(_Lines(logging.WARNING))
    backend = _backend(settings)
    rate_limit = RateLimit(
        requests=settings.limit, period=settings.period, scope="client", pace=None
    )
    async with CreditsClient(
        base_url=settings.api,
        rate_limit=rate_limit,
        backend=backend,
        request_timeout=settings.request_timeout,
    ) as client:
        # The name under which its tokens lie in Redis.
        _say(kind="ready", at=time.monotonic(), name=backend._link.process)
        keys = [ApiKey(secret) for secret in settings.keys]
        calls = [asyncio.create_task(_call(client, key, settings)) for key in keys]
        await asyncio.to_thread(sys.stdin.read)
        for call in calls:
            call.cancel()


if __name__ == "__main__":
    given = Settings(**json.loads(sys.argv[1]))
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop if given.loop == "uvloop" else None)
    with runner:
        runner.run(_main(given))
