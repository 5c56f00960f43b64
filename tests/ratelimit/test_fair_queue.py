"""`FairQueue`: whose turn it is, draws and counts."""

from __future__ import annotations

import random
import weakref
from collections.abc import Hashable, Iterable

import pytest

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Flow, Kind
from tests.ratelimit.turns import Draws, Pool, Watched, popped, pushed

# --- turns


def test_flows_take_turns_and_background_flows_come_after_them() -> None:
    """Background flows take turns too."""
    queue = FairQueue()
    for flow, names in (
        (Flow(Kind.BACKGROUND), "w1 x1"),
        (Flow(), "a1 b1 c1"),
        (Flow(Kind.BACKGROUND), "y1"),
        (Flow(Kind.SINGLE), "d1 e1"),
        (Flow(), "f1"),
    ):
        pushed(queue, flow, names)
    assert popped(queue) == "a1 d1 f1 b1 e1 c1 w1 y1 x1"


def test_accounts_take_turns_and_of_an_account_the_first_call_comes_first() -> None:
    queue = FairQueue()
    pushed(queue, Flow(), "a1 a2 a3 b1 b2 c1")
    assert popped(queue) == "a1 b1 c1 a2 b2 a3"


def test_a_new_call_of_an_account_waits_at_its_end() -> None:
    """Its account keeps its turn; an account without calls gets its turn behind the others."""
    queue, flow = FairQueue(), Flow()
    pushed(queue, flow, "a1 b1 b2 c1")
    assert popped(queue, 1) == "a1"
    pushed(queue, flow, "c2 d1 a2 b3 c3")
    assert popped(queue) == "b1 c1 d1 a2 b2 c2 b3 c3"


def test_a_flow_that_comes_takes_its_turn_after_the_others() -> None:
    queue, one, two = FairQueue(), Flow(), Flow()
    pushed(queue, one, "a1 b1 c1")
    pushed(queue, two, "d1 e1")
    assert popped(queue, 1) == "a1"
    pushed(queue, Flow(), "f1")
    assert popped(queue) == "d1 b1 f1 e1 c1"


def test_single_calls_keep_their_turn_until_it_comes_without_a_call() -> None:
    """Then they take their turn after the other flows again."""
    queue, singles = FairQueue(), Flow(Kind.SINGLE)
    pushed(queue, singles, "a1")
    pushed(queue, Flow(), "m1 n1 o1")
    assert popped(queue, 1) == "a1"
    pushed(queue, singles, "b1")
    assert popped(queue, 2) == "m1 b1"
    assert popped(queue, 1) == "n1"
    pushed(queue, Flow(), "x1 y1")
    assert popped(queue, 1) == "o1"  # the turn of the single calls has passed
    pushed(queue, singles, "c1")
    assert popped(queue) == "x1 c1 y1"


def test_a_check_whose_calls_have_all_started_takes_a_new_turn() -> None:
    queue, check = FairQueue(), Flow()
    pushed(queue, check, "a1")
    pushed(queue, Flow(), "m1 n1")
    assert popped(queue, 1) == "a1"
    pushed(queue, Flow(), "x1")
    pushed(queue, check, "b1")
    assert popped(queue) == "m1 x1 b1 n1"


# --- calls that leave


def test_a_call_leaves_from_any_place() -> None:
    """The others keep their turns."""
    queue = FairQueue()
    a1, a2, a3, b1, _, c1, *_ = calls = pushed(queue, Flow(), "a1 a2 a3 b1 b2 c1 d1")
    for left in (a1, a3, b1, c1):
        assert left.queue is queue
        queue.remove(left)
    assert [each.queue for each in calls] == [None, queue, None, None, queue, None, queue]
    assert len(queue) == 3
    assert popped(queue) == "a2 b2 d1"
    assert a2.queue is None


