"""`fake_client`: a real client with an API in memory, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from decimal import Decimal
from typing import TypedDict, Unpack

from crustcredits._client import CreditsClient
from crustcredits._errors import APIConnectionError, APITimeoutError, ConfigurationError
from crustcredits._http.protocol import Response, request_headers
from crustcredits._http.retry import Retry
from crustcredits._http.transport_types import Failure, Fate
from crustcredits._keys.api_key import ApiKey, printable_label, split_label
from crustcredits._ratelimit.config import RateLimit
from crustcredits._validation import Seconds, check_kind, hides_arguments
from crustcredits.testing._api import FakeAPI
from crustcredits.testing._faults import Fault

_ORIGIN = "https://in-memory.invalid"
# Short, so that tests do not wait: a request that hangs, a retry, the pace.
_TIMEOUT = 0.05
_RETRY = Retry(backoff=0.0, wait_max=0.0)
_RATE_LIMIT = RateLimit(requests=1_000_000, pace=None)

_HANGING = {Fault.SILENCE: Fate.ABANDONED, Fault.DRIP: Fate.ANSWERED}
_LOST = {
    Fault.RESET: ("before an answer", Fate.ABANDONED),
    Fault.RESET_IN_BODY: ("while the answer came", Fate.ANSWERED),
    Fault.CUT_SHORT: ("while the answer came", Fate.ANSWERED),
}
_TOO_LARGE = {Fault.ENDLESS, Fault.BOMB}


class _MemoryTransport:
    """Replaces the transport over aiohttp."""

    def __init__(self, api: FakeAPI) -> None:
        self._api = api

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        await asyncio.sleep(0)
        answer = self._api.answer("GET", path, request_headers(key))
        fault = answer.fault
        if fault in _HANGING:
            await asyncio.sleep(timeout)
            error = APITimeoutError(
                f"no whole answer within {timeout:.3g} s (in memory); heal the key",
                key_name=key.label,
            )
            return Failure(error, _HANGING[fault])
        if fault in _LOST:
            when, fate = _LOST[fault]
            return Failure(
                APIConnectionError(
                    f"the connection failed {when} (in memory); heal the key, or try again",
                    key_name=key.label,
                ),
                fate,
            )
        if fault is Fault.REDIRECT:
            return Response(302, {**answer.headers, "Location": f"{_ORIGIN}/elsewhere"}, b"")
        return Response(
            answer.status, answer.headers, None if fault in _TOO_LARGE else answer.body.encode()
        )

    async def close(self) -> None:
        pass


class FakeClientOptions(TypedDict, total=False):
    """Options of `CreditsClient` that matter without a socket."""

    rate_limit: RateLimit
    concurrency: int
    request_timeout: float
    retry: Retry
    max_age: Seconds
    stale_while_revalidate: Seconds
    stale_if_error: Seconds
    max_error_age: Seconds | None
    max_entries: int


class FakeClient(CreditsClient):
    """A client of a fake API in memory; `fake_client` makes one.

    Attributes:
        api: The API: change balances, revoke keys, order faults, and read its arrivals.
        keys: The keys it was made with, in this order.
    """

    def __init__(
        self, api: FakeAPI, keys: list[ApiKey], **options: Unpack[FakeClientOptions]
    ) -> None:
        options.setdefault("request_timeout", _TIMEOUT)
        options.setdefault("retry", _RETRY)
        options.setdefault("rate_limit", _RATE_LIMIT)
        super().__init__(base_url=_ORIGIN, _transport=_MemoryTransport(api), **options)
        self.api = api
        self.keys = keys


@hides_arguments
def fake_client(
    credits: Mapping[str, Decimal | int | str] | None = None, **options: Unpack[FakeClientOptions]
) -> FakeClient:
    """Return a `CreditsClient` without a socket, for unit tests; `credits` maps labels to amounts.

    Everything except the network is real: limits, retries, the cache, reports and gates. Keys of
    one account share its balance. Faults are those of the sandbox; `Fault` lists their effect
    without a socket.

        async with fake_client({"acme/prod": 50, "globex/prod": 0}) as client:
            client.api.fail(client.api.key("globex/prod"), Fault.INVALID_KEY)
            report = await client.check(client.keys)

    So that tests hardly wait, a request times out after 0.05 s, retries have no backoff, a refusal
    is raised at once, and there is no rate limit, unless `options` say otherwise. These are the
    options of `CreditsClient`; the API has the limit of `rate_limit`. The circuit breaker waits as
    it does in service: `Fault.CHALLENGE` takes seconds for several keys, and for a key that is
    checked again and again. An ordered refusal asks for a wait of up to a minute, which delays the
    next call for the key; `api.fail(key, Fault.REFUSED, retry_after=1)` makes it 1 s.

    Raises:
        ConfigurationError: A label or an amount cannot be used, or keys of one account have
            different credits.
    """
    limit = options.get("rate_limit", _RATE_LIMIT)
    check_kind("rate_limit", limit, RateLimit)
    if credits is not None:
        check_kind("credits", credits, Mapping)
    api = FakeAPI(
        limit=limit.requests,
        period=limit.period,
        scope="client" if limit.scope == "auto" else limit.scope,
    )
    return FakeClient(api, _issue(api, credits or {}), **options)


def _issue(api: FakeAPI, credits: Mapping[str, Decimal | int | str]) -> list[ApiKey]:
    """Issue keys under these labels, and open their accounts with these amounts."""
    keys: list[ApiKey] = []
    amounts: dict[str, Decimal | int | str] = {}
    for label, amount in credits.items():
        check_kind("a label", label, str)
        account, name = split_label(label)
        if printable_label("", name, account) is None:
            raise ConfigurationError(
                "a label cannot be used, or may be a secret; map labels to amounts of credits"
            )
        if account is None:
            keys.append(api.add_key(name, credits=amount))
            continue
        if amounts.setdefault(account, amount) != amount:
            raise ConfigurationError(
                "keys of one account share one balance; give them the same credits", key_name=label
            )
        if not any(key.account == account for key in keys):
            api.add_account(account, credits=amount)
        keys.append(api.add_key(name, account=account))
    return keys
