"""Four processes that spend one quota, beside other ways: time, refusals and worst window.

The server has one strict sliding window for all of them together, and answers after a random delay.
Each process has keys of its own and must get an answer for all of them. The processes are started
beforehand, with imports done and loops running, wait at a barrier, and are timed from there to the
end of the last one.

Contenders that count in Redis greet it before the barrier. For crustcredits the greeting takes more
than a second on a Redis that does not know its prefix: no tokens are given until every process has
had the time to report its leases. A service waits for that once, on its first start or after Redis
has lost its memory, so it is not part of the time here. Each round has a fresh prefix.

limits is used as its README does: try, and without room sleep until
`get_window_stats().reset_time`. One task of a process tries at a time, because hundreds of them
would do so in the same moment. A round trip is a script that Redis runs; both send nothing else.

Without Redis, a process cannot see the starts of the others within one round trip. So that
contender also runs with longer round trips, all of one length.

Then one of the processes, chosen at random, is killed by SIGKILL at a random moment. The others
must still get an answer for all their keys. The leases of the dead process expire after a period
and two request timeouts. With the usual 10 s for each request that is 26 s, longer than all the
rest takes; so the timeout is 2 s in that run.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import attrs
from limits import RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from redis.asyncio import Redis

from crustcredits import CreditsClient, RateLimit
from crustcredits.redis import RedisBackend
from tests.benchmarks._contenders import AIOLIMITER, OURS, aiolimiter, gather
from tests.benchmarks._fleet import Barrier, Ended, Fleet, Kill, fleet
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Figures,
    Server,
    in_turns,
    make_secrets,
    number,
    print_machine,
    print_table,
    rounds_text,
    server_process,
    whole,
)
from tests.benchmarks._redis import RedisServer, redis_process

PROCESSES = 4
LIMIT = 300
DELAY = (0.0, 0.02)

# Seconds that a request may take in the run with a kill.
_SHORT = 2.0

# A process is killed after a share of the floor between these: 1 to 12 s by default.
_KILLED = (1 / 18.75, 12 / 18.75)

# Without Redis, the share of the requests that may be refused, by the seconds that each takes.
_REFUSED_AT = {0.02: 0.04, 0.1: 0.1}

_HEADERS = f"{OURS}, headers only"
_REDIS = f"{OURS}, `RedisBackend`"
_AIOLIMITER = f"{AIOLIMITER} in each"
_LIMITS = "limits `MovingWindowRateLimiter`, Redis"


@attrs.frozen
class Task:
    """The input of one process."""

    url: str
    secrets: Sequence[str]
    period: int
    redis: str
    prefix: str  # new in each round


Work: TypeAlias = Callable[[Task, Barrier], Coroutine[Any, Any, int]]


@attrs.frozen
class Stage:
    """The parts that all rounds use."""

    server: Server
    redis: RedisServer
    fleet: Fleet
    keys: int  # of each process
    period: int

    @property
    def floor(self) -> float:
        """Seconds until the last window opens, plus those for which the pace spreads it."""
        every = PROCESSES * self.keys
        spread = (every % LIMIT or LIMIT) / (PROCESSES * (RateLimit().pace or math.inf))
        return (math.ceil(every / LIMIT) - 1) * self.period + spread


@attrs.frozen
class Run:
    """One contender's one round."""

    ended: Ended
    messages: int
    figures: Figures

    @property
    def answered(self) -> int:
        return sum(answered or 0 for answered in self.ended.answered)

    @property
    def refused_share(self) -> float:
        """The refused share of the requests.

        Except those of a killed process, each request is either refused or answers a key.
        """
        return self.figures.refused / (self.answered + self.figures.refused)


# --- the work of a process


async def _headers_only(task: Task, barrier: Barrier) -> int:
    async with CreditsClient(base_url=task.url, rate_limit=RateLimit(period=task.period)) as client:
        await barrier()
        return len((await client.check(task.secrets)).succeeded)


async def _redis_buckets(task: Task, barrier: Barrier, *, request_timeout: float = 10.0) -> int:
    async with CreditsClient(
        base_url=task.url,
        rate_limit=RateLimit(period=task.period),
        backend=RedisBackend(task.redis, prefix=task.prefix, fallback_share=1 / 4),
        request_timeout=request_timeout,
    ) as client:
        await client.account(task.secrets[0])  # the other endpoint, which has a limit of its own
        await barrier()
        return len((await client.check(task.secrets)).succeeded)