def test_an_account_whose_calls_have_left_loses_its_turn() -> None:
    queue, flow = FairQueue(), Flow()
    for left in pushed(queue, flow, "a1 a2"):
        queue.remove(left)
    pushed(queue, flow, "b1 c1")
    assert popped(queue) == "b1 c1"
    pushed(queue, flow, "d1 a3")
    assert popped(queue) == "d1 a3"


def test_a_call_that_left_for_another_queue_is_there_alone() -> None:
    queue, other, flow = FairQueue(), FairQueue(), Flow()
    moved, _, lone = pushed(queue, flow, "a1 a2 b1")
    for each in (moved, lone):
        queue.remove(each)
        other.push(each)
    assert (len(queue), len(other)) == (1, 2)
    assert popped(queue) == "a2"
    assert popped(other) == "a1 b1"


@pytest.mark.parametrize("accounts", [1, 3, 500])
@pytest.mark.parametrize("kind", list(Kind))
def test_calls_that_left_are_released_once_they_are_64_more_than_the_others(
    accounts: int, kind: Kind
) -> None:
    """They may be many, and hold much memory. The others keep their turns."""
    queue, flow = FairQueue(), Flow(kind)

    def push(numbers: Iterable[int]) -> list[weakref.ref[Watched]]:
        made = [Watched(f"{number}", f"a{number % accounts}", flow) for number in numbers]
        for number, each in enumerate(made):
            each.was_sent = number % 3 == 0
            queue.push(each)
        return [weakref.ref(each) for each in made]

    def remove(count: int) -> None:
        for _ in range(count):
            waiting = [each for ref in refs if (each := ref()) is not None and each.queue is queue]
            queue.remove(waiting[len(waiting) // 2])

    def alive() -> int:
        return sum(ref() is not None for ref in refs)

    refs = push(range(100))
    remove(82)
    assert alive() == 100
    remove(1)
    assert alive() == 17
    refs += push(range(200, 301))
    remove(91)
    assert alive() == 118
    remove(1)
    assert alive() == 26
    order = [int(str(each.key)) for ref in refs if (each := ref()) is not None]
    assert sorted(map(int, popped(queue).split())) == order


def test_calls_of_an_account_are_in_turn_after_others_of_it_were_released() -> None:
    queue, flow = FairQueue(), Flow()
    calls = pushed(queue, flow, " ".join(f"a{number}" for number in range(200)))
    lone = pushed(queue, flow, "b0 c0 d0")
    for left in [lone[1], *calls[2:-1]]:
        queue.remove(left)
    pushed(queue, flow, "a200 c1 b1")
    assert popped(queue) == "a0 b0 d0 c1 a1 b1 a199 a200"


@pytest.mark.parametrize("kind", list(Kind))
def test_the_last_call_that_leaves_is_released(kind: Kind) -> None:
    queue = FairQueue()
    last = Watched("a1", "a", Flow(kind))
    queue.push(last)
    queue.remove(last)
    ref = weakref.ref(last)
    del last
    assert ref() is None


# --- counts


def test_calls_are_counted_by_kind_and_flow() -> None:
    """A check without a call is forgotten; the flows of other kinds last longer than a call."""
    queue, check, singles, refreshes = (
        FairQueue(),
        Flow(),
        Flow(Kind.SINGLE),
        Flow(Kind.BACKGROUND),
    )
    assert (len(queue), queue.has_foreground, queue.lengths()) == (0, False, {})
    (a1,) = pushed(queue, check, "a1")
    pushed(queue, singles, "b1 c1", was_sent=True)
    _, x1 = pushed(queue, refreshes, "w1 x1")
    assert (len(queue), queue.length, queue.has_foreground) == (5, 5, True)
    assert queue.lengths() == {check: 1, singles: 2, refreshes: 2}
    queue.remove(a1)
    queue.remove(x1)
    assert (len(queue), queue.has_foreground) == (3, True)
    assert queue.lengths() == {singles: 2, refreshes: 1}
    assert popped(queue, 2) == "b1 c1"
    assert (len(queue), queue.has_foreground) == (1, False)
    assert queue.lengths() == {singles: 0, refreshes: 1}
    assert popped(queue, 1) == "w1"
    assert (len(queue), queue.has_foreground) == (0, False)
    assert queue.lengths() == {refreshes: 0}


def test_waiting_calls_of_an_account_are_counted_over_the_flows() -> None:
    """Numbers of pools too, and background calls separately."""
    queue, pool = FairQueue(), Pool(["a", None, "b", "a"])
    queue.push_pool(pool)
    first, _, last, _ = pushed(queue, Flow(), "a1 a2 b1 c1")
    pushed(queue, Flow(Kind.SINGLE), "a3")
    pushed(queue, pool, "a4", was_sent=True)
    pushed(queue, Flow(Kind.BACKGROUND), "a5 a6 d1")
    assert [queue.of_account(name, background=False) for name in "abcde"] == [6, 2, 1, 0, 0]
    assert [queue.of_account(name, background=True) for name in "abcde"] == [2, 0, 0, 1, 0]
    queue.remove(first)
    queue.remove(last)
    pool.take_out(3)
    assert [queue.of_account(name, background=False) for name in "abcde"] == [4, 1, 1, 0, 0]
    assert (queue.of_account("p1", background=False), pool.of_account("p1")) == (0, 0)


# --- draws


def test_a_draw_takes_a_call_without_a_request_from_any_place() -> None:
    """While there is one; calls for which a request was sent get their turns after them."""
    queue, flow = FairQueue(), Flow()
    pushed(queue, flow, "x1 y1", was_sent=True)
    pushed(queue, flow, "a1 a2 b1 c1")
    draws = Draws((2, 0, 1, 0))
    drawn = [str(queue.pop(draws).key) for _ in range(4)]
    assert drawn == ["b1", "a1", "a2", "c1"]
    assert draws.counts == [4, 3, 2, 1]
    assert [queue.pop(draws).key for _ in range(2)] == ["x1", "y1"]
    assert draws.counts == [4, 3, 2, 1]


def test_each_call_is_drawn_once() -> None:
    """Whatever the places, and with calls that leave in between."""
    queue, flow, draw = FairQueue(), Flow(), random.Random(1)
    calls = pushed(queue, flow, " ".join(f"{letter}{n}" for letter in "abc" for n in range(20)))
    drawn = [queue.pop(draw) for _ in range(30)]
    left = next(each for each in calls if each.queue is queue)
    queue.remove(left)
    drawn += [queue.pop(draw) for _ in range(len(queue))]
    assert sorted(str(each.key) for each in [*drawn, left]) == sorted(
        str(each.key) for each in calls
    )
    assert not len(queue)


def test_flows_take_turns_in_draws() -> None:
    """A draw is among the calls of the flow whose turn it is; background calls come last."""
    queue = FairQueue()
    pushed(queue, Flow(Kind.BACKGROUND), "w1 x1")
    pushed(queue, Flow(), "a1 b1 c1")
    pushed(queue, Flow(Kind.SINGLE), "s1 t1")
    draws = Draws((2, 0, 0, 1, 0))
    assert [queue.pop(draws).key for _ in range(7)] == ["c1", "s1", "a1", "t1", "b1", "x1", "w1"]
    assert draws.counts == [3, 2, 1, 2, 1]


def test_single_calls_are_drawn_on_demand() -> None:
    queue, singles = FairQueue(), Flow(Kind.SINGLE)
    pushed(queue, singles, "a1 b1 c1 d1")
    draws = Draws((2, 1))
    assert queue.pop(draws).key == "a1"
    # the last call has taken the place of the first
    assert queue.pop(draws, draw_singles=True).key == "c1"
    assert queue.pop(draws, draw_singles=True).key == "b1"
    assert queue.pop(draw_singles=True).key == "d1"
    assert draws.counts == [3, 2]


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.MANY])
def test_while_single_calls_are_drawn_one_of_four_goes_by_turn(kind: Kind) -> None:
    """Otherwise calls for which a request was sent would wait as long as new ones come.

    A draw is not counted while no such call waits, or while single calls go by turn.
    """
    queue, flow, draws = FairQueue(), Flow(kind), Draws((0,) * 20)

    def names(count: int, *, draw_singles: bool = True) -> str:
        popped = [queue.pop(draws, draw_singles=draw_singles) for _ in range(count)]
        return "".join(str(each.key)[0] for each in popped)

    pushed(queue, flow, "f1 f2 f3 f4 f5")
    assert (names(5), draws.counts) == ("fffff", [5, 4, 3, 2, 1])
    pushed(queue, flow, "a1 b1 c1", was_sent=True)
    pushed(queue, flow, " ".join(f"f{number}" for number in range(10)))
    assert names(9) == "fffafffbf"
    if kind is Kind.MANY:
        assert names(1, draw_singles=False) == "f"
    assert names(3) == "ffc"


