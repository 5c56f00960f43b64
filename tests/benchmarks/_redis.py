"""A Redis of the benchmark's own: its process, and its number of messages."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.exceptions import ConnectionError as NotThereError

# Seconds that it may take to start, and to end.
_PATIENCE = 10.0

# The messages that both contenders with Redis send, except the greeting of a new connection. A
# command inside a script is no message.
_MESSAGES = ("cmdstat_evalsha", "cmdstat_eval", "cmdstat_script|load")


class RedisServer:
    """A running Redis, seen from outside.

    Attributes:
        url: Its address.
        version: Its version.
    """

    def __init__(self, port: int) -> None:
        self.url = f"redis://127.0.0.1:{port}/0"
        self.version = ""
        self._client: Any = Redis.from_url(self.url)

    def greet(self) -> None:
        """Wait until it answers."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self.version = self._client.info("server")["redis_version"]
            except NotThereError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return

    def messages(self) -> int:
        """Scripts that clients sent it to run or to store: a round trip each."""
        calls = self._client.info("commandstats")
        return sum(calls.get(name, {}).get("calls", 0) for name in _MESSAGES)

    def close(self) -> None:
        self._client.close()


@contextmanager
def redis_process() -> Iterator[RedisServer]:
    """A fresh Redis on a free port of this machine, which stores nothing on disk.

    It ends with the block.
    """
    binary = shutil.which("redis-server")
    if binary is None:
        sys.exit("This benchmark needs the program redis-server: apt-get install redis-server")
    port = _free_port()
    with tempfile.TemporaryDirectory() as directory:
        command = [
            binary,
            "--port",
            str(port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            directory,
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        server = RedisServer(port)
        try:
            server.greet()
            yield server
        finally:
            server.close()
            process.terminate()
            process.wait(_PATIENCE)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
