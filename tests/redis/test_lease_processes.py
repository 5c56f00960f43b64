"""The leader's lease with a real server, and between real processes that are killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import attrs
import pytest
from redis.asyncio import Redis

from crustcredits import ConfigurationError, CreditsClient
from crustcredits.redis import RedisBackend
from crustcredits.redis.lease import Lease
from crustcredits.testing import SandboxServer
from tests.conftest import on_uvloop
from tests.servers import RedisServer, free_port, own_server, redis_server

__all__ = ["own_server", "redis_server"]  # fixtures, found by their names

# Seconds of a lease between processes. A takeover has a fifth of it for the machine's delays.
SPAN = 1.0

# A process that works as the leader. Each step goes to a resource that checks its fencing number.
# It can stop itself in the middle of its work. When it goes on, it tells at once whether it is the
# leader, and sends one more step.
PROGRAM = """
import asyncio, os, signal, sys, time
from redis.asyncio import Redis
from crustcredits.redis import RedisBackend

STEP = '''
local highest = tonumber(redis.call('GET', KEYS[1]) or '0')
if tonumber(ARGV[1]) < highest then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
redis.call('RPUSH', KEYS[2], ARGV[1])
return 1
'''

async def main(url, prefix, seconds):
    lost = []
    backend = RedisBackend(url, prefix=prefix, on_outage="raise")
    resource = Redis.from_url(url)

    async def step(lease):
        number = str(lease.fencing_number)
        return await resource.eval(STEP, 2, prefix + "highest", prefix + "steps", number)

    print("starts", flush=True)
    async with backend.lease(
        "watcher", seconds=float(seconds), on_lost=lambda: lost.append(1)
    ) as lease:
        print("leads", lease.fencing_number, time.monotonic(), flush=True)
        while await resource.get(prefix + "stops") != str(os.getpid()).encode():
            assert await step(lease) == 1
            await asyncio.sleep(0.005)
        os.kill(os.getpid(), signal.SIGSTOP)
        held, reported = lease.is_held, len(lost)
        taken = await step(lease)
        await asyncio.sleep(0.02)
        print("woke", held, reported, taken, lease.is_held, len(lost), flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@attrs.frozen
class Process:
    """A process that runs the program."""

    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, url: str, prefix: str) -> Process:
        loop = "import asyncio, uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())\n"
        code = (loop if on_uvloop() else "") + PROGRAM
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, url, prefix, str(SPAN), stdout=asyncio.subprocess.PIPE
        )
        one = cls(process)
        assert await one.line() == ["starts"]
        return one

    async def line(self) -> list[str]:
        assert self.process.stdout is not None
        return (await self.process.stdout.readline()).decode().split()

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@pytest.fixture
async def pair(redis_server: RedisServer, prefix: str) -> AsyncIterator[tuple[Process, Process]]:
    """A leader and a candidate."""
    processes = []
    try:
        processes.append(await Process.start(redis_server.url, prefix))
        assert (await processes[0].line())[0] == "leads"
        processes.append(await Process.start(redis_server.url, prefix))
        yield processes[0], processes[1]
    finally:
        for process in processes:
            await process.end()


def steps(server: RedisServer, prefix: str) -> list[int]:
    """The fencing numbers of the steps that the resource took."""
    found = server.ask("LRANGE", f"{prefix}steps", 0, -1)
    assert isinstance(found, list)
    return [int(number) for number in found]


async def test_a_killed_leader_is_replaced(
    redis_server: RedisServer, prefix: str, pair: tuple[Process, Process]
) -> None:
    """Within 1.2 times the lease's time."""
    leader, candidate = pair
    await asyncio.sleep(0.05)  # it asks before
    leader.process.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    word, number, led_at = await candidate.line()
    assert word == "leads"
    assert float(led_at) - killed_at <= 1.2 * SPAN
    taken = await asyncio.to_thread(steps, redis_server, prefix)
    assert taken == sorted(taken)
    assert taken[0] < int(number)


async def test_a_stopped_leader_is_no_leader_when_it_goes_on(
    redis_server: RedisServer, prefix: str, pair: tuple[Process, Process]
) -> None:
    """It sees so at once, and its next step is refused: none comes after one of the newer term."""
    leader, candidate = pair
    pid = leader.process.pid
    await asyncio.to_thread(redis_server.ask, "SET", f"{prefix}stops", pid)
    _, number, _ = await candidate.line()
    for _ in range(500):
        if int(number) in await asyncio.to_thread(steps, redis_server, prefix):
            break
        await asyncio.sleep(0.01)
    leader.process.send_signal(signal.SIGCONT)
    assert await leader.line() == ["woke", "False", "0", "0", "False", "1"]
    taken = await asyncio.to_thread(steps, redis_server, prefix)
    assert taken == sorted(taken)
    assert len(set(taken)) == 2


