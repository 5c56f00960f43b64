"""Code of a user, for type checkers only; it never runs."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Unpack, assert_type

import aiohttp
from fastapi import Depends, FastAPI
from pydantic import SecretStr
from redis.asyncio import Redis

from crustcredits import (
    Account,
    ApiKey,
    BackendUnavailableError,
    Balance,
    CacheOptions,
    CreditsClient,
    CrustCreditsError,
    GatewayError,
    InsufficientCreditsError,
    KeyLike,
    KeysLike,
    Outcome,
    Quota,
    RateLimit,
    RateLimitError,
    RateLimitStatus,
    RateLimitWaitError,
    Report,
    Retry,
    Scope,
    Seconds,
    Source,
    State,
    UnusableKey,
    keys_from_env,
    keys_from_file,
    keys_from_records,
    keys_from_text,
)
from crustcredits.fastapi import (
    CreditsDep,
    KeyResponse,
    credits_client_of,
    credits_lifespan,
    credits_router,
    get_credits_client,
    install_exception_handlers,
)
from crustcredits.redis import Lease, RedisBackend
from crustcredits.testing import Arrival, Fault, SandboxServer


async def one(client: CreditsClient, key: ApiKey) -> None:
    assert_type(await client.balance("secret"), Balance)
    account = await client.account(key, timeout=5)
    assert_type(account, Account)
    assert_type(account.credits, Decimal)
    assert_type(await client.account(key, max_age=timedelta(minutes=1)), Account)
    kept = client.peek(key, max_age=60)
    assert_type(kept, Outcome[Balance] | None)
    if kept is not None:
        assert_type(kept.source, Source)
        assert_type(kept.state, State)
        assert_type(kept.stale, bool)
    assert_type(account.recurring_credits, Decimal | None)
    assert_type(account.recurring_credits_refresh_date, datetime | None)
    assert_type(account.rate_limit, RateLimitStatus | None)


async def many(
    client: CreditsClient, secrets: Mapping[str, str], more: AsyncIterator[str], detail: bool
) -> None:
    report = await client.check(secrets)
    assert_type(report, Report[Balance])
    assert_type(await client.check([ApiKey("a"), "b"], detail=True), Report[Account])
    assert_type(await client.check(keys_from_env(), detail=detail), Report[Balance])
    assert_type(report[0], Outcome[Balance])
    assert_type(report.total_credits, Decimal | None)
    assert_type(report.accounts, Mapping[str, Decimal | None])
    assert_type(report[0].error, CrustCreditsError | None)
    assert_type(
        await client.require(5000, secrets, margin=Decimal("1.2"), timeout=5, max_age=30),
        Report[Balance],
    )
    assert_type(report.available_credits, Decimal)
    report.require(Decimal(5))
    assert_type(
        await client.check(secrets, detail=True, stale_while_revalidate=timedelta(minutes=2)),
        Report[Account],
    )
    async for outcome in client.stream(more, detail=True, max_age=5, stale_if_error=3600):
        assert_type(outcome, Outcome[Account])
    async for each in client.stream(("a", "b"), timeout=3):
        assert_type(each, Outcome[Balance])
    await client.check({"a": ApiKey("x")}, on_outcome=lambda outcome: print(outcome.credits))
    assert_type(client.quota(), Quota)
    assert_type(client.quota(detail=True, key="x").seconds_for(5), float)


async def leads(backend: RedisBackend) -> None:
    lease = backend.lease("watcher", seconds=timedelta(seconds=5), on_lost=lambda: print("lost"))
    assert_type(lease, Lease)
    async with lease as entered:
        assert_type(entered, Lease)
        assert_type(lease.is_held, bool)
        assert_type(lease.fencing_number, int)


def takes_a_report(report: Report) -> list[Outcome]:
    """Without a type parameter a report is one of balances."""
    return [outcome for outcome in report if outcome.ok]


async def made(session: aiohttp.ClientSession) -> None:
    retry = Retry(attempts=3, backoff=0.5, backoff_max=4, wait_max=30)
    limit = RateLimit(requests=100, period=30, scope="key", pace=None)
    async with CreditsClient(
        rate_limit=limit, retry=retry, session=session, proxy=None, request_timeout=3
    ) as client:
        details: Report[Account] = await client.check(keys_from_file("keys.txt"), detail=True)
        takes_a_report(details)
    await CreditsClient(base_url="http://localhost:8080").close()
    await CreditsClient(
        rate_limit=RateLimit(adopt_server_limit="any"),
        backend=RedisBackend("redis://localhost", fallback_share=1 / 4),
    ).close()
    store = RedisBackend(Redis(), prefix="acme", on_outage="raise")
    async with CreditsClient(backend=store) as client:
        quota = client.quota()
        assert_type((quota.limit, quota.cooldown, quota.probing), tuple[int, float | None, bool])
    keys_from_text("a=b")


async def wrapped(
    client: CreditsClient,
    pool: KeysLike,
    key: KeyLike,
    scope: Scope,
    age: Seconds,
    **freshness: Unpack[CacheOptions],
) -> Report:
    """A wrapper of the client can annotate the client's arguments."""
    await client.balance(key, max_age=age)
    RateLimit(scope=scope)
    return await client.check(pool, **freshness)


def served(pool: KeysLike) -> FastAPI:
    app = FastAPI(
        lifespan=credits_lifespan(partial(CreditsClient, max_age=5), lifespan=own_lifespan)
    )
    app.include_router(
        credits_router(pool, dependencies=[Depends(own_lifespan)], max_age=timedelta(seconds=5)),
        prefix="/credits",
    )
    install_exception_handlers(app)
    assert_type(credits_client_of(app), CreditsClient)
    app.dependency_overrides[get_credits_client] = CreditsClient

    @app.get("/", response_model=KeyResponse)
    async def route(client: CreditsDep) -> Outcome:
        return (await client.check(pool))[0]

    return app


@asynccontextmanager
async def own_lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield


def failures(error: CrustCreditsError) -> None:
    assert_type(error.key_name, str | None)
    if isinstance(error, RateLimitError):
        assert_type(error.retry_after, float | None)
    if isinstance(error, RateLimitWaitError):
        assert_type(error.wait, float)
    if isinstance(error, BackendUnavailableError):
        assert_type(error.attempts, int)
    if isinstance(error, InsufficientCreditsError):
        assert_type(error.unknown, tuple[str, ...])


async def tested(sandbox: SandboxServer) -> None:
    key = sandbox.add_key("prod", credits="0.5")
    assert_type(key, ApiKey)
    sandbox.fail(key, Fault.SILENCE, times=2)
    assert_type(sandbox.arrivals, list[Arrival])


async def keys_of_all_kinds(client: CreditsClient, rows: list[dict[str, str]]) -> None:
    assert_type(ApiKey(SecretStr("secret"), name="prod", account="acme").label, str)
    assert_type((await client.balance(SecretStr("secret"))).key, ApiKey)
    pool = keys_from_records(rows)
    assert_type(pool, list[ApiKey | UnusableKey])
    await client.check(pool)
    await client.check({"acme/prod": SecretStr("secret"), "dev": "secret"})
    for key in pool:
        if isinstance(key, UnusableKey):
            assert_type(key.error.message, str)
        else:
            assert_type(key.get_secret_value(), str)


async def behind_a_gateway() -> None:
    async with CreditsClient(trust_env=True, ssl=ssl.create_default_context()) as client:
        try:
            await client.balance("secret")
        except GatewayError as error:
            assert_type(error.status, int)
