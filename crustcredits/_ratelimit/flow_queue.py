"""`FlowQueue`: the order in which the calls of one flow take turns in one queue."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Iterable

from crustcredits._ratelimit.flow import Call
from crustcredits._ratelimit.pool_flow import PoolFlow

# Calls that left out of turn are cleared from the deques once there are this many more of them than
# waiting calls.
_FEW = 64


class FlowQueue:
    """The calls of one flow in one queue: by account, in turns, and in two arrays to draw from."""

    __slots__ = (
        "accounts",
        "drawn",
        "left",
        "pool",
        "pushed_first",
        "sent",
        "tickets",
        "turns",
        "unsent",
        "was_pushed_first",
    )

    def __init__(self) -> None:
        # Calls that have left out of turn, and may still be in their account's deque.
        self.left = 0
        self.drawn: set[Call] = set()  # of these, the ones that may come again
        self.accounts: dict[Hashable, Call | deque[Call]] = {}
        # Accounts, each with the ticket of its turn.
        self.turns: deque[tuple[int, Hashable]] = deque()
        # Accounts whose call was pushed as the first: they take turns with all others.
        self.pushed_first: deque[Hashable] = deque()
        self.was_pushed_first = False  # whether the last turn was of one of these
        self.tickets = 0
        self.unsent: list[Call] = []
        self.sent: list[Call] = []
        self.pool: PoolFlow | None = None  # the pool with numbers that wait here too

    @property
    def length(self) -> int:
        """Calls that wait."""
        return len(self.unsent) + len(self.sent) + (0 if self.pool is None else self.pool.waiting)

    @property
    def never_sent(self) -> int:
        """Waiting calls for which no request was sent yet."""
        return len(self.unsent) + (0 if self.pool is None else self.pool.waiting)

    def add(self, call: Call, *, first: bool) -> None:
        """Add a call at the end of its account, or before all others of it."""
        if not (self.drawn and self._take_back(call)):
            if first:
                self._add_first(call)
            else:
                self._add_last(call)
        calls = self.sent if call.was_sent else self.unsent
        call.held_in, call.index = calls, len(calls)
        calls.append(call)

    def _add_first(self, call: Call) -> None:
        """Add a call before all others of its account, which has an early turn if it had none."""
        calls = self.accounts.get(call.account)
        if calls is None:
            self.accounts[call.account] = call
            self.pushed_first.append(call.account)
        elif isinstance(calls, deque):
            calls.appendleft(call)
        else:
            self.accounts[call.account] = deque((call, calls))

    def _add_last(self, call: Call) -> None:
        """Add a call at the end of its account."""
        calls = self.accounts.get(call.account)
        if calls is None:  # most accounts have one call, and a deque is large
            self.accounts[call.account] = call
            self.tickets += 1
            self.turns.append((self.tickets, call.account))
        elif isinstance(calls, deque):
            calls.append(call)
        else:
            self.accounts[call.account] = deque((calls, call))

    def take_out(self, call: Call) -> None:
        """Take a waiting call out. Its entry among its account's calls stays."""
        calls, index = call.held_in, call.index
        last = calls.pop()
        if last is not call:
            calls[index] = last
            last.index = index

    def draw(self, draw: random.Random) -> Call | int:
        """A random call, or number of the pool, for which no request was sent yet."""
        index = draw.randrange(self.never_sent)
        if index < len(self.unsent):
            call = self.unsent[index]
            self.drawn.add(call)
            return call
        assert self.pool is not None, "only a pool has further ones"
        return self.pool.draw(index - len(self.unsent))

    def leave_out_of_turn(self) -> None:
        """Note that a call has left that was not next.

        When more such calls than waiting ones are in the deques, the deques are cleared of them.
        """
        self.left += 1
        there = len(self.unsent) + len(self.sent)
        if there and self.left <= there + _FEW:
            return
        self.left = 0
        self.drawn.clear()
        for account in (*self.pushed_first, *(account for _, account in self.turns)):
            calls = [call for call in self._calls(account) if self._waits(call)]
            if calls:
                self.accounts[account] = deque(calls)
            else:
                del self.accounts[account]
        self.turns = deque(turn for turn in self.turns if turn[1] in self.accounts)
        self.pushed_first = deque(
            account for account in self.pushed_first if account in self.accounts
        )

    def next(self) -> Call | int:
        """The first call of the account whose turn it is, or the number of the pool.

        Passes over calls that have left meanwhile.
        """
        while True:
            pool = self.pool if self.pool is not None and self.pool.waiting else None
            self.was_pushed_first = bool(self.pushed_first) and not (
                self.was_pushed_first and (self.turns or pool is not None)
            )
            if self.was_pushed_first:
                account = self.pushed_first.popleft()
            elif pool is not None and (not self.turns or pool.next_ticket() < self.turns[0][0]):
                self.tickets += 1
                return pool.next(self.tickets)
            else:
                _, account = self.turns.popleft()
            found = self._first_of(account)
            if found is not None:
                return found

    def _first_of(self, account: Hashable) -> Call | None:
        """Take out the first call of an account, which has a later turn if others wait."""
        calls = self.accounts[account]
        found: Call | None = None
        if isinstance(calls, deque):
            while calls and found is None:
                call = calls.popleft()
                if self._waits(call):
                    found = call
                else:
                    self.drawn.discard(call)
        elif self._waits(calls):
            found = calls
        else:
            self.drawn.discard(calls)
        if isinstance(calls, deque) and calls:
            self.tickets += 1
            self.turns.append((self.tickets, account))
        else:
            del self.accounts[account]
        return found

    def _take_back(self, call: Call) -> bool:
        """Take back a call that was drawn, at its old position among its account's calls.

        Returns whether it was drawn.
        """
        if call not in self.drawn:
            return False
        self.drawn.remove(call)
        self.left -= 1
        return True

    def _waits(self, call: Call) -> bool:
        """Whether a call waits here, and has not left out of turn."""
        held = call.queue is not None
        return held and (call.held_in is self.unsent or call.held_in is self.sent)

    def of_account(self, account: Hashable) -> int:
        """How many calls of an account wait."""
        numbers = 0 if self.pool is None else self.pool.of_account(account)
        return numbers + sum(self._waits(call) for call in self._calls(account))

    def _calls(self, account: Hashable) -> Iterable[Call]:
        calls = self.accounts.get(account, ())
        return (calls,) if isinstance(calls, Call) else calls
