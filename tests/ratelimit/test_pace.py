"""How many requests start per second, on the virtual loop, whose clock aiolimiter reads."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from crustcredits._ratelimit.pace import Pace
from tests.virtual import VirtualLoop, now

pytestmark = pytest.mark.virtual


def pass_time(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.move(seconds)


def starts(pace: Pace, count: int) -> list[float]:
    """When `count` requests start, each as early as the pace allows."""
    times: list[float] = []
    while len(times) < count:
        when = pace.wait(now())
        if when is None:
            pace.take(now())
            times.append(round(now(), 4))
        else:
            assert when > now()
            pass_time(when - now())
    return times


def cut_starts(pace: Pace, count: int, at: float) -> list[float]:
    """When `count` requests start while the pace is cut: aiolimiter has no part in it."""
    times: list[float] = []
    while len(times) < count:
        when = pace.wait(at)
        if when is None:
            pace.take(at)
            times.append(at)
        else:
            assert when > at
            at = when
    return times


@pytest.mark.parametrize(
    ("rate", "times"),
    [
        (100.0, [*[0] * 5, *[0.03] * 3, *[0.06] * 3, 0.09]),
        (5.0, [*[0] * 5, *[0.6] * 3, 1.2]),
        (4.0, [*[0] * 4, *[0.75] * 3, 1.5]),
        (2.0, [0, 0, 1, 1, 2]),
        (1.0, [0, 1, 2]),
        (0.5, [0, 2, 4]),
    ],
)
async def test_requests_start_in_groups_of_three_after_a_burst_of_five(
    rate: float, times: list[float]
) -> None:
    """A slow pace has a burst of one second, and of one request at least."""
    assert starts(Pace(rate, 5.0), len(times)) == times


async def test_groups_stay_as_large_in_a_long_time() -> None:
    """Rounding adds up to no earlier start."""
    times = starts(Pace(100.0, 5.0), 5 + 3 * 3333)
    assert times[-1] == pytest.approx(0.03 * 3333)
    assert list(Counter(times).values()) == [5, *[3] * 3333]


async def test_another_burst_is_possible_after_idle_time() -> None:
    """No earlier request counts any more."""
    pace = Pace(100.0, 5.0)
    starts(pace, 8)
    pass_time(10.0)
    assert starts(pace, 6) == [*[10.03] * 5, 10.06]


async def test_the_next_start_is_never_in_the_past() -> None:
    """Not even where the loop's time is later than the time of the last start."""
    pace = Pace(1.0, 5.0)
    pass_time(0.5)
    pace.take(0.0)
    assert pace.wait(0.5) == 1.0
    pass_time(0.7)
    assert pace.wait(1.2) == 1.2


async def test_without_a_pace_all_requests_start_at_once() -> None:
    pace = Pace(None, 5.0)
    assert starts(pace, 1000) == [0.0] * 1000
    assert pace.current(0.0) is None


async def test_asking_for_the_current_pace_does_not_change_it() -> None:
    """Neither its value nor the rest of the burst."""
    pace = Pace(100.0, 5.0)
    starts(pace, 5)
    assert pace.current(0.0) == 100.0
    assert pace.wait(0.0) == pytest.approx(0.03)


async def test_a_cut_pace_starts_one_request_at_a_time() -> None:
    """At half the rate, with 2 % of the whole more after each second."""
    pace = Pace(1.0, 0.1)
    pace.cut(0.0)
    first, second, third, *rest = cut_starts(pace, 9, 0.0)
    assert (first, second) == (0.0, 2.0)
    assert third == pytest.approx(2.0 + 1 / 0.54)
    assert rest == sorted(set(rest))


async def test_requests_before_a_cut_delay_those_after_it() -> None:
    """After a burst of five at 100 per second."""
    pace = Pace(100.0, 5.0)
    starts(pace, 5)
    pace.cut(0.0)
    assert pace.wait(0.0) == pytest.approx(0.05)
    assert pace.wait(0.05) is None


async def test_a_second_cut_halves_the_rate_as_far_as_it_has_recovered() -> None:
    pace = Pace(100.0, 5.0)
    pace.cut(1.0)
    assert pace.current(6.0) == pytest.approx(60)
    pace.cut(11.0)
    assert pace.current(11.0) == pytest.approx(35)
    assert pace.current(12.0) == pytest.approx(37)


async def test_a_recovered_pace_has_a_whole_burst() -> None:
    """It recovers to the configured rate, not beyond."""
    pace = Pace(100.0, 5.0)
    starts(pace, 5)
    pace.cut(0.0)
    pass_time(25.0)
    assert pace.wait(now()) is None
    assert starts(pace, 9) == [*[25.0] * 5, *[25.03] * 3, 25.06]
    assert pace.current(1000.0) == 100.0


@pytest.mark.parametrize(
    ("rate", "least", "lowest"), [(100.0, 5.0, 5.0), (100.0, 200.0, 100.0), (None, 5.0, 5.0)]
)
async def test_no_cut_goes_below_the_least_rate(
    rate: float | None, least: float, lowest: float
) -> None:
    """Nor above the configured rate."""
    pace = Pace(rate, least)
    for _ in range(10):
        pace.cut(0.0)
    assert pace.current(0.0) == lowest


@pytest.mark.parametrize(("least", "whole", "cut"), [(5.0, 100.0, 50.0), (300.0, 300.0, 300.0)])
async def test_a_first_cut_without_a_pace_sets_one(least: float, whole: float, cut: float) -> None:
    """Of 100 per second, or of the least rate if that is more."""
    pace = Pace(None, least)
    starts(pace, 50)
    pace.cut(0.0)
    assert pace.current(0.0) == cut
    pass_time(30.0)
    assert pace.current(30.0) == whole
    assert starts(pace, 6) == [*[30.0] * 5, round(30.0 + 3 / whole, 4)]
