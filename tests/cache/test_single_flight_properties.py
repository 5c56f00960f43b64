"""Single-flight with random callers, ages, cancellations, failures and closing, in virtual time."""

from __future__ import annotations

import asyncio
import math
from decimal import Decimal
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crustcredits import (
    Account,
    ApiKey,
    Balance,
    ClientClosedError,
    CrustCreditsError,
    RateLimit,
    Retry,
)
from crustcredits._cache.cache_entry import CacheEntry
from crustcredits._cache.policy import CachePolicy
from crustcredits._cache.single_flight import SingleFlight
from crustcredits._cache.waiters import Waiters
from crustcredits._http.protocol import Response
from crustcredits._http.transport_types import Failure
from tests.searches import examples
from tests.virtual import FakeServer, Reply, fake_client, now, run

EPSILON = 1e-3
REQUEST_TIMEOUT = 4.0
KEYS = [ApiKey(f"secret-{number}", name=f"k{number}") for number in range(3)]


@attrs.frozen
class Wish:
    """One caller: when it asks, for which key and endpoint, the accepted ages and its patience."""

    asks: float
    key: int
    detail: bool
    max_age: float
    revalidate: float
    if_error: float
    timeout: float | None
    gives_up: float | None


def seconds(most: int) -> st.SearchStrategy[float]:
    """Often whole halves, so that events coincide."""
    return st.integers(0, most * 2).map(lambda halves: halves / 2) | st.floats(0, most)


WISHES = st.lists(
    st.builds(
        Wish,
        asks=seconds(40),
        key=st.integers(0, len(KEYS) - 1),
        detail=st.sampled_from([False, False, False, True]),
        max_age=st.sampled_from([0.0, 0.0, 3.0, 15.0]),
        revalidate=st.sampled_from([0.0, 0.0, 10.0]),
        if_error=st.sampled_from([0.0, 0.0, 10.0]),
        timeout=st.none() | seconds(20).filter(bool),
        gives_up=st.none() | seconds(20),
    ),
    min_size=1,
    max_size=25,
)
REPLIES = st.lists(
    st.tuples(
        st.sampled_from([200, 200, 200, 401, 429, 503]), st.sampled_from([0.0, 0.5, 1.0, 2.5, 99.0])
    ),
    min_size=1,
    max_size=12,
)


class Server(FakeServer):
    """Counts up with every answer, and remembers when it gave each of them.

    Asserts that no two requests for one key and endpoint are under way at a time.
    """

    def __init__(self, replies: list[tuple[int, float]]) -> None:
        super().__init__()
        self.replies = replies
        self.given: dict[Decimal, float] = {}
        self.busy: set[tuple[str, str]] = set()

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        place = path, key.name
        assert place not in self.busy, "two calls for one key and endpoint at a time"
        self.busy.add(place)
        number = len(self.arrivals)
        status, took = self.replies[number % len(self.replies)]
        self.script = lambda name, times: Reply(seconds=took, status=status, credits=str(number))
        try:
            return await super().attempt(path, key, timeout)
        finally:
            self.given[Decimal(number)] = now()
            self.busy.discard(place)


