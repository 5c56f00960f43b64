"""One attempt over aiohttp, bounded in time and size. The core's only importer of aiohttp.

It knows neither the rate limit nor retries. Nothing of aiohttp's leaves it: its exceptions and its
frames carry the `Authorization` header, so ours are made inside and raised, if at all, where no
`except` block links them.
"""

from __future__ import annotations

import asyncio
import enum
import functools
import math
import os
import ssl
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
import attrs
from aiohttp import hdrs
from yarl import URL

from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    ConfigurationError,
    CrustCreditsError,
)
from crustcredits._http.protocol import (
    ACCOUNT_CREDITS,
    MAX_BODY,
    USER_CREDITS,
    Response,
    read_details,
    request_headers,
)

if TYPE_CHECKING:
    from aiohttp.client_middlewares import ClientHandlerType

    from crustcredits._keys.api_key import ApiKey

ClientSession: TypeAlias = aiohttp.ClientSession

# aiohttp would round a timeout above 5 s up to a whole second; these are kept as they are.
_NEVER_ROUNDED = math.inf
# aiohttp takes a timeout of nought or less for none at all.
_SHORTEST = 0.001
# A share of the timeout: connecting has to end before the whole, so that the exception tells which
# of the two it was.
_CONNECTING = 0.9


class Fate(enum.Enum):
    """What became of a request, as far as the server's count goes."""

    UNSENT = "it certainly never left"
    ANSWERED = "the server counted it before it answered"
    ABANDONED = "it was given up on, and may still arrive"


@attrs.frozen
class Failure:
    """An attempt without a whole answer."""

    error: CrustCreditsError
    fate: Fate


class _NotResentError(aiohttp.ClientError):
    """Stands for a lost connection in aiohttp's eyes, which would send a GET again by itself after the real thing."""


class Transport:
    """Sends requests over one aiohttp session: its own, opened when first needed, or a caller's, never closed."""

    def __init__(
        self,
        base_url: str,
        *,
        session: aiohttp.ClientSession | None,
        proxy: str | None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._urls = {path: URL(base_url + path) for path in (USER_CREDITS, ACCOUNT_CREDITS)}
        self._session = session
        self._proxy = proxy
        self._owned = session is None
        self._fixed: dict[str, Any] = {
            "allow_redirects": False,
            "raise_for_status": False,
            "auto_decompress": True,
            "read_bufsize": MAX_BODY,
            "proxy": proxy,
            "ssl": tls,
        }

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        """Send one request and read its whole answer within `timeout` seconds.

        An answer of whatever status is a `Response`. Cancellation passes through, without aiohttp's
        frames.
        """
        answers: list[aiohttp.ClientResponse] = []
        try:
            session = self._session = self._session or self._open()
            response = await session.get(self._urls[path], **self._options(session, key, timeout))
            answers.append(response)
            try:
                if not self._owned:
                    _forget_cookies(session, response)
                body = await _read_body(response)
            finally:
                response.release()
            headers = response.headers
            # The end of the body is told by a length or by chunks, or else by the end of the
            # connection.
            framed = hdrs.CONTENT_LENGTH in headers or hdrs.TRANSFER_ENCODING in headers
            return Response(response.status, headers, body, framed=framed)
        except asyncio.CancelledError as error:
            caught: BaseException = error
        except Exception as error:  # noqa: BLE001  # whatever aiohttp raises may carry the key
            caught = error
        try:
            if isinstance(caught, asyncio.CancelledError):
                caught.__cause__ = caught.__context__ = None
                raise caught.with_traceback(None)
            return self._failure(caught, key, timeout, answers)
        finally:
            del caught  # a frame that holds the exception that holds the frame is freed late

    async def close(self) -> None:
        """Close the session, if it is ours."""
        if self._owned and self._session is not None:
            await self._session.close()

    def _options(
        self, session: aiohttp.ClientSession, key: ApiKey, timeout: float
    ) -> dict[str, Any]:
        """Everything is said for each request, so that a caller's session cannot surprise."""
        headers = request_headers(key)
        guard = _once if self._owned else _guard(headers[hdrs.AUTHORIZATION])
        if not self._owned and (session.trust_env or session.auth is not None):
            # aiohttp refuses this header beside a session's own credentials; the guard sets it
            # after them.
            del headers[hdrs.AUTHORIZATION]
        return {
            **self._fixed,
            "headers": headers,
            "timeout": _client_timeout(timeout),
            "middlewares": (guard,),
        }

    def _open(self) -> aiohttp.ClientSession:
        # Slots bound the connections, not the connector: a wait there would count as time on the
        # wire.
        connector = aiohttp.TCPConnector(limit=0)
        return aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        )

    def _peer(self) -> str:
        return "" if self._proxy is None else " to the API or its proxy"

    def _failure(
        self,
        error: BaseException,
        key: ApiKey,
        timeout: float,
        answers: list[aiohttp.ClientResponse],
    ) -> Failure:
        details: dict[str, Any] = {"key_name": key.label} | (
            read_details(answers[0].headers, key) if answers else {}
        )
        given_up = Fate.ANSWERED if answers else Fate.ABANDONED
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return Failure(
                APITimeoutError(f"no connection within {_CONNECTING * timeout:.3g} s", **details),
                Fate.UNSENT,
            )
        if isinstance(error, TimeoutError):
            return Failure(
                APITimeoutError(f"no whole answer within {timeout:.3g} s", **details), given_up
            )
        if isinstance(error, RuntimeError) and self._session is not None and self._session.closed:
            return Failure(
                ClientClosedError("the aiohttp session that was given is closed", **details),
                Fate.UNSENT,
            )
        if isinstance(error, aiohttp.ClientHttpProxyError):
            remedy = (
                "; give its user and password in the proxy's URL" if error.status == 407 else ""
            )
            said = f"the proxy refused to connect (HTTP {error.status}){remedy}"
            return Failure(APIConnectionError(said, **details), Fate.UNSENT)
        if isinstance(error, aiohttp.ServerFingerprintMismatch):
            said = "the server's certificate is not that of the session's fingerprint"
            return Failure(APIConnectionError(said, retryable=False, **details), Fate.UNSENT)
        if isinstance(error, aiohttp.ClientConnectorError):
            retryable = not isinstance(error.os_error, ssl.SSLCertVerificationError)
            peer = (
                " to the proxy"
                if isinstance(error, aiohttp.ClientProxyConnectionError)
                else self._peer()
            )
            said = f"could not connect{peer} ({_reason(error)})"
            return Failure(APIConnectionError(said, retryable=retryable, **details), Fate.UNSENT)
        if not isinstance(error, (aiohttp.ClientError, OSError)):
            # No network's doing: the caller's session, its connector or its traces.
            return Failure(
                ConfigurationError(
                    f"the request failed in the session ({type(error).__name__})", **details
                ),
                given_up,
            )
        when = "while the answer came" if answers else "before an answer"
        return Failure(
            APIConnectionError(
                f"the connection{self._peer()} failed {when} ({_reason(error)})", **details
            ),
            given_up,
        )


