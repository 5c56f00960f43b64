"""One attempt over real sockets: connections, timeouts, re-sends, cookies, redirects, foreign
sessions."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from crustcredits import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    ConfigurationError,
    CreditsClient,
    RateLimit,
    Retry,
    UnexpectedResponseError,
)
from crustcredits._http.transport import Failure, _client_timeout
from crustcredits.testing import Fault, SandboxServer
from tests.conftest import eventually

ONCE = Retry(attempts=1)


def client_of(sandbox: SandboxServer, **options: Any) -> CreditsClient:
    return CreditsClient(base_url=sandbox.url, retry=options.pop("retry", ONCE), **options)


async def test_connections_are_kept_and_shared_by_all_keys(sandbox: SandboxServer) -> None:
    """One session; no more connections than requests at once."""
    keys = [sandbox.add_key() for _ in range(30)]
    async with client_of(sandbox, concurrency=3, rate_limit=RateLimit(pace=None)) as client:
        assert (await client.check(keys)).ok
    assert sandbox.peak_connections <= 3
    assert sandbox.requests == 30


async def test_a_closed_client_leaves_no_connection_open(sandbox: SandboxServer) -> None:
    """Its session is its own."""
    async with client_of(sandbox) as client:
        await client.balance(sandbox.add_key())
        assert sandbox.connections == 1
    await eventually(lambda: sandbox.connections == 0)


async def test_a_connection_found_closed_is_not_sent_over_again_by_aiohttp(
    sandbox: SandboxServer,
) -> None:
    """A second arrival for one token would break the promise.

    The retry is ours, with a token of its own.
    """
    key = sandbox.add_key()
    sandbox.fail(key, Fault.STALE, times=1)
    async with client_of(sandbox) as client:
        await client.balance(key)
        with pytest.raises(APIConnectionError, match="before an answer"):
            await client.balance(key)
        assert sandbox.requests == 2
        assert client.quota().free == 298
    async with client_of(sandbox, retry=Retry(backoff=0.0)) as client:
        sandbox.fail(key, Fault.STALE, times=1)
        await client.balance(key)
        await client.balance(key)
        assert sandbox.requests == 2 + 3
        assert client.quota().free == 297


async def test_a_refused_connection_certainly_never_left() -> None:
    """Its token is home at once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with CreditsClient(base_url=f"http://127.0.0.1:{port}", retry=ONCE) as client:
            with pytest.raises(APIConnectionError, match=r"could not connect \(.*refused.*\)"):
                await client.balance("sk-1")
            assert client.quota().free == 300


async def test_a_name_that_does_not_resolve_is_a_connection_error() -> None:
    """By the reserved name that never does; the token is home at once."""
    async with CreditsClient(base_url="https://host.invalid", retry=ONCE) as client:
        with pytest.raises(APIConnectionError, match="could not connect"):
            await client.balance("sk-1")
        assert client.quota().free == 300


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        (Fault.RESET, APIConnectionError, "before an answer"),
        (Fault.RESET_IN_BODY, APIConnectionError, "while the answer came"),
        (Fault.CUT_SHORT, APIConnectionError, "while the answer came"),
        (Fault.SILENCE, APITimeoutError, "no whole answer within 0.2 s"),
        (Fault.DRIP, APITimeoutError, "no whole answer within 0.2 s"),
        (Fault.ENDLESS, UnexpectedResponseError, "more than 64 KiB"),
        (Fault.BOMB, UnexpectedResponseError, "more than 64 KiB"),
        (Fault.REDIRECT, UnexpectedResponseError, "a redirect, which is not followed"),
    ],
)
async def test_what_a_network_does_is_an_error_of_ours(
    sandbox: SandboxServer, fault: Fault, kind: type[Exception], said: str
) -> None:
    """Bounded in time and size; the next request is not the worse for it."""
    key, other = sandbox.add_key("troubled"), sandbox.add_key("fine")
    sandbox.fail(key, fault)
    seconds = (
        0.2 if kind is APITimeoutError else 5.0
    )  # only what is to come too late needs a short one
    async with client_of(sandbox, request_timeout=seconds) as client:
        with pytest.raises(kind, match=said) as caught:
            await client.balance(key)
        assert str(caught.value).startswith("troubled: ")
        assert caught.value.__context__ is caught.value.__cause__ is None
        assert (await client.balance(other)).credits == 1000
    assert [arrival.path for arrival in sandbox.arrivals] == ["/user/credits"] * 2


