"""`AdvertisedLimit`: the limit that the server states in `x-ratelimit-limit`, where it is followed.

Arithmetic only.
"""

from __future__ import annotations

from collections.abc import Hashable

# No plan comes near this many requests in a period; a higher number is not a limit.
_MOST = 1_000_000


class AdvertisedLimit:
    """The limit of a bucket: the configured one, until answers state another.

    An answer is about this bucket if its count includes at least the requests that had ended when
    its own request began. An answer with a smaller count is about another limit, and counts as one
    that states the configured limit. A limit above the configured one is followed only with
    `follows_higher`.

    Args:
        configured: The configured limit.
        follows_higher: Whether a higher one is followed.
        agreeing: How many accounts have to state another limit, the latest ones. One key of a
            smaller plan is no reason to hold back all the others.
    """

    __slots__ = ("_agreeing", "_configured", "_most", "_stated")

    def __init__(self, configured: int, *, follows_higher: bool, agreeing: int = 1) -> None:
        self._configured = configured
        self._most = _MOST if follows_higher else configured
        self._agreeing = agreeing
        self._stated: dict[Hashable, int] = {}  # the latest limits, by account

    def is_news(self, limit: int) -> bool:
        """Whether an answer with this limit can change the limit that is followed."""
        return limit != self._configured or bool(self._stated)

    def note(self, account: Hashable, limit: int, used: int, seen: int) -> int:
        """Note an answer for an account: its limit, its count `used`, and `seen` ended requests.

        Returns the limit to follow.
        """
        if used < seen or limit < 1:
            limit = self._configured
        limit = min(limit, self._most)
        if self._agreeing == 1:
            return limit
        self._stated.pop(account, None)
        self._stated[account] = limit
        if all(limit == self._configured for limit in self._stated.values()):
            self._stated.clear()  # more accounts that agree would change nothing
            return self._configured
        if len(self._stated) > self._agreeing:
            del self._stated[next(iter(self._stated))]
        if len(self._stated) < self._agreeing:
            return self._configured
        # Of the stated limits, the nearest to the configured one.
        return min(max(self._stated.values()), max(min(self._stated.values()), self._configured))
