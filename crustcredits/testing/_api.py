"""`FakeAPI`: accounts, keys and faults, and the answer to each request.

It decides, and has no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import attrs

from crustcredits._errors import ConfigurationError
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import API_VERSION
from crustcredits._keys.api_key import ApiKey, digest_of
from crustcredits._models import credits_text
from crustcredits._validation import (
    Seconds,
    check_kind,
    check_number,
    check_whole,
    hides_arguments,
    seconds,
    shown,
)
from crustcredits.testing._accounts import Account
from crustcredits.testing._faults import PLAIN, Fault

Scope = Literal["client", "account", "key"]
_PATHS = (USER_CREDITS, ACCOUNT_CREDITS)


@attrs.frozen(kw_only=True)
class Arrival:
    """One request as it reached the sandbox.

    Attributes:
        at: The running loop's time of arrival.
        key: The label of the key, or None if no known key was sent.
        path: The path of the request.
        headers: As sent. They hold the secret, so they do not print.
        refused: Whether it was answered 429 because the window was full.
    """

    at: float
    key: str | None
    path: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    refused: bool


@attrs.frozen(kw_only=True)
class Answer:
    """The answer to one request, and the fault of its connection, if any."""

    status: int
    headers: Mapping[str, str]
    body: str
    kind: str = "application/json"
    fault: Fault | None = None
    label: str | None = None  # of the key, if known


@attrs.frozen
class _Request:
    method: str
    path: str
    headers: Mapping[str, str] = attrs.field(repr=False)
    key: ApiKey | None
    told: Mapping[str, str]  # the headers of the answer


@attrs.define(eq=False)
class _Order:
    fault: Fault
    times: int | None = None
    retry_after: int | None = None
    path: str | None = None


class FakeAPI:
    """A world of accounts and keys that answers as the API's documents say, and fails on request.

    `SandboxServer` puts it on a socket, and `fake_client` into memory. Accounts are identified by
    their names, and an account's balance is changed through any of its keys. Time is the running
    loop's. It has many methods because they are all that a test can do to the world.

    Attributes:
        arrivals: Every request, in order of arrival; empty without `record`.
        requests: Number of requests.
        refused: Requests answered 429 because the window was full. Ordered refusals do not count.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        limit: int = 300,
        period: float = 60.0,
        scope: Scope = "client",
        record: bool = True,
    ) -> None:
        if scope not in {"client", "account", "key"}:
            raise ConfigurationError("scope must be 'client', 'account' or 'key'")
        check_whole("limit", limit, minimum=1)
        check_number("period", period, above=0)
        self.arrivals: list[Arrival] = []
        self.requests: int = 0
        self.refused: int = 0
        self._limit = limit
        self._period = period
        self._scope = scope
        self._record = record
        self._accounts: dict[str, Account] = {}
        self._keys: dict[bytes, tuple[ApiKey, str]] = {}
        self._revoked: set[bytes] = set()
        self._down: Fault | None = None
        self._lag = 0.0
        self._orders: defaultdict[bytes, deque[_Order]] = defaultdict(deque)
        self._windows: defaultdict[Hashable, deque[float]] = defaultdict(deque)
        self._refusals = 0

    # --- accounts and keys

    @hides_arguments
    def add_account(self, name: str, *, credits: Decimal | int | str = 1000, **fields: Any) -> None:
        """Open an account with these credits.

        `fields` are further ones of `/account/credits`, such as `recurring_credits`.
        """
        self._accounts[name] = Account(_credits(credits), _NO_GRANT | fields)

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

        It belongs to `account`, which must be open, or without one to an account of its own with
        `credits`. With `declared=False` the returned key does not name its account. The secret is
        random unless given.

        Raises:
            ConfigurationError: There is no such account, or the secret or the name cannot be used.
        """
        if account is not None and account not in self._accounts:
            raise ConfigurationError(
                "the sandbox has no account of this name; open it with add_account() first"
            )
        secret = secret or f"sandbox-{secrets.token_hex(16)}"
        key = ApiKey(secret, name=name, account=account if declared else None)
        owner = account
        if owner is None:
            owner = f"the account of {key.digest.hex()}"
            self.add_account(owner, credits=credits)
        self._keys[key.digest] = (key, owner)
        return key

    @hides_arguments
    def key(self, label: str) -> ApiKey:
        """Return the key that was issued under this label.

        Raises:
            ConfigurationError: There is none.
        """
        found = next((key for key, _ in self._keys.values() if key.label == label), None)
        if found is None:
            raise ConfigurationError("no key of this label was issued; make it with add_key()")
        return found

    @hides_arguments
    def revoke(self, key: ApiKey) -> None:
        """Answer 401 to this key for good.

        Raises:
            ConfigurationError: The key was not issued here.
        """
        self._account_of(key)
        self._revoked.add(key.digest)

    # --- balances

    @hides_arguments
    def set_credits(self, key: ApiKey, credits: Decimal | int | str) -> None:
        """Set the balance of the account that `key` draws from.

        Raises:
            ConfigurationError: The key was not issued here, or the credits are not exact.
        """
        self._account_of(key).set_credits(_credits(credits), _now())

    @hides_arguments
    def spend(
        self,
        key: ApiKey,
        credits: Decimal | int | str | None = None,
        *,
        per_second: Decimal | int | str | None = None,
    ) -> None:
        """Spend `credits` of the account of `key` at once, or `per_second` from now on, down to 0.

        `per_second=0` ends the latter.

        Raises:
            ConfigurationError: The key was not issued here, neither or both amounts are given, or
                one is not exact; or no loop runs, so time does not pass.
        """
        account = self._account_of(key)
        if (credits is None) == (per_second is None):
            raise ConfigurationError(
                "the amount is undecided; give either credits, spent at once, or per_second="
            )
        if credits is not None:
            account.spend(_amount(credits), _now())
        if per_second is not None:
            account.spend_per_second(_amount(per_second), _time("spend(per_second=)"))

    @hides_arguments
    def grant(
        self,
        key: ApiKey,
        credits: Decimal | int | str,
        *,
        after: Seconds,
        frequency: str = "monthly",
        rollover: bool = False,
    ) -> None:
        """Give the account of `key` recurring `credits`: in `after` seconds, then every 30 days.

        Without `rollover`, all credits except top-ups are lost when the grant comes, including the
        account's first balance; top-ups stay.

        Raises:
            ConfigurationError: The key was not issued here, an argument cannot be used, or no loop
                runs, so time does not pass.
        """
        account, wait = self._account_of(key), seconds("after", after, above=0)
        account.grant(_amount(credits), _time("grant()"), wait, frequency, rollover=rollover)

    @hides_arguments
    def top_up(
        self, key: ApiKey, credits: Decimal | int | str, *, expires: Seconds | None = None
    ) -> None:
        """Buy credits for the account of `key`; the rest is lost after `expires` seconds, or never.

        A top-up appears in `credit_topups` as long as any of it is left. The API does not document
        the names of its members; these are `origin`, `original_credits`, `remaining_credits` and
        `expires_at`.

        Raises:
            ConfigurationError: The key was not issued here, an argument cannot be used, or no loop
                runs, so time does not pass.
        """
        account, wait = (
            self._account_of(key),
            None if expires is None else seconds("expires", expires, above=0),
        )
        account.top_up(_amount(credits), _time("top_up()"), wait)

    @hides_arguments
    def lag(self, after: Seconds) -> None:
        """Answer with the balances of `after` seconds ago, as a delayed replica would; 0 ends it.

        Raises:
            ConfigurationError: `after` is no number of seconds of at least 0.
        """
        self._lag = seconds("after", after)

    # --- trouble

    @hides_arguments
    def down(self, fault: Fault = Fault.UNAVAILABLE) -> None:
        """Let the whole API fail with `fault`, for known and unknown keys, until `up()`."""
        check_kind("fault", fault, Fault)
        self._down = fault

    def up(self) -> None:
        """Let the API work again. Faults that were ordered for single keys stay."""
        self._down = None

    @hides_arguments
    def fail(
        self,
        key: ApiKey,
        fault: Fault,
        *,
        times: int | None = None,
        retry_after: int | None = None,
        path: str | None = None,
    ) -> None:
        """Answer the next `times` requests of `key`, or all, with `fault`, after earlier faults.

        `retry_after` is the wait in a `REFUSED` answer, in whole seconds; by default each answer
        names another time within the period, as for accounts that are also used from elsewhere.
        With `path` (`"/user/credits"` or `"/account/credits"`) only requests to that endpoint fail.

        Raises:
            ConfigurationError: The key was not issued here, or another argument cannot be used.
        """
        self._account_of(key)
        check_kind("fault", fault, Fault)
        for what, number in (("times", times), ("retry_after", retry_after)):
            if number is not None:
                check_whole(what, number, minimum=1)
        if path is not None and path not in _PATHS:
            raise ConfigurationError(f"path must be {' or '.join(_PATHS)}")
        self._orders[key.digest].append(_Order(fault, times, retry_after, path))

    @hides_arguments
    def heal(self, key: ApiKey) -> None:
        """Forget the faults ordered for `key`.

        Raises:
            ConfigurationError: The key was not issued here.
        """
        self._account_of(key)
        self._orders.pop(key.digest, None)

    # --- arrivals

    def worst_window(self) -> int:
        """Return the most arrivals on one endpoint within any one period, over all keys.

        Raises:
            ConfigurationError: With `record=False` it is not known.
        """
        if not self._record:
            raise ConfigurationError(
                "the worst window is unknown, because arrivals are not recorded; use record=True"
            )
        return max(
            (_worst_window(times, self._period) for times in self._times_by_path().values()),
            default=0,
        )

    def _times_by_path(self) -> dict[str, list[float]]:
        times: defaultdict[str, list[float]] = defaultdict(list)
        for arrival in self.arrivals:
            times[arrival.path].append(arrival.at)
        return times

    # --- answers

    def _key_of(self, secret: str | None) -> ApiKey | None:
        """Return the key of this secret, also a revoked one."""
        known = None if secret is None else self._keys.get(digest_of(secret))
        return None if known is None else known[0]

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """Count a request that arrives now, and decide its answer."""
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        key = self._key_of(secret) if scheme == "Bearer" else None
        refused, told = self._count(path, headers, key)
        if refused:
            return _json(
                429, {"error": {"type": "rate_limit_error", "message": "Too many requests"}}, told
            )
        request = _Request(method, path, headers, key, told)
        order = self._next_order(key, path) if self._down is None else _Order(self._down)
        return self._right(request) if order is None else self._faulty(order, request)

    def _count(
        self, path: str, headers: Mapping[str, str], key: ApiKey | None
    ) -> tuple[bool, dict[str, str]]:
        """Count an arrival, unless the window is full.

        Returns whether it is full, and the headers of every answer.
        """
        now = asyncio.get_running_loop().time()
        window = self._windows[path, self._scope_of(headers, key)]
        while window and window[0] <= now - self._period:
            window.popleft()
        refused = len(window) >= self._limit
        if not refused:
            window.append(now)
        self.requests += 1
        self.refused += refused
        if self._record:
            name = None if key is None else key.label
            self.arrivals.append(
                Arrival(at=now, key=name, path=path, headers=headers, refused=refused)
            )
        return refused, {
            "x-ratelimit-limit": str(self._limit),
            "x-ratelimit-remaining": str(self._limit - len(window)),
            "x-ratelimit-reset": str(math.ceil(self._period - (now - window[0]))),
            "x-request-id": f"sandbox-{self.requests}",
            "x-credits-used": "0",
        }

    def _scope_of(self, headers: Mapping[str, str], key: ApiKey | None) -> Hashable:
        if self._scope == "client":
            return ()
        if key is None:
            return headers.get("Authorization")
        return self._keys[key.digest][1] if self._scope == "account" else key.digest

    def _next_order(self, key: ApiKey | None, path: str) -> _Order | None:
        orders = self._orders.get(key.digest) if key is not None else None
        order = next((each for each in orders or () if each.path in {None, path}), None)
        if orders and order is not None and order.times is not None:
            order.times -= 1
            if not order.times:
                orders.remove(order)
        return order

    def _right(self, request: _Request, *, glitch: bool = False) -> Answer:
        key, told = request.key, request.told
        if key is None or key.digest in self._revoked:
            missing = "Authorization" not in request.headers
            return _json(
                401, {"message": f"{'Missing' if missing else 'Invalid'} API key in request"}, told
            )
        if request.method != "GET" or request.path not in _PATHS:
            return _json(404, {"message": "Not found"}, told)
        account = self._account_of(key).document(asyncio.get_running_loop().time(), self._lag)
        if glitch:
            account["credits"] = Decimal(0)
        if request.path == USER_CREDITS:
            return _json(200, {"credits": account["credits"]}, told)
        if request.headers.get("x-api-version") != API_VERSION:
            error = {
                "type": "invalid_request",
                "message": "Missing or wrong x-api-version header",
                "metadata": {},
            }
            return _json(400, {"error": error}, told)
        return _json(200, {"account": account}, told)

    def _faulty(self, order: _Order, request: _Request) -> Answer:
        fault = order.fault
        if fault in PLAIN:
            status, kind, text = PLAIN[fault]
            return Answer(status=status, headers=request.told, body=text, kind=kind, fault=fault)
        if fault is Fault.REFUSED:
            said = {
                "x-ratelimit-remaining": "0",
                "x-ratelimit-reset": str(order.retry_after or self._spread_reset()),
            }
            return attrs.evolve(
                _json(429, {"message": "Too many requests"}, {**request.told, **said}), fault=fault
            )
        answer = self._right(request, glitch=fault is Fault.GLITCH)
        return attrs.evolve(
            answer, fault=fault, label=None if request.key is None else request.key.label
        )

    def _spread_reset(self) -> int:
        """Seconds that the next ordered refusal asks for, different each time."""
        self._refusals += 1
        return 1 + int(max(self._period - 1, 0) * (self._refusals * 0.618 % 1))

    def _account_of(self, key: ApiKey) -> Account:
        check_kind("key", key, ApiKey)
        if key.digest not in self._keys:
            raise ConfigurationError(
                "the sandbox did not issue this key; make it with add_key()", key_name=key.label
            )
        return self._accounts[self._keys[key.digest][1]]


_NO_GRANT: dict[str, Any] = {
    "recurring_credits": Decimal(0),
    "recurring_credits_frequency": None,
    "recurring_credits_refresh_date": None,
    "credit_rollover": False,
}


def _credits(credits: Decimal | int | str) -> Decimal:
    with contextlib.suppress(InvalidOperation, TypeError, ValueError):
        if not isinstance(credits, (float, bool)) and Decimal(credits).is_finite():
            return Decimal(credits)
    raise ConfigurationError(
        "credits must be exact: give a finite Decimal, an int, or such a number as text, not "
        f"{shown(credits)}"
    )


def _amount(credits: Decimal | int | str) -> Decimal:
    amount = _credits(credits)
    if amount < 0:
        raise ConfigurationError("credits to spend or add must be at least 0")
    return amount


def _now() -> float:
    """Return the running loop's time, or minus infinity without a loop."""
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop().time()
    return -math.inf


def _time(what: str) -> float:
    now = _now()
    if now == -math.inf:
        raise ConfigurationError(
            f"{what} needs a running loop for its time; call it in a coroutine"
        )
    return now


def _worst_window(times: list[float], period: float) -> int:
    worst, first = 0, 0
    for last, time in enumerate(times):
        while times[first] <= time - period:
            first += 1
        worst = max(worst, last - first + 1)
    return worst


def _json(status: int, document: Any, headers: Mapping[str, str]) -> Answer:
    return Answer(status=status, headers=headers, body=_json_text(document))


def _json_text(value: Any) -> str:
    # The standard encoder cannot write a Decimal without losing digits.
    if isinstance(value, Decimal):
        return credits_text(value)
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(name)}: {_json_text(part)}" for name, part in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json_text, value)) + "]"
    return json.dumps(value)
