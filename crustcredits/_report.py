"""What a whole pool came to. Sums are exact; what could not be checked is unknown, never zero."""

from __future__ import annotations

import decimal
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any, Generic, overload

import attrs

from crustcredits._checks import check_number, hides_arguments
from crustcredits._errors import ConfigurationError, InsufficientCreditsError, PaymentRequiredError
from crustcredits._models import Account, Balance, BalanceT, Outcome, credits_text

# A balance has at most 64 digits between 10^64 and 10^-128, so the sum of any number of them fits; if not, it raises.
_EXACT = decimal.Context(prec=400, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[decimal.Inexact, decimal.InvalidOperation])

# How many names a message lists.
_NAMED = 10


class Report(Sequence[Outcome[BalanceT]], Generic[BalanceT]):
    """The outcomes of a pool, one for each key, in the order the keys were given.

    Keys that declare one account share one balance, which is counted once: the newest answer's. A key without a declared
    account counts as an account of its own.
    """

    def __init__(self, outcomes: Iterable[Outcome[BalanceT]]) -> None:
        self._outcomes = tuple(outcomes)

    @overload
    def __getitem__(self, index: int) -> Outcome[BalanceT]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Outcome[BalanceT]]: ...
    def __getitem__(self, index: int | slice) -> Outcome[BalanceT] | Sequence[Outcome[BalanceT]]:
        return self._outcomes[index]

    def __len__(self) -> int:
        return len(self._outcomes)

    def __iter__(self) -> Iterator[Outcome[BalanceT]]:
        return iter(self._outcomes)

    def __repr__(self) -> str:
        stale = f" ({len(self.stale)} stale)" if self.stale else ""
        return f"<Report of {len(self)} keys: {len(self.succeeded)} checked{stale}, {len(self.failed)} failed>"

    @property
    def ok(self) -> bool:
        """Whether every key has a balance. An empty report is ok."""
        return not self.failed

    @cached_property
    def succeeded(self) -> tuple[Outcome[BalanceT], ...]:
        """The outcomes with a balance."""
        return tuple(outcome for outcome in self._outcomes if outcome.balance is not None)

    @cached_property
    def failed(self) -> tuple[Outcome[BalanceT], ...]:
        """The outcomes with an error: their credits are unknown."""
        return tuple(outcome for outcome in self._outcomes if outcome.balance is None)

    @cached_property
    def stale(self) -> tuple[Outcome[BalanceT], ...]:
        """The outcomes with a balance that is older than was asked for. They count among the succeeded, and in all sums."""
        return tuple(outcome for outcome in self if outcome.stale)

    @property
    def total_credits(self) -> Decimal | None:
        """Credits of all accounts whose balance is known, exact to the last digit; each account once.

        What failed is left out, so look at `ok` too; what is `stale` is in it. None when there were keys and nothing is known
        of any.
        """
        if self and not self.succeeded:
            return None
        return _sum(credits for credits in self._credits.values() if credits is not None)

    @property
    def accounts(self) -> Mapping[str, Decimal | None]:
        """Credits of each declared account, in the order of their first keys; None where all its keys failed."""
        return {account: credits for account, credits in self._credits.items() if isinstance(account, str)}

    @hides_arguments
    def ranked(self, min_credits: Decimal | float = 0) -> tuple[Outcome[BalanceT], ...]:
        """The keys whose account holds at least `min_credits`, richest account first, ties in the order given.

        Stale ones come last, failed ones are left out.

        Raises:
            ConfigurationError: `min_credits` is not a finite number.
        """
        floor = _decimal("min_credits", min_credits)
        rich = (outcome for outcome in self.succeeded if self.credits_of(outcome) >= floor)
        return tuple(sorted(rich, key=lambda outcome: (not outcome.stale, self.credits_of(outcome)), reverse=True))

    @hides_arguments
    def low(self, threshold: Decimal | float) -> tuple[Outcome[BalanceT], ...]:
        """The keys whose account holds less than `threshold` credits, in the order given. Failed keys are left out.

        Raises:
            ConfigurationError: `threshold` is not a finite number.
        """
        ceiling = _decimal("threshold", threshold)
        return tuple(outcome for outcome in self.succeeded if self.credits_of(outcome) < ceiling)

    @property
    def lookalikes(self) -> tuple[tuple[Outcome[BalanceT], ...], ...]:
        """Groups of different undeclared keys whose answers are the same to the last digit, so may share an account.

        No answer names its account. Where a group does share one, `total_credits` counts it more than once until the keys
        declare it.
        """
        groups: defaultdict[Hashable, dict[bytes, Outcome[BalanceT]]] = defaultdict(dict)
        for outcome in self.succeeded:
            digest = outcome.key.digest
            if digest not in self._declared and outcome.balance is not None:
                groups[_answer(outcome.balance)].setdefault(digest, outcome)
        return tuple(tuple(group.values()) for group in groups.values() if len(group) > 1)

    @property
    def available_credits(self) -> Decimal:
        """Credits to count on: as `total_credits`, without what may be counted twice; 0 when nothing is known.

        An undeclared key whose answer is the same as another's may draw from that one's account, and adds nothing; nor does
        an account of which another key has since been told that it is out of credits (402).
        """
        spent = {self._account(each): each.checked_at for each in self.failed if isinstance(each.error, PaymentRequiredError)}
        known = [
            (account, balance)
            for account, balance in self._newest.items()
            if balance is not None and not (account in spent and spent[account] > balance.checked_at)
        ]
        # A declared account, known by a str, counts for itself, whatever others answer.
        declared = [balance for account, balance in known if isinstance(account, str)]
        answers = {_answer(balance) for balance in declared}
        apart = {_answer(balance): balance for account, balance in known if not isinstance(account, str)}
        return _sum(balance.credits for balance in [*declared, *(apart[answer] for answer in apart.keys() - answers)])

    @hides_arguments
    def require(self, credits: Decimal | float) -> None:
        """Do nothing when there are so many `available_credits`.

        Raises:
            InsufficientCreditsError: `available_credits` is less.
            ConfigurationError: `credits` is no finite number of at least 0.
        """
        needed, available = needed_credits(credits), self.available_credits
        if available >= needed:
            return
        unknown = tuple(outcome.key.label for outcome in self.failed)
        stale = tuple(outcome.key.label for outcome in self.stale)
        message = f"{credits_text(needed)} credits are needed and {credits_text(available)} are known to be there"
        message += _listed("; unknown", unknown) + _listed("; stale", stale)
        raise InsufficientCreditsError(message, needed=needed, available=available, unknown=unknown, stale=stale)

    def raise_on_error(self) -> None:
        """Do nothing when every key has a balance.

        Raises:
            ExceptionGroup: All the errors of the failed keys.
        """
        errors = [outcome.error for outcome in self.failed if outcome.error is not None]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(self)} keys could not be checked", errors)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the totals, and every outcome by its key's name; credits as text."""
        return {
            "ok": self.ok,
            "checked": len(self.succeeded),
            "failed": len(self.failed),
            "stale": len(self.stale),
            "total_credits": _text(self.total_credits),
            "accounts": {name: _text(credits) for name, credits in self.accounts.items()},
            "lookalikes": [[outcome.key.label for outcome in group] for group in self.lookalikes],
            "outcomes": [outcome.to_dict() for outcome in self],
        }

    def credits_of(self, outcome: Outcome[Any]) -> Decimal:
        """Credits of the account that a key which has a balance draws from: its account's newest answer."""
        credits = self._credits[self._account(outcome)]
        assert credits is not None
        return credits

    @cached_property
    def _declared(self) -> Mapping[bytes, str]:
        # The same secret may stand in the pool with its account and without.
        return {outcome.key.digest: outcome.key.account for outcome in self._outcomes if outcome.key.account is not None}

    def _account(self, outcome: Outcome[Any]) -> Hashable:
        digest = outcome.key.digest
        return self._declared.get(digest, digest)

    @cached_property
    def _newest(self) -> Mapping[Hashable, Balance | None]:
        """The newest answer of each account, declared or not; None where nothing is known."""
        newest: dict[Hashable, Balance | None] = {}
        for outcome in self._outcomes:
            account, balance = self._account(outcome), outcome.balance
            known = newest.setdefault(account, balance)
            if balance is not None and (known is None or balance.checked_at >= known.checked_at):
                newest[account] = balance
        return newest

    @cached_property
    def _credits(self) -> Mapping[Hashable, Decimal | None]:
        """The credits of that."""
        return {account: None if balance is None else balance.credits for account, balance in self._newest.items()}


