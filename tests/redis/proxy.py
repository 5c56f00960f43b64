"""A TCP proxy before a Redis server that fails on request: it cuts, loses, delays and stalls.

A message is a run of the script. What a new connection sends first is no message: a lost greeting
is an outage, and not the loss of one answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

import attrs

# Bytes that are read at once. A message of these tests is far shorter.
_CHUNK = 65_536


@attrs.define(eq=False)
class _Connection:
    """A client's connection, and the one to the server that belongs to it.

    Attributes:
        writer: To the client.
        upstream: To the server; None before it is connected.
        waiting: Messages without an answer.
        answered: Messages that were answered.
    """

    writer: asyncio.StreamWriter
    upstream: asyncio.StreamWriter | None = None
    waiting: int = 0
    answered: int = 0

    def answer(self, text: bytes) -> None:
        """Pass an answer on, unless the client has gone."""
        if not self.writer.is_closing():
            self.writer.write(text)

    def abort(self) -> None:
        """Close both connections at once."""
        for writer in (self.writer, self.upstream):
            if writer is not None:
                writer.transport.abort()


class Proxy:
    """Listens on 127.0.0.1 while its block runs. All faults may change at any moment.

    Args:
        target: The server's socket, or its port on 127.0.0.1; new connections go there.

    Attributes:
        target: As above.
        lose_each: Close the connection in place of each answer of this number; 0 for none.
        stall_after: Answer no more on a connection after this many answers; None for no bound.
        delay: Seconds that each answer takes, also one to a greeting.
        is_half_open: Accept connections, and answer nothing on any of them.
        late: How many answers are delayed now.
        lost_at: The loop's time at which the first answer was lost or late.
    """

    def __init__(self, target: Path | int) -> None:
        self.target = target
        self.lose_each = 0
        self.stall_after: int | None = None
        self.delay = 0.0
        self.is_half_open = False
        self.late = 0
        self.lost_at: float | None = None
        self._is_cut = False
        self._answers = 0
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.close_connections()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Close every connection, and each new one at once."""
        self._is_cut = True
        self._note_loss()
        self.close_connections()

    def restore(self) -> None:
        """Let all through again. Connections that were stalled stay so."""
        self._is_cut = self.is_half_open = False
        self.lose_each, self.stall_after, self.delay = 0, None, 0.0

    def close_connections(self) -> None:
        """Close every connection; new ones are accepted."""
        for connection in self._connections:
            connection.abort()

    # --- one connection

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        try:
            if not self._is_cut:
                with contextlib.suppress(OSError):
                    await self._join(reader, connection)
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _join(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        if isinstance(self.target, Path):
            answers, connection.upstream = await asyncio.open_unix_connection(self.target)
        else:
            answers, connection.upstream = await asyncio.open_connection("127.0.0.1", self.target)
        ways = [
            asyncio.ensure_future(self._upward(reader, connection, connection.upstream)),
            asyncio.ensure_future(self._downward(answers, connection)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _upward(
        self,
        reader: asyncio.StreamReader,
        connection: _Connection,
        upstream: asyncio.StreamWriter,
    ) -> None:
        while said := await reader.read(_CHUNK):
            is_message = b"EVAL" in said
            if self.is_half_open:
                self._note_loss()
                continue
            connection.waiting += is_message
            upstream.write(said)
            await upstream.drain()

    async def _downward(self, answers: asyncio.StreamReader, connection: _Connection) -> None:
        while answer := await answers.read(_CHUNK):
            if self.is_half_open:
                self._note_loss()
                continue
            if connection.waiting:
                connection.waiting -= 1
                connection.answered += 1
                self._answers += 1
                if self._stalls(connection):
                    self._note_loss()
                    continue
                if self.lose_each and self._answers % self.lose_each == 0:
                    self._note_loss()
                    return
            if self.delay:
                self._note_loss()
                # Each answer takes so long, also where several are on their way.
                self.late += 1
                asyncio.get_running_loop().call_later(self.delay, self._pass_on, connection, answer)
            else:
                connection.answer(answer)

    def _pass_on(self, connection: _Connection, answer: bytes) -> None:
        self.late -= 1
        connection.answer(answer)

    def _stalls(self, connection: _Connection) -> bool:
        return self.stall_after is not None and connection.answered > self.stall_after

    def _note_loss(self) -> None:
        if self.lost_at is None:
            self.lost_at = asyncio.get_running_loop().time()
