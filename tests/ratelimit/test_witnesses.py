"""The requests that witness for a separate count, against a naive version."""

from __future__ import annotations

from unittest.mock import patch

import attrs
from hypothesis import example, given
from hypothesis import strategies as st

from crustcredits._ratelimit.witnesses import LAG, Witnesses

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


@given(answers=ANSWERS, chunk=st.integers(1, 4))
@example(answers=[(0, 0)] * 3 + [(75, 2)] * 3, chunk=1)
def test_forgotten_witnesses_change_no_result(answers: list[tuple[int, int]], chunk: int) -> None:
    """And no more stand in a count than must be there."""
    period, end = 60.0, 0.0
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
