"""`Outage`: what its tokens are told, and in which order."""

from __future__ import annotations

import asyncio

import pytest

from crustcredits.redis.outage import Outage
from tests.virtual import now

pytestmark = pytest.mark.virtual

LEASE = 81.0


class Tokens:
    """Notes what they are told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self._name = name
        self._told = told

    def lose_touch(self) -> None:
        self._told.append(f"{self._name} loses touch")

    def go_alone(self) -> None:
        self._told.append(f"{self._name} goes alone")

    def change(self) -> None:
        self._told.append(f"{self._name} changes")

    def wake(self) -> None:
        self._told.append(f"{self._name} wakes")

    def fail(self) -> None:
        self._told.append(f"{self._name} fails")


def outage_of(told: list[str], *, raises: bool = False, is_strict: bool = False) -> Outage:
    tokens = [Tokens(name, told) for name in "ab"]
    outage = Outage(lambda: tokens, raises=raises)
    outage.open(lease=LEASE, share=0.5, is_strict=is_strict)
    return outage


async def test_calls_wake_when_all_tokens_have_entered_degraded_mode() -> None:
    """A call that wakes may take tokens of another bucket, which would be too many."""
    told: list[str] = []
    outage = outage_of(told)
    assert not outage.lost(now(), "x")
    assert told == ["a loses touch", "b loses touch"]
    await asyncio.sleep(3)
    told.clear()
    assert outage.lost(now(), "x")
    assert told == ["a goes alone", "b goes alone", "a wakes", "b wakes"]
    told.clear()
    assert not outage.lost(now(), "x")
    await asyncio.sleep(LEASE)
    assert told == ["a changes", "b changes", "a wakes", "b wakes"]
    told.clear()
    assert outage.ended()
    assert told == ["a changes", "b changes", "a wakes", "b wakes"]
    outage.close()


@pytest.mark.parametrize("is_strict", [False, True])
async def test_a_process_that_stood_still_is_not_degraded_at_once(
    is_strict: bool,
) -> None:
    """Its message had an answer, which it could not read in time."""
    told: list[str] = []
    outage = outage_of(told, is_strict=is_strict)
    sent = now()
    await asyncio.sleep(2 * LEASE)
    assert not outage.lost(sent, "x")
    assert not outage.is_long
    await asyncio.sleep(2)
    assert outage.lost(now(), "x")
    assert not outage.is_settled
    assert outage.settles_at > now() + LEASE - 4
    outage.close()


async def test_a_message_of_long_ago_that_is_given_up_now_is_no_sign_of_a_long_outage() -> None:
    """Redis may have answered others since it was sent."""
    outage = outage_of([])
    outage.lost(now(), "x")
    await asyncio.sleep(2.6)
    assert not outage.lost(now() - 0.9, "x")
    await asyncio.sleep(0.4)
    assert outage.lost(now() - 0.9, "x")
    outage.close()


async def test_an_outage_within_the_grace_time_changes_nothing() -> None:
    told: list[str] = []
    outage = outage_of(told)
    outage.lost(now(), "x")
    await asyncio.sleep(1)
    told.clear()
    assert not outage.ended()
    assert told == []
    assert outage.since is None


async def test_calls_fail_at_each_loss_when_on_outage_is_raise() -> None:
    told: list[str] = []
    outage = outage_of(told, raises=True)
    outage.lost(now(), "x")
    for _ in range(2):
        await asyncio.sleep(3)
        told.clear()
        assert not outage.lost(now(), "x")
        assert told == ["a fails", "b fails"]
    assert not outage.is_degraded


@pytest.mark.parametrize(("is_strict", "seconds"), [(False, 78.0), (True, 88.0)])
async def test_a_degraded_process_waits_until_no_other_uses_its_share(
    is_strict: bool, seconds: float
) -> None:
    """A strict one counts from its last message, and until the others have noticed."""
    outage = outage_of([], is_strict=is_strict)
    outage.lost(now(), "x")
    await asyncio.sleep(3)
    outage.lost(now(), "x")
    assert outage.settles_at == pytest.approx(now() + seconds)
    outage.close()
