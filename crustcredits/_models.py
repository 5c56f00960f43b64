"""Results as frozen records: credits as exact decimals, times in UTC.

This module neither parses nor sends.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeAlias, cast

import attrs

from crustcredits._errors import CrustCreditsError, renamed
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._rate_limit_status import RateLimitStatus
from crustcredits._validation import kind_of

if TYPE_CHECKING:
    from typing_extensions import TypeVar
else:
    from typing import TypeVar


_next_order = itertools.count().__next__


@attrs.frozen(kw_only=True)
class Balance:
    """The credits one key has left, from `GET /user/credits`.

    Attributes:
        key: The checked key.
        credits: Credits left, exact to the last digit sent. "May be fractional for some plans"
            (Crustdata's credits page).
        checked_at: Arrival of the response, in UTC, by this machine's clock.
        request_id: The server's `x-request-id`, or None.
        rate_limit: The rate limit in the headers of the response, or None.
        stale: Whether the balance is older than the requested `max_age`. A stale balance is served
            during a background refresh, or because the API gave no newer one. `checked_at` tells
            its age.
    """

    key: ApiKey
    credits: Decimal
    checked_at: datetime
    request_id: str | None = None
    rate_limit: RateLimitStatus | None = None
    stale: bool = False
    # Order of arrival; the wall clock may have been set between two balances.
    _order: int = attrs.field(alias="order", factory=_next_order, eq=False, repr=False)

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
        credits: "The shared pool all your API keys draw from" (Crustdata's API reference). Gate
            spending on this number.
        recurring_credits: Credits granted each billing cycle; 0 without a recurring grant, None
            when absent.
        recurring_credits_frequency: For example `monthly`.
        recurring_credits_refresh_date: Time of the next grant, in UTC; None when absent or not a
            date.
        credit_rollover: Whether unused recurring credits carry over; None when absent.
        wallets: As sent, numbers as `Decimal`; informational. None when absent. Do not change this
            and the next two fields: other callers may hold the same account.
        credit_topups: As sent, numbers as `Decimal`, soonest expiry first. None when absent.
        extra: Fields that this version does not know, and known fields of an undocumented kind, as
            sent.
    """

    recurring_credits: Decimal | None = None
    recurring_credits_frequency: str | None = None
    recurring_credits_refresh_date: datetime | None = None
    credit_rollover: bool | None = None
    # Lists and mappings have no hash, so the hash of an account leaves them out.
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


# `Report` and `Outcome` without a parameter are those of `Balance`. Before Python 3.13 only type
# checkers know such defaults.
if TYPE_CHECKING:
    BalanceT = TypeVar("BalanceT", bound=Balance, covariant=True, default=Balance)
else:
    BalanceT = TypeVar("BalanceT", bound=Balance, covariant=True)


Source: TypeAlias = Literal["fetched", "shared", "cached", "none"]
State: TypeAlias = Literal["fresh", "stale", "failed"]


_set = object.__setattr__  # for use while a frozen record is being made


@attrs.frozen(kw_only=True)
class Known(Generic[BalanceT]):
    """A key whose credits are known.

    Attributes:
        balance: The balance; an `Account` with `detail=True`.
        error: The failure to get a newer balance than this cache entry; else None.
        attempts: Requests that were sent; 0 for a cache entry.
        source: `"fetched"` by this call; `"shared"` with a running call for the same key, or with
            another process; or `"cached"`.
        key: The checked key.
        ok: Always True.
        credits: Credits left.
        checked_at: Arrival of the balance, in UTC.
        stale: Whether the balance is older than the requested `max_age`.
    """

    balance: BalanceT
    error: CrustCreditsError | None = None
    attempts: int = 1
    source: Source = "fetched"
    # These repeat fields of the balance. They are not properties, so that type checkers can tell
    # `Known` from `Unknown` by them.
    key: ApiKey = attrs.field(init=False, eq=False, repr=False)
    ok: Literal[True] = attrs.field(default=True, init=False, eq=False, repr=False)
    credits: Decimal = attrs.field(init=False, eq=False, repr=False)
    checked_at: datetime = attrs.field(init=False, eq=False, repr=False)
    stale: bool = attrs.field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        balance = self.balance
        if not isinstance(balance, Balance):
            raise TypeError(f"balance must be a Balance, not {kind_of(balance)}")
        _set(self, "key", balance.key)
        _set(self, "credits", balance.credits)
        _set(self, "checked_at", balance.checked_at)
        _set(self, "stale", balance.stale)

    @property
    def age(self) -> float:
        """Seconds since the balance arrived, at least 0, by the wall clock at each read."""
        return _age(self.checked_at)

    @property
    def state(self) -> State:
        """`"fresh"` or `"stale"`."""
        return "stale" if self.stale else "fresh"

    @property
    def request_id(self) -> str | None:
        """The server's `x-request-id` of the balance, or None."""
        return self.balance.request_id

    @property
    def rate_limit(self) -> RateLimitStatus | None:
        """The rate limit in the headers of the balance's response, or None."""
        return self.balance.rate_limit

    def result(self) -> BalanceT:
        """The balance."""
        return self.balance

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the balance's `to_dict`, with `ok`, `attempts`, `source` and the error.

        An error is an object with its `type` and its `message`.
        """
        return _dict_of(self, self.balance.to_dict())


@attrs.frozen(kw_only=True)
class Unknown:
    """A key whose credits are unknown, which is not zero.

    Attributes:
        key: The checked key; an `UnusableKey` where the text or row cannot be a key.
        error: The reason why there is no balance.
        checked_at: Time of the error, in UTC.
        attempts: Requests that were sent; 0 for an error from the cache.
        source: As in `Known`; `"none"` when no request was sent, because the key cannot be used, or
            the rate limit or an outage held the request back.
        ok: Always False.
        balance: Always None, like `credits`.
        stale: Always False.
    """

    key: ApiKey | UnusableKey
    error: CrustCreditsError = attrs.field(
        validator=attrs.validators.instance_of(CrustCreditsError)
    )
    checked_at: datetime = attrs.field(factory=lambda: datetime.now(UTC))
    attempts: int = 0
    source: Source = "none"
    _order: int = attrs.field(
        alias="order", factory=_next_order, eq=False, repr=False
    )  # as in Balance
    ok: Literal[False] = attrs.field(default=False, init=False, eq=False, repr=False)
    balance: None = attrs.field(default=None, init=False, eq=False, repr=False)
    credits: None = attrs.field(default=None, init=False, eq=False, repr=False)
    stale: Literal[False] = attrs.field(default=False, init=False, eq=False, repr=False)

    @property
    def age(self) -> float:
        """Seconds since the error, at least 0, by the wall clock at each read."""
        return _age(self.checked_at)

    @property
    def state(self) -> State:
        """Always `"failed"`."""
        return "failed"

    @property
    def request_id(self) -> str | None:
        """The server's `x-request-id` of the last answer, or None."""
        return self.error.request_id

    @property
    def rate_limit(self) -> RateLimitStatus | None:
        """The rate limit in the headers of the last response, or None."""
        return self.error.rate_limit

    def result(self) -> NoReturn:
        """Raise the error.

        Raises:
            CrustCreditsError: Always; a copy, because other callers may hold this outcome too.
        """
        raise copy.copy(self.error)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the same members as `Known.to_dict`, with None for the credits."""
        known = {
            "key": self.key.label,
            "account": self.key.account,
            "credits": None,
            "checked_at": time_text(self.checked_at),
        }
        details = {
            "stale": False,
            "request_id": self.request_id,
            "rate_limit": None if self.rate_limit is None else self.rate_limit.to_dict(),
        }
        return _dict_of(self, known | details)


#: The result for one key: `Known` or `Unknown`. `isinstance` and `match` separate the two, for
#: type checkers as well.
Outcome: TypeAlias = Known[BalanceT] | Unknown


def outcome_for(key: ApiKey | UnusableKey, outcome: Outcome[BalanceT]) -> Outcome[BalanceT]:
    """The outcome of a key with the same secret, under `key`'s own name and account."""
    if key is outcome.key or key == outcome.key:
        return outcome
    error = None if outcome.error is None else renamed(outcome.error, key.label)
    if isinstance(outcome, Known) and isinstance(key, ApiKey):
        return attrs.evolve(outcome, balance=attrs.evolve(outcome.balance, key=key), error=error)
    assert error is not None  # an unusable key never has a balance
    return attrs.evolve(cast("Unknown", outcome), key=key, error=error)


def is_newer(answer: Balance | Unknown, other: Balance | Unknown) -> bool:
    """Whether `answer` arrived after `other`, or is the same."""
    return answer._order >= other._order  # noqa: SLF001  # of this very module


def _dict_of(outcome: Known[Any] | Unknown, known: dict[str, Any]) -> dict[str, Any]:
    error = outcome.error
    return {
        "key": outcome.key.label,
        "account": outcome.key.account,
        "ok": outcome.ok,
        **known,
        "attempts": outcome.attempts,
        "source": outcome.source,
        "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
    }


def _age(checked_at: datetime) -> float:
    return max(0.0, (datetime.now(UTC) - checked_at).total_seconds())


def credits_text(credits: Decimal) -> str:
    """Credits with every digit and without an exponent: `138940.37`."""
    return format(credits, "f")


def time_text(time: datetime) -> str:
    """A time as ISO 8601 in UTC: `2026-09-01T00:00:00Z`."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def plain(value: Any) -> Any:
    """Parsed JSON as data that JSON can write again: numbers as text, times as ISO 8601."""
    if isinstance(value, Decimal):
        return credits_text(value)
    if isinstance(value, datetime):
        return time_text(value)
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value