def needed_credits(credits: Decimal | float, margin: Decimal | float = 1) -> Decimal:
    """What a batch of so many credits needs, with its margin.

    Raises:
        ConfigurationError: One of them is no finite number of at least 0.
    """
    factors = _decimal("credits", credits), _decimal("margin", margin)
    for what, factor in zip(("credits", "margin"), factors, strict=True):
        check_number(what, float(factor), minimum=0)
    try:
        return _EXACT.multiply(*factors)
    except decimal.Inexact:
        pass  # raised below, where no `except` block links it
    raise ConfigurationError("credits and margin have too many digits; round them up")


def _sum(numbers: Iterable[Decimal]) -> Decimal:
    with decimal.localcontext(_EXACT):
        return sum(numbers, Decimal(0))


def _decimal(what: str, number: Decimal | float) -> Decimal:
    if not isinstance(number, Decimal):
        check_number(what, number)
        return Decimal(str(number))
    if not number.is_finite():
        check_number(what, number)
    return number


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}"


def _text(credits: Decimal | None) -> str | None:
    return None if credits is None else credits_text(credits)


# What differs between two answers about one account.
_OF_ONE_ANSWER = {"key", "checked_at", "request_id", "rate_limit", "stale"}


def _answer(balance: Balance) -> str:
    """What the server said of the account."""
    if not isinstance(balance, Account):
        return str(balance.credits)
    fields = attrs.asdict(balance, recurse=False)
    return repr({name: value for name, value in fields.items() if name not in _OF_ONE_ANSWER})
