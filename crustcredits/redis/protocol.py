"""Messages between a process and the script in Redis.

This is the one place in Python that knows their order. Redis's clock is the only shared clock:
`clock` and `asked` are its times, and every other time is a duration. Neither names nor values hold
a secret.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final, Self, TypeAlias

import attrs
from redis.exceptions import RedisError


def _source(name: str) -> str:
    return files("crustcredits.redis").joinpath(name).read_text(encoding="utf-8")


SCRIPT: Final = _source("answers.lua") + _source("exchange.lua")
SHA: Final = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()

# The longest age in seconds that the script is told.
_LONGEST = 1e8
# In the place of a bucket.
_NONE = 0
# Lengths of the head of a reply, of a bucket's head, and of a shared answer's.
_HEAD = _STATE = 4
_FOUND = 3


class Operation(enum.IntEnum):
    """What to do with a shared answer; `answers.lua` has the same numbers."""

    FIND = 1
    PUBLISH = 2
    FREE = 3
    INVALIDATE = 4


class Kind(enum.IntEnum):
    """What a shared answer is; `answers.lua` has the same numbers."""

    BALANCE = 1
    ERROR = 2


@attrs.frozen(kw_only=True)
class BucketReport:
    """A process's report about its tokens in one bucket.

    Attributes:
        name: The bucket's name in Redis.
        returns: Numbers of tokens that are out, each with the seconds until its return.
        unused: Numbers of tokens that are not out any more.
        waits: Permits that calls need and this message does not request.
        most: The most tokens that may be out after these.
    """

    name: str
    waits: int = 0
    most: int = 0
    returns: Sequence[tuple[int, float]] = ()
    unused: Sequence[int] = ()


@attrs.frozen(kw_only=True)
class PermitRequest:
    """A request for permits, which take one token each of one or two buckets.

    Attributes:
        wanted: How many permits.
        first: The number of the first one; the others follow.
        limits: For each bucket its index among the reports, and how many of its tokens may be out.
    """

    wanted: int
    first: int
    limits: Sequence[tuple[int, int]]


@attrs.frozen(kw_only=True)
class FindAnswer:
    """Finds a shared answer, or the process that shall fetch a new one.

    Attributes:
        name: The name of the answer.
        max_age: Seconds below which a balance is found.
        max_error_age: Seconds below which an error is found.
        usable_age: An older balance below this age in seconds is returned beside the result.
    """

    name: str
    max_age: float
    max_error_age: float
    usable_age: float

    def encode(self) -> tuple[list[int], str]:
        """The numbers and the text of the operation."""
        ages = [_age(self.max_age), _age(self.max_error_age), _age(self.usable_age)]
        return [Operation.FIND, len(self.name), *ages], self.name


@attrs.frozen(kw_only=True)
class PublishAnswer:
    """Publishes an answer.

    Attributes:
        name: The name of the answer.
        asked: When its request started, by Redis's clock in microseconds.
        kept: Seconds for which Redis keeps it.
        is_error: Whether it is an error.
        value: The answer, of characters of base64.
        frees: Whether the process does not fetch this answer any more.
    """

    name: str
    asked: int
    kept: float
    is_error: bool
    value: str
    frees: bool

    def encode(self) -> tuple[list[int], str]:
        """The numbers and the text of the operation."""
        lengths = [len(self.name), len(self.value)]
        kind = Kind.ERROR if self.is_error else Kind.BALANCE
        rest = [self.asked, _age(self.kept), kind, int(self.frees)]
        return [Operation.PUBLISH, *lengths, *rest], self.name + self.value


@attrs.frozen(kw_only=True)
class FreeAnswer:
    """Says that this process does not fetch the answer of this name any more."""

    name: str

    def encode(self) -> tuple[list[int], str]:
        """The numbers and the text of the operation."""
        return [Operation.FREE, len(self.name)], self.name


@attrs.frozen(kw_only=True)
class InvalidateAnswer:
    """Makes the answer of this name invalid, also one that was asked for before; `*` for all."""

    name: str

    def encode(self) -> tuple[list[int], str]:
        """The numbers and the text of the operation."""
        return [Operation.INVALIDATE, len(self.name)], self.name


AnswerOperation: TypeAlias = FindAnswer | PublishAnswer | FreeAnswer | InvalidateAnswer


@attrs.frozen(kw_only=True)
class AnswersPart:
    """The part of a message that is about shared answers.

    Attributes:
        operations: What to do, in this order.
        fetches: Whether this process fetches an answer.
        lease: Seconds without a message after which a process does not fetch any more.
        most: How many answers Redis keeps.
        memory: Seconds for which Redis remembers an invalidation.
    """

    operations: Sequence[AnswerOperation]
    fetches: bool
    lease: float
    most: int
    memory: float

    def encode(self) -> tuple[list[int], str]:
        """The numbers and the texts."""
        lease, memory = _micro(self.lease), _micro(self.memory)
        numbers = [len(self.operations), int(self.fetches), lease, self.most, memory]
        texts = []
        for operation in self.operations:
            more, text = operation.encode()
            numbers += more
            texts.append(text)
        return numbers, "".join(texts)


@attrs.frozen(kw_only=True)
class Request:
    """One message of a process. Durations are in seconds.

    Attributes:
        marker: The name of the marker in Redis, with which the names of all buckets begin.
        process: The name of the process.
        number: The number of the message; it ascends.
        epoch: The epoch that the process knows; 0 for none.
        fresh: A new epoch, in case the count was lost.
        stops_grants: Whether no permits may be granted for a while, because Redis does not know all
            tokens of the process.
        still: If no process had a reply for this long, all may be cut off.
        grace: After how long without an answer a process may count by itself.
        clock: Redis's clock in microseconds at the last message with an answer; 0 for none.
        age: How long ago that was.
        tolerance: The tolerance of that age.
        pause: How long no permits are granted after a loss of the count.
        lease: The lease of a new token.
        retention: How long Redis keeps tokens after their return.
        life: How long Redis keeps the marker of an idle prefix.
        is_strict: Whether the processes use no more than their shares.
        leaves: Whether the process has nothing left to count: it ends, or it is not strict and has
            no tokens out.
        share: The share that this process uses by itself while Redis is out of reach.
        lends_share: Whether its share is used by all, and not by the process alone.
        silence: After this silence the others stop using the process's share.
        answers: What it says about shared answers; None if it shares none.
        buckets: The reports.
        asks: The requests for permits.
    """

    marker: str
    process: str
    number: int
    epoch: int
    fresh: int
    stops_grants: bool
    still: float
    grace: float
    clock: int
    age: float
    tolerance: float
    pause: float
    lease: float
    retention: float
    life: float
    is_strict: bool = False
    leaves: bool = False
    share: float = 0.0
    lends_share: bool = True
    silence: float = 0.0
    answers: AnswersPart | None = None
    buckets: Sequence[BucketReport]
    asks: Sequence[PermitRequest]

    @property
    def finds(self) -> int:
        """How many shared answers it looks for."""
        operations = () if self.answers is None else self.answers.operations
        return sum(isinstance(operation, FindAnswer) for operation in operations)

    def encode(self) -> tuple[list[str], list[str]]:
        """The names and the arguments of the script.

        All numbers are one argument: redis-py takes long over each.
        """
        others = "shares" if self.is_strict else "busy"
        names = [self.marker, f"{self.marker}:{self.process}", f"{self.marker}:{others}"]
        said: list[int] = [
            self.number,
            self.epoch,
            self.fresh,
            int(self.stops_grants),
            _micro(self.still),
            _micro(self.grace),
            self.clock,
            _micro(self.age),
            _micro(self.tolerance),
            _micro(self.pause),
            _micro(self.lease),
            _micro(self.retention),
            math.ceil(self.life * 1e3),
            int(self.is_strict),
            int(self.leaves),
            round(self.share * 1e9),
            int(self.lends_share),
            _micro(self.silence),
            int(self.answers is not None),
        ]
        texts = []
        if self.answers is not None:
            numbers, text = self.answers.encode()
            said += numbers
            texts = [text]
        for bucket in self.buckets:
            names += (bucket.name, bucket.name + ":line")
            said += (bucket.waits, bucket.most, len(bucket.returns), len(bucket.unused))
            for number, seconds in bucket.returns:
                said += (number, _micro(seconds))
            said += bucket.unused
        for ask in self.asks:
            said += (ask.wanted, ask.first)
            for index, most in ask.limits:
                said += (index + 1, most)
            if len(ask.limits) == 1:
                said += (_NONE, 0)
        if self.answers is not None:
            names += [f"{self.marker}:answers{part}" for part in ("", ":times", ":fetchers")]
        return names, [self.process, " ".join(map(str, said)), *texts]


@attrs.frozen(kw_only=True)
class BucketState:
    """Redis's answer about one bucket.

    Attributes:
        out: Tokens that are out.
        missing: Permits requested and not granted because of this bucket.
        free: Permits it would grant to the other waiting calls.
        returns: Seconds until tokens return for the missing ones, ascending; fewer if fewer are
            out.
    """

    out: int
    missing: int
    free: int
    returns: Sequence[float]


class Found(enum.Enum):
    """What Redis says of a shared answer."""

    YES = 1
    OTHER_FETCHES = 2
    FETCH = 3


@attrs.frozen(kw_only=True)
class FoundAnswer:
    """Redis's reply to `FindAnswer`.

    Attributes:
        found: What it says.
        age: Seconds since the start of the request of the value.
        is_error: Whether the value is an error.
        value: The value; empty without one.
    """

    found: Found
    age: float = 0.0
    is_error: bool = False
    value: str = ""


class BadReplyError(RedisError):
    """A reply that is not from the script."""

    def __init__(self) -> None:
        super().__init__(
            "Redis sent a reply that is not from the script; look for a proxy, or another program "
            "with this prefix"
        )


@attrs.frozen(kw_only=True)
class Response:
    """Redis's answer.

    Attributes:
        is_known: Whether the process's epoch is that of Redis. If not, nothing else was done: the
            process has to register its tokens.
        epoch: The epoch of the count.
        pause: Seconds until permits are granted.
        clock: Redis's clock in microseconds.
        answers: The replies to each `FindAnswer` of the request.
        buckets: The state of each bucket of the request.
        granted: How many permits were granted for each request.
    """

    is_known: bool
    epoch: int
    pause: float
    clock: int
    answers: Sequence[FoundAnswer] = ()
    buckets: Sequence[BucketState] = ()
    granted: Sequence[int] = ()

    @classmethod
    def decode(cls, answer: Any, request: Request) -> Self:
        """The answer to a request.

        Raises:
            BadReplyError: It is not an answer of the script.
        """
        try:
            return cls._decode(answer, request)
        except (ValueError, TypeError) as error:
            raise BadReplyError from error

    @classmethod
    def _decode(cls, answer: Any, request: Request) -> Self:
        if not isinstance(answer, (str, bytes)):
            raise TypeError("not a text")
        text = answer if isinstance(answer, str) else answer.decode("ascii")
        first, _, values = text.partition("\n")
        numbers = list(map(int, first.split()))
        known, epoch, pause, clock = numbers[:_HEAD]
        if not known:
            return cls(is_known=False, epoch=epoch, pause=pause / 1e6, clock=clock)
        place, buckets, answers = _HEAD, [], []
        for _ in range(request.finds):
            found, age, length = numbers[place : place + _FOUND]
            place += _FOUND
            value, values = values[:length], values[length:]
            answers.append(
                FoundAnswer(
                    found=Found(found),
                    age=age / 1e6,
                    is_error=value[:1] == str(Kind.ERROR),
                    value=value[1:],
                )
            )
        for _ in request.buckets:
            out, missing, free, count = numbers[place : place + _STATE]
            place += _STATE + count
            returns = [duration / 1e6 for duration in numbers[place - count : place]]
            buckets.append(BucketState(out=out, missing=missing, free=free, returns=returns))
        granted = numbers[place:]
        if len(granted) != len(request.asks):
            raise ValueError("of another length")
        return cls(
            is_known=True,
            epoch=epoch,
            pause=pause / 1e6,
            clock=clock,
            answers=tuple(answers),
            buckets=tuple(buckets),
            granted=tuple(granted),
        )


def _age(seconds: float) -> int:
    """Convert an age to whole microseconds; an infinite one to the longest."""
    return _micro(min(seconds, _LONGEST))


def _micro(seconds: float) -> int:
    """Convert seconds to whole microseconds, rounded up."""
    return math.ceil(seconds * 1e6)
