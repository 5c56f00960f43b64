"""The limit that the server states, and where it is followed."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.advertised_limit import AdvertisedLimit


def test_a_lower_limit_is_followed_where_its_count_agrees() -> None:
    """An answer with a count below the number of ended requests is about another limit.

    A higher limit is ignored unless it is configured.
    """
    limit = AdvertisedLimit(300, follows_higher=False)
    assert limit.hear("a", 60, used=5, seen=5) == 60
    assert limit.hear("a", 60, used=4, seen=5) == 300
    assert limit.hear("a", 1200, used=9, seen=5) == 300
    assert AdvertisedLimit(300, follows_higher=True).hear("a", 1200, used=9, seen=5) == 1200


@pytest.mark.parametrize("absurd", [0, -5, 10**9])
def test_an_absurd_limit_is_ignored(absurd: int) -> None:
    """Below one, or beyond any plan."""
    assert AdvertisedLimit(300, follows_higher=False).hear("a", absurd, used=1, seen=0) == 300
    assert AdvertisedLimit(300, follows_higher=True).hear("a", absurd, used=1, seen=0) in {
        300,
        1_000_000,
    }


def test_a_limit_for_all_accounts_needs_the_last_three_accounts_to_agree() -> None:
    """Of their limits the nearest to the configured one is followed, in both directions."""
    limit = AdvertisedLimit(300, follows_higher=True, voices=3)
    assert [limit.hear("a", 1, used=1, seen=0) for _ in range(5)] == [300] * 5
    assert limit.hear("b", 20, used=1, seen=0) == 300
    assert limit.hear("c", 60, used=1, seen=0) == 60
    assert limit.hear("d", 40, used=1, seen=0) == 60
    assert limit.hear("e", 30, used=0, seen=5) == 300
    assert [limit.hear(name, 900, used=1, seen=0) for name in "xyz"] == [300, 300, 900]
