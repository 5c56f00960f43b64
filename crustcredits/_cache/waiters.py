"""`Waiters`: how waiters join a call, leave it, and reach their deadlines."""

from __future__ import annotations

import asyncio
import math

from crustcredits._cache.completion import Completion
from crustcredits._cache.deadlines import Deadlines
from crustcredits._cache.endpoint import Endpoint
from crustcredits._cache.outcomes import (
    failure,
    last_error,
    late_error,
    overload_error,
    timeout_error,
)
from crustcredits._cache.shared_call import SharedCall, Waiter, WaitTerms
from crustcredits._cache.under_way import UnderWay
from crustcredits._errors import CrustCreditsError

# Up to this many remaining waiters, the deadline is computed anew when one leaves.
_FEW = 8


class Waiters:
    """The waiters of all calls.

    A call that its last waiter leaves is dropped, unless its request is on the wire.

    Args:
        endpoints: The endpoints by their paths; they know when a request can start.
        under_way: The calls that have not ended.
        completion: Drops the calls.
    """

    def __init__(
        self, endpoints: dict[str, Endpoint], under_way: UnderWay, completion: Completion
    ) -> None:
        self._endpoints = endpoints
        self._under_way = under_way
        self._completion = completion
        self._deadlines = Deadlines(self.time_out)

    def add_first(self, call: SharedCall, waiter: Waiter, terms: WaitTerms) -> None:
        """Add the waiter that began a call."""
        call.first = waiter
        call.deadline = terms.deadline
        self._add(call, waiter, terms)

    def add(self, call: SharedCall, waiter: Waiter, terms: WaitTerms) -> None:
        """Add a waiter to a call under way."""
        call.deadline = max(call.deadline, terms.deadline) if call.waiters else terms.deadline
        self._add(call, waiter, terms)

    def _add(self, call: SharedCall, waiter: Waiter, terms: WaitTerms) -> None:
        call.waiters[waiter] = terms
        if terms.deadline < math.inf and not terms.own_timer:
            self._deadlines.add(terms.deadline, call, waiter)

    def leave(self, call: SharedCall, waiter: Waiter) -> None:
        """Remove a waiter that gives up its call.

        If it was the last one, a call that waits is dropped, and a request on the wire continues.
        """
        call.waiters.pop(waiter, None)
        if call.waiters:
            # Of many waiters the deadline stays as it is, so that thousands leave at little cost.
            if len(call.waiters) <= _FEW:
                call.deadline = max(terms.deadline for terms in call.waiters.values())
            return
        if call not in self._under_way:
            return
        call.is_foreground = False
        if call.task is None:
            self._completion.drop(call)

    def time_out(self, call: SharedCall, waiter: Waiter, *, is_late: bool = False) -> None:
        """End a waiter whose deadline has passed, or certainly passes without an answer.

        With `is_late` its turn has come, with too little time left.
        """
        terms = call.waiters.get(waiter)
        if terms is None or waiter.done():
            return
        waiter.set_result(failure(call.api_key, self._why_late(call, terms, is_late=is_late)))
        self.leave(call, waiter)

    def time_out_if_hopeless(self, call: SharedCall, waiter: Waiter, terms: WaitTerms) -> None:
        """End a new waiter whose deadline certainly passes before a request can start."""
        if terms.deadline == math.inf:
            return
        earliest = self._endpoints[call.path].earliest(call, terms.began)
        if terms.deadline <= terms.began or terms.deadline < earliest:
            self.time_out(call, waiter)

    def time_out_hopeless(self, call: SharedCall) -> None:
        """End the waiters with a deadline before the next attempt of `call` can start."""
        with_deadline = [
            (waiter, terms.deadline)
            for waiter, terms in call.waiters.items()
            if terms.deadline < math.inf
        ]
        if not with_deadline:
            return
        earliest = self._endpoints[call.path].earliest(call, _now())
        for waiter, deadline in with_deadline:
            if deadline < earliest:
                self.time_out(call, waiter)

    def time_out_all(self, call: SharedCall) -> None:
        """End all waiters: their deadlines come before an answer could."""
        for waiter in tuple(call.waiters):
            self.time_out(call, waiter, is_late=True)
        if call in self._under_way and call.task is None:
            # A waiter that was cancelled in this very iteration of the loop has not left yet.
            call.waiters.clear()
            call.is_foreground = False
            self._completion.drop(call)

    def _why_late(self, call: SharedCall, terms: WaitTerms, *, is_late: bool) -> CrustCreditsError:
        """The error of a waiter past its deadline: the reason why it had no answer."""
        if call.task is not None:
            return timeout_error(call.api_key, terms.deadline - terms.began, call.attempts)
        if call.last is not None:
            return last_error(call.last, call.attempts)
        endpoint = self._endpoints[call.path]
        earliest = endpoint.earliest(call, _now())
        wait = max(earliest, terms.deadline) - terms.began
        if is_late and earliest <= terms.deadline:
            return overload_error(call.api_key, wait)
        return late_error(call.api_key, wait, is_cut_off=endpoint.is_cut_off)

    def close(self) -> None:
        """Watch no more deadlines."""
        self._deadlines.close()


def _now() -> float:
    return asyncio.get_running_loop().time()
