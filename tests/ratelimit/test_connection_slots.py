"""Slots for requests on the wire, and requests that hang without one."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.connection_slots import HANGING_SHARE, ConnectionSlots


def test_a_request_without_an_answer_gives_its_slot_back() -> None:
    """After 0.4 s, and then its slot is free again."""
    slots = ConnectionSlots[str](2)
    assert slots.next_overdue() is None
    slots.take("a", 0.0)
    slots.take("b", 0.1)
    assert (slots.free, slots.next_overdue()) == (0, 0.4)
    assert slots.overdue(0.39) == []
    assert slots.overdue(0.4) == ["a"]
    assert (slots.free, slots.next_overdue(), len(slots)) == (1, 0.5, 2)
    slots.release("b", 0.45, answered=True)
    slots.release("a", 9.0, answered=False)
    assert (slots.free, len(slots)) == (2, 0)


def test_no_request_hangs_early_when_answers_are_slow_for_all() -> None:
    """A slow API is not a hanging one: the patience is four times the usual answer time.

    Requests without an answer do not change the usual time.
    """
    slots = ConnectionSlots[str](1)
    slots.take("a", 0.0)
    slots.release("a", 1.0, answered=True)
    slots.take("b", 1.0)
    assert slots.next_overdue() == 5.0
    slots.release("b", 99.0, answered=False)
    assert slots.usual == 1.0
    slots.take("c", 99.0)
    slots.release("c", 101.0, answered=True)
    assert slots.usual == pytest.approx(1.1)


def test_the_number_of_hanging_requests_is_bounded() -> None:
    """Beyond eight times the slots, hanging requests hold slots until one of them ends."""
    slots = ConnectionSlots[int](2)
    for number in range(2 * (1 + HANGING_SHARE)):
        assert slots.free > 0
        slots.take(number, float(number))
        slots.overdue(number + 0.5)
    assert slots.free == 0
    slots.release(0, 50.0, answered=False)
    assert slots.free == 1


def test_a_hanging_request_over_the_bound_gives_its_slot_back_when_it_ends() -> None:
    """Then it was no hanging one, and is on the wire no more."""
    slots = ConnectionSlots[int](1)
    for number in range(1 + HANGING_SHARE):
        slots.take(number, 0.0)
        assert slots.overdue(0.4) == [number]
    assert (slots.free, len(slots)) == (0, 9)
    slots.release(HANGING_SHARE, 3.0, answered=True)
    assert (slots.free, len(slots), slots.usual) == (1, 8, 3.0)


def test_the_oldest_hanging_request_over_the_bound_hangs_next() -> None:
    """When one of the hanging ones ends; each ends once."""
    slots = ConnectionSlots[int](3)
    for number in range(3 * (1 + HANGING_SHARE)):
        slots.take(number, 0.0)
        slots.overdue(0.4)
    assert (slots.free, len(slots), slots.next_overdue()) == (0, 27, None)
    slots.release(0, 1.0, answered=False)
    assert (slots.free, len(slots)) == (1, 26)
    slots.release(24, 1.0, answered=False)  # the oldest, which hangs now
    assert (slots.free, len(slots)) == (2, 25)
    for number in (25, 26, *range(1, 24)):
        slots.release(number, 1.0, answered=False)
    assert (slots.free, len(slots)) == (3, 0)
    with pytest.raises(KeyError):
        slots.release(1, 1.0, answered=False)


@pytest.mark.parametrize(
    ("answers", "patience"), [([0.05], 0.4), ([0.1], 0.4), ([0.2], 0.8), ([2.0, 12.0], 12.0)]
)
def test_the_patience_is_four_times_a_moving_average_of_answers(
    answers: list[float], patience: float
) -> None:
    """Of which the newest is a tenth; 0.4 s at least."""
    slots = ConnectionSlots[str](1)
    for took in answers:
        slots.take("a", 5.0)
        slots.release("a", 5.0 + took, answered=True)
    slots.take("b", 100.0)
    assert slots.next_overdue() == pytest.approx(100 + patience)
