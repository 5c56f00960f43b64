"""The result of a whole pool, with exact sums. A key without a balance is unknown, never zero."""

from __future__ import annotations

import decimal
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from types import MappingProxyType
from typing import Any, Generic, Self, Unpack, overload

import attrs

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
from crustcredits._models import (
    Account,
    Balance,
    BalanceT,
    Known,
    Outcome,
    Unknown,
    credits_text,
    is_newer,
)
from crustcredits._validation import check_number, hides_arguments

# A balance has at most 64 digits between 10^64 and 10^-128, so the sum of any number of balances
# fits this precision; an inexact sum raises.
_EXACT = decimal.Context(
    prec=400,
    Emax=decimal.MAX_EMAX,
    Emin=decimal.MIN_EMIN,
    traps=[decimal.Inexact, decimal.InvalidOperation],
)

# Most labels that a message lists.
_NAMED = 10


class Report(Sequence[Outcome[BalanceT]], Generic[BalanceT]):
    """The outcomes of a pool, one for each key, in the order the keys were given.

    Keys that declare the same account share one balance, which counts once: that of the newest
    response. A key without a declared account counts as an account of its own.

    The class is long because all of its sums and views share the same cached index of accounts.
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
        return _sum(credits for credits in self._credits.values() if credits is not None)

    @property
    def accounts(self) -> Mapping[str, Decimal | None]:
        """Credits of each declared account, in the order of their first keys.

        None for an account when all its keys failed.
        """
        return {
            account: credits
            for account, credits in self._credits.items()
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
        floor = _decimal("min_credits", min_credits)
        spent = {
            account
            for account, balance in self._newest.items()
            if balance is not None and self._is_spent(account, balance)
        }
        able = (outcome for outcome in self.succeeded if self._account(outcome) not in spent)
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
        return tuple(outcome for outcome in self.succeeded if self._account(outcome) in low)

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
            raise ConfigurationError("no threshold is given: pass credits=, grant_share= or both")
        ceiling = None if credits is None else _decimal("credits", credits)
        share = None if grant_share is None else _decimal("grant_share", grant_share)
        if share is not None and not all(
            isinstance(outcome.balance, Account) for outcome in self.succeeded
        ):
            raise ConfigurationError(
                "grant_share needs the recurring grants, and this report lacks some or all of "
                "them; check the pool with detail=True"
            )
        known = {
            account: balance for account, balance in self._newest.items() if balance is not None
        }
        return {
            account: balance
            for account, balance in known.items()
            if (ceiling is not None and balance.credits < ceiling)
            or (share is not None and _is_below(balance, share))
        }

    @property
    def lookalikes(self) -> tuple[tuple[Known[BalanceT], ...], ...]:
        """Groups of different undeclared keys with identical answers, which may share an account.

        No answer names its account. Where a group does share an account, `total_credits` counts it
        more than once until the keys declare it.
        """
        groups: defaultdict[Hashable, dict[bytes, Known[BalanceT]]] = defaultdict(dict)
        for outcome in self.succeeded:
            digest = outcome.key.digest
            if digest not in self._declared:
                groups[_answer(outcome.balance)].setdefault(digest, outcome)
        return tuple(tuple(group.values()) for group in groups.values() if len(group) > 1)

    @property
    def available_credits(self) -> Decimal:
        """Credits to rely on, at least 0: a cautious `total_credits`.

        An undeclared key adds nothing when another key has the identical answer, because both may
        draw from the same account. An account adds nothing when another of its keys got a later 402
        (out of credits), or when it is overdrawn: no other account can pay its debt.
        """
        known = {
            account: balance for account, balance in self._newest.items() if balance is not None
        }
        spent = {account for account, balance in known.items() if self._is_spent(account, balance)}
        # A declared account, identified by a str, always counts, even with an identical answer.
        declared = {account for account in known if isinstance(account, str)}
        counted = [known[account] for account in known if account in declared - spent]
        answers = {_answer(known[account]) for account in declared | spent}
        for account, balance in known.items():
            if account not in declared and _answer(balance) not in answers:
                answers.add(_answer(balance))
                counted.append(balance)
        return _sum(max(balance.credits, Decimal(0)) for balance in counted)

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
        deciding = self._deciding()
        counts = (
            f"{credits_text(needed)} credits are needed and {credits_text(available)} are "
            "known to be available"
        )
        stale = _listed("; stale", self.stale)
        if deciding:
            errors = tuple(outcome.error for outcome in deciding)
            undecided = _listed("; keys that could not be checked may hold the rest", deciding)
            raise CreditsUnknownError(
                f"{counts}{undecided}; see their errors, and {_remedy(errors)}{stale}",
                needed=needed,
                available=available,
                report=self,
                deciding=errors,
            )
        message = (
            f"{counts}{_listed('; unknown', self.failed)}{stale}; top up, or run a smaller batch"
        )
        raise InsufficientCreditsError(message, needed=needed, available=available, report=self)

    def _deciding(self) -> list[Unknown]:
        """The failed keys that may hold the missing credits.

        No other answer tells the balance of their account, and no 402 says that it is spent.
        """
        return [
            each
            for each in self.failed
            if self._newest[self._account(each)] is None and self._account(each) not in self._spent
        ]

    def _is_spent(self, account: Hashable, balance: Balance) -> bool:
        """Whether a key of the account got a 402 (out of credits) after this balance."""
        return account in self._spent and is_newer(self._spent[account], balance)

    @cached_property
    def _spent(self) -> Mapping[Hashable, Unknown]:
        """The last 402 (out of credits) of each account that has one."""
        spent: dict[Hashable, Unknown] = {}
        for each in self.failed:
            known = spent.get(self._account(each), each)
            if isinstance(each.error, PaymentRequiredError):
                spent[self._account(each)] = each if is_newer(each, known) else known
        return spent

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
                "credits_of takes an outcome of this report; use by_label to find one by label"
            )
        account = self._account(outcome)
        if account not in self._credits:
            raise ConfigurationError(
                "this report has no such key; take outcomes from the report itself",
                key_name=outcome.key.label,
            )
        return self._credits[account]

    @cached_property
    def _declared(self) -> Mapping[bytes, str]:
        # The same secret may be in the pool twice, with its account and without.
        return {
            outcome.key.digest: outcome.key.account
            for outcome in self._outcomes
            if outcome.key.account is not None
        }

    def _account(self, outcome: Outcome[Any]) -> Hashable:
        digest = outcome.key.digest
        return self._declared.get(digest, digest)

    @cached_property
    def _newest(self) -> Mapping[Hashable, Balance | None]:
        """The balance of each account, declared or not, that arrived last; None without one."""
        newest: dict[Hashable, Balance | None] = {}
        for outcome in self._outcomes:
            account, balance = self._account(outcome), outcome.balance
            known = newest.setdefault(account, balance)
            if balance is not None and (known is None or is_newer(balance, known)):
                newest[account] = balance
        return newest

    @cached_property
    def _credits(self) -> Mapping[Hashable, Decimal | None]:
        """The credits of each account's newest balance."""
        return {
            account: None if balance is None else balance.credits
            for account, balance in self._newest.items()
        }


