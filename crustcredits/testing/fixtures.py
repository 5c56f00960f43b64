"""pytest fixtures around `SandboxServer`, to import into a `conftest.py`.

Needs pytest and pytest-asyncio (extra `testing`).

from crustcredits.testing.fixtures import credits_client, make_credits_client, make_sandbox, sandbox

`sandbox` takes the options of `SandboxServer` by indirect parametrization,
`@pytest.mark.parametrize("sandbox", [{"limit": 5}], indirect=True)`, and `credits_client` those of
`CreditsClient` in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import pytest_asyncio

from crustcredits._client import CreditsClient
from crustcredits._errors import ConfigurationError
from crustcredits.testing._server import SandboxServer

__all__ = ["credits_client", "make_credits_client", "make_sandbox", "sandbox"]


@pytest_asyncio.fixture
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[SandboxServer]:
    """A stand-in for the API, running for the test.

    Add accounts and keys to it, and order faults.
    """
    async with SandboxServer(**_options(request, SandboxServer)) as server:
        yield server


@pytest_asyncio.fixture
async def credits_client(
    request: pytest.FixtureRequest, sandbox: SandboxServer
) -> AsyncIterator[CreditsClient]:
    """A client that talks to `sandbox`."""
    options = _options(request, CreditsClient)
    options.setdefault("base_url", sandbox.url)
    async with CreditsClient(**options) as client:
        yield client


@pytest_asyncio.fixture
async def make_sandbox() -> AsyncIterator[Callable[..., Awaitable[SandboxServer]]]:
    """A function that starts a sandbox with options of `SandboxServer`, which stops with the test.

    sandbox = await make_sandbox(limit=5)
    """
    async with AsyncExitStack() as stack:

        async def make(**options: Any) -> SandboxServer:
            return await stack.enter_async_context(SandboxServer(**options))

        yield make


@pytest_asyncio.fixture
async def make_credits_client(
    sandbox: SandboxServer,
) -> AsyncIterator[Callable[..., CreditsClient]]:
    """A function that makes clients of `sandbox` with options of `CreditsClient`.

    They close with the test.

        client = make_credits_client(max_age=5)
    """
    async with AsyncExitStack() as stack:

        def make(**options: Any) -> CreditsClient:
            options.setdefault("base_url", sandbox.url)
            client = CreditsClient(**options)
            stack.push_async_callback(client.close)
            return client

        yield make


def _options(request: pytest.FixtureRequest, kind: type) -> dict[str, Any]:
    """Return the options that a test gives by indirect parametrization."""
    given = getattr(request, "param", {})
    known = inspect.signature(kind).parameters
    if not isinstance(given, dict) or not given.keys() <= known.keys():
        raise ConfigurationError(
            f"the options of the fixture {request.fixturename!r} cannot be used; give a dict of "
            f"options of {kind.__name__}: {', '.join(known)}"
        )
    return dict(given)
