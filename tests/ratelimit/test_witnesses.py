"""The requests that witness for a separate count, against a naive version."""

from __future__ import annotations

from unittest.mock import patch

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crustcredits._ratelimit.witnesses import LAG, WITNESSES, Witnesses

LATE = 10.0


@attrs.frozen
class Naive:
    """All requests ever answered, by start and end."""

    requests: list[tuple[float, float]] = attrs.field(factory=list)

    def standing(self, started: float, now: float, period: float) -> int:
        """The rule as documented: settled requests, less all that may have aged out."""
        settled = sum(ended <= started - LAG for _, ended in self.requests)
        return settled - sum(start < now - period for start, _ in self.requests)

    def counted(self, started: float, now: float, period: float) -> int:
        """The number that must be in the server's count if all count together."""
        return sum(
            ended <= started - LAG and start >= now - period for start, ended in self.requests
        )


ANSWERS = st.lists(
    st.tuples(st.sampled_from([0, 0, 0, 1, 2, 5, 20, 80]), st.integers(0, 10)), max_size=60
)


@given(answers=ANSWERS, chunk=st.integers(1, 4), period=st.sampled_from([60.0, 5.0]))
@example(answers=[(0, 0)] * 3 + [(75, 2)] * 3, chunk=1, period=60.0)
@example(answers=[(1, 1), (0, 1), (10, 10), (0, 10)], chunk=1, period=5.0)
def test_forgotten_witnesses_change_no_result(
    answers: list[tuple[int, int]], chunk: int, period: float
) -> None:
    """And no more stand in a count than must be there.

    Also where a request may take longer than a period.
    """
    end = 0.0
    witnesses, naive = Witnesses(period, LATE), Naive()
    with patch("crustcredits._ratelimit.witnesses._CHUNK", chunk):
        for wait, took in answers:
            end += wait
            start = end - took
            standing = witnesses.standing(start, end)
            assert (
                standing == naive.standing(start, end, period) <= naive.counted(start, end, period)
            )
            witnesses.add(start, end)
            naive.requests.append((start, end))


def test_only_witnesses_of_the_last_periods_are_stored() -> None:
    """In a long run, and after a burst too."""
    witnesses = Witnesses(60.0, LATE)
    for _ in range(10_000):
        witnesses.add(0.0, 0.01)
    kept = []
    for second in range(100, 2000):
        for tenth in range(10):
            witnesses.add(second + tenth / 10, second + tenth / 10 + 0.05)
        kept.append(len(witnesses._ends))
    assert max(kept[100:]) <= 10 * (60 + 10 + 2) + 512 + 1
    assert len(witnesses._starts) == len(witnesses._ends)


def witnesses(requests: list[tuple[float, float]]) -> Witnesses:
    """Answered requests, by start and end."""
    found = Witnesses(60.0, LATE)
    for started, ended in requests:
        found.add(started, ended)
    return found


@pytest.mark.parametrize(
    ("started", "now", "standing"),
    [
        (3.4, 4.0, 0),
        (3.5, 4.0, 1),
        (4.5, 5.0, 2),
        (60.0, 60.0, 2),
        (60.0, 60.1, 1),
        (60.0, 61.1, 0),
    ],
)
def test_a_request_stands_from_one_and_a_half_seconds_after_its_end_for_a_period(
    started: float, now: float, standing: int
) -> None:
    """From its start, because it may have arrived then."""
    assert witnesses([(0.0, 2.0), (1.0, 3.0)]).standing(started, now) == standing


def test_requests_may_end_in_another_order_than_they_began() -> None:
    """The first to age out is the first that began."""
    slow = witnesses([(5.0, 6.0), (0.0, 7.0), (2.0, 8.0)])
    assert [slow.standing(50.0, now) for now in (60.0, 60.1, 62.1, 65.1)] == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("count", "now", "stands"),
    [(9, 0.0, None), (10, 0.0, 11.5), (12, 61.5, 13.5), (12, 62.5, None)],
)
def test_ten_requests_settle_after_the_end_of_the_tenth_that_has_not_aged_out(
    count: int, now: float, stands: float | None
) -> None:
    """At that moment at the earliest, however it is rounded, they can witness."""
    found = witnesses([(float(number), number + 1.0) for number in range(count)])
    assert found.stand_at(now) == (None if stands is None else pytest.approx(stands))
    if stands is not None:
        when = found.stand_at(now)
        assert when is not None
        assert found.standing(when, max(when, now)) >= WITNESSES


@pytest.mark.parametrize(
    ("used", "own", "proven"),
    [(1, 1, True), (2, 2, True), (1, 2, True), (2, 1, False), (3, 3, False)],
)
def test_a_proof_takes_ten_requests_beside_the_ones_of_its_account(
    used: int, own: int, *, proven: bool
) -> None:
    """And a count of no more than these; eleven requests stand here."""
    assert witnesses([(0.0, 1.0)] * 11).proves(used, own, 5.0, 6.0) is proven


def test_requests_are_forgotten_only_when_no_later_count_can_have_them() -> None:
    """Another answer may come at the very moment at which they reach that age."""
    aging = witnesses([(0.0, 1.0)] * 600)
    aging.add(59.0, 60.0)
    assert aging.standing(59.0, 60.0) == 600
    aging.add(59.0, 60.1)
    assert aging.standing(59.0, 60.1) == 0
