"""A FastAPI service under load: the cost and age of its answers, and its requests to the API.

The cost is beside that of a constant answer. uvicorn with one worker, the sandbox and the load have
a process each. The load is a closed loop over keep-alive connections, in turns on one key's balance
and on a route of the same app that answers with a constant. The age that an answer states is
compared with the truth, which its credits show.

Then a pool at once, with a cache entry for each key, beside a route that builds as many models
anew.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from typing import Any

import attrs
from fastapi import FastAPI

from crustcredits.fastapi import KeyResponse, PoolResponse
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Figures,
    Server,
    compare,
    in_turns,
    make_secrets,
    median_ratio,
    print_machine,
    print_table,
    rounds_text,
    server_process,
    whole,
)
from tests.benchmarks._service import (
    KEYS,
    Answered,
    Load,
    app_process,
    key_names,
    must_be_ok,
    no_collector,
    quantile,
    read_key,
    request_for,
    service_app,
)

POOL_KEYS = 200

# Seconds of one turn.
_OURS, _CONSTANT, _POOL = 5.0, 1.0, 2.0

# The max age of the pool's balances in seconds: longer than any run takes, so that no key is asked
# again.
_POOL_AGE = 600.0

# 0.6 of the peer's throughput.
_TIME = 1 / 0.6

_CREDITS = Decimal(1000)


# --- the apps


def _model(name: str, checked_at: datetime) -> KeyResponse:
    return KeyResponse(
        key=name,
        state="fresh",
        credits=_CREDITS,
        checked_at=checked_at,
        source="cached",
        error=None,
    )


def _keys_app(url: str, secrets: Sequence[str]) -> FastAPI:
    app = service_app(url, secrets)
    constant = _model("name-000", datetime.now(UTC))

    @app.get("/constant", response_model=KeyResponse)
    async def get_constant() -> Any:
        return constant

    return app


def _pool_app(url: str, secrets: Sequence[str]) -> FastAPI:
    app = service_app(url, secrets, max_age=_POOL_AGE, prefix="/pool")
    names, now = key_names(POOL_KEYS), datetime.now(UTC)

    @app.get("/built", response_model=PoolResponse)
    async def get_built() -> Any:
        return PoolResponse(
            ok=True,
            succeeded=len(names),
            failed=0,
            stale=0,
            total_credits=_CREDITS,
            accounts={},
            lookalikes=[],
            keys=[_model(name, now) for name in names],
        )

    return app


# --- slices


@attrs.frozen
class Slice:
    """One contender's one turn."""

    cost: float  # microseconds a request
    middle: float  # milliseconds of latency
    late: float  # the same, of the 99th percentile


@attrs.define
class _Truth:
    """The stated ages of the answers, and the true ones."""

    ages: array[float] = attrs.field(factory=partial(array, "d"))
    stale: int = 0
    off: float = 0.0  # the greatest difference, in seconds

    def learn(self, answers: Sequence[Answered]) -> None:
        for answer in answers:
            stated = read_key(answer.body)
            self.ages.append(stated.age)
            self.stale += stated.stale
            self.off = max(self.off, abs(answer.wall - stated.given - stated.age))


async def _slice(
    load: Load, paths: Sequence[str], seconds: float, truth: _Truth | None = None
) -> Slice:
    requests = itertools.cycle([request_for(path) for path in paths])
    began = time.perf_counter()
    with no_collector():
        answers = await load.run(requests, seconds)
    cost = (time.perf_counter() - began) / len(answers) * 1e6
    must_be_ok(answers)
    if truth is not None:
        truth.learn(answers)
    latencies = [answer.latency for answer in answers]
    return Slice(cost, statistics.median(latencies), quantile(latencies, 0.99))


def _table(caption: str, peer: str, slices: Mapping[str, Sequence[Slice]]) -> tuple[float, float]:
    """Print the table. Returns the median ratios of time a request and 99th percentile."""
    ours, peers = slices.values()
    ratio, rows = compare({name: [run.cost for run in of_one] for name, of_one in slices.items()})
    late = median_ratio([run.late for run in ours], [run.late for run in peers])
    latencies = [
        [statistics.median(times) for times in zip(*_latencies(of_one), strict=True)]
        for of_one in slices.values()
    ]
    print_table(
        caption,
        (
            "",
            "requests a second",
            "time a request, µs",
            f"of {peer}",
            "latency, ms",
            "99th percentile, ms",
            f"of {peer}",
        ),
        [
            (name, 1e6 / cost, cost, share, *times, late_share)
            for (name, cost, share), times, late_share in zip(
                rows, latencies, (late, 1.0), strict=True
            )
        ],
    )
    return ratio, late


