"""One attempt over real sockets: connections, timeouts, re-sends, cookies, redirects, sessions."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest.mock import patch

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
from crustcredits._http.transport import AiohttpTransport
from crustcredits._http.transport_types import Failure
from crustcredits.testing import Fault, SandboxServer
from tests.conftest import eventually

ONCE = Retry(attempts=1)


def client_of(sandbox: SandboxServer, **options: Any) -> CreditsClient:
    return CreditsClient(base_url=sandbox.url, retry=options.pop("retry", ONCE), **options)


async def test_connections_are_reused_by_all_keys(sandbox: SandboxServer) -> None:
    """One session opens no more connections than `concurrency`."""
    keys = [sandbox.add_key() for _ in range(30)]
    async with client_of(sandbox, concurrency=3, rate_limit=RateLimit(pace=None)) as client:
        assert (await client.check(keys)).ok
    assert sandbox.peak_connections <= 3
    assert sandbox.requests == 30


async def test_a_closed_client_leaves_no_connection_open(sandbox: SandboxServer) -> None:
    """The client closes the session that it opened."""
    async with client_of(sandbox) as client:
        await client.balance(sandbox.add_key())
        assert sandbox.connections == 1
    await eventually(lambda: sandbox.connections == 0)


async def test_aiohttp_does_not_resend_over_a_closed_connection(
    sandbox: SandboxServer,
) -> None:
    """A second arrival for one token would break the promise. The retry has a token of its own."""
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


async def test_a_refused_connection_returns_the_token_at_once() -> None:
    """The request never left."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        async with CreditsClient(base_url=f"http://127.0.0.1:{port}", retry=ONCE) as client:
            with pytest.raises(APIConnectionError, match=r"could not connect \(.*refused.*\)"):
                await client.balance("sk-1")
            assert client.quota().free == 300


async def test_a_name_that_does_not_resolve_is_a_connection_error() -> None:
    """The reserved name `host.invalid` never resolves; the token returns at once."""
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
async def test_each_network_fault_is_an_error_of_the_library(
    sandbox: SandboxServer, fault: Fault, kind: type[Exception], said: str
) -> None:
    """Each is bounded in time and size, and the next request is served."""
    key, other = sandbox.add_key("troubled"), sandbox.add_key("fine")
    sandbox.fail(key, fault)
    seconds = 0.2 if kind is APITimeoutError else 5.0  # only the timeouts need a short one
    async with client_of(sandbox, request_timeout=seconds) as client:
        with pytest.raises(kind, match=said) as caught:
            await client.balance(key)
        assert str(caught.value).startswith("troubled: ")
        assert caught.value.__context__ is caught.value.__cause__ is None
        assert (await client.balance(other)).credits == 1000
    assert [arrival.path for arrival in sandbox.arrivals] == ["/user/credits"] * 2


async def test_an_incomplete_response_still_carries_its_request_id(sandbox: SandboxServer) -> None:
    """Its headers arrived, so the server has counted it.

    The token stays out for the period and no longer.
    """
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


async def test_cookies_of_one_key_are_not_sent_with_the_next() -> None:
    """Neither by the library's session nor by a caller's with its own jar.

    Jars store no cookie for an IP address, so the server has a name.
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
    """A session with every setting that could spoil a request."""
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


async def test_the_settings_of_a_callers_session_do_not_apply(
    sandbox: SandboxServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its credentials, headers, timeouts and middlewares are ignored, and it stays open."""
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


async def test_a_session_with_basic_credentials_sends_the_key_instead(
    sandbox: SandboxServer,
) -> None:
    """The session's `Authorization` header and its default auth are replaced."""
    key = sandbox.add_key()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        default_auth = aiohttp.ClientSession(auth=aiohttp.BasicAuth("someone", "else"))
    for each in (aiohttp.ClientSession(headers={"Authorization": "Basic default"}), default_auth):
        async with each as session, client_of(sandbox, session=session) as client:
            await client.balance(key)
    assert [arrival.headers["Authorization"] for arrival in sandbox.arrivals] == [
        f"Bearer {key.get_secret_value()}"
    ] * 2


async def test_a_closed_session_of_the_caller_is_an_error_of_the_whole_call(
    sandbox: SandboxServer,
) -> None:
    """No single key is to blame."""
    async with aiohttp.ClientSession() as session:
        pass
    async with client_of(sandbox, session=session) as client:
        with pytest.raises(ClientClosedError, match="aiohttp session is closed"):
            await client.check([sandbox.add_key()])


async def test_a_trace_hook_that_raises_is_a_configuration_error(sandbox: SandboxServer) -> None:
    """It is not retried, and no foreign exception escapes."""

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
    """aiohttp rounds up above 5 s. A timeout that has already passed does not wait without end."""
    key = sandbox.add_key()
    sandbox.fail(key, Fault.SILENCE)
    transport = AiohttpTransport(sandbox.url, session=None, proxy=None)
    began = asyncio.get_running_loop().time()
    failure = await transport.attempt("/user/credits", key, -1.0)
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, APITimeoutError)
    assert asyncio.get_running_loop().time() - began < 1
    with patch.object(aiohttp.ClientSession, "get", autospec=True, side_effect=OSError) as get:
        await transport.attempt("/user/credits", key, 5.25)
    await transport.close()
    timeout = get.call_args.kwargs["timeout"]
    assert (timeout.total, timeout.ceil_threshold > 1e9) == (5.25, True)


async def test_a_proxy_that_cannot_be_reached_is_a_connection_error(sandbox: SandboxServer) -> None:
    """The request never left, so the token returns at once."""
    async with client_of(sandbox, proxy="http://127.0.0.1:9") as client:
        with pytest.raises(APIConnectionError, match="could not connect"):
            await client.balance(sandbox.add_key())
        assert client.quota().free == 300


async def test_a_cancelled_request_has_no_frames_of_aiohttp_in_its_traceback(
    sandbox: SandboxServer,
) -> None:
    """aiohttp's frames hold the key. The request stays on the wire until the client is closed."""
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


async def test_checks_cancelled_at_any_moment_leave_no_connection_and_no_task(
    sandbox: SandboxServer,
) -> None:
    """The moments are 5 ms apart."""
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
    """The call raises `ClientClosedError`, and no connection is left."""
    key = sandbox.add_key()
    sandbox.fail(key, Fault.SILENCE)
    client = client_of(sandbox)
    call = asyncio.create_task(client.balance(key))
    await eventually(lambda: sandbox.requests == 1)
    await client.close()
    with pytest.raises(ClientClosedError):
        await call
    await eventually(lambda: sandbox.connections == 0)


async def test_an_answer_that_is_no_http_is_named_so() -> None:
    """Another server listens at the address; nothing of its text is repeated."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        await reader.read()  # until the client closes
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with (
        server,
        CreditsClient(base_url=f"http://127.0.0.1:{port}", retry=Retry(attempts=1)) as client,
    ):
        with pytest.raises(APIConnectionError, match="the answer cannot be read as HTTP") as caught:
            await client.balance("some-key")
    assert "SSH" not in str(caught.value)