# --- pools


def test_a_pool_takes_turns_with_other_flows() -> None:
    queue, pool = FairQueue(), Pool([None] * 3)
    pushed(queue, Flow(), "a1 b1")
    queue.push_pool(pool)
    assert popped(queue) == "a1 p0 b1 p1 p2"


def test_numbers_take_turns_with_calls_of_their_flow() -> None:
    """In the order in which they came; an account's next number comes behind all that wait."""
    queue, pool = FairQueue(), Pool(["a", None, "a", None, "a"])
    pushed(queue, pool, "x1 y1 y2")
    queue.push_pool(pool)
    assert popped(queue, 1) == "x1"
    pushed(queue, pool, "z1 z2")
    assert popped(queue, 2) == "y1 p0"
    pushed(queue, pool, "w1")
    assert popped(queue) == "p1 p3 z1 y2 p2 w1 z2 p4"


def test_an_account_of_a_pool_and_one_of_its_calls_take_turns() -> None:
    queue, pool = FairQueue(), Pool(["a", "a", "a"])
    pushed(queue, pool, "x1 x2 x3")
    queue.push_pool(pool)
    assert popped(queue) == "x1 p0 x2 p1 x3 p2"


def test_numbers_that_were_taken_out_let_no_other_pass_the_calls_before_them() -> None:
    queue, pool = FairQueue(), Pool([None] * 3)
    pushed(queue, pool, "x1 y1")
    queue.push_pool(pool)
    pool.take_out(0)
    pool.take_out(1)
    assert popped(queue) == "x1 y1 p2"


