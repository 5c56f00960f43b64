"""The admission queue by itself: the cost of a call, by the number of others that wait.

Each call is put, granted and ended, without a loop, a task or a socket; time is a number. `free`:
there is a token for each. `flows`: the same, in a thousand flows. `scarce`: all accounts are
counted together, at 300 a minute, so nearly all wait for a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from functools import partial

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.flow import Call, Flow
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    in_turns,
    print_machine,
    print_table,
    rounds_text,
    whole,
)

FEW, MANY = 1_000, 100_000
_SERVED = AttemptResult(status=200)
# Seconds that each request takes.
_TRIP = 0.02
_SLOTS = 32


def _drain(waiting: int, *, flows: int = 1, scarce: bool = False) -> float:
    """Microseconds of processor time for each of `count` calls that wait at once."""
    terms = SchedulerTerms(requests=300 if scarce else waiting, scope="client")
    scheduler = Scheduler(
        terms, pace=Pace(None, 5.0), slots=ConnectionSlots[Attempt](_SLOTS), seed=1
    )
    members = [Flow() for _ in range(flows)]
    calls = [Call(number, number, members[number % flows]) for number in range(waiting)]
    on_wire: deque[Attempt] = deque()
    began = time.process_time()
    for call in calls:
        scheduler.put(call)
    now, left = 0.0, waiting
    while left:
        granted = scheduler.grant(now)
        if isinstance(granted, Attempt):
            on_wire.append(granted)
        elif on_wire:
            now = max(now, on_wire[0].started + _TRIP)
            scheduler.ended(on_wire.popleft(), _SERVED, now)
            left -= 1
        else:
            assert isinstance(granted, float), "a waiting call is let out"
            now = granted
    return (time.process_time() - began) / waiting * 1e6


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    kinds = {
        "free": partial(_drain),
        "flows": partial(_drain, flows=1_000),
        "scarce": partial(_drain, scarce=True),
    }
    few = in_turns({name: partial(drain, FEW) for name, drain in kinds.items()}, options.rounds)
    many = in_turns(
        {name: partial(drain, options.many) for name, drain in kinds.items()}, options.rounds
    )
    rows = [(name, statistics.median(few[name]), statistics.median(many[name])) for name in kinds]
    print_table(
        f"The queue's processor time for each call; {rounds_text(options.rounds)}.",
        ("", f"{FEW:,} wait, µs", f"{options.many:,} wait, µs", "ratio"),
        [(name, one, other, other / one) for name, one, other in rows],
    )
    return [
        Bound(f"{name}: a call of {options.many:,}, of one of {FEW:,}", other / one, 3.0)
        for name, one, other in rows
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=whole(1), default=5, help="rounds")
    parser.add_argument("--many", type=whole(1), default=MANY, help="calls of the large queue")


BENCHMARK = Benchmark("the admission queue by itself", run, _add_options)
