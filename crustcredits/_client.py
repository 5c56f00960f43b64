"""`CreditsClient`: one key or many, deadlines, and what closing does to calls under way.

How one key is asked is `_cache.dispatcher`'s, how many are asked at a time `_fan_out`'s; nothing
here knows of requests.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from ssl import SSLContext
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.policy import NEW, CacheOptions, CachePolicy
from crustcredits._cache.single_flight import FanOutWaiter, SingleFlight, closed_error
from crustcredits._cache.store import BalanceCache
from crustcredits._check import PoolCheck, read_pool
from crustcredits._errors import ConfigurationError
from crustcredits._fan_out import Ask, FanOut, Key, Land, nothing
from crustcredits._http.protocol import (
    ACCOUNT_CREDITS,
    USER_CREDITS,
    parse_base_url,
    proxy_from_env,
    proxy_problem,
)
from crustcredits._http.retry import Retry
from crustcredits._http.transport import ClientSession, Transport, session_problem, tls_problem
from crustcredits._keys.api_key import (
    ApiKey,
    KeyLike,
    KeysLike,
    UnusableKey,
    as_key,
    as_keys_async,
    methods_of,
    pool_of,
)
from crustcredits._keys.checks import is_likely_key
from crustcredits._models import Account, Balance, Outcome, Unknown
from crustcredits._ratelimit.config import RateLimit
from crustcredits._ratelimit.fair_queue import Flow
from crustcredits._ratelimit.leased_tokens import TokenStore, check_store
from crustcredits._ratelimit.quota import Quota
from crustcredits._report import Report, needed_credits
from crustcredits._validation import (
    Seconds,
    attempt,
    check_flag,
    check_kind,
    check_number,
    check_whole,
    hides_arguments,
    seconds,
)

# Keys of a stream that are under way at a time. A pool enters the queue as a whole.
_STREAMED = 1_024

_RATE_LIMIT = RateLimit()
_RETRY = Retry()


def _transport(
    base_url: str | None,
    session: ClientSession | None,
    proxy: str | None,
    trust_env: object,
    tls: SSLContext | None,
) -> Transport | ConfigurationError:
    """What sends requests; or what is wrong with the arguments, not raised, because they may hold credentials."""
    origin = (
        proxy_problem(proxy)
        or session_problem(session)
        or tls_problem(tls)
        or parse_base_url(base_url)
    )
    if isinstance(origin, ConfigurationError):
        return origin
    if not isinstance(trust_env, bool):
        return ConfigurationError(f"trust_env is True or False, not {type(trust_env).__name__}")
    if trust_env and proxy is None:
        proxy = proxy_from_env(origin)
        problem = proxy_problem(proxy, "the proxy of the environment (HTTPS_PROXY or ALL_PROXY)")
        if problem is not None:
            return problem
    return Transport(origin, session=session, proxy=proxy, tls=tls)


class CreditsClient:
    """Asks the Crustdata API how many credits API keys have left, within its rate limit, over one HTTP session.

    Args:
        base_url: `https://host[:port]` of the API; by default the variable `CRUSTDATA_API_URL`,
            else the API's own.
        rate_limit: The limit to keep.
        buckets: Who counts it: `crustcredits.redis.RedisBuckets` for processes that share one
            quota; by default each client for itself.
        concurrency: Requests on the wire at once. One that hangs, without an answer for 0.4 s or
            four times the usual, stops counting, so that hanging keys hold up no others; at most
            eight times as many may hang.
        request_timeout: Seconds from the start of one request to the last byte of its answer.
            Waiting for the rate limit or for a free place on the wire is not counted.
        retry: How failures that may pass are tried again.
        session: An aiohttp session to use, for its connector, proxy and traces; it is never closed
            here. Its cookies, `Host`, credentials and middlewares are left out of these requests,
            and cookies that the API sets are taken out of its jar at once. A wait for a place in
            its connector counts as time on the wire. By default the client opens and closes its
            own.
        proxy: URL of an HTTP proxy.
        trust_env: Whether to use the proxy that the environment names (`HTTPS_PROXY`, `ALL_PROXY`,
            `NO_PROXY`) where `proxy` is not given. They are read now; `.netrc` never is.
        ssl: Which certificates to trust, for a company's own authority:
            `ssl.create_default_context(cafile=…)`. By default those of the system, or of the file
            that the variable `SSL_CERT_FILE` named when aiohttp was imported; with a `session`,
            what its connector trusts. A certificate that cannot be verified is an
            `APIConnectionError`, which is not retried.
        max_age: Seconds, or a timedelta: an answer that came less long ago is given again instead
            of asking. This and the next two are what calls go by that do not say otherwise.
        stale_while_revalidate: Seconds, or a timedelta: an answer that is older than `max_age` by
            less than this is given at once, marked `stale`, and refreshed behind. Refreshes give
            way to calls that somebody waits for, leave a tenth of the limit alone, and are spread
            evenly; so when more is asked than the limit allows, answers get older, not slower.
        stale_if_error: Seconds, or a timedelta: while the API gives no answer (no connection,
            timeouts, a gateway, 5xx, 429, the rate limit), one that is older than `max_age` by less
            than this stands in: `stale`, with the error beside it in its `Outcome`. For a minute
            after a failure it is given at once, and refreshed behind; also where the last calls for
            three other keys have failed. What the API says of the key itself (401, 402, 403) is
            never hidden so.
        max_error_age: Seconds, or a timedelta: a failure that cost a request less long ago is given
            again instead of asking, so that a revoked key does not spend the rate limit. By default
            as long as `max_age`, and at least 1 s where any of the three above is more than 0. A
            call that gives its own `max_age` and no `max_error_age` goes by that `max_age`.
        max_entries: BalanceCache to keep, of all keys and both endpoints; the least recently used
            go first. Make it larger than the pools that are asked again and again.

    Those who ask for one key on one endpoint at the same time share one call, whatever their
    `max_age`: an answer's age counts from its receipt, and a call already under way may be joined.
    It is nobody's own: whoever gives up ends it for no one else. When the last one has given up, a
    call that still waits is dropped; one on the wire is finished, and its answer kept.

    Making a client needs no running loop and does no I/O. It belongs to the loop it is first used
    on. Use it with `async with`, or call `close()`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        base_url: str | None = None,
        rate_limit: RateLimit = _RATE_LIMIT,
        buckets: TokenStore | None = None,
        concurrency: int = 32,
        request_timeout: float = 10.0,
        retry: Retry = _RETRY,
        session: ClientSession | None = None,
        proxy: str | None = None,
        trust_env: bool = False,
        ssl: SSLContext | None = None,
        max_age: Seconds = 0.0,
        stale_while_revalidate: Seconds = 0.0,
        stale_if_error: Seconds = 0.0,
        max_error_age: Seconds | None = None,
        max_entries: int = 10_000,
    ) -> None:
        transport = _transport(base_url, session, proxy, trust_env, ssl)
        del (
            base_url,
            proxy,
        )  # They may hold credentials, and tracebacks are printed with local variables.
        if isinstance(transport, ConfigurationError):
            raise transport
        check_whole("concurrency", concurrency, minimum=1)
        check_number("request_timeout", request_timeout, above=0)
        check_whole("max_entries", max_entries, minimum=1)
        check_kind("rate_limit", rate_limit, RateLimit)
        check_kind("retry", retry, Retry)
        how_old = NEW.given(
            max_age=max_age,
            stale_while_revalidate=stale_while_revalidate,
            stale_if_error=stale_if_error,
            max_error_age=max_error_age,
        )
        self._freshness = NEW if how_old == NEW else how_old
        self._store = check_store(buckets)
        self._dispatcher = Dispatcher(
            transport,
            rate_limit=rate_limit,
            store=self._store,
            concurrency=concurrency,
            request_timeout=request_timeout,
            retry=retry,
        )
        self._calls = SingleFlight(
            self._dispatcher, BalanceCache(max_entries, retry, self._dispatcher.refusal)
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._fan_outs: set[FanOut | PoolCheck] = set()

    async def balance(
        self, key: KeyLike, *, timeout: Seconds | None = None, **freshness: Unpack[CacheOptions]
    ) -> Balance:
        """The credits that `key` has left, from `GET /user/credits`.

        `timeout`, seconds or a timedelta, is for the whole call: waiting and retries included.
        `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age` say how old the
        answer may be; each by default what the client says. Also with 0 for all of them a call
        already under way may be joined. A balance older than `max_age` is marked `stale`.

        Raises:
            CrustCreditsError: The class says what went wrong; the tree stands in the README.
        """
        key = as_key(key)
        how_old, deadline = self._freshness, None
        if freshness or timeout is not None:
            # As `hides_arguments` does, which would cost those with nothing to hide too.
            said = attempt(self._said, freshness, timeout)
            del freshness, timeout
            if isinstance(said, Exception):
                raise said
            how_old, deadline = said
        self._check_usable()
        outcome: Outcome[Balance] | None = (
            None if how_old is NEW else self._calls.known(USER_CREDITS, key, how_old)
        )
        if outcome is None:
            outcome = await self._calls.ask(USER_CREDITS, key, how_old, deadline)
        return outcome.result()

    @hides_arguments
    async def account(
        self, key: KeyLike, *, timeout: Seconds | None = None, **freshness: Unpack[CacheOptions]
    ) -> Account:
        """The account behind `key`, with its grant, wallets and top-ups, from `GET /account/credits`.

        The arguments and what it raises are as for `balance`. The two endpoints have a rate limit
        each.
        """
        key = as_key(key)
        how_old, deadline = self._said(freshness, timeout)
        self._check_usable()
        known: Outcome[Account] | None = self._calls.known(ACCOUNT_CREDITS, key, how_old)
        return (known or await self._calls.ask(ACCOUNT_CREDITS, key, how_old, deadline)).result()

    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: Literal[False] = False,
        timeout: Seconds | None = None,
        on_outcome: Callable[[Outcome[Balance]], object] | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Balance]: ...
    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: Literal[True],
        timeout: Seconds | None = None,
        on_outcome: Callable[[Outcome[Account]], object] | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Account]: ...
    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: bool,
        timeout: Seconds | None = None,
        on_outcome: Callable[[Outcome[Balance]], object] | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Balance]: ...
    @hides_arguments
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: bool = False,
        timeout: Seconds | None = None,
        on_outcome: Callable[[Outcome[Any]], object] | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Any]:
        """Check every key of a pool; one bad key never sinks the rest.

        Returns a report with one outcome for each key, in the order given. A secret that stands
        there twice is asked once.

        Args:
            keys: An iterable of secrets and `ApiKey`s, or a mapping of label to either.
            detail: Ask `/account/credits`, so that each balance is an `Account`.
            timeout: Seconds, or a timedelta, for all of it. A key whose answer has not come by then
                has `RateLimitWaitError` or `APITimeoutError` for its error, or its last failure;
                what has come is kept.
            on_outcome: A plain function, called with each outcome as it lands.
            freshness: `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age`, as
                for `balance`.

        Raises:
            ConfigurationError: This is no pool, or two different keys have one name, or one secret
                two accounts. A key that cannot be used does not raise: its outcome says so.
            ClientClosedError: The client was closed meanwhile.
        """
        source = pool_of(keys)
        del keys  # A frame that is under way may be printed too, in a log line.
        how_old, deadline = self._said(freshness, timeout)
        if on_outcome is not None and not _is_plain_function(on_outcome):
            raise ConfigurationError(
                "on_outcome is a plain function, not a coroutine function; use stream() to "
                "await between outcomes"
            )
        return await self._report(
            source, how_old, deadline, detail=check_flag("detail", detail), on_outcome=on_outcome
        )

    @overload
    async def require(
        self,
        credits: Decimal | float,
        keys: KeysLike,
        *,
        margin: Decimal | float = 1.0,
        detail: Literal[False] = False,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Balance]: ...
    @overload
    async def require(
        self,
        credits: Decimal | float,
        keys: KeysLike,
        *,
        margin: Decimal | float = 1.0,
        detail: Literal[True],
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Account]: ...
    @overload
    async def require(
        self,
        credits: Decimal | float,
        keys: KeysLike,
        *,
        margin: Decimal | float = 1.0,
        detail: bool,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Balance]: ...
    @hides_arguments
    async def require(
        self,
        credits: Decimal | float,
        keys: KeysLike,
        *,
        margin: Decimal | float = 1.0,
        detail: bool = False,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> Report[Any]:
        """Check a pool before a batch that needs `credits`, and raise unless they were there as last answered.

        A check and no reservation: what others spend meanwhile is gone, so ask right before the
        batch, and with a `margin`. Each account counts once, and so do `lookalikes`, undeclared
        keys whose answers are the same; where others spend between two answers about one account
        they differ, so declare accounts. A key that could not be checked counts as nothing. Stale
        balances count, with `stale_if_error`; the error names them, and so does the report. They
        stand in for failures of the API, not where this client's own rate limit leaves no room in
        time: such a key is unknown. The report's `available_credits` is what was found.

        Args:
            credits: Credits that the batch needs.
            keys: As for `check`.
            margin: What `credits` is multiplied by: 1.2 wants a fifth more than the batch needs.
            detail: As for `check`.
            timeout: As for `check`.
            freshness: As for `check`; but for `stale_while_revalidate`, which is 0 unless it is
                said here: a gate waits.

        Raises:
            InsufficientCreditsError: Fewer are there: no key whose credits are unknown could change
                that.
            CreditsUnknownError: Fewer are known to be there, and keys that could not be checked
                decide. Both are a `CreditsRequirementError`.
            ConfigurationError: As for `check`; or `credits` or `margin` is no finite number of at
                least 0.
            ClientClosedError: The client was closed meanwhile.
        """
        freshness.setdefault("stale_while_revalidate", 0.0)
        needed, source = needed_credits(credits, margin), pool_of(keys)
        del keys, credits  # as in check
        how_old, deadline = self._said(freshness, timeout)
        detail = check_flag("detail", detail)
        report = await self._report(
            source, how_old._replace(own_limit=False), deadline, detail=detail
        )
        report.require(needed)
        return report

    @hides_arguments
    def invalidate(self, key: KeyLike | None = None) -> None:
        """Drop the answers kept of `key`, or of all keys: after a top-up, after a large batch, in tests.

        The next call for it asks the API. A request that is on the wire now still answers its own
        callers, and its answer is not kept.

        Raises:
            ConfigurationError: The key cannot be used.
        """
        key = None if key is None else as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._calls.invalidate(key)

    @hides_arguments
    def peek(
        self, key: KeyLike, *, detail: bool = False, max_age: Seconds | None = None
    ) -> Outcome | None:
        """What is known of `key` without asking: the last answer, however old, or the last failure; None when there is neither.

        No I/O is done, and nothing is refreshed. With a balance that is older than `max_age` it is
        `stale`; the failure since then, if any, stands beside it. To be called where the event loop
        runs, whose clock it reads.

        Raises:
            ConfigurationError: The key or `max_age` cannot be used, or no loop runs here.
        """
        key = as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._check_loop()
        return self._calls.last(
            ACCOUNT_CREDITS if detail else USER_CREDITS, key, self._freshness.given(max_age=max_age)
        )

    async def _fan_out(
        self,
        source: Iterator[ApiKey | UnusableKey] | AsyncGenerator[ApiKey | UnusableKey, None],
        ask: Ask,
        flow: Flow,
    ) -> AsyncGenerator[Outcome[Any], None]:
        self._check_usable()
        run = FanOut(ask, room=_STREAMED)
        flow.on_parked = run.on_parked
        self._fan_outs.add(run)
        try:
            async with aclosing(run.outcomes(source)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            self._fan_outs.discard(run)

    @overload
    def stream(
        self,
        keys: KeysLike | AsyncIterable[KeyLike],
        *,
        detail: Literal[False] = False,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> AsyncGenerator[Outcome[Balance], None]: ...
    @overload
    def stream(
        self,
        keys: KeysLike | AsyncIterable[KeyLike],
        *,
        detail: Literal[True],
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> AsyncGenerator[Outcome[Account], None]: ...
    @overload
    def stream(
        self,
        keys: KeysLike | AsyncIterable[KeyLike],
        *,
        detail: bool,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> AsyncGenerator[Outcome[Balance], None]: ...
    @hides_arguments
    def stream(
        self,
        keys: KeysLike | AsyncIterable[KeyLike],
        *,
        detail: bool = False,
        timeout: Seconds | None = None,
        **freshness: Unpack[CacheOptions],
    ) -> AsyncGenerator[Outcome[Any], None]:
        """Check keys and yield each outcome as it lands, in memory that does not grow with their number.

        `keys` is as for `check`, or an asynchronous iterable, which may have no end. Left early,
        the rest is given up: at once when the generator is closed (`contextlib.aclosing`).

        Args:
            keys: Where the keys come from. What it raises is raised here, after the outcomes of
                those it gave before.
            detail: As for `check`.
            timeout: Seconds, or a timedelta, for each key, from when it is taken from `keys`.
            freshness: `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age`, as
                for `balance`.

        Raises:
            ConfigurationError: This is no source of keys, or another argument cannot be used.
            ClientClosedError: The client was closed meanwhile.
        """
        source = (
            as_keys_async(*methods_of(keys)) if isinstance(keys, AsyncIterable) else pool_of(keys)
        )
        how_old, most = self._how_old(freshness), _timeout(timeout)
        path = ACCOUNT_CREDITS if check_flag("detail", detail) else USER_CREDITS
        seconds, flow = math.inf if most is None else most, Flow()
        return self._fan_out(
            source,
            partial(self._begin, path=path, freshness=how_old, flow=flow, seconds=seconds),
            flow,
        )

    @hides_arguments
    def quota(self, *, detail: bool = False, key: KeyLike | None = None) -> Quota:
        """What the rate limit still allows on `/user/credits`, or with `detail` on `/account/credits`, as this client counts.

        Also whether calls wait for a cooldown or a probe: for logs and health checks. With scope
        `"auto"` a call needs a token of two buckets: `quota()` is the one that all keys share, as
        if nothing were proven of them, `quota(key=…)` that of the key's own account. To be called
        where the event loop runs, whose clock it reads.

        Raises:
            ConfigurationError: No loop runs here; or each key or account has a quota of its own,
                and no `key` was named.
        """
        key = None if key is None else as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._check_loop()
        return self._dispatcher.quota(ACCOUNT_CREDITS if detail else USER_CREDITS, key)

    async def close(self) -> None:
        """End the calls under way with `ClientClosedError`, refreshes too, and close the session, unless it was given.

        May be called twice.
        """
        self._check_loop()
        self._closed = True
        for run in self._fan_outs:
            run.end(closed_error())
        try:
            await self._calls.close()
        finally:
            await self._dispatcher.transport.close()
            if self._store is not None:
                await self._store.close()

    async def __aenter__(self) -> Self:
        self._check_loop()
        self._check_usable()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- inside

    def _begin(
        self, key: Key, land: Land, *, path: str, freshness: CachePolicy, flow: Flow, seconds: float
    ) -> Callable[[], None]:
        self._check_usable()
        now = asyncio.get_running_loop().time()
        if isinstance(key, UnusableKey):
            land(Unknown(key=key, error=key.error))
            return nothing
        waiter = FanOutWaiter(self._calls, key, freshness, now, land)
        self._calls.begin(path, waiter, now + seconds, flow)
        return waiter.give_up

    async def _report(
        self,
        source: Iterator[ApiKey | UnusableKey],
        how_old: CachePolicy,
        deadline: float | None,
        *,
        detail: bool,
        on_outcome: Callable[[Outcome[Any]], object] | None = None,
    ) -> Report[Any]:
        self._check_usable()
        path = ACCOUNT_CREDITS if detail else USER_CREDITS
        pool = await read_pool(source)
        self._check_usable()
        run = PoolCheck(
            self._calls, path, pool, freshness=how_old, deadline=deadline, on_outcome=on_outcome
        )
        self._fan_outs.add(run)
        try:
            return Report(await run.outcomes())
        finally:
            self._fan_outs.discard(run)

    def _said(
        self, freshness: CacheOptions, timeout: Seconds | None
    ) -> tuple[CachePolicy, float | None]:
        """How old a call's answer may be, and when it has to be there."""
        return self._how_old(freshness), _deadline(_timeout(timeout))

    def _how_old(self, freshness: CacheOptions) -> CachePolicy:
        if not freshness:
            return self._freshness
        unknown = sorted(freshness.keys() - CacheOptions.__annotations__.keys())
        if unknown:
            # Who writes **{key: name} the wrong way round has a secret for the name of an argument.
            name = (
                f" {unknown[0]!r}"
                if unknown[0].isidentifier() and not is_likely_key(unknown[0])
                else ""
            )
            raise TypeError(
                f"unknown argument{name}; known are "
                f"{', '.join(CacheOptions.__annotations__)}, and those of the method"
            )
        return self._freshness.given(**freshness)

    def _check_usable(self) -> None:
        if self._closed:
            raise closed_error()
        if asyncio.get_running_loop() is not self._loop:
            self._check_loop()

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:
            raise ConfigurationError(
                "no event loop runs here; use the client from coroutines, or from what they call"
            )
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ConfigurationError(
                "this client was first used on another event loop; make one client for each "
                "loop, inside asyncio.run()"
            )


def _timeout(timeout: Seconds | None) -> float | None:
    return None if timeout is None else seconds("timeout", timeout, above=0)


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else asyncio.get_running_loop().time() + seconds


def _is_plain_function(function: object) -> bool:
    """Whether it can be called and does not give a coroutine, also where its class defines the call."""
    if not callable(function):
        return False
    call = function.func if isinstance(function, partial) else function
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return not any(kind(each) for kind in kinds for each in (call, type(call).__call__))
