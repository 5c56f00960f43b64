"""Places on the wire, in virtual time."""

from __future__ import annotations

import asyncio

import pytest

from crustcredits._slots import HANGING_SHARE, Slots
from tests.virtual import now

pytestmark = pytest.mark.virtual


async def occupy(slots: Slots, seconds: float, log: list[float] | None = None) -> None:
    slot = await slots.acquire()
    if log is not None:
        log.append(now())
    try:
        await asyncio.sleep(seconds)
    finally:
        slots.release(slot, answered=True)


async def hold(slots: Slots, seconds: float, log: list[float] | None = None) -> None:
    """Without an answer."""
    slot = await slots.acquire()
    if log is not None:
        log.append(now())
    await asyncio.sleep(seconds)
    slots.release(slot, answered=False)


async def test_no_more_are_on_the_wire_than_there_are_slots() -> None:
    """As long as answers come; the rest wait in order."""
    slots, log = Slots(2), list[float]()
    await asyncio.gather(*(occupy(slots, 0.1, log) for _ in range(6)))
    assert log == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2], abs=1e-3)


async def test_a_hanging_request_stops_counting() -> None:
    """After 0.4 s without an answer its place goes to the next in the queue."""
    slots, log = Slots(2), list[float]()
    hanging = [asyncio.create_task(occupy(slots, 10)) for _ in range(4)]
    await asyncio.sleep(0)
    await occupy(slots, 0.01, log)
    assert log == pytest.approx([0.8], abs=1e-3)
    await asyncio.gather(*hanging)


async def test_nobody_is_hurried_where_answers_are_slow_for_all() -> None:
    """A slow API is not a hanging one: four times the usual answer is waited for."""
    slots, log = Slots(1), list[float]()
    await occupy(slots, 1.0)
    await asyncio.gather(*(occupy(slots, 1.5, log) for _ in range(3)))
    assert log == pytest.approx([1.0, 2.5, 4.0], abs=1e-3)


async def test_only_so_many_may_hang() -> None:
    """Beyond eight times the slots the next wait until one of them is done."""
    slots, log = Slots(1), list[float]()
    tasks = [asyncio.create_task(occupy(slots, 100, log)) for _ in range(HANGING_SHARE + 3)]
    await asyncio.gather(*tasks)
    assert log[HANGING_SHARE] == pytest.approx(0.4 * HANGING_SHARE, abs=1e-2)
    assert log[HANGING_SHARE + 1] >= 100


async def test_a_cancelled_waiter_leaves_its_turn_to_the_next() -> None:
    """Whether it is cancelled while it waits, or in the moment that it is let through."""
    slots, log = Slots(1), list[float]()
    slot = await slots.acquire()
    waiters = [asyncio.create_task(occupy(slots, 0.1, log)) for _ in range(4)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    slots.release(slot, answered=False)  # passes over the first and lets the second through,
    waiters[1].cancel()  # who leaves before it can run
    await asyncio.gather(*waiters, return_exceptions=True)
    assert log == pytest.approx([0, 0.1], abs=1e-3)


async def test_the_watch_looks_again_when_the_oldest_has_ended_meanwhile() -> None:
    """Its one timer is for whoever was oldest when it was set."""
    slots, log = Slots(2), list[float]()
    ended = asyncio.create_task(hold(slots, 0.3))
    await asyncio.sleep(0.2)
    hanging = [asyncio.create_task(hold(slots, 50)) for _ in range(1)]
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(hold(slots, 50, log)) for _ in range(2)]
    await asyncio.gather(ended, *hanging, *waiting)
    # The first to wait follows the one that ended; the second follows the one that began at 0.2, not the younger one.
    assert log == pytest.approx([0.3, 0.6], abs=1e-3)


async def test_what_was_never_answered_says_nothing_of_how_long_answers_take() -> None:
    """A timeout of ten seconds does not make anyone wait four times as long."""
    slots, log = Slots(1), list[float]()
    await hold(slots, 10)
    await asyncio.gather(*(hold(slots, 5, log) for _ in range(2)))
    assert log == pytest.approx([10, 10.4], abs=1e-3)
