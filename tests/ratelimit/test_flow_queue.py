"""`FlowQueue`: the turns of the calls of a flow, and calls that leave and come again."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Flow, Kind
from tests.ratelimit.turns import Draws, Pool, Watched, call, popped, pushed


@pytest.mark.parametrize(
    ("pool", "waiting", "order"),
    [
        (0, "", "x1 z1 y1"),
        (0, "b1 c1", "x1 b1 y1 c1 z1"),
        (2, "", "x1 p0 y1 p1 z1"),
        (2, "b1 c1", "x1 p0 y1 p1 b1 c1 z1"),
    ],
)
def test_calls_pushed_first_take_turns_with_all_others(pool: int, waiting: str, order: str) -> None:
    """The first one comes at once; however many come, they do not keep the others waiting."""
    flow = Pool([None] * pool)
    queue = FairQueue()
    if pool:
        queue.push_pool(flow)
    pushed(queue, flow, waiting)
    before = queue.length
    for name in ("x1", "y1"):
        queue.push(call(name, flow, name[0]), first=True)
    assert queue.length == before + 2
    pushed(queue, flow, "z1")
    assert popped(queue) == order


def test_a_call_pushed_first_that_leaves_has_no_turn() -> None:
    """Its account has a new turn when another call of it comes."""
    queue, flow = FairQueue(), Flow()
    pushed(queue, flow, "b1 c1")
    gone = call("x1", flow, "x")
    queue.push(gone, first=True)
    queue.remove(gone)
    pushed(queue, flow, "d1 x2")
    assert popped(queue).split()[-1] in {"d1", "x2"}
    assert len(queue) == 0


@pytest.mark.parametrize("calls", ["a2", "a2 a3"])
def test_a_call_pushed_first_comes_before_the_others_of_its_account(calls: str) -> None:
    """The turn of the account stays where it is."""
    queue, flow = FairQueue(), Flow()
    pushed(queue, flow, f"b1 {calls}")
    queue.push(call("a1", flow, "a"), first=True)
    assert popped(queue).split() == ["b1", "a1", *calls.split()]


def test_a_call_that_moves_to_another_flow_is_counted_once() -> None:
    """It has the turn of its new flow alone."""
    queue, check, singles = FairQueue(), Flow(), Flow(Kind.SINGLE)
    first, *_ = pushed(queue, check, "a1 a2 b1")
    queue.remove(first)
    first.flow = singles
    queue.push(first)
    assert queue.of_account("a", background=False) == 2
    assert sorted(popped(queue).split()) == ["a1", "a2", "b1"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("others", ["a2 a3", ""])
def test_a_drawn_call_that_comes_again_is_counted_once_and_has_its_old_turn(
    others: str, *, first: bool
) -> None:
    """However often it is drawn."""
    queue, flow = FairQueue(), Flow()
    pushed(queue, flow, f"a1 b1 {others}")
    count, of_account = queue.length, queue.of_account("a", background=False)
    for place in (0, count - 1, count - 1):
        drawn = queue.pop(Draws((place,)))
        assert drawn.key == "a1"
        queue.push(drawn, first=first)
        assert (queue.length, queue.of_account("a", background=False)) == (count, of_account)
    assert popped(queue).split() == ["a1", "b1", *others.split()]


def test_a_drawn_call_that_comes_again_elsewhere_leaves_its_old_entry_behind() -> None:
    """The entry is passed over at its turn, and the call is new when it comes back after that."""
    queue, other, flow = FairQueue(), FairQueue(), Flow()
    pushed(queue, flow, "a1 b1 c1")
    drawn = queue.pop(Draws((0,)))
    other.push(drawn)
    assert popped(queue, 1) == "b1"
    other.remove(drawn)
    queue.push(drawn)
    assert popped(queue) == "c1 a1"


def test_calls_drawn_and_returned_do_not_count_as_gone() -> None:
    """So the entries of the others stay, and the ones that left are cleared in time."""
    queue, flow = FairQueue(), Flow()
    made = [Watched(f"{number}", f"a{number}", flow) for number in range(100)]
    for each in made:
        queue.push(each)
    for _ in range(150):  # more than would clear the queue
        queue.push(queue.pop(Draws((0,))))
    assert sorted(popped(queue).split(), key=int) == [str(number) for number in range(100)]