def tls_problem(context: object) -> ConfigurationError | None:
    """Why a caller's `ssl` cannot be used.

    Not raised, because other arguments may hold credentials.
    """
    if context is None:
        return None
    if isinstance(context, ssl.SSLContext):
        remedy = "make it with ssl.create_default_context(cafile=…)"
        return (
            None
            if _verifies(context)
            else ConfigurationError(
                f"ssl does not verify the server's certificate and name; {remedy}"
            )
        )
    remedy = (
        "certificates are always verified: give a context that trusts yours, or name their "
        "file in SSL_CERT_FILE"
    )
    return ConfigurationError(f"ssl is an ssl.SSLContext, not {type(context).__name__}; {remedy}")


def _verifies(context: ssl.SSLContext) -> bool:
    return context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def session_problem(session: object) -> ConfigurationError | None:
    """Why requests cannot be sent over what a caller gave.

    Not raised, because other arguments may hold credentials.
    """
    if session is None or isinstance(session, aiohttp.ClientSession):
        return None
    return ConfigurationError(f"session is an aiohttp.ClientSession, not {type(session).__name__}")


async def _read_body(response: aiohttp.ClientResponse) -> bytes | None:
    content = response.content
    # A balance mostly comes together with its headers; then there is nothing to wait for.
    body = content.read_nowait() if content.is_eof() else await content.readany()
    while len(body) <= MAX_BODY:
        if content.at_eof():
            return body
        body += await content.readany()
    response.close()
    return None


@functools.lru_cache(maxsize=8)
def _client_timeout(seconds: float) -> aiohttp.ClientTimeout:
    total = max(seconds, _SHORTEST)
    return aiohttp.ClientTimeout(
        total=total, connect=_CONNECTING * total, ceil_threshold=_NEVER_ROUNDED
    )


def _forget_cookies(session: aiohttp.ClientSession, response: aiohttp.ClientResponse) -> None:
    """Take the cookies of an answer out of a caller's jar: aiohttp 3.14 always stores them there."""
    if response.cookies:
        host = response.url.host or ""
        session.cookie_jar.clear(
            lambda kept: (
                kept.key in response.cookies
                and f".{host}".endswith(f".{kept['domain'].lstrip('.')}")
            )
        )


async def _once(
    request: aiohttp.ClientRequest, handler: ClientHandlerType
) -> aiohttp.ClientResponse:
    """An aiohttp middleware: the request goes out once.

    aiohttp itself would send it again over a connection found closed.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        raise _NotResentError from error


def _guard(authorization: str) -> aiohttp.ClientMiddlewareType:
    """The same for a caller's session: with this key, the host of the URL and no cookie, whatever the session would add."""

    async def guard(
        request: aiohttp.ClientRequest, handler: ClientHandlerType
    ) -> aiohttp.ClientResponse:
        request.headers[hdrs.AUTHORIZATION] = authorization
        request.headers[hdrs.HOST] = request.url.host_port_subcomponent or ""
        request.headers.pop(hdrs.COOKIE, None)
        return await _once(request, handler)

    return guard


def _reason(error: BaseException) -> str:
    """A word for the cause: the system's, OpenSSL's or the exception's name, but never its text, which may hold anything."""
    if isinstance(error, _NotResentError) and error.__cause__ is not None:
        error = error.__cause__
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    # After the handshake aiohttp makes an error of its own of OpenSSL's, whose number is not the
    # system's.
    tls = next(
        (
            each
            for each in (cause, cause.__cause__, cause.__context__)
            if isinstance(each, ssl.SSLError)
        ),
        None,
    )
    if isinstance(tls, ssl.SSLCertVerificationError):
        return (
            "certificate verify failed: "
            f"{getattr(tls, 'verify_message', None) or 'OpenSSL gives no reason'}"
        )
    if tls is not None:
        return f"TLS: {(getattr(tls, 'reason', None) or 'the handshake or a record failed').replace('_', ' ').lower()}"
    if isinstance(cause, OSError) and (cause.strerror or "").startswith("[SSL"):
        return "TLS: the connection failed after the handshake"
    if isinstance(cause, ConnectionError) and cause.errno is None:
        return "the connection was closed"
    if not isinstance(cause, OSError) or cause.errno is None:
        return type(error).__name__
    # Name resolution has numbers of its own, below zero, and aiohttp puts addresses into the text
    # of the others.
    return os.strerror(cause.errno) if cause.errno > 0 else cause.strerror or type(error).__name__
