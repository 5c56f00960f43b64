"""The requests that are sent, recorded by aioresponses.

Tests of sockets use a real server instead.
"""

from __future__ import annotations

from decimal import Decimal

import aiohttp
from aioresponses import aioresponses
from yarl import URL

from crustcredits import ApiKey, CreditsClient, __version__
from tests.conftest import BridgedResponse

USER = "https://api.crustdata.com/user/credits"
ACCOUNT = "https://api.crustdata.com/account/credits"
SENT = {
    "Authorization": "Bearer sk-0123456789",
    "x-api-version": "2025-11-01",
    "user-agent": f"crustcredits/{__version__}",
}


async def test_a_balance_is_a_get_of_user_credits(mocked: aioresponses) -> None:
    """It carries the bearer key and the version, and follows no redirect."""
    mocked.get(USER, body='{"credits": 138940.37}', response_class=BridgedResponse)
    async with CreditsClient() as client:
        assert (await client.balance("sk-0123456789")).credits == Decimal("138940.37")
    ((sent,),) = mocked.requests.values()
    assert next(iter(mocked.requests)) == ("GET", URL(USER))
    assert sent.kwargs["headers"] == SENT
    assert sent.kwargs["allow_redirects"] is False
    assert "params" not in sent.kwargs


async def test_an_account_is_a_get_of_account_credits(mocked: aioresponses) -> None:
    """It carries the same headers: without the version the API answers 400."""
    mocked.get(ACCOUNT, payload={"account": {"credits": 7}}, response_class=BridgedResponse)
    async with CreditsClient(proxy="http://proxy.example:3128") as client:
        assert (await client.account(ApiKey(" sk-0123456789 "))).credits == 7
    ((sent,),) = mocked.requests.values()
    assert sent.kwargs["headers"] == SENT
    assert sent.kwargs["proxy"] == "http://proxy.example:3128"


async def test_the_key_replaces_a_sessions_own_credentials(
    mocked: aioresponses,
) -> None:
    """aiohttp refuses both in one request, so a middleware sets the key afterwards."""
    mocked.get(USER, payload={"credits": 7}, response_class=BridgedResponse)
    async with (
        aiohttp.ClientSession(trust_env=True) as session,
        CreditsClient(session=session) as client,
    ):
        await client.balance("sk-0123456789")
    ((sent,),) = mocked.requests.values()
    assert "Authorization" not in sent.kwargs["headers"]
