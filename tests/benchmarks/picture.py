"""The README's picture: requests that the server has counted in the last period of a real run.

A pool under the rate limit, as in `pool`, one run for each contender. The server reports when each
request reached it, refused or not. A curve ends with the last request.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

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
    Benchmark,
    Bound,
    in_turns,
    make_secrets,
    number,
    print_machine,
    print_table,
    server_process,
    whole,
)
from tests.benchmarks._svg import Chart, Curve, Point, steps
from tests.benchmarks.pool import DELAY, LIMIT, PERIOD, Run, one_round

# In kB: it loads with each view of the README.
_MOST = 60

# From below to above: their colour, also told apart by the colour-blind, their width, and their
# name.
_LOOKS = {
    BARE: ("#8c959f", 1.8, "asyncio.gather"),
    AIOLIMITER: ("#d55e00", 1.8, "aiolimiter"),
    PYRATE: ("#9a4fb0", 1.8, "pyrate-limiter"),
    OURS: ("#0072b2", 3.2, "crustcredits"),
}


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("aiolimiter", "pyrate-limiter")
    contenders: dict[str, Contender] = {
        OURS: partial(ours, limit=RateLimit(period=PERIOD)),
        PYRATE: partial(pyrate, limit=LIMIT, period=PERIOD),
        AIOLIMITER: partial(aiolimiter, limit=LIMIT, period=PERIOD),
        BARE: bare,
    }
    secrets = make_secrets(options.keys)
    with server_process() as server:
        rounds = in_turns(
            {
                name: partial(one_round, server, contender, secrets)
                for name, contender in contenders.items()
            },
            1,
        )
    runs = {name: of_one[0] for name, of_one in rounds.items()}
    print_table(
        f"{options.keys:,} keys, {LIMIT} requests in any {PERIOD:g} s, {DELAY[0] * 1000:g} "
        f"to {DELAY[1] * 1000:g} ms of delay; "
        "1 round.",
        ("", "time, s", "429s", "worst window"),
        [
            (name, run.seconds, run.figures.refused, run.figures.worst_window)
            for name, run in runs.items()
        ],
    )
    size = _write(options.out, _chart(runs, options.keys).draw())
    return [
        Bound(f"{OURS}: requests refused (429)", runs[OURS].figures.refused, 0),
        Bound(f"{OURS}: requests in any {PERIOD:g} s", runs[OURS].figures.worst_window or 0, LIMIT),
        Bound("the picture, kB", size, _MOST),
    ]


def _write(file: Path, text: str) -> float:
    file.write_text(text, encoding="utf-8")
    size = len(text.encode()) / 1000
    print(f"Written: {file}, {size:.1f} kB.\n")
    return size


def _chart(runs: dict[str, Run], keys: int) -> Chart:
    curves = {name: _curve(name, runs[name]) for name in _LOOKS}
    return Chart(
        title=f"{keys:,} keys under a limit of {LIMIT} requests in any {PERIOD:g} seconds",
        subtitle=f"requests that reached the server within the last {PERIOD:g} s, refused ones too",
        description=_described(runs),
        across="seconds since the first request",
        limit=LIMIT,
        limit_name=f"the limit: {LIMIT}",
        tick=PERIOD,
        curves=list(curves.values()),
        legend=[curves[name] for name in runs],
    )


def _curve(name: str, run: Run) -> Curve:
    colour, width, called = _LOOKS[name]
    note = f"{run.seconds:.1f} s, {_refused(run)} refused"
    return Curve(
        name=called,
        note=note,
        colour=colour,
        width=width,
        points=steps(_counted(run.figures.arrivals)),
    )


def _counted(arrivals: Sequence[float]) -> list[Point]:
    """Each moment at which the count changes, and the count from then on.

    In seconds since the first arrival.
    """
    first, last = arrivals[0], arrivals[-1]
    aged = [(at + PERIOD, -1) for at in arrivals if at + PERIOD <= last]
    changes = sorted([*((at, 1) for at in arrivals), *aged])
    counts = accumulate(change for _, change in changes)
    return [
        (0.0, 0.0),
        *((at - first, float(count)) for (at, _), count in zip(changes, counts, strict=True)),
    ]


def _described(runs: dict[str, Run]) -> str:
    """The same in words."""
    each = [
        f"{_LOOKS[name][2]}: at most {number(run.figures.worst_window)} requests in one "
        f"window, {_refused(run)} refused, done "
        f"after {run.seconds:.1f} s."
        for name, run in runs.items()
    ]
    return " ".join(
        [
            f"A line for each way to ask, against time. The limit of {LIMIT} is a horizontal line.",
            *each,
        ]
    )


def _refused(run: Run) -> str:
    return number(run.figures.refused) if run.figures.refused else "none"


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("window.svg"), help="the file to write"
    )
    parser.add_argument("--keys", type=whole(1), default=1000, help="keys of the pool")


BENCHMARK = Benchmark(
    "the README's picture of the server's window, from a real run", run, _add_options
)
