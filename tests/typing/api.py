"""A user's code, which is type-checked and never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import assert_type

import aiohttp

from crustcredits import (
    Account,
    ApiKey,
    Balance,
    CreditsClient,
    CrustCreditsError,
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
    keys_from_env,
    keys_from_file,
    keys_from_text,
)
from crustcredits.testing import Arrival, Fault, SandboxServer


async def one(client: CreditsClient, key: ApiKey) -> None:
    assert_type(await client.balance("secret"), Balance)
    account = await client.account(key, timeout=5)
    assert_type(account, Account)
    assert_type(account.credits, Decimal)
    assert_type(account.recurring_credits, Decimal | None)
    assert_type(account.recurring_credits_refresh_date, datetime | None)
    assert_type(account.rate_limit, RateLimitStatus | None)


async def many(client: CreditsClient, secrets: Mapping[str, str], more: AsyncIterator[str], detail: bool) -> None:
    report = await client.check(secrets)
    assert_type(report, Report[Balance])
    assert_type(await client.check([ApiKey("a"), "b"], detail=True), Report[Account])
    assert_type(await client.check(keys_from_env(), detail=detail), Report[Balance])
    assert_type(report[0], Outcome[Balance])
    assert_type(report.total_credits, Decimal | None)
    assert_type(report.accounts, Mapping[str, Decimal | None])
    assert_type(report[0].error, CrustCreditsError | None)
    async for outcome in client.stream(more, detail=True):
        assert_type(outcome, Outcome[Account])
    async for each in client.stream(("a", "b"), timeout=3):
        assert_type(each, Outcome[Balance])
    await client.check({"a": ApiKey("x")}, on_outcome=lambda outcome: print(outcome.credits))
    assert_type(client.quota(), Quota)
    assert_type(client.quota(detail=True, key="x").seconds_for(5), float)


def takes_a_report(report: Report) -> list[Outcome]:
    """Without saying of what: of balances."""
    return [outcome for outcome in report if outcome.ok]


async def made(session: aiohttp.ClientSession) -> None:
    retry = Retry(attempts=3, backoff=0.5, backoff_max=4, wait_max=30)
    limit = RateLimit(requests=100, period=30, scope="key", pace=None)
    async with CreditsClient(rate_limit=limit, retry=retry, session=session, proxy=None, request_timeout=3) as client:
        details: Report[Account] = await client.check(keys_from_file("keys.txt"), detail=True)
        takes_a_report(details)
    await CreditsClient(base_url="http://localhost:8080").close()
    keys_from_text("a=b")


async def wrapped(client: CreditsClient, pool: KeysLike, key: KeyLike, scope: Scope) -> Report:
    """Whoever wraps the client can say what it takes."""
    await client.balance(key)
    RateLimit(scope=scope)
    return await client.check(pool)


def failures(error: CrustCreditsError) -> None:
    assert_type(error.key_name, str | None)
    if isinstance(error, RateLimitError):
        assert_type(error.retry_after, float | None)
    if isinstance(error, RateLimitWaitError):
        assert_type(error.wait, float)


async def tested(sandbox: SandboxServer) -> None:
    key = sandbox.add_key("prod", credits="0.5")
    assert_type(key, ApiKey)
    sandbox.fail(key, Fault.SILENCE, times=2)
    assert_type(sandbox.arrivals, list[Arrival])
