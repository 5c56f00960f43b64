"""A FastAPI service while the API is out of reach: its answers, their cost, and its recovery.

One key's balance is asked for all the time over keep-alive connections. The sandbox is closed, so
that its port refuses connections, and later opened again on the same port. Every second the app's
process is measured from outside.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

import attrs

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
from tests.benchmarks._service import (
    KEYS,
    MAX_AGE,
    Answered,
    App,
    Load,
    Stated,
    app_process,
    key_names,
    load_on,
    must_be_ok,
    no_collector,
    quantile,
    read_key,
    request_for,
    service_app,
)

T = TypeVar("T")

# Seconds between two samples of the process.
_STEP = 1.0

# Seconds that an answer's age may be above `MAX_AGE` without being stale: it is stated a moment
# after that was decided.
_MOMENT = 0.05

# Seconds after the return within which all must be as before.
_RETURN = 60.0

# Milliseconds that an answer may take while the API is away: a cache entry only waits for the app's
# turns and pauses.
_SLOWEST = 1000.0

# Tasks of the server, the lifespan and the client.
_FEW = 10

# A minute's refreshes leave a tenth of the 300 requests.
_REFRESHES = 270 / 60

_PHASES = ("before", "the API away", "after")


@attrs.frozen
class Sample:
    """The app's process at one moment."""

    at: float  # seconds of the performance counter
    tasks: int
    descriptors: int
    memory: float  # MB, resident


@attrs.frozen
class Course:
    """All samples and answers; times are of the performance counter."""

    answers: list[Answered]
    samples: list[Sample]
    left: float  # when the sandbox was closed
    returned: float  # when it was opened again
    refused: int


# The kind of an answer, and its statement.
Read: TypeAlias = tuple[Answered, Stated]


# --- the course of it


async def _course(
    server: Server, url: str, secrets: Sequence[str], app: App, options: argparse.Namespace
) -> Course:
    seconds = options.before + options.outage + options.after
    requests = [request_for(f"/keys/{name}") for name in key_names(KEYS)]
    samples: list[Sample] = []
    async with load_on(app, options.connections) as load, load_on(app, 1) as beside:
        must_be_ok(await load.run(requests))
        # Until there is a refresh for each name, because the number of tasks is stable only then.
        must_be_ok(await load.run(itertools.cycle(requests), MAX_AGE + 1))
        async with asyncio.TaskGroup() as group:
            sampling = group.create_task(_sample(beside, app.process, samples))
            loading = group.create_task(load.run(itertools.cycle(requests), seconds))
            left, returned, refused = await _outage(server, url, secrets, options)
            answers = await loading
            sampling.cancel()
    return Course(answers, samples, left, returned, refused + server.close().refused)


async def _outage(
    server: Server, url: str, secrets: Sequence[str], options: argparse.Namespace
) -> tuple[float, float, int]:
    """Close the sandbox in time, and open it again.

    Returns the two times, and how many requests were refused in between.
    """
    await asyncio.sleep(options.before)
    figures = await asyncio.to_thread(server.close)
    left = time.perf_counter()
    await asyncio.sleep(options.outage)
    returned = time.perf_counter()
    await asyncio.to_thread(partial(server.open, secrets, port=urlsplit(url).port, tells_time=True))
    return left, returned, figures.refused


async def _sample(load: Load, process: int, samples: list[Sample]) -> None:
    while True:
        answers = await load.run([request_for("/tasks")])
        must_be_ok(answers)
        samples.append(
            Sample(answers[0].came, int(answers[0].body), _descriptors(process), _memory(process))
        )
        await asyncio.sleep(_STEP)


def _descriptors(process: int) -> int:
    return sum(1 for _ in Path(f"/proc/{process}/fd").iterdir())


