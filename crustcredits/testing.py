"""`SandboxServer`: a strict stand-in for the API on a real loopback socket, for your tests and for ours.

It answers as the API's documents say, counts in an exact sliding window, records every arrival, and can be told to fail in
every way that a network or a gateway does. It is never imported by the rest of the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import secrets
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from decimal import Decimal, InvalidOperation
from types import TracebackType
from typing import Any, Literal, Self
from weakref import WeakSet

import attrs
from aiohttp import web

from crustcredits._checks import check_kind, check_number, check_whole, hides_arguments, shown
from crustcredits._errors import ConfigurationError
from crustcredits._faults import JSON_TYPE, PLAIN, STREAMED, Fault, bomb, reset, transport_of
from crustcredits._keys import ApiKey, digest_of
from crustcredits._models import credits_text
from crustcredits._wire import ACCOUNT_CREDITS, API_VERSION, USER_CREDITS

__all__ = ["Arrival", "Fault", "SandboxServer"]


@attrs.frozen(kw_only=True)
class Arrival:
    """One request as it reached the sandbox.

    Attributes:
        at: When, in the running loop's time.
        key: The label of the key, or None when no known key was sent.
        path: The path asked for.
        headers: As sent. They hold the secret, so they do not print.
        refused: Whether the window was full, so that it was answered 429.
    """

    at: float
    key: str | None
    path: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    refused: bool


@attrs.define
class _Order:
    fault: Fault
    times: int | None
    retry_after: int | None


class SandboxServer:
    """A stand-in for the API on 127.0.0.1, as an async context manager.

    Args:
        limit: Requests that each endpoint takes in any one period.
        period: Seconds that a request counts for after its arrival; the window slides.
        scope: What it counts by: all requests together (`"client"`), each account or each key.
        delay: Seconds that an answer takes, drawn evenly between the two, part of it before the request is counted.
        host: The host in `url`, `127.0.0.1` or `localhost`.
        port: The port to listen on; by default one that is free.
        record: Whether to keep every arrival; without, memory does not grow with the requests.

    Attributes:
        arrivals: Every request, in the order they came; empty without `record`.
        requests: How many came.
        refused: How many were answered 429 because the window was full. Refusals that were ordered do not count.
        peak_connections: The most connections that were open when a request came.

    Raises:
        ConfigurationError: An argument is none of those.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        limit: int = 300,
        period: float = 60.0,
        scope: Literal["client", "account", "key"] = "client",
        delay: tuple[float, float] = (0.0, 0.0),
        host: Literal["127.0.0.1", "localhost"] = "127.0.0.1",
        port: int = 0,
        record: bool = True,
    ) -> None:
        if host not in {"127.0.0.1", "localhost"} or scope not in {"client", "account", "key"}:
            raise ConfigurationError("host is '127.0.0.1' or 'localhost', and scope is 'client', 'account' or 'key'")
        check_whole("limit", limit, minimum=1)
        check_number("period", period, above=0)
        check_whole("port", port, minimum=0)
        check_kind("delay", delay, tuple)
        check_number("delay[0]", delay[0], minimum=0)
        check_number("delay[1]", delay[1], minimum=delay[0])
        self.arrivals: list[Arrival] = []
        self.requests: int = 0
        self.refused: int = 0
        self.peak_connections: int = 0
        self._limit = limit
        self._period = period
        self._scope = scope
        self._delay = delay
        self._host = host
        self._record = record
        self._accounts: dict[str, dict[str, Any]] = {}
        self._keys: dict[bytes, tuple[ApiKey, str]] = {}
        self._orders: defaultdict[bytes, deque[_Order]] = defaultdict(deque)
        self._windows: defaultdict[Hashable, deque[float]] = defaultdict(deque)
        self._stale: WeakSet[asyncio.BaseTransport] = WeakSet()
        self._refusals = 0
        self._runner: web.ServerRunner | None = None
        self._port = port

    # --- what it holds

    @hides_arguments
    def add_account(self, name: str, *, credits: Decimal | int | str = 1000, **fields: Any) -> None:
        """Open an account with these credits; `fields` are further ones of `/account/credits`, such as `recurring_credits`."""
        self._accounts[name] = _account_fields(credits) | fields

    @hides_arguments
    def add_key(
        self,
        name: str | None = None,
        *,
        account: str | None = None,
        credits: Decimal | int | str = 1000,
        declared: bool = True,
        secret: str | None = None,
    ) -> ApiKey:
        """Issue a key and return it.

        It belongs to `account`, which must be open, or without one to an account of its own with `credits`. With
        `declared=False` the returned key does not say which account it belongs to. The secret is random unless given.

        Raises:
            ConfigurationError: There is no such account, or the secret or the name cannot be used.
        """
        if account is not None and account not in self._accounts:
            raise ConfigurationError("the sandbox has no account of this name; open it with add_account() first")
        secret = secret or f"sandbox-{secrets.token_hex(16)}"
        key = ApiKey(secret, name=name, account=account if declared else None)
        owner = account
        if owner is None:
            owner = f"the account of {key.digest.hex()}"
            self.add_account(owner, credits=credits)
        self._keys[key.digest] = (key, owner)
        return key

    @hides_arguments
    def set_credits(self, key: ApiKey, credits: Decimal | int | str) -> None:
        """Change the credits of the account that `key` draws from, as spending them would.

        Raises:
            ConfigurationError: The sandbox did not issue `key`, or the credits are not exact.
        """
        self._accounts[self._owner(key)]["credits"] = _credits(credits)

    @hides_arguments
    def fail(self, key: ApiKey, fault: Fault, *, times: int | None = None, retry_after: int | None = None) -> None:
        """Answer the next `times` requests of `key` with `fault`, or all of them; after faults ordered before.

        `retry_after` is what a `REFUSED` one is told to wait, in whole seconds; by default each is told another time within
        the period, as accounts hammered from elsewhere would be.

        Raises:
            ConfigurationError: The sandbox did not issue `key`.
        """
        self._owner(key)
        self._orders[key.digest].append(_Order(fault, times, retry_after))

    @hides_arguments
    def heal(self, key: ApiKey) -> None:
        """Forget the faults ordered for `key`.

        Raises:
            ConfigurationError: The sandbox did not issue `key`.
        """
        self._owner(key)
        self._orders.pop(key.digest, None)

    def _owner(self, key: ApiKey) -> str:
        check_kind("key", key, ApiKey)
        if key.digest not in self._keys:
            raise ConfigurationError("the sandbox did not issue this key; make it with add_key()", key_name=key.label)
        return self._keys[key.digest][1]

    # --- what it saw

    @property
    def url(self) -> str:
        """Its base URL, while it runs."""
        return f"http://{self._host}:{self._port}"

    @property
    def connections(self) -> int:
        """Connections open now."""
        server = self._runner.server if self._runner is not None else None
        return len(server.connections) if server is not None else 0

    def worst_window(self) -> int:
        """The most arrivals on one endpoint within any one period, whatever `scope` counts by.

        Raises:
            ConfigurationError: With `record=False` it is not known.
        """
        if not self._record:
            raise ConfigurationError("without record=True the arrivals are not kept, so the worst window is unknown")
        return max((_worst_window(times, self._period) for times in self._times_by_path().values()), default=0)

    def _times_by_path(self) -> dict[str, list[float]]:
        times: defaultdict[str, list[float]] = defaultdict(list)
        for arrival in self.arrivals:
            times[arrival.path].append(arrival.at)
        return times

    # --- serving

    async def __aenter__(self) -> Self:
        # A client that goes away ends its handler, or silence would outlive it.
        self._runner = web.ServerRunner(web.Server(self._handle, handler_cancellation=True, access_log=None), shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        travel, rest = self._draw_delay()
        if travel:
            await asyncio.sleep(travel)
        key = self._key_of(request)
        refused, headers = self._count(request, key)
        if rest:
            await asyncio.sleep(rest)
        if request.transport in self._stale:
            return reset(request)
        if refused:
            return _json(429, {"error": {"type": "rate_limit_error", "message": "Too many requests"}}, headers)
        order = self._next_order(key)
        if order is None:
            return self._answer(request, key, headers)
        return await self._misbehave(order, request, key, headers)

    async def _misbehave(
        self, order: _Order, request: web.BaseRequest, key: ApiKey | None, headers: Mapping[str, str]
    ) -> web.StreamResponse:
        fault = order.fault
        if fault in PLAIN:
            status, kind, text = PLAIN[fault]
            return web.Response(status=status, text=text, content_type=kind, headers=headers)
        if fault in STREAMED:
            return await STREAMED[fault](request, headers)
        if fault is Fault.REFUSED:
            said = {"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(order.retry_after or self._spread_reset())}
            return _json(429, {"message": "Too many requests"}, {**headers, **said})
        if fault is Fault.REDIRECT:
            host = "localhost" if self._host == "127.0.0.1" else "127.0.0.1"
            return web.Response(status=302, headers={**headers, "Location": f"http://{host}:{self._port}/elsewhere"})
        if fault is Fault.BOMB:
            encoded = {**headers, "Content-Encoding": "gzip"}
            return web.Response(body=bomb(), headers=encoded, content_type=JSON_TYPE)
        answer = self._answer(request, key, headers)
        if fault is Fault.COOKIE and key is not None:
            answer.set_cookie("session", key.label)
        if fault is Fault.STALE:
            self._stale.add(transport_of(request))
        return answer

    def _draw_delay(self) -> tuple[float, float]:
        delay = random.uniform(*self._delay)
        travel = random.uniform(0.0, delay)
        return travel, delay - travel

    def _key_of(self, request: web.BaseRequest) -> ApiKey | None:
        scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
        known = self._keys.get(digest_of(secret)) if scheme == "Bearer" else None
        return None if known is None else known[0]

    def _count(self, request: web.BaseRequest, key: ApiKey | None) -> tuple[bool, dict[str, str]]:
        """Count an arrival, unless the window is full. Returns whether it is, and the headers that every answer brings."""
        now = asyncio.get_running_loop().time()
        window = self._windows[request.path, self._scope_of(request, key)]
        while window and window[0] <= now - self._period:
            window.popleft()
        refused = len(window) >= self._limit
        if not refused:
            window.append(now)
        self.requests += 1
        self.refused += refused
        self.peak_connections = max(self.peak_connections, self.connections)
        if self._record:
            name = None if key is None else key.label
            self.arrivals.append(Arrival(at=now, key=name, path=request.path, headers=request.headers, refused=refused))
        return refused, {
            "x-ratelimit-limit": str(self._limit),
            "x-ratelimit-remaining": str(self._limit - len(window)),
            "x-ratelimit-reset": str(math.ceil(self._period - (now - window[0]))),
            "x-request-id": f"sandbox-{self.requests}",
            "x-credits-used": "0",
        }

    def _scope_of(self, request: web.BaseRequest, key: ApiKey | None) -> Hashable:
        if self._scope == "client":
            return ()
        if key is None:
            return request.headers.get("Authorization")
        return self._keys[key.digest][1] if self._scope == "account" else key.digest

    def _next_order(self, key: ApiKey | None) -> _Order | None:
        orders = self._orders.get(key.digest) if key is not None else None
        while orders:
            order = orders[0]
            if order.times is None:
                return order
            if order.times > 0:
                order.times -= 1
                return order
            orders.popleft()
        return None

    def _answer(self, request: web.BaseRequest, key: ApiKey | None, headers: Mapping[str, str]) -> web.Response:
        if key is None:
            missing = "Authorization" not in request.headers
            return _json(401, {"message": f"{'Missing' if missing else 'Invalid'} API key in request"}, headers)
        if request.method != "GET" or request.path not in {USER_CREDITS, ACCOUNT_CREDITS}:
            return _json(404, {"message": "Not found"}, headers)
        account = self._accounts[self._keys[key.digest][1]]
        if request.path == USER_CREDITS:
            return _json(200, {"credits": account["credits"]}, headers)
        if request.headers.get("x-api-version") != API_VERSION:
            error = {"type": "invalid_request", "message": "Missing or wrong x-api-version header", "metadata": {}}
            return _json(400, {"error": error}, headers)
        return _json(200, {"account": account}, headers)

    def _spread_reset(self) -> int:
        """Seconds that the next ordered refusal asks for: a moment of its own, as each account's window would."""
        self._refusals += 1
        return 1 + int(max(self._period - 1, 0) * (self._refusals * 0.618 % 1))


def _account_fields(credits: Decimal | int | str) -> dict[str, Any]:
    return {
        "credits": _credits(credits),
        "recurring_credits": Decimal(0),
        "recurring_credits_frequency": None,
        "recurring_credits_refresh_date": None,
        "credit_rollover": False,
    }


def _credits(credits: Decimal | int | str) -> Decimal:
    with contextlib.suppress(InvalidOperation):
        if not isinstance(credits, float) and Decimal(credits).is_finite():
            return Decimal(credits)
    raise ConfigurationError(f"credits are exact: give a finite Decimal, an int or their text, not {shown(credits)}")


def _worst_window(times: list[float], period: float) -> int:
    worst, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - period:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


def _json(status: int, document: Any, headers: Mapping[str, str]) -> web.Response:
    return web.Response(status=status, text=_json_text(document), content_type="application/json", headers=headers)


def _json_text(value: Any) -> str:
    # The standard encoder cannot write a Decimal without losing digits.
    if isinstance(value, Decimal):
        return credits_text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)}: {_json_text(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json_text, value)) + "]"
    return json.dumps(value)
