"""`Account`: a balance that changes with time.

It receives the time as an argument, and knows no keys and no requests.
"""

from __future__ import annotations

import contextlib
import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import attrs

from crustcredits._errors import ConfigurationError
from crustcredits._validation import shown

_CENT = Decimal("0.01")
_MONTH = timedelta(days=30)


@attrs.frozen
class _Stretch:
    """From `start` on, the balance begins with `credits` and falls by `per_second`, not below 0."""

    start: float
    credits: Decimal
    per_second: Decimal

    def at(self, now: float) -> Decimal:
        if not self.per_second or now <= self.start:
            return self.credits
        spent = (self.per_second * Decimal(now - self.start)).quantize(_CENT)
        return max(self.credits - spent, min(self.credits, Decimal(0)))


@attrs.frozen
class _TopUp:
    credits: Decimal
    left: Decimal  # at most, as of the last change of the balance
    ends: float
    expires_at: datetime | None


@attrs.define
class _Grant:
    credits: Decimal
    comes: float
    date: datetime
    rollover: bool


class Account:
    """One account's balance.

    Spending takes the recurring credits first, and of the top-ups the one that expires soonest.
    `fields` are further fields of the answer.
    """

    def __init__(self, credits: Decimal, fields: dict[str, Any]) -> None:
        self._fields = fields
        self._stretches = [_Stretch(-math.inf, credits, Decimal(0))]
        self._top_ups: list[_TopUp] = []
        self._grant: _Grant | None = None

    def set_credits(self, credits: Decimal, now: float) -> None:
        """Set the balance from now on; spending per second continues."""
        self._advance(now)
        self._stretch(now, credits, self._stretches[-1].per_second)

    def spend(self, credits: Decimal, now: float) -> None:
        """Spend at once, even more than the balance."""
        self.set_credits(self.credits_at(now) - credits, now)

    def spend_per_second(self, credits: Decimal, now: float) -> None:
        """Spend evenly from now on, down to 0."""
        self._stretch(now, self.credits_at(now), credits)

    def grant(
        self, credits: Decimal, now: float, seconds: float, frequency: str, *, rollover: bool
    ) -> None:
        """Grant credits after `seconds`, and then every 30 days."""
        self._grant = _Grant(
            credits, now + seconds, datetime.now(UTC) + timedelta(seconds=seconds), rollover
        )
        self._fields |= {
            "recurring_credits": credits,
            "recurring_credits_frequency": frequency,
            "credit_rollover": rollover,
        }

    def top_up(self, credits: Decimal, now: float, seconds: float | None) -> None:
        """Add credits; the remainder of them is lost after `seconds`."""
        self.set_credits(self.credits_at(now) + credits, now)
        ends = math.inf if seconds is None else now + seconds
        expires_at = None if seconds is None else datetime.now(UTC) + timedelta(seconds=seconds)
        self._top_ups = sorted(
            [*self._top_ups, _TopUp(credits, credits, ends, expires_at)],
            key=lambda top_up: top_up.ends,
        )

    def credits_at(self, now: float, lag: float = 0.0) -> Decimal:
        """Return the balance, or the balance of `lag` seconds ago."""
        self._advance(now)
        moment = now - lag
        return next(stretch for stretch in reversed(self._stretches) if stretch.start <= moment).at(
            moment
        )

    def document(self, now: float, lag: float = 0.0) -> dict[str, Any]:
        """Return the account as `/account/credits` shows it."""
        document = {"credits": self.credits_at(now, lag)} | self._fields
        if self._grant is not None:
            document["recurring_credits_refresh_date"] = _text(self._grant.date)
        if self._top_ups:
            document["credit_topups"] = [
                {
                    "origin": "purchase",
                    "original_credits": top_up.credits,
                    "remaining_credits": left,
                    "expires_at": None if top_up.expires_at is None else _text(top_up.expires_at),
                }
                for top_up, left in self._left(now)
                if left
            ]
        return document

    def _left(self, now: float) -> list[tuple[_TopUp, Decimal]]:
        """Remainder of each top-up for the balance: the last to expire are spent last."""
        rest, left = max(self._stretches[-1].at(now), Decimal(0)), []
        for top_up in reversed(self._top_ups):
            left.append((top_up, min(top_up.left, rest)))
            rest -= left[-1][1]
        return left[::-1]

    def _advance(self, now: float) -> None:
        """Apply every grant and expiry that is due by now, in order of time."""
        while True:
            grant_at = math.inf if self._grant is None else self._grant.comes
            expiry = self._top_ups[0].ends if self._top_ups else math.inf
            if min(grant_at, expiry) > now:
                return
            if self._grant is not None and grant_at <= expiry:
                self._come(self._grant)
            else:
                top_up, lost = self._left(expiry)[0]
                self._top_ups.remove(top_up)
                self._change(expiry, self._stretches[-1].at(expiry) - lost)

    def _come(self, grant: _Grant) -> None:
        held = sum((left for _, left in self._left(grant.comes)), Decimal(0))
        before = self._stretches[-1].at(grant.comes) if grant.rollover else held
        self._change(grant.comes, before + grant.credits)
        grant.comes += _MONTH.total_seconds()
        grant.date += _MONTH

    def _change(self, start: float, credits: Decimal) -> None:
        self._stretch(start, credits, self._stretches[-1].per_second)

    def _stretch(self, start: float, credits: Decimal, per_second: Decimal) -> None:
        self._top_ups = [attrs.evolve(top_up, left=left) for top_up, left in self._left(start)]
        if start == -math.inf:  # before any loop runs there is no history
            self._stretches.clear()
        self._stretches.append(_Stretch(start, credits, per_second))


def _text(date: datetime) -> str:
    return date.isoformat(timespec="seconds").replace("+00:00", "Z")


def exact_credits(credits: Decimal | int | str) -> Decimal:
    """The credits as a number.

    Raises:
        ConfigurationError: They are not exact.
    """
    with contextlib.suppress(InvalidOperation, TypeError, ValueError):
        if not isinstance(credits, (float, bool)) and Decimal(credits).is_finite():
            return Decimal(credits)
    raise ConfigurationError(
        "credits must be exact: give a finite Decimal, an int, or such a number as text, not "
        f"{shown(credits)}"
    )


def exact_amount(credits: Decimal | int | str) -> Decimal:
    """The credits to spend or to add, as a number.

    Raises:
        ConfigurationError: They are not exact, or less than 0.
    """
    amount = exact_credits(credits)
    if amount < 0:
        raise ConfigurationError("credits to spend or add must be at least 0")
    return amount
