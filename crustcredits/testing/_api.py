"""`FakeAPI`: accounts, keys and faults, and the answer to each request.

It decides, and has no socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
from collections.abc import Hashable, Mapping
from decimal import Decimal
from typing import Any, Literal

import attrs

from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import ApiKey, digest_of
from crustcredits._validation import (
    Seconds,
    check_kind,
    check_number,
    check_whole,
    hides_arguments,
    seconds,
)
from crustcredits.testing._accounts import Account, exact_amount, exact_credits
from crustcredits.testing._answers import (
    PATHS,
    Answer,
    Request,
    documented,
    json_answer,
    plain_fault,
    refusal,
    unauthorized,
)
from crustcredits.testing._arrivals import Arrival, Arrivals
from crustcredits.testing._fault_orders import FaultOrder, FaultOrders
from crustcredits.testing._faults import Fault

ServerScope = Literal["client", "account", "key"]


class FakeAPI:
    """A world of accounts and keys that answers as the API's documents say, and fails on request.

    `SandboxServer` puts it on a socket, and `fake_client` into memory. Accounts are identified by
    their names, and an account's balance is changed through any of its keys. Time is the running
    loop's. The class is long because almost every method is public, with a full docstring: they are
    all that a test can do to the world.

    Attributes:
        arrivals: Every request, in order of arrival; empty without `record`.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        limit: int = 300,
        period: float = 60.0,
        scope: ServerScope = "client",
        record: bool = True,
    ) -> None:
        if scope not in {"client", "account", "key"}:
            raise ConfigurationError("scope must be 'client', 'account' or 'key'")
        check_whole("limit", limit, minimum=1)
        check_number("period", period, above=0)
        self._scope = scope
        self._arrivals = Arrivals(limit=limit, period=period, record=record)
        self.arrivals: list[Arrival] = self._arrivals.recorded
        self._orders = FaultOrders(period)
        self._accounts: dict[str, Account] = {}
        self._keys: dict[bytes, tuple[ApiKey, str]] = {}
        self._revoked: set[bytes] = set()
        self._lag = 0.0

    # --- accounts and keys

    @hides_arguments
    def add_account(self, name: str, *, credits: Decimal | int | str = 1000, **fields: Any) -> None:
        """Open an account with these credits.

        `fields` are further ones of `/account/credits`, such as `recurring_credits`.
        """
        self._accounts[name] = Account(exact_credits(credits), _NO_GRANT | fields)

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
        self._account_of(key).set_credits(exact_credits(credits), _now())

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
            account.spend(exact_amount(credits), _now())
        if per_second is not None:
            account.spend_per_second(exact_amount(per_second), _time("spend(per_second=)"))

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
        account.grant(exact_amount(credits), _time("grant()"), wait, frequency, rollover=rollover)

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
        account.top_up(exact_amount(credits), _time("top_up()"), wait)

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
        self._orders.down = fault

    def up(self) -> None:
        """Let the API work again. Faults that were ordered for single keys stay."""
        self._orders.down = None

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
        if path is not None and path not in PATHS:
            raise ConfigurationError(f"path must be {' or '.join(PATHS)}")
        self._orders.add(key.digest, FaultOrder(fault, times, retry_after, path))

    @hides_arguments
    def heal(self, key: ApiKey) -> None:
        """Forget the faults ordered for `key`.

        Raises:
            ConfigurationError: The key was not issued here.
        """
        self._account_of(key)
        self._orders.forget(key.digest)

    # --- arrivals

    @property
    def requests(self) -> int:
        """Number of requests."""
        return self._arrivals.requests

    @property
    def refused(self) -> int:
        """Requests answered 429 because the window was full. Ordered refusals do not count."""
        return self._arrivals.refused

    def worst_window(self) -> int:
        """Return the most arrivals on one endpoint within any one period, over all keys.

        Raises:
            ConfigurationError: With `record=False` it is not known.
        """
        return self._arrivals.worst_window()

    # --- answers

    def _key_of(self, secret: str | None) -> ApiKey | None:
        """Return the key of this secret, also a revoked one."""
        known = None if secret is None else self._keys.get(digest_of(secret))
        return None if known is None else known[0]

    def answer(self, method: str, path: str, headers: Mapping[str, str]) -> Answer:
        """Count a request that arrives now, and decide its answer."""
        scheme, _, secret = headers.get("Authorization", "").partition(" ")
        key = self._key_of(secret) if scheme == "Bearer" else None
        label = None if key is None else key.label
        is_refused, answer_headers = self._arrivals.count(
            path, headers, self._scope_of(headers, key), label
        )
        if is_refused:
            error = {"type": "rate_limit_error", "message": "Too many requests"}
            return json_answer(429, {"error": error}, answer_headers)
        request = Request(
            method=method, path=path, headers=headers, key=key, answer_headers=answer_headers
        )
        order = self._orders.take(None if key is None else key.digest, path)
        return self._right(request) if order is None else self._faulty(order, request)

    def _scope_of(self, headers: Mapping[str, str], key: ApiKey | None) -> Hashable:
        if self._scope == "client":
            return ()
        if key is None:
            return headers.get("Authorization")
        return self._keys[key.digest][1] if self._scope == "account" else key.digest

    def _right(self, request: Request, *, glitch: bool = False) -> Answer:
        key = request.key
        if key is None or key.digest in self._revoked:
            return unauthorized(request)
        if request.method != "GET" or request.path not in PATHS:
            return json_answer(404, {"message": "Not found"}, request.answer_headers)
        account = self._account_of(key).document(asyncio.get_running_loop().time(), self._lag)
        if glitch:
            account["credits"] = Decimal(0)
        return documented(request, account)

    def _faulty(self, order: FaultOrder, request: Request) -> Answer:
        fault = order.fault
        if fault is Fault.REFUSED:
            return refusal(request.answer_headers, self._orders.wait_of(order))
        plain = plain_fault(fault, request.answer_headers)
        if plain is not None:
            return plain
        label = None if request.key is None else request.key.label
        answer = self._right(request, glitch=fault is Fault.GLITCH)
        return attrs.evolve(answer, fault=fault, label=label)

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
