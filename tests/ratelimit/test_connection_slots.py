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
