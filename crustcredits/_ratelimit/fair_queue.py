"""`FairQueue`: the order in which waiting calls take turns. It knows no time and no limits."""

from __future__ import annotations

import enum
import math
import random
from abc import ABC, abstractmethod
from array import array
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Final

# While single calls are drawn too, one call out of this many goes by turn instead of by draw.
_DRAWS = 4
# Calls that left out of turn are cleared from the deques once there are this many more of them than
# waiting calls.
_FEW = 64
# Stands for the index of a number that has left its pool's array.
_GONE = 2**32 - 1


class Kind(enum.IntEnum):
    """The priority of a call, the highest first: the highest one of its waiters."""

    SINGLE = 0  # a call for one key
    MANY = 1  # a check or a stream
    BACKGROUND = 2  # no waiter: it renews a cache entry


KINDS: Final = tuple(Kind)  # iterates faster than the class


class Flow:
    """The calls of one `check` or `stream`; single calls share one flow, background calls another.

    Attributes:
        kind: The kind of its calls.
        on_parked: Called with 1 when one of its calls begins to wait for its own account or for a
            retry, and with -1 when that is over.
    """

    __slots__ = ("kind", "on_parked")

    def __init__(
        self, kind: Kind = Kind.MANY, on_parked: Callable[[int], None] | None = None
    ) -> None:
        self.kind = kind
        self.on_parked = on_parked


class Call:
    """One question about one key, as the scheduler sees it.

    Attributes:
        account: The account whose tokens it takes; for a key without a declared account the key
            itself.
        flow: The flow it belongs to.
        was_sent: Whether a request was sent for it before.
        spared: Refusals that cost it no attempt so far.
        queue: The queue in which it waits, if any.
        let_out_of: The token queue that has let it out, while it has not started since.
        deadline: Not before the last of its waiters leaves.
    """

    __slots__ = (
        "_index",
        "_list",
        "account",
        "deadline",
        "flow",
        "key",
        "let_out_of",
        "queue",
        "spared",
        "was_sent",
    )

    _list: list[Call]  # the list that holds it while it waits
    _index: int

    def __init__(self, key: Hashable, account: Hashable, flow: Flow) -> None:
        self.key = key
        self.account = account
        self.flow = flow
        self.was_sent = False
        self.spared = 0
        self.let_out_of: object | None = None
        self.deadline = math.inf
        self.queue: FairQueue | None = None


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
        self.queue: FairQueue | None = None
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
        """Take a number out of those that wait."""
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

    def enter(self, queue: FairQueue, ticket: int) -> int:
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


