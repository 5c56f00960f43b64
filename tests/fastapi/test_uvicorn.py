"""The example app under uvicorn, as a process of its own: started, called and stopped."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import attrs

from crustcredits import ApiKey
from crustcredits.testing import Fault, SandboxServer
from tests.conftest import eventually, on_uvloop

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
HEADERS = {"Authorization": "Bearer t-1"}


@attrs.define
class Service:
    """The process, its address and its output."""

    process: asyncio.subprocess.Process
    url: str = ""
    printed: str = ""

    async def read_until(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        while not (found := re.search(pattern, self.printed)):
            line = await self.process.stdout.readline()
            assert line, f"the process ended before it printed {pattern}: {self.printed}"
            self.printed += line.decode()
        return found

    async def stop(self) -> int:
        """Ask it to end, wait for it, and return its exit status."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGTERM)
        self.printed += (await self.process.stdout.read()).decode()
        return await self.process.wait()


@asynccontextmanager
async def service(sandbox: SandboxServer, keys: list[ApiKey]) -> AsyncIterator[Service]:
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CRUSTDATA_", "COV_", "PYTEST_"))
    }
    environ |= {
        "CRUSTDATA_API_URL": sandbox.url,
        "CRUSTDATA_API_KEYS": ",".join(f"{key.name}={key.get_secret_value()}" for key in keys),
        "SERVICE_TOKEN": "t-1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "--factory",
        "fastapi_app:create_app",
        "--app-dir",
        str(EXAMPLES),
        "--port",
        "0",
    ]
    command += ["--loop", "uvloop" if on_uvloop() else "asyncio"]
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    running = Service(process)
    try:
        running.url = (await running.read_until(r"running on (http://127\.0\.0\.1:\d+)"))[1]
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def check_end(running: Service, status: int, keys: list[ApiKey]) -> None:
    # After its shutdown, uvicorn passes the signal on to the default handler.
    assert status in {0, -signal.SIGTERM}
    assert "Application shutdown complete" in running.printed
    assert "Finished server process" in running.printed
    assert "Traceback" not in running.printed
    assert "Unclosed" not in running.printed
    assert not [key.name for key in keys if key.get_secret_value() in running.printed]


async def test_the_app_starts_answers_and_stops(sandbox: SandboxServer) -> None:
    """With its client closed, and no connection left at the API."""
    keys = [sandbox.add_key("prod", credits="100.5"), sandbox.add_key("broken")]
    sandbox.fail(keys[1], Fault.FORBIDDEN)
    async with (
        service(sandbox, keys) as running,
        aiohttp.ClientSession(running.url, headers=HEADERS) as session,
    ):
        async with session.get("/credits/keys") as answer:
            pool = await answer.json()
            assert [key["credits"] for key in pool["keys"]] == ["100.5", None]
        async with session.post("/batches", json={"credits": 1000}) as answer:
            assert answer.status == 502, "the refused key decides"
        async with session.post("/batches", json={"credits": 1000}) as answer:
            assert (await answer.json())["unknown"] == ["broken"]
        async with session.get("/credits/healthz") as answer:
            assert (await answer.json())["status"] == "degraded"
        check_end(running, await running.stop(), keys)
    await eventually(lambda: sandbox.connections == 0)


async def test_the_app_stops_cleanly_under_load() -> None:
    """Accepted requests are answered, later ones refused, and the process ends soon."""
    answers: list[int] = []
    turned_away = 0
    stopping = asyncio.Event()
    async with SandboxServer(delay=(0.01, 0.04)) as sandbox:
        keys = [sandbox.add_key(f"key-{number}") for number in range(40)]
        async with (
            service(sandbox, keys) as running,
            aiohttp.ClientSession(running.url, headers=HEADERS) as session,
        ):

            async def caller(number: int) -> None:
                nonlocal turned_away
                for turn in range(10_000):
                    try:
                        async with session.get(
                            f"/credits/keys/key-{(number + turn) % 40}"
                        ) as answer:
                            await answer.read()
                            answers.append(answer.status)
                    except aiohttp.ClientError:
                        assert stopping.is_set(), "refused before the stop"
                        turned_away += 1
                        return
                    if len(answers) == 300:
                        stopping.set()

            callers = [asyncio.create_task(caller(number)) for number in range(16)]
            await stopping.wait()
            status = await asyncio.wait_for(running.stop(), 10)
            await asyncio.gather(*callers)
            check_end(running, status, keys)
        assert set(answers) == {200}
        assert turned_away == 16
        await eventually(lambda: sandbox.connections == 0)
