"""The parts that benchmarks share: the server's process, rounds in turns, tables, judged bounds.

It knows none of the contenders.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import attrs

from crustcredits import ApiKey
from crustcredits.testing import SandboxServer

T = TypeVar("T")

# Connections of every contender: the default of `CreditsClient`.
CONNECTIONS = 32

# Seconds between two times that a sandbox reports.
CLOCK_STEP = 0.02

# The account of keys that share one.
_SHARED = "shared"


# --- benchmarks


@attrs.frozen
class Bound:
    """A judged figure, with its most allowed value."""

    what: str
    measured: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.measured <= self.at_most

    def __str__(self) -> str:
        return (
            f"- {'met' if self.met else 'MISSED'}: {self.what}: {self.measured:.4g}, at most "
            f"{self.at_most:.4g}"
        )


@attrs.frozen
class Benchmark:
    """One entry of the registry. `run` prints its tables and returns the bounds."""

    about: str
    run: Callable[[argparse.Namespace], list[Bound]]
    add_options: Callable[[argparse.ArgumentParser], None]


def whole(minimum: int) -> Callable[[str], int]:
    """A type for argparse: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of at least {minimum}"
            )
        return int(text)

    return parse


# --- rounds


def in_turns(contenders: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run each contender once a round, one after the other.

    A slow moment of the machine then affects all of them.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for done in range(rounds):
        for name, run in contenders.items():
            _say(f"round {done + 1} of {rounds}: {name}")
            gc.collect()
            results[name].append(run())
    _say("")
    return results


def _say(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"{progress:<79}", end="\r", file=sys.stderr, flush=True)


def median_ratio(ours: Sequence[float], peers: Sequence[float]) -> float:
    """The median of the rounds' ratios: two figures of one round come from the same conditions."""
    return statistics.median(our / peer for our, peer in zip(ours, peers, strict=True))


def compare(costs: Mapping[str, Sequence[float]]) -> tuple[float, list[tuple[str, float, float]]]:
    """Of ours and one peer, in this order: the median ratio, and rows of name, median and ratio."""
    ours, peers = costs.values()
    ratio = median_ratio(ours, peers)
    shares = (ratio, 1.0)
    return ratio, [
        (name, statistics.median(of_one), share)
        for (name, of_one), share in zip(costs.items(), shares, strict=True)
    ]


# --- the server


@attrs.frozen
class Figures:
    """The figures of the server."""

    requests: int
    refused: int
    worst_window: int | None  # None if the arrivals were not stored
    connections: int
    # When each request came, in seconds of the server's clock; empty if arrivals were not stored.
    arrivals: list[float]


class Server:
    """A process of its own for the sandbox, so that its processor time is not the client's.

    One sandbox at a time.
    """

    def __init__(self, control: Connection) -> None:
        self._control = control

    def open(self, secrets: Sequence[str], **options: Any) -> str:
        """Start a fresh sandbox, with an empty window, that knows these keys. Returns its URL.

        `options` are the sandbox's, and two more. With `tells_time` the credits of every key are
        the wall time, so that an answer shows when it was given. `shared` has the secrets of keys
        that belong to one account; each other key has an account of its own.
        """
        self._control.send((list(secrets), options))
        url: str = self._control.recv()
        return url

    def close(self) -> Figures:
        """Stop the sandbox. Returns its figures, once its port is closed."""
        self._control.send("figures")
        figures: Figures = self._control.recv()
        return figures


@contextmanager
def server_process() -> Iterator[Server]:
    """The server's process; it ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Server(ours)
    finally:
        ours.close()
        process.join(5)


def _serve(control: Connection) -> None:
    try:
        asyncio.run(_serve_each(control))
    except EOFError:  # the client is done
        return


async def _serve_each(control: Connection) -> None:
    while True:
        secrets, options = await asyncio.to_thread(control.recv)
        tells_time, shared = options.pop("tells_time", False), set(options.pop("shared", ()))
        async with SandboxServer(**options) as server:
            server.add_account(_SHARED)
            # With equal credits a pool's keys would all look like one account.
            keys = [
                server.add_key(
                    secret=secret,
                    account=_SHARED if secret in shared else None,
                    credits=1000 + place,
                )
                for place, secret in enumerate(secrets)
            ]
            telling = asyncio.create_task(_tell_time(server, keys)) if tells_time else None
            control.send(server.url)
            await asyncio.to_thread(control.recv)
            if telling is not None:
                telling.cancel()
            worst_window = server.worst_window() if options.get("record", True) else None
            arrivals = [arrival.at for arrival in server.arrivals]
            figures = Figures(
                server.requests, server.refused, worst_window, server.peak_connections, arrivals
            )
        control.send(figures)


async def _tell_time(server: SandboxServer, keys: Sequence[ApiKey]) -> None:
    while True:
        now = f"{time.time():.3f}"
        for key in keys:
            server.set_credits(key, now)
        await asyncio.sleep(CLOCK_STEP)


def make_secrets(count: int) -> list[str]:
    return [f"benchmark-{place:06}" for place in range(count)]


# --- output


def print_machine(*peers: str) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("aiohttp", *peers))
    python = f"{platform.python_implementation()} {platform.python_version()}"
    print(
        f"Measured on {_processor()}, {os.cpu_count()} cores, {platform.system()}, {python}, "
        f"{versions}.\n"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def print_table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table below its caption.

    The first column is aligned to the left. The others, which hold figures, are aligned to the
    right.
    """
    print(f"{caption}\n")
    print(_line(heads))
    print(_line(["---", *["---:"] * (len(heads) - 1)]))
    for row in rows:
        print(_line([cell if isinstance(cell, str) else number(cell) for cell in row]))
    print()


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rounds_text(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"the median of {rounds} rounds in turns"


def number(value: object) -> str:
    """Format whole numbers in full, others to three significant digits.

    The whole part never loses a digit.
    """
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
    )