def _is_below(balance: Balance, share: Decimal) -> bool:
    """Whether less than `share` of the recurring grant is left; False without a grant."""
    if not isinstance(balance, Account) or not balance.recurring_credits:
        return False
    return balance.credits < _EXACT.multiply(balance.recurring_credits, share)


_LEAST_CREDITS, _MOST_CREDITS = Decimal("1e-300"), Decimal("1e300")


def needed_credits(credits: Decimal | float, margin: Decimal | float = 1) -> Decimal:
    """The credits that a batch needs: `credits` times `margin`.

    Raises:
        ConfigurationError: One argument is not a finite number of at least 0, or the product has
            too many digits.
    """
    factors = {"credits": _decimal("credits", credits), "margin": _decimal("margin", margin)}
    for what, factor in factors.items():
        if not 0 <= factor <= _MOST_CREDITS:
            raise ConfigurationError(
                f"{what} must be a finite number of at least 0 and at most {_MOST_CREDITS:g}, "
                f"not {factor:g}"
            )
        if 0 < factor < _LEAST_CREDITS:
            raise ConfigurationError(f"{what} has too many digits; round it up")
    if 0 in factors.values():
        return Decimal(0)
    try:
        return _EXACT.multiply(*factors.values())
    except decimal.Inexact:
        pass  # the error is raised below, where no `except` block links it
    raise ConfigurationError("credits and margin have too many digits; round them up")


def _sum(numbers: Iterable[Decimal]) -> Decimal:
    with decimal.localcontext(_EXACT):
        return sum(numbers, Decimal(0))


def _decimal(what: str, number: Decimal | float) -> Decimal:
    if not isinstance(number, Decimal):
        check_number(what, number)
        return Decimal(str(number))
    if not number.is_finite():
        raise ConfigurationError(f"{what} must be a finite number, not {number}")
    return number


def _listed(what: str, outcomes: Sequence[Outcome[Any]]) -> str:
    if not outcomes:
        return ""
    more = f" and {len(outcomes) - _NAMED} more" if len(outcomes) > _NAMED else ""
    return f"{what}: {', '.join(outcome.key.label for outcome in outcomes[:_NAMED])}{more}"


def _text(credits: Decimal | None) -> str | None:
    return None if credits is None else credits_text(credits)


# Fields that may differ between two answers about the same account.
_OF_ONE_ANSWER = {"key", "checked_at", "request_id", "rate_limit", "stale", "_order"}


def _answer(balance: Balance) -> Hashable:
    """The account's data in an answer, to compare: numbers to the last digit, in any order."""
    if not isinstance(balance, Account):
        return str(balance.credits)
    fields = attrs.asdict(balance, recurse=False)
    return _comparable(
        {name: value for name, value in fields.items() if name not in _OF_ONE_ANSWER}
    )


def _comparable(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return frozenset((name, _comparable(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    # A part of a JSON document, or a time. Equal numbers may have different digits.
    hashable: Hashable = (Decimal, str(value)) if isinstance(value, Decimal) else value
    return hashable


# Errors of the key itself: the API refused it, or it cannot be sent.
_OF_THE_KEY = (ConfigurationError, AuthenticationError, PermissionDeniedError, PaymentRequiredError)


def _remedy(errors: Iterable[CrustCreditsError]) -> str:
    """The remedy for the errors of keys with unknown credits."""
    if any(error.may_recover for error in errors):
        return "check again"
    if all(isinstance(error, _OF_THE_KEY) for error in errors):
        return "correct or remove these keys"
    return "find the server that answers in the API's place"


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
