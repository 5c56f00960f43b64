"""`StreamTurns`: the keys of a stream with a timeout that are likely to have their turn in time."""

from __future__ import annotations

import asyncio
from typing import Any

from crustcredits._cache.lookup import Lookup
from crustcredits._cache.policy import CachePolicy
from crustcredits._errors import RateLimitWaitError
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Outcome
from crustcredits._ratelimit.flow import Flow

# The fraction of a stream's timeout in which a key is to have its turn; the rest is for its answer.
_IN_TIME = 0.5


class StreamTurns:
    """Says which keys of a stream are likely to have their turn within half of its timeout.

    Args:
        lookup: Knows the cached answers, and the calls under way.
        path: The endpoint.
        policy: How old an answer may be.
        flow: The flow of the stream.
        timeout: Seconds for each key.
        period: Seconds after which a token returns.

    Attributes:
        patience: After this many seconds without a key under way the next one is tried in any case.
    """

    def __init__(
        self,
        lookup: Lookup,
        path: str,
        policy: CachePolicy,
        flow: Flow,
        *,
        timeout: float,
        period: float,
    ) -> None:
        self._lookup = lookup
        self._path = path
        self._streams = lookup.calls.endpoints[path].streams
        self._policy = policy
        self._flow = flow
        self._timeout = timeout
        self.patience = timeout + period

    def needs_turn(self, key: ApiKey | UnusableKey) -> bool:
        """As `Lookup.needs_turn`; an unusable key never does."""
        if isinstance(key, UnusableKey):
            return False
        return self._lookup.needs_turn(self._path, key, self._policy)

    def likely(self, most: int) -> tuple[int, float]:
        """How many more keys are likely to have their turn in time, up to `most`.

        Returns the number, and the seconds until the first such key if the number is 0.
        """
        now = asyncio.get_running_loop().time()
        return self._streams.likely_starts(self._flow, _IN_TIME * self._timeout, most, now)

    def end(self) -> None:
        """Note that the stream has ended."""
        self._streams.end(self._flow)

    def had_no_turn(self, outcome: Outcome[Any]) -> bool:
        """Whether no request was sent for a key, because its turn did not come in time."""
        return isinstance(outcome.error, RateLimitWaitError) and not outcome.attempts
