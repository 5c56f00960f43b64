"""`RateLimitStatus`: the rate limit as the headers of one answer tell it. A leaf."""

from __future__ import annotations

from typing import Any

import attrs


@attrs.frozen(kw_only=True)
class RateLimitStatus:
    """The server's own count, from the `x-ratelimit-*` headers of one answer.

    Attributes:
        limit: Requests allowed in the window, or None when not said.
        remaining: Requests left in the window after this one.
        reset: Seconds until the oldest counted request ages out and one slot is free. Not until the
            whole quota is.

    Source: Crustdata's best-practices page.
    """

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The three numbers, None where the server did not say."""
        return {"limit": self.limit, "remaining": self.remaining, "reset": self.reset}
