"""`Claim`: what one attempt holds, a token of each bucket that may count it; and what its answer teaches them.

It neither sends nor decides how long to wait, and knows of HTTP only the status.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable, Sequence
from contextlib import suppress

from crustcredits._debt import Told
from crustcredits._errors import CrustCreditsError, GatewayError, RateLimitError
from crustcredits._learned import LearnedLimits
from crustcredits._limits import TokenBucket
from crustcredits._models import Balance, RateLimitStatus
from crustcredits._proof import Witnesses
from crustcredits._tokens import FRESH
from crustcredits._turn import Turn

_log = logging.getLogger("crustcredits")


class Claim:
    """The tokens of one attempt: put back before it has begun, or after it in one of three ways.

    Args:
        account: Whose request it is: what tells accounts apart.
        buckets: Those that may count it, in the order in which the tokens are taken; of two, the first counts the requests of
            the account alone and the second those of all.
        limits: What the API has said of the buckets' limits.
        witnesses: What can prove, of two, that the second does not count it.
    """

    __slots__ = ("_account", "_buckets", "_limits", "_marks", "_over", "_started", "_tokens", "_witnesses")

    def __init__(
        self, account: Hashable, buckets: Sequence[TokenBucket], limits: LearnedLimits, witnesses: Witnesses | None = None
    ) -> None:
        self._account = account
        self._buckets = buckets
        self._limits = limits
        self._witnesses = witnesses
        self._tokens: dict[int, int] = {}  # by the place of their bucket
        self._marks: Sequence[int] = ()
        self._started = 0.0
        self._over = False

    def try_acquire(self) -> bool:
        """Take the tokens if all of them are free."""
        for place, bucket in enumerate(self._buckets):
            if not bucket.try_acquire():
                self.put_back()
                return False
            self._tokens[place] = 0
        return True

    async def acquire(self, turn: Turn, *, again: bool = False) -> None:
        """Take the tokens that it does not have, waiting for each in its turn."""
        for place, bucket in enumerate(self._buckets):
            if place not in self._tokens:
                self._tokens[place] = await bucket.acquire(turn, again=again)
        first = self._buckets[0]
        if len(self._buckets) > 1 and first.is_stale():
            # It has become too old while the second was waited for, which must not become so too.
            first.unused(self._tokens.pop(0))
            with suppress(TimeoutError):
                async with asyncio.timeout(FRESH):
                    self._tokens[0] = await first.acquire(turn, again=True)

    def may_start(self) -> bool:
        """Whether the attempt may begin. A token that may not be used any more is put back, and those taken after it."""
        now = _now()
        for place, bucket in enumerate(self._buckets):
            if place not in self._tokens or not bucket.may_start(self._tokens[place], now):
                self.put_back(place)
                return False
        return True

    def start(self) -> None:
        """The attempt begins: from now on the server may count it."""
        self._started = _now()
        self._marks = [bucket.start(self._started) for bucket in self._buckets]

    def put_back(self, keep: int = 0) -> None:
        """There was no attempt: put back the tokens, but for the first `keep`."""
        for place in [place for place in self._tokens if place >= keep]:
            self._buckets[place].unused(self._tokens.pop(place))

    def unsent(self) -> None:
        """The attempt certainly never left."""
        self._over = True
        for place, bucket in enumerate(self._buckets):
            bucket.unsent(self._tokens[place])

    def abandoned(self) -> None:
        """The attempt was given up on, and may still arrive. Nothing, if there was an answer."""
        if self._over:
            return
        self._over = True
        now = _now()
        for place, bucket in enumerate(self._buckets):
            bucket.abandoned(self._tokens[place], now)

    def answered(self, status: int | None, result: Balance | CrustCreditsError) -> None:
        """There was an answer, of this HTTP status if all of it came."""
        self._over = True
        now = _now()
        said = result.rate_limit
        apart = said is not None and said.limit is not None and self._listen(result, said, said.limit, now)
        if status is not None:
            self._judge(status, result)
        for place, bucket in enumerate(self._buckets):
            if place and apart:
                bucket.unsent(self._tokens[place])
            else:
                bucket.ended(self._tokens[place], now)

    # --- inside

    def _listen(self, result: Balance | CrustCreditsError, said: RateLimitStatus, limit: int, now: float) -> bool:
        """Tell the buckets what the server counts. Returns whether it is proven that it counts this account apart."""
        used = limit - said.remaining if said.remaining is not None and said.remaining <= limit else None
        apart = used is not None and self._is_apart(result, limit, used, now)
        told: Told | None = None
        for place, bucket in enumerate(self._buckets):
            speaks_of_it = self._limits.hear(bucket, self._account, limit, now)
            if place and apart:
                bucket.disproved(now)
            elif speaks_of_it and used is not None:
                if told is None:
                    # What can all be this client's own is nobody else's, whether or not it is all this account's.
                    others = used > self._buckets[-1].own(self._marks[-1])
                    told = Told(self._account, self._started, now, used if others else 0, said.reset)
                bucket.heard(told, self._marks[place])
        return apart

    def _is_apart(self, result: Balance | CrustCreditsError, limit: int, used: int, now: float) -> bool:
        witnesses = self._witnesses
        if witnesses is None or limit != self._limits.configured or not isinstance(result, Balance):
            return False
        apart = witnesses.prove(used, self._buckets[0].own(self._marks[0]), self._started, now)
        witnesses.add(self._started, now)
        return apart

    def _judge(self, status: int, result: Balance | CrustCreditsError) -> None:
        if isinstance(result, RateLimitError):
            pauses = [bucket.refused(self._account, result.retry_after) for bucket in self._buckets]
            if any(pauses):
                _log.info(
                    "the rate limit is spent by others too: all calls wait %.1f s, then one at a time until one is served",
                    result.retry_after,
                )
        elif status < 500 and not isinstance(result, GatewayError):  # a gateway's answer says nothing of the limit
            for bucket in self._buckets:
                bucket.succeeded()


def _now() -> float:
    return asyncio.get_running_loop().time()
