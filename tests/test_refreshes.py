"""The gate that refreshes go through, in virtual time."""

from __future__ import annotations

import asyncio
import math

import pytest

from crustcredits._refreshes import RefreshGate
from crustcredits._turn import Turn

pytestmark = pytest.mark.virtual


def refresh(since: float) -> Turn:
    turn = Turn()
    turn.wanted, turn.since = False, since
    return turn


async def enter(gate: RefreshGate, log: list[float], turn: Turn) -> None:
    await gate.enter(turn)
    log.append(turn.since)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_few_go_at_a_time_the_oldest_first() -> None:
    """Those of one age in the order they came."""
    gate, log = RefreshGate(2), list[float]()
    turns = [refresh(since) for since in (5.0, 4.0, 3.0, 1.0, 2.0, 1.0)]
    tasks = [asyncio.create_task(enter(gate, log, turn)) for turn in turns]
    await settle()
    assert log == [5.0, 4.0]
    assert len(gate) == 6
    for turn in turns:
        gate.leave(turn)
        await settle()
    assert log == [5.0, 4.0, 1.0, 1.0, 2.0, 3.0]
    await asyncio.gather(*tasks)
    for turn in turns:
        gate.leave(turn)
    assert len(gate) == 0


async def test_who_is_inside_enters_at_once() -> None:
    """As one that was sent back by a pause does."""
    gate = RefreshGate(1)
    turn = refresh(1.0)
    await gate.enter(turn)
    await gate.enter(turn)
    assert len(gate) == 1


async def test_one_that_somebody_wants_goes_on_at_once() -> None:
    """Beyond the room; one that is inside is where it is."""
    gate, log = RefreshGate(1), list[float]()
    inside, older, wanted = refresh(9.0), refresh(1.0), refresh(1.0)
    tasks = [asyncio.create_task(enter(gate, log, turn)) for turn in (inside, older, wanted)]
    await settle()
    assert wanted.earliest(7.0) == 7.0
    wanted.want()
    inside.want()
    await settle()
    assert log == [9.0, 1.0]
    gate.leave(wanted)
    await settle()
    assert len(log) == 2
    gate.leave(inside)
    await asyncio.gather(*tasks)


async def test_one_that_is_given_up_leaves_its_place_to_the_next() -> None:
    """Whether it still waits or has just been let in."""
    gate, log = RefreshGate(1), list[float]()
    first = refresh(0.0)
    await gate.enter(first)
    waiting, admitted, last = (asyncio.create_task(enter(gate, log, refresh(since))) for since in (1.0, 2.0, 3.0))
    await settle()
    waiting.cancel()
    gate.leave(first)  # passes over the cancelled one
    admitted.cancel()
    await last
    assert log == [3.0]
    assert len(gate) == 1


async def test_one_cancelled_and_wanted_in_one_moment_is_cancelled() -> None:
    """Its future is done already."""
    gate = RefreshGate(1)
    await gate.enter(refresh(0.0))
    turn = refresh(1.0)
    task = asyncio.create_task(gate.enter(turn))
    await settle()
    task.cancel()
    turn.want()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(gate) == 1


async def test_nobody_limits_the_time_of_what_only_refreshes() -> None:
    """A turn without waiters has all the time there is."""
    assert Turn().patience(5.0) == math.inf