class _FlowQueue:
    """The calls of one flow in one queue: by account, in turns, and in two arrays to draw from."""

    __slots__ = (
        "accounts",
        "drawn",
        "left",
        "pool",
        "returned",
        "sent",
        "tickets",
        "turns",
        "unsent",
        "was_returned",
    )

    def __init__(self) -> None:
        # Calls that have left out of turn, and may still be in their account's deque.
        self.left = 0
        self.drawn: set[Call] = set()  # of these, the ones that may come again
        self.accounts: dict[Hashable, Call | deque[Call]] = {}
        # Accounts, each with the ticket of its turn.
        self.turns: deque[tuple[int, Hashable]] = deque()
        # Accounts whose call was pushed as the first: they take turns with all others.
        self.returned: deque[Hashable] = deque()
        self.was_returned = False  # whether the last turn was of one of these
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

    def add_first(self, call: Call) -> None:
        """Add a call before all others of its account, which has an early turn if it had none."""
        if self.drawn and self._is_back(call):
            return
        calls = self.accounts.get(call.account)
        if calls is None:
            self.accounts[call.account] = call
            self.returned.append(call.account)
        elif isinstance(calls, deque):
            calls.appendleft(call)
        else:
            self.accounts[call.account] = deque((call, calls))

    def add(self, call: Call) -> None:
        """Add a call at the end of its account."""
        if self.drawn and self._is_back(call):
            return
        calls = self.accounts.get(call.account)
        if calls is None:  # most accounts have one call, and a deque is large
            self.accounts[call.account] = call
            self.tickets += 1
            self.turns.append((self.tickets, call.account))
        elif isinstance(calls, deque):
            calls.append(call)
        else:
            self.accounts[call.account] = deque((calls, call))

    def leave_out_of_turn(self, queue: FairQueue) -> None:
        """Note that a call has left that was not next.

        When more such calls than waiting ones are in the deques, the deques are cleared of them.
        """
        self.left += 1
        there = len(self.unsent) + len(self.sent)
        if there and self.left <= there + _FEW:
            return
        self.left = 0
        self.drawn.clear()
        for account in (*self.returned, *(account for _, account in self.turns)):
            calls = [call for call in self._calls(account) if self._waits(call, queue)]
            if calls:
                self.accounts[account] = deque(calls)
            else:
                del self.accounts[account]
        self.turns = deque(turn for turn in self.turns if turn[1] in self.accounts)
        self.returned = deque(account for account in self.returned if account in self.accounts)

    def next(self, queue: FairQueue) -> Call | int:
        """The first call of the account whose turn it is, or the number of the pool.

        Passes over calls that have left meanwhile.
        """
        while True:
            pool = self.pool if self.pool is not None and self.pool.waiting else None
            self.was_returned = bool(self.returned) and not (
                self.was_returned and (self.turns or pool is not None)
            )
            if self.was_returned:
                account = self.returned.popleft()
            elif pool is not None and (not self.turns or pool.next_ticket() < self.turns[0][0]):
                self.tickets += 1
                return pool.next(self.tickets)
            else:
                _, account = self.turns.popleft()
            found = self._first_of(account, queue)
            if found is not None:
                return found

    def _first_of(self, account: Hashable, queue: FairQueue) -> Call | None:
        """Take out the first call of an account, which has a later turn if others wait."""
        calls = self.accounts[account]
        found: Call | None = None
        if isinstance(calls, deque):
            while calls and found is None:
                call = calls.popleft()
                if self._waits(call, queue):
                    found = call
                else:
                    self.drawn.discard(call)
        elif self._waits(calls, queue):
            found = calls
        else:
            self.drawn.discard(calls)
        if isinstance(calls, deque) and calls:
            self.tickets += 1
            self.turns.append((self.tickets, account))
        else:
            del self.accounts[account]
        return found

    def _is_back(self, call: Call) -> bool:
        """Whether a call that was drawn comes again, at its old place among its account's calls."""
        if call not in self.drawn:
            return False
        self.drawn.remove(call)
        self.left -= 1
        return True

    def _waits(self, call: Call, queue: FairQueue) -> bool:
        """Whether a call waits here, and has not left out of turn."""
        return call.queue is queue and (call._list is self.unsent or call._list is self.sent)  # noqa: SLF001  # as below

    def of_account(self, queue: FairQueue, account: Hashable) -> int:
        """How many calls of an account wait."""
        numbers = 0 if self.pool is None else self.pool.of_account(account)
        return numbers + sum(self._waits(call, queue) for call in self._calls(account))

    def _calls(self, account: Hashable) -> Iterable[Call]:
        calls = self.accounts.get(account, ())
        return (calls,) if isinstance(calls, Call) else calls


