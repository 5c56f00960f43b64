"""A fake API with balances, keys and faults that change with time, in virtual time."""

from __future__ import annotations

import asyncio
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any

import pytest

from crustcredits import (
    ApiKey,
    ConfigurationError,
    CreditsClient,
    InternalServerError,
    InvalidKeyError,
    Known,
    PaymentRequiredError,
    RateLimit,
    Retry,
    Unknown,
)
from crustcredits.testing import FakeAPI, FakeClient, Fault, fake_client
from tests.test_check_over_sockets import EXPECTED
from tests.virtual import now

pytestmark = pytest.mark.virtual


async def credits(client: CreditsClient, key: ApiKey) -> Decimal:
    return (await client.balance(key)).credits


async def test_a_client_in_memory_knows_its_keys() -> None:
    """By their labels, with their credits; keys of one account share its balance."""
    async with fake_client({"acme/prod": 50, "acme/dev": 50, "dev": "0.5"}) as client:
        assert isinstance(client, FakeClient)
        report = await client.check(client.keys)
        assert {label: outcome.credits for label, outcome in report.by_label.items()} == {
            "acme/prod": 50,
            "acme/dev": 50,
            "dev": Decimal("0.5"),
        }
        assert report.total_credits == Decimal("50.5")
        assert client.api.key("acme/dev") is client.keys[1]
        assert [arrival.key for arrival in client.api.arrivals] == [
            "acme/prod",
            "dev",
            "acme/dev",
        ]  # accounts take turns
        account = await client.account(client.keys[0])
        assert account.credits == 50
        assert account.recurring_credits == 0
        with pytest.raises(ConfigurationError, match="no key of this label was issued"):
            client.api.key("globex")
    async with fake_client() as client:
        assert client.keys == []
    with pytest.raises(ConfigurationError, match="acme/dev: keys of one account share one balance"):
        fake_client({"acme/prod": 50, "acme/dev": 51})


@pytest.mark.parametrize("fault", Fault)
async def test_every_fault_works_in_memory(fault: Fault) -> None:
    """As over a socket, and by default without a wait."""
    began = now()
    async with fake_client(
        {"bad": 7, "good": 5}, retry=Retry(attempts=2, backoff=0.0, wait_max=0.0)
    ) as client:
        client.api.fail(client.keys[0], fault)
        bad, good = await client.check(client.keys)
    assert type(bad.error) is (EXPECTED[fault] or type(None))
    assert good.credits == 5
    assert bad.key.label == "bad"
    if fault is Fault.GLITCH:
        assert bad.credits == 0
    elif EXPECTED[fault] is None:
        assert bad.credits == 7
    assert now() - began < 0.2


def test_the_fault_table_is_complete() -> None:
    """Each row has the resulting error."""
    rows = re.findall(r"^ *\| `(\w+)` *\| .* \| (\S+) *\|$", Fault.__doc__ or "", re.MULTILINE)
    expected = {
        fault.name: "none" if error is None else f"`{error.__name__}`"
        for fault, error in EXPECTED.items()
    }
    assert dict(rows) == expected
    assert [name for name, _ in rows] == [fault.name for fault in Fault]


async def test_a_key_can_be_revoked() -> None:
    """For good, on both endpoints."""
    async with fake_client({"prod": 5}) as client:
        key = client.keys[0]
        assert await credits(client, key) == 5
        client.api.revoke(key)
        with pytest.raises(InvalidKeyError):
            await client.balance(key)
        with pytest.raises(InvalidKeyError):
            await client.account(key)


async def test_the_whole_api_can_be_down() -> None:
    """For known and unknown keys, with any fault.

    Afterwards the faults of single keys still apply.
    """
    async with fake_client({"prod": 5, "spent": 0}) as client:
        client.api.fail(client.keys[1], Fault.PAYMENT_REQUIRED)
        client.api.down()
        pool: list[ApiKey | str] = [*client.keys, "unknown"]
        assert {type(each.error) for each in await client.check(pool)} == {InternalServerError}
        client.api.down(Fault.SILENCE)
        assert {each.state for each in await client.check(pool)} == {"failed"}
        client.api.up()
        errors = [type(each.error) for each in await client.check(pool)]
        assert errors == [type(None), PaymentRequiredError, InvalidKeyError]
        with pytest.raises(ConfigurationError, match="fault must be a Fault, not a str"):
            client.api.down("503")  # type: ignore[arg-type]  # the mistake under test


