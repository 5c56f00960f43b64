"""The model's rows behind the admission queue, beside this library's scheduler.

The worlds are the same, in virtual time.
"""

from __future__ import annotations

import argparse
import statistics

from tests.benchmarks._measure import Benchmark, Bound, print_machine, print_table, whole
from tests.ratelimit.test_figures import WORLDS


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    rows: list[tuple[str, str, str, str, int]] = []
    bounds: list[Bound] = []
    for name, world in WORLDS.items():
        if options.only not in name:
            continue
        runs = [world.play(seed) for seed in range(1, options.seeds + 1)]
        first, last, refusals, failed = (
            statistics.median(one[part] for one in runs) for part in range(4)
        )
        rows.append(
            (
                name,
                f"{world.first:.4g} / {first:.4g}",
                f"{world.last:.4g} / {last:.4g}",
                f"{world.refusals} / {refusals:g}",
                int(failed),
            )
        )
        bounds += [
            Bound(f"{name}: first good, s", first, max(1.1 * world.first, world.first + 0.1)),
            Bound(f"{name}: last good, s", last, max(1.1 * world.last, world.last + 0.1)),
            Bound(f"{name}: 429s", refusals, max(1.1 * world.refusals, world.refusals + 3)),
        ]
    print_table(
        f"The model's figure / ours, each the median of five and of {options.seeds} runs.",
        ("", "first good, s", "last good, s", "429s", "failed"),
        rows,
    )
    return bounds


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=whole(1), default=5, help="runs of each row")
    parser.add_argument("--only", default="", help="only rows whose name contains this")


BENCHMARK = Benchmark(
    "the model of the admission queue beside the real one, in virtual time", run, _add_options
)