class FairQueue:
    """Foreground flows take turns, then background flows.

    In a flow accounts take turns; of an account the first call comes first. Each operation takes
    constant time, amortised.

    Attributes:
        length: How many calls wait in it.
    """

    __slots__ = ("_background", "_draws", "_flow_queues", "_foreground", "_in_background", "length")

    def __init__(self) -> None:
        self._flow_queues: dict[Flow, _FlowQueue] = {}
        self._foreground: deque[Flow] = deque()
        self._background: deque[Flow] = deque()
        self.length = 0
        self._in_background = 0
        self._draws = 0

    def __len__(self) -> int:
        return self.length

    @property
    def has_foreground(self) -> bool:
        """Whether it has foreground calls; `pop` takes these first."""
        return self.length > self._in_background

    def of_account(self, account: Hashable, *, background: bool) -> int:
        """How many foreground calls of an account wait or, with `background`, background calls."""
        queues = [
            flow_queue
            for flow, flow_queue in self._flow_queues.items()
            if (flow.kind is Kind.BACKGROUND) is background
        ]
        return sum(flow_queue.of_account(self, account) for flow_queue in queues)

    def of_flow(self, flow: Flow) -> int:
        """How many calls of a flow wait."""
        flow_queue = self._flow_queues.get(flow)
        return 0 if flow_queue is None else flow_queue.length

    def lengths(self) -> dict[Flow, int]:
        """How many calls of each flow wait."""
        return {flow: flow_queue.length for flow, flow_queue in self._flow_queues.items()}

    def push(self, call: Call, *, first: bool = False) -> None:
        """Add a call at the end of its account, or as the `first` of its account and flow."""
        flow = call.flow
        flow_queue = self._flow_queues.get(flow) or self._queue_of(flow)
        if first:
            flow_queue.add_first(call)
        else:
            flow_queue.add(call)
        calls = flow_queue.sent if call.was_sent else flow_queue.unsent
        call.queue, call._list, call._index = self, calls, len(calls)  # noqa: SLF001  # only this module uses them
        calls.append(call)
        self.length += 1
        if flow.kind is Kind.BACKGROUND:
            self._in_background += 1

    def push_pool(self, pool: PoolFlow) -> None:
        """Add the waiting numbers of a pool at the end.

        They leave the queue in which they waited, if any.
        """
        if pool.queue is not None:
            pool.queue.remove_pool(pool)
        if pool.waiting:
            flow_queue = self._queue_of(pool)
            flow_queue.pool, flow_queue.tickets = pool, pool.enter(self, flow_queue.tickets + 1)
            self.length += pool.waiting

    def remove_pool(self, pool: PoolFlow) -> None:
        """Take out all numbers of a pool that wait here."""
        pool.queue = None
        flow_queue = self._flow_queues.get(pool)
        if flow_queue is not None:
            flow_queue.pool = None
            self.length -= pool.waiting
            self._forget_if_empty(pool, flow_queue)

    def remove(self, call: Call) -> None:
        """Take out a call from any place in the queue."""
        self._take_out(call)
        flow_queue = self._flow_queues[call.flow]
        flow_queue.leave_out_of_turn(self)
        self._forget_if_empty(call.flow, flow_queue)

    def pop(self, draw: random.Random | None = None, *, draw_singles: bool = False) -> Call:
        """Take out the call whose turn it is, or with `draw` a random one of its flow.

        A draw takes calls for which no request was sent yet, if there are any. Single calls are
        drawn only with `draw_singles`. New calls may come for ever then, so one of several draws
        goes by turn, and calls for which a request was sent get their turn too. The queue must not
        be empty.
        """
        while True:
            ring = self._foreground or self._background
            flow = ring.popleft()
            flow_queue = self._flow_queues[flow]
            if flow_queue.length:
                break
            del self._flow_queues[flow]
        ring.append(flow)
        never_sent = (
            flow_queue.never_sent
            if draw is not None and (draw_singles or flow.kind is not Kind.SINGLE)
            else 0
        )
        self._draws += bool(draw_singles and flow_queue.sent)
        if (
            draw is not None
            and never_sent
            and (not draw_singles or not flow_queue.sent or self._draws % _DRAWS)
        ):
            index = draw.randrange(never_sent)
            if index >= len(flow_queue.unsent):
                assert flow_queue.pool is not None
                number = flow_queue.pool.draw(index - len(flow_queue.unsent))
                return self._begin(flow_queue.pool, number, flow_queue)
            call = flow_queue.unsent[index]
            flow_queue.drawn.add(call)
            self.remove(call)
            return call
        found = flow_queue.next(self)
        if isinstance(found, int):
            assert flow_queue.pool is not None
            return self._begin(flow_queue.pool, found, flow_queue)
        self._take_out(found)
        self._forget_if_empty(flow, flow_queue)
        return found

    def _begin(self, pool: PoolFlow, number: int, flow_queue: _FlowQueue) -> Call:
        pool.take_out(number)
        self._forget_if_empty(pool, flow_queue)
        return pool.begin(number)

    def _forget_if_empty(self, flow: Flow, flow_queue: _FlowQueue) -> None:
        """Forget the flow of a check or a stream of which no call waits.

        The flow may have ended, and holds much memory.
        """
        if flow.kind is Kind.MANY and not flow_queue.length:
            del self._flow_queues[flow]
            self._foreground.remove(flow)

    def _queue_of(self, flow: Flow) -> _FlowQueue:
        flow_queue = self._flow_queues.get(flow)
        if flow_queue is None:
            flow_queue = self._flow_queues[flow] = _FlowQueue()
            (self._background if flow.kind is Kind.BACKGROUND else self._foreground).append(flow)
        return flow_queue

    def _take_out(self, call: Call) -> None:
        calls, index = call._list, call._index  # noqa: SLF001  # as above
        last = calls.pop()
        if last is not call:
            calls[index] = last
            last._index = index  # noqa: SLF001  # as above
        call.queue = None
        self.length -= 1
        if call.flow.kind is Kind.BACKGROUND:
            self._in_background -= 1
