"""Real processes that spend one quota, and what the API and they themselves saw of an outage.

Times are those of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs

from crustcredits.testing import SandboxServer
from tests.redis.outage_worker import Settings
from tests.servers import RedisServer

LOOPS = ("asyncio", "uvloop")

# Seconds that processes may take to start on a busy machine.
_PATIENCE = 20.0


@attrs.frozen(kw_only=True)
class Call:
    """One call of a worker.

    Attributes:
        began: When it began.
        at: When it ended.
        outcome: `answered`, or the name of its error.
    """

    began: float
    at: float
    outcome: str

    @property
    def is_answered(self) -> bool:
        return self.outcome == "answered"


@attrs.frozen(kw_only=True)
class LogLine:
    """A warning of a worker."""

    at: float
    text: str


@attrs.define(eq=False)
class Member:
    """A worker, seen from outside.

    Attributes:
        place: Its number in the fleet.
        name: The name of its tokens in Redis.
        calls: Its calls that have ended.
        log: Its warnings.
        failure: What it wrote to its standard error.
    """

    place: int
    _process: asyncio.subprocess.Process
    name: str = ""
    calls: list[Call] = attrs.field(factory=list)
    log: list[LogLine] = attrs.field(factory=list)
    failure: str = ""
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list)

    def listen(self) -> None:
        """Begin to read its output."""
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._read_failure())]

    def send(self, number: signal.Signals) -> float:
        """Send it a signal. Returns the time."""
        self._process.send_signal(number)
        return time.monotonic()

    async def end(self) -> None:
        """Kill it, also when it stands still."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(*self._tasks)
        assert not self.failure, self.failure

    def longest_stall(self, since: float, until: float) -> float:
        """The most seconds between two answers in this time, its begin and its end included."""
        ends = [call.at for call in self.calls if call.is_answered and since < call.at < until]
        return max(
            (later - earlier for earlier, later in zip([since, *ends], [*ends, until], strict=True))
        )

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            if not line.endswith(b"\n"):  # it was killed
                return
            said = json.loads(line)
            kind = said.pop("kind")
            if kind == "call":
                self.calls.append(Call(**said))
            elif kind == "log":
                self.log.append(LogLine(**said))
            else:
                self.name = said["name"]

    async def _read_failure(self) -> None:
        assert self._process.stderr is not None
        self.failure = (await self._process.stderr.read()).decode()


@asynccontextmanager
async def fleet(settings: Sequence[Settings]) -> AsyncIterator[list[Member]]:
    """Start a worker for each of the settings. They are ended with the block."""
    members: list[Member] = []
    try:
        for place, each in enumerate(settings):
            members.append(await _start(place, each))
        await until(lambda: all(member.name for member in members), _PATIENCE)
        yield members
    finally:
        await asyncio.gather(*(member.end() for member in members))


async def _start(place: int, settings: Settings) -> Member:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.redis.outage_worker",
        json.dumps(attrs.asdict(settings)),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    member = Member(place, process)
    member.listen()
    return member


def add_keys(sandbox: SandboxServer, processes: int, count: int) -> list[list[str]]:
    """Give each worker `count` keys. Returns their secrets; their names begin with the place."""
    secrets = [
        {f"{place}-{number}": f"secret-of-{place}-{number}" for number in range(count)}
        for place in range(processes)
    ]
    for of_one in secrets:
        for name, secret in of_one.items():
            sandbox.add_key(name, secret=secret)
    return [list(of_one.values()) for of_one in secrets]


def arrivals_of(sandbox: SandboxServer, places: Container[int]) -> list[float]:
    """When the requests of these workers arrived."""
    return [
        arrival.at
        for arrival in sandbox.arrivals
        if arrival.key is not None and int(arrival.key.split("-", maxsplit=1)[0]) in places
    ]


def out(server: RedisServer, prefix: str, member: Member, *, until: float = 0.0) -> int:
    """How many tokens of a worker are out in Redis, for more than `until` seconds from now."""
    seconds, micros = map(int, server.ask("TIME"))  # type: ignore[call-overload]  # two numbers
    bucket = f"{{{prefix}}}:/user/credits"
    since = seconds * 1_000_000 + micros + round(until * 1e6)
    found = server.ask("ZRANGEBYSCORE", bucket, f"({since}", "+inf")
    assert isinstance(found, list)
    return sum(token.decode().startswith(member.name) for token in found)


def worst_window(times: Iterable[float], period: float) -> int:
    """The most of the times in any one period."""
    ascending = sorted(times)
    worst, first = 0, 0
    for last, at in enumerate(ascending):
        while ascending[first] <= at - period:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


async def until(condition: Callable[[], Any], seconds: float) -> None:
    """Wait until it is true.

    Raises:
        AssertionError: It did not become true in time.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"did not happen within {seconds:g} s"
        await asyncio.sleep(0.02)


async def passes(moment: float) -> None:
    """Sleep until then: the length of an outage is real time."""
    await asyncio.sleep(moment - time.monotonic())