def _latencies(slices: Sequence[Slice]) -> list[tuple[float, float]]:
    return [(run.middle, run.late) for run in slices]


# --- one key


@contextmanager
def _loaded(
    make_app: Callable[[], FastAPI], connections: int
) -> Iterator[tuple[asyncio.Runner, Load]]:
    with app_process(make_app) as app, asyncio.Runner() as runner:
        load = Load()
        try:
            runner.run(load.connect(app.port, connections))
            yield runner, load
        finally:
            load.close()


def _one_key(server: Server, seconds: int, connections: int) -> list[Bound]:
    secrets = make_secrets(KEYS)
    url = server.open(secrets, tells_time=True)
    paths = [f"/keys/{name}" for name in key_names(KEYS)]
    turns, truth = math.ceil(seconds / _OURS), _Truth()
    with _loaded(partial(_keys_app, url, secrets), connections) as (runner, load):
        must_be_ok(runner.run(load.run(map(request_for, paths))))
        contenders = {
            "`GET /keys/{name}`": lambda: runner.run(_slice(load, paths, seconds / turns, truth)),
            "`GET /constant`": lambda: runner.run(_slice(load, ["/constant"], _CONSTANT)),
        }
        slices = in_turns(contenders, turns)
    return _judge(slices, turns, connections, truth, server.close())


def _judge(
    slices: Mapping[str, Sequence[Slice]],
    turns: int,
    connections: int,
    truth: _Truth,
    figures: Figures,
) -> list[Bound]:
    caption = f"One of {KEYS} keys in rotation, {connections} connections; {rounds_text(turns)}."
    ratio, late = _table(caption, "the constant's", slices)
    oldest, window = max(truth.ages), figures.worst_window or 0
    print_table(
        "The stated ages of one key's answers, and the requests to the API.",
        (
            "answers",
            "of them stale",
            "median age, s",
            "oldest, s",
            "off by at most, s",
            "requests",
            "in any minute",
            "429s",
        ),
        [
            (
                len(truth.ages),
                truth.stale,
                statistics.median(truth.ages),
                oldest,
                truth.off,
                figures.requests,
                window,
                figures.refused,
            )
        ],
    )
    return [
        Bound(
            "time a request for one key, of the constant route's (0.6 of its throughput)",
            ratio,
            _TIME,
        ),
        Bound("99th percentile of latency, of the constant route's", late, 2.0),
        Bound("requests to the API in any minute", window, 300),
        Bound("requests refused (429)", figures.refused, 0),
        Bound("the oldest age that an answer states, in seconds", oldest, 40.0),
        Bound("seconds between stated and true age", truth.off, 0.25),
    ]


# --- the pool


def _whole_pool(server: Server, rounds: int, connections: int) -> list[Bound]:
    secrets = make_secrets(POOL_KEYS)
    url = server.open(secrets)
    with _loaded(partial(_pool_app, url, secrets), connections) as (runner, load):
        (first,) = runner.run(load.run([request_for("/pool/keys")]))
        assert first.body.startswith(b'{"ok":true,"succeeded":200,'), first.body.decode()
        contenders = {
            "`GET /keys`, all kept": lambda: runner.run(_slice(load, ["/pool/keys"], _POOL)),
            "`GET /built`": lambda: runner.run(_slice(load, ["/built"], _POOL)),
        }
        slices = in_turns(contenders, rounds)
    figures = server.close()
    assert figures.requests == POOL_KEYS, f"{figures.requests} requests for {POOL_KEYS} keys"
    caption = (
        f"The pool of {POOL_KEYS} keys at once, {connections} connections; {rounds_text(rounds)}."
    )
    ratio, _ = _table(caption, "the built one's", slices)
    return [
        Bound(
            f"time a request for {POOL_KEYS} keys, of models built anew (0.6 of the throughput)",
            ratio,
            _TIME,
        )
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("fastapi", "uvicorn")
    with server_process() as server:
        one_key = _one_key(server, options.seconds, options.connections)
        return one_key + _whole_pool(server, options.pool_rounds, options.connections)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=whole(1), default=180, help="seconds of load on one key's balance, in all"
    )
    parser.add_argument("--connections", type=whole(1), default=16, help="keep-alive connections")
    parser.add_argument(
        "--pool-rounds", type=whole(1), default=5, help="rounds with the pool at once"
    )


BENCHMARK = Benchmark("a FastAPI service under load, against a constant route", run, _add_options)
