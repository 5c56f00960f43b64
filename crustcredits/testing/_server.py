"""`SandboxServer`: the fake API on a real loopback socket, with faults of its connections."""

from __future__ import annotations

import asyncio
import random
from types import TracebackType
from typing import Literal, Self
from weakref import WeakSet

from aiohttp import web

from crustcredits._errors import ConfigurationError
from crustcredits._validation import check_kind, check_number, check_whole, hides_arguments
from crustcredits.testing._api import FakeAPI, ServerScope
from crustcredits.testing._faults import Fault
from crustcredits.testing._sockets import STREAMED, bomb, reset, transport_of


class SandboxServer(FakeAPI):
    """A stand-in for the API on 127.0.0.1, as an async context manager.

    Args:
        limit: Requests that each endpoint takes in any one period.
        period: Seconds that a request counts for after its arrival; the window slides.
        scope: The limit counts all requests together (`"client"`), each account or each key.
        delay: Seconds that an answer takes, drawn evenly between the two numbers, part of it before
            the request is counted.
        host: The host in `url`, `127.0.0.1` or `localhost`.
        port: The port to listen on; by default a free one.
        record: Whether to record every arrival; without, memory does not grow with the requests.

    Attributes:
        arrivals: Every request, in order of arrival; empty without `record`.
        requests: Number of requests.
        refused: Requests answered 429 because the window was full. Ordered refusals do not count.
        peak_connections: The most connections that were open when a request came.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        limit: int = 300,
        period: float = 60.0,
        scope: ServerScope = "client",
        delay: tuple[float, float] = (0.0, 0.0),
        host: Literal["127.0.0.1", "localhost"] = "127.0.0.1",
        port: int = 0,
        record: bool = True,
    ) -> None:
        super().__init__(limit=limit, period=period, scope=scope, record=record)
        if host not in {"127.0.0.1", "localhost"}:
            raise ConfigurationError("host must be '127.0.0.1' or 'localhost'")
        check_whole("port", port, minimum=0)
        check_kind("delay", delay, tuple)
        check_number("delay[0]", delay[0], minimum=0)
        check_number("delay[1]", delay[1], minimum=delay[0])
        self.peak_connections: int = 0
        self._delay = delay
        self._host = host
        self._stale: WeakSet[asyncio.BaseTransport] = WeakSet()
        self._runner: web.ServerRunner | None = None
        self._port = port

    @property
    def url(self) -> str:
        """Its base URL, while it runs."""
        return f"http://{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """Connections open now."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    async def __aenter__(self) -> Self:
        # A client that disconnects ends its handler; otherwise a silent one would outlive it.
        self._runner = web.ServerRunner(
            web.Server(self._handle, handler_cancellation=True, access_log=None),
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        delay = random.uniform(*self._delay)
        travel = random.uniform(0.0, delay)
        if travel:
            await asyncio.sleep(travel)
        self.peak_connections = max(self.peak_connections, self.connections)
        answer = self.answer(request.method, request.path, request.headers)
        if delay:
            await asyncio.sleep(delay - travel)
        if request.transport in self._stale:
            return reset(request)
        if answer.fault in STREAMED:
            return await STREAMED[answer.fault](request, answer.headers)
        if answer.fault is Fault.REDIRECT:
            host = "localhost" if self._host == "127.0.0.1" else "127.0.0.1"
            return web.Response(
                status=302,
                headers={**answer.headers, "Location": f"http://{host}:{self._port}/elsewhere"},
            )
        if answer.fault is Fault.BOMB:
            return web.Response(
                body=bomb(),
                headers={**answer.headers, "Content-Encoding": "gzip"},
                content_type=answer.kind,
            )
        response = web.Response(
            status=answer.status, text=answer.body, content_type=answer.kind, headers=answer.headers
        )
        if answer.fault is Fault.COOKIE and answer.label is not None:
            response.set_cookie("session", answer.label)
        if answer.fault is Fault.STALE:
            self._stale.add(transport_of(request))
        return response
