"""The parts that `service` and `outage` share: an app in a process, a cheap load, read answers.

The credits of the sandbox's keys are the wall time, so an answer shows when the API gave it,
independent of the age it states.
"""

from __future__ import annotations

import asyncio
import gc
import math
import multiprocessing
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

import attrs
import uvicorn
from fastapi import FastAPI

from crustcredits import ApiKey, CreditsClient
from crustcredits.fastapi import credits_lifespan, credits_router

KEYS = 100
MAX_AGE = 5.0
REVALIDATE = 120.0

# Seconds that a load may take beyond its given time.
_PATIENCE = 60.0


# --- the app


def service_app(
    url: str, secrets: Sequence[str], *, max_age: float = MAX_AGE, prefix: str = ""
) -> FastAPI:
    """A service that shows these keys, as its users would make it."""
    keys = [
        ApiKey(secret, name=name)
        for secret, name in zip(secrets, key_names(len(secrets)), strict=True)
    ]
    app = FastAPI(lifespan=credits_lifespan(partial(CreditsClient, base_url=url)))

    @app.get("/tasks")
    async def get_tasks() -> int:
        return len(asyncio.all_tasks())

    app.include_router(
        credits_router(
            keys, public=True, max_age=max_age, stale_while_revalidate=REVALIDATE, prefix=prefix
        )
    )
    return app


def key_names(count: int) -> list[str]:
    return [f"name-{place:03}" for place in range(count)]


@attrs.frozen
class App:
    """The address and the process of the app."""

    process: int
    port: int


@contextmanager
def app_process(make_app: Callable[[], FastAPI]) -> Iterator[App]:
    """The app under uvicorn, one worker, in a process of its own that ends with the block.

    `make_app` is sent to that process.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make_app), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield App(process.pid, ours.recv())
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(control: Connection, make_app: Callable[[], FastAPI]) -> None:
    config = uvicorn.Config(
        make_app(), host="127.0.0.1", port=0, log_level="warning", access_log=False
    )
    _Server(config, control).run()


class _Server(uvicorn.Server):
    """Reports its port over a pipe, and ends when the pipe is closed."""

    def __init__(self, config: uvicorn.Config, control: Connection) -> None:
        super().__init__(config)
        self._control = control

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._control.send(self.servers[0].sockets[0].getsockname()[1])
        # No thread, which would count in the measured memory.
        asyncio.get_running_loop().add_reader(self._control.fileno(), self._end)

    def _end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self.should_exit = True


# --- the load


class Answered(NamedTuple):
    """One answer as it came."""

    sent: float  # seconds of the performance counter
    came: float
    wall: float  # when it came, in seconds of the wall clock
    status: int
    body: bytes

    @property
    def latency(self) -> float:
        """Milliseconds."""
        return (self.came - self.sent) * 1000


_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)


def request_for(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


class _Client(asyncio.Protocol):
    """One keep-alive connection.

    It reads as little as it may, because it shares the machine with the measured app.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._received = b""
        self._sent = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._load.lost()

    def ask(self, request: bytes) -> None:
        self._sent = time.perf_counter()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not blank or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        self._load.answered(
            self, Answered(self._sent, time.perf_counter(), time.time(), int(head[9:12]), body)
        )


class Load:
    """A closed loop: each connection asks again as soon as it has been answered."""

    def __init__(self) -> None:
        self._clients: list[_Client] = []
        self._requests: Iterator[bytes] = iter(())
        self._until = 0.0
        self._busy = 0
        self._answers: list[Answered] = []
        self._ended: asyncio.Future[None] | None = None

    async def run(self, requests: Iterable[bytes], seconds: float = math.inf) -> list[Answered]:
        """Send the requests until they or the given seconds end.

        Returns the answers, in the order they came.
        """
        if any(client.transport.is_closing() for client in self._clients):
            raise _closed()
        self._ended = asyncio.get_running_loop().create_future()
        self._requests, self._until, self._answers = (
            iter(requests),
            time.perf_counter() + seconds,
            [],
        )
        self._busy = len(self._clients)
        for client in self._clients:
            self._go_on(client)
        async with asyncio.timeout(_PATIENCE + (0.0 if seconds == math.inf else seconds)):
            await self._ended
        return self._answers

    def answered(self, client: _Client, answer: Answered) -> None:
        self._answers.append(answer)
        self._go_on(client)

    def lost(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(_closed())

    def _go_on(self, client: _Client) -> None:
        request = next(self._requests, None) if time.perf_counter() < self._until else None
        if request is not None:
            client.ask(request)
            return
        self._busy -= 1
        if not self._busy and self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    async def connect(self, port: int, connections: int) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            self._clients.append(
                (await loop.create_connection(lambda: _Client(self), "127.0.0.1", port))[1]
            )

    def close(self) -> None:
        for client in self._clients:
            client.transport.close()


def _closed() -> ConnectionError:
    return ConnectionError("the app closed a connection")


@asynccontextmanager
async def load_on(app: App, connections: int) -> AsyncIterator[Load]:
    load = Load()
    try:
        await load.connect(app.port, connections)
        yield load
    finally:
        load.close()


@contextmanager
def no_collector() -> Iterator[None]:
    """Turn off this process's garbage collector, because its pauses would count as the app's.

    They grow with the answers that the process holds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# --- answers


def must_be_ok(answers: Iterable[Answered]) -> None:
    for answer in answers:
        if answer.status != 200:
            raise RuntimeError(f"an answer has the status {answer.status}: {answer.body.decode()}")


class Stated(NamedTuple):
    """The statement of one key's answer."""

    name: str
    stale: bool
    given: float  # its credits: when the API gave them, in seconds of the wall clock
    error: bool
    age: float


# Much cheaper than json.loads, and each answer is read.
_STATED = re.compile(
    rb'\{"key":"([^"]+)","account":null,"state":"(fresh|stale)","credits":"([\d.]+)",'
    rb'"checked_at":"[^"]+","source":"\w+","error":(null|\{[^}]*\}),"age":([\d.]+)\}'
)


def read_key(body: bytes) -> Stated:
    match = _STATED.fullmatch(body)
    if match is None:
        raise ValueError(f"this is no answer of one key: {body.decode()}")
    name, state, given, error, age = match.groups()
    return Stated(name.decode(), state == b"stale", float(given), error != b"null", float(age))


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]
