"""`PoolFlow`: the calls of a collection of known size, as numbers until their turn comes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import defaultdict, deque
from collections.abc import Hashable, Sequence
from typing import Protocol

from crustcredits._ratelimit.flow import Call, Flow, Kind

# Stands for the index of a number that has left its pool's array.
_GONE = 2**32 - 1


class PoolQueue(Protocol):
    """Where the numbers of a pool wait: `FairQueue`.

    Attributes:
        length: How many calls and numbers wait there.
    """

    length: int

    def remove_pool(self, pool: PoolFlow) -> None: ...


class PoolFlow(Flow, ABC):
    """The flow of a collection of known size.

    Its calls are numbers, without an object each, until their turn comes. Accounts take turns here
    too: a number without a declared account is an account of its own.

    Args:
        accounts: The declared account of each number, or None.

    Attributes:
        queue: The queue in which the numbers wait, if any.
        waiting: How many numbers wait.
    """

    __slots__ = (
        "_accounts",
        "_base",
        "_counts",
        "_groups",
        "_head",
        "_numbers",
        "_turns",
        "_where",
        "queue",
        "waiting",
    )

    def __init__(self, accounts: Sequence[Hashable | None]) -> None:
        super().__init__(Kind.MANY)
        self.queue: PoolQueue | None = None
        self.waiting = len(accounts)
        self._accounts = accounts
        self._numbers = array("I", range(len(accounts)))  # waiting numbers, to draw from
        self._where = array("I", self._numbers)  # the index of each number in `_numbers`
        self._base = 0  # the ticket of number 0
        self._head = 0  # the first number without a declared account that may wait
        # Declared accounts, each with the ticket of its turn.
        self._turns: deque[tuple[int, Hashable]] = deque()
        self._groups: defaultdict[Hashable, deque[int]] = defaultdict(deque)
        for number, account in enumerate(accounts):
            if account is not None:
                if account not in self._groups:
                    self._turns.append((number, account))
                self._groups[account].append(number)
        # Waiting numbers of each declared account.
        self._counts = {account: len(numbers) for account, numbers in self._groups.items()}

    @abstractmethod
    def begin(self, number: int) -> Call:
        """The call of a number whose turn has come."""

    def waits(self, number: int) -> bool:
        """Whether the turn of this number is still to come."""
        return self._where[number] != _GONE

    def most_before(self, number: int) -> int:
        """At most so many calls of the pool start before a number without a declared account.

        0 for a number of a declared account, whose turn the number does not tell.
        """
        if self._accounts[number] is not None:
            return 0
        self._skip()
        return min(number - self._head, self.waiting - 1)

    def take_out(self, number: int) -> None:
        """Take a waiting number out."""
        last = self._numbers.pop()
        where = self._where[number]
        if last != number:
            self._numbers[where] = last
            self._where[last] = where
        self._where[number] = _GONE
        self.waiting -= 1
        account = self._accounts[number]
        if account is not None:
            self._counts[account] -= 1
        if self.queue is not None:
            self.queue.length -= 1

    def enter(self, queue: PoolQueue, ticket: int) -> int:
        """Let all waiting numbers enter a queue, from this ticket on. Returns the last ticket."""
        self.queue = queue
        shift = ticket - self.next_ticket()
        self._base += shift
        self._turns = deque((turn + shift, account) for turn, account in self._turns)
        return max(self._base + len(self._accounts), self._turns[-1][0] if self._turns else 0)

    def next_ticket(self) -> int:
        """The ticket of the number whose turn is next; at least one number waits."""
        self._skip()
        return self._base + self._head if self._is_lone_next() else self._turns[0][0]

    def next(self, ticket: int) -> int:
        """The number whose turn it is. The next number of its account gets `ticket`."""
        head = self._head
        if not self._turns and self._where[head] != _GONE:
            return head
        self._skip()
        if self._is_lone_next():
            return self._head
        _, account = self._turns.popleft()
        numbers = self._groups[account]
        number = numbers.popleft()
        if numbers:
            self._turns.append((ticket, account))
        return number

    def draw(self, index: int) -> int:
        """The number at this index of the waiting numbers, in no order."""
        return self._numbers[index]

    def of_account(self, account: Hashable) -> int:
        """How many numbers of a declared account wait."""
        return self._counts.get(account, 0)

    def _is_lone_next(self) -> bool:
        """Whether the next turn is that of a number without a declared account."""
        if not self._turns:
            return True
        return self._head < len(self._accounts) and self._base + self._head < self._turns[0][0]

    def _skip(self) -> None:
        """Pass over the numbers that have left."""
        where, accounts, head = self._where, self._accounts, self._head
        while head < len(accounts) and (where[head] == _GONE or accounts[head] is not None):
            head += 1
        self._head = head
        while self._turns:
            numbers = self._groups[self._turns[0][1]]
            while numbers and where[numbers[0]] == _GONE:
                numbers.popleft()
            if numbers:
                return
            self._turns.popleft()
