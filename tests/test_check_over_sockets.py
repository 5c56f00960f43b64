"""A pool with every fault of the sandbox, over sockets: the right error for each, and no secret."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import pickle
import traceback
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from rich.console import Console
from rich.traceback import Traceback

from crustcredits import (
    APIConnectionError,
    ApiKey,
    APITimeoutError,
    ConfigurationError,
    CreditsClient,
    CrustCreditsError,
    GatewayError,
    InternalServerError,
    InvalidKeyError,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimit,
    RateLimitError,
    Report,
    Retry,
    UnexpectedResponseError,
)
from crustcredits.testing import Fault, SandboxServer

EXPECTED: dict[Fault, type[CrustCreditsError] | None] = {
    Fault.REFUSED: RateLimitError,
    Fault.INTERNAL_ERROR: InternalServerError,
    Fault.BAD_GATEWAY: InternalServerError,
    Fault.UNAVAILABLE: InternalServerError,
    Fault.INVALID_KEY: InvalidKeyError,
    Fault.PAYMENT_REQUIRED: PaymentRequiredError,
    Fault.FORBIDDEN: PermissionDeniedError,
    Fault.CHALLENGE: GatewayError,
    Fault.RESET: APIConnectionError,
    Fault.RESET_IN_BODY: APIConnectionError,
    Fault.CUT_SHORT: APIConnectionError,
    Fault.SILENCE: APITimeoutError,
    Fault.DRIP: APITimeoutError,
    Fault.NOT_JSON: UnexpectedResponseError,
    Fault.WRONG_SHAPE: UnexpectedResponseError,
    Fault.NAN: UnexpectedResponseError,
    Fault.REDIRECT: UnexpectedResponseError,
    Fault.ENDLESS: UnexpectedResponseError,
    Fault.BOMB: UnexpectedResponseError,
    Fault.COOKIE: None,
    Fault.GLITCH: None,
    Fault.STALE: None,
}
# STALE loses two connections of later requests, so that some need more than a second attempt.
RETRY = Retry(attempts=4, backoff=0.01, wait_max=0.5)


def troubled_pool(sandbox: SandboxServer) -> tuple[list[ApiKey], dict[str, Fault]]:
    """Two keys for every fault, one with it always and one with it once, among 100 good keys."""
    fine = [sandbox.add_key(f"fine {number}", credits=number) for number in range(100)]
    faults: dict[str, Fault] = {}
    for number, fault in enumerate(Fault):
        always, once = (
            sandbox.add_key(f"always {fault.name}"),
            sandbox.add_key(f"once {fault.name}"),
        )
        sandbox.fail(always, fault)
        sandbox.fail(once, fault, times=1)
        faults |= {always.name: fault, once.name: fault}
        fine[number * 5 : number * 5] = [always, once]
    return [*fine, ApiKey("sandbox-not-known-here", name="unknown")], faults


@pytest.mark.parametrize("detail", [False, True])
async def test_every_fault_gives_its_error_and_all_other_keys_succeed(
    sandbox: SandboxServer, detail: bool
) -> None:
    """The check ends within its timeout, and the good keys land early."""
    pool, faults = troubled_pool(sandbox)
    loop = asyncio.get_running_loop()
    landed: dict[str, float] = {}
    began = loop.time()
    async with CreditsClient(base_url=sandbox.url, retry=RETRY, request_timeout=0.8) as client:
        report = await client.check(
            pool,
            detail=detail,
            timeout=12,
            on_outcome=lambda outcome: landed.setdefault(outcome.key.name, loop.time() - began),
        )
    for outcome in report:
        name = outcome.key.name
        if name.startswith("fine"):
            assert outcome.credits == int(name.split()[1])
        elif name.startswith("always"):
            assert type(outcome.error) is (EXPECTED[faults[name]] or type(None)), name
        elif name == "unknown":
            assert type(outcome.error) is InvalidKeyError
    once_failed = {
        outcome.key.name for outcome in report.failed if outcome.key.name.startswith("once")
    }
    # A second attempt helps against transient faults. Against a refusal only a wait helps, which
    # `wait_max` does not allow.
    lasting = {
        InvalidKeyError,
        PaymentRequiredError,
        PermissionDeniedError,
        UnexpectedResponseError,
        RateLimitError,
    }
    assert once_failed == {
        f"once {fault.name}" for fault, kind in EXPECTED.items() if kind in lasting
    }
    # About 210 requests at a pace of 100 a second, and 4 times 0.8 s for the hanging ones, in
    # parallel.
    assert max(landed.values()) < 10
    assert max(seconds for name, seconds in landed.items() if name.startswith("fine")) < 5
    assert sandbox.worst_window() <= 300


@pytest.mark.any_loop
async def test_each_error_hides_the_secret_and_names_the_key(
    sandbox: SandboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """In log, repr, text, traceback with local variables, chain, JSON, pickle and on a terminal."""
    caplog.set_level(logging.DEBUG)
    pool, _ = troubled_pool(sandbox)
    async with CreditsClient(base_url=sandbox.url, retry=RETRY, request_timeout=0.3) as client:
        report = await client.check(pool, timeout=10)
        raised = [error async for error in raised_by(client, report)]
    shown = [caplog.text, *everything_shown_of(report)]
    for error in raised:
        assert error.key_name is not None
        shown += everything_shown_of_error(error)
    for text in shown:
        assert not [key.name for key in pool if key.get_secret_value() in text]
        assert "Bearer sandbox" not in text


async def raised_by(client: CreditsClient, report: Report) -> Any:
    for outcome in report.failed:
        assert isinstance(outcome.key, ApiKey)
        try:
            await client.balance(outcome.key.get_secret_value(), timeout=0.3)
        except CrustCreditsError as error:
            yield error
    with suppress(CrustCreditsError):
        await client.balance(report[0].key, timeout=0.3)
    with pytest.raises(ExceptionGroup) as caught:
        report.raise_on_error()
    for each in caught.value.exceptions:
        yield each


def everything_shown_of(report: Report) -> Iterator[str]:
    yield repr(report)
    yield repr(list(report))
    yield json.dumps(report.to_dict())
    yield on_terminal(list(report))


def everything_shown_of_error(error: CrustCreditsError) -> Iterator[str]:
    yield from (str(error), repr(error), repr(vars(error)))
    yield pickle.dumps(error).decode("latin-1")
    yield "".join(traceback.format_exception(error))
    # The frames of this test hold no raw secret but `error`'s own, so any secret shown comes from
    # the library.
    yield on_terminal(
        Traceback.from_exception(
            type(error), error, error.__traceback__, show_locals=True, locals_max_string=10_000
        )
    )


def on_terminal(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=500, force_terminal=True)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("mistake", ["Bearer sk-0123456789abc", "sk-0123456789abc x", ""])
async def test_a_mistyped_key_shows_in_no_frame_of_the_library(
    sandbox: SandboxServer, mistake: str
) -> None:
    """As a single key, in a pool, or in place of a pool."""
    async with CreditsClient(base_url=sandbox.url) as client:
        for call in (
            client.balance(mistake),
            client.account(mistake),
            client.check(mistake),
            _anext(client.stream([mistake])),
        ):
            with pytest.raises(ConfigurationError) as caught:
                await call
            assert_hidden(caught.value, "sk-0123456789abc")
        with pytest.raises(ConfigurationError):
            client.stream(mistake)
        for swapped in (
            client.require(["sk-0123456789abc"], 5),  # type: ignore[call-overload]  # the mistakes under test
            client.require({"prod": "sk-0123456789abc"}, ["sk-1"]),  # type: ignore[call-overload]
            client.balance("sk-1", timeout="sk-0123456789abc"),  # type: ignore[arg-type]
            client.balance("sk-1", max_age="sk-0123456789abc"),  # type: ignore[arg-type]
        ):
            with pytest.raises(ConfigurationError) as caught:
                await swapped
            assert "sk-0123456789abc" not in str(caught.value)
        for mistaken in (
            {"credits": -1},
            {"credits": 5, "margin": "x"},
            {"credits": 5, "timeout": 0},
            {"credits": 5, "max_age": -1},
        ):
            with pytest.raises(ConfigurationError) as caught:
                await client.require(keys=["sk-0123456789abc"], **mistaken)
            assert_hidden(caught.value, "sk-0123456789abc")
    secret_url = "http://someone:sk-0123456789abc@127.0.0.1"
    for options in (
        {"base_url": secret_url},
        {"proxy": secret_url, "concurrency": 0},
        {"proxy": secret_url + "/[", "base_url": "x"},
        {"proxy": secret_url, "session": 5},
    ):
        with pytest.raises(ConfigurationError) as caught:
            CreditsClient(**options)
        assert_hidden(caught.value, "sk-0123456789abc")


def assert_hidden(error: BaseException, secret: str) -> None:
    """Assert that no local variable of the library's frames holds the secret."""
    frame = error.__traceback__
    while frame is not None:
        if "/crustcredits/" in frame.tb_frame.f_code.co_filename:
            assert secret not in repr(frame.tb_frame.f_locals)
        frame = frame.tb_next


