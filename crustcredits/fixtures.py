"""pytest fixtures around `SandboxServer`, to import into a `conftest.py`. Needs pytest and pytest-asyncio (extra `testing`).

from crustcredits.fixtures import credits_client, sandbox
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from crustcredits._client import CreditsClient
from crustcredits.testing import SandboxServer

__all__ = ["credits_client", "sandbox"]


@pytest_asyncio.fixture
async def sandbox() -> AsyncIterator[SandboxServer]:
    """A stand-in for the API, running for the test; add accounts and keys to it, and order faults."""
    async with SandboxServer() as server:
        yield server


@pytest_asyncio.fixture
async def credits_client(sandbox: SandboxServer) -> AsyncIterator[CreditsClient]:
    """A client that talks to `sandbox`."""
    async with CreditsClient(base_url=sandbox.url) as client:
        yield client
