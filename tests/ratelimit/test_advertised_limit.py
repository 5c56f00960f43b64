"""The limit that the server states, and where it is followed."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.advertised_limit import AdvertisedLimit


def test_a_lower_limit_is_followed_where_its_count_agrees() -> None:
    """An answer with a count below the number of ended requests is about another limit.

    A higher limit is ignored unless it is configured.
    """
    limit = AdvertisedLimit(300, follows_higher=False)
    assert limit.note("a", 60, used=5, seen=5) == 60
    assert limit.note("a", 60, used=4, seen=5) == 300
    assert limit.note("a", 1200, used=9, seen=5) == 300
    assert AdvertisedLimit(300, follows_higher=True).note("a", 1200, used=9, seen=5) == 1200


@pytest.mark.parametrize("absurd", [0, -5, 10**9])
def test_an_absurd_limit_is_ignored(absurd: int) -> None:
    """Below one, or beyond any plan."""
    assert AdvertisedLimit(300, follows_higher=False).note("a", absurd, used=1, seen=0) == 300
    assert AdvertisedLimit(300, follows_higher=True).note("a", absurd, used=1, seen=0) in {
        300,
        1_000_000,
    }


def test_a_limit_for_all_accounts_needs_the_last_three_accounts_to_agree() -> None:
    """Of their limits the nearest to the configured one is followed, in both directions."""
    limit = AdvertisedLimit(300, follows_higher=True, agreeing=3)
    assert [limit.note("a", 1, used=1, seen=0) for _ in range(5)] == [300] * 5
    assert limit.note("b", 20, used=1, seen=0) == 300
    assert limit.note("c", 60, used=1, seen=0) == 60
    assert limit.note("d", 40, used=1, seen=0) == 60
    assert limit.note("e", 30, used=0, seen=5) == 300
    assert [limit.note(name, 900, used=1, seen=0) for name in "xyz"] == [300, 300, 900]


@pytest.mark.parametrize(
    ("limit", "used", "seen", "followed"),
    [
        (1, 1, 1, 1),
        (299, 1, 0, 299),
        (300, 1, 0, 300),
        (301, 1, 0, 301),
        (10**6, 1, 0, 10**6),
        (10**6 + 1, 1, 0, 10**6),
        (0, 1, 0, 300),
        (20, 0, 1, 300),
    ],
)
def test_any_plausible_limit_with_an_agreeing_count_can_be_followed(
    limit: int, used: int, seen: int, followed: int
) -> None:
    """From one request to a million, as the only answer."""
    assert AdvertisedLimit(300, follows_higher=True).note("a", limit, used, seen) == followed


def test_two_accounts_can_be_enough_for_all() -> None:
    """Answers of one account alone change nothing, and its latest counts."""
    limit = AdvertisedLimit(300, follows_higher=False, agreeing=2)
    assert limit.note("a", 20, used=1, seen=0) == 300
    assert limit.note("a", 30, used=1, seen=0) == 300
    assert limit.note("b", 10, used=1, seen=0) == 30


def test_only_the_latest_answers_of_accounts_count() -> None:
    """An account that answers again becomes the latest one."""
    limit = AdvertisedLimit(300, follows_higher=False, agreeing=2)
    for account, stated in (("a", 20), ("b", 10), ("a", 20)):
        limit.note(account, stated, used=1, seen=0)
    assert limit.note("c", 5, used=1, seen=0) == 20


def test_the_configured_limit_is_news_only_after_another_one() -> None:
    """Until all latest accounts state the configured one again."""
    limit = AdvertisedLimit(300, follows_higher=False, agreeing=3)
    assert not limit.is_news(300)
    assert limit.is_news(299)
    limit.note("a", 20, used=1, seen=0)
    assert limit.is_news(300)
    limit.note("a", 300, used=1, seen=0)
    assert not limit.is_news(300)
    limit.note("b", 300, used=1, seen=0)
    assert not limit.is_news(300)
