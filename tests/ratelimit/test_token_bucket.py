"""The tokens of one scope: when each returns."""

from __future__ import annotations

import pytest

from crustcredits._ratelimit.token_bucket import TokenBucket, refresh_gap


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
