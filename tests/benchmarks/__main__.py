"""`python -m tests.benchmarks NAME`: measure the library against its peers, on this machine.

Prints Markdown tables and the judged bounds; the exit status is 3 when one is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from tests.benchmarks import (
    accounts,
    beside,
    cache,
    call,
    estimates,
    figures,
    messages,
    outage,
    picture,
    pool,
    processes,
    queue,
    redis_faults,
    scale,
    scope,
    service,
    simulation,
    situations,
    workers,
)
from tests.benchmarks._measure import Benchmark

_BENCHMARKS: Final[dict[str, Benchmark]] = {
    "pool": pool.BENCHMARK,
    "call": call.BENCHMARK,
    "queue": queue.BENCHMARK,
    "figures": figures.BENCHMARK,
    "estimates": estimates.BENCHMARK,
    "situations": situations.BENCHMARK,
    "beside": beside.BENCHMARK,
    "scale": scale.BENCHMARK,
    "cache": cache.BENCHMARK,
    "service": service.BENCHMARK,
    "outage": outage.BENCHMARK,
    "processes": processes.BENCHMARK,
    "redis-faults": redis_faults.BENCHMARK,
    "accounts": accounts.BENCHMARK,
    "messages": messages.BENCHMARK,
    "workers": workers.BENCHMARK,
    "scope": scope.BENCHMARK,
    "simulation": simulation.BENCHMARK,
    "picture": picture.BENCHMARK,
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    bounds = _BENCHMARKS[options.name].run(options)
    print("Judged:\n")
    print(*bounds, sep="\n")
    return 0 if all(bound.met for bound in bounds) else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description="Measure against peers, on this machine."
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, benchmark in _BENCHMARKS.items():
        defaults = argparse.ArgumentDefaultsHelpFormatter
        benchmark.add_options(
            names.add_parser(
                name, help=benchmark.about, description=benchmark.about, formatter_class=defaults
            )
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
