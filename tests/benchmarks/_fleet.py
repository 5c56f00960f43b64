"""Processes that begin at the same moment, are started before it, and are timed from outside.

They wait at a barrier.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeAlias

import attrs

# Awaited by a job once it is prepared; returns when all jobs are.
Barrier: TypeAlias = Callable[[], Awaitable[None]]
# Run in a process, on a loop of its own; returns how many keys were answered.
Job: TypeAlias = Callable[[Barrier], Coroutine[Any, Any, int]]


@attrs.frozen
class Kill:
    """A process to end by SIGKILL, and the seconds until then after the barrier."""

    place: int
    after: float


@attrs.frozen
class Ended:
    """The results of the jobs."""

    seconds: float  # from the barrier to the end of the last job
    answered: list[int | None]  # keys answered by each; None for a killed process


@attrs.frozen
class _Worker:
    process: BaseProcess
    control: Connection


class Fleet:
    """A number of processes. First `prepare`, then `release`."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Give each process its job, which must pickle. Returns when all are at the barrier."""
        for worker, job in zip(self._workers, jobs, strict=True):
            worker.control.send(job)
        for worker in self._workers:
            worker.control.recv()

    def release(self, kill: Kill | None = None) -> Ended:
        """Let the processes run. Returns when all have ended."""
        began = time.perf_counter()
        for worker in self._workers:
            worker.control.send(None)
        if kill is not None:
            threading.Timer(kill.after, self._workers[kill.place].process.kill).start()
        # In order: when the last result is read, all before it have been awaited.
        answered = [self._read(place, kill) for place in range(len(self._workers))]
        return Ended(time.perf_counter() - began, answered)

    def _read(self, place: int, kill: Kill | None) -> int | None:
        try:
            answered: int = self._workers[place].control.recv()
        except EOFError:
            if kill is None or kill.place != place:
                raise
            return None
        return answered


@contextmanager
def fleet(size: int) -> Iterator[Fleet]:
    """Start `count` processes, which end with the block."""
    workers = [_start() for _ in range(size)]
    try:
        yield Fleet(workers)
    finally:
        for worker in workers:
            worker.control.close()
        for worker in workers:
            worker.process.join(5)
            worker.process.kill()


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(control: Connection) -> None:
    async def barrier() -> None:
        control.send(None)
        await asyncio.to_thread(control.recv)

    while True:
        try:
            job: Job = control.recv()
        except EOFError:  # nothing more to do
            return
        control.send(asyncio.run(job(barrier)))
