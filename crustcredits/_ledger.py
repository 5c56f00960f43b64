"""The accounts of a pool: which keys share one, its newest balance, and its credits to rely on.

No answer of the API names its account, so accounts are those that keys declare. This module must
not know reports.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

import attrs

from crustcredits._amounts import exact_product, exact_sum
from crustcredits._errors import PaymentRequiredError
from crustcredits._models import Account, Balance, BalanceT, Known, Outcome, Unknown, is_newer


class Ledger:
    """The accounts of a pool, each with its newest balance, however many keys share it.

    A declared account is identified by its name, a `str`. A key without one is an account of its
    own, identified by the digest of its secret.
    """

    def __init__(self, outcomes: Sequence[Outcome[Any]]) -> None:
        self._outcomes = outcomes

    def account_of(self, outcome: Outcome[Any]) -> Hashable:
        """The account of an outcome's key."""
        digest = outcome.key.digest
        return self._declared.get(digest, digest)

    @cached_property
    def newest(self) -> Mapping[Hashable, Balance | None]:
        """The balance of each account, declared or not, that arrived last; None without one."""
        newest: dict[Hashable, Balance | None] = {}
        for outcome in self._outcomes:
            account, balance = self.account_of(outcome), outcome.balance
            known = newest.setdefault(account, balance)
            if balance is not None and (known is None or is_newer(balance, known)):
                newest[account] = balance
        return newest

    @cached_property
    def known(self) -> Mapping[Hashable, Balance]:
        """The newest balance of each account that has one."""
        return {account: balance for account, balance in self.newest.items() if balance is not None}

    @cached_property
    def credits(self) -> Mapping[Hashable, Decimal | None]:
        """The credits of each account's newest balance; None without one."""
        return {
            account: None if balance is None else balance.credits
            for account, balance in self.newest.items()
        }

    @property
    def spent(self) -> set[Hashable]:
        """The accounts of which a key got a 402 (out of credits) after the newest balance."""
        return {
            account
            for account, balance in self.known.items()
            if account in self._refused and is_newer(self._refused[account], balance)
        }

    def may_hold_more(self, outcome: Unknown) -> bool:
        """Whether the account of a failed key may hold credits that are not known.

        No other answer tells its balance, and no 402 says that it is spent.
        """
        account = self.account_of(outcome)
        return self.newest[account] is None and account not in self._refused

    def below(self, ceiling: Decimal | None, share: Decimal | None) -> Mapping[Hashable, Balance]:
        """The known balances that are too low.

        Such a balance has less than `ceiling` credits, or less than `share` of its recurring grant.
        """
        return {
            account: balance
            for account, balance in self.known.items()
            if (ceiling is not None and balance.credits < ceiling)
            or (share is not None and _is_below(balance, share))
        }

    def lookalikes(
        self, outcomes: Iterable[Known[BalanceT]]
    ) -> tuple[tuple[Known[BalanceT], ...], ...]:
        """Groups of different undeclared keys with identical answers."""
        groups: defaultdict[Hashable, dict[bytes, Known[BalanceT]]] = defaultdict(dict)
        for outcome in outcomes:
            digest = outcome.key.digest
            if digest not in self._declared:
                groups[answer_of(outcome.balance)].setdefault(digest, outcome)
        return tuple(tuple(group.values()) for group in groups.values() if len(group) > 1)

    def available_credits(self) -> Decimal:
        """Credits to rely on, at least 0.

        An undeclared key adds nothing when another key has the identical answer. An account that is
        spent or overdrawn adds nothing.
        """
        known, spent = self.known, self.spent
        # A declared account always counts, even with an identical answer.
        declared = {account for account in known if isinstance(account, str)}
        counted = [known[account] for account in known if account in declared - spent]
        answers = {answer_of(known[account]) for account in declared | spent}
        for account, balance in known.items():
            if account not in declared and answer_of(balance) not in answers:
                answers.add(answer_of(balance))
                counted.append(balance)
        return exact_sum(max(balance.credits, Decimal(0)) for balance in counted)

    @cached_property
    def _declared(self) -> Mapping[bytes, str]:
        # The same secret may be in the pool twice, with its account and without.
        return {
            outcome.key.digest: outcome.key.account
            for outcome in self._outcomes
            if outcome.key.account is not None
        }

    @cached_property
    def _refused(self) -> Mapping[Hashable, Unknown]:
        """The last 402 (out of credits) of each account that has one."""
        refused: dict[Hashable, Unknown] = {}
        for each in self._outcomes:
            if isinstance(each, Unknown) and isinstance(each.error, PaymentRequiredError):
                account = self.account_of(each)
                last = refused.get(account, each)
                refused[account] = each if is_newer(each, last) else last
        return refused


def _is_below(balance: Balance, share: Decimal) -> bool:
    """Whether less than `share` of the recurring grant is left; False without a grant."""
    if not isinstance(balance, Account) or not balance.recurring_credits:
        return False
    return balance.credits < exact_product(balance.recurring_credits, share)


# Fields that may differ between two answers about the same account.
_OF_ONE_ANSWER = {"key", "checked_at", "request_id", "rate_limit", "stale", "_order"}


def answer_of(balance: Balance) -> Hashable:
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
