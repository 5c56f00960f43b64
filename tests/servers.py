"""Real Redis servers, each in a directory of its own, ended by the test process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError

# Seconds that a server may take to start; a cluster's server waits for two by itself.
_PATIENCE = 10.0


class RedisServer:
    """`redis-server` on a Unix socket, or with a `port` on loopback.

    Nothing is written to the disk.
    """

    def __init__(self, *options: str, port: int = 0) -> None:
        self._binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if self._binary is None:
            pytest.fail(
                "these tests need redis-server 6.2 or later, or valkey-server: apt install "
                "redis-server"
            )
        self._directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        self.socket = self._directory / "socket"
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}" if self.port else f"unix://{self.socket}"

    def start(self) -> None:
        assert self._binary is not None
        place = (
            "--dir",
            str(self._directory),
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--unixsocket",
            str(self.socket),
        )
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [self._binary, *place, "--save", "", "--appendonly", "no", *self._options],
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_answers()

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(_PATIENCE)
        self._process = None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it without a chance to do anything, also when it stands still."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(_PATIENCE)
        self._process = None

    def restart(self) -> None:
        """Restart with an empty memory, without scripts."""
        self.stop()
        self.start()

    def remove(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self._directory)

    def ask(self, *command: str | int) -> object:
        """Return the answer to one command, over a connection of its own."""
        with contextlib.closing(Redis(unix_socket_path=str(self.socket))) as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.ask("PING")
            except RedisError:
                if time.monotonic() > deadline:
                    pytest.fail(
                        f"redis-server did not come up: {(self._directory / 'log').read_text()}"
                    )
                time.sleep(0.01)
            else:
                return


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for all tests, each with its own prefix."""
    server = RedisServer()
    yield server
    server.remove()


@pytest.fixture
async def own_server() -> AsyncIterator[RedisServer]:
    """A server that one test may stop and configure."""
    server = await asyncio.to_thread(RedisServer)
    yield server
    await asyncio.to_thread(server.remove)


def forget(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a package import again from scratch."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
