"""TLS, proxies and connecting, over real sockets on this machine."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web
from yarl import URL

from crustcredits import (
    APIConnectionError,
    APITimeoutError,
    ConfigurationError,
    CreditsClient,
    RateLimit,
    Retry,
)
from crustcredits._http import transport
from crustcredits.testing import SandboxServer

SECRET = "sk-0123456789abcdef"
ONE = RateLimit(requests=1, scope="client")
FAST = Retry(backoff=0.001)


@asynccontextmanager
async def listener(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server on a port of its own that runs `serve` for each connection."""
    writers: list[asyncio.StreamWriter] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await serve(reader, writer)

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in writers:
            writer.close()


@asynccontextmanager
async def https_server(context: ssl.SSLContext) -> AsyncIterator[int]:
    """An API over TLS that answers 7 credits for any key."""

    async def answer(request: web.BaseRequest) -> web.Response:
        return web.json_response({"credits": 7})

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def server_context(authority: trustme.CA, name: str = "localhost") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


async def test_a_context_that_trusts_a_private_authority_is_used(authority: trustme.CA) -> None:
    """It applies to a caller's session as well."""
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(https_server(server_context(authority)))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for given in (None, session):
            async with CreditsClient(
                base_url=f"https://localhost:{port}", session=given, ssl=trusting
            ) as client:
                assert (await client.balance(SECRET)).credits == 7


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "localhost",
            (
                r"certificate verify failed: (self-signed certificate in certificate chain"
                r"|unable to get local issuer certificate)"
            ),
        ),
        ("other.example", "certificate verify failed: "),
    ],
)
async def test_a_certificate_that_cannot_be_verified_is_not_retried(
    authority: trustme.CA, name: str, said: str
) -> None:
    """The error has OpenSSL's reason, and the token returns at once."""
    async with (
        https_server(server_context(authority, name)) as port,
        CreditsClient(base_url=f"https://localhost:{port}", rate_limit=ONE) as client,
    ):
        with pytest.raises(APIConnectionError, match=said) as caught:
            await client.balance(SECRET)
        assert client.quota().free == 1
    assert (caught.value.attempts, caught.value.retryable) == (1, False)


async def test_a_certificate_with_another_fingerprint_is_not_retried(
    authority: trustme.CA,
) -> None:
    """The session's connector expects a fingerprint."""
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(https_server(server_context(authority)))
        connector = aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(bytes(32)))
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        async with CreditsClient(
            base_url=f"https://localhost:{port}", session=session, rate_limit=ONE
        ) as client:
            with pytest.raises(
                APIConnectionError, match="does not match the fingerprint of the session"
            ) as caught:
                await client.balance(SECRET)
            assert (caught.value.attempts, client.quota().free) == (1, 1)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            caused(
                aiohttp.ClientOSError(1, f"[SSL: X] {SECRET}"),
                ssl.SSLError(1, f"[SSL: X] {SECRET}"),
            ),
            "TLS: the handshake or a record failed",
        ),
        (
            aiohttp.ClientOSError(1, f"[SSL: TLSV13_ALERT] {SECRET}"),
            "TLS: the connection failed after the handshake",
        ),
        (
            caused(aiohttp.ClientOSError(1, "x"), ssl.SSLCertVerificationError(1, "x")),
            "certificate verify failed: OpenSSL gives no reason",
        ),
        (ConnectionResetError(SECRET), "the connection was closed"),
        (aiohttp.ClientOSError(104, SECRET), "Connection reset by peer"),
        (aiohttp.ClientPayloadError(SECRET), "the body is cut short or cannot be decoded"),
        (aiohttp.ServerDisconnectedError(SECRET), "the connection was closed"),
    ],
)
async def test_the_reason_of_a_failure_is_never_the_exceptions_text(
    error: Exception, reason: str
) -> None:
    """The text may hold anything, and OpenSSL's numbers are not the system's."""

    async def fail(*arguments: object) -> None:
        raise error

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(fail)
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as session,
        CreditsClient(session=session, retry=Retry(attempts=1)) as client,
    ):
        with pytest.raises(APIConnectionError) as caught:
            await client.balance(SECRET)
    assert caught.value.message == (
        f"the connection failed before an answer ({reason}); check the network, or try again"
    )


async def test_a_server_that_wants_a_client_certificate_is_a_connection_error(
    authority: trustme.CA,
) -> None:
    """With TLS 1.3 the server refuses after the handshake."""
    context, trusting = server_context(authority), ssl.create_default_context()
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(trusting)
    async with (
        https_server(context) as port,
        CreditsClient(
            base_url=f"https://localhost:{port}", ssl=trusting, retry=Retry(attempts=1)
        ) as client,
    ):
        with pytest.raises(APIConnectionError) as caught:
            await client.balance(SECRET)
    assert "not permitted" not in str(caught.value)


async def test_a_server_without_tls_is_reported_with_openssls_reason() -> None:
    """OpenSSL's error number is not read as the system's. The failure may pass and is retried."""

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(64)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with (
        listener(plain) as port,
        CreditsClient(base_url=f"https://localhost:{port}", retry=Retry(attempts=2)) as client,
    ):
        with pytest.raises(
            APIConnectionError,
            match=r"could not connect \(TLS: (wrong version number|record layer failure)\)",
        ) as caught:
            await client.balance(SECRET)
    assert (caught.value.attempts, caught.value.retryable) == (2, True)


