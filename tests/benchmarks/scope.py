"""How long a pool takes while the client detects the scope that the server counts by.

The scope is `RateLimit(scope="auto")`, the default of `CreditsClient(base_url=…)`; no account is
declared. The server has strict sliding windows and answers after a random delay. It counts by
account, where each key has an account of its own; or all requests together; or by account, where
four keys in ten share one and the pool is shuffled. Beside the first stands aiolimiter, which
cannot know the scope and must assume that all requests are counted together.

All rows run in real time but one: a server with a count that lags behind its answers, which the
sandbox cannot play, runs in virtual time and without a network.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from collections.abc import Hashable, Sequence
from functools import partial

import attrs

from crustcredits import ApiKey, RateLimit
from tests import virtual
from tests.benchmarks._contenders import AIOLIMITER, Contender, aiolimiter, ours
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    Server,
    in_turns,
    make_secrets,
    print_machine,
    print_table,
    server_process,
    whole,
)

LIMIT = 300
DELAY = (0.0, 0.02)

# Seconds by which a count lags behind.
_LAG = 0.5

# Of ten keys, how many share an account that they do not declare.
_SHARED = 4

# Seconds that a pool may take beyond the time of its pace, if no limit delays it.
_BESIDE = 2.0

_APART = "counted by account, one for each key"
_TOGETHER = "counted all together"
_MIXED = "counted by account, 4 keys in 10 share one, undeclared"
_PEER = f"{AIOLIMITER}, counted by account"


@attrs.frozen
class Run:
    """How long a pool took, and how many requests were refused."""

    seconds: float
    refused: int


# --- real time


def _real(server: Server, contender: Contender, secrets: Sequence[str], **options: object) -> Run:
    url = server.open(secrets, limit=LIMIT, delay=DELAY, **options)
    began = time.perf_counter()
    answered = asyncio.run(contender(url, secrets))
    seconds = time.perf_counter() - began
    assert answered == len(secrets), f"{answered} of {len(secrets)} keys were answered"
    return Run(seconds, server.close().refused)


def _in_real_time(server: Server, keys: int, period: int) -> list[Bound]:
    secrets = make_secrets(keys)
    # 60 s is the default, as without this setting.
    client = partial(ours, limit=RateLimit(period=period))
    by_account = partial(_real, server, period=period, scope="account")
    runs = in_turns(
        {
            _APART: partial(by_account, client, secrets),
            _TOGETHER: partial(_real, server, client, secrets, period=period, scope="client"),
            _MIXED: partial(
                by_account,
                client,
                random.Random(7).sample(secrets, keys),
                shared=secrets[: keys * _SHARED // 10],
            ),
            _PEER: partial(by_account, partial(aiolimiter, limit=LIMIT, period=period), secrets),
        },
        1,
    )
    print_table(
        f"{keys:,} keys, {LIMIT} requests in any {period} s, {DELAY[0] * 1000:g} to "
        f"{DELAY[1] * 1000:g} ms of delay, and a client "
        "without any configuration; 1 round.",
        ("", "time, s", "429s"),
        [(name, *attrs.astuple(run)) for name, (run,) in runs.items()],
    )
    return [
        _in_time(_APART, runs[_APART][0], keys),
        *(
            _not_refused(name, runs[name][0], at_most)
            for name, at_most in ((_APART, 0), (_TOGETHER, 0), (_MIXED, 2))
        ),
    ]


# --- virtual time


async def _check_lagging(keys: int, period: int, *, by_account: bool) -> Run:
    def whose(key: ApiKey) -> Hashable:
        return key.digest if by_account else None

    server = virtual.WindowServer(limit=LIMIT, period=period, scope=whose, lag=_LAG, seconds=DELAY)
    async with virtual.fake_client(server, rate_limit=RateLimit(period=period)) as client:
        answered = len((await client.check(virtual.keys(keys))).succeeded)
    assert answered == keys, f"{answered} of {keys} keys were answered"
    return Run(virtual.now(), len(server.refused))


def _in_virtual_time(keys: int, period: int) -> list[Bound]:
    runs = {
        _APART: virtual.run(_check_lagging(keys, period, by_account=True)),
        _TOGETHER: virtual.run(_check_lagging(keys, period, by_account=False)),
    }
    print_table(
        f"The same in virtual time, with a server whose count is {_LAG:g} s behind its answers.",
        ("", "time, s", "429s"),
        [(name, *attrs.astuple(run)) for name, run in runs.items()],
    )
    return [
        _in_time(f"with a lag, {_APART}", runs[_APART], keys),
        *(_not_refused(f"with a lag, {name}", run, 0) for name, run in runs.items()),
    ]


def _in_time(what: str, run: Run, keys: int) -> Bound:
    pace = RateLimit().pace or math.inf
    return Bound(
        f"{what}: seconds (at {pace:g} a second, and {_BESIDE:g})",
        run.seconds,
        keys / pace + _BESIDE,
    )


def _not_refused(what: str, run: Run, at_most: int) -> Bound:
    return Bound(f"{what}: requests refused (429)", run.refused, at_most)


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiolimiter")
    with server_process() as server:
        real = _in_real_time(server, options.keys, options.period)
    return real + _in_virtual_time(options.keys, options.period)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=whole(10), default=1000, help="keys of the pool")
    parser.add_argument(
        "--period", type=whole(1), default=60, help="seconds that the server's window is long"
    )


BENCHMARK = Benchmark(
    "the detection of the scope that the server counts by, in real time", run, _add_options
)
