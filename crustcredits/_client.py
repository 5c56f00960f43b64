"""`CreditsClient`: one key or many, deadlines, and what closing does to calls under way.

How one key is asked is `_asker`'s, how many are asked at a time `_fanout`'s; nothing here knows of requests.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator
from contextlib import aclosing
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from crustcredits._asker import Asker
from crustcredits._checks import check_number, check_whole
from crustcredits._errors import ClientClosedError, ConfigurationError, CrustCreditsError
from crustcredits._fanout import Ask, FanOut
from crustcredits._keys import ApiKey, KeyLike, KeysLike, RefusedKey, as_key, as_keys, as_keys_async, refuse_contradictions
from crustcredits._limits import RateLimit
from crustcredits._models import Account, Balance, Outcome, outcome_for
from crustcredits._quota import Quota
from crustcredits._report import Report
from crustcredits._retry import Retry
from crustcredits._slots import HANGING_SHARE
from crustcredits._transport import Transport, session_problem
from crustcredits._wire import ACCOUNT_CREDITS, USER_CREDITS, parse_base_url, proxy_problem

if TYPE_CHECKING:
    import aiohttp

_RATE_LIMIT = RateLimit()
_RETRY = Retry()


class CreditsClient:
    """Asks the Crustdata API how many credits API keys have left, within its rate limit, over one HTTP session.

    Args:
        base_url: `https://host[:port]` of the API; by default the variable `CRUSTDATA_API_URL`, else the API's own.
        rate_limit: The limit to keep.
        concurrency: Requests on the wire at once. One that hangs, without an answer for 0.4 s or four times the usual,
            stops counting, so that hanging keys hold up no others; at most eight times as many may hang.
        request_timeout: Seconds from the start of one request to the last byte of its answer. Waiting for the rate limit
            or for a free place on the wire is not counted.
        retry: How failures that may pass are tried again.
        session: An aiohttp session to use, for its connector, proxy and traces; it is never closed here. Its cookies,
            credentials and middlewares are left out of these requests. A wait for a place in its connector counts as time on
            the wire. By default the client opens and closes its own.
        proxy: URL of an HTTP proxy.

    Making one needs no running loop and does no I/O. It belongs to the loop it is first used on. Use it with `async with`,
    or call `close()`.

    Raises:
        ConfigurationError: An argument cannot be used.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        rate_limit: RateLimit = _RATE_LIMIT,
        concurrency: int = 32,
        request_timeout: float = 10.0,
        retry: Retry = _RETRY,
        session: aiohttp.ClientSession | None = None,
        proxy: str | None = None,
    ) -> None:
        origin = proxy_problem(proxy) or session_problem(session) or parse_base_url(base_url)
        if isinstance(origin, ConfigurationError):
            del base_url, proxy  # They may hold credentials, and tracebacks are printed with local variables.
            raise origin
        transport = Transport(origin, session=session, proxy=proxy)
        del base_url, proxy
        check_whole("concurrency", concurrency, minimum=1)
        check_number("request_timeout", request_timeout, above=0)
        _check_kind("rate_limit", rate_limit, RateLimit)
        _check_kind("retry", retry, Retry)
        self._asker = Asker(transport, rate_limit=rate_limit, concurrency=concurrency, request_timeout=request_timeout, retry=retry)
        self._room = concurrency * (1 + HANGING_SHARE)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._calls: set[asyncio.Task[Any]] = set()
        self._no_calls = asyncio.Event()
        self._fan_outs: set[FanOut] = set()

    async def balance(self, key: KeyLike, *, timeout: float | None = None) -> Balance:
        """The credits that `key` has left, from `GET /user/credits`.

        `timeout` is in seconds, for the whole call: waiting and retries included.

        Raises:
            CrustCreditsError: The class says what went wrong; the tree stands in the README.
        """
        key = as_key(key)
        result, _ = await self._ask(USER_CREDITS, self._deadline(timeout), key)
        if isinstance(result, Balance):
            return result
        raise result

    async def account(self, key: KeyLike, *, timeout: float | None = None) -> Account:
        """The account behind `key`, with its grant, wallets and top-ups, from `GET /account/credits`.

        `timeout` and what it raises are as for `balance`. The two endpoints have a rate limit each.
        """
        key = as_key(key)
        result, _ = await self._ask(ACCOUNT_CREDITS, self._deadline(timeout), key)
        if isinstance(result, Account):
            return result
        assert isinstance(result, CrustCreditsError)
        raise result

    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: Literal[False] = False,
        timeout: float | None = None,
        on_outcome: Callable[[Outcome[Balance]], object] | None = None,
    ) -> Report[Balance]: ...
    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: Literal[True],
        timeout: float | None = None,
        on_outcome: Callable[[Outcome[Account]], object] | None = None,
    ) -> Report[Account]: ...
    @overload
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: bool,
        timeout: float | None = None,
        on_outcome: Callable[[Outcome[Balance]], object] | None = None,
    ) -> Report[Balance]: ...
    async def check(
        self,
        keys: KeysLike,
        *,
        detail: bool = False,
        timeout: float | None = None,
        on_outcome: Callable[[Outcome[Any]], object] | None = None,
    ) -> Report[Any]:
        """Check every key of a pool; one bad key never sinks the rest.

        Returns a report with one outcome for each key, in the order given. A secret that stands there twice is asked once.

        Args:
            keys: An iterable of secrets and `ApiKey`s, or a mapping of name to either.
            detail: Ask `/account/credits`, so that each balance is an `Account`.
            timeout: Seconds for all of it. A key whose answer has not come by then has `RateLimitWaitError` or
                `APITimeoutError` for its error, or its last failure; what has come is kept.
            on_outcome: A plain function, called with each outcome as it lands.

        Raises:
            ConfigurationError: This is no pool, or two different keys have one name, or one secret two accounts. A key that
                cannot be used does not raise: its outcome says so.
            ClientClosedError: The client was closed meanwhile.
        """
        source = as_keys(keys)
        del keys  # No frame of ours holds a secret when something is raised.
        if isinstance(source, ConfigurationError):
            raise source
        if on_outcome is not None and (inspect.iscoroutinefunction(on_outcome) or not callable(on_outcome)):
            raise ConfigurationError(
                "on_outcome is a plain function, not a coroutine function; use stream() to await between outcomes"
            )
        self._check_open()
        pool = list(source)
        refuse_contradictions(pool)
        ask = partial(self._ask_for_outcome, ACCOUNT_CREDITS if detail else USER_CREDITS, self._deadline(timeout))
        return Report(await self._gather(pool, ask, on_outcome))

    async def _gather(
        self, pool: list[ApiKey], ask: Ask, on_outcome: Callable[[Outcome[Any]], object] | None
    ) -> list[Outcome[Any]]:
        places: dict[bytes, list[int]] = {}
        for place, key in enumerate(pool):
            places.setdefault(key.digest, []).append(place)
        outcomes: dict[int, Outcome[Any]] = {}
        first_of_each = iter([pool[same[0]] for same in places.values()])
        async with aclosing(self._fan_out(first_of_each, ask)) as landed:
            async for outcome in landed:
                for place in places[outcome.key.digest]:
                    outcomes[place] = outcome_for(pool[place], outcome)
                    if on_outcome is not None:
                        on_outcome(outcomes[place])
        return [outcomes[place] for place in range(len(pool))]

    async def _fan_out(
        self, source: Iterator[ApiKey] | AsyncGenerator[ApiKey, None], ask: Ask
    ) -> AsyncGenerator[Outcome[Any], None]:
        self._check_open()
        run = FanOut(ask, room=self._room)
        self._fan_outs.add(run)
        try:
            async with aclosing(run.outcomes(source)) as outcomes:
                async for outcome in outcomes:
                    yield outcome
        finally:
            self._fan_outs.discard(run)

    @overload
    def stream(
        self, keys: KeysLike | AsyncIterable[KeyLike], *, detail: Literal[False] = False, timeout: float | None = None
    ) -> AsyncGenerator[Outcome[Balance], None]: ...
    @overload
    def stream(
        self, keys: KeysLike | AsyncIterable[KeyLike], *, detail: Literal[True], timeout: float | None = None
    ) -> AsyncGenerator[Outcome[Account], None]: ...
    @overload
    def stream(
        self, keys: KeysLike | AsyncIterable[KeyLike], *, detail: bool, timeout: float | None = None
    ) -> AsyncGenerator[Outcome[Balance], None]: ...
    def stream(
        self, keys: KeysLike | AsyncIterable[KeyLike], *, detail: bool = False, timeout: float | None = None
    ) -> AsyncGenerator[Outcome[Any], None]:
        """Check keys and yield each outcome as it lands, in memory that does not grow with their number.

        `keys` is as for `check`, or an asynchronous iterable, which may have no end. Equal secrets under way at the same
        time are asked once. Left early, the rest is cancelled: at once when the generator is closed (`contextlib.aclosing`).

        Args:
            keys: Where the keys come from. What it raises is raised here, after the outcomes of those it gave before.
            detail: As for `check`.
            timeout: Seconds for each key, from when it is taken from `keys`.

        Raises:
            ConfigurationError: This is no source of keys.
            ClientClosedError: The client was closed meanwhile.
        """
        source: Iterator[ApiKey] | AsyncGenerator[ApiKey, None] | ConfigurationError
        source = as_keys_async(keys) if isinstance(keys, AsyncIterable) else as_keys(keys)
        del keys  # No frame of ours holds a secret when something is raised.
        if isinstance(source, ConfigurationError):
            raise source
        if timeout is not None:
            check_number("timeout", timeout, above=0)

        def ask(key: ApiKey) -> Any:
            return self._ask_for_outcome(ACCOUNT_CREDITS if detail else USER_CREDITS, self._deadline(timeout), key)

        return self._fan_out(source, ask)

    def quota(self, *, detail: bool = False, key: KeyLike | None = None) -> Quota:
        """What the rate limit still allows on `/user/credits`, or with `detail` on `/account/credits`, as this client counts.

        To be called where the event loop runs, whose clock it reads.

        Raises:
            ConfigurationError: No loop runs here; or each key or account has a quota of its own, and no `key` was named.
        """
        key = None if key is None else as_key(key)
        if isinstance(key, RefusedKey):
            raise key.error
        self._check_loop()
        return self._asker.quota(ACCOUNT_CREDITS if detail else USER_CREDITS, key)

    async def close(self) -> None:
        """End the calls under way with `ClientClosedError` and close the session, unless it was given. May be called twice."""
        self._check_loop()
        if not self._closed:
            self._closed = True
            for task in self._calls:
                task.cancel()
            for run in self._fan_outs:
                run.end(_closed_error())
        try:
            if self._calls:
                await self._no_calls.wait()
        finally:
            await self._asker.transport.close()

    async def __aenter__(self) -> Self:
        self._check_loop()
        self._check_open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # --- one key

    async def _ask_for_outcome(self, path: str, deadline: float | None, key: ApiKey) -> Outcome[Any]:
        result, attempts = await self._ask(path, deadline, key)
        if isinstance(result, Balance):
            return Outcome(key=key, balance=result, checked_at=result.checked_at, attempts=attempts)
        return Outcome(key=key, error=result, checked_at=datetime.now(UTC), attempts=attempts)

    async def _ask(self, path: str, deadline: float | None, key: ApiKey) -> tuple[Balance | CrustCreditsError, int]:
        """The balance or the error, and how many requests it took. Raises only when the client is closed, or on a wrong loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop or self._closed:
            self._check_loop()
            self._check_open()
        task = asyncio.current_task(loop)
        assert task is not None, "a coroutine of asyncio runs in a task"
        cancelling = task.cancelling()
        self._calls.add(task)
        try:
            answer = await self._asker.ask(path, deadline, key)
        except asyncio.CancelledError:
            # As with asyncio.timeout: once closed it is close()'s, unless somebody else has asked for one too.
            if not self._closed or task.cancelling() - 1 > cancelling:
                raise
            answer = None
        finally:
            self._calls.discard(task)
            if self._closed:
                self._settle(task)
        if answer is None:
            raise _closed_error()
        result, attempts = answer
        if isinstance(result, CrustCreditsError):
            result.attempts = attempts
            if isinstance(result, ClientClosedError):
                raise result
        return answer

    def _settle(self, task: asyncio.Task[Any]) -> None:
        """After the client was closed: take close()'s cancellation back, and say when the last call has ended."""
        task.uncancel()
        if not self._calls:
            self._no_calls.set()

    # --- time and state

    def _deadline(self, timeout: float | None) -> float | None:
        if timeout is None:
            return None
        check_number("timeout", timeout, above=0)
        return _now() + timeout

    def _check_loop(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        if loop is None:
            raise ConfigurationError("no event loop runs here; use the client from coroutines, or from what they call")
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise ConfigurationError(
                "this client was first used on another event loop; make one client for each loop, inside asyncio.run()"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise _closed_error()


def _closed_error() -> ClientClosedError:
    return ClientClosedError("this client is closed; make a new one")


def _check_kind(what: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"{what} is a {kind.__name__}, not {type(value).__name__}")


def _now() -> float:
    return asyncio.get_running_loop().time()
