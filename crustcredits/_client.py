"""`CreditsClient`: calls for one key or many, deadlines, and closing.

`_cache.lookup` answers for one key, `_check` for a pool, and `_fan_out` decides how many keys of a
stream are asked about at a time.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import aclosing
from decimal import Decimal
from functools import partial
from ssl import SSLContext
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from crustcredits._amounts import needed_credits
from crustcredits._cache.dispatcher import Dispatcher
from crustcredits._cache.lookup import FanOutWaiter, Lookup
from crustcredits._cache.outcomes import closed_error
from crustcredits._cache.policy import NEW, CacheOptions, CachePolicy
from crustcredits._cache.single_flight import SingleFlight
from crustcredits._cache.store import BalanceCache
from crustcredits._cache.stream_turns import StreamTurns
from crustcredits._check import PoolCheck, read_pool
from crustcredits._errors import ConfigurationError
from crustcredits._fan_out import Ask, FanOut, Land, nothing
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS, proxy_problem
from crustcredits._http.environment import api_origin, proxy_from_env
from crustcredits._http.retry import Retry
from crustcredits._http.transport import (
    AiohttpTransport,
    ClientSession,
    session_problem,
    tls_problem,
)
from crustcredits._http.transport_types import Transport
from crustcredits._keys.api_key import ApiKey, Key, KeyLike, UnusableKey, as_key
from crustcredits._keys.checks import is_likely_key
from crustcredits._keys.key_pool import KeysLike, async_pool_of, pool_of
from crustcredits._models import Account, Balance, Outcome, Unknown
from crustcredits._ratelimit.config import RateLimit
from crustcredits._ratelimit.flow import Flow
from crustcredits._ratelimit.leased_tokens import Backend, check_backend
from crustcredits._ratelimit.quota import Quota
from crustcredits._report import Report
from crustcredits._validation import (
    Seconds,
    attempt,
    check_flag,
    check_kind,
    check_number,
    check_whole,
    hides_arguments,
    is_plain_function,
    kind_of,
    seconds,
)

# Most keys of a stream under way at a time. A pool enters the queue as a whole.
_STREAMED = 1_024

_RATE_LIMIT = RateLimit()
_RETRY = Retry()


def _transport_for(
    base_url: str | None,
    *,
    session: ClientSession | None,
    proxy: str | None,
    trust_env: object,
    tls: SSLContext | None,
    instead: Transport | None,
) -> Transport | ConfigurationError:
    """The transport, or the error for the arguments.

    The error is not raised, because the arguments may hold credentials.
    """
    origin = (
        proxy_problem(proxy) or session_problem(session) or tls_problem(tls) or api_origin(base_url)
    )
    if isinstance(origin, ConfigurationError):
        return origin
    if not isinstance(trust_env, bool):
        return ConfigurationError(f"trust_env must be True or False, not {kind_of(trust_env)}")
    if trust_env and proxy is None:
        proxy = proxy_from_env(origin)
        problem = proxy_problem(proxy, "the proxy of the environment (HTTPS_PROXY or ALL_PROXY)")
        if problem is not None:
            return problem
    if instead is not None:
        if not all(callable(getattr(instead, name, None)) for name in ("attempt", "close")):
            return ConfigurationError(
                "_transport cannot send requests: it must have the methods attempt and close"
            )
        return instead
    return AiohttpTransport(origin, session=session, proxy=proxy, tls=tls)


class CreditsClient:
    """Asks the Crustdata API how many credits API keys have left, within its rate limit.

    All requests share one HTTP session. The class is long because all that a user can ask is a
    method of it, with overloads, a full docstring and checks of its arguments.

    Args:
        base_url: `https://host[:port]` of the API; by default the variable `CRUSTDATA_API_URL`,
            else the API's own.
        rate_limit: The limit to keep.
        backend: Where tokens are counted: `crustcredits.redis.RedisBackend` for processes that
            share one quota; by default in each client.
        concurrency: Requests on the wire at once. A request without an answer for 0.4 s, or for
            four times the usual time, stops counting, so that hanging keys delay no others; at most
            eight times as many may hang.
        request_timeout: Seconds from the start of one request to the last byte of its answer.
            Waiting for the rate limit or for a connection slot is not counted.
        retry: How transient failures are retried.
        session: An aiohttp session to use, for its connector, proxy and traces; the client never
            closes it. Its cookies, `Host`, credentials and middlewares are left out of these
            requests, and cookies that the API sets are removed from its jar at once. A wait for a
            place in its connector counts as time on the wire. By default the client opens and
            closes its own.
        proxy: URL of an HTTP proxy.
        trust_env: Whether to use the proxy that the environment names (`HTTPS_PROXY`, `ALL_PROXY`,
            `NO_PROXY`) if `proxy` is not given. The variables are read now; `.netrc` never is.
        ssl: Certificates to trust, for a company's own authority:
            `ssl.create_default_context(cafile=…)`. By default the system's, or the file that the
            variable `SSL_CERT_FILE` named when aiohttp was imported; with a `session`, the
            certificates that its connector trusts. A certificate that cannot be verified is an
            `APIConnectionError`, which is not retried.
        max_age: Seconds, or a timedelta: a younger answer is fresh, and is returned again without a
            request. This and the next two are the defaults for calls that give no values of their
            own.
        stale_while_revalidate: Seconds, or a timedelta: an answer that exceeds `max_age` by less
            than this is returned at once, marked `stale`, and refreshed in the background.
            Refreshes give way to foreground calls, leave a tenth of the limit free, and are spread
            evenly. So when more is asked than the limit allows, answers get older, not slower.
        stale_if_error: Seconds, or a timedelta: while the API gives no answer (no connection,
            timeouts, a gateway, 5xx, 429, the rate limit), an answer that exceeds `max_age` by less
            than this is returned: `stale`, with the error beside it in its `Outcome`. For a minute
            after a failure it is returned at once, and refreshed in the background; also if the
            last calls for three other keys have failed. Errors about the key itself (401, 402, 403)
            are never hidden this way.
        max_error_age: Seconds, or a timedelta: a younger failure that cost a request is returned
            again without a request, so that a revoked key does not spend the rate limit. By default
            as long as `max_age`, and at least 1 s if any of the three above is more than 0. A call
            that gives its own `max_age` and no `max_error_age` uses that `max_age`.
        max_entries: Most cache entries, of all keys and both endpoints; the least recently used are
            evicted first. Make it larger than the pools that are checked again and again.
        _transport: Private, for tests: sends the requests in place of aiohttp.

    Callers that ask about one key on one endpoint at the same time share one call (single-flight),
    with any `max_age`: the age of an answer counts from its receipt, and a call under way may be
    joined. A caller that gives up ends the call for no other. When the last caller has given up, a
    call that still waits is dropped; a call on the wire is finished, and its answer cached.

    Making a client needs no running loop and does no I/O. A client belongs to the loop on which it
    is first used. Use it with `async with`, or call `close()`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    @hides_arguments
    def __init__(
        self,
        *,
        base_url: str | None = None,
        rate_limit: RateLimit = _RATE_LIMIT,
        backend: Backend | None = None,
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
        _transport: Transport | None = None,
    ) -> None:
        transport = _transport_for(
            base_url,
            session=session,
            proxy=proxy,
            trust_env=trust_env,
            tls=ssl,
            instead=_transport,
        )
        # They may hold credentials, and tracebacks are printed with local variables.
        del (
            base_url,
            proxy,
        )
        if isinstance(transport, ConfigurationError):
            raise transport
        check_whole("concurrency", concurrency, minimum=1)
        check_number("request_timeout", request_timeout, above=0, unit=" of seconds")
        check_whole("max_entries", max_entries, minimum=1)
        check_kind("rate_limit", rate_limit, RateLimit)
        check_kind("retry", retry, Retry)
        policy = NEW.given(
            max_age=max_age,
            stale_while_revalidate=stale_while_revalidate,
            stale_if_error=stale_if_error,
            max_error_age=max_error_age,
        )
        self._policy = NEW if policy == NEW else policy
        self._period = rate_limit.period
        self._backend = check_backend(backend)
        self._dispatcher = Dispatcher(
            transport,
            rate_limit=rate_limit,
            backend=self._backend,
            concurrency=concurrency,
            request_timeout=request_timeout,
            retry=retry,
            origin=getattr(transport, "origin", ""),
        )
        cache = BalanceCache(max_entries, retry, self._dispatcher.breaker_error)
        self._lookup = Lookup(SingleFlight(self._dispatcher, cache), cache)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._fan_outs: set[FanOut | PoolCheck] = set()

    async def balance(
        self, key: KeyLike, *, timeout: Seconds | None = None, **freshness: Unpack[CacheOptions]
    ) -> Balance:
        """The credits that `key` has left, from `GET /user/credits`.

        `timeout`, in seconds or a timedelta, covers the whole call, with waiting and retries.
        `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age` say how old the
        answer may be; each defaults to the client's setting. Even with 0 for all of them, the call
        may join one under way. A balance older than `max_age` is marked `stale`.

        Raises:
            CrustCreditsError: The class names the failure; the README has the tree of classes.
        """
        key = as_key(key)
        policy, deadline = self._policy, None
        if freshness or timeout is not None:
            # As `hides_arguments` does, which would also cost calls that have nothing to hide.
            terms = attempt(self._terms_of, freshness, timeout)
            del freshness, timeout
            if isinstance(terms, Exception):
                raise terms
            policy, deadline = terms
        self._check_usable()
        outcome: Outcome[Balance] | None = (
            None if policy is NEW else self._lookup.cached(USER_CREDITS, key, policy)
        )
        if outcome is None:
            outcome = await self._lookup.ask(USER_CREDITS, key, policy, deadline)
        return outcome.result()

    @hides_arguments
    async def account(
        self, key: KeyLike, *, timeout: Seconds | None = None, **freshness: Unpack[CacheOptions]
    ) -> Account:
        """The account behind `key`, with grant, wallets and top-ups, from `GET /account/credits`.

        The arguments and the errors are as for `balance`. Each of the two endpoints has its own
        rate limit.
        """
        key = as_key(key)
        policy, deadline = self._terms_of(freshness, timeout)
        self._check_usable()
        known: Outcome[Account] | None = self._lookup.cached(ACCOUNT_CREDITS, key, policy)
        return (known or await self._lookup.ask(ACCOUNT_CREDITS, key, policy, deadline)).result()

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
        """Check every key of a pool; one bad key never fails the others.

        Returns a report with one outcome for each key, in the order given. A secret given twice is
        asked about once.

        Args:
            keys: An iterable of secrets and `ApiKey`s, or a mapping of label to either.
            detail: Ask `/account/credits`, so that each balance is an `Account`.
            timeout: Seconds, or a timedelta, for the whole check. A key without an answer by then
                has `RateLimitWaitError`, `APITimeoutError` or its last failure as its error; the
                other outcomes stay.
            on_outcome: A plain function, called with each outcome as it lands.
            freshness: `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age`, as
                for `balance`.

        Raises:
            ConfigurationError: `keys` is no pool, two different keys have one name, or one secret
                has two accounts. A key that cannot be used does not raise: its outcome has the
                error.
            ClientClosedError: The client was closed meanwhile.
        """
        source = pool_of(keys)
        del keys  # The frame of a call under way may be printed too, in a log record.
        policy, deadline = self._terms_of(freshness, timeout)
        if on_outcome is not None and not is_plain_function(on_outcome):
            raise ConfigurationError(
                "on_outcome must be a plain function, not a coroutine function; use stream() to "
                "await between outcomes"
            )
        return await self._report(
            source, policy, deadline, detail=check_flag("detail", detail), on_outcome=on_outcome
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
        """Check a pool before a batch, and raise unless it has `credits`, as last answered.

        A check and no reservation: credits that others spend meanwhile are gone. So call it right
        before the batch, and with a `margin`. Each account counts once, and so do `lookalikes`,
        undeclared keys with equal answers. If others spend between two answers about one account,
        the answers differ, so declare accounts. A key that could not be checked adds nothing. Stale
        balances count, with `stale_if_error`; the error and the report name them. They replace
        answers that the API failed to give, not answers for which this client's own rate limit
        leaves no room in time: such a key is unknown. The report's `available_credits` is the sum
        that was found.

        Args:
            credits: Credits that the batch needs.
            keys: As for `check`.
            margin: Factor for `credits`: 1.2 asks for a fifth more than the batch needs.
            detail: As for `check`.
            timeout: As for `check`.
            freshness: As for `check`, except for `stale_while_revalidate`, which defaults to 0
                here: a gate waits.

        Raises:
            InsufficientCreditsError: Too few credits: no key with unknown credits could change
                that.
            CreditsUnknownError: Too few credits are known, and keys that could not be checked
                decide. Both are a `CreditsRequirementError`.
            ConfigurationError: As for `check`; or `credits` or `margin` is no finite number of at
                least 0.
            ClientClosedError: The client was closed meanwhile.
        """
        freshness.setdefault("stale_while_revalidate", 0.0)
        needed, source = needed_credits(credits, margin), pool_of(keys)
        del keys, credits  # as in check
        policy, deadline = self._terms_of(freshness, timeout)
        detail = check_flag("detail", detail)
        report = await self._report(
            source, policy._replace(own_limit=False), deadline, detail=detail
        )
        report.require(needed)
        return report

    @hides_arguments
    def invalidate(self, key: KeyLike | None = None) -> None:
        """Drop the cached answers of `key`, or of all: after a top-up, a large batch, in tests.

        The next call asks the API. A request on the wire still answers its own callers, and its
        answer is not cached.

        Raises:
            ConfigurationError: The key cannot be used.
        """
        key = None if key is None else as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._lookup.invalidate(key)

    @hides_arguments
    def peek(
        self, key: KeyLike, *, detail: bool = False, max_age: Seconds | None = None
    ) -> Outcome | None:
        """The last answer for `key`, of any age, without a request; else the last failure, or None.

        Does no I/O and refreshes nothing. A balance older than `max_age` is `stale`; the failure
        since then, if any, stands beside it. Call it where the event loop runs: the loop's clock is
        read.

        Raises:
            ConfigurationError: The key or `max_age` cannot be used, or no loop runs here.
        """
        key = as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._bind_loop()
        return self._lookup.last(
            ACCOUNT_CREDITS if detail else USER_CREDITS, key, self._policy.given(max_age=max_age)
        )

    async def _fan_out(
        self,
        source: Iterator[ApiKey | UnusableKey] | AsyncGenerator[ApiKey | UnusableKey, None],
        ask: Ask,
        flow: Flow,
        turns: StreamTurns | None,
    ) -> AsyncGenerator[Outcome[Any], None]:
        self._check_usable()
        run = FanOut(ask, room=_STREAMED, turns=turns)
        flow.on_parked = run.on_parked
        self._fan_outs.add(run)
        try:
            async with aclosing(run.outcomes(source)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            self._fan_outs.discard(run)
            if turns is not None:
                turns.end()

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
        """Check keys and yield each outcome as it lands, in bounded memory.

        Memory does not grow with the number of keys. `keys` is as for `check`, or an asynchronous
        iterable, which may have no end. If the stream is left early, the other keys are given up:
        at once when the generator is closed (`contextlib.aclosing`).

        Args:
            keys: The source of the keys. Its exception is raised here, after the outcomes of the
                keys that it gave before.
            detail: As for `check`.
            timeout: Seconds, or a timedelta, for each key, from the time at which it is asked
                about. Without a timeout up to 1,024 keys are taken ahead. With one the next key of
                `keys` is asked about when it is likely to have its turn in time. Keys after one
                that waits wait too. A key without a turn in time has `RateLimitWaitError`. The
                estimate does not know that the account of a key has no tokens, or that a key waits
                behind many single calls. After a key without a turn the next one waits 0.1 s, then
                twice as long, up to 1 s, until requests are sent again. So a source that ends is
                read to its end, and each such key costs at most a second. If no key is under way
                and none is likely, one is tried after the timeout and a period of the rate limit.
            freshness: `max_age`, `stale_while_revalidate`, `stale_if_error` and `max_error_age`, as
                for `balance`.

        Raises:
            ConfigurationError: `keys` is no source of keys, or another argument cannot be used.
            ClientClosedError: The client was closed meanwhile.
        """
        source = async_pool_of(keys) if isinstance(keys, AsyncIterable) else pool_of(keys)
        policy, most = self._policy_of(freshness), _timeout(timeout)
        path = ACCOUNT_CREDITS if check_flag("detail", detail) else USER_CREDITS
        seconds, flow = math.inf if most is None else most, Flow()
        return self._fan_out(
            source,
            partial(self._begin, path=path, policy=policy, flow=flow, seconds=seconds),
            flow,
            None
            if most is None
            else StreamTurns(self._lookup, path, policy, flow, timeout=most, period=self._period),
        )

    @hides_arguments
    def quota(self, *, detail: bool = False, key: KeyLike | None = None) -> Quota:
        """The rate limit left on `/user/credits`, or with `detail` on `/account/credits`.

        As this client counts. Also says whether calls wait for a cooldown or a probe: for logs and
        health checks. With scope `"auto"` a call needs a token of two buckets: `quota()` is the
        bucket that all keys share, as if nothing were proven of them, and `quota(key=…)` is the
        bucket of the key's own account. Call it where the event loop runs: the loop's clock is
        read.

        Raises:
            ConfigurationError: No loop runs here; or each key or account has a quota of its own,
                and no `key` was named.
        """
        key = None if key is None else as_key(key)
        if isinstance(key, UnusableKey):
            raise copy.copy(key.error)
        self._bind_loop()
        return self._dispatcher.quota(ACCOUNT_CREDITS if detail else USER_CREDITS, key)

    async def close(self) -> None:
        """End all calls and refreshes with `ClientClosedError`, and close the client's own session.

        A session that was given stays open. May be called twice.
        """
        self._bind_loop()
        self._closed = True
        for run in self._fan_outs:
            run.end(closed_error())
        try:
            await self._lookup.calls.close()
        finally:
            try:
                await self._dispatcher.transport.close()
            finally:
                if self._backend is not None:
                    await self._backend.close()

    async def __aenter__(self) -> Self:
        self._bind_loop()
        self._check_usable()
        if self._backend is not None:
            await self._start(self._backend)
        return self

    async def _start(self, backend: Backend) -> None:
        """Open the place of the count; close the client if it cannot count."""
        try:
            await backend.start()
        except BaseException:
            await self.close()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    # --- inside

    def _begin(
        self, key: Key, land: Land, *, path: str, policy: CachePolicy, flow: Flow, seconds: float
    ) -> Callable[[], None]:
        self._check_usable()
        now = asyncio.get_running_loop().time()
        if isinstance(key, UnusableKey):
            land(Unknown(key=key, error=key.error))
            return nothing
        waiter = FanOutWaiter(self._lookup, key, policy, now, land)
        self._lookup.begin(path, waiter, now + seconds, flow)
        return waiter.give_up

    async def _report(
        self,
        source: Iterator[ApiKey | UnusableKey],
        policy: CachePolicy,
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
            self._lookup, path, pool, policy=policy, deadline=deadline, on_outcome=on_outcome
        )
        self._fan_outs.add(run)
        try:
            return Report(await run.outcomes())
        finally:
            self._fan_outs.discard(run)

    def _terms_of(
        self, freshness: CacheOptions, timeout: Seconds | None
    ) -> tuple[CachePolicy, float | None]:
        """The cache policy and the deadline of a call."""
        return self._policy_of(freshness), _deadline(_timeout(timeout))

    def _policy_of(self, freshness: CacheOptions) -> CachePolicy:
        if not freshness:
            return self._policy
        unknown = sorted(freshness.keys() - CacheOptions.__annotations__.keys())
        if unknown:
            # With **{key: name} the wrong way round, a secret is the name of an argument.
            name = (
                f" {unknown[0]!r}"
                if unknown[0].isidentifier() and not is_likely_key(unknown[0])
                else ""
            )
            raise TypeError(
                f"unknown argument{name}; use {', '.join(CacheOptions.__annotations__)}, "
                "or an argument of the method"
            )
        return self._policy.given(**freshness)

    def _check_usable(self) -> None:
        if self._closed:
            raise closed_error()
        if asyncio.get_running_loop() is not self._loop:
            self._bind_loop()

    def _bind_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:
            raise ConfigurationError(
                "no event loop runs here; use the client from a coroutine, or from a function that "
                "a coroutine calls"
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
