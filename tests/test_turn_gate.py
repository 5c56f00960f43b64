"""Keys of a stream that need a turn: estimates and backoff, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from crustcredits import ApiKey, Balance, Known, Outcome, RateLimitWaitError, Unknown
from crustcredits._fan_out import Ask, FanOut, Land
from crustcredits._keys.api_key import Key
from tests.virtual import keys, now

pytestmark = pytest.mark.virtual

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


async def names(stream: Any) -> list[str]:
    return [outcome.key.name async for outcome in stream]


class FakeTurns:
    """Every key needs a turn, and `starts` of them are likely to have it in time."""

    patience = 100.0

    def __init__(self, *starts: tuple[int, float]) -> None:
        self.starts = list(starts) or [(1_000, 0.0)]
        self.asked: list[float] = []  # when an estimate was made

    def needs_turn(self, key: Key) -> bool:
        return True

    def likely(self, most: int) -> tuple[int, float]:
        self.asked.append(now())
        count, wait = self.starts[0] if len(self.starts) == 1 else self.starts.pop(0)
        return min(count, most), wait

    def had_no_turn(self, outcome: Outcome[Any]) -> bool:
        return isinstance(outcome.error, RateLimitWaitError) and not outcome.attempts


def late(key: Key, *, attempts: int = 0) -> Unknown:
    return Unknown(
        key=key,
        error=RateLimitWaitError("its turn comes too late", key_name=key.label, wait=9.0),
        attempts=attempts,
    )


def known(key: Key) -> Known[Balance]:
    assert isinstance(key, ApiKey)
    return Known(balance=Balance(key=key, credits=Decimal(1), checked_at=NOON))


def landing(starts: list[float], is_late: Callable[[Key], bool], *, seconds: float = 0.0) -> Ask:
    """An `Ask` that notes its times; outcomes land at once, or after these seconds."""

    def ask(key: Key, land: Land) -> Callable[[], None]:
        starts.append(now())
        outcome = late(key) if is_late(key) else known(key)
        if seconds:
            return asyncio.get_running_loop().call_later(seconds, land, outcome).cancel
        land(outcome)
        return lambda: None

    return ask


def as_source(pool: list[ApiKey], *, is_async: bool) -> Iterator[Key] | AsyncGenerator[Key, None]:
    async def source() -> AsyncGenerator[Key, None]:
        for key in pool:
            yield key

    return source() if is_async else iter(pool)


@pytest.mark.parametrize("is_async", [False, True])
async def test_after_a_key_without_a_turn_each_further_key_waits_up_to_a_second(
    *, is_async: bool
) -> None:
    """An endless source of such keys is not drained, and a source that ends is read to its end."""
    starts: list[float] = []
    run = FanOut(landing(starts, lambda key: True), room=100, turns=FakeTurns())
    landed = await names(run.outcomes(as_source(keys(8), is_async=is_async)))
    assert landed == [f"k{number}" for number in range(8)]
    assert starts == pytest.approx([0, 0.1, 0.3, 0.7, 1.5, 2.5, 3.5, 4.5], abs=0.01)


@pytest.mark.parametrize("is_async", [False, True])
async def test_each_outcome_of_a_request_lets_two_keys_start_after_a_key_without_a_turn(
    *, is_async: bool
) -> None:
    """So a source is soon read at full speed again."""
    starts: list[float] = []
    ask = landing(starts, lambda key: key.label in {"k0", "k1"}, seconds=0.01)
    run = FanOut(ask, room=4, turns=FakeTurns())
    assert len(await names(run.outcomes(as_source(keys(40), is_async=is_async)))) == 40
    assert starts[:4] == [0.0] * 4
    assert starts[4] == pytest.approx(0.01, abs=1e-3)  # k2 has had its turn
    assert starts[-1] < 0.3


async def test_keys_that_began_before_a_key_without_a_turn_do_not_double_the_wait() -> None:
    """They fail for the same reason."""
    starts: list[float] = []
    run = FanOut(landing(starts, lambda key: True, seconds=0.5), room=4, turns=FakeTurns())
    await names(run.outcomes(iter(keys(7))))
    assert starts == pytest.approx([0, 0, 0, 0, 0.6, 0.7, 0.8], abs=0.01)


async def test_an_outcome_at_once_after_requests_of_others_is_no_turn() -> None:
    """The key waits for a retry that comes too late, for all its callers."""
    starts: list[float] = []

    def ask(key: Key, land: Land) -> Callable[[], None]:
        starts.append(now())
        land(late(key, attempts=1))
        return lambda: None

    await names(FanOut(ask, room=4, turns=FakeTurns()).outcomes(iter(keys(4))))
    assert starts == pytest.approx([0, 0.1, 0.3, 0.7], abs=0.01)


async def test_an_estimate_is_used_for_a_tenth_of_a_second_or_until_so_many_keys_have_started() -> (
    None
):
    """Also an estimate of 0, however many outcomes land meanwhile."""
    starts: list[float] = []
    turns = FakeTurns((4, 0.0), (0, 0.0), (0, 0.3), (3, 0.0))
    ask = landing(starts, lambda key: False, seconds=0.01)
    await names(FanOut(ask, room=4, turns=turns).outcomes(iter(keys(7))))
    assert turns.asked == pytest.approx([0, 0.01, 0.11, 0.41], abs=0.005)
    assert starts == pytest.approx([0] * 4 + [0.41] * 3, abs=0.005)
