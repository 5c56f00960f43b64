"""`FaultOrders`: the faults that tests have ordered, for single keys or for the whole API."""

from __future__ import annotations

from collections import defaultdict, deque

import attrs

from crustcredits.testing._faults import Fault


@attrs.define(eq=False)
class FaultOrder:
    """A fault that a test has ordered.

    Attributes:
        fault: The fault.
        times: Requests that it still answers, or None for all.
        retry_after: Seconds that a refusal asks for, or None for other ones each time.
        path: The endpoint that fails, or None for both.
    """

    fault: Fault
    times: int | None = None
    retry_after: int | None = None
    path: str | None = None


class FaultOrders:
    """The orders for each key, the earliest first, and the order for the whole API.

    Args:
        period: Seconds within which refusals spread the waits that they ask for.

    Attributes:
        down: The fault of every request, or None.
    """

    def __init__(self, period: float) -> None:
        self.down: Fault | None = None
        self._period = period
        self._of_keys: defaultdict[bytes, deque[FaultOrder]] = defaultdict(deque)
        self._spread = 0  # refusals without a wait of their own

    def add(self, digest: bytes, order: FaultOrder) -> None:
        """Add an order for a key, after its earlier ones."""
        self._of_keys[digest].append(order)

    def forget(self, digest: bytes) -> None:
        """Forget the orders for a key."""
        self._of_keys.pop(digest, None)

    def take(self, digest: bytes | None, path: str) -> FaultOrder | None:
        """The order that a request of a key fulfils, or None. It counts as fulfilled once more."""
        if self.down is not None:
            return FaultOrder(self.down)
        orders = self._of_keys.get(digest) if digest is not None else None
        order = next((each for each in orders or () if each.path in {None, path}), None)
        if orders and order is not None and order.times is not None:
            order.times -= 1
            if not order.times:
                orders.remove(order)
        return order

    def wait_of(self, order: FaultOrder) -> int:
        """Seconds that a refusal asks for; without an ordered wait, others each time."""
        if order.retry_after is not None:
            return order.retry_after
        self._spread += 1
        return 1 + int(max(self._period - 1, 0) * (self._spread * 0.618 % 1))
