"""The sandbox counts requests as the API does, and records them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crustcredits import ConfigurationError, CreditsClient
from crustcredits.testing import Arrival, SandboxServer
from tests.testing.requests import ask


async def test_the_sandbox_counts_in_a_sliding_window() -> None:
    """Over the limit it answers 429 with the time at which the oldest request ages out."""
    async with SandboxServer(limit=2, period=0.05) as sandbox:
        key = sandbox.add_key()
        bearer = {"Authorization": f"Bearer {key.get_secret_value()}"}
        assert [(await ask(sandbox, **bearer))[0] for _ in range(2)] == [200, 200]
        status, _, headers = await ask(sandbox, **bearer)
        if status != 200:  # on a very slow machine the first has aged out already
            assert (status, headers["x-ratelimit-remaining"], headers["x-ratelimit-reset"]) == (
                429,
                "0",
                "1",
            )
            assert sandbox.refused == 1
        await asyncio.sleep(0.05)
        assert (await ask(sandbox, **bearer))[0] == 200
        assert sandbox.worst_window() >= 2


@pytest.mark.parametrize(("scope", "refused"), [("client", 2), ("account", 1), ("key", 0)])
async def test_the_sandbox_counts_by_client_account_or_key(scope: Any, refused: int) -> None:
    """An unknown key is a scope of its own."""
    async with SandboxServer(limit=1, scope=scope) as sandbox:
        sandbox.add_account("acme")
        keys = [sandbox.add_key(account="acme"), sandbox.add_key(account="acme"), sandbox.add_key()]
        for key in [*keys]:
            await ask(sandbox, Authorization=f"Bearer {key.get_secret_value()}")
        await ask(sandbox, "/account/credits", Authorization="Bearer unknown")
        assert sandbox.refused == refused


async def test_arrivals_are_recorded_without_showing_secrets(
    sandbox: SandboxServer, credits_client: CreditsClient
) -> None:
    """By name, with headers that do not print."""
    key = sandbox.add_key("prod")
    async with CreditsClient(base_url=sandbox.url) as client:
        await client.balance(key)
    (arrival,) = sandbox.arrivals
    assert (arrival.key, arrival.path, arrival.refused) == ("prod", "/user/credits", False)
    assert arrival.headers["Authorization"] == f"Bearer {key.get_secret_value()}"
    assert key.get_secret_value() not in repr(sandbox.arrivals)
    assert isinstance(arrival, Arrival)
    assert isinstance(credits_client, CreditsClient)


async def test_recording_can_be_turned_off() -> None:
    """Then memory does not grow with the requests."""
    async with (
        SandboxServer(record=False) as sandbox,
        CreditsClient(base_url=sandbox.url) as client,
    ):
        await client.balance(sandbox.add_key())
        assert (sandbox.requests, sandbox.arrivals) == (1, [])
        with pytest.raises(ConfigurationError, match="unknown"):
            sandbox.worst_window()
