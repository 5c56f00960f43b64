"""A user's service around outcomes, reports and gates, for type checkers only, without a cast."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from typing import assert_never, assert_type

from crustcredits import (
    Account,
    ApiKey,
    Balance,
    CreditsClient,
    CreditsRequirementError,
    CreditsUnknownError,
    CrustCreditsError,
    InsufficientCreditsError,
    KeysLike,
    Known,
    Outcome,
    Quota,
    Report,
    Source,
    State,
    Unknown,
    UnusableKey,
)
from crustcredits.testing import Fault, SandboxServer, fake_client


def line_by_isinstance(outcome: Outcome) -> str:
    if isinstance(outcome, Known):
        assert_type(outcome.balance, Balance)
        assert_type(outcome.key, ApiKey)
        return f"{outcome.key.label}: {outcome.credits:f}, {outcome.age:.0f} s old"
    assert_type(outcome.error, CrustCreditsError)
    assert_type(outcome.key, ApiKey | UnusableKey)
    return f"{outcome.key.label}: {outcome.error}"


def line_by_match(outcome: Outcome[Account]) -> str:
    match outcome:
        case Known(balance=account, error=None):
            assert_type(account, Account)
            return f"{account.credits} of {account.recurring_credits}"
        case Known(balance=account, error=error):
            return f"{account.credits}, but {error}"
        case Unknown(error=error):
            assert_type(error, CrustCreditsError)
            return str(error)
        case _:
            assert_never(outcome)


def credits_by_field(outcome: Outcome) -> Decimal:
    """The shared fields narrow the type as well."""
    if outcome.balance is not None:
        return outcome.balance.credits
    raise outcome.error


def fields(outcome: Outcome) -> tuple[bool, bool, datetime, int, Source, State]:
    assert_type(outcome.result(), Balance)
    return (
        outcome.ok,
        outcome.stale,
        outcome.checked_at,
        outcome.attempts,
        outcome.source,
        outcome.state,
    )


def summary(report: Report[Account]) -> dict[str, object]:
    assert_type(report.succeeded, tuple[Known[Account], ...])
    assert_type(report.failed, tuple[Unknown, ...])
    assert_type(report.by_label, Mapping[str, Outcome[Account]])
    assert_type([report.credits_of(known) for known in report.succeeded], list[Decimal])
    assert_type([report.credits_of(unknown) for unknown in report.failed], list[Decimal | None])
    assert_type(report.low(grant_share=0.1), tuple[Known[Account], ...])
    assert_type(report.low_accounts(100), tuple[str, ...])
    richest = report.ranked()[0]
    assert_type(richest.balance.recurring_credits, Decimal | None)
    return {
        "total": report.total_credits,
        "failed": [unknown.error.message for unknown in report.failed],
    }


async def gate(client: CreditsClient, keys: KeysLike) -> str:
    try:
        report = await client.require(5000, keys, margin=1.1, max_error_age=5)
    except InsufficientCreditsError as error:
        return f"buy {error.needed - error.available}"
    except CreditsUnknownError as error:
        assert_type(error.deciding, tuple[CrustCreditsError, ...])
        return f"wait: {', '.join(error.unknown)}"
    except CreditsRequirementError as error:
        return str([each.state for each in error.report])
    detailed = await client.require(5000, keys, detail=True)
    assert_type(detailed, Report[Account])
    return report.ranked()[0].key.label


async def low_keys(client: CreditsClient, keys: AsyncIterator[ApiKey]) -> list[str]:
    client.invalidate()
    client.invalidate("secret")
    return [
        outcome.key.label
        async for outcome in client.stream(keys)
        if isinstance(outcome, Known) and outcome.credits < 10
    ]


def by_hand(key: ApiKey, at: datetime) -> Iterable[Outcome]:
    """Outcomes made by hand, for tests of code that uses them."""
    yield Known(balance=Balance(key=key, credits=Decimal(5), checked_at=at))
    yield Unknown(key=key, error=CrustCreditsError("no answer", key_name=key.label, attempts=1))
    print(Quota(limit=300, free=20).seconds_for(30))


async def tested() -> None:
    async with (
        fake_client({"acme/prod": 50, "acme/dev": "50"}, max_age=5) as client,
        SandboxServer() as sandbox,
    ):
        client.api.down(Fault.CHALLENGE)
        client.api.up()
        client.api.spend(client.keys[0], per_second=2)
        sandbox.revoke(sandbox.add_key("prod"))
        assert_type(client.keys, list[ApiKey])
        await gate(client, client.keys)
