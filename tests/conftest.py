"""Loops for tests: the real one, and a virtual one for those marked `virtual`. Never both in one test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from unittest.mock import Mock

import pytest
from aiohttp import ClientResponse
from aioresponses import aioresponses

from crustcredits.fixtures import credits_client, sandbox
from tests.processes import redis, start
from tests.virtual import VirtualLoop

__all__ = ["credits_client", "redis", "sandbox", "start"]  # fixtures, found by their names


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "virtual: runs in virtual time, without sockets")


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.get_closest_marker("virtual"):
        return {"virtual": VirtualLoop}
    return {"real": asyncio.new_event_loop}


class BridgedResponse(ClientResponse):
    """Gives aiohttp 3.14 the argument that aioresponses 0.7.9 does not know of."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, stream_writer=Mock(output_size=0), **kwargs)  # type: ignore[arg-type]  # passed through


@pytest.fixture
def mocked() -> Iterator[aioresponses]:
    """aioresponses, for what was sent; whatever has to do with sockets has the sandbox."""
    with aioresponses() as mock:
        yield mock


async def eventually(condition: Callable[[], bool]) -> None:
    """The other side of a socket learns of it a moment later."""
    for _ in range(100):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that within a second")