async def test_an_answer_that_broke_off_still_tells_its_request(sandbox: SandboxServer) -> None:
    """Its headers came, so the server has counted it: the token is out for the period and no
    longer."""
    key = sandbox.add_key()
    for fault in (Fault.DRIP, Fault.CUT_SHORT):
        sandbox.fail(key, fault, times=1)
        async with client_of(
            sandbox, request_timeout=0.1, rate_limit=RateLimit(requests=1, period=0.2, margin=0.0)
        ) as client:
            with pytest.raises((APITimeoutError, APIConnectionError)) as caught:
                await client.balance(key)
            assert caught.value.request_id == f"sandbox-{sandbox.requests}"
            assert caught.value.rate_limit is not None
            assert client.quota().seconds_for(1) <= 0.2 + 1e-9


async def test_no_cookie_goes_from_one_key_to_the_next() -> None:
    """Neither from our session nor from a caller's with a jar of its own.

    Jars keep none for bare addresses.
    """
    async with SandboxServer(host="localhost") as sandbox, aiohttp.ClientSession() as session:
        key, other = sandbox.add_key("first"), sandbox.add_key("second")
        sandbox.fail(key, Fault.COOKIE)
        for given in (None, session):
            async with client_of(sandbox, session=given) as client:
                await client.balance(key)
                await client.balance(other)
        assert not [arrival for arrival in sandbox.arrivals if "Cookie" in arrival.headers]
        assert len(session.cookie_jar) == 0


@asynccontextmanager
async def hostile_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose every setting would spoil a request."""
    (tmp_path / ".netrc").write_text("default login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))

    async def meddle(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
        raise AssertionError("a session's middleware took part")

    async with aiohttp.ClientSession(
        base_url="http://127.0.0.1:1/elsewhere/",
        headers={"x-api-version": "1999-01-01", "Cookie": "a=b"},
        timeout=aiohttp.ClientTimeout(total=0.001),
        raise_for_status=True,
        auto_decompress=False,
        trust_env=True,
        middlewares=(meddle,),
        read_bufsize=1,
    ) as session:
        yield session


async def test_a_callers_session_cannot_surprise(
    sandbox: SandboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its credentials, headers, timeouts, middlewares and habits are left out.

    And it is not closed.
    """
    key = sandbox.add_key(credits="138940.37")
    refused = sandbox.add_key()
    sandbox.fail(refused, Fault.FORBIDDEN)
    async with hostile_session(tmp_path, monkeypatch) as session:
        async with client_of(sandbox, session=session) as client:
            report = await client.check([key, refused], detail=True)
        assert not session.closed
    assert [outcome.credits for outcome in report] == [Decimal("138940.37"), None]
    assert "(HTTP 403)" in str(report[1].error)
    sent = next(arrival.headers for arrival in sandbox.arrivals if arrival.key == key.name)
    assert sent["Authorization"] == f"Bearer {key.get_secret_value()}"
    assert sent["x-api-version"] == "2025-11-01"
    assert "Cookie" not in sent


async def test_a_session_with_basic_credentials_sends_the_key(sandbox: SandboxServer) -> None:
    """Not those."""
    key = sandbox.add_key()
    async with aiohttp.ClientSession(headers={"Authorization": "Basic default"}) as session:
        async with client_of(sandbox, session=session) as client:
            await client.balance(key)
        session.headers.popall("Authorization")
        with pytest.warns(DeprecationWarning, match="BasicAuth"):
            session._default_auth = aiohttp.BasicAuth("someone", "else")
        async with client_of(sandbox, session=session) as client:
            await client.balance(key)
    assert [arrival.headers["Authorization"] for arrival in sandbox.arrivals] == [
        f"Bearer {key.get_secret_value()}"
    ] * 2


async def test_a_given_session_that_is_closed_says_so(sandbox: SandboxServer) -> None:
    """As an error of the whole call, because no key is to blame."""
    async with aiohttp.ClientSession() as session:
        pass
    async with client_of(sandbox, session=session) as client:
        with pytest.raises(ClientClosedError, match="session that was given is closed"):
            await client.check([sandbox.add_key()])