async def _anext(stream: Any) -> Any:
    outcomes = [outcome async for outcome in stream]
    return outcomes[0].result()


async def test_a_pool_with_endless_bodies_is_checked_in_bounded_memory(
    sandbox: SandboxServer,
) -> None:
    """An endless body, and a body that expands to 16 MiB, are cut at 64 KiB."""
    keys = []
    for number in range(40):
        key = sandbox.add_key()
        sandbox.fail(key, Fault.ENDLESS if number % 2 else Fault.BOMB)
        keys.append(key)
    async with CreditsClient(base_url=sandbox.url) as client:
        await client.check(keys[:1])  # the sandbox builds the second kind of body once
        tracemalloc.start()
        report = await client.check(keys)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert {type(outcome.error) for outcome in report} == {UnexpectedResponseError}
    # 32 requests at a time, each with at most a buffer on either side; one whole body would exceed
    # the bound.
    assert peak < 12 * 2**20


async def test_no_call_is_lost_when_the_bucket_is_empty(sandbox: SandboxServer) -> None:
    """100 calls that share 20 tokens all have an answer.

    On uvloop the handle of a timer that is due does not expose its time.
    """
    keys = [sandbox.add_key() for _ in range(100)]
    limit = RateLimit(requests=20, period=0.05, pace=None, scope="client")
    async with CreditsClient(base_url=sandbox.url, rate_limit=limit) as client:
        balances = await asyncio.gather(*(client.balance(key, timeout=10) for key in keys))
    assert [balance.key for balance in balances] == keys
