"""Four workers of a service that share answers, beside one worker: their requests to the API.

uvicorn with one process for each worker; `GET /keys/{name}` over a pool in rotation, in a closed
loop on each worker. The credits of the sandbox's keys are the wall time, so an answer shows its
true age.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from functools import partial

import attrs
from fastapi import FastAPI

from crustcredits import ApiKey, CreditsClient
from crustcredits.fastapi import credits_lifespan, credits_router
from crustcredits.redis import RedisBackend
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Server,
    make_secrets,
    print_machine,
    print_table,
    server_process,
    whole,
)
from tests.benchmarks._redis import redis_process
from tests.benchmarks._service import (
    KEYS,
    Answered,
    App,
    app_process,
    key_names,
    load_on,
    must_be_ok,
    read_key,
    request_for,
)

_WORKERS = 4
_MAX_AGE = 30.0
_CONNECTIONS = 2  # of each worker
# Seconds between an answer's start at the API and its arrival at the load.
_TRAVEL = 0.25


@attrs.frozen
class _Run:
    answers: int
    oldest: float
    off: float
    requests: int
    refused: int


def _app(url: str, secrets: Sequence[str], redis: str, prefix: str) -> FastAPI:
    keys = [
        ApiKey(secret, name=name)
        for secret, name in zip(secrets, key_names(len(secrets)), strict=True)
    ]

    def client() -> CreditsClient:
        if not redis:
            return CreditsClient(base_url=url)
        backend = RedisBackend(
            redis, prefix=prefix, fallback_share=1 / _WORKERS, share_answers=True
        )
        return CreditsClient(base_url=url, backend=backend)

    app = FastAPI(lifespan=credits_lifespan(client))
    app.include_router(
        credits_router(keys, public=True, max_age=_MAX_AGE, stale_while_revalidate=0)
    )
    return app


async def _load(apps: Sequence[App], seconds: int) -> list[Answered]:
    async with AsyncExitStack() as stack:
        loads = [await stack.enter_async_context(load_on(app, _CONNECTIONS)) for app in apps]
        paths = [f"/keys/{name}" for name in key_names(KEYS)]
        orders = [random.Random(place).sample(paths, KEYS) for place in range(len(apps))]
        answers = await asyncio.gather(
            *(
                load.run(_in_rotation(order), seconds)
                for load, order in zip(loads, orders, strict=True)
            )
        )
    return [answer for of_one in answers for answer in of_one]


def _in_rotation(paths: Sequence[str]) -> itertools.cycle[bytes]:
    return itertools.cycle([request_for(path) for path in paths])


def _run(server: Server, workers: int, redis: str, seconds: int) -> _Run:
    secrets = make_secrets(KEYS)
    url, prefix = server.open(secrets, tells_time=True), uuid.uuid4().hex
    with ExitStack() as stack:
        make_app = partial(_app, url, secrets, redis, prefix)
        apps = [stack.enter_context(app_process(make_app)) for _ in range(workers)]
        answers = asyncio.run(_load(apps, seconds))
    must_be_ok(answers)
    ages, off = [], 0.0
    for answer in answers:
        stated = read_key(answer.body)
        ages.append(answer.wall - stated.given)
        off = max(off, abs(answer.wall - stated.given - stated.age))
    figures = server.close()
    return _Run(len(answers), max(ages), off, figures.requests, figures.refused)


def _measure(options: argparse.Namespace) -> list[Bound]:
    print_machine("fastapi", "uvicorn")
    with server_process() as server, redis_process() as redis:
        one = _run(server, 1, "", options.seconds)
        four = _run(server, _WORKERS, redis.url, options.seconds)
    ratio = four.requests / one.requests
    print_table(
        f"{KEYS} keys in rotation for {options.seconds} s, `max_age={_MAX_AGE:g}`.",
        ["", "answers", "requests to the API", "of one worker's", "429s", "oldest, s", "off, s"],
        [
            ("one worker", one.answers, one.requests, 1.0, one.refused, one.oldest, one.off),
            (
                f"{_WORKERS} workers that share answers",
                four.answers,
                four.requests,
                ratio,
                four.refused,
                four.oldest,
                four.off,
            ),
        ],
    )
    return [
        Bound("requests to the API, of one worker's", ratio, 1.1),
        Bound("requests refused (429)", four.refused, 0),
        Bound("the true age of an answer, in seconds", four.oldest, _MAX_AGE + _TRAVEL),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=whole(1), default=120, help="seconds of each load")


BENCHMARK = Benchmark("workers of a service that share answers", _measure, _add_options)