async def test_a_connection_timeout_returns_the_token_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The TLS handshake or the proxy hangs, so the request never left."""
    # The connection timeout fires almost 5 s before that of the whole request: a slow machine
    # cannot swap the two.
    monkeypatch.setattr(transport, "_CONNECTING", 0.01)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listener(silent) as port:
        for options in (
            {"base_url": f"https://localhost:{port}"},
            {"proxy": f"http://localhost:{port}"},
        ):
            more: Any = options
            async with CreditsClient(
                **more, rate_limit=ONE, request_timeout=4.9, retry=Retry(attempts=1)
            ) as client:
                with pytest.raises(APITimeoutError, match=r"no connection within 0\.049 s"):
                    await client.balance(SECRET)
                assert client.quota().free == 1


async def test_a_response_timeout_keeps_the_token_out() -> None:
    """The request may have reached the API."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listener(silent) as port:
        options: dict[str, Any] = {
            "rate_limit": ONE,
            "request_timeout": 0.05,
            "retry": Retry(attempts=1),
        }
        async with CreditsClient(base_url=f"http://localhost:{port}", **options) as client:
            with pytest.raises(APITimeoutError, match=r"no whole answer within 0\.05 s"):
                await client.balance(SECRET)
            assert client.quota().free == 0


async def test_a_proxy_that_refuses_is_reported_by_its_status() -> None:
    """Neither its reason phrase nor its credentials appear."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Give me words\r\nContent-Length: 0\r\n\r\n")

    async with (
        listener(refuse) as port,
        CreditsClient(
            proxy=f"http://bob:hunter2@localhost:{port}", rate_limit=ONE, retry=Retry(attempts=1)
        ) as client,
    ):
        with pytest.raises(
            APIConnectionError,
            match=r"the proxy refused to connect \(HTTP 407\); put its user and password",
        ) as caught:
            await client.balance(SECRET)
        assert client.quota().free == 1
    assert "hunter2" not in str(caught.value)
    assert "words" not in str(caught.value)


async def test_the_proxy_of_the_environment_is_used_with_trust_env_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`NO_PROXY` and plain http, which stays on this machine, exclude it."""
    asked: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).splitlines()[0])
        writer.write(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")

    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    async with listener(refuse) as port, SandboxServer() as sandbox:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        key = sandbox.add_key()
        for name, value in (
            ("HTTPS_PROXY", f"http://127.0.0.1:{port}"),
            ("ALL_PROXY", f"127.0.0.1:{port}"),
        ):
            monkeypatch.setenv(name, value)
            async with CreditsClient(trust_env=True, retry=Retry(attempts=1)) as client:
                with pytest.raises(APIConnectionError, match="the proxy refused"):
                    await client.balance(key)
            async with CreditsClient(base_url=sandbox.url, trust_env=True) as client:
                await client.balance(key)
            monkeypatch.delenv(name)
        assert asked == [b"CONNECT api.crustdata.com:443 HTTP/1.1"] * 2
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("NO_PROXY", "localhost")
        for options in ({"trust_env": True}, {}):
            base_url = f"https://localhost:{port + 1 if port < 65535 else port - 1}"
            more: Any = options
            async with CreditsClient(base_url=base_url, **more, retry=Retry(attempts=1)) as client:
                with pytest.raises(APIConnectionError, match="could not connect"):
                    await client.balance(key)
        assert len(asked) == 2


def unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    return context


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"ssl": False},
            "ssl must be an ssl.SSLContext, not a bool; certificates are always verified",
        ),
        ({"ssl": "ca.pem"}, "ssl must be an ssl.SSLContext, not a str"),
        ({"ssl": unverified()}, "ssl does not verify the server's certificate"),
        (
            {"ssl": ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)},
            "ssl does not verify the server's certificate",
        ),
        ({"proxy": "http://bob:hunter2@host:99999"}, r"proxy is not an http\(s\) URL"),
        ({"trust_env": 1}, "trust_env must be True or False, not an int"),
    ],
)
def test_options_that_cannot_secure_a_connection_are_refused(
    options: dict[str, Any], said: str
) -> None:
    """The constructor raises."""
    with pytest.raises(ConfigurationError, match=said):
        CreditsClient(**options)


async def test_a_body_cut_short_without_a_length_is_retried() -> None:
    """It counts as a lost connection."""
    bodies = [b'{"credits": 94', b"", b'{"credits": 9406}']

    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
            + bodies.pop(0)
        )
        writer.close()

    async with (
        listener(cut) as port,
        CreditsClient(base_url=f"http://localhost:{port}", retry=FAST) as client,
    ):
        report = await client.check([SECRET])
    assert (report[0].credits, report[0].attempts) == (Decimal(9406), 3)


async def test_a_callers_session_keeps_its_cookies_and_its_host_header_is_not_sent() -> None:
    """Cookies that the API sets are removed from the session's jar."""
    seen: list[str | None] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        seen.append(request.headers.get("Host"))
        response = web.json_response({"credits": 7})
        response.set_cookie("tracker", "1")
        response.set_cookie("wide", "2", domain="localhost")
        return response

    runner = web.ServerRunner(web.Server(answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://localhost:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession(headers={"Host": "elsewhere.example"}) as session:
        session.cookie_jar.update_cookies({"own": "3"}, URL(url))
        session.cookie_jar.update_cookies({"tracker": "4"}, URL("http://other.example"))
        async with CreditsClient(base_url=url, session=session) as client:
            await client.balance(SECRET)
        left = sorted((cookie.key, cookie["domain"]) for cookie in session.cookie_jar)
    await runner.cleanup()
    assert left == [("own", "localhost"), ("tracker", "other.example")]
    assert seen == [url.removeprefix("http://")]
