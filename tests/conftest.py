"""Loops for tests: the real one, and a virtual one for those marked `virtual`.

Never both in one test.
"""

from __future__ import annotations

import asyncio
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from unittest.mock import Mock

import hypothesis
import pytest
import uvloop
from aiohttp import ClientResponse
from aioresponses import aioresponses

from crustcredits.testing.fixtures import credits_client, make_credits_client, make_sandbox, sandbox
from tests import searches
from tests.redis.processes import redis, start
from tests.virtual import VirtualLoop

# Fixtures, found by their names.
__all__ = ["credits_client", "make_credits_client", "make_sandbox", "redis", "sandbox", "start"]


LOOPS: dict[
    str,
    tuple[Callable[[], asyncio.AbstractEventLoop], Callable[[], asyncio.AbstractEventLoopPolicy]],
] = {
    "asyncio": (asyncio.new_event_loop, asyncio.DefaultEventLoopPolicy),
    "uvloop": (uvloop.new_event_loop, uvloop.EventLoopPolicy),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    extents, names = ["few", "usual", "long"], [*LOOPS, "both"]
    parser.addoption(
        "--search",
        choices=extents,
        default="usual",
        help="How many examples searches try (default: usual).",
    )
    parser.addoption(
        "--loop",
        choices=names,
        default="both",
        help="The loop for tests in real time (default: both).",
    )


def pytest_configure(config: pytest.Config) -> None:
    searches.extent = config.getoption("--search")
    # No example is a test of speed; the whole test has a time limit.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")
    config.addinivalue_line("markers", "virtual: runs in virtual time, without sockets")
    config.addinivalue_line(
        "markers", "thorough: tests a search itself, which CI does in one of its runs"
    )
    config.addinivalue_line(
        "markers", "outages: waits for real outages of Redis, which CI does on one Python"
    )
    config.addinivalue_line("markers", "own_loops: runs loops of its own, so it is no coroutine")
    config.addinivalue_line(
        "markers",
        "any_loop: runs a program in another process, so the loop of the test does not matter",
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if searches.extent == "few" and item.get_closest_marker("thorough"):
        pytest.skip("a search with few examples is not tested itself")


def loops(config: pytest.Config) -> list[str]:
    """The names of the configured loops."""
    wanted = config.getoption("--loop")
    return [name for name in LOOPS if wanted in {name, "both"}]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("virtual"):
        return {"virtual": VirtualLoop}
    if item.get_closest_marker("any_loop"):
        return {"asyncio": asyncio.new_event_loop}
    return {name: LOOPS[name][0] for name in loops(config)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marked = next(metafunc.definition.iter_markers("own_loops"), None)
    if marked is not None and not inspect.iscoroutinefunction(metafunc.function):
        metafunc.parametrize("loop_policy", loops(metafunc.config), indirect=True)


@pytest.fixture(autouse=True)
def loop_policy(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests marked `own_loops`: new loops are of this kind."""
    if not hasattr(request, "param"):
        yield
        return
    asyncio.set_event_loop_policy(LOOPS[request.param][1]())
    yield
    asyncio.set_event_loop_policy(None)


@pytest.fixture(autouse=True)
def _same_jitter(request: pytest.FixtureRequest) -> None:
    """A test in virtual time has the same run each time.

    The jitter of retries is drawn from a seed of its own.
    """
    random.seed(request.node.nodeid)


def on_uvloop() -> bool:
    """Whether the running loop is uvloop's."""
    return isinstance(asyncio.get_running_loop(), uvloop.Loop)


class BridgedResponse(ClientResponse):
    """Gives aiohttp 3.14 the argument that aioresponses 0.7.9 does not know of."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, stream_writer=Mock(output_size=0), **kwargs)  # type: ignore[arg-type]  # passed through


@pytest.fixture
def mocked() -> Iterator[aioresponses]:
    """aioresponses, for requests that are compared; tests of sockets use the sandbox."""
    with aioresponses() as mock:
        yield mock


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait up to a second: the other side of a socket sees a change a moment later."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the condition did not become true within 1 s")
