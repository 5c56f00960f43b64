"""Many keys in one process: the loop's longest block, memory per key, the cost of cache entries.

No server and no socket: a double of the transport answers after 10 ms, with a count of its own for
each key. `balance(timeout=2)` asks for as many keys at once. Beside it is the cheapest possible
task with a deadline: one that sleeps for those 10 ms under `asyncio.timeout`. A callback every
millisecond shows how long the loop was away; the longest time is the block. Then follow a
`check(timeout=2)` of as many keys, and a `check` of keys with a cache entry. In virtual time,
without targets, single calls with a timeout keep coming faster than the limit allows.

Memory is measured in virtual time, at the default pace, by tracemalloc: after a check has answered
all keys; after one more call, with which the queue forgets the check; and when no account has been
asked for so long that the queue forgets it too. There are no more keys than the pace starts within
one period. They are made before, so that they are not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import statistics
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import attrs

from crustcredits import (
    ApiKey,
    APITimeoutError,
    CreditsClient,
    CrustCreditsError,
    RateLimit,
    RateLimitWaitError,
)
from crustcredits._http.protocol import Response
from crustcredits._http.transport_types import Failure
from tests import virtual
from tests.benchmarks._measure import (
    Benchmark,
    Bound,
    in_turns,
    median_ratio,
    print_machine,
    print_table,
    rounds_text,
    whole,
)

# Seconds.
_TRIP = 0.01
_TIMEOUT = 2.0

# Requests that each key is allowed, according to its answers.
_LIMIT = 300

# Keys that the default pace starts within one period.
_IN_A_PERIOD = 5_000

# More than the limit allows: seconds for which calls come, calls a second, their timeouts, and the
# delays of answers.
_OVERLOAD = 300
_RATES = (6, 20)
_TIMEOUTS = (10, 30)
_TRIPS = ((0.0, 0.02), (0.1, 0.3))

_OURS = "`balance(timeout=2)`"
_BARE = "bare tasks under `asyncio.timeout`"

_request_ids = itertools.count(10**30)


@attrs.define
class _Asked:
    """When calls were made last, and when a request started first."""

    last: float = 0.0
    first: float | None = None


class _Double:
    """Answers any key as the API would, with a count of its own; remembers no key."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        if self._asked.first is None:
            self._asked.first = time.perf_counter()
        await asyncio.sleep(_TRIP)
        number = next(_request_ids)
        headers = {
            "x-ratelimit-limit": str(_LIMIT),
            "x-ratelimit-remaining": str(_LIMIT - 1),
            "x-ratelimit-reset": "60",
            "x-request-id": f"{number:040x}",
            "content-length": "20",
        }
        return Response(200, headers, b'{"credits": %d}' % (number % 100_000))

    async def close(self) -> None:
        pass


def _client(asked: _Asked | None = None, **options: Any) -> CreditsClient:
    return CreditsClient(_transport=_Double(asked or _Asked()), **options)


def _keys(count: int) -> list[ApiKey]:
    return [ApiKey(f"benchmark-{place:06}", name=f"k{place}") for place in range(count)]


# --- the loop's longest block


@attrs.frozen
class Burst:
    """The result of many calls at once."""

    block: float  # the loop's longest absence, in milliseconds
    busy: float  # milliseconds of processor time during that
    first: float  # seconds until the first request started
    seconds: float
    processor: float  # microseconds for each
    answered: int
    # Starts that the pace allows from the first request on, early enough for the callers that asked
    # last.
    allowed: int
    on_wire: int  # calls that expired while their request was on the wire
    other: int  # failed in another way than these, and not because of the limit


