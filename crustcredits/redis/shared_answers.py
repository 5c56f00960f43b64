"""`SharedAnswers`: what a process says of shared answers in its messages, and what Redis replies.

No I/O: the coordinator sends the messages. It needs a running loop: it reads the loop's clock, and
`call_soon` tells a new search that Redis is out of reach.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from crustcredits._cache.answer_store import JOIN, Ages, Finding, OnFinding, StoredAnswer
from crustcredits.redis.protocol import (
    AnswerOperation,
    AnswersPart,
    FindAnswer,
    Found,
    FoundAnswer,
    FreeAnswer,
    InvalidateAnswer,
    PublishAnswer,
)

# Most operations in one message.
_MOST = 256
# Seconds for which an answer may wait for other messages before it is published.
_PUBLISH = 0.1
# Seconds until a search that waits for another process asks again.
_AGAIN = 0.5
# Seconds without a message. After this silence another process may fetch the answer.
_LEASE = 5.0
# Most answers in Redis, and seconds for which it remembers an invalidation. Requests sent before an
# invalidation end within this time.
_MOST_KEPT, _MEMORY = 10_000, 600.0

_FINDINGS = {
    Found.YES: Finding.FOUND,
    Found.OTHER_FETCHES: Finding.OTHER_FETCHES,
    Found.FETCH: Finding.FETCH,
}


@attrs.define(eq=False)
class _Search:
    """A search for one answer.

    Attributes:
        began: When it began.
        due: When the next message asks for it.
        has_waited: Whether another process fetches the answer, or did.
    """

    name: str
    ages: Ages
    on_finding: OnFinding
    began: float
    due: float
    has_waited: bool = False


@attrs.frozen
class _Publication:
    """An answer to publish."""

    name: str
    answer: StoredAnswer
    kept: float


@attrs.define
class AnswersInMessage:
    """The part of one message: the searches in it, and the operations."""

    searches: Sequence[_Search]
    operations: Sequence[_Publication | FreeAnswer | InvalidateAnswer]


class SharedAnswers:
    """The shared answers of one process: an `AnswerStore`.

    Args:
        say: Called when a message has to be sent by another time.
    """

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._searches: dict[str, _Search] = {}
        # In their order; the same one twice has no more effect than once.
        self._operations: dict[_Publication | FreeAnswer | InvalidateAnswer, None] = {}
        self._operations_due = math.inf
        self._fetched: Counter[str] = Counter()  # calls of this process, by the answer they fetch
        self._is_out = False

    # --- for calls

    def find(self, name: str, ages: Ages, on_finding: OnFinding) -> None:
        """As for `AnswerStore`."""
        if self._is_out:
            asyncio.get_running_loop().call_soon(on_finding, Finding.OUT_OF_REACH, None)
            return
        now = _now()
        self._searches[name] = _Search(name, ages, on_finding, now, now)
        self._say()

    def stop(self, name: str) -> None:
        """As for `AnswerStore`."""
        self._searches.pop(name, None)

    def publish(self, name: str, answer: StoredAnswer, *, kept: float) -> None:
        """As for `AnswerStore`."""
        self._end_fetching(name)
        self._do(_Publication(name, answer, kept), _now() + _PUBLISH)

    def free(self, name: str) -> None:
        """As for `AnswerStore`."""
        self._end_fetching(name)
        if not self._fetched[name]:
            self._do(FreeAnswer(name=name), _now())

    def invalidate(self, name: str | None) -> None:
        """As for `AnswerStore`."""
        try:
            now = _now()
        except RuntimeError:  # no loop runs here: it goes with the next message
            self._operations[InvalidateAnswer(name=name or "*")] = None
            self._operations_due = 0.0
            return
        self._do(InvalidateAnswer(name=name or "*"), now)

    # --- for messages

    @property
    def due(self) -> float:
        """When the next message has to be sent; infinite if there is nothing to say."""
        searches = min((each.due for each in self._searches.values()), default=math.inf)
        return min(searches, self._operations_due)

    @property
    def has_operations(self) -> bool:
        """Whether there is something to publish, to free or to make invalid."""
        return bool(self._operations)

    @property
    def is_busy(self) -> bool:
        """Whether this process has to send messages: it fetches answers, or looks for some."""
        return bool(self._searches or self._operations or self._fetched)

    def take(self, now: float) -> AnswersInMessage:
        """Take out what the next message says."""
        operations = [*itertools.islice(self._operations, _MOST)]
        for operation in operations:
            del self._operations[operation]
        self._operations_due = now if self._operations else math.inf
        if self._operations:
            return AnswersInMessage([], operations)  # a search comes after each invalidation
        due = [each for each in self._searches.values() if each.due <= now][:_MOST]
        for search in due:
            search.due = math.inf
        return AnswersInMessage(due, operations)

    def part(self, said: AnswersInMessage, redis_time: Callable[[float], int]) -> AnswersPart:
        """The part of the request; `redis_time` converts a time, or returns 0."""
        operations: list[AnswerOperation] = []
        for operation in said.operations:
            if isinstance(operation, _Publication):
                answer = operation.answer
                operations.append(
                    PublishAnswer(
                        name=operation.name,
                        asked=redis_time(answer.began),
                        kept=operation.kept,
                        is_error=answer.is_error,
                        value=base64.b64encode(answer.text).decode(),
                        frees=not self._fetched[operation.name],
                    )
                )
            else:
                operations.append(operation)
        for search in said.searches:
            ages = search.ages
            # A call that has waited for another process takes what that one has fetched meanwhile.
            waited = _now() - search.began + JOIN if search.has_waited else 0.0
            operations.append(
                FindAnswer(
                    name=search.name,
                    max_age=max(ages.fresh, waited),
                    max_error_age=max(ages.error, waited),
                    usable_age=ages.usable,
                )
            )
        return AnswersPart(
            operations=operations,
            fetches=bool(self._fetched),
            lease=_LEASE,
            most=_MOST_KEPT,
            memory=_MEMORY,
        )

    def heard(self, said: AnswersInMessage, replies: Sequence[FoundAnswer], sent: float) -> None:
        """Tell the searches of a message, sent at that time, what Redis replied."""
        for search, reply in zip(said.searches, replies, strict=True):
            finding = _FINDINGS[reply.found]
            is_awaited = self._searches.get(search.name) is search
            if finding is Finding.FETCH:
                self._fetched[search.name] += 1
                if not is_awaited:
                    self.free(search.name)
            if not is_awaited:
                continue
            if finding is Finding.OTHER_FETCHES:
                search.due = _now() + _AGAIN
                search.has_waited = True
            else:
                del self._searches[search.name]
            search.on_finding(finding, _stored(reply, sent))

    def lost(self, said: AnswersInMessage) -> None:
        """Queue the content of a lost message again."""
        now = _now()
        for search in said.searches:
            search.due = now
            if search.name not in self._searches:  # Redis may count this process as its fetcher
                self._operations[FreeAnswer(name=search.name)] = None
        self._operations = dict.fromkeys([*said.operations, *self._operations])
        self._operations_due = now if self._operations else math.inf

    def come_back(self) -> None:
        """Share answers again: Redis answers."""
        self._is_out = False

    def give_up(self) -> None:
        """Share nothing while Redis is out of reach: the calls ask the API for themselves."""
        self._is_out = True
        withdrawn = [each for each in self._operations if isinstance(each, _Publication)]
        for publication in withdrawn:
            del self._operations[publication]
        searches, self._searches = self._searches, {}
        fetched, self._fetched = self._fetched, Counter()
        for name in (*fetched, *searches, *(each.name for each in withdrawn)):
            self._operations[FreeAnswer(name=name)] = None
        self._operations_due = _now() if self._operations else math.inf
        for search in searches.values():
            search.on_finding(Finding.OUT_OF_REACH, None)

    # --- inside

    def _do(self, operation: _Publication | FreeAnswer | InvalidateAnswer, due: float) -> None:
        if self._is_out and isinstance(operation, _Publication):
            return
        self._operations[operation] = None
        self._operations_due = min(self._operations_due, due)
        self._say()

    def _end_fetching(self, name: str) -> None:
        self._fetched[name] -= 1
        if self._fetched[name] <= 0:
            del self._fetched[name]


def _stored(reply: FoundAnswer, sent: float) -> StoredAnswer | None:
    """The value of a reply. Its age counts from the sending of the message."""
    if not reply.value:
        return None
    try:
        text = base64.b64decode(reply.value, validate=True)
    except binascii.Error:
        text = b""  # unreadable; the call replaces it
    return StoredAnswer(began=sent - reply.age, is_error=reply.is_error, text=text)


def _now() -> float:
    return asyncio.get_running_loop().time()
