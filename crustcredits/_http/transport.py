"""One attempt over aiohttp, bounded in time and size. The core's only importer of aiohttp.

This module knows neither the rate limit nor retries. No aiohttp exception leaves it, because
aiohttp's exceptions and frames carry the `Authorization` header. The library's own errors are made
inside, and raised only where no `except` block links them to aiohttp's.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import ssl
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
from aiohttp import hdrs
from yarl import URL

from crustcredits._errors import (
    APIConnectionError,
    APITimeoutError,
    ClientClosedError,
    ConfigurationError,
)
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.documents import MAX_BODY
from crustcredits._http.headers import read_details
from crustcredits._http.protocol import Response, request_headers
from crustcredits._http.transport_types import Failure, Fate
from crustcredits._validation import kind_of

if TYPE_CHECKING:
    from aiohttp.client_middlewares import ClientHandlerType

    from crustcredits._keys.api_key import ApiKey

ClientSession: TypeAlias = aiohttp.ClientSession

# aiohttp would round a timeout above 5 s up to a whole second; this threshold prevents it.
_NEVER_ROUNDED = math.inf
# Seconds. aiohttp treats a timeout of 0 or less as no timeout.
_SHORTEST = 0.001
# Share of the timeout for connecting: its own timeout fires first, so that the exception tells a
# connection timeout from a response timeout.
_CONNECTING = 0.9


class _NotResentError(aiohttp.ClientError):
    """Replaces a lost-connection error, after which aiohttp would re-send the GET by itself."""


class AiohttpTransport:
    """Sends requests over one aiohttp session.

    Its own session is opened by the first attempt; a caller's session is never closed.

    Attributes:
        origin: `https://host` of the API.
    """

    def __init__(
        self,
        base_url: str,
        *,
        session: aiohttp.ClientSession | None,
        proxy: str | None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.origin: str = base_url
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
        """Send one request and read the complete response within `timeout` seconds.

        A response with any status is a `Response`. Cancellation passes through, without aiohttp's
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
            # A length or chunks delimit the body; without them the end of the connection does.
            framed = hdrs.CONTENT_LENGTH in headers or hdrs.TRANSFER_ENCODING in headers
            return Response(response.status, headers, body, framed=framed)
        except asyncio.CancelledError as error:
            caught: BaseException = error
        except Exception as error:  # noqa: BLE001  # any exception of aiohttp may carry the key
            caught = error
        try:
            if isinstance(caught, asyncio.CancelledError):
                caught.__cause__ = caught.__context__ = None
                raise caught.with_traceback(None)
            return self._failure(caught, key, timeout, answers)
        finally:
            del caught  # breaks the reference cycle of frame and exception

    async def close(self) -> None:
        """Close the session, unless it is a caller's."""
        if self._owned and self._session is not None:
            await self._session.close()

    def _options(
        self, session: aiohttp.ClientSession, key: ApiKey, timeout: float
    ) -> dict[str, Any]:
        """Explicit options of one request, so that a caller's session settings do not apply."""
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
        # Connection slots limit the connections, not the connector: a wait in the connector would
        # count as time on the wire.
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
            message = (
                f"no connection within {_CONNECTING * timeout:.3g} s; check the address and the "
                "network, or raise request_timeout="
            )
            return Failure(APITimeoutError(message, **details), Fate.UNSENT)
        if isinstance(error, TimeoutError):
            message = (
                f"no whole answer within {timeout:.3g} s; try again, or raise request_timeout="
            )
            return Failure(APITimeoutError(message, **details), given_up)
        if isinstance(error, RuntimeError) and self._session is not None and self._session.closed:
            message = "the given aiohttp session is closed; give an open session"
            return Failure(ClientClosedError(message, **details), Fate.UNSENT)
        unconnected = self._unconnected(error)
        if unconnected is not None:
            message, retryable = unconnected
            return Failure(APIConnectionError(message, retryable=retryable, **details), Fate.UNSENT)
        return self._interrupted(error, details, given_up)

    def _interrupted(
        self, error: BaseException, details: dict[str, Any], given_up: Fate
    ) -> Failure:
        """The failure of a request that had a connection, or that the session has stopped."""
        if not isinstance(error, (aiohttp.ClientError, OSError)):
            # Not a network failure: it comes from the session, its connector or its trace hooks.
            message = (
                f"the request failed in the session ({type(error).__name__}); check its connector, "
                "its resolver and its trace hooks"
            )
            return Failure(ConfigurationError(message, **details), given_up)
        if isinstance(error, aiohttp.ClientResponseError):
            message = (
                "the answer cannot be read as HTTP; check the address of the API and of any proxy"
            )
        else:
            is_answered = given_up is Fate.ANSWERED
            when = "while the answer came" if is_answered else "before an answer"
            message = (
                f"the connection{self._peer()} failed {when} ({_reason(error)}); check the "
                "network, or try again"
            )
        return Failure(APIConnectionError(message, **details), given_up)

    def _unconnected(self, error: BaseException) -> tuple[str, bool] | None:
        """The message for an error without a connection, and whether to retry; else None."""
        if isinstance(error, aiohttp.ClientHttpProxyError):
            remedy = (
                "put its user and password into the proxy URL"
                if error.status == 407
                else "check the proxy's log and rules"
            )
            return f"the proxy refused to connect (HTTP {error.status}); {remedy}", True
        if isinstance(error, aiohttp.ServerFingerprintMismatch):
            return (
                "the server's certificate does not match the fingerprint of the session; give the "
                "new one if the certificate was renewed"
            ), False
        if isinstance(error, aiohttp.ClientConnectorError):
            is_proxy = isinstance(error, aiohttp.ClientProxyConnectionError)
            peer = " to the proxy" if is_proxy else self._peer()
            retryable = not isinstance(error.os_error, ssl.SSLCertVerificationError)
            remedy = (
                "check the address and the network"
                if retryable
                else "check the address, or name the certificate to trust in ssl= or SSL_CERT_FILE"
            )
            return f"could not connect{peer} ({_reason(error)}); {remedy}", retryable
        return None


