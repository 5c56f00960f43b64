"""The answers that are kept: the last good one for each key and endpoint, and why there is no newer one.

Bounded: the least recently used go first. It neither asks nor waits, and is told the time, in the running loop's seconds.
A secret is no part of what answers are found by.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

import attrs

from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    InternalServerError,
    RateLimitError,
    RateLimitWaitError,
    UnexpectedResponseError,
)
from crustcredits._freshness import Freshness
from crustcredits._models import Balance, Outcome

#: The path of an endpoint and the digest of a key.
Place: TypeAlias = tuple[str, bytes]

# These say that no answer was to be had, and nothing of the key. Any other error is the API's word on it: then what it said
# before holds no longer.
_SILENT = (
    APIConnectionError,
    APITimeoutError,
    InternalServerError,
    RateLimitError,
    RateLimitWaitError,
    UnexpectedResponseError,
)

# Seconds for which a failure tells that the API is down. After that nobody knows, and whoever asks has to wait and see.
_DOWN = 60.0


class Kept:
    """What is known of one key on one endpoint.

    Attributes:
        tried: When something was last heard of it, good or bad; the order of refreshing goes by it.
        refresh_at: When it may be refreshed again.
    """

    __slots__ = ("_balance", "_failure", "_failures", "_fresh", "_received", "_stale", "refresh_at", "tried")

    def __init__(self) -> None:
        self._balance: Balance | None = None
        self._received = 0.0
        self._failure: Outcome[Any] | None = None  # the last one, since the balance
        self._failures = 0
        self.tried = 0.0
        self.refresh_at = 0.0
        # Made when first asked for, and then the same for all.
        self._fresh: Outcome[Any] | None = None
        self._stale: Outcome[Any] | None = None

    def succeeded(self, balance: Balance, now: float) -> None:
        """A balance came."""
        self._balance, self._failure = balance, None
        self._received = self.tried = self.refresh_at = now
        self._failures = 0
        self._fresh = self._stale = None

    def failed(self, failure: Outcome[Any], pause: float, now: float) -> None:
        """None came. Where that is the API's word on the key, the balance from before holds no longer."""
        self._failure = attrs.evolve(failure, attempts=0, source="kept")
        self._failures += 1
        self.tried = now
        self.refresh_at = now + pause
        self._stale = None
        if not isinstance(failure.error, _SILENT):
            self._balance = self._fresh = None

    @property
    def failures(self) -> int:
        """How often in a row none came."""
        return self._failures

    def answer(self, freshness: Freshness, now: float) -> Outcome[Any] | None:
        """The balance, if it is young enough to be given without asking. If it is stale, it is to be refreshed."""
        balance = self._balance
        if balance is None:
            return None
        age = now - self._received
        if age < freshness.max_age:
            return self._fresh or self._make_fresh(balance)
        is_down = self._failure is not None and now - self.tried < _DOWN
        if age < freshness.max_age + max(freshness.revalidate, freshness.if_error if is_down else 0.0):
            return self._stale or self._make_stale(balance)
        return None

    def instead_of(self, failure: Outcome[Any], freshness: Freshness, began: float, now: float) -> Outcome[Any] | None:
        """The balance with this failure beside it, where it may stand in for a newer one.

        For one who asks since `began`: an answer that came meanwhile, in the moment of the failure, is what was asked for.
        """
        if self._balance is None or not isinstance(failure.error, _SILENT):
            return None
        if self._received > began or now - self._received < freshness.max_age:
            return self._fresh or self._make_fresh(self._balance)
        if now - self._received >= freshness.max_age + freshness.if_error:
            return None
        return attrs.evolve(self._stale or self._make_stale(self._balance), error=failure.error, attempts=failure.attempts)

    def last(self, freshness: Freshness, now: float) -> Outcome[Any] | None:
        """What was heard last, however long ago."""
        if self._balance is None:
            return self._failure
        if now - self._received < freshness.max_age:
            return self._fresh or self._make_fresh(self._balance)
        return self._stale or self._make_stale(self._balance)

    def _make_fresh(self, balance: Balance) -> Outcome[Any]:
        self._fresh = Outcome(key=balance.key, balance=balance, checked_at=balance.checked_at, attempts=0, source="kept")
        return self._fresh

    def _make_stale(self, balance: Balance) -> Outcome[Any]:
        self._stale = Outcome(
            key=balance.key,
            balance=attrs.evolve(balance, stale=True),
            error=None if self._failure is None else self._failure.error,
            checked_at=balance.checked_at,
            attempts=0,
            source="kept",
        )
        return self._stale


class Answers:
    """At most `room` of them, found by place."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: OrderedDict[Place, Kept] = OrderedDict()

    def find(self, place: Place) -> Kept | None:
        """What is known there; looking is using."""
        kept = self._kept.get(place)
        if kept is not None:
            self._kept.move_to_end(place)
        return kept

    def at(self, place: Place) -> Kept:
        """The same, to be written to; the least recently used goes for it if need be."""
        kept = self.find(place)
        if kept is None:
            kept = self._kept[place] = Kept()
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return kept
