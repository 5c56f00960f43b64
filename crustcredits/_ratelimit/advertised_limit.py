"""`AdvertisedLimit`: the limit that the server states in `x-ratelimit-limit`, as far as it is followed. Arithmetic only."""

from __future__ import annotations

from collections.abc import Hashable

# No plan comes near this many requests in a period; what says so is no limit.
_MOST = 1_000_000


class AdvertisedLimit:
    """The limit of a bucket: the configured one, until answers say another.

    An answer speaks of the bucket when it has counted at least the requests there that had ended
    when its own began. One that has counted fewer speaks of something else, and says as much as
    that the configured limit holds. A higher limit than the configured one is followed only where
    that is asked for.

    Args:
        configured: The configured limit.
        follows_higher: Whether a higher one is followed.
        voices: How many accounts have to say so, the last ones that were heard: one key of a
            smaller plan is no reason to hold back all the others.
    """

    __slots__ = ("_configured", "_most", "_said", "_voices")

    def __init__(self, configured: int, *, follows_higher: bool, voices: int = 1) -> None:
        self._configured = configured
        self._most = _MOST if follows_higher else configured
        self._voices = voices
        self._said: dict[Hashable, int] = {}  # by account, the last ones

    def is_news(self, limit: int) -> bool:
        """Whether an answer that tells of this limit can change what is kept: it, or one of the last ones, is another."""
        return limit != self._configured or bool(self._said)

    def hear(self, account: Hashable, limit: int, used: int, seen: int) -> int:
        """An answer for an account told of this limit and of `used` requests; `seen` had ended.

        Returns the limit to keep.
        """
        if used < seen or limit < 1:
            limit = self._configured
        limit = min(limit, self._most)
        if self._voices == 1:
            return limit
        self._said.pop(account, None)
        self._said[account] = limit
        if all(said == self._configured for said in self._said.values()):
            self._said.clear()  # as many more that agree would change nothing
            return self._configured
        if len(self._said) > self._voices:
            del self._said[next(iter(self._said))]
        if len(self._said) < self._voices:
            return self._configured
        # Of what they say the nearest to the configured one.
        return min(max(self._said.values()), max(min(self._said.values()), self._configured))
