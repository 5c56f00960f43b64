"""`AnswerStore`: where processes share answers, so that one of them asks the API. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import attrs

# Seconds. A call that has waited for another process takes an answer whose request started so long
# before the call, or later: it joins that request, as it would in its own process.
JOIN: Final = 0.5


@attrs.frozen(kw_only=True)
class Ages:
    """How old an answer may be, in seconds since the start of its request.

    Attributes:
        fresh: A younger balance is found.
        error: A younger error is found.
        usable: A younger balance comes along if none is found, for use while a new one is fetched.
    """

    fresh: float
    error: float
    usable: float


@attrs.frozen(kw_only=True)
class StoredAnswer:
    """An answer of the API to some process.

    Attributes:
        began: The start of its request, or an earlier moment, in seconds of the loop's clock.
        is_error: Whether it is an error.
        text: The response: see `stored_response`.
    """

    began: float
    is_error: bool
    text: bytes


class Finding(enum.Enum):
    """What the store says of an answer."""

    FOUND = "here it is"
    OTHER_FETCHES = "another process fetches a new one: wait for the next finding"
    FETCH = "this process shall fetch it, and no other does"
    OUT_OF_REACH = "nothing is known"


OnFinding: TypeAlias = Callable[[Finding, StoredAnswer | None], None]


class AnswerStore(Protocol):
    """Answers by name. Names hold no secret."""

    def find(self, name: str, ages: Ages, on_finding: OnFinding) -> None:
        """Look for an answer; `on_finding` is called later, and again after `OTHER_FETCHES`.

        One search for a name at a time.
        """
        ...

    def stop(self, name: str) -> None:
        """Stop a search."""
        ...

    def publish(self, name: str, answer: StoredAnswer, *, kept: float) -> None:
        """Publish an answer that this process has fetched, for `kept` seconds."""
        ...

    def free(self, name: str) -> None:
        """Fetch an answer no more, so that another process may."""
        ...

    def invalidate(self, name: str | None) -> None:
        """Let no answer be found whose request started before now; None for all names."""
        ...