async def test_a_fault_can_be_limited_to_one_endpoint() -> None:
    """The other endpoint answers; the fault ends after its number of times."""
    async with fake_client({"prod": 5}, retry=Retry(attempts=1)) as client:
        key = client.keys[0]
        client.api.fail(key, Fault.INTERNAL_ERROR, path="/account/credits", times=1)
        client.api.fail(key, Fault.INVALID_KEY, path="/user/credits", times=1)
        with pytest.raises(InternalServerError):
            await client.account(key)
        with pytest.raises(InvalidKeyError):
            await client.balance(key)
        assert (await client.account(key)).credits == await credits(client, key) == 5
        with pytest.raises(
            ConfigurationError, match="path must be /user/credits or /account/credits"
        ):
            client.api.fail(key, Fault.RESET, path="/credits")


async def test_credits_are_spent_as_time_passes() -> None:
    """Down to 0, and no further; spending at once may go below 0."""
    async with fake_client({"acme/prod": 100, "acme/dev": 100}) as client:
        api, (prod, dev) = client.api, client.keys
        api.spend(prod, per_second=2)
        await asyncio.sleep(10)
        assert await credits(client, dev) == pytest.approx(80, abs=0.1)
        api.spend(dev, "30.5")
        assert await credits(client, prod) == pytest.approx(Decimal("49.5"), abs=Decimal("0.1"))
        await asyncio.sleep(100)
        assert await credits(client, prod) == 0
        api.spend(prod, per_second=0)
        api.set_credits(prod, 7)
        await asyncio.sleep(100)
        assert await credits(client, prod) == 7
        api.spend(prod, 10)
        assert await credits(client, prod) == -3
        with pytest.raises(ConfigurationError, match="give either credits"):
            api.spend(prod)
        with pytest.raises(ConfigurationError, match="credits must be exact"):
            api.spend(prod, 0.5)  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize(("rollover", "after"), [(False, 100), (True, 140)])
async def test_a_grant_comes_at_its_date(rollover: bool, after: int) -> None:
    """Again after 30 days; the remainder of the last grant stays only with rollover."""
    async with fake_client({"prod": 40}) as client:
        key = client.keys[0]
        client.api.grant(key, 100, after=timedelta(hours=1), rollover=rollover)
        account = await client.account(key)
        assert account.credits == 40
        assert account.recurring_credits == 100
        assert account.recurring_credits_frequency == "monthly"
        assert account.credit_rollover is rollover
        first = account.recurring_credits_refresh_date
        assert first is not None
        assert timedelta(minutes=59) < first - datetime.now(UTC) <= timedelta(hours=1)
        await asyncio.sleep(3601)
        account = await client.account(key)
        assert account.credits == after
        assert account.recurring_credits_refresh_date == first + timedelta(days=30)
        await asyncio.sleep(timedelta(days=60).total_seconds())
        assert await credits(client, key) == (after + 200 if rollover else 100)


async def test_a_top_up_expires() -> None:
    """Recurring credits are spent first, then the next to expire; its remainder is lost."""
    async with fake_client({"prod": 10}) as client:
        api, key = client.api, client.keys[0]
        api.top_up(key, 50, expires=100)
        api.top_up(key, 30)
        assert await credits(client, key) == 90
        api.spend(key, 25)
        account = await client.account(key)
        assert account.credits == 65
        top_ups = account.credit_topups or []
        assert [(each["original_credits"], each["remaining_credits"]) for each in top_ups] == [
            (50, 35),
            (30, 30),
        ]
        assert [each["expires_at"] is None for each in top_ups] == [False, True]
        api.grant(key, 100, after=50)
        await asyncio.sleep(51)
        assert await credits(client, key) == 165
        await asyncio.sleep(51)
        assert await credits(client, key) == 130
        api.set_credits(key, 0)
        assert (await client.account(key)).credit_topups == []


