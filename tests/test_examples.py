"""Every example runs unchanged."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.conftest import on_uvloop

EXAMPLES = Path(__file__).parent.parent / "examples"
ON_UVLOOP = """
import asyncio, runpy, sys, uvloop
asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
runpy.run_path(sys.argv[1], run_name="__main__")
"""
# Text that each example must print.
SAID = {
    "check_pool.py": [
        "acme/prod    138940.37",
        "initech      unknown: the plan or the key's rights do not allow the request",
        "total        138940.37 (1 of 4",
    ],
    "stream_pool.py": [
        "customer-4 has only 400 credits",
        "5 customers have fewer than 500 credits",
    ],
    "preflight.py": [
        "4000: go, 5000.50 are there",
        "5000: wait, 5000.50 are known, and globex decides",
        "20000: stop, 9999.50 are missing",
    ],
    "choose_key.py": [
        "acme runs low: 70",
        "small job, 50 credits: globex",
        "huge job, 5000 credits: no key has enough",
        "3 requests for three jobs",
    ],
}


def test_every_example_has_a_test() -> None:
    """The app has a test beside it, and runs under uvicorn in `test_uvicorn.py`."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        *SAID,
        "fastapi_app.py",
        "test_fastapi_app.py",
    }


@pytest.mark.parametrize("name", SAID)
async def test_an_example_prints_the_expected_text(name: str) -> None:
    """On its own, with warnings as errors and without keys in the environment."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith("CRUSTDATA_")
    }
    command = [
        sys.executable,
        "-W",
        "error",
        *(["-c", ON_UVLOOP] if on_uvloop() else []),
        str(EXAMPLES / name),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, err.decode()) == (0, "")
    for line in SAID[name]:
        assert line in out.decode()