def _memory(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


# --- results


def _print_answers(phases: Sequence[Sequence[Read]]) -> None:
    print_table(
        "The answers for one key.",
        (
            "",
            "answers",
            "latency, ms",
            "99th percentile, ms",
            "slowest, ms",
            "stale",
            "with an error",
            "oldest, s",
        ),
        [(name, *_answers_row(read)) for name, read in zip(_PHASES, phases, strict=True)],
    )


def _answers_row(read: Sequence[Read]) -> tuple[float, ...]:
    latencies = [answer.latency for answer, _ in read]
    stale = sum(stated.stale for _, stated in read)
    errors = sum(stated.error for _, stated in read)
    oldest = max(stated.age for _, stated in read)
    return (
        len(read),
        statistics.median(latencies),
        quantile(latencies, 0.99),
        max(latencies),
        stale,
        errors,
        oldest,
    )


def _print_samples(phases: Sequence[Sequence[Sample]]) -> None:
    print_table(
        f"The app's process, every {_STEP:g} s: the median, and the most.",
        ("", "tasks", "most", "descriptors", "most", "resident, MB", "most"),
        [(name, *_samples_row(samples)) for name, samples in zip(_PHASES, phases, strict=True)],
    )


def _samples_row(samples: Sequence[Sample]) -> list[float]:
    columns = zip(
        *((sample.tasks, sample.descriptors, sample.memory) for sample in samples), strict=True
    )
    return [figure for column in columns for figure in (statistics.median(column), max(column))]


def _unmarked(read: Sequence[Read]) -> int:
    """Answers that are too old and not marked as stale."""
    return sum(stated.age > MAX_AGE + _MOMENT and not stated.stale for _, stated in read)


def _forgotten(read: Sequence[Read]) -> int:
    """Stale answers without an error after one with an error.

    No good answer can have come in between.
    """
    failed: set[str] = set()
    forgotten = 0
    for _, stated in read:
        forgotten += stated.stale and not stated.error and stated.name in failed
        if stated.error:
            failed.add(stated.name)
    return forgotten


def _recovery(read: Sequence[Read], returned: float) -> float:
    """Seconds until every name was answered without an error since the last answer with one."""
    clean: set[str] = set()
    for answer, stated in read:
        clean = set() if stated.error else clean | {stated.name}
        if len(clean) == KEYS:
            return answer.came - returned
    return math.inf


def _judge_return(read: Sequence[Read], returned: float, seconds: int) -> list[Bound]:
    recovery = _recovery(read, returned)
    if math.isinf(recovery) and seconds < _RETURN:
        print(
            f"Errors still stood beside answers when it ended, {seconds} s after the return: "
            "too short to judge the return.\n"
        )
        return []
    return [
        Bound(
            f"seconds from the return until all {KEYS} names were answered without an error",
            recovery,
            _RETURN,
        )
    ]


def _judge_process(samples: Sequence[Sequence[Sample]], connections: int) -> list[Bound]:
    tasks = [statistics.median(sample.tasks for sample in of_one) for of_one in samples]
    most = max(sample.tasks for of_one in samples for sample in of_one)
    middle, end = samples[0][len(samples[0]) // 2], samples[-1][-1]
    return [
        # All may be old at once; before, refreshed ones are fresh within `MAX_AGE`.
        Bound(
            "tasks after, above those before",
            tasks[-1] - tasks[0],
            MAX_AGE * _REFRESHES + connections,
        ),
        Bound(
            "most tasks: a refresh of each name, a request of each connection, and a few",
            most,
            KEYS + connections + 1 + _FEW,
        ),
        Bound(
            "growth of the memory, in percent of the middle of before",
            (end.memory / middle.memory - 1) * 100,
            10,
        ),
    ]


def _judge(
    course: Course, phases: Sequence[Sequence[Read]], options: argparse.Namespace
) -> list[Bound]:
    _, away, after = phases
    return [
        Bound(
            "answers that were not status 200",
            sum(answer.status != 200 for answer in course.answers),
            0,
        ),
        Bound(
            "milliseconds of the slowest answer while the API was away",
            max(answer.latency for answer, _ in away),
            _SLOWEST,
        ),
        Bound(
            f"answers older than {MAX_AGE:g} s that were not marked stale",
            sum(map(_unmarked, phases)),
            0,
        ),
        Bound("stale answers without an error, where one before them had it", _forgotten(away), 0),
        Bound("requests refused (429)", course.refused, 0),
        *_judge_return(after, course.returned, options.after),
    ]


def _in_phases(course: Course, seen: Iterable[T], at: Callable[[T], float]) -> list[list[T]]:
    phases: list[list[T]] = [[] for _ in _PHASES]
    for one in seen:
        phases[bisect_right((course.left, course.returned), at(one))].append(one)
    return phases


def _report(course: Course, options: argparse.Namespace) -> list[Bound]:
    read = [(answer, read_key(answer.body)) for answer in course.answers if answer.status == 200]
    phases = _in_phases(course, read, lambda one: one[0].came)
    samples = _in_phases(course, course.samples, lambda sample: sample.at)
    _print_answers(phases)
    _print_samples(samples)
    return _judge(course, phases, options) + _judge_process(samples, options.connections)


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine("fastapi", "uvicorn")
    print(
        f"The API was there for {options.before} s, away for {options.outage} s and there "
        f"again for {options.after} s.\n"
    )
    secrets = make_secrets(KEYS)
    with server_process() as server:
        url = server.open(secrets, tells_time=True)
        with app_process(partial(service_app, url, secrets)) as app, no_collector():
            course = asyncio.run(_course(server, url, secrets, app, options))
    return _report(course, options)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--before", type=whole(2), default=30, help="seconds with the API there")
    parser.add_argument("--outage", type=whole(2), default=60, help="seconds without it")
    parser.add_argument("--after", type=whole(2), default=60, help="seconds with it again")
    parser.add_argument("--connections", type=whole(1), default=16, help="keep-alive connections")


BENCHMARK = Benchmark("a FastAPI service while the API is out of reach", run, _add_options)