class _Turns:
    """Measures for how long the running loop is away."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._last = time.perf_counter(), time.process_time()
        self.longest = self.busiest = 0.0
        self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        (then, busy_then), self._last = self._last, (time.perf_counter(), time.process_time())
        now, busy = self._last
        self.longest, self.busiest = (
            max(self.longest, now - then),
            max(self.busiest, busy - busy_then),
        )
        # Without load it need not spin; a millisecond is little beside the measured times.
        self._handle = self._loop.call_later(0.001, self._turn)

    def stop(self) -> None:
        self._turn()
        self._handle.cancel()


async def _burst(
    do: Callable[[], Coroutine[Any, Any, Sequence[object]]], count: int, asked: _Asked
) -> Burst:
    turns = _Turns()
    await asyncio.sleep(0)
    asked.last = began = time.perf_counter()
    processor = time.process_time()
    results = Counter(await do())
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    turns.stop()
    first, allowed = 0.0, 0
    if asked.first is not None:
        first = asked.first - began
        allowed = min(
            count,
            int(max(0.0, asked.last + _TIMEOUT - _TRIP - asked.first) * (RateLimit().pace or 0)),
        )
    answered, on_wire = results.pop(True, 0), results.pop(APITimeoutError, 0)
    del results[RateLimitWaitError]
    return Burst(
        block=turns.longest * 1e3,
        busy=turns.busiest * 1e3,
        first=first,
        seconds=seconds,
        processor=processor / count * 1e6,
        answered=answered,
        allowed=allowed,
        on_wire=on_wire,
        other=results.total(),
    )


async def _balances(keys: Sequence[ApiKey]) -> Burst:
    asked = _Asked()
    async with _client(asked, max_entries=len(keys)) as client:

        async def ask(key: ApiKey) -> object:
            asked.last = time.perf_counter()
            try:
                await client.balance(key, timeout=_TIMEOUT)
            except CrustCreditsError as error:
                return type(error)
            return True

        async def all_at_once() -> list[object]:
            return await asyncio.gather(*map(ask, keys))

        return await _burst(all_at_once, len(keys), asked)


async def _bare(keys: Sequence[ApiKey]) -> Burst:
    async def wait(key: ApiKey) -> object:
        try:
            async with asyncio.timeout(_TIMEOUT):
                await asyncio.sleep(_TRIP)
        except TimeoutError:
            return TimeoutError
        return True

    async def all_at_once() -> list[object]:
        return await asyncio.gather(*map(wait, keys))

    return await _burst(all_at_once, len(keys), _Asked())


async def _check(keys: Sequence[ApiKey]) -> Burst:
    asked = _Asked()
    async with _client(asked, max_entries=len(keys)) as client:

        async def check() -> list[object]:
            return [
                outcome.ok or type(outcome.error)
                for outcome in await client.check(keys, timeout=_TIMEOUT)
            ]

        return await _burst(check, len(keys), asked)


def _at_once(count: int, many: int, rounds: int) -> list[Bound]:
    keys = _keys(many)
    checks = {
        f"`check(timeout=2)` of {number:,}": partial(_check, keys[:number])
        for number in (count, many)
    }
    contenders = {
        _OURS: partial(_balances, keys[:count]),
        _BARE: partial(_bare, keys[:count]),
        **checks,
    }
    runs = in_turns(
        {name: partial(_run, contender) for name, contender in contenders.items()}, rounds
    )
    ratios = {
        name: median_ratio([run.busy for run in of_one], [run.busy for run in runs[_BARE]])
        for name, of_one in runs.items()
    }
    print_table(
        f"{count:,} calls at once for as many keys that are answered after {_TRIP * 1000:g} "
        "ms, and checks; default settings; "
        f"{rounds_text(rounds)}, but the least of the answered ones. The ratio is of the "
        "longest blocks in processor time, because other work on the machine lengthens both. "
        "Allowed are the starts that the pace allows from the first request on, early enough "
        "for the callers that asked last; expired on the wire are calls with a request under "
        "way at their deadline.",
        (
            "",
            "longest block, ms",
            "in processor time, ms",
            "of the bare tasks'",
            "first request, s",
            "all, s",
            "processor time a key, µs",
            "answered",
            "allowed",
            "expired on the wire",
        ),
        [(name, *_row(of_one, ratios[name])) for name, of_one in runs.items()],
    )
    bounds = [
        Bound(f"{count:,} {_OURS}: the longest block, of the bare tasks'", ratios[_OURS], 1.5)
    ]
    for name in (_OURS, *checks):
        of_one = runs[name]
        bounds += [
            Bound(
                f"{name}: allowed and not answered",
                max(run.allowed - run.answered for run in of_one),
                0,
            ),
            Bound(f"{name}: failed in a way of its own", max(run.other for run in of_one), 0),
        ]
    return bounds


def _row(runs: Sequence[Burst], ratio: float) -> tuple[float, ...]:
    values = zip(
        *((run.block, run.busy, run.first, run.seconds, run.processor) for run in runs), strict=True
    )
    block, busy, first, seconds, processor = map(statistics.median, values)
    least = min(runs, key=lambda run: run.answered - run.allowed)
    in_vain = max(run.on_wire for run in runs)
    return block, busy, ratio, first, seconds, processor, least.answered, least.allowed, in_vain


def _run(do: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(do())


# --- more calls than the limit allows


async def _overload(rate: int, timeout: float, trip: tuple[float, float]) -> Counter[object]:
    """The result of too many single calls a second.

    Each is for another key, and all keys are counted together.
    """
    server = virtual.WindowServer(limit=_LIMIT, seconds=trip)
    results: Counter[object] = Counter()
    async with virtual.fake_client(server) as client:

        async def ask(key: ApiKey) -> None:
            try:
                await client.balance(key, timeout=timeout)
            except CrustCreditsError as error:
                results[type(error)] += 1
            else:
                results[True] += 1

        async with asyncio.TaskGroup() as tasks:
            for key in _keys(rate * _OVERLOAD):
                tasks.create_task(ask(key))
                await asyncio.sleep(1 / rate)
    return results


def _overloads() -> list[Bound]:
    rows: list[tuple[str, int, int, int]] = []
    for rate, timeout, trip in itertools.product(_RATES, _TIMEOUTS, _TRIPS):
        results = virtual.run(_overload(rate, timeout, trip))
        name = f"{rate} a second, `timeout={timeout}`, {trip[0] * 1000:g} to {trip[1] * 1000:g} ms"
        rows.append((name, results[True], results[APITimeoutError], results[RateLimitWaitError]))
    print_table(
        f"More single calls than the limit allows, for {_OVERLOAD} s of virtual time, "
        f"{_LIMIT} requests in any 60 s; default settings. Expired on the wire are calls with "
        "a request under way at their deadline.",
        (
            "calls, their timeout and the delay of answers",
            "answered",
            "expired on the wire",
            "refused for the limit",
        ),
        rows,
    )
    return []


# --- memory


async def _remember(keys: Sequence[ApiKey]) -> list[float]:
    """Bytes for each key: after its answer, one call later, and after three idle periods.

    Another call follows the idle periods.
    """
    async with _client(max_entries=len(keys)) as client:
        await client.balance(_keys(1)[0])  # imports, and objects that are made once
        before = _traced()
        assert (await client.check(keys)).ok
        traced = [_traced()]
        for idle in (0.0, 3 * RateLimit().period):
            await asyncio.sleep(idle)
            await client.balance(keys[0])
            traced.append(_traced())
    return [(after - before) / len(keys) for after in traced]


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _memory(count: int) -> list[Bound]:
    keys = _keys(count + 1)[1:]
    tracemalloc.start()
    try:
        answered, known, idle = virtual.run(_remember(keys))
    finally:
        tracemalloc.stop()
    print_table(
        f"Memory of {count:,} known keys, without their `ApiKey`s; 1 round.",
        ("", "bytes a key", "target"),
        [
            ("a `check` has just answered all", answered, ""),
            ("one call later: the cache entry, and the account in the queue", known, "1,000"),
            ("three periods and another call later: the cache entry", idle, "1,000"),
        ],
    )
    return [
        Bound(
            f"bytes for each of {count:,} known keys, with their accounts in the queue", known, 1000
        )
    ]


# --- cache entries


async def _kept(keys: Sequence[ApiKey], rounds: int) -> dict[str, list[float]]:
    """Microseconds of processor time for each key."""
    async with _client(
        max_entries=len(keys), rate_limit=RateLimit(scope="key", pace=None), concurrency=1_000
    ) as client:
        report = await client.check(keys)
        balances = {key: report.by_label[key.label].balance for key in keys}
        by_name = {key.name: balance for key, balance in balances.items()}
        names = list(by_name)

        async def balance() -> None:
            for key in keys:
                await client.balance(key, max_age=3600)

        async def check() -> None:
            assert (await client.check(keys, max_age=3600)).ok

        async def get() -> None:
            assert len([balances.get(key) for key in keys]) == len(keys)

        async def get_by_name() -> None:
            assert len([by_name.get(name) for name in names]) == len(names)

        contenders = {
            "`await balance(k, max_age=…)`": balance,
            "`check(keys, max_age=…)`": check,
            "`[d.get(k) for k in keys]`": get,
            "the same with names for keys": get_by_name,
        }
        costs: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                gc.collect()
                began = time.process_time()
                await contender()
                costs[name].append((time.process_time() - began) / len(keys) * 1e6)
    return costs


def _kept_answers(count: int, rounds: int) -> list[Bound]:
    costs = asyncio.run(_kept(_keys(count), rounds))
    *_, by_key, by_name = costs.values()
    print_table(
        f"{count:,} cache entries; {rounds_text(rounds)}.",
        ("", "processor time a key, µs", "of `d.get` by `ApiKey`", "of `d.get` by name"),
        [
            (name, statistics.median(cost), median_ratio(cost, by_key), median_ratio(cost, by_name))
            for name, cost in costs.items()
        ],
    )
    return []


def run(options: argparse.Namespace) -> list[Bound]:
    print_machine()
    return [
        *_at_once(options.keys, options.many, options.rounds),
        *_overloads(),
        *_memory(min(_IN_A_PERIOD, options.known)),
        *_kept_answers(options.known, options.rounds),
    ]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=whole(1), default=50_000, help="calls at once")
    parser.add_argument("--many", type=whole(1), default=80_000, help="keys of the larger check")
    parser.add_argument("--known", type=whole(1), default=10_000, help="keys with a cache entry")
    parser.add_argument("--rounds", type=whole(1), default=5, help="rounds")


BENCHMARK = Benchmark(
    "tens of thousands of keys: the loop's block, memory, cache entries", run, _add_options
)
