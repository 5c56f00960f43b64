"""Accounts that are counted separately, over Redis: many small ones, and one large account.

One process has the many small accounts, and four processes share the large one. The server has a
strict sliding window for each account and answers after a random delay. The client uses
`scope="account"`, so each account has a bucket of its own in Redis.

Many accounts: one key each, 300 requests in any minute for each, so only the pace delays a request.
A first start under a new prefix takes 3 s more, in which no tokens are given; it has a row of its
own. Then more of them, divided among the processes, with each scope. One account: its keys are
declared, and divided among the processes, which wait at a barrier.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
import uuid
from collections.abc import Sequence
from functools import partial

import attrs

from crustcredits import ApiKey, CreditsClient, RateLimit
from crustcredits._ratelimit.config import Scope
from crustcredits.redis import RedisBackend
from tests.benchmarks._fleet import Barrier, Fleet, fleet
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Figures,
    Server,
    in_turns,
    make_secrets,
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

# Seconds that 300 accounts may take.
_AT_MOST = 6.0
# Seconds that 1,000 accounts, divided among the processes, may take by scope.
_DIVIDED_AT_MOST: dict[Scope, float] = {"account": 12.0, "key": 12.0, "auto": 15.0}
# The largest ratio of a declared account's time to the floor plus the time of the pace.
_OF_FLOOR = 1.06

_FIRST = "one process, first start on an empty Redis"
_GREETED = "one process, Redis greeted before"
_FOUR = f"{PROCESSES} processes, Redis greeted before"


@attrs.frozen
class Stage:
    """The parts that all rounds use."""

    server: Server
    redis: RedisServer
    fleet: Fleet


@attrs.frozen
class Task:
    """The input of a process."""

    url: str
    redis: str
    prefix: str
    period: int
    secrets: Sequence[str]
    account: str | None = None
    greets: bool = True
    scope: Scope = "account"


@attrs.frozen
class Run:
    """The result of one round."""

    seconds: float
    answered: int
    messages: int
    figures: Figures


async def _check(task: Task, barrier: Barrier) -> int:
    limit = RateLimit(period=task.period, scope=task.scope)
    backend = RedisBackend(task.redis, prefix=task.prefix, fallback_share=1 / 4)
    async with CreditsClient(base_url=task.url, rate_limit=limit, backend=backend) as client:
        keys = [ApiKey(secret, account=task.account) for secret in task.secrets]
        if task.greets:
            await client.account(keys[0])  # the other endpoint, which has a limit of its own
        await barrier()
        return len((await client.check(keys)).succeeded)


def _alone(stage: Stage, secrets: Sequence[str], period: int, *, greets: bool) -> Run:
    url = stage.server.open(secrets, limit=LIMIT, period=period, delay=DELAY, scope="account")
    task = Task(url, stage.redis.url, uuid.uuid4().hex, period, secrets, greets=greets)
    began = 0.0

    async def barrier() -> None:
        nonlocal began
        began = time.perf_counter()

    before = stage.redis.messages()
    answered = asyncio.run(_check(task, barrier))
    return Run(
        time.perf_counter() - began, answered, stage.redis.messages() - before, stage.server.close()
    )


def _together(
    stage: Stage,
    secrets: Sequence[str],
    period: int,
    account: str | None = None,
    scope: Scope = "account",
) -> Run:
    shared = secrets if account is not None else ()
    url = stage.server.open(
        secrets, limit=LIMIT, period=period, delay=DELAY, scope="account", shared=shared
    )
    prefix = uuid.uuid4().hex
    tasks = [
        Task(url, stage.redis.url, prefix, period, secrets[place::PROCESSES], account, scope=scope)
        for place in range(PROCESSES)
    ]
    stage.fleet.prepare([partial(_check, task) for task in tasks])
    before = stage.redis.messages()
    ended = stage.fleet.release()
    return Run(
        ended.seconds,
        sum(answered or 0 for answered in ended.answered),
        stage.redis.messages() - before,
        stage.server.close(),
    )


def _many(stage: Stage, options: argparse.Namespace) -> list[Bound]:
    secrets = make_secrets(options.accounts)
    alone = partial(_alone, stage, secrets, 60)
    runs = in_turns(
        {
            _FIRST: partial(alone, greets=False),
            _GREETED: partial(alone, greets=True),
            _FOUR: partial(_together, stage, secrets, 60),
        },
        options.rounds,
    )
    pace = len(secrets) / (RateLimit().pace or math.inf)
    print_table(
        f'{len(secrets):,} accounts of one key each, `scope="account"` over Redis '
        f"{stage.redis.version}, {LIMIT} requests in any "
        f"60 s for each account; the pace of one process takes {pace:g} s. "
        f"{rounds_text(options.rounds).capitalize()}, but of "
        "refusals and round trips the worst.",
        ("", "time, s", "429s", "round trips to Redis a call", "keys answered", "target, s"),
        [(name, *_row(of_one), f"{_AT_MOST:g}") for name, of_one in runs.items()],
    )
    return [
        bound
        for name, of_one in runs.items()
        for bound in (
            Bound(f"{len(secrets):,} accounts, {name}: seconds", _seconds(of_one), _AT_MOST),
            *_judge(f"{len(secrets):,} accounts, {name}", of_one, len(secrets)),
        )
    ]


def _divided(stage: Stage, options: argparse.Namespace) -> list[Bound]:
    secrets = make_secrets(options.divided)
    runs = in_turns(
        {scope: partial(_together, stage, secrets, 60, scope=scope) for scope in _DIVIDED_AT_MOST},
        options.rounds,
    )
    print_table(
        f"{len(secrets):,} accounts of one key each, divided among {PROCESSES} processes, {LIMIT} "
        f"requests in any 60 s for each account. {rounds_text(options.rounds).capitalize()}, but "
        "of refusals and round trips the worst.",
        ("scope", "time, s", "429s", "round trips to Redis a call", "keys answered", "target, s"),
        [
            (f"`{scope}`", *_row(runs[scope]), f"{at_most:g}")
            for scope, at_most in _DIVIDED_AT_MOST.items()
        ],
    )
    return [
        bound
        for scope, at_most in _DIVIDED_AT_MOST.items()
        for bound in (
            Bound(f"divided, {scope}: seconds", _seconds(runs[scope]), at_most),
            *_judge(f"divided, {scope}", runs[scope], len(secrets)),
        )
    ]


def _one(stage: Stage, options: argparse.Namespace) -> list[Bound]:
    secrets, period = make_secrets(options.keys), options.period
    runs = in_turns(
        {"declared": partial(_together, stage, secrets, period, "acme")},
        options.rounds,
    )["declared"]
    spread = (options.keys % LIMIT or LIMIT) / (PROCESSES * (RateLimit().pace or math.inf))
    floor = (math.ceil(options.keys / LIMIT) - 1) * period + spread
    window = max(run.figures.worst_window or 0 for run in runs)
    print_table(
        f"One declared account of {options.keys:,} keys, divided among {PROCESSES} "
        f"processes, {LIMIT} requests in any {period} s. "
        f"The floor, {floor:.4g} s, is when the last window opens, and over how long "
        f"{PROCESSES} paces spread its requests. "
        f"{rounds_text(options.rounds).capitalize()}, but of refusals, window and round "
        "trips the worst.",
        (
            "",
            "time, s",
            "429s",
            "round trips to Redis a call",
            "keys answered",
            "of the floor",
            "worst window",
        ),
        [("a declared account", *_row(runs), _seconds(runs) / floor, window)],
    )
    return [
        Bound(
            f"a declared account: seconds ({_OF_FLOOR} of the floor)",
            _seconds(runs),
            _OF_FLOOR * floor,
        ),
        Bound(f"a declared account: requests in any {period} s", window, LIMIT),
        *_judge("a declared account", runs, options.keys),
    ]


def _row(runs: Sequence[Run]) -> tuple[float, ...]:
    trips = max(run.messages / max(1, run.answered) for run in runs)
    return (
        _seconds(runs),
        max(run.figures.refused for run in runs),
        trips,
        min(run.answered for run in runs),
    )


def _seconds(runs: Sequence[Run]) -> float:
    return statistics.median(run.seconds for run in runs)


def _judge(what: str, runs: Sequence[Run], keys: int) -> list[Bound]:
    return [
        Bound(f"{what}: requests refused (429)", max(run.figures.refused for run in runs), 0),
        Bound(f"{what}: keys not answered", max(keys - run.answered for run in runs), 0),
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("redis")
    with redis_process() as redis, server_process() as server, fleet(PROCESSES) as processes:
        stage = Stage(server, redis, processes)
        return _many(stage, options) + _divided(stage, options) + _one(stage, options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accounts", type=whole(PROCESSES), default=300, help="accounts of one key each"
    )
    parser.add_argument(
        "--divided", type=whole(PROCESSES), default=1_000, help="accounts among all processes"
    )
    parser.add_argument(
        "--keys", type=whole(PROCESSES), default=1_000, help="keys of the declared account"
    )
    parser.add_argument(
        "--rounds", type=whole(1), default=3, help="rounds; each takes half a minute"
    )
    parser.add_argument(
        "--period",
        type=whole(1),
        default=6,
        help="seconds that the window of the declared account is long",
    )


BENCHMARK = Benchmark("accounts that are counted apart, over Redis", run, _add_options)
