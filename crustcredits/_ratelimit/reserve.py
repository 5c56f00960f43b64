"""How many tokens of a bucket the calls of one kind may take, and when.

Single calls may take all. Checks and streams leave the reserve. Refreshes leave at least a tenth,
and are spaced. Arithmetic only.
"""

from __future__ import annotations

import math

from crustcredits._ratelimit.flow import Kind
from crustcredits._ratelimit.token_bucket import Bucket

# The fraction of the tokens that refreshes leave, so that the next foreground call need not wait.
_REFRESHES_KEEP = 0.1


def kept_for_singles(bucket: Bucket, reserve: float) -> int:
    """Tokens that only single calls may take, with this fraction of the bucket as the reserve."""
    return min(bucket.limit - 1, math.ceil(reserve * bucket.limit))


def kept_from(kind: Kind, bucket: Bucket, reserve: float) -> int:
    """Tokens that calls of this kind leave."""
    if kind is Kind.SINGLE:
        return 0
    kept = kept_for_singles(bucket, reserve) if reserve else 0
    if kind is Kind.BACKGROUND:
        kept = max(kept, min(bucket.limit - 1, math.ceil(_REFRESHES_KEEP * bucket.limit)))
    return kept


def room(kind: Kind, bucket: Bucket, kept: int, now: float) -> int:
    """Tokens that calls of this kind may take now, all but `kept`; one at a time for refreshes."""
    free = bucket.room(now, kept)
    if kind is not Kind.BACKGROUND:
        return free
    return min(free, 1) if now >= bucket.next_refresh else 0


def room_at(kind: Kind, bucket: Bucket, kept: int, now: float) -> float | None:
    """When calls of this kind may take a token; None if another event has to happen first."""
    if kind is not Kind.BACKGROUND:
        return bucket.room_at(now, kept)
    # A token is free: either the spacing delays the refresh, or another one was let out already.
    if bucket.room(now, kept) > 0:
        return bucket.next_refresh if bucket.next_refresh > now else None
    moment = bucket.room_at(now, kept)
    if moment is None:
        return bucket.next_refresh if bucket.next_refresh > now else None
    return max(moment, bucket.next_refresh)
