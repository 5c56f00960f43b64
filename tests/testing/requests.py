"""Requests to the sandbox, without the client."""

from __future__ import annotations

from typing import Any

import aiohttp

from crustcredits.testing import SandboxServer


async def ask(
    sandbox: SandboxServer, path: str = "/user/credits", **headers: str
) -> tuple[int, Any, dict[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(sandbox.url + path, headers=headers) as response,
    ):
        return (
            response.status,
            await response.json(),
            {name.lower(): value for name, value in response.headers.items()},
        )
