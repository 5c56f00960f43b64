"""`CachePolicy`: how old an answer may be. Arithmetic only; it knows no clock and no answers."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from crustcredits._validation import Seconds, seconds


class CacheOptions(TypedDict, total=False):
    """What calls say of how old an answer may be, as keyword arguments; None is what the client says.

    Attributes:
        max_age: As old as this an answer is given again instead of asking.
        stale_while_revalidate: Older than `max_age` by less than this it is given too, and
            refreshed behind.
        stale_if_error: Older than `max_age` by less than this it stands in while the API gives
            none.
        max_error_age: A failure as old as this is given again instead of asking. Where a call gives
            `max_age` and not this, it is as old as `max_age`, and at least 1 s while any cache is
            on.
    """

    max_age: Seconds | None
    stale_while_revalidate: Seconds | None
    stale_if_error: Seconds | None
    max_error_age: Seconds | None


class CachePolicy(NamedTuple):
    """How old an answer may be, in seconds, and beyond that for how long it stands in.

    Attributes:
        max_age: As old as this it is as good as a new one.
        revalidate: So much older it is good while it is refreshed.
        if_error: So much older than `max_age` it is good while the API gives none.
        error: As old as this a failure is given again; None where nobody has said, so that
            `max_age` tells.
        own_limit: Whether an old answer also stands in where this client's own rate limit leaves no
            room.
    """

    max_age: float = 0.0
    revalidate: float = 0.0
    if_error: float = 0.0
    error: float | None = None
    own_limit: bool = True

    @property
    def error_age(self) -> float:
        """As old as this a failure is given again instead of asking."""
        if self.error is not None:
            return self.error
        return max(self.max_age, 1.0) if self.max_age or self.revalidate or self.if_error else 0.0

    def given(
        self,
        *,
        max_age: Seconds | None = None,
        stale_while_revalidate: Seconds | None = None,
        stale_if_error: Seconds | None = None,
        max_error_age: Seconds | None = None,
    ) -> CachePolicy:
        """What a call says, and where it says nothing what stands here.

        Raises:
            ConfigurationError: One of them is no number of seconds of at least 0.
        """
        error = self.error if max_age is None else None
        return CachePolicy(
            self.max_age if max_age is None else seconds("max_age", max_age),
            self.revalidate
            if stale_while_revalidate is None
            else seconds("stale_while_revalidate", stale_while_revalidate),
            self.if_error if stale_if_error is None else seconds("stale_if_error", stale_if_error),
            error if max_error_age is None else seconds("max_error_age", max_error_age),
            self.own_limit,
        )


#: No answer from before will do.
NEW = CachePolicy()
