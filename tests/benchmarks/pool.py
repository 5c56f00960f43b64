"""A whole pool under the rate limit, beside other ways: time, refusals and worst window.

The server has a strict sliding window and answers after a random delay. Every contender must get an
answer for every key, over one session with 32 connections. With `--period 60 --alone` only the
client runs, at the API's own period: three minutes a round.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

import attrs

from crustcredits import RateLimit
from tests.benchmarks._contenders import (
    AIOLIMITER,
    BARE,
    OURS,
    PYRATE,
    Contender,
    aiolimiter,
    bare,
    ours,
    pyrate,
)
from tests.benchmarks._measure import (
    CONNECTIONS,
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

LIMIT = 300
PERIOD = 6.0
DELAY = (0.0, 0.02)

# The largest ratio of a pool's time to the least time: at the API's own period, and at shorter
# ones.
_LONG_PERIOD = 60.0
_LONG, _SHORT = 1.02, 1.03  # target of the short period: 1.06


@attrs.frozen
class Run:
    """One contender's one round."""

    seconds: float
    processor: float
    figures: Figures


# --- rounds


def one_round(
    server: Server, contender: Contender, secrets: Sequence[str], period: float = PERIOD
) -> Run:
    url = server.open(secrets, limit=LIMIT, period=period, delay=DELAY)
    began, processor = time.perf_counter(), time.process_time()
    answered = asyncio.run(contender(url, secrets))
    run = Run(time.perf_counter() - began, time.process_time() - processor, server.close())
    assert answered == len(secrets), f"{answered} of {len(secrets)} keys were answered"
    return run


def _whole_pool(server: Server, options: argparse.Namespace) -> list[Bound]:
    keys, period = options.keys, float(options.period)
    contenders: dict[str, Contender] = {OURS: partial(ours, limit=RateLimit(period=period))}
    if not options.alone:
        contenders |= {
            f"{OURS}, `pace=None`": partial(ours, limit=RateLimit(period=period, pace=None)),
            PYRATE: partial(pyrate, limit=LIMIT, period=period),
            AIOLIMITER: partial(aiolimiter, limit=LIMIT, period=period),
            BARE: bare,
        }
    secrets = make_secrets(keys)
    plays = {
        name: partial(one_round, server, contender, secrets, period)
        for name, contender in contenders.items()
    }
    runs = in_turns(plays, options.rounds)
    floor = (math.ceil(keys / LIMIT) - 1) * period
    print_table(
        f"{keys:,} keys, {LIMIT} requests in any {period:g} s, {DELAY[0] * 1000:g} to "
        f"{DELAY[1] * 1000:g} ms of delay; no way of "
        f"asking them can take less than {floor:g} s; {rounds_text(options.rounds)}, but of "
        "refusals, window and connections the "
        "worst.",
        ("", "time, s", "of the floor", "429s", "worst window", "processor time, s", "connections"),
        [(name, *_row(of_one, floor)) for name, of_one in runs.items()],
    )
    return _judge(runs[OURS], keys, floor, period)


def _row(runs: Sequence[Run], floor: float) -> tuple[float, ...]:
    seconds = statistics.median(run.seconds for run in runs)
    processor = statistics.median(run.processor for run in runs)
    refused, window, connections = _worst(runs)
    return seconds, seconds / floor, refused, window, processor, connections


def _worst(runs: Sequence[Run]) -> tuple[int, int, int]:
    figures = [run.figures for run in runs]
    refused = max(figure.refused for figure in figures)
    return (
        refused,
        max(figure.worst_window or 0 for figure in figures),
        max(figure.connections for figure in figures),
    )


def _judge(runs: Sequence[Run], keys: int, floor: float, period: float) -> list[Bound]:
    refused, window, connections = _worst(runs)
    # The floor is when the last window opens. The pace adds the time to start the keys of that
    # window one by one, which would start at once without it. In the windows before, it only
    # spreads starts that had to wait anyway.
    least = floor + (keys % LIMIT or LIMIT) / (RateLimit().pace or math.inf)
    share = _LONG if period >= _LONG_PERIOD else _SHORT
    return [
        Bound("requests refused (429)", refused, 0),
        Bound(f"requests in any {period:g} s", window, LIMIT),
        Bound(
            f"seconds for {keys:,} keys ({share} of {least:g}: the floor, and over how long "
            "the pace spreads the last window's)",
            statistics.median(run.seconds for run in runs),
            share * least,
        ),
        Bound("connections", connections, CONNECTIONS),
    ]


def _one_window(server: Server, rounds: int) -> list[Bound]:
    name = f'{OURS}, `pace=None, scope="client"`'
    auto = f"{OURS}, `pace=None`: the last tenth waits until answers can prove something"
    contenders: dict[str, Contender] = {
        name: partial(ours, limit=RateLimit(period=PERIOD, pace=None, scope="client")),
        BARE: bare,
        auto: partial(ours, limit=RateLimit(period=PERIOD, pace=None)),
    }
    secrets = make_secrets(LIMIT)
    runs = in_turns(
        {
            name: partial(one_round, server, contender, secrets)
            for name, contender in contenders.items()
        },
        rounds,
    )
    times = {name: [run.seconds * 1000 for run in of_one] for name, of_one in runs.items()}
    waits = times.pop(auto)
    ratio, rows = compare(times)
    rows.append((auto, statistics.median(waits), median_ratio(waits, times[BARE])))
    print_table(
        f"{LIMIT} keys, which one window holds; sessions opened and closed; {rounds_text(rounds)}.",
        ("", "time, ms", "of the bare one's", "429s"),
        [(*row, _worst(runs[row[0]])[0]) for row in rows],
    )
    return [
        Bound(f"time for {LIMIT} keys without a pace, of the bare one's", ratio, 1.05),
        Bound(
            f"seconds for {LIMIT} keys without a pace and with nothing known",
            statistics.median(waits) / 1000,
            1.8,
        ),
    ]


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiolimiter", "pyrate-limiter")
    with server_process() as server:
        bounds = _whole_pool(server, options)
        return bounds if options.alone else bounds + _one_window(server, options.window_rounds)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keys", type=whole(LIMIT + 1), default=1000, help="keys of the whole pool"
    )
    parser.add_argument(
        "--rounds",
        type=whole(1),
        default=3,
        help="rounds with the whole pool; each takes well over a minute",
    )
    parser.add_argument(
        "--period",
        type=whole(1),
        default=int(PERIOD),
        help="seconds that the whole pool's window is long",
    )
    parser.add_argument(
        "--alone",
        action="store_true",
        help="the client with default settings alone, and the whole pool alone",
    )
    parser.add_argument(
        "--window-rounds", type=whole(1), default=25, help="rounds with the keys of one window"
    )


BENCHMARK = Benchmark(
    "a pool of keys under the rate limit, against other limiters", run, _add_options
)