def tls_problem(context: object) -> ConfigurationError | None:
    """The reason why a caller's `ssl` cannot be used, or None.

    The error is not raised here, because other arguments may hold credentials.
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
        "certificates are always verified: give a context that trusts your certificates, or "
        "name their file in SSL_CERT_FILE"
    )
    return ConfigurationError(f"ssl must be an ssl.SSLContext, not {kind_of(context)}; {remedy}")


def _verifies(context: ssl.SSLContext) -> bool:
    return context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def session_problem(session: object) -> ConfigurationError | None:
    """The reason why a caller's `session` cannot be used, or None.

    The error is not raised here, because other arguments may hold credentials.
    """
    if session is None or isinstance(session, aiohttp.ClientSession):
        return None
    return ConfigurationError(f"session must be an aiohttp.ClientSession, not {kind_of(session)}")


async def _read_body(response: aiohttp.ClientResponse) -> bytes | None:
    content = response.content
    # A balance mostly arrives with its headers; its body is then read without waiting.
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
    """Remove a response's cookies from a caller's jar, where aiohttp 3.14 always stores them."""
    if response.cookies:
        host = response.url.host or ""
        session.cookie_jar.clear(
            lambda cookie: (
                cookie.key in response.cookies
                and f".{host}".endswith(f".{cookie['domain'].lstrip('.')}")
            )
        )


async def _once(
    request: aiohttp.ClientRequest, handler: ClientHandlerType
) -> aiohttp.ClientResponse:
    """An aiohttp middleware that sends the request once.

    Without it aiohttp re-sends a GET when a reused connection turns out to be closed.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        raise _NotResentError from error


def _guard(authorization: str) -> aiohttp.ClientMiddlewareType:
    """`_once` for a caller's session: sets the key and the URL's host, and removes cookies.

    The session's own values for these headers never reach the API.
    """

    async def guard(
        request: aiohttp.ClientRequest, handler: ClientHandlerType
    ) -> aiohttp.ClientResponse:
        request.headers[hdrs.AUTHORIZATION] = authorization
        request.headers[hdrs.HOST] = request.url.host_port_subcomponent or ""
        request.headers.pop(hdrs.COOKIE, None)
        return await _once(request, handler)

    return guard


def _reason(error: BaseException) -> str:
    """The cause in the words of the system or OpenSSL, else the name of the exception.

    The exception's own text may hold anything, and is never used.
    """
    if isinstance(error, _NotResentError) and error.__cause__ is not None:
        error = error.__cause__
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    # After the handshake aiohttp wraps OpenSSL's error in its own; its errno is not the system's.
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
        reason = getattr(tls, "reason", None) or "the handshake or a record failed"
        return f"TLS: {reason.replace('_', ' ').lower()}"
    if isinstance(cause, OSError) and (cause.strerror or "").startswith("[SSL"):
        return "TLS: the connection failed after the handshake"
    if isinstance(cause, aiohttp.ServerDisconnectedError) or (
        isinstance(cause, ConnectionError) and cause.errno is None
    ):
        return "the connection was closed"
    if isinstance(cause, aiohttp.ClientPayloadError):
        return "the body is cut short or cannot be decoded"
    if not isinstance(cause, OSError) or cause.errno is None:
        return type(error).__name__
    # Errors of name resolution have negative numbers. For the others aiohttp puts addresses into
    # the text.
    return os.strerror(cause.errno) if cause.errno > 0 else cause.strerror or type(error).__name__
