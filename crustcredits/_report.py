"""The result of a whole pool, and the errors of `require`. An unknown balance is never zero.

`_ledger` knows the accounts of the pool, and `_amounts` the arithmetic. The errors are here because
they hold the report.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, Self, Unpack, overload

from crustcredits._amounts import as_decimal, exact_sum, needed_credits
from crustcredits._errors import (
    AuthenticationError,
    ConfigurationError,
    CrustCreditsError,
    ErrorDetails,
    PaymentRequiredError,
    PermissionDeniedError,
    rebuild,
)
from crustcredits._keys.api_key import ApiKey
from crustcredits._ledger import Ledger
from crustcredits._models import (
    Account,
    Balance,
    BalanceT,
    Known,
    Outcome,
    Unknown,
    credits_text,
)
from crustcredits._validation import hides_arguments

# Most labels that a message lists.
_NAMED = 10


class Report(Sequence[Outcome[BalanceT]], Generic[BalanceT]):
    """The outcomes of a pool, one for each key, in the order the keys were given.

    Keys that declare the same account share one balance, which counts once: that of the newest
    response. A key without a declared account counts as an account of its own.

    The class is long because each sum and view is public and has a full docstring.
    """

    def __init__(self, outcomes: Iterable[Outcome[BalanceT]]) -> None:
        self._outcomes = tuple(outcomes)

    @overload
    def __getitem__(self, index: int) -> Outcome[BalanceT]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Outcome[BalanceT]]: ...
    @hides_arguments
    def __getitem__(self, index: Any) -> Outcome[BalanceT] | Sequence[Outcome[BalanceT]]:
        if isinstance(index, str):
            raise TypeError(
                "a report is indexed by position; use by_label for an outcome by its key's label"
            )
        found: Outcome[BalanceT] | Sequence[Outcome[BalanceT]] = self._outcomes[index]
        return found

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome[BalanceT]]:
        return iter(self._outcomes)

    def __eq__(self, other: object) -> bool:
        return self._outcomes == other._outcomes if isinstance(other, Report) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._outcomes)

    def __repr__(self) -> str:
        stale = f" ({len(self.stale)} stale)" if self.stale else ""
        return (
            f"<Report of {len(self)} keys: {len(self.succeeded)} succeeded{stale}, "
            f"{len(self.failed)} failed>"
        )

    @property
    def ok(self) -> bool:
        """Whether every key has a balance. An empty report is ok."""
        return not self.failed

    @cached_property
    def succeeded(self) -> tuple[Known[BalanceT], ...]:
        """The outcomes with a balance."""
        return tuple(outcome for outcome in self._outcomes if isinstance(outcome, Known))

    @cached_property
    def failed(self) -> tuple[Unknown, ...]:
        """The outcomes without a balance: their credits are unknown."""
        return tuple(outcome for outcome in self._outcomes if isinstance(outcome, Unknown))

    @cached_property
    def stale(self) -> tuple[Known[BalanceT], ...]:
        """The outcomes with a balance older than the requested `max_age`.

        They count in `succeeded` and in all sums.
        """
        return tuple(outcome for outcome in self.succeeded if outcome.stale)

    @cached_property
    def by_label(self) -> Mapping[str, Outcome[BalanceT]]:
        """The outcomes by the labels of their keys.

        Where two keys have the same label, a usable key wins over an unusable one.
        """
        usable = {
            outcome.key.label: outcome
            for outcome in self._outcomes
            if isinstance(outcome.key, ApiKey)
        }
        every = {outcome.key.label: outcome for outcome in self._outcomes}
        return MappingProxyType(every | usable)

    @property
    def total_credits(self) -> Decimal | None:
        """Credits of all accounts with a known balance, each once, exact to the last digit.

        Failed keys are left out, so check `ok` as well; stale balances count. None when every key
        of a pool failed.
        """
        if self and not self.succeeded:
            return None
        return exact_sum(balance.credits for balance in self._ledger.known.values())

    @property
    def accounts(self) -> Mapping[str, Decimal | None]:
        """Credits of each declared account, in the order of their first keys.

        None for an account when all its keys failed.
        """
        return {
            account: credits
            for account, credits in self._ledger.credits.items()
            if isinstance(account, str)
        }

    @hides_arguments
    def ranked(self, min_credits: Decimal | float = 0) -> tuple[Known[BalanceT], ...]:
        """The keys with at least `min_credits` in their account, richest account first.

        Ties keep the order given. Stale outcomes come last. Failed keys are left out, as are keys
        of an account with a later answer that it is out of credits (402).

        Raises:
            ConfigurationError: `min_credits` is not a finite number.
        """
        floor, ledger = as_decimal("min_credits", min_credits), self._ledger
        spent = ledger.spent
        able = (outcome for outcome in self.succeeded if ledger.account_of(outcome) not in spent)
        rich = (outcome for outcome in able if self.credits_of(outcome) >= floor)
        return tuple(
            sorted(
                rich,
                key=lambda outcome: (not outcome.stale, self.credits_of(outcome)),
                reverse=True,
            )
        )

    @hides_arguments
    def low(
        self, credits: Decimal | float | None = None, *, grant_share: Decimal | float | None = None
    ) -> tuple[Known[BalanceT], ...]:
        """The keys with a low account, in the order given. Failed keys are left out.

        Args:
            credits: An account with less than this number of credits is low.
            grant_share: An account with less than this share of its recurring grant is low as well:
                0.1 is a tenth. Needs a report with `detail=True`. This rule never applies to an
                account without a recurring grant.

        Raises:
            ConfigurationError: Neither is given, one of them is not a finite number, or
                `grant_share` is given for balances without detail.
        """
        low = self._low(credits, grant_share)
        return tuple(
            outcome for outcome in self.succeeded if self._ledger.account_of(outcome) in low
        )

    @hides_arguments
    def low_accounts(
        self, credits: Decimal | float | None = None, *, grant_share: Decimal | float | None = None
    ) -> tuple[str, ...]:
        """The declared accounts that are low, in the order of their first keys.

        Accounts without a known balance are left out. Arguments and errors are as in `low`.
        """
        return tuple(
            account for account in self._low(credits, grant_share) if isinstance(account, str)
        )

    def _low(
        self, credits: Decimal | float | None, grant_share: Decimal | float | None
    ) -> Mapping[Hashable, Balance]:
        if credits is None and grant_share is None:
            raise ConfigurationError("no threshold is given; pass credits=, grant_share= or both")
        ceiling = None if credits is None else as_decimal("credits", credits)
        share = None if grant_share is None else as_decimal("grant_share", grant_share)
        if share is not None and not all(
            isinstance(outcome.balance, Account) for outcome in self.succeeded
        ):
            raise ConfigurationError(
                "grant_share needs the recurring grants, and this report lacks some or all of "
                "them; check the pool with detail=True"
            )
        return self._ledger.below(ceiling, share)

    @property
    def lookalikes(self) -> tuple[tuple[Known[BalanceT], ...], ...]:
        """Groups of different undeclared keys with identical answers, which may share an account.

        No answer names its account. Where a group does share an account, `total_credits` counts it
        more than once until the keys declare it.
        """
        return self._ledger.lookalikes(self.succeeded)

    @property
    def available_credits(self) -> Decimal:
        """Credits to rely on, at least 0: a cautious `total_credits`.

        An undeclared key adds nothing when another key has the identical answer, because both may
        draw from the same account. An account adds nothing when another of its keys got a later 402
        (out of credits), or when it is overdrawn: no other account can pay its debt.
        """
        return self._ledger.available_credits()

    @hides_arguments
    def require(self, credits: Decimal | float) -> None:
        """Do nothing when `available_credits` is at least `credits`.

        Raises:
            InsufficientCreditsError: `available_credits` is too low, and no key with unknown
                credits could change that.
            CreditsUnknownError: `available_credits` is too low, but keys with unknown credits may
                hold the rest.
            ConfigurationError: `credits` is not a finite number of at least 0.
        """
        needed, available = needed_credits(credits), self.available_credits
        if available >= needed:
            return
        deciding = [each for each in self.failed if self._ledger.may_hold_more(each)]
        counts = f"{credits_text(needed)} needed, {credits_text(available)} known to be available"
        stale = _listed("; stale", self.stale)
        if deciding:
            errors = tuple(outcome.error for outcome in deciding)
            undecided = _listed("; keys that could not be checked may hold the rest", deciding)
            raise CreditsUnknownError(
                f"credits unknown: {counts}{undecided}{stale}; see the errors of these keys, and "
                f"{_remedy(errors)}",
                needed=needed,
                available=available,
                report=self,
                deciding=errors,
            )
        message = (
            f"too few credits: {counts}{_listed('; unknown', self.failed)}{stale}; "
            "top up, or run a smaller batch"
        )
        raise InsufficientCreditsError(message, needed=needed, available=available, report=self)

    def raise_on_error(self) -> None:
        """Do nothing when every key has a balance.

        Raises:
            ExceptionGroup: The errors of all failed keys.
        """
        errors = [outcome.error for outcome in self.failed]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(self)} keys could not be checked", errors)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the totals and every outcome, with its key's label and credits as text."""
        return {
            "ok": self.ok,
            "succeeded": len(self.succeeded),
            "failed": len(self.failed),
            "stale": len(self.stale),
            "total_credits": _text(self.total_credits),
            "accounts": {name: _text(credits) for name, credits in self.accounts.items()},
            "lookalikes": [[outcome.key.label for outcome in group] for group in self.lookalikes],
            "outcomes": [outcome.to_dict() for outcome in self],
        }

    @overload
    def credits_of(self, outcome: Known[Any]) -> Decimal: ...
    @overload
    def credits_of(self, outcome: Unknown) -> Decimal | None: ...
    @hides_arguments
    def credits_of(self, outcome: Outcome[Any]) -> Decimal | None:
        """Credits of the account of an outcome's key, from the account's newest answer.

        None when no key of the account has a balance.

        Raises:
            ConfigurationError: The outcome is not in this report.
        """
        if not isinstance(outcome, (Known, Unknown)):
            raise ConfigurationError(
                "outcome must be an outcome of this report; use by_label to find one by label"
            )
        account = self._ledger.account_of(outcome)
        if account not in self._ledger.credits:
            raise ConfigurationError(
                "the key is not in this report; take outcomes from the report itself",
                key_name=outcome.key.label,
            )
        return self._ledger.credits[account]

    @cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self._outcomes)


