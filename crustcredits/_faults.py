"""What can go wrong with an answer of the sandbox, and how it is done to a real connection.

It knows a request and what is to happen to it; which key it is ordered for and what is counted is `testing`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import gzip
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import web


class Fault(enum.Enum):
    """What can go wrong with the answer to a key; `SandboxServer.fail` orders it."""

    REFUSED = "429, as when the account is hammered from elsewhere"
    INTERNAL_ERROR = "500 with a JSON error"
    BAD_GATEWAY = "502 with a gateway's HTML"
    UNAVAILABLE = "503 with an empty body"
    PAYMENT_REQUIRED = "402, out of credits"
    FORBIDDEN = "403, the plan does not allow it"
    CHALLENGE = "403 with the HTML page of a gateway, which says nothing of the key"
    RESET = "the connection is reset before an answer"
    RESET_IN_BODY = "the connection is reset in the middle of the body"
    CUT_SHORT = "the connection is closed before the announced end of the body"
    SILENCE = "no answer, for ever"
    DRIP = "the answer begins, and its body drips for ever"
    NOT_JSON = "200 with text that is not JSON"
    WRONG_SHAPE = "200 with JSON of another shape"
    NAN = "200 with NaN for the credits"
    REDIRECT = "302 to another origin"
    ENDLESS = "200 with a body that does not end"
    BOMB = "200 with a small compressed body that swells to 16 MiB"
    COOKIE = "the right answer, and a cookie with the key's name"
    STALE = "the right answer, and the kept connection is lost just when the next request is on its way"


def reset(request: web.BaseRequest) -> web.Response:
    # With a linger of nought the kernel sends a reset instead of a proper end.
    transport_of(request).get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport_of(request).abort()
    return web.Response()


def transport_of(request: web.BaseRequest) -> asyncio.Transport:
    assert request.transport is not None, "a client that leaves cancels the handler"
    return request.transport


async def _begin(request: web.BaseRequest, headers: Mapping[str, str], *, length: int | None = None) -> web.StreamResponse:
    response = web.StreamResponse(headers=headers)
    response.content_type = "application/json"
    if length is not None:
        response.content_length = length
    await response.prepare(request)
    return response


@functools.cache
def bomb() -> bytes:
    """The 16 MiB, compressed to 16 KiB."""
    return gzip.compress(bytes(16 * 2**20))


async def _silence(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError("unreachable: the client's leaving cancels this")


async def _drip(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    return await _pour(request, headers, b" ", pause=0.02)


async def _endless(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    return await _pour(request, headers, b" " * 16_384, pause=0.0)


async def _pour(request: web.BaseRequest, headers: Mapping[str, str], chunk: bytes, *, pause: float) -> web.StreamResponse:
    response = await _begin(request, headers)
    # Until the client has had enough: then the handler is cancelled, or finds the connection gone first.
    with contextlib.suppress(ConnectionError):
        while True:
            await response.write(chunk)
            await asyncio.sleep(pause)
    return response  # pragma: no cover  # reached in the second case only, by chance


async def _reset_in_body(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    response = await _begin(request, headers, length=1000)
    await response.write(b'{"credits": ')
    # What was written must have been read by the client's side before the reset discards it.
    await asyncio.sleep(0.01)
    reset(request)
    return response


async def _cut_short(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    response = await _begin(request, headers, length=1000)
    await response.write(b'{"credits": 9406}')
    transport_of(request).close()
    return response


async def _reset_at_once(request: web.BaseRequest, headers: Mapping[str, str]) -> web.StreamResponse:
    return reset(request)


STREAMED: dict[Fault, Callable[[web.BaseRequest, Mapping[str, str]], Awaitable[web.StreamResponse]]] = {
    Fault.SILENCE: _silence,
    Fault.DRIP: _drip,
    Fault.ENDLESS: _endless,
    Fault.RESET: _reset_at_once,
    Fault.RESET_IN_BODY: _reset_in_body,
    Fault.CUT_SHORT: _cut_short,
}

JSON_TYPE = "application/json"
PLAIN: dict[Fault, tuple[int, str, str]] = {
    Fault.INTERNAL_ERROR: (
        500,
        JSON_TYPE,
        '{"error": {"type": "internal_error", "message": "Something went wrong", "metadata": {}}}',
    ),
    Fault.BAD_GATEWAY: (502, "text/html", "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"),
    Fault.UNAVAILABLE: (503, "text/plain", ""),
    Fault.PAYMENT_REQUIRED: (
        402,
        JSON_TYPE,
        '{"error": {"type": "insufficient_credits", "message": "Out of credits", "metadata": {}}}',
    ),
    Fault.FORBIDDEN: (403, JSON_TYPE, '{"error": {"type": "permission_error", "message": "Not in your plan", "metadata": {}}}'),
    Fault.CHALLENGE: (403, "text/html", "<html><head><title>Just a moment...</title></head><body>gateway</body></html>"),
    Fault.NOT_JSON: (200, JSON_TYPE, "credits: plenty"),
    Fault.WRONG_SHAPE: (200, JSON_TYPE, '{"credits": {"left": 9406}, "account": []}'),
    Fault.NAN: (200, JSON_TYPE, '{"credits": NaN, "account": {"credits": NaN}}'),
}
