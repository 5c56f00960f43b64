"""`PoolFlow`: which number has its turn."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Flow, Kind
from tests.ratelimit.turns import Pool, popped, pushed


def test_numbers_of_a_pool_wait_until_their_turn() -> None:
    pool = Pool(["a", None, "a", "b", "a"])
    assert (pool.kind, pool.queue, pool.waiting) == (Kind.MANY, None, 5)
    assert [pool.waits(number) for number in range(5)] == [True] * 5
    assert [pool.of_account(name) for name in "abc"] == [3, 1, 0]
    pool.take_out(0)
    pool.take_out(1)
    assert (pool.waiting, [pool.waits(number) for number in range(5)]) == (
        3,
        [False, False, True, True, True],
    )
    assert [pool.of_account(name) for name in "abc"] == [2, 1, 0]


def test_each_waiting_number_is_at_one_place_to_draw_from() -> None:
    pool = Pool([None] * 6)
    numbers = set(range(6))
    for left in (2, 5, 0, 4, 3):
        assert {pool.draw(place) for place in range(pool.waiting)} == numbers
        pool.take_out(left)
        numbers.remove(left)
    assert (pool.draw(0), pool.waiting) == (1, 1)


@pytest.mark.parametrize(
    ("accounts", "order"),
    [
        ([None] * 3, "p0 p1 p2"),
        (["a"] * 3, "p0 p1 p2"),
        (["a", "a", None, None], "p0 p2 p3 p1"),
        ([None, "a", "a", None, "a"], "p0 p1 p3 p2 p4"),
        (["a", "a", "b", "b", "b", None], "p0 p2 p5 p1 p3 p4"),
        (["a", "b", "c", "c", "b", "a"], "p0 p1 p2 p5 p4 p3"),
    ],
)
def test_accounts_of_a_pool_take_turns(accounts: list[str | None], order: str) -> None:
    """A number without a declared account is an account of its own."""
    queue, pool = FairQueue(), Pool(accounts)
    queue.push_pool(pool)
    assert (len(queue), queue.lengths()) == (len(accounts), {pool: len(accounts)})
    assert popped(queue) == order
    assert (len(queue), pool.waiting, queue.lengths()) == (0, 0, {})


@pytest.mark.parametrize(
    ("accounts", "left", "order"),
    [
        ([None] * 4, (0, 1), "p2 p3"),
        ([None] * 4, (1, 3), "p0 p2"),
        (["a"] * 4, (0, 1), "p2 p3"),
        (["a"] * 4, (1, 3), "p0 p2"),
        (["a", None, "a", None], (0, 1), "p2 p3"),
        (["a", None, "a", "b", "b"], (0, 2, 1), "p3 p4"),
        (["a", None, "b", "a", None], (1, 2, 4), "p0 p3"),
        ([None, "a", None], (0, 2), "p1"),
        ([None, "a", "a"], (1, 2), "p0"),
    ],
)
def test_numbers_that_were_taken_out_are_passed_over(
    accounts: list[str | None], left: tuple[int, ...], order: str
) -> None:
    """The queue in which they waited counts them no more."""
    queue, pool = FairQueue(), Pool(accounts)
    queue.push_pool(pool)
    for number in left:
        pool.take_out(number)
    assert len(queue) == pool.waiting == len(accounts) - len(left)
    assert popped(queue) == order


def test_at_most_the_waiting_numbers_before_a_number_have_their_turn_before_it() -> None:
    """The number of a declared account does not tell its turn."""
    pool, queue = Pool([None, None, None, "a", None, None]), FairQueue()
    queue.push_pool(pool)
    assert [pool.most_before(number) for number in range(6)] == [0, 1, 2, 0, 4, 5]
    pool.take_out(0)
    assert [pool.most_before(number) for number in (1, 2, 5)] == [0, 1, 4]
    pool.take_out(2)
    pool.take_out(3)
    assert [pool.most_before(number) for number in (1, 4, 5)] == [0, 2, 2]


def test_a_pool_whose_numbers_were_all_taken_out_is_passed_over() -> None:
    queue, pool = FairQueue(), Pool(["a", None])
    queue.push_pool(pool)
    pushed(queue, Flow(), "x1")
    for number in range(2):
        pool.take_out(number)
    assert len(queue) == 1
    assert popped(queue) == "x1"
    assert len(queue) == 0