class World:
    """Callers, a client and a server."""

    def __init__(self, server: Server, closes: float | None) -> None:
        self.server = server
        self.closes = closes
        self.client = fake_client(
            server,
            rate_limit=RateLimit(requests=3, period=5.0, margin=0.0, pace=None),
            retry=Retry(attempts=2, backoff=0.5),
            request_timeout=REQUEST_TIMEOUT,
            concurrency=2,
        )

    async def play(self, wishes: list[Wish]) -> dict[str, int]:
        """Let every caller ask, close the client, and count what is left over."""
        # Without a time to close, calls without a waiter and refreshes have their turn first.
        closing = asyncio.create_task(self._close(400.0 if self.closes is None else self.closes))
        await asyncio.gather(*(self._caller(wish) for wish in wishes), closing)
        quota = self.client.quota()
        left = {
            "tasks": len(asyncio.all_tasks()) - 1,
            "on the wire": quota.in_flight,
            "waiting": quota.waiting,
            "refreshing": quota.refreshing,
        }
        return {name: count for name, count in left.items() if count}

    async def _close(self, after: float) -> None:
        await asyncio.sleep(after)
        assert self.closes is not None or len(asyncio.all_tasks()) == 2, (
            "a task is left over before the client is closed"
        )
        await self.client.close()
        assert not self.server.busy

    async def _caller(self, wish: Wish) -> None:
        await asyncio.sleep(wish.asks)
        task = asyncio.create_task(self._ask(wish))
        if wish.gives_up is not None:
            asyncio.get_running_loop().call_later(wish.gives_up, task.cancel)
        began = now()
        try:
            balance = await task
        except asyncio.CancelledError:
            assert now() <= began + (wish.gives_up or 0) + EPSILON
        except ClientClosedError:
            assert self.closes is not None
            assert now() >= self.closes - EPSILON
        except CrustCreditsError:
            self._check_time(wish, began)
        else:
            self._check_time(wish, began)
            self._check_age(wish, balance, began)

    async def _ask(self, wish: Wish) -> Balance:
        ask: Any = self.client.account if wish.detail else self.client.balance
        balance: Balance = await ask(
            KEYS[wish.key],
            timeout=wish.timeout,
            max_age=wish.max_age,
            stale_while_revalidate=wish.revalidate,
            stale_if_error=wish.if_error,
        )
        assert isinstance(balance, Account) is wish.detail
        return balance

    def _check_time(self, wish: Wish, began: float) -> None:
        assert wish.timeout is None or now() <= began + wish.timeout + EPSILON, (
            "a waiter was left waiting"
        )
        assert self.closes is None or now() <= self.closes + EPSILON

    def _check_age(self, wish: Wish, balance: Balance, began: float) -> None:
        came = self.server.given[balance.credits]
        allowed = wish.max_age + (max(wish.revalidate, wish.if_error) if balance.stale else 0.0)
        assert came >= began - allowed - EPSILON, "an answer is older than was asked for"
        if balance.stale:
            assert came <= now() - wish.max_age + EPSILON, "a young answer was called stale"


def left_over(
    wishes: list[Wish], replies: list[tuple[int, float]], closes: float | None
) -> dict[str, int]:
    """Check each caller and each answer, and count what is left over in the end."""

    async def main() -> dict[str, int]:
        return await World(Server(replies), closes).play(wishes)

    return run(main())


@settings(max_examples=examples(400), suppress_health_check=[HealthCheck.too_slow])
@given(wishes=WISHES, replies=REPLIES, closes=st.none() | seconds(40))
def test_calls_are_shared_and_answers_are_no_older_than_asked_for(
    wishes: list[Wish], replies: list[tuple[int, float]], closes: float | None
) -> None:
    """Also: never two calls for a key at a time, a forgotten waiter or a leaked task."""
    assert left_over(wishes, replies, closes) == {}


def _no_age(self: CacheEntry, policy: CachePolicy, now: float) -> object:
    return _ANSWER(self, policy._replace(max_age=math.inf), now)


def _no_join(self: SingleFlight, cache_key: Any, key: ApiKey, *rest: Any) -> Any:
    self.detach(key)
    return _JOIN(self, cache_key, key, *rest)


_ANSWER = CacheEntry.answer
_JOIN = SingleFlight.join


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        ((CacheEntry, "answer", _no_age), "older than was asked for"),
        ((SingleFlight, "join", _no_join), "two calls for one key"),
        ((Waiters, "time_out", lambda self, call, waiter, **how: None), "left (waiting|over)"),
    ],
)
def test_the_properties_fail_when_a_rule_is_broken(
    monkeypatch: pytest.MonkeyPatch, defect: tuple[type, str, Any], said: str
) -> None:
    """Each case disables one rule of the implementation."""
    monkeypatch.setattr(*defect)

    @settings(max_examples=300, database=None, derandomize=True, phases=[Phase.generate])
    @given(wishes=WISHES, replies=REPLIES)
    def property_of_the_broken(wishes: list[Wish], replies: list[tuple[int, float]]) -> None:
        assert not left_over(wishes, replies, None), "something is left over"

    with pytest.raises(AssertionError, match=said):
        property_of_the_broken()
