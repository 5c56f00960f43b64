"""`FairQueue`: the order in which waiting calls take turns. It knows no time and no limits."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable

from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.flow_queue import FlowQueue
from crustcredits._ratelimit.pool_flow import PoolFlow

# While single calls are drawn too, one call out of this many goes by turn instead of by draw.
_DRAWS = 4


class FairQueue:
    """Foreground flows take turns, then background flows.

    In a flow accounts take turns; of an account the first call comes first. Each operation takes
    constant time, amortised.

    Attributes:
        length: How many calls wait in it.
    """

    __slots__ = ("_background", "_draws", "_flow_queues", "_foreground", "_in_background", "length")

    def __init__(self) -> None:
        self._flow_queues: dict[Flow, FlowQueue] = {}
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
        return sum(flow_queue.of_account(account) for flow_queue in queues)

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
        flow_queue.add(call, first=first)
        call.queue = self
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
        flow_queue = self._flow_queues[call.flow]
        self._take_out(call, flow_queue)
        flow_queue.leave_out_of_turn()
        self._forget_if_empty(call.flow, flow_queue)

    def pop(self, draw: random.Random | None = None, *, draw_singles: bool = False) -> Call:
        """Take out the call whose turn it is, or with `draw` a random one of its flow.

        A draw takes calls for which no request was sent yet, if there are any. Single calls are
        drawn only with `draw_singles`. New calls may come for ever then, so one of several draws
        goes by turn, and calls for which a request was sent get their turn too. The queue must not
        be empty.
        """
        flow, flow_queue = self._next_flow()
        if draw_singles and flow_queue.sent:
            self._draws += 1
            is_drawn = self._draws % _DRAWS > 0
        else:
            is_drawn = draw_singles or flow.kind is not Kind.SINGLE
        if draw is not None and is_drawn and flow_queue.never_sent:
            found = flow_queue.draw(draw)
            if isinstance(found, Call):
                self.remove(found)
                return found
        else:
            found = flow_queue.next()
            if isinstance(found, Call):
                self._take_out(found, flow_queue)
                self._forget_if_empty(flow, flow_queue)
                return found
        assert flow_queue.pool is not None, "only a pool has numbers"
        return self._begin(flow_queue.pool, found, flow_queue)

    def _next_flow(self) -> tuple[Flow, FlowQueue]:
        """The flow whose turn it is. It has its next turn after all others."""
        while True:
            ring = self._foreground or self._background
            flow = ring.popleft()
            flow_queue = self._flow_queues[flow]
            if flow_queue.length:
                ring.append(flow)
                return flow, flow_queue
            del self._flow_queues[flow]

    def _begin(self, pool: PoolFlow, number: int, flow_queue: FlowQueue) -> Call:
        pool.take_out(number)
        self._forget_if_empty(pool, flow_queue)
        return pool.begin(number)

    def _forget_if_empty(self, flow: Flow, flow_queue: FlowQueue) -> None:
        """Forget the flow of a check or a stream if none of its calls waits.

        The flow may have ended, and holds much memory.
        """
        if flow.kind is Kind.MANY and not flow_queue.length:
            del self._flow_queues[flow]
            self._foreground.remove(flow)

    def _queue_of(self, flow: Flow) -> FlowQueue:
        flow_queue = self._flow_queues.get(flow)
        if flow_queue is None:
            flow_queue = self._flow_queues[flow] = FlowQueue()
            (self._background if flow.kind is Kind.BACKGROUND else self._foreground).append(flow)
        return flow_queue

    def _take_out(self, call: Call, flow_queue: FlowQueue) -> None:
        flow_queue.take_out(call)
        call.queue = None
        self.length -= 1
        if call.flow.kind is Kind.BACKGROUND:
            self._in_background -= 1