# --- one process, real connections


def backend(url: str | Redis, prefix: str = "p") -> RedisBackend:
    return RedisBackend(url, prefix=prefix, on_outage="raise")


async def enter(one: Lease) -> Lease:
    async with one:
        return one


@pytest.mark.parametrize("options", [{}, {"protocol": 3}, {"decode_responses": True}])
async def test_a_lease_is_kept_and_released(
    redis_server: RedisServer, prefix: str, options: dict[str, Any]
) -> None:
    """It needs no client. Redis keeps only the number of the last term."""
    given = Redis(unix_socket_path=str(redis_server.socket), **options)
    name = f"{{{prefix}}}:lease:the watcher"
    numbers = []
    for _ in range(2):
        async with backend(given, prefix).lease("the watcher", seconds=0.12) as lease:
            await asyncio.sleep(0.05)
            left = await asyncio.to_thread(redis_server.ask, "PTTL", name)
            assert 0 < int(str(left)) <= 120
            assert lease.is_held
            numbers.append(lease.fencing_number)
        assert await asyncio.to_thread(redis_server.ask, "EXISTS", name) == 0
    assert numbers[0] < numbers[1]
    kept = await asyncio.to_thread(redis_server.ask, "KEYS", f"{{{prefix}}}:*")
    assert kept == [f"{{{prefix}}}:term:the watcher".encode()]
    await given.aclose()


async def test_a_loop_that_was_blocked_holds_no_lease(
    redis_server: RedisServer, prefix: str
) -> None:
    """At once. On uvloop the loop's clock stands still meanwhile."""
    shared = backend(redis_server.url, prefix)
    async with shared.lease("watcher", seconds=0.05) as lease:
        before = lease.is_held
        time.sleep(0.046)  # noqa: ASYNC251  # blocks on purpose
        after = lease.is_held
    assert (before, after) == (True, False)
    await shared.close()


async def test_a_lease_and_a_client_share_a_backend(redis_server: RedisServer, prefix: str) -> None:
    """The client closes the backend, so its block is the outer one."""
    shared = backend(redis_server.url, prefix)
    async with (
        SandboxServer() as sandbox,
        CreditsClient(base_url=sandbox.url, backend=shared) as client,
        shared.lease("watcher") as lease,
    ):
        await client.balance(sandbox.add_key(), timeout=10)
        assert lease.is_held


async def test_entering_waits_for_a_server_that_is_gone(own_server: RedisServer) -> None:
    await asyncio.to_thread(own_server.stop)
    shared = backend(own_server.url)
    entering = asyncio.create_task(enter(shared.lease("watcher", seconds=0.5)))
    await asyncio.sleep(0.05)
    assert not entering.done()
    await asyncio.to_thread(own_server.start)
    assert (await entering).fencing_number > 0
    await shared.close()


async def refused(url: str, message: str) -> None:
    shared = backend(url)
    with pytest.raises(ConfigurationError, match=message) as caught:
        await enter(shared.lease("watcher"))
    assert "hunter2" not in repr(caught.value)
    await shared.close()


async def test_a_lease_refuses_a_redis_that_it_cannot_use(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong password, a wrong database, too few rights, and a server that evicts keys."""
    ask, socket = own_server.ask, own_server.socket
    await refused(f"unix://{socket}?db=99", "no database of this number")
    for user, rights in {"none": "-evalsha -eval", "few": "-incr"}.items():
        rules = ["on", ">hunter2", "~*", "+@all", *rights.split()]
        await asyncio.to_thread(ask, "ACL", "SETUSER", user, *rules)
        await refused(f"unix://{user}:hunter2@{socket}", "no right to run the script")
    await refused(f"unix://none:hunter22@{socket}", "refuses the user name or the password")
    await asyncio.to_thread(ask, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    await asyncio.to_thread(ask, "CONFIG", "SET", "maxmemory", "100mb")
    await refused(own_server.url, "may evict")
    assert "hunter2" not in caplog.text


async def test_a_server_that_is_no_redis_is_refused() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        while await reader.read(1024):
            pass
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await refused(f"redis://127.0.0.1:{port}", "is not a Redis; correct the URL")


async def test_no_secret_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """While Redis is out of reach."""
    shared = backend(f"redis://me:hunter2@127.0.0.1:{free_port()}")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(enter(shared.lease("watcher")), 0.05)
    assert "no reply from Redis for lease 'watcher' (ConnectionError" in caplog.text
    assert "hunter2" not in caplog.text
    await shared.close()
