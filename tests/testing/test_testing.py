"""The sandbox is strict: it answers and fails as documented."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Awaitable, Callable
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

from crustcredits import ApiKey, ConfigurationError, CreditsClient, RateLimit, Report
from crustcredits.testing import Fault, SandboxServer, fixtures
from tests.testing.requests import ask


async def test_the_sandbox_answers_both_endpoints_as_documented(sandbox: SandboxServer) -> None:
    """With every field of the account, and the documented headers."""
    sandbox.add_account(
        "acme",
        credits="138940.37",
        recurring_credits=Decimal(150000),
        wallets=[{"left": Decimal("1.50")}],
    )
    key = sandbox.add_key("prod", account="acme")
    bearer = {"Authorization": f"Bearer {key.get_secret_value()}"}
    status, document, headers = await ask(sandbox, **bearer)
    assert (status, document) == (200, {"credits": 138940.37})
    assert headers["x-ratelimit-limit"] == "300"
    assert headers["x-ratelimit-remaining"] == "299"
    assert headers["x-ratelimit-reset"] == "60"
    assert headers["x-request-id"]
    assert headers["x-credits-used"] == "0"
    status, document, headers = await ask(
        sandbox, "/account/credits", **bearer, **{"x-api-version": "2025-11-01"}
    )
    assert status == 200
    assert document["account"]["recurring_credits"] == 150000
    assert document["account"]["recurring_credits_frequency"] is None
    assert document["account"]["wallets"] == [{"left": 1.5}]
    assert headers["x-ratelimit-remaining"] == "299"


async def test_the_sandbox_refuses_requests_like_the_api(sandbox: SandboxServer) -> None:
    """No key, an unknown key, a wrong scheme, no version, another path."""
    key = sandbox.add_key()
    assert (await ask(sandbox))[:2] == (401, {"message": "Missing API key in request"})
    assert (await ask(sandbox, Authorization="Bearer x"))[:2] == (
        401,
        {"message": "Invalid API key in request"},
    )
    assert (await ask(sandbox, Authorization=f"Token {key.get_secret_value()}"))[0] == 401
    for version in ({}, {"x-api-version": "1999-01-01"}):
        status, document, _ = await ask(
            sandbox, "/account/credits", Authorization=f"Bearer {key.get_secret_value()}", **version
        )
        assert status == 400
        assert document["error"]["message"] == "Missing or wrong x-api-version header"
    assert (await ask(sandbox, "/credits", Authorization=f"Bearer {key.get_secret_value()}"))[
        0
    ] == 404


async def test_credits_can_be_spent(sandbox: SandboxServer) -> None:
    """By any key of the account; they stay exact."""
    sandbox.add_account("acme", credits=10)
    one, other = sandbox.add_key(account="acme"), sandbox.add_key(account="acme", declared=False)
    sandbox.set_credits(one, "0.10")
    async with CreditsClient(base_url=sandbox.url) as client:
        report: Report = await client.check([one, other])
    assert [str(outcome.credits) for outcome in report] == ["0.10", "0.10"]
    assert (one.account, other.account) == ("acme", None)


def test_unusable_arguments_are_refused() -> None:
    """The error names the allowed values."""
    with pytest.raises(ConfigurationError, match=r"'127\.0\.0\.1' or 'localhost'"):
        SandboxServer(host="0.0.0.0")  # type: ignore[arg-type]  # noqa: S104  # the mistake under test
    with pytest.raises(ConfigurationError, match="scope must be 'client'"):
        SandboxServer(scope="team")  # type: ignore[arg-type]  # as above
    sandbox = SandboxServer()
    assert sandbox.connections == 0
    with pytest.raises(ConfigurationError, match="open it with add_account"):
        sandbox.add_key(account="acme")
    for credits in (0.1, "NaN", "many"):
        with pytest.raises(ConfigurationError, match="credits must be exact"):
            sandbox.add_key(credits=credits)  # type: ignore[arg-type]  # as above
    stranger = ApiKey("sk-0123456789", name="stranger")
    with pytest.raises(ConfigurationError, match="stranger: the sandbox did not issue this key"):
        sandbox.fail(stranger, Fault.SILENCE)
    with pytest.raises(ConfigurationError, match="stranger: the sandbox did not issue this key"):
        sandbox.set_credits(stranger, 1)
    for options in (
        {"limit": 0},
        {"period": 0},
        {"delay": (-1, 0)},
        {"delay": (2, 1)},
        {"delay": 5},
    ):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            SandboxServer(**options)
    assert sandbox.add_key(secret="sk-mine").get_secret_value() == "sk-mine"


async def test_a_delay_comes_partly_before_the_request_is_counted() -> None:
    """So that starts a period apart can arrive closer together."""
    async with SandboxServer(delay=(0.02, 0.02)) as sandbox:
        began = asyncio.get_running_loop().time()
        await ask(sandbox, Authorization=f"Bearer {sandbox.add_key().get_secret_value()}")
        took = asyncio.get_running_loop().time() - began
        assert took >= 0.018  # uvloop counts in whole milliseconds
        assert began <= sandbox.arrivals[0].at <= began + took


async def test_the_client_keeps_the_sandbox_limit() -> None:
    """By the server's own count: no refusal, no window too full."""
    async with SandboxServer(limit=20, period=0.1, delay=(0, 0.005)) as sandbox:
        keys: list[ApiKey] = [sandbox.add_key() for _ in range(70)]
        async with CreditsClient(
            base_url=sandbox.url, rate_limit=RateLimit(requests=20, period=0.1, pace=None)
        ) as client:
            assert (await client.check(keys)).ok
        assert sandbox.refused == 0
        assert sandbox.worst_window() <= 20


@pytest.mark.parametrize(
    ("sandbox", "credits_client"), [({"limit": 2, "period": 5.0}, {"max_age": 60})], indirect=True
)
async def test_the_fixtures_take_options(
    sandbox: SandboxServer, credits_client: CreditsClient
) -> None:
    """By indirect parametrization."""
    key = sandbox.add_key()
    for _ in range(3):
        await credits_client.balance(key)
    assert (sandbox.requests, sandbox.refused) == (1, 0)


async def test_the_factories_take_options(
    make_sandbox: Callable[..., Awaitable[SandboxServer]],
    make_credits_client: Callable[..., CreditsClient],
    sandbox: SandboxServer,
) -> None:
    """For any number of sandboxes and clients; all end with the test."""
    other = await make_sandbox(limit=1)
    here, there = make_credits_client(max_age=60), make_credits_client(base_url=other.url)
    assert (await here.balance(sandbox.add_key(credits=5))).credits == 5
    assert (await there.balance(other.add_key(credits=7))).credits == 7


@pytest.mark.parametrize("given", [{"limits": 2}, 5])
async def test_unknown_options_of_a_fixture_are_refused(given: object) -> None:
    """They are not ignored."""
    sandbox: Any = inspect.unwrap(fixtures.sandbox)  # what pytest calls
    request = SimpleNamespace(param=given, fixturename="sandbox")
    with pytest.raises(
        ConfigurationError, match="the options of the fixture 'sandbox' cannot be used"
    ):
        await anext(sandbox(request))


def test_the_package_imports_no_pytest() -> None:
    """Its fixtures do."""
    program = "import sys, crustcredits.testing; print('pytest' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"
