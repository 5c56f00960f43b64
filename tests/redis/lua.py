"""Redis without network or clock: the real script over a small model of its commands.

`FakeRedis` replaces the client of `redis.asyncio` in `RedisBackend`. One instance may serve several
processes, which it tells apart by the process names in their messages. It can be slow, lose
everything or return to an earlier state, be out of reach for all or some processes, stall, and lose
an answer after the script has run.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
from lupa.lua51 import LuaError, LuaRuntime  # type: ignore[import-untyped]  # Redis has Lua 5.1
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError

from crustcredits.redis import RedisBackend
from crustcredits.redis.protocol import SCRIPT, SHA

# Seconds that Redis's clock is ahead of the loop's: it counts from 1970, with enough digits to
# expose rounding.
EPOCH = 1_700_000_000.0

_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"

# As in Redis, the script may not set a global variable, and numbers become text with all digits.
_SHELL = """
local commands = ...
redis = {call = function(name, ...) return commands[name](...) end}
redis.pcall = redis.call
setmetatable(_G, {__newindex = function(_, name)
    error('the script sets a global variable, ' .. tostring(name))
end})
"""


class SortedSet:
    """Members with a score each.

    An operation loops only over the members that it removes or returns.
    """

    __slots__ = ("order", "scores")

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self.order: list[tuple[float, str]] = []

    def __bool__(self) -> bool:
        return bool(self.order)

    def copy(self) -> SortedSet:
        other = SortedSet()
        other.scores, other.order = dict(self.scores), list(self.order)
        return other

    def add(self, score: float, member: str) -> int:
        new = not self.remove(member)
        self.scores[member] = score
        insort(self.order, (score, member))
        return int(new)

    def remove(self, member: str) -> int:
        score = self.scores.pop(member, None)
        if score is None:
            return 0
        del self.order[bisect_left(self.order, (score, member))]
        return 1

    def place(self, bound: str, *, end: bool = False) -> int:
        """Return where a range with this lower bound starts, or with `end` one ends."""
        exclusive = bound.startswith("(")
        score = float(bound[exclusive:])
        if exclusive != end:  # members of this very score are before the place
            score = math.nextafter(score, math.inf)
        return bisect_left(self.order, (score, ""))

    def cut(self, first: int, last: int) -> int:
        for _, member in self.order[first:last]:
            del self.scores[member]
        del self.order[first:last]
        return max(0, last - first)


@attrs.frozen
class Asked:
    """One bucket's part of a message."""

    key: str
    waits: int
    homes: dict[int, float]
    returned: tuple[int, ...]
    permits: list[tuple[int, int, int]] = attrs.field(factory=list)  # count, first number, room

    @property
    def wanted(self) -> int:
        return sum(count for count, _, _ in self.permits)


@attrs.frozen
class Message:
    """One message. Times are in seconds."""

    at: float
    process: str
    number: int
    epoch: int
    hold: bool
    pause: float
    lease: float
    buckets: tuple[Asked, ...]


def _skip_answers(numbers: Iterator[int]) -> None:
    """Pass over the part about shared answers."""
    count, *_ = (next(numbers) for _ in range(5))
    for _ in range(count):
        rest = {1: 4, 2: 6, 3: 1, 4: 1}[next(numbers)]
        for _ in range(rest):
            next(numbers)


def read(at: float, keys: Sequence[str], said: Sequence[str | int]) -> Message:
    """Parse a message."""
    process, text, *_ = said
    numbers = iter(list(map(int, str(text).split())))
    number, epoch, _, hold, _, _, _, _, _, pause, lease, _, _, _, _, _, _, _, shares = (
        next(numbers) for _ in range(19)
    )
    if shares:
        keys = keys[:-3]
        _skip_answers(numbers)
    buckets = []
    for key in keys[3::2]:
        waits, _, homes, returned = (next(numbers) for _ in range(4))
        told = {next(numbers): next(numbers) / 1e6 for _ in range(homes)}
        buckets.append(Asked(key, waits, told, tuple(next(numbers) for _ in range(returned))))
    for wanted in numbers:
        first, *places = (next(numbers) for _ in range(5))
        for place, room in zip(places[::2], places[1::2], strict=True):
            if place:
                buckets[place - 1].permits.append((wanted, first, room))
    return Message(
        at, str(process), number, epoch, bool(hold), pause / 1e6, lease / 1e6, tuple(buckets)
    )


