"""Faults of a real connection.

This module knows a request, and no keys and no counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web

from crustcredits.testing._faults import Fault


def reset(request: web.BaseRequest) -> web.Response:
    # With a linger of 0 s the kernel sends a reset instead of a proper end.
    transport_of(request).get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    transport_of(request).abort()
    return web.Response()


def transport_of(request: web.BaseRequest) -> asyncio.Transport:
    assert request.transport is not None, "a disconnect of the client cancels the handler"
    return request.transport


async def _begin(
    request: web.BaseRequest, headers: Mapping[str, str], *, length: int | None = None
) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    response.content_type = "application/json"
    if length is not None:
        response.content_length = length
    await response.prepare(request)
    return response


@functools.cache
def bomb() -> bytes:
    """Return 16 MiB, compressed to 16 KiB."""
    return gzip.compress(bytes(16 * 2**20))


async def _silence(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable: a disconnect of the client cancels this")


async def _drip(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    return await _pour(request, headers, b" ", pause=0.02)


async def _endless(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    return await _pour(request, headers, b" " * 16_384, pause=0.0)


async def _pour(
    request: web.BaseRequest, headers: Mapping[str, str], chunk: bytes, *, pause: float
) -> web.StreamResponse:
    response = await _begin(request, headers)
    # Until the client disconnects: then the handler is cancelled, or first finds the connection
    # gone.
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(chunk)
            await asyncio.sleep(pause)
    return response  # pragma: no cover  # reached in the second case only, by chance


async def _reset_in_body(
    request: web.BaseRequest, headers: Mapping[str, str]
) -> web.StreamResponse:
    response = await _begin(request, headers, length=1000)
    await response.write(b'{"credits": ')
    # The client's side must have read this before the reset discards it.
    await asyncio.sleep(0.01)
    reset(request)
    return response


async def _cut_short(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    response = await _begin(request, headers, length=1000)
    await response.write(b'{"credits": 9406}')
    transport_of(request).close()
    return response


async def _reset_at_once(
    request: web.BaseRequest, headers: Mapping[str, str]
) -> web.StreamResponse:
    return reset(request)


STREAMED: dict[
    Fault, Callable[[web.BaseRequest, Mapping[str, str]], Awaitable[web.StreamResponse]]
] = {
    Fault.SILENCE: _silence,
    Fault.DRIP: _drip,
    Fault.ENDLESS: _endless,
    Fault.RESET: _reset_at_once,
    Fault.RESET_IN_BODY: _reset_in_body,
    Fault.CUT_SHORT: _cut_short,
}
