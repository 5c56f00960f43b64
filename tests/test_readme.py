"""The README's code runs unchanged, and CI runs the README's commands."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from crustcredits.testing import Fault, SandboxServer
from tests.conftest import on_uvloop
from tests.servers import RedisServer, redis_server

__all__ = ["redis_server"]  # a fixture, found by its name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
PROGRAMS = {
    "Use": (
        PYTHON[0],
        [
            "prod: 9406",
            "total: 9416",
            "best key: ['prod']",
            "spare: 10",
            "broken: unknown, the plan or the key's rights do not allow the request",
        ],
    ),
    "Several processes": (PYTHON[1], ["total: 9416"]),
    "A leader": (PYTHON[2], ["leader, fencing number 1"]),
    "Errors": (PYTHON[3], ["is not known to the API, request sandbox-1"]),
    "In a service": (PYTHON[4], ["prod has 9406, stale: False", "go with prod"]),
}


async def run(*command: str, **environ: str) -> tuple[int | None, str]:
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CRUSTDATA_", "PYTEST_", "COV_"))
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        env=clean | environ,
        cwd=environ.get("HOME"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), 25)
    return process.returncode, out.decode()


def test_every_code_block_has_a_test() -> None:
    """A new block needs a test of its own."""
    assert [language for language, _ in BLOCKS] == ["console", *["python"] * 9, "console"]
    assert len(PYTHON[0].splitlines()) <= 30
    assert len([line for line in PYTHON[5].splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("title", PROGRAMS)
async def test_a_program_runs_unchanged(
    sandbox: SandboxServer, redis_server: RedisServer, title: str
) -> None:
    """Against the sandbox and a Redis."""
    code, said = PROGRAMS[title]
    keys = [
        sandbox.add_key("prod", credits=9406),
        sandbox.add_key("spare", credits=10),
        sandbox.add_key("broken"),
    ]
    sandbox.fail(keys[-1], Fault.FORBIDDEN)
    pool = ",".join(f"{key.name}={key.get_secret_value()}" for key in keys)
    environ = {
        "CRUSTDATA_API_URL": sandbox.url,
        "CRUSTDATA_API_KEYS": pool,
        "REDIS_URL": redis_server.url,
    }
    loop = (
        "import asyncio, uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())\n"
        if on_uvloop()
        else ""
    )
    status, out = await run(sys.executable, "-W", "error", "-c", loop + code, **environ)
    assert status == 0, out
    for line in said:
        assert line in out


async def test_the_fastapi_app_runs_unchanged(
    sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app opens the client, shows the pool and closes it."""
    monkeypatch.setenv("CRUSTDATA_API_URL", sandbox.url)
    monkeypatch.setenv(
        "CRUSTDATA_API_KEYS", f"prod={sandbox.add_key(credits='9406.50').get_secret_value()}"
    )
    namespace: dict[str, object] = {}
    exec(compile(PYTHON[5], "README.md", "exec"), namespace)  # noqa: S102  # a reader runs it too

    def ask() -> list[object]:
        with TestClient(namespace["app"]) as client:  # type: ignore[arg-type]  # the README's app
            return [
                client.get(path).json()
                for path in ("/batch", "/credits/keys/prod", "/credits/healthz")
            ]

    batch, key, health = await asyncio.to_thread(ask)
    assert isinstance(batch, dict)
    assert isinstance(key, dict)
    assert (batch["total_credits"], key["state"], key["source"]) == ("9406.50", "fresh", "cached")
    assert health == {"status": "ok", "keys": 1, "known": 1, "reasons": []}


@pytest.mark.any_loop
@pytest.mark.parametrize("block", [6, 7, 8])
async def test_the_test_samples_run_unchanged(tmp_path: Path, block: int) -> None:
    """Under pytest, in a directory with nothing but the README's service."""
    (tmp_path / "service.py").write_text(PYTHON[5])
    (tmp_path / "test_service.py").write_text(PYTHON[block])
    options = ["-q", "-p", "no:cacheprovider", "-W", "error"]
    for option in (
        "asyncio_mode=auto",
        "asyncio_default_fixture_loop_scope=function",
        "pythonpath=.",
    ):
        options += ["-o", option]
    status, out = await run(sys.executable, "-m", "pytest", *options, HOME=str(tmp_path))
    assert status == 0, out
    assert "1 passed" in out


def test_ci_runs_the_documented_commands() -> None:
    """`.ci/run` reads them from the README, so there are two, each on one line."""
    commands = [code.strip() for language, code in BLOCKS if language == "console"]
    assert commands == [
        "python3 -m venv .venv && .venv/bin/pip install -q '.[cli]' && .venv/bin/crustcredits demo",
        "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/pytest",
    ]


def test_the_changelog_has_an_unreleased_section() -> None:
    """The entry is written with the change, not after it."""
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
