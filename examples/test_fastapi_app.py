"""How to test such an app: override its client with one that asks the sandbox."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from fastapi.testclient import TestClient
from fastapi_app import create_app
from httpx2 import ASGITransport, AsyncClient

from crustcredits import CreditsClient
from crustcredits.fastapi import get_credits_client
from crustcredits.testing import Fault, SandboxServer
from crustcredits.testing.fixtures import credits_client, sandbox

__all__ = ["credits_client", "sandbox"]  # fixtures, found by their names


@pytest_asyncio.fixture
async def http(
    sandbox: SandboxServer, credits_client: CreditsClient, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AsyncClient]:
    """A caller with the token."""
    monkeypatch.setenv("SERVICE_TOKEN", "t-1")
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    app = create_app([sandbox.add_key("prod", credits="100.5"), broken])
    app.dependency_overrides[get_credits_client] = lambda: credits_client
    async with AsyncClient(
        transport=ASGITransport(app),
        base_url="http://test",
        headers={"Authorization": "Bearer t-1"},
    ) as caller:
        yield caller


@pytest.mark.asyncio
async def test_the_pool_is_shown_by_name(http: AsyncClient) -> None:
    pool = (await http.get("/credits/keys")).json()
    assert [(key["key"], key["credits"]) for key in pool["keys"]] == [
        ("prod", "100.5"),
        ("broken", None),
    ]
    assert (await http.get("/credits/healthz")).json()["status"] == "degraded"


@pytest.mark.asyncio
async def test_a_batch_that_would_run_dry_is_not_started(
    http: AsyncClient, sandbox: SandboxServer
) -> None:
    assert (await http.post("/batches", json={"credits": 90})).json() == {
        "state": "started",
        "available": "100.5",
    }
    undecided = await http.post("/batches", json={"credits": 95})
    assert (undecided.status_code, undecided.json()["unknown"]) == (502, ["broken"])


@pytest.mark.asyncio
async def test_a_batch_is_refused_when_every_balance_is_known(
    sandbox: SandboxServer, credits_client: CreditsClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "t-1")
    app = create_app([sandbox.add_key("prod", credits="100.5")])
    app.dependency_overrides[get_credits_client] = lambda: credits_client
    async with AsyncClient(
        transport=ASGITransport(app),
        base_url="http://test",
        headers={"Authorization": "Bearer t-1"},
    ) as http:
        refused = await http.post("/batches", json={"credits": 95})
    assert (refused.status_code, refused.json()["needed"]) == (409, "104.5")


async def rich_client() -> AsyncIterator[CreditsClient]:
    """For `TestClient`, which runs the app on its own loop: one sandbox there for each request."""
    async with SandboxServer() as sandbox, CreditsClient(base_url=sandbox.url) as client:
        sandbox.add_key(secret="sk-rich", credits=1_000_000)
        yield client


def test_a_key_is_shown_without_a_loop_in_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", "t-1")
    app = create_app({"rich": "sk-rich"})
    app.dependency_overrides[get_credits_client] = rich_client
    with TestClient(app, headers={"Authorization": "Bearer t-1"}) as http:
        assert http.get("/credits/keys/rich").json()["credits"] == "1000000"


@pytest.mark.asyncio
async def test_the_pool_is_refused_without_the_token(http: AsyncClient) -> None:
    answer = await http.get("/credits/keys", headers={"Authorization": "Bearer t-2"})
    assert answer.status_code == 403