def between(low: float, high: float, seed: int = 1) -> Callable[[str], float]:
    """Return latencies drawn evenly from `low` to `high` seconds."""
    draw = random.Random(seed)
    return lambda process: draw.uniform(low, high)


class FakeRedis:
    """A server with the methods of a client of `redis.asyncio`.

    Attributes:
        latency: Seconds that a message of the given process takes one way; its answer takes the
            same.
        clock: Redis's clock, in seconds; by default the running loop's.
        down: Whether no process can connect.
        cut: Processes that cannot connect.
        lose_each: Of how many messages the answer of one is lost; 0 for none.
        deaf: Processes whose messages arrive, but not the answers.
        refusal: The error of each HMGET; empty for none.
        lose_answers: Number of next messages whose answer is lost after the script has run.
        repeat: Number of next messages that the client sends again because their answer was lost.
        messages: Number of messages, including failed ones.
        messages_of: The same by process.
        evals: Number of messages that contained the script.
        seen: The parsed messages, if it is a list.
        run: Identity of this server, as opposed to its successor.
        started: When it started, by its clock.
        faults: Violations, for tests that do not see the exception.
    """

    def __init__(
        self,
        *,
        latency: Callable[[str], float] = lambda process: 0.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.latency = latency
        self.clock = clock or (lambda: EPOCH + asyncio.get_running_loop().time())
        self.down = False
        self.cut: set[str] = set()
        self.deaf: set[str] = set()
        self.refusal = ""
        self.lose_answers = self.repeat = self.lose_each = self._answers = 0
        self.messages = self.evals = 0
        self.messages_of: Counter[str] = Counter()
        self.seen: list[Message] | None = None
        self.faults: list[str] = []
        self.run = 1
        self.started = EPOCH - 86_400
        self._under_way: set[str] = set()
        self._stalled: list[tuple[asyncio.Future[Any], Callable[[], Any]]] | None = None
        self._values: dict[str, SortedSet | dict[str, str]] = {}
        self._expiry: dict[str, int] = {}  # milliseconds
        self._scripts: dict[str, Any] = {}
        self._now = 0  # microseconds, as of the start of the script that runs
        self._lua = LuaRuntime(register_eval=False)
        commands = [
            self._time,
            self._hmget,
            self._hgetall,
            self._hdel,
            self._info,
            self._pttl,
            self._hset,
            self._hsetnx,
            self._hget,
            self._zcard,
            self._pexpire,
        ]
        commands += [
            self._zadd,
            self._zrem,
            self._zremrangebyscore,
            self._zcount,
            self._zrangebyscore,
            self._zscore,
            self._get_text,
            self._set_text,
            self._incr,
            self._del,
        ]
        by_name = {
            command.__name__.removeprefix("_").removesuffix("_text").upper(): command
            for command in commands
        }
        self._lua.execute(_SHELL, self._lua.table_from(by_name))

    # --- as a client

    async def evalsha(self, process: str, sha: str, count: int, *said: str | int) -> Any:
        return await self._travel(process, sha, None, said[:count], said[count:])

    async def eval(self, process: str, script: str, count: int, *said: str | int) -> Any:
        sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
        return await self._travel(process, sha, script, said[:count], said[count:])

    async def hget(self, process: str, key: str, field: str) -> str | None:
        self.messages += 1
        answer: str | None = await self._answered(process, lambda: self._field(key, field))
        return answer

    async def _travel(
        self,
        process: str,
        sha: str,
        script: str | None,
        keys: Sequence[Any],
        said: Sequence[str | int],
    ) -> Any:
        self.messages += 1
        self.messages_of[process] += 1
        self.evals += script is not None
        if process in self._under_way:
            self._fail("two messages of one process are under way")
        self._under_way.add(process)
        try:
            return await self._answered(
                process, lambda: self.execute(keys, said, sha=sha, script=script)
            )
        finally:
            self._under_way.discard(process)

    async def _answered(self, process: str, run: Callable[[], Any]) -> Any:
        await asyncio.sleep(self.latency(process))
        answer = await self._arrive(process, run)
        await asyncio.sleep(self.latency(process))
        self._answers += 1
        lost = self.lose_each and not self._answers % self.lose_each
        if self.lose_answers or process in self.deaf or lost:
            self.lose_answers = max(0, self.lose_answers - 1)
            raise RedisConnectionError("Connection lost")
        return answer

    async def _arrive(self, process: str, run: Callable[[], Any]) -> Any:
        if self.down or process in self.cut:
            raise RedisConnectionError("Error 111 connecting to nowhere:1. Connection refused.")
        if self._stalled is not None:
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self._stalled.append((future, run))
            return await future
        if self.repeat:
            self.repeat -= 1
            run()
        return run()

    def _fail(self, what: str) -> None:
        self.faults.append(what)
        raise AssertionError(what)

    # --- server events

    def flush(self) -> None:
        """Lose everything except the scripts."""
        self._values.clear()
        self._expiry.clear()

    def spoil(self, key: str, value: str | dict[str, str]) -> None:
        """Let another program write this key."""
        self._values[key] = {"text": value} if isinstance(value, str) else value

    def flush_scripts(self) -> None:
        self._scripts.clear()

    def snapshot(self) -> Any:
        """Return the state, for `roll_back`."""
        return {key: value.copy() for key, value in self._values.items()}, dict(self._expiry)

    def roll_back(self, state: Any) -> None:
        """Restore an earlier state, as when a delayed replica takes over."""
        self.run += 1
        values, expiry = state
        self._values = {key: value.copy() for key, value in values.items()}
        self._expiry = dict(expiry)

    def stall(self) -> None:
        """Process and answer nothing from now on."""
        self._stalled = []

    def resume(self, *, late: bool = True) -> None:
        """Continue after `stall`.

        With `late`, messages that arrived meanwhile are processed now, including those without a
        caller.
        """
        stalled, self._stalled = self._stalled or [], None
        for future, run in stalled:
            try:
                if not late:
                    raise RedisConnectionError("Connection lost")
                answer = run()
            except RedisError as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(answer)

    # --- contents

    def keys(self) -> list[str]:
        """Return the names of all keys that have not expired."""
        self._look_at_clock()
        return [key for key in list(self._values) if self._get(key) is not None]

    def out(self, part: str = "") -> int:
        """Number of tokens that are out, over the buckets with this text in their names."""
        names = [key for key in self.keys() if part in key]
        later = f"({self._now}"
        values = [self._values[key] for key in names]
        return sum(
            len(value.order) - value.place(later)
            for value in values
            if isinstance(value, SortedSet)
        )

    def content(self, key: str) -> Any:
        """Return the value of a key; None if there is none."""
        return self._get(key)

    def text(self) -> str:
        """Return all names and values as text."""
        return repr(
            {
                key: value.scores if isinstance(value, SortedSet) else value
                for key, value in self._values.items()
            }
            | self._scripts
        )

    # --- the script

    def execute(
        self,
        keys: Sequence[Any],
        said: Sequence[str | int],
        *,
        sha: str = "",
        script: str | None = None,
    ) -> Any:
        """Run the script. It is atomic, and time stands still while it runs."""
        if script is not None and sha not in self._scripts:
            self._scripts[sha] = self._lua.execute(f"return function(KEYS, ARGV) {script}\nend")
        if sha not in self._scripts:
            raise NoScriptError("No matching script. Please use EVAL.")
        self._look_at_clock()
        if self.seen is not None:
            self.seen.append(read(self._now / 1e6 - EPOCH, keys, said))
        try:
            return self._answer(
                self._scripts[sha](
                    self._lua.table_from(keys), self._lua.table_from([str(arg) for arg in said])
                )
            )
        except LuaError as error:
            self.faults.append(str(error))
            raise ResponseError(str(error)) from None

    def _look_at_clock(self) -> None:
        self._now = int(self.clock() * 1e6)

    def _answer(self, value: Any) -> Any:
        # Redis cuts numbers off, and an array at its first nil.
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return int(value)
        if value["err"] is not None:
            raise ResponseError(value["err"])
        return [self._answer(value[place]) for place in range(1, len(value) + 1)]

    # --- the commands

    def _get(self, key: str) -> Any:
        expiry = self._expiry.get(key)
        if expiry is not None and self._now // 1000 > expiry:
            self._delete(key)
        return self._values.get(key)

    def _delete(self, key: str) -> None:
        del self._values[key]
        self._expiry.pop(key, None)

    def _set(self, key: str) -> SortedSet:
        value = self._get(key)
        if value is None:
            value = self._values[key] = SortedSet()
        assert isinstance(value, SortedSet)
        return value

    def _hash(self, key: str) -> dict[str, str]:
        value = self._get(key)
        if value is None:
            value = self._values[key] = {}
        assert isinstance(value, dict)
        return value

    def _time(self) -> Any:
        return self._lua.table(str(self._now // 1_000_000), str(self._now % 1_000_000))

    def _hmget(self, key: str, *fields: str) -> Any:
        if self.refusal:
            return self._lua.table_from({"err": self.refusal})
        value = self._get(key) or {}
        if "text" in value:
            return self._lua.table_from({"err": _WRONG_TYPE})
        return self._lua.table(*(value.get(field, False) for field in fields))

    def _field(self, key: str, field: str) -> str | None:
        self._look_at_clock()
        value: dict[str, str] = self._get(key) or {}
        if "text" in value:
            raise ResponseError(_WRONG_TYPE)
        return value.get(field)

    def _hset(self, key: str, *pairs: str | float) -> int:
        value, before = self._hash(key), len(self._hash(key))
        for field, text in zip(pairs[::2], pairs[1::2], strict=True):
            value[str(field)] = _text(text)
        return len(value) - before

    def _hget(self, key: str, field: str) -> Any:
        return (self._get(key) or {}).get(field, False)

    def _zcard(self, key: str) -> int:
        value: SortedSet | None = self._get(key)
        return 0 if value is None else len(value.order)

    def _hsetnx(self, key: str, field: str, text: str) -> int:
        value = self._hash(key)
        new = field not in value
        if new:
            value[field] = text
        return int(new)

    def _info(self, section: str) -> str:
        if section == "server":
            return f"# Server\r\nuptime_in_seconds:{int(self.clock() - self.started)}\r\n"
        second = f"{self.run - 1:040x}"
        return f"role:master\r\nmaster_replid:{self.run:040x}\r\nmaster_replid2:{second}\r\n"

    def _get_text(self, key: str) -> Any:
        value = self._get(key)
        return False if value is None else value["text"]

    def _set_text(self, key: str, text: str, *options: Any) -> bool:
        if "NX" in options and self._get(key) is not None:
            return False
        self._values[key] = {"text": _text(text)}
        self._expiry.pop(key, None)
        if "PX" in options:
            self._pexpire(key, options[options.index("PX") + 1])
        return True

    def _incr(self, key: str) -> int:
        number = int(self._get_text(key) or 0) + 1
        self._values[key] = {"text": str(number)}
        return number

    def _del(self, key: str) -> None:
        if self._get(key) is not None:
            self._delete(key)

    def _zscore(self, key: str, member: str) -> Any:
        value: SortedSet | None = self._get(key)
        return value is not None and member in value.scores and _text(value.scores[member])

    def _hgetall(self, key: str) -> Any:
        return self._lua.table_from(
            [text for pair in (self._get(key) or {}).items() for text in pair]
        )

    def _hdel(self, key: str, *fields: str) -> int:
        value = self._get(key)
        if value is None:
            return 0
        removed = sum(value.pop(field, None) is not None for field in fields)
        if not value:
            self._delete(key)
        return removed

    def _pexpire(self, key: str, milliseconds: float) -> int:
        if self._get(key) is None:
            return 0
        if int(_text(milliseconds)) > 0:
            self._expiry[key] = self._now // 1000 + int(_text(milliseconds))
        else:
            self._delete(key)
        return 1

    def _pttl(self, key: str) -> int:
        if self._get(key) is None:
            return -2
        return self._expiry[key] - self._now // 1000 if key in self._expiry else -1

    def _zadd(self, key: str, score: str, member: str) -> int:
        return self._set(key).add(float(score), member)

    def _zrem(self, key: str, *members: str) -> int:
        value = self._get(key)
        if value is None:
            return 0
        removed: int = sum(map(value.remove, members))
        if not value:
            self._delete(key)
        return removed

    def _zremrangebyscore(self, key: str, low: str, high: str) -> int:
        value = self._get(key)
        if value is None:
            return 0
        removed: int = value.cut(value.place(low), value.place(high, end=True))
        if not value:
            self._delete(key)
        return removed

    def _zcount(self, key: str, low: str, high: str) -> int:
        value: SortedSet | None = self._get(key)
        return 0 if value is None else max(0, value.place(high, end=True) - value.place(low))

    def _zrangebyscore(self, key: str, low: str, high: str, *options: Any) -> Any:
        value = self._get(key)
        if value is None:
            return self._lua.table()
        if not options:
            first, last = value.place(low), value.place(high, end=True)
            return self._lua.table_from([member for _, member in value.order[first:last]])
        *names, skip, most = options
        assert names in (["WITHSCORES", "LIMIT"], ["LIMIT"])
        first, last = value.place(low) + int(_text(skip)), value.place(high, end=True)
        flat: list[str] = []
        for score, member in value.order[first : min(last, first + int(_text(most)))]:
            flat += (member, _text(score)) if "WITHSCORES" in names else (member,)
        return self._lua.table_from(flat)


def _text(value: str | float) -> str:
    """Convert an argument as Redis does."""
    return value if isinstance(value, str) else f"{value:.17g}"


class _Connection(Redis):
    """The client of one process.

    `FakeRedis` knows the process by the name given here, or by its name in the messages.
    """

    def __init__(self, redis: FakeRedis, name: str) -> None:
        super().__init__(port=1)
        self._redis = redis
        self._process = ""
        self._name = name

    async def evalsha(self, sha: str, numkeys: int, *said: Any) -> Any:
        self._process = self._name or str(said[numkeys])
        return await self._redis.evalsha(self._process, sha, numkeys, *said)

    async def eval(self, script: str, numkeys: int, *said: Any) -> Any:
        return await self._redis.eval(self._process, script, numkeys, *said)

    async def hget(self, name: str, key: str) -> str | None:  # type: ignore[override]
        return await self._redis.hget(self._process, name, key)

    async def info(self, section: str | None = None, *names: str, **options: Any) -> Any:
        return {"redis_version": "7.0.15", "maxmemory": 0, "maxmemory_policy": "noeviction"}


def connected(redis: FakeRedis, *, name: str = "", **options: Any) -> RedisBackend:
    """Return the backend of one process, on this server."""
    options.setdefault("fallback_share", 1 / 4)
    return RedisBackend(_Connection(redis, name), **options)


def opening(prefix: str = "crustcredits") -> tuple[list[str], list[str | int]]:
    """Arguments of a message after which a new server grants tokens without a waiting time."""
    marker = f"{{{prefix}}}:epoch"
    names = [marker, f"{marker}:opener", f"{marker}:busy"]
    return names, ["opener", "1 0 1 0 1 1 0 0 0 0 1 1 86400000 0 0 0 0 0 0"]


def opened(*, prefix: str = "crustcredits", **options: Any) -> FakeRedis:
    """Return a server that has been in use for a while."""
    redis = FakeRedis(**options)
    keys, said = opening(prefix)
    redis.execute(keys, said, sha=SHA, script=SCRIPT)
    return redis
