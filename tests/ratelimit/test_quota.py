"""Estimates from the tokens that a bucket can still give."""

from __future__ import annotations

import pytest

from crustcredits import ConfigurationError
from crustcredits._ratelimit.quota import Quota


def test_a_quota_estimates_when_the_last_of_several_calls_starts() -> None:
    """After the single calls that wait, and in turns with other flows.

    No faster than tokens, pace, slots and cooldown allow.
    """
    quota = Quota(limit=3, free=1, returns=(0.0, 10.0, 20.0), period=60.0)
    assert [quota.seconds_for(count) for count in (0, 1, 2, 3, 4, 5, 7)] == [
        0,
        0,
        10,
        20,
        60,
        70,
        120,
    ]
    assert Quota(limit=300, free=300, pace=100.0).seconds_for(205) == pytest.approx(2.0)
    assert Quota(limit=300, free=300, pace=1.0, singles=50).seconds_for(1) == pytest.approx(50)
    assert Quota(limit=300, free=300, pace=100.0, lengths=(5000,)).seconds_for(10) == pytest.approx(
        0.15
    )
    assert Quota(limit=300, free=300, slots=10, answer_seconds=1.0).seconds_for(
        110
    ) == pytest.approx(4.0)
    assert Quota(limit=300, free=300, cooldown=20.0).seconds_for(1) == 20
    assert Quota(limit=300, free=0, others=200).seconds_for(10) == pytest.approx(60)
    assert Quota(limit=300, free=0, others=290, returns=(0.0,) * 300).seconds_for(
        10
    ) == pytest.approx(60)
    assert Quota(limit=3, free=3).start_of(0) == 0
    with pytest.raises(ConfigurationError, match="requests"):
        quota.seconds_for(-1)