def test_turns_are_numbered_in_the_order_in_which_they_come() -> None:
    """From 1 on; a pool that moves takes the numbers of the other queue."""
    queue, other, pool = FairQueue(), FairQueue(), Pool([None, "a"])
    pushed(queue, pool, "x1 y1 z1 x2")
    queue.push_pool(pool)
    assert pool.next_ticket() == 4
    other.push_pool(pool)
    assert pool.next_ticket() == 1


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("account", ["a", None])
def test_a_call_that_comes_after_a_pool_waits_behind_its_numbers(
    size: int, account: str | None
) -> None:
    """Behind the first number of a declared account, before its others."""
    queue, pool = FairQueue(), Pool([account] * size)
    queue.push_pool(pool)
    pushed(queue, pool, "x1")
    numbers = [f"p{number}" for number in range(size)]
    numbers.insert(1 if account else size, "x1")
    assert popped(queue) == " ".join(numbers)


def test_a_pool_moves_to_another_queue_and_its_numbers_keep_their_turns() -> None:
    """They wait behind the calls that are there, and before those that come."""
    queue, other, pool = FairQueue(), FairQueue(), Pool(["a", "a", None, "a", "b"])
    queue.push_pool(pool)
    assert (popped(queue, 1), pool.queue) == ("p0", queue)
    pushed(other, pool, "x1 y1 x2")
    pushed(queue, pool, "z1")
    other.push_pool(pool)
    assert (len(queue), len(other), pool.queue, pool.waiting) == (1, 7, other, 4)
    assert (queue.lengths(), other.lengths()) == ({pool: 1}, {pool: 7})
    pushed(other, pool, "w1")
    assert popped(other) == "x1 y1 p2 p4 p1 w1 x2 p3"
    assert popped(queue) == "z1"


