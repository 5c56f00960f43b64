"""`FairQueue`: calls that wait, and whose turn it is. It knows no time and no limits."""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Hashable

# Of so many draws beside calls that were asked before, one goes by turn.
_DRAWS = 4
# Calls that have left out of turn are cleared away when they are so many more than those that are there.
_FEW = 64


class Kind(enum.IntEnum):
    """Who asks, the best first: a call has the best kind of those who await it."""

    SINGLE = 0  # for one key
    MANY = 1  # a check or a stream
    BACKGROUND = 2  # nobody: it renews what is known


class Flow:
    """The calls of one `check` or `stream`; all single calls together are one flow, and so are all that nobody awaits."""

    __slots__ = ("kind",)

    def __init__(self, kind: Kind = Kind.MANY) -> None:
        self.kind = kind


class Call:
    """One question about one key, as the scheduler sees it.

    Attributes:
        account: The account whose tokens it takes; of a key without a declared one the key itself.
        flow: The flow it belongs to.
        was_asked: Whether a request was sent for it before.
        spared: Refusals that cost it no attempt so far.
        queue: The queue in which it waits, if any.
        called: Whether it was let out of its account's queue (1), or of the common bucket's (2), and has not started since.
    """

    __slots__ = ("_index", "_pool", "account", "called", "flow", "key", "queue", "spared", "was_asked")

    def __init__(self, key: Hashable, account: Hashable, flow: Flow) -> None:
        self.key = key
        self.account = account
        self.flow = flow
        self.was_asked = False
        self.spared = 0
        self.called = 0
        self.queue: FairQueue | None = None
        self._pool: list[Call] = []
        self._index = 0


class _Line:
    """The calls of one flow in one queue: by account, in turns, and in two arrays to draw from."""

    __slots__ = ("accounts", "asked", "fresh", "left", "turns")

    def __init__(self) -> None:
        self.left = 0  # calls that have left out of turn, and may still stand in their account's deque
        self.accounts: dict[Hashable, deque[Call]] = {}
        self.turns: deque[Hashable] = deque()
        self.fresh: list[Call] = []
        self.asked: list[Call] = []

    def leave_out_of_turn(self, queue: FairQueue) -> None:
        """A call has left that was not next. Deques that hold more of these than of others are cleared of them."""
        self.left += 1
        there = len(self.fresh) + len(self.asked)
        if there and self.left <= there + _FEW:
            return
        self.left = 0
        for account in list(self.turns):
            calls = deque(call for call in self.accounts[account] if call.queue is queue)
            if calls:
                self.accounts[account] = calls
            else:
                del self.accounts[account]
        self.turns = deque(account for account in self.turns if account in self.accounts)

    def next(self, queue: FairQueue) -> Call:
        """The first call of the account whose turn it is. Calls that have left meanwhile are passed over."""
        while True:
            account = self.turns.popleft()
            calls, found = self.accounts[account], None
            while calls and found is None:
                call = calls.popleft()
                found = call if call.queue is queue else None
            if calls:
                self.turns.append(account)
            else:
                del self.accounts[account]
            if found is not None:
                return found


class FairQueue:
    """Foreground flows take turns, then background flows. In a flow accounts take turns; of an account the first call comes first.

    Each operation takes constant time, amortised.

    Attributes:
        length: How many calls wait in it.
    """

    __slots__ = ("_background", "_draws", "_foreground", "_lines", "length")

    def __init__(self) -> None:
        self._lines: dict[Flow, _Line] = {}
        self._foreground: deque[Flow] = deque()
        self._background: deque[Flow] = deque()
        self.length = 0
        self._draws = 0

    def __len__(self) -> int:
        return self.length

    @property
    def has_foreground(self) -> bool:
        """Whether a call that somebody awaits may be among them; `pop` takes these first."""
        while self._foreground:
            flow = self._foreground[0]
            line = self._lines[flow]
            if line.fresh or line.asked:
                return True
            self._foreground.popleft()
            del self._lines[flow]
        return False

    def of_account(self, account: Hashable, *, background: bool) -> int:
        """How many calls of an account it has, that somebody awaits or, with `background`, that nobody does."""
        lines = [line for flow, line in self._lines.items() if (flow.kind is Kind.BACKGROUND) is background]
        return sum(call.queue is self for line in lines for call in line.accounts.get(account, ()))

    def push(self, call: Call) -> None:
        """Add a call at the end of its account."""
        line = self._lines.get(call.flow)
        if line is None:
            line = self._lines[call.flow] = _Line()
            (self._background if call.flow.kind is Kind.BACKGROUND else self._foreground).append(call.flow)
        calls = line.accounts.get(call.account)
        if calls is None:
            calls = line.accounts[call.account] = deque()
            line.turns.append(call.account)
        calls.append(call)
        pool = line.asked if call.was_asked else line.fresh
        call.queue, call._pool, call._index = self, pool, len(pool)  # noqa: SLF001  # its place is this module's
        pool.append(call)
        self.length += 1

    def remove(self, call: Call) -> None:
        """Take out a call, wherever it stands."""
        self._take_out(call)
        self._lines[call.flow].leave_out_of_turn(self)

    def _take_out(self, call: Call) -> None:
        pool, index = call._pool, call._index  # noqa: SLF001  # as above
        last = pool.pop()
        if last is not call:
            pool[index] = last
            last._index = index  # noqa: SLF001  # as above
        call.queue = None
        self.length -= 1

    def pop(self, draw: random.Random | None = None, *, draw_singles: bool = False) -> Call:
        """Take out the call whose turn it is; with `draw` a random one of that flow that was never asked, if it has one.

        Single calls keep their turns unless `draw_singles`. Then new ones may come for ever, so of several draws one is the call
        whose turn it is, and those that were asked before come to their turn too. The queue must not be empty.
        """
        while True:
            ring = self._foreground or self._background
            flow = ring.popleft()
            line = self._lines[flow]
            if not line.fresh and not line.asked:
                del self._lines[flow]
                continue
            draws = draw is not None and line.fresh and (draw_singles or flow.kind is not Kind.SINGLE)
            self._draws += bool(draw_singles and line.asked)
            if draw is not None and draws and (not draw_singles or not line.asked or self._draws % _DRAWS):
                call = line.fresh[draw.randrange(len(line.fresh))]
                self._take_out(call)
                line.leave_out_of_turn(self)
            else:
                call = line.next(self)
                self._take_out(call)
            if line.fresh or line.asked:
                ring.append(flow)
            else:
                del self._lines[flow]
            return call