async def test_an_answer_can_lag() -> None:
    """Like the answer of a replica."""
    async with fake_client({"prod": 10}) as client:
        api, key = client.api, client.keys[0]
        await asyncio.sleep(100)
        api.set_credits(key, 5)
        api.lag(60)
        await asyncio.sleep(30)
        assert await credits(client, key) == 10
        await asyncio.sleep(31)
        assert await credits(client, key) == 5
        api.lag(0)
        assert await credits(client, key) == 5


def test_changes_over_time_need_a_running_loop() -> None:
    """Balances can be set without one."""
    api = FakeAPI()
    key = api.add_key("prod")
    api.set_credits(key, 5)
    api.spend(key, 2)
    calls = (
        partial(api.spend, key, per_second=1),
        partial(api.grant, key, 5, after=1),
        partial(api.top_up, key, 5),
    )
    for call in calls:
        with pytest.raises(
            ConfigurationError, match="needs a running loop for its time; call it in a coroutine"
        ):
            call()
    wrong: list[dict[str, Any]] = [{"limit": 0}, {"period": 0}, {"scope": "all"}]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            FakeAPI(**options)


async def test_a_service_is_tested_without_a_socket_and_without_waiting() -> None:
    """With its own limit, retries and cache."""
    options: dict[str, Any] = {
        "rate_limit": RateLimit(requests=2),
        "max_age": 60,
        "request_timeout": 3,
    }
    async with fake_client({"a": 1, "b": 2, "c": 3}, **options) as client:
        report = await client.check(client.keys, timeout=1)
        assert [type(each) for each in report] == [Known, Known, Unknown]
        assert client.peek(client.keys[0]) is not None
        client.api.fail(client.keys[2], Fault.SILENCE)
        began = now()
        await asyncio.sleep(61)
        await client.check(client.keys[2:], timeout=3)
        assert now() - began == pytest.approx(64, abs=0.1)


@pytest.mark.parametrize(
    "wrong", [{"times": 0}, {"times": 1.5}, {"times": "2"}, {"retry_after": -4}]
)
def test_a_fault_comes_a_whole_number_of_times(wrong: dict[str, Any]) -> None:
    """At least once; a wait is a whole number of seconds."""
    api = FakeAPI()
    with pytest.raises(ConfigurationError, match="a whole number of at least 1"):
        api.fail(api.add_key("prod"), Fault.REFUSED, **wrong)


def test_spent_credits_are_exact_and_at_least_0() -> None:
    """Negative, inexact and non-numeric amounts are refused."""
    api = FakeAPI()
    key = api.add_key("prod")
    for amount in (-1, True, [1], None):
        with pytest.raises(ConfigurationError):
            api.spend(key, amount if amount is not None else "x")  # type: ignore[arg-type]  # the mistakes under test


@pytest.mark.parametrize("wrong", [["a"], {5: 5}, {"a": None}, {"a": [1]}])
def test_a_client_in_memory_is_made_of_labels_and_credits(wrong: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"must be a Mapping|must be a str|credits must be exact"
    ):
        fake_client(wrong)


async def test_refusals_in_memory_are_raised_at_once() -> None:
    """And any number of calls is answered."""
    async with fake_client({"prod": 5}) as client:
        began = now()
        for _ in range(301):
            await client.balance(client.keys[0])
        client.api.fail(client.keys[0], Fault.REFUSED, times=1)
        assert (await client.check(client.keys)).failed
        assert now() - began < 1


async def test_the_api_in_memory_has_the_limit_of_the_client() -> None:
    """With its period and scope, so no request is refused."""
    for limit in (
        RateLimit(requests=5, period=1.0, pace=None),
        RateLimit(requests=5, scope="key", pace=None),
    ):
        async with fake_client(
            {f"k{number}": 7 for number in range(20)}, rate_limit=limit
        ) as client:
            assert (await client.check(client.keys)).ok
            assert client.api.refused == 0


async def test_a_label_that_may_be_a_secret_is_refused_and_not_repeated() -> None:
    """The mapping is of labels to amounts, not of secrets to amounts."""
    secret = "sk_live_51H8x2vKq9Zr3Tn7Wb4Lm6Pd"
    for labels in ({secret: 1}, {f"{secret}/a": 1, f"{secret}/b": 2}):
        with pytest.raises(
            ConfigurationError, match="a label cannot be used, or may be a secret"
        ) as caught:
            fake_client(labels)
        assert secret not in str(caught.value)