async def test_a_trace_that_raises_is_the_sessions_fault(sandbox: SandboxServer) -> None:
    """Not the network's: it is not tried again, and no foreign exception escapes."""

    async def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(fail)
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as session,
        client_of(sandbox, session=session, retry=Retry()) as client,
    ):
        with pytest.raises(
            ConfigurationError, match=r"in the session \(ZeroDivisionError\)"
        ) as caught:
            await client.balance(sandbox.add_key())
    assert caught.value.attempts == 1


async def test_a_long_timeout_is_not_rounded_up(sandbox: SandboxServer) -> None:
    """aiohttp would, above five seconds.

    And a deadline that is just over is no reason to wait without end.
    """
    key = sandbox.add_key()
    sandbox.fail(key, Fault.SILENCE)
    async with client_of(sandbox) as client:
        transport = client._dispatcher.transport
        began = asyncio.get_running_loop().time()
        failure = await transport.attempt("/user/credits", key, -1.0)
        assert isinstance(failure, Failure)
        assert isinstance(failure.error, APITimeoutError)
        assert asyncio.get_running_loop().time() - began < 1
    assert _client_timeout(5.25).ceil_threshold > 1e9


async def test_a_proxy_that_cannot_be_reached_is_a_connection_error(sandbox: SandboxServer) -> None:
    """And the request certainly never left."""
    async with client_of(sandbox, proxy="http://127.0.0.1:9") as client:
        with pytest.raises(APIConnectionError, match="could not connect"):
            await client.balance(sandbox.add_key())
        assert client.quota().free == 300


async def test_cancelling_a_request_shows_nothing_of_its_inside(sandbox: SandboxServer) -> None:
    """aiohttp's frames hold the key; they are not in the traceback.

    The request goes on until the client is closed.
    """
    key = sandbox.add_key()
    sandbox.fail(key, Fault.SILENCE)
    async with client_of(sandbox, rate_limit=RateLimit(requests=1)) as client:
        call = asyncio.create_task(client.balance(key))
        await eventually(lambda: sandbox.requests == 1)
        call.cancel("enough")
        with pytest.raises(asyncio.CancelledError, match="enough") as caught:
            await call
        files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert not [file for file in files if "aiohttp" in file]
        assert caught.value.__context__ is caught.value.__cause__ is None
        assert client.quota().in_flight == 1
    await eventually(lambda: sandbox.connections == 0)
    quota = client.quota()
    assert (quota.free, quota.in_flight) == (0, 0)
    assert quota.seconds_for(1) > 60.3 + 9


async def test_cancelling_checks_at_random_points_leaves_no_connection_and_no_task(
    sandbox: SandboxServer,
) -> None:
    """Whatever they were doing."""
    keys = [sandbox.add_key() for _ in range(40)]
    for number, key in enumerate(keys[::4]):
        sandbox.fail(key, (Fault.SILENCE, Fault.UNAVAILABLE, Fault.DRIP)[number % 3])
    for moment in range(0, 50, 5):
        async with client_of(
            sandbox, retry=Retry(), rate_limit=RateLimit(pace=None, requests=1000)
        ) as client:
            check = asyncio.create_task(client.check(keys))
            await asyncio.sleep(moment / 1000)
            check.cancel()
            with pytest.raises(asyncio.CancelledError):
                await check
            await asyncio.sleep(0)
            assert client.quota().waiting == 0
        assert [task for task in asyncio.all_tasks() if "crustcredits._" in repr(task)] == []
        await eventually(lambda: sandbox.connections == 0)


async def test_closing_ends_requests_on_the_wire(sandbox: SandboxServer) -> None:
    """With `ClientClosedError`, and without a connection left."""
    key = sandbox.add_key()
    sandbox.fail(key, Fault.SILENCE)
    client = client_of(sandbox)
    call = asyncio.create_task(client.balance(key))
    await eventually(lambda: sandbox.requests == 1)
    await client.close()
    with pytest.raises(ClientClosedError):
        await call
    await eventually(lambda: sandbox.connections == 0)
