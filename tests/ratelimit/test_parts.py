"""The parts of the admission queue that are values: slots, the advertised limit, quotas."""

from __future__ import annotations

import pytest

from crustcredits import ConfigurationError
from crustcredits._ratelimit.advertised_limit import AdvertisedLimit
from crustcredits._ratelimit.connection_slots import HANGING_SHARE, ConnectionSlots
from crustcredits._ratelimit.quota import Quota
from crustcredits._ratelimit.token_bucket import TokenBucket, refresh_gap

# --- slots


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


# --- the limit that the server states


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


# --- quotas


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


def test_a_bucket_tells_when_its_tokens_return() -> None:
    """Free ones now, those on the wire after a period, and of a lowered limit the last ones."""
    bucket = TokenBucket(3)
    bucket.take(0.0)
    bucket.return_at(60.0)
    bucket.take(1.0)
    assert bucket.returns(2.0, 60.0) == [2.0, 60.0, 62.0]
    bucket.limit = 1
    assert (bucket.available(2.0), bucket.returns(2.0, 60.0)) == (0, [62.0])


def test_refreshes_are_spaced_by_the_tokens_that_return() -> None:
    """Evenly over a period if none are out.

    After a burst more slowly; of many tokens a sample is used.
    """
    bucket = TokenBucket(300)
    assert refresh_gap(bucket, 0.0, 60.0, 30) == pytest.approx(60 / 270)
    for _ in range(270):
        bucket.take(0.0)
        bucket.return_at(60.0)
    assert refresh_gap(bucket, 0.0, 60.0, 30) == pytest.approx(60.0)
