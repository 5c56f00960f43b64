"""What comes back: frozen records, credits as exact decimals, times in UTC. Nothing here parses or sends."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias

import attrs

from crustcredits._errors import CrustCreditsError
from crustcredits._keys import ApiKey, UnusableKey

if TYPE_CHECKING:
    from typing_extensions import TypeVar
else:
    from typing import TypeVar


@attrs.frozen(kw_only=True)
class RateLimitStatus:
    """The server's own count, from the `x-ratelimit-*` headers of one answer.

    Attributes:
        limit: Requests allowed in the window, or None when not said.
        remaining: Requests left in the window after this one.
        reset: Seconds until the oldest counted request ages out and one slot is free. Not until the whole quota is.

    Source: Crustdata's best-practices page.
    """

    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The three numbers, None where the server did not say."""
        return {"limit": self.limit, "remaining": self.remaining, "reset": self.reset}


@attrs.frozen(kw_only=True)
class Balance:
    """The credits one key has left, from `GET /user/credits`.

    Attributes:
        key: The key that was asked.
        credits: Credits left, exact to the last digit sent. "May be fractional for some plans" (Crustdata's credits page).
        checked_at: When the answer came, in UTC, by this machine's clock.
        request_id: The server's `x-request-id`, or None.
        rate_limit: The server's count as the answer told it, or None.
        stale: Whether it is older than the `max_age` that was asked for, and was given all the same: while it is refreshed,
            or because the API gave no newer one. `checked_at` tells how old.
    """

    key: ApiKey
    credits: Decimal
    checked_at: datetime
    request_id: str | None = None
    rate_limit: RateLimitStatus | None = None
    stale: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the key by its label, credits as text, times as ISO 8601 in UTC."""
        return {
            "key": self.key.label,
            "account": self.key.account,
            "credits": credits_text(self.credits),
            "checked_at": time_text(self.checked_at),
            "stale": self.stale,
            "request_id": self.request_id,
            "rate_limit": None if self.rate_limit is None else self.rate_limit.to_dict(),
        }


@attrs.frozen(kw_only=True)
class Account(Balance):
    """The account behind a key, from `GET /account/credits`. Field names are the API's.

    Attributes:
        credits: "The shared pool all your API keys draw from" (Crustdata's API reference). Gate spending on this one.
        recurring_credits: Credits granted each billing cycle; 0 without a recurring grant, None when not said.
        recurring_credits_frequency: For example `monthly`.
        recurring_credits_refresh_date: When the next grant comes, in UTC; None when not said or not a date.
        credit_rollover: Whether unused recurring credits carry over; None when not said.
        wallets: As sent, numbers as `Decimal`; informational. None when absent. Like the next two not to be changed: the
            same account may be given to others.
        credit_topups: As sent, numbers as `Decimal`, soonest expiry first. None when absent.
        extra: Fields this version does not know, and known ones of a kind it cannot read, as sent.
    """

    recurring_credits: Decimal | None = None
    recurring_credits_frequency: str | None = None
    recurring_credits_refresh_date: datetime | None = None
    credit_rollover: bool | None = None
    # Lists and mappings have no hash; accounts have one all the same.
    wallets: list[Any] | None = attrs.field(default=None, hash=False)
    credit_topups: list[Any] | None = attrs.field(default=None, hash=False)
    extra: Mapping[str, Any] = attrs.field(factory=dict, hash=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: as `Balance.to_dict`, and every field of the account."""
        return super().to_dict() | {
            "recurring_credits": plain(self.recurring_credits),
            "recurring_credits_frequency": self.recurring_credits_frequency,
            "recurring_credits_refresh_date": plain(self.recurring_credits_refresh_date),
            "credit_rollover": self.credit_rollover,
            "wallets": plain(self.wallets),
            "credit_topups": plain(self.credit_topups),
            "extra": plain(self.extra),
        }


# `Report` and `Outcome` mean those of a `Balance` where a caller does not say; only checkers know of such defaults before 3.13.
if TYPE_CHECKING:
    BalanceT = TypeVar("BalanceT", bound=Balance, covariant=True, default=Balance)
else:
    BalanceT = TypeVar("BalanceT", bound=Balance, covariant=True)


Source: TypeAlias = Literal["fetched", "shared", "kept"]
State: TypeAlias = Literal["fresh", "stale", "failed"]


@attrs.frozen(kw_only=True)
class Outcome(Generic[BalanceT]):
    """What came of checking one key: a balance, or the error that stands in its place, or a stale balance and its error.

    Attributes:
        key: The key that was asked, as it was given; an `UnusableKey` where none could be made of it.
        balance: The answer, or None. With `detail=True` it is an `Account`.
        error: Why there is no balance; or, beside a stale one, why there is no newer; or None.
        checked_at: When this became known, in UTC; with a balance, when that came.
        attempts: How many requests were put on the wire for it; for a kept answer none.
        source: `"fetched"` by this call; `"shared"` with another that was under way for the same key; or `"kept"` from before.
    """

    key: ApiKey | UnusableKey
    balance: BalanceT | None = None
    error: CrustCreditsError | None = None
    checked_at: datetime
    attempts: int
    source: Source = "fetched"

    @property
    def ok(self) -> bool:
        """Whether there is a balance, be it a stale one."""
        return self.balance is not None

    @property
    def stale(self) -> bool:
        """Whether there is a balance that is older than was asked for."""
        return self.balance is not None and self.balance.stale

    @property
    def state(self) -> State:
        """`"fresh"` or `"stale"` where there is a balance, else `"failed"`."""
        return "failed" if self.balance is None else "stale" if self.balance.stale else "fresh"

    @property
    def credits(self) -> Decimal | None:
        """Credits left, or None when that is unknown. Unknown is not zero."""
        return None if self.balance is None else self.balance.credits

    @property
    def request_id(self) -> str | None:
        """The server's `x-request-id` of the last answer, or None."""
        source = self.balance or self.error
        return None if source is None else source.request_id

    @property
    def rate_limit(self) -> RateLimitStatus | None:
        """What the last answer said of the rate limit, or None."""
        source = self.balance or self.error
        return None if source is None else source.rate_limit

    def result(self) -> BalanceT:
        """The balance.

        Raises:
            CrustCreditsError: The error, when there is none.
        """
        if self.balance is not None:
            return self.balance
        assert self.error is not None
        # Others may hold this outcome too: a traceback is of one of them only.
        raise copy.copy(self.error)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the balance under its key's label, or the error as its type's name and text."""
        balance = self.balance
        known = {"credits": None, "checked_at": time_text(self.checked_at)} if balance is None else balance.to_dict()
        return (
            {"key": self.key.label, "account": self.key.account, "ok": self.ok, "stale": self.stale}
            | known
            | {
                "request_id": self.request_id,
                "rate_limit": None if self.rate_limit is None else self.rate_limit.to_dict(),
                "attempts": self.attempts,
                "source": self.source,
                "error": None if self.error is None else {"type": type(self.error).__name__, "message": str(self.error)},
            }
        )


def outcome_for(key: ApiKey | UnusableKey, outcome: Outcome[BalanceT]) -> Outcome[BalanceT]:
    """The outcome of an equal secret, under `key`'s own name and account."""
    if key is outcome.key or key == outcome.key:
        return outcome
    balance = None if outcome.balance is None or isinstance(key, UnusableKey) else attrs.evolve(outcome.balance, key=key)
    error = None if outcome.error is None else outcome.error.under(key.label)
    return attrs.evolve(outcome, key=key, balance=balance, error=error)


def credits_text(credits: Decimal) -> str:
    """Every digit, without an exponent: `138940.37`."""
    return format(credits, "f")


def time_text(time: datetime) -> str:
    """ISO 8601 in UTC: `2026-09-01T00:00:00Z`."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """Data for JSON of what came in JSON: numbers as text, times as ISO 8601."""
    if isinstance(value, Decimal):
        return credits_text(value)
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value
