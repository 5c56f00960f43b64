"""`Agenda`: the buckets about which a message is due. No I/O; times are the running loop's."""

from __future__ import annotations

import math
from collections.abc import Iterable

from crustcredits.redis.shared_tokens import SharedTokens
from crustcredits.redis.timing import BUCKETS

# Seconds for which the report of an ended attempt may wait for other reports; its lease covers it
# until then.
REPORT = 0.1


class Agenda:
    """The buckets of the next messages.

    Attributes:
        soonest: The earliest of their times; infinite if no message is due.
    """

    def __init__(self) -> None:
        self._due: dict[SharedTokens, float] = {}
        self.soonest: float = math.inf

    def __bool__(self) -> bool:
        """Whether a message is due."""
        return bool(self._due)

    def add(self, tokens: SharedTokens, when: float) -> None:
        """Send a message about this bucket by that time."""
        if when < self._due.get(tokens, math.inf):
            self._due[tokens] = when
            self.soonest = min(self.soonest, when)

    def add_again(self, batch: Iterable[SharedTokens], when: float) -> None:
        """Send the message about these buckets again, because it was lost."""
        self._due |= dict.fromkeys(batch, when)

    def clear(self) -> None:
        """Forget all: the process counts by itself, and will register its tokens."""
        self._due.clear()

    def take(self, now: float, epoch: int, *, all_due: bool) -> list[SharedTokens]:
        """Take out the buckets of the next message: all that are due, or nearly.

        With `all_due` also the ones that are due much later.
        """
        batch: list[SharedTokens] = []
        for tokens in sorted(self._due, key=self._due.__getitem__):
            if len(batch) == BUCKETS or (self._due[tokens] > now + REPORT and not all_due):
                break
            del self._due[tokens]
            when = tokens.messages.next_news(now, epoch)
            if when is not None and when <= now:
                batch.append(tokens)
            elif when is not None and not all_due:
                self._due[tokens] = when
        self.soonest = min(self._due.values(), default=math.inf)
        return batch
