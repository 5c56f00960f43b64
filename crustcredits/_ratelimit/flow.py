"""`Call`: one question about one key, as the scheduler sees it; and `Flow`, to which it belongs."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Hashable
from typing import Final, Protocol


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


class CallQueue(Protocol):
    """Where calls wait: `FairQueue`."""

    def remove(self, call: Call) -> None: ...


class Call:
    """One question about one key, as the scheduler sees it.

    Attributes:
        key: The digest of the key.
        account: The account of the tokens that it takes; for a key without a declared account the
            digest.
        flow: The flow it belongs to.
        was_sent: Whether a request was sent for it before.
        spared: Refusals that cost it no attempt so far.
        queue: The queue in which it waits, if any.
        let_out_of: The token queue that has let it out, while it has not started since.
        deadline: Not before the last of its waiters leaves.
        held_in: Where the queue of its flow holds it, while it waits; only that queue uses it.
        index: The index there.
    """

    __slots__ = (
        "account",
        "deadline",
        "flow",
        "held_in",
        "index",
        "key",
        "let_out_of",
        "queue",
        "spared",
        "was_sent",
    )

    held_in: list[Call]
    index: int

    def __init__(self, key: Hashable, account: Hashable, flow: Flow) -> None:
        self.key = key
        self.account = account
        self.flow = flow
        self.was_sent = False
        self.spared = 0
        self.let_out_of: object | None = None
        self.deadline = math.inf
        self.queue: CallQueue | None = None