async def _aiolimiter(task: Task, barrier: Barrier) -> int:
    await barrier()
    return await aiolimiter(task.url, task.secrets, limit=LIMIT, period=task.period)


async def _limits(task: Task, barrier: Barrier) -> int:
    rate, turn = RateLimitItemPerSecond(LIMIT, task.period), asyncio.Lock()
    async with Redis.from_url(task.redis) as redis:
        limiter = MovingWindowRateLimiter(_storage(task, redis))

        @asynccontextmanager
        async def gate() -> AsyncIterator[None]:
            async with turn:
                while not await limiter.hit(rate, "credits"):
                    window = await limiter.get_window_stats(rate, "credits")
                    if window.remaining <= 0:
                        await asyncio.sleep(window.reset_time - time.time())
            yield

        await limiter.hit(rate, "greeting")
        await barrier()
        return await gather(task.url, task.secrets, gate)


def _storage(task: Task, redis: Redis) -> RedisStorage:
    options: dict[str, Any] = {"connection_pool": redis.connection_pool}
    return RedisStorage(
        f"async+{task.redis}", implementation="redispy", key_prefix=task.prefix, **options
    )


# --- rounds


def _round(
    stage: Stage, work: Work, kill: Kill | None = None, delay: tuple[float, float] = DELAY
) -> Run:
    secrets = make_secrets(PROCESSES * stage.keys)
    url, prefix = (
        stage.server.open(secrets, limit=LIMIT, period=stage.period, delay=delay),
        uuid.uuid4().hex,
    )
    shares = [secrets[place::PROCESSES] for place in range(PROCESSES)]
    stage.fleet.prepare(
        [partial(work, Task(url, share, stage.period, stage.redis.url, prefix)) for share in shares]
    )
    before = stage.redis.messages()
    ended = stage.fleet.release(kill)
    return Run(ended, stage.redis.messages() - before, stage.server.close())


def _together(stage: Stage, rounds: int) -> list[Bound]:
    works: dict[str, Work] = {
        _HEADERS: _headers_only,
        _REDIS: _redis_buckets,
        _AIOLIMITER: _aiolimiter,
        _LIMITS: _limits,
    }
    runs = in_turns({name: partial(_round, stage, work) for name, work in works.items()}, rounds)
    print_table(
        f"{PROCESSES} processes with {stage.keys} keys each, {LIMIT} requests in any "
        f"{stage.period} s, counted for all of them "
        f"together, {DELAY[0] * 1000:g} to {DELAY[1] * 1000:g} ms of delay. The floor, "
        f"{stage.floor:.4g} s, is when the last "
        f"window opens, and over how long {PROCESSES} paces spread its requests, where there "
        "is one. "
        f"{rounds_text(rounds).capitalize()}, but of refusals, window and round trips the "
        f"worst. Redis {stage.redis.version} had "
        "been greeted before, and a first start's pause, which a service waits for once, was over.",
        (
            "",
            "time, s",
            "of the floor",
            "429s",
            "of all requests",
            "worst window",
            "round trips to Redis a call",
            "keys answered",
        ),
        [(name, *_row(of_one, stage)) for name, of_one in runs.items()],
    )
    return [*_judge_headers(runs[_HEADERS], stage), *_judge_redis(runs[_REDIS], stage)]


def _row(runs: Sequence[Run], stage: Stage) -> tuple[float | str, ...]:
    seconds = _seconds(runs)
    keys = PROCESSES * stage.keys
    answered = f"{number(min(run.answered for run in runs))} of {number(keys)}"
    return (
        seconds,
        seconds / stage.floor,
        _refused(runs),
        _refused_share(runs),
        _window(runs),
        _trips(runs),
        answered,
    )


def _seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.ended.seconds for run in runs)


def _refused(runs: Sequence[Run]) -> int:
    return max(run.figures.refused for run in runs)


def _refused_share(runs: Sequence[Run]) -> float:
    return max(run.refused_share for run in runs)


def _window(runs: Sequence[Run]) -> int:
    return max(run.figures.worst_window or 0 for run in runs)


def _trips(runs: Sequence[Run]) -> float:
    return max(run.messages / run.answered for run in runs)


def _unanswered(runs: Sequence[Run], stage: Stage) -> int:
    """Keys without an answer of processes that were not killed."""
    return max(
        sum(stage.keys - answered for answered in run.ended.answered if answered is not None)
        for run in runs
    )


