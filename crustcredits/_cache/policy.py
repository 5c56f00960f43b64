"""`CachePolicy`: how old an answer may be. Arithmetic only, without clock or answers."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from crustcredits._validation import Seconds, seconds


class CacheOptions(TypedDict, total=False):
    """Cache options of one call, as keyword arguments; None is the client's setting.

    Attributes:
        max_age: A younger answer is fresh, and is returned again without a request.
        stale_while_revalidate: An answer that exceeds `max_age` by less than this is returned too,
            and refreshed in the background.
        stale_if_error: An answer that exceeds `max_age` by less than this is returned while the API
            gives none.
        max_error_age: A younger failure is returned again without a request. A call that gives
            `max_age` and not this uses its `max_age`, and at least 1 s while any cache is on.
    """

    max_age: Seconds | None
    stale_while_revalidate: Seconds | None
    stale_if_error: Seconds | None
    max_error_age: Seconds | None


class CachePolicy(NamedTuple):
    """How old a fresh answer may be, and for how long after that a stale one is used, in seconds.

    Attributes:
        max_age: An answer younger than this is fresh.
        revalidate: A stale answer is used for so long beyond `max_age`, while it is refreshed.
        if_error: A stale answer is used for so long beyond `max_age`, while the API gives none.
        error: A failure younger than this is returned again; None if not set, so that `max_age`
            decides.
        own_limit: Whether a stale answer is also used when this client's own rate limit leaves no
            room for a request.
    """

    max_age: float = 0.0
    revalidate: float = 0.0
    if_error: float = 0.0
    error: float | None = None
    own_limit: bool = True

    @property
    def error_age(self) -> float:
        """The age in seconds up to which a failure is returned again without a request."""
        if self.error is not None:
            return self.error
        return max(self.max_age, 1.0) if self.max_age or self.revalidate or self.if_error else 0.0

    def is_fresh(self, age: float) -> bool:
        """Whether a balance of this age is returned without a request."""
        return age < self.max_age

    def is_stale_while_revalidate(self, age: float) -> bool:
        """Whether a balance of this age is returned at once, and refreshed in the background."""
        return age < self.max_age + self.revalidate

    def is_stale_if_error(self, age: float) -> bool:
        """Whether a balance of this age is returned while the API gives no answer."""
        return age < self.max_age + self.if_error

    def stricter(self, other: CachePolicy) -> CachePolicy:
        """The policy of an answer that both policies accept."""
        return CachePolicy(
            min(self.max_age, other.max_age),
            min(self.revalidate, other.revalidate),
            min(self.if_error, other.if_error),
            min(self.error_age, other.error_age),
            self.own_limit and other.own_limit,
        )

    def given(
        self,
        *,
        max_age: Seconds | None = None,
        stale_while_revalidate: Seconds | None = None,
        stale_if_error: Seconds | None = None,
        max_error_age: Seconds | None = None,
    ) -> CachePolicy:
        """The options of a call, completed with the values of this policy.

        Raises:
            ConfigurationError: An option is not a number of seconds of at least 0.
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


#: Every call needs a new answer: the cache is off.
NEW = CachePolicy()
