"""`RateLimitStatus`: the rate limit in the headers of one response. It imports no other module."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class RateLimitStatus:
    """The server's own count, from the `x-ratelimit-*` headers of one response.

    Attributes:
        limit: Requests allowed in the window, or None without the header.
        remaining: Requests left in the window after this one.
        reset: Seconds until the oldest counted request leaves the window and frees one slot, not
            the whole quota.

    Source: Crustdata's best-practices page.
    """

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The three numbers, None where the server sent none."""
        return {"limit": self.limit, "remaining": self.remaining, "reset": self.reset}