def _by_round_trip(stage: Stage, rounds: int) -> list[Bound]:
    plays = {
        f"{trip * 1000:g} ms": partial(_round, stage, _headers_only, delay=(trip, trip))
        for trip in _REFUSED_AT
    }
    runs = in_turns(plays, rounds)
    named = list(zip(_REFUSED_AT.values(), runs.items(), strict=True))
    print_table(
        f"{_HEADERS}, by round trip. {rounds_text(rounds).capitalize()}, but of refusals and "
        "window the worst.",
        ("", "time, s", "of the floor", "429s", "of all requests", "target", "worst window"),
        [
            (
                name,
                _seconds(of_one),
                _seconds(of_one) / stage.floor,
                _refused(of_one),
                _refused_share(of_one),
                at_most,
                _window(of_one),
            )
            for at_most, (name, of_one) in named
        ],
    )
    return [
        bound
        for at_most, (name, of_one) in named
        for bound in (
            Bound(
                f"headers only at {name}: share of the requests that is refused (429)",
                _refused_share(of_one),
                at_most,
            ),
            Bound(f"headers only at {name}: keys not answered", _unanswered(of_one, stage), 0),
        )
    ]


def _judge_headers(runs: Sequence[Run], stage: Stage) -> list[Bound]:
    return [
        Bound(
            "headers only: share of the requests that is refused (429)",
            _refused_share(runs),
            _REFUSED_AT[0.02],
        ),
        Bound(
            f"headers only: seconds (1.15 of the floor, {stage.floor:.4g})",
            _seconds(runs),
            1.15 * stage.floor,
        ),
        Bound("headers only: keys not answered", _unanswered(runs, stage), 0),
    ]


def _judge_redis(runs: Sequence[Run], stage: Stage) -> list[Bound]:
    return [
        Bound("Redis: requests refused (429)", _refused(runs), 0),
        Bound(f"Redis: requests in any {stage.period} s", _window(runs), LIMIT),
        Bound(
            f"Redis: seconds (1.06 of the floor, {stage.floor:.4g})",
            _seconds(runs),
            1.06 * stage.floor,
        ),
        Bound("Redis: round trips to it a call", _trips(runs), 0.6),
        Bound("Redis: keys not answered", _unanswered(runs, stage), 0),
    ]


# --- one process is killed


def _with_a_death(stage: Stage, seed: int) -> list[Bound]:
    chance = random.Random(seed)
    kill = Kill(chance.randrange(PROCESSES), stage.floor * chance.uniform(*_KILLED))
    run = _round(stage, partial(_redis_buckets, request_timeout=_SHORT), kill)
    lost, living = _unanswered([run], stage), (PROCESSES - 1) * stage.keys
    print_table(
        f"{_REDIS}, and process {kill.place + 1} of {PROCESSES} is killed {kill.after:.2f} s "
        f"after the start (`--seed {seed}`). "
        "The leases of the dead process expire after a period and twice the request timeout, "
        f"which is {_SHORT:g} s here.",
        ("", "time, s", "429s", "worst window", "keys answered"),
        [
            (
                f"the other {PROCESSES - 1}",
                run.ended.seconds,
                _refused([run]),
                _window([run]),
                f"{living - lost} of {living}",
            )
        ],
    )
    return [
        Bound(
            "with a death: the killed one had ended before",
            run.ended.answered[kill.place] is not None,
            0,
        ),
        Bound("with a death: keys of the others not answered", lost, 0),
        Bound("with a death: requests refused (429)", _refused([run]), 0),
        Bound(f"with a death: requests in any {stage.period} s", _window([run]), LIMIT),
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    with redis_process() as redis, server_process() as server, fleet(PROCESSES) as processes:
        print_machine("aiolimiter", "limits", "redis")
        stage = Stage(server, redis, processes, options.keys, options.period)
        return [
            *_together(stage, options.rounds),
            *_by_round_trip(stage, options.rounds),
            *_with_a_death(stage, options.seed),
        ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=whole(1), default=300, help="keys of each process")
    parser.add_argument(
        "--rounds", type=whole(1), default=3, help="rounds; each takes well over a minute"
    )
    parser.add_argument(
        "--period", type=whole(1), default=6, help="seconds that the server's window is long"
    )
    parser.add_argument(
        "--seed", type=whole(0), default=1, help="seed of the killed process, and of its time"
    )


BENCHMARK = Benchmark(
    "four processes that spend one quota, with and without Redis", run, _add_options
)
