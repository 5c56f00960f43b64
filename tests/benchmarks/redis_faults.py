"""Three processes that spend one quota over a Redis that fails: windows, stalls and log lines.

Not to be confused with `outage`, in which the API is away. Each process always has calls that wait.
Each fault comes when the limit has been used up for two periods, once on each loop. The processes
have the default setting, `on_outage="local"`. All reach Redis through a proxy, so that they follow
a failover; a cluster tells them its nodes itself.

Judged is what the README promises, and that calls go on within six seconds. Nothing is promised for
a Redis that evicts keys, so there only the stall is judged.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeAlias

import attrs

from crustcredits.testing import SandboxServer
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    print_machine,
    print_table,
    whole,
)
from tests.redis.outage_fleet import (
    LOOPS,
    Member,
    add_keys,
    arrivals_of,
    fleet,
    out,
    passes,
    until,
    worst_window,
)
from tests.redis.outage_worker import Settings
from tests.redis.proxy import Proxy
from tests.servers import RedisServer, free_port

PROCESSES = 3
LIMIT = 30
PERIOD = 1.5
LATE = 0.5
# A period, two request timeouts and one second.
LEASE = PERIOD + 2 * LATE + 1.0

# Calls of each process at a time.
_CALLS = 8
# Seconds for which Redis is away: longer than the two until degraded mode, and than a lease.
_AWAY = LEASE + 1.0
# Seconds that an answer takes, so that a worker can be frozen before it comes.
_SLOW = 0.2
# Seconds that a run goes on after its fault.
_AFTER = 3.0
# Most seconds without an answer of any process.
_STALL = 6.0
# Milliseconds after which a cluster's nodes take one for failed.
_NODE_TIMEOUT = 1000
_NODES, _SLOTS = 3, 16_384

# What the log says, by a part of the line.
_WORDS = {
    "Redis is out of reach": "out of reach",
    "Redis answers again": "answers again",
    "Redis lost the rate limit's count": "count lost",
    "messages within": "messages lost",
}


@attrs.define
class Stage:
    """Running processes.

    Attributes:
        servers: Those of Redis: one, with its replica or without, or the nodes of a cluster.
        proxies: Of each process.
        members: The processes.
        sandbox: The API, with a strict sliding window.
        prefix: Of the names in Redis.
        granted: How many requests a frozen process may add.
        left: The processes that were killed or frozen, which answer nothing meanwhile.
        note: Something to say about the run.
    """

    servers: Sequence[RedisServer]
    proxies: Sequence[Proxy]
    members: Sequence[Member]
    sandbox: SandboxServer
    prefix: str
    granted: int = 0
    left: set[int] = attrs.field(factory=set)
    note: str = ""

    async def ask(self, *command: str | int) -> Any:
        return await asyncio.to_thread(self.servers[0].ask, *command)


@attrs.frozen
class Run:
    """The figures of one fault on one loop."""

    window: int
    granted: int
    refused: int
    stall: float
    said: Counter[str]
    note: str

    @property
    def log(self) -> str:
        return ", ".join(f"{count} {word}" for word, count in self.said.items())


# --- faults


async def _kill_worker(stage: Stage) -> None:
    stage.members[0].send(signal.SIGKILL)
    stage.left.add(0)


async def _freeze_worker(stage: Stage) -> None:
    stage.members[0].send(signal.SIGSTOP)
    stage.left.add(0)
    # The token of a request that has ended returns within a period and its margin. Those that are
    # out for longer are granted, and their requests can still arrive.
    stage.granted = await asyncio.to_thread(
        partial(out, stage.servers[0], stage.prefix, stage.members[0], until=1.05 * PERIOD)
    )
    await asyncio.sleep(_AWAY)
    stage.members[0].send(signal.SIGCONT)


async def _freeze_worker_during_a_message(stage: Stage) -> None:
    stage.proxies[0].delay = _SLOW
    await until(lambda: stage.proxies[0].late, 10)
    await _freeze_worker(stage)
    stage.proxies[0].delay = 0.0


async def _freeze_redis(stage: Stage) -> None:
    stage.servers[0].send(signal.SIGSTOP)
    await asyncio.sleep(_AWAY)
    stage.servers[0].send(signal.SIGCONT)


async def _restart_redis(stage: Stage, *, after: float) -> None:
    await asyncio.to_thread(stage.servers[0].kill)
    await asyncio.sleep(after)
    await asyncio.to_thread(stage.servers[0].start)


async def _flush(stage: Stage) -> None:
    await stage.ask("FLUSHALL")


async def _flush_scripts(stage: Stage) -> None:
    await stage.ask("SCRIPT", "FLUSH")


async def _kill_clients(stage: Stage) -> None:
    await stage.ask("CLIENT", "KILL", "TYPE", "normal")


async def _evict(stage: Stage) -> None:
    """Leave no room for what is stored: each write evicts something."""
    used = int((await stage.ask("INFO", "memory"))["used_memory"])
    await stage.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    await stage.ask("CONFIG", "SET", "maxmemory", used)
    await asyncio.sleep(_AWAY)
    stage.note = f"{(await stage.ask('INFO', 'stats'))['evicted_keys']} keys evicted"
    await stage.ask("CONFIG", "SET", "maxmemory", 0)


async def _fail_over(stage: Stage) -> None:
    first, replica = stage.servers
    await asyncio.to_thread(first.kill)
    await asyncio.sleep(1.0)
    await asyncio.to_thread(replica.ask, "REPLICAOF", "NO", "ONE")
    for proxy in stage.proxies:
        proxy.target = replica.socket


async def _kill_node(stage: Stage) -> None:
    """Kill the node that has the count, and start it again without its data."""
    slot = int(await stage.ask("CLUSTER", "KEYSLOT", f"{{{stage.prefix}}}"))
    node = stage.servers[slot * _NODES // _SLOTS]
    await asyncio.to_thread(node.kill)
    await asyncio.sleep(_AWAY)
    await asyncio.to_thread(node.start)


Inject: TypeAlias = Callable[[Stage], Coroutine[Any, Any, None]]
Servers: TypeAlias = Callable[[AsyncExitStack], Coroutine[Any, Any, list[RedisServer]]]


@attrs.frozen
class Fault:
    """A fault, and the servers that it needs.

    Attributes:
        inject: Lets it happen, and ends it.
        servers: Starts the servers.
        is_promised: Whether the README promises something for its windows.
        is_cluster: Whether the servers are a cluster.
        api_limit: The limit of the API. Where more than the limit may be sent, it is higher, so
            that the API refuses none of the requests that are counted.
    """

    inject: Inject
    servers: Servers
    is_promised: bool = True
    is_cluster: bool = False
    api_limit: int = LIMIT


# --- servers


async def _start(stack: AsyncExitStack, *options: str, port: int = 0) -> RedisServer:
    server = await asyncio.to_thread(partial(RedisServer, *options, port=port))
    stack.callback(server.remove)
    return server


async def _one(stack: AsyncExitStack) -> list[RedisServer]:
    return [await _start(stack)]


async def _with_replica(stack: AsyncExitStack) -> list[RedisServer]:
    first = await _start(stack, "--repl-diskless-sync-delay", "0", port=free_port())
    replica = await _start(stack, "--replicaof", f"127.0.0.1 {first.port}")
    await _says(replica, ("INFO", "replication"), "'master_link_status': 'up'")
    return [first, replica]


async def _cluster(stack: AsyncExitStack) -> list[RedisServer]:
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(_NODE_TIMEOUT)]
    # Nodes talk to each other on their port plus 10,000.
    ports = [port for port in (free_port() for _ in range(100)) if port < 55_000][:_NODES]
    nodes = [await _start(stack, *options, port=port) for port in ports]
    for place, node in enumerate(nodes):
        first, end = (-(-_SLOTS * each // _NODES) for each in (place, place + 1))
        node.ask("CLUSTER", "ADDSLOTS", *range(first, end))
        node.ask("CLUSTER", "SET-CONFIG-EPOCH", place + 1)
        node.ask("CLUSTER", "MEET", "127.0.0.1", nodes[0].port)
    for node in nodes:
        await _says(node, ("CLUSTER", "INFO"), f"cluster_known_nodes:{_NODES}")
        await _says(node, ("CLUSTER", "INFO"), "cluster_state:ok")
    return nodes


async def _says(server: RedisServer, command: Sequence[str], words: str) -> None:
    await until(lambda: words in str(server.ask(*command)), 20)


FAULTS = {
    "`kill -9` of a worker": Fault(_kill_worker, _one),
    f"`SIGSTOP` of a worker for {_AWAY:g} s": Fault(_freeze_worker, _one, api_limit=3 * LIMIT),
    f"`SIGSTOP` of a worker for {_AWAY:g} s during a message to Redis": Fault(
        _freeze_worker_during_a_message, _one, api_limit=3 * LIMIT
    ),
    f"`SIGSTOP` of Redis for {_AWAY:g} s": Fault(_freeze_redis, _one),
    "`kill -9` of Redis, restart after 0.5 s": Fault(partial(_restart_redis, after=0.5), _one),
    f"`kill -9` of Redis, restart after {_AWAY:g} s": Fault(
        partial(_restart_redis, after=_AWAY), _one
    ),
    "`FLUSHALL`": Fault(_flush, _one),
    "`SCRIPT FLUSH`": Fault(_flush_scripts, _one),
    "`CLIENT KILL` of all": Fault(_kill_clients, _one),
    f"`allkeys-lru` without room for {_AWAY:g} s": Fault(_evict, _one, is_promised=False),
    "failover to a replica after 1 s": Fault(_fail_over, _with_replica),
    f"cluster of {_NODES}: a node is killed for {_AWAY:g} s": Fault(
        _kill_node, _cluster, is_cluster=True
    ),
}


# --- a run


async def _run(fault: Fault, loop: str) -> Run:
    async with AsyncExitStack() as stack:
        stage = await _stage(stack, fault, loop)
        await until(lambda: all(member.calls for member in stage.members), 20)
        await asyncio.sleep(2 * PERIOD)
        began = time.monotonic()
        await fault.inject(stage)
        await passes(max(time.monotonic() + _AFTER, began + LEASE + PERIOD))
        ended = time.monotonic()
        watched = [member for member in stage.members if member.place not in stage.left]
        said = Counter(
            next((word for part, word in _WORDS.items() if part in line.text), line.text)
            for member in stage.members
            for line in member.log
            if line.at >= began
        )
        return Run(
            window=worst_window(arrivals_of(stage.sandbox, range(PROCESSES)), PERIOD),
            granted=stage.granted,
            refused=stage.sandbox.refused,
            stall=max(member.longest_stall(began, ended) for member in watched),
            said=said,
            note=stage.note,
        )


async def _stage(stack: AsyncExitStack, fault: Fault, loop: str) -> Stage:
    servers = await fault.servers(stack)
    sandbox = await stack.enter_async_context(
        SandboxServer(limit=fault.api_limit, period=PERIOD, delay=(0.0, 0.02))
    )
    proxies = [await stack.enter_async_context(Proxy(servers[0].socket)) for _ in range(PROCESSES)]
    secrets, prefix = add_keys(sandbox, PROCESSES, _CALLS), uuid.uuid4().hex
    settings = [
        Settings(
            loop=loop,
            api=sandbox.url,
            redis=servers[0].url if fault.is_cluster else proxies[place].url,
            is_cluster=fault.is_cluster,
            prefix=prefix,
            on_outage="local",
            share=1 / PROCESSES,
            limit=LIMIT,
            period=PERIOD,
            request_timeout=LATE,
            timeout=60.0,
            keys=secrets[place],
        )
        for place in range(PROCESSES)
    ]
    members = await stack.enter_async_context(fleet(settings))
    return Stage(servers, proxies, members, sandbox, prefix)


# --- the table


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("redis", "uvloop")
    runs: dict[tuple[str, str], list[Run]] = {}
    for name, fault in FAULTS.items():
        if options.only.lower() in name.lower():
            for loop in LOOPS:
                runs[name, loop] = [asyncio.run(_run(fault, loop)) for _ in range(options.rounds)]
    print_table(
        f"{PROCESSES} processes, one limit of {LIMIT} requests in any {PERIOD:g} s, "
        f"`request_timeout={LATE:g}`, so a lease of {LEASE:g} s. Of each figure the worst case.",
        (
            "",
            "loop",
            "cases",
            "worst window",
            "promised",
            "429s",
            "longest stall, s",
            "log lines of a case",
        ),
        [_row(name, loop, of_one) for (name, loop), of_one in runs.items()],
    )
    return [
        bound
        for (name, loop), of_one in runs.items()
        for each in of_one
        for bound in _judge(FAULTS[name], f"{name}, {loop}", each)
    ]


def _row(name: str, loop: str, runs: Sequence[Run]) -> tuple[object, ...]:
    return (
        name + (f" ({runs[-1].note})" if runs[-1].note else ""),
        loop,
        len(runs),
        max(run.window for run in runs),
        LIMIT + min(run.granted for run in runs) if FAULTS[name].is_promised else "",
        max(run.refused for run in runs),
        max(run.stall for run in runs),
        max(runs, key=lambda run: run.said.total()).log or "0",
    )


def _judge(fault: Fault, name: str, run: Run) -> list[Bound]:
    stall = Bound(f"{name}: seconds without an answer", run.stall, _STALL)
    if not fault.is_promised:
        return [stall]
    return [
        Bound(f"{name}: requests in any {PERIOD:g} s", run.window, LIMIT + run.granted),
        Bound(f"{name}: requests refused (429)", run.refused, 0),
        stall,
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="faults whose names contain this")
    parser.add_argument("--rounds", type=whole(1), default=1, help="cases of each fault and loop")


BENCHMARK = Benchmark("processes over a Redis that fails in all ways", run, _add_options)
