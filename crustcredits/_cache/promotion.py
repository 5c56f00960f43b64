"""`Promotion`: moves a call to the flow of a waiter that joins it, where it starts sooner."""

from __future__ import annotations

import math

from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.pools import Pools
from crustcredits._cache.shared_call import SharedCall, WaitTerms
from crustcredits._ratelimit.flow import Flow

# A call with more waiters than this is not moved to a stream, so that a join costs little.
_FEW = 8


class Promotion:
    """Moves calls that further waiters join.

    A call has the highest priority of its waiters: a refresh that somebody awaits moves to the
    foreground, and a call of a check that a single caller awaits moves to the single calls. Among
    flows of one priority, only a stream with a timeout moves a call: its own flow has the turn in
    time for its deadline, and the flow in which the call waits may not.

    Args:
        dispatcher: Has the queues.
        pools: The checks in which early calls wait.
    """

    def __init__(self, dispatcher: Dispatcher, pools: Pools) -> None:
        self._dispatcher = dispatcher
        self._pools = pools

    def joined(self, call: SharedCall, flow: Flow, terms: WaitTerms) -> None:
        """Move a call that a waiter of `flow` has joined, if it starts sooner there."""
        moves = flow.kind < call.flow.kind or self._is_sooner_in(flow, call, terms)
        if call.early is not None and moves:
            self._pools.leave_early(call)
            call.flow = flow
            self._dispatcher.enter(call)
        elif moves or not call.is_foreground:
            self._dispatcher.move(call, flow)

    def _is_sooner_in(self, flow: Flow, call: SharedCall, terms: WaitTerms) -> bool:
        """Whether a call starts sooner at the end of a stream's flow than where it waits.

        A stream with a timeout takes a key that is likely to have its turn in this flow, in time
        for its deadline. Flows of a kind take turns, so fewer calls before a call mean an earlier
        turn.
        """
        is_of_stream = terms.deadline < math.inf and not terms.own_timer
        if flow is call.flow or flow.kind is not call.flow.kind or not is_of_stream:
            return False
        endpoint = self._dispatcher.endpoints[call.path]
        return endpoint.waiting_in(flow) < self._most_before(call, terms)

    def _most_before(self, call: SharedCall, terms: WaitTerms) -> int:
        """At most so many calls start before a call where it waits.

        0 if it must not move: it does not wait for its turn, or another stream or check that has an
        earlier deadline expects its turn there.
        """
        if call.early is not None:
            pool, number = call.early
            return pool.most_before(number)
        endpoint = self._dispatcher.endpoints[call.path]
        if not endpoint.waits_in_turn(call) or len(call.waiters) > _FEW:
            return 0
        if any(each.deadline < terms.deadline for each in call.waiters.values()):
            return 0
        return endpoint.waiting_in(call.flow) - 1