def _listed(what: str, outcomes: Sequence[Outcome[Any]]) -> str:
    if not outcomes:
        return ""
    more = f" and {len(outcomes) - _NAMED} more" if len(outcomes) > _NAMED else ""
    return f"{what}: {', '.join(outcome.key.label for outcome in outcomes[:_NAMED])}{more}"


def _text(credits: Decimal | None) -> str | None:
    return None if credits is None else credits_text(credits)


# Errors of the key itself: the API refused it, or it cannot be sent.
_OF_THE_KEY = (ConfigurationError, AuthenticationError, PermissionDeniedError, PaymentRequiredError)


def _remedy(errors: Iterable[CrustCreditsError]) -> str:
    """The remedy for the errors of keys with unknown credits."""
    if any(error.may_recover for error in errors):
        return "check again"
    if all(isinstance(error, _OF_THE_KEY) for error in errors):
        return "correct or remove the keys"
    return "correct the cause that each names"


class CreditsRequirementError(CrustCreditsError):
    """A pool is not known to hold the credits that a batch needs.

    `require` raises one of its two subclasses.

    Attributes:
        needed: Credits needed, with the margin.
        available: Credits known to be available; keys with unknown credits add none.
        report: The report of the pool. Empty after pickling, because keys are not pickled.
        errors: The errors of the keys with unknown credits.
        unknown: The labels of the keys with unknown credits, in the order of `errors`.
        stale: The labels of the keys with a stale balance.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: Decimal,
        available: Decimal,
        report: Report,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, **details)
        self.needed = needed
        self.available = available
        self.report = report
        self.errors: tuple[CrustCreditsError, ...] = tuple(
            outcome.error for outcome in report.failed
        )
        self.unknown: tuple[str, ...] = tuple(outcome.key.label for outcome in report.failed)
        self.stale: tuple[str, ...] = tuple(outcome.key.label for outcome in report.stale)

    def __copy__(self) -> Self:
        return rebuild(type(self), self.args, self.__dict__)

    def __deepcopy__(self, memo: object) -> Self:
        return rebuild(type(self), self.args, self.__dict__)  # its attributes are never changed

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (type(self), self.args, self.__dict__ | {"report": type(self.report)([])})


class InsufficientCreditsError(CreditsRequirementError):
    """The known balances are too low, and no key with unknown credits could change that."""


class CreditsUnknownError(CreditsRequirementError):
    """The known balances are too low, and keys with unknown credits may hold the rest.

    Attributes:
        deciding: The errors of these keys, with their labels in `key_name`. Keys of an account that
            is known from another key, or known to be spent, are not included.
        may_recover: Whether one of these errors may recover. Otherwise another check does not help:
            the API refused these keys, they cannot be used, or another server answers in the API's
            place.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: Decimal,
        available: Decimal,
        report: Report,
        deciding: tuple[CrustCreditsError, ...],
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, needed=needed, available=available, report=report, **details)
        self.deciding = deciding
        self.may_recover: bool = any(error.may_recover for error in deciding)
