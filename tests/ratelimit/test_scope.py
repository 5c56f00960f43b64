"""Whole clients against servers that count in different ways, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attrs
import pytest

from crustcredits import ApiKey, RateLimit
from tests.virtual import FakeServer, WindowServer, fake_client, keys, now

pytestmark = pytest.mark.virtual


@attrs.frozen
class Run:
    """The result of checking a pool."""

    seconds: float
    refused: int
    worst: int


async def check(server: WindowServer, pool: list[ApiKey], **options: Any) -> Run:
    async with fake_client(server, **options) as client:
        assert (await client.check(pool)).ok
    return Run(now(), len(server.refused), server.worst_window())


def by_key(key: ApiKey) -> Any:
    return key.digest


def by_account(key: ApiKey) -> Any:
    return key.account or key.digest


def acme_undeclared(key: ApiKey) -> Any:
    """Keys with a name that begins with "acme" share an account, which is not declared."""
    return "acme" if key.name.startswith("acme") else key.digest


async def test_a_thousand_accounts_take_ten_seconds() -> None:
    """The pace alone takes as long; and no request is refused."""
    outcome = await check(WindowServer(scope=by_key), keys(1000))
    assert outcome.refused == 0
    assert outcome.seconds == pytest.approx(10, abs=2)


async def test_a_thousand_keys_that_are_counted_together_take_three_minutes() -> None:
    """300 at once, and three times more; no request is refused."""
    outcome = await check(WindowServer(), keys(1000))
    assert (outcome.refused, outcome.worst) == (0, 300)
    assert outcome.seconds == pytest.approx(182, abs=2)


@pytest.mark.parametrize("scope", [None, by_key])
async def test_a_count_that_lags_proves_nothing_wrong(
    scope: Callable[[ApiKey], Any] | None,
) -> None:
    """A request that the server does not count yet is no witness."""
    outcome = await check(WindowServer(lag=0.5, scope=scope or (lambda key: None)), keys(1000))
    assert outcome.refused == 0
    assert outcome.seconds == pytest.approx(10 if scope else 182, abs=2)


@pytest.mark.parametrize("order", ["first", "last", "mixed"])
async def test_keys_of_an_undeclared_account_are_found_by_their_count(
    order: str,
) -> None:
    """Of 400 beside 600 that are accounts of their own, at most two are refused."""
    single, acme = keys(600), keys(400, "acme")
    pool = [*acme, *single] if order == "first" else [*single, *acme]
    if order == "mixed":
        random.Random(7).shuffle(pool)
    server = WindowServer(scope=acme_undeclared)
    outcome = await check(server, pool)
    assert outcome.refused <= 2
    assert outcome.seconds < 75


async def test_each_declared_account_has_its_own_limit() -> None:
    """Four with 250 keys each are done in a period, and none is refused."""
    server = WindowServer(scope=by_account)
    pool = [ApiKey(f"secret-{number}", account=f"account {number % 4}") for number in range(1000)]
    assert (await check(server, pool)).refused == 0
    assert now() < 75


@pytest.mark.parametrize("scope", ["auto", "account"])
async def test_one_declared_account_of_many_keys_is_counted_together_in_any_scope(
    scope: str,
) -> None:
    """With a server that counts by account, 700 keys of one account start 300 in a period."""
    pool = [ApiKey(f"secret-{number}", account="acme") for number in range(700)]
    outcome = await check(WindowServer(scope=by_account), pool, rate_limit=RateLimit(scope=scope))  # type: ignore[arg-type]
    assert (outcome.refused, outcome.worst) == (0, 300)
    assert outcome.seconds == pytest.approx(122, abs=2)


async def test_without_headers_all_are_counted_together() -> None:
    """No account can be proven to be counted separately."""
    server = FakeServer()
    async with fake_client(server) as client:
        assert (await client.check(keys(400))).ok
    assert now() == pytest.approx(61.5, abs=1)