def test_a_pool_moves_from_behind_many_calls_to_a_queue_without_any() -> None:
    queue, other, pool = FairQueue(), FairQueue(), Pool(["a", None, "b", None])
    pushed(queue, pool, "v1 w1 x1 y1 z1")
    queue.push_pool(pool)
    other.push_pool(pool)
    pushed(other, pool, "x2")
    assert popped(other) == "p0 p1 p2 p3 x2"


def test_a_pool_moves_back_and_forth() -> None:
    queue, other, pool = FairQueue(), FairQueue(), Pool(["a", None, "b", "a", None, "b", "a"])
    order = []
    for each in (queue, other, queue, other, queue, other, queue):
        each.push_pool(pool)
        order.append(popped(each, 1))
        assert pool.queue is each
    assert order == ["p0", "p1", "p2", "p4", "p3", "p5", "p6"]


def test_a_pool_that_comes_again_waits_at_the_end() -> None:
    queue, pool = FairQueue(), Pool([None, None])
    queue.push_pool(pool)
    pushed(queue, pool, "x1")
    queue.push_pool(pool)
    assert len(queue) == 3
    assert popped(queue) == "x1 p0 p1"


def test_a_pool_that_is_removed_leaves_its_calls_and_keeps_its_numbers() -> None:
    queue, pool = FairQueue(), Pool(["a", None])
    queue.push_pool(pool)
    pushed(queue, pool, "x1")
    queue.remove_pool(pool)
    assert (pool.queue, pool.waiting, len(queue)) == (None, 2, 1)
    assert queue.of_account("a", background=False) == 0
    pool.take_out(0)
    assert len(queue) == 1
    assert popped(queue) == "x1"
    queue.push_pool(pool)
    assert popped(queue) == "p1"


def test_a_pool_that_is_removed_has_no_turn() -> None:
    """A pool that waits nowhere is removed without effect."""
    queue, pool, other = FairQueue(), Pool([None]), Flow()
    queue.remove_pool(pool)
    queue.push_pool(pool)
    pushed(queue, other, "x1 y1")
    queue.remove_pool(pool)
    queue.remove_pool(pool)
    assert (len(queue), queue.lengths()) == (2, {other: 2})
    assert popped(queue) == "x1 y1"


def test_a_pool_without_waiting_numbers_enters_no_queue() -> None:
    queue, pool = FairQueue(), Pool(["a"])
    queue.push_pool(pool)
    assert popped(queue) == "p0"
    queue.push_pool(pool)
    assert (pool.queue, len(queue), queue.lengths()) == (None, 0, {})


def test_numbers_are_drawn_beside_the_calls_of_their_flow() -> None:
    """Calls for which no request was sent have the first places."""
    queue, pool = FairQueue(), Pool([None, "a", None, "a"])
    queue.push_pool(pool)
    pushed(queue, pool, "x1 y1")
    pushed(queue, pool, "z1", was_sent=True)
    draws = Draws((2, 1, 3, 0, 0, 0))
    drawn: list[Hashable] = [queue.pop(draws).key for _ in range(6)]
    assert drawn == ["p0", "y1", "p2", "x1", "p3", "p1"]
    assert draws.counts == [6, 5, 4, 3, 2, 1]
    assert queue.pop(draws).key == "z1"
    assert (len(queue), pool.waiting, queue.lengths()) == (0, 0, {})


def test_a_drawn_number_loses_its_turn_and_its_account_does_not() -> None:
    queue, pool = FairQueue(), Pool(["a", "a", None, "b"])
    queue.push_pool(pool)
    assert queue.pop(Draws((0,))).key == "p0"
    assert popped(queue) == "p1 p2 p3"
