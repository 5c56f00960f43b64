"""`Window`: how many permits are asked for ahead, and when calls that wait are told of room."""

from __future__ import annotations

import asyncio

import pytest

from crustcredits.redis.window import MOST, Window

pytestmark = pytest.mark.virtual


class Waiter:
    """Notes when it is told."""

    def __init__(self) -> None:
        self.told = 0

    def room_came(self) -> None:
        self.told += 1


@pytest.mark.parametrize(
    ("pace", "size"), [(None, MOST), (1000.0, MOST), (100.0, 15), (20.0, 3), (0.5, 1)]
)
def test_the_window_is_what_the_pace_can_use_in_a_moment(pace: float | None, size: int) -> None:
    assert Window[Waiter](pace).size == Window[Waiter](pace).room == size


async def test_requested_and_unused_permits_count_against_the_window() -> None:
    window = Window[Waiter](100.0)
    window.asked_for(10)
    assert window.room == 5
    window.answered(10, 4)
    assert window.room == 11
    window.used()
    assert window.room == 12
    window.asked_for(12)
    window.asked_for(9)
    assert window.room == 0


@pytest.mark.parametrize(
    ("asked", "wanted", "share"),
    [(0, 40, 15), (0, 3, 3), (7, 40, 8), (8, 40, 0), (8, 7, 7), (14, 1, 1), (15, 1, 0)],
)
async def test_permits_are_asked_for_in_groups_of_half_the_window(
    asked: int, wanted: int, share: int
) -> None:
    """Or fewer, if no more are wanted."""
    window = Window[Waiter](100.0)
    window.asked_for(asked)
    assert window.share_of(wanted, 0) == share
    assert window.allows(wanted) == (share > 0)


async def test_permits_asked_for_already_are_part_of_the_share() -> None:
    window = Window[Waiter](100.0)
    window.asked_for(10)
    assert window.share_of(40, 10) == 15


async def test_waiters_wake_in_the_next_loop_iteration_when_the_window_has_room() -> None:
    """Once for any number of permits; and no more when they do not wait."""
    window = Window[Waiter](100.0)
    waits, left = Waiter(), Waiter()
    window.waits(waits, 3)
    window.waits(left, 1)
    window.waits(left, 0)
    window.asked_for(10)
    window.answered(10, 10)
    for _ in range(3):
        window.used()
    assert waits.told == 0
    await asyncio.sleep(0)
    assert (waits.told, left.told) == (1, 0)
    window.asked_for(5)
    window.asked_for(-1)
    await asyncio.sleep(0)
    assert waits.told == 2
    window.answered(4, 3)
    await asyncio.sleep(0)
    assert waits.told == 3
    window.waits(waits, 0)
    window.used()
    await asyncio.sleep(0)
    assert waits.told == 3
