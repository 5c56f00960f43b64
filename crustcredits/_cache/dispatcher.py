"""`Dispatcher`: sends the attempts that the schedulers grant, and retries the failed ones.

A call that waits has no task, token or timer of its own. One function starts all attempts. It runs
when a call enters, when a request ends, and from one timer, and asks the schedulers again. Errors
are values here: a pool has as many as it has bad keys, and an error that is never raised needs no
traceback. The module must not know the waiters, their deadlines or the cache.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, cast

from crustcredits._cache.circuit_breaker import CircuitBreaker, Sent
from crustcredits._errors import (
    BucketsUnavailableError,
    ConfigurationError,
    CrustCreditsError,
    GatewayError,
    renamed,
)
from crustcredits._http.protocol import (
    ACCOUNT_CREDITS,
    USER_CREDITS,
    Response,
    is_apis_own,
    is_json_object,
    read_response,
)
from crustcredits._http.retry import Retry, asked_wait, retry_delay
from crustcredits._http.transport import Failure, Fate, Transport
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance
from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.fair_queue import Call, Flow, Kind, PoolFlow
from crustcredits._ratelimit.leased_tokens import LeasedTokens, TokenStore
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import Bucket, TokenBucket, local_bucket

if TYPE_CHECKING:
    from crustcredits._ratelimit.config import RateLimit
    from crustcredits._ratelimit.quota import Quota

_log = logging.getLogger("crustcredits")

# Granted calls that one iteration of the loop handles without sending them.
_SLICE = 1_000
# Seconds for which a call waits while a gateway has answered for long, so that an endless source is
# not drained at full speed.
_REFUSED_AFTER = 1.0


class ApiCall(Call, ABC):
    """One call on its way to an answer. Times are in seconds of the running loop's clock.

    Attributes:
        path: The endpoint.
        api_key: The key that is asked about.
        wanted: Whether a waiter awaits the answer. Otherwise the call is a background refresh, and
            is not retried.
        attempts: Requests put on the wire for the call, including the current one.
        last: The error of the attempt before, or None.
        failing_since: When the first attempt failed, or None.
        task: The task of the request on the wire, or None.
        request: The scheduler's record of the request.
        probe: The circuit breaker's record of the request, if it is a probe.
        entered: When the call began.
        resumes: When the call enters the queue again, while it waits for a retry or for a probe;
            None otherwise.
    """

    __slots__ = (
        "api_key",
        "attempts",
        "barred_since",
        "context",
        "entered",
        "failing_since",
        "is_parked",
        "last",
        "path",
        "probe",
        "request",
        "resumes",
        "task",
        "ticket",
        "wanted",
    )

    request: Attempt
    probe: Sent | None

    def __init__(
        self,
        place: tuple[str, bytes],
        key: ApiKey,
        account: Hashable,
        flow: Flow,
        context: contextvars.Context,
    ) -> None:
        self.path, digest = place
        super().__init__(digest, account, flow)
        self.api_key = key
        self.wanted = flow.kind is not Kind.BACKGROUND
        self.attempts = 0
        self.last: CrustCreditsError | None = None
        self.failing_since: float | None = None
        self.task: _AttemptTask | None = None
        self.entered = 0.0
        self.resumes: float | None = None
        self.barred_since: float | None = None
        self.context = context
        self.is_parked = False  # whether the call waits for a retry
        self.ticket = 0  # of its entry among the calls that resume later

    @abstractmethod
    def patience(self, now: float) -> float:
        """Seconds until the latest deadline of a waiter."""

    @abstractmethod
    def can_fall_back(self) -> bool:
        """Whether every waiter has a stale answer that may stand in."""

    @abstractmethod
    def on_late(self) -> None:
        """Called when no waiter has time left for an answer."""

    @abstractmethod
    def on_wait(self) -> None:
        """Called when the call has begun to wait for something other than its turn."""

    @abstractmethod
    def on_end(self, result: Balance | CrustCreditsError) -> None:
        """Called with the result when the call has ended."""

    @abstractmethod
    def on_broken_off(self, error: BaseException | None) -> None:
        """Called when the request was cancelled from outside or failed unexpectedly."""


class _AttemptTask(asyncio.Task[None]):
    """The task of one request.

    A task that is cancelled before its first step runs nothing of its coroutine, so the task itself
    reports its cancellation.
    """

    on_cancelled: Callable[[asyncio.Task[None]], object]

    def cancel(self, msg: object = None) -> bool:
        self.add_done_callback(self.on_cancelled)
        return super().cancel(msg)


class Dispatcher:
    """Asks the API about keys, within one rate limit, over both endpoints.

    The class is long because a turn, a retry, a probe and a token all lead to the one function that
    starts calls.

    Attributes:
        transport: Sends the requests.
        singles: The flow of all single calls.
        refreshes: The flow of background calls, which have no waiter.
        counts_accounts: Whether the keys of a declared account share its tokens.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        rate_limit: RateLimit,
        store: TokenStore | None,
        concurrency: int,
        request_timeout: float,
        retry: Retry,
    ) -> None:
        self.transport = transport
        self.singles, self.refreshes = Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
        self._scope = rate_limit.scope
        self.counts_accounts = rate_limit.scope != "key"
        self._period = rate_limit.period
        self._request_timeout = request_timeout
        self._retry = retry
        self._store = store
        terms = SchedulerTerms(
            requests=rate_limit.requests,
            period=rate_limit.period * (1 + rate_limit.margin),
            window=rate_limit.period * (1 - rate_limit.margin),
            late=request_timeout,
            scope="account" if rate_limit.scope == "key" else rate_limit.scope,
            reserve=rate_limit.reserve,
            adopts=rate_limit.adopt_server_limit,
        )
        if store is not None:
            store.open(period=terms.period, late=request_timeout, pace=rate_limit.pace)
        self._breakers = {path: CircuitBreaker(path) for path in (USER_CREDITS, ACCOUNT_CREDITS)}
        pace, slots = (
            Pace(rate_limit.pace, rate_limit.requests / rate_limit.period),
            ConnectionSlots[Attempt](concurrency),
        )
        self._schedulers = {
            path: Scheduler(
                terms,
                pace=pace,
                slots=slots,
                make_bucket=local_bucket
                if store is None
                else partial(self._make_bucket, path, store),
                is_barred=partial(self._is_barred, path),
            )
            for path in self._breakers
        }
        # Calls that wait for the end of a probe, by endpoint.
        self._barred: dict[str, dict[ApiCall, None]] = {path: {} for path in self._breakers}
        self._later: list[tuple[float, int, ApiCall]] = []  # heap of calls that resume later
        self._tickets = itertools.count(1)
        self._timer: asyncio.Handle | None = None
        self._due: float | None = None  # time of the timer; uvloop's handles do not expose it
        self._admitting = self._stopped = False
        self._pauses = False  # until the timer runs, which is due

    # --- calls

    def enter(self, call: ApiCall) -> None:
        """Begin a call."""
        call.entered = now = _now()
        # If other calls are held back, the same cause holds back this one too.
        is_behind = self._schedulers[call.path].holds_back
        self._ask(call, now)
        if not is_behind:
            self._admit(now)

    def enter_pool(self, path: str, pool: PoolFlow) -> None:
        """Begin the calls of a collection of known size, each at its turn."""
        self._schedulers[path].put_pool(pool)
        self._admit()

    def leave_pool(self, path: str, pool: PoolFlow) -> None:
        """Give up the calls of a pool that have not begun."""
        self._schedulers[path].remove_pool(pool)

    def leave(self, call: ApiCall) -> None:
        """Give up a call before its request is on the wire."""
        makes_room = self._schedulers[call.path].remove(call, _now())
        self._barred[call.path].pop(call, None)
        call.ticket, call.resumes = 0, None
        self._park(call, -1)
        if makes_room:
            self._admit()

    def move(self, call: ApiCall, flow: Flow) -> None:
        """Move a call to the flow of a waiter with a higher priority."""
        call.wanted = True
        is_parked = call.is_parked
        self._park(call, -1)
        self._schedulers[call.path].move(call, flow, _now())
        if is_parked:
            self._park(call, 1)
        self._admit()

    def account_of(self, key: ApiKey) -> Hashable:
        """The account of a key: the declared one, else the key's digest."""
        account = key.account if self.counts_accounts else None
        return key.digest if account is None else account

    def stop(self) -> None:
        """Start no more attempts."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    # --- estimates and state

    def earliest(self, call: ApiCall, now: float) -> float:
        """The time before which certainly no request for this call starts."""
        if call.task is not None:
            return now
        if call in self._barred[call.path]:  # an answer on its way may close the circuit breaker
            return now
        if call.resumes is not None:
            return max(now, call.resumes)
        return self._schedulers[call.path].earliest(call.account, now)

    def earliest_of(self, path: str, key: ApiKey, now: float) -> float:
        """The same time for a call that has not begun."""
        return self._schedulers[path].earliest(self.account_of(key), now)

    def hopeless(self, path: str, keys: Sequence[ApiKey], deadline: float, now: float) -> list[int]:
        """Numbers of the keys for which certainly no request starts before the deadline.

        Their calls have not begun.
        """
        return self._schedulers[path].hopeless(map(self.account_of, keys), deadline, now)

    def quota(self, path: str, key: ApiKey | None) -> Quota:
        """The part of the rate limit that is left on `path`.

        Raises:
            ConfigurationError: Each key or account has a bucket of its own and no key was named.
        """
        if key is None and self._scope in {"account", "key"}:
            raise ConfigurationError(
                f"quota() needs a key: with scope {self._scope!r} each key or account has a "
                "quota of its own; name the key: quota(key=…)"
            )
        account = None if key is None or self._scope == "client" else self.account_of(key)
        return self._schedulers[path].quota(account, _now())

    def refusal(self, path: str) -> GatewayError | None:
        """The circuit breaker's error for requests on `path` now, or None."""
        return self._breakers[path].refusal(_now())

    # --- the circuit breaker

    def _is_barred(self, path: str, call: Call, now: float) -> bool:
        breaker = self._breakers[path]
        return breaker.is_open and breaker.refusal(now, call.key) is not None

    def _ask(self, call: ApiCall, now: float) -> None:
        """Put a call into the queue, unless the circuit breaker refuses it."""
        call.ticket, call.resumes = 0, None
        breaker = self._breakers[call.path]
        refusal = breaker.refusal(now, call.key) if breaker.is_open else None
        if refusal is None:
            call.barred_since = None
            if not call.attempts:
                call.last = None
            self._schedulers[call.path].put(call)
        else:
            self._bar(call, refusal, now)

    def _bar(self, call: ApiCall, refusal: GatewayError, now: float) -> None:
        """Let a call wait while the circuit breaker is open, or end it.

        The call ends with its own last error, if it has one. It waits for a probe on the wire, and
        in the first seconds also for the next probe: for as many probes as a call has attempts.
        """
        breaker = self._breakers[call.path]
        error = (
            call.last
            if call.last is not None and call.attempts
            else renamed(refusal, call.api_key.label)
        )
        if not call.wanted or call.can_fall_back():
            call.on_end(error)
            return
        if call.barred_since is None:
            call.barred_since = now
        until: float | None = None
        if not breaker.is_probing:
            until = breaker.next_probe(call.key)
            if breaker.failed_probes >= self._retry.attempts:
                until = min(until, call.barred_since + _REFUSED_AFTER)
                if now >= until:
                    call.on_end(error)
                    return
        call.last = error
        self._barred[call.path][call] = None
        if until is None:
            call.on_wait()
        else:
            self._resume_at(call, until)

    def _on_probed(self, path: str, now: float) -> None:
        """Ask again for the calls that wait for a probe.

        A probe has ended, or the API has answered an older request.
        """
        waiting, self._barred[path] = self._barred[path], {}
        for call in waiting:
            self._ask(call, now)

    # --- calls that resume later

    def _resume_at(self, call: ApiCall, when: float) -> None:
        call.resumes, call.ticket = when, next(self._tickets)
        heapq.heappush(self._later, (when, call.ticket, call))
        call.on_wait()

    def _park(self, call: ApiCall, step: int) -> None:
        """Record that a call begins (1) or ends (-1) its wait for a retry, and notify its flow."""
        if call.is_parked == (step > 0):
            return
        call.is_parked = step > 0
        if call.flow.on_parked is not None:
            call.flow.on_parked(step)

    def _resume(self, now: float) -> None:
        while self._later:
            when, ticket, call = self._later[0]
            waits = ticket == call.ticket  # False if it was given up, or has resumed before
            if waits and when > now:
                return
            heapq.heappop(self._later)
            if waits:
                self._barred[call.path].pop(call, None)
                self._park(call, -1)
                self._ask(call, now)

    # --- starting

    def _admit(self, now: float | None = None) -> None:
        """Send every attempt that may start now, and set the timer for the next one."""
        if self._admitting or self._stopped or self._pauses:
            return
        self._admitting = True
        try:
            now = _now() if now is None else now
            while True:
                if self._later:
                    self._resume(now)
                moment, is_more = self._start_all(now)
                if not is_more:
                    break
            # The rest in the next iteration of the loop, so that other tasks run meanwhile.
            self._pauses = moment <= now
            if self._later:
                moment = min(moment, self._later[0][0])
            if moment < math.inf or self._timer is not None:
                self._set_timer(moment, now)
        finally:
            self._admitting = False

    def _start_all(self, now: float) -> tuple[float, bool]:
        """Start every attempt that may start now.

        Returns the time of the next possible start, and whether calls were handled without sending
        that may have to resume.
        """
        moment, is_more, not_sent = math.inf, False, 0
        busy = [*self._schedulers.values()]
        while busy and not_sent < _SLICE:
            for scheduler in tuple(busy):  # in turns
                granted = scheduler.grant(now)
                if isinstance(granted, Attempt):
                    self._send(granted, now)
                    continue
                if isinstance(granted, Call):
                    self._not_sent(cast("ApiCall", granted), now)
                    is_more, not_sent = True, not_sent + 1
                    continue
                busy.remove(scheduler)
                if granted is not None:
                    moment = min(moment, granted)
        return (now, False) if busy else (moment, is_more)

    def _not_sent(self, call: ApiCall, now: float) -> None:
        """Handle a granted call that is not sent: too late, or the circuit breaker is open."""
        if self._is_barred(call.path, call, now):
            self._ask(call, now)
        else:
            call.on_late()

    def _set_timer(self, moment: float, now: float) -> None:
        if self._due is not None and self._due <= moment < math.inf:
            return  # it runs a little early, and is set again then
        if self._timer is not None:
            self._timer.cancel()
            self._timer = self._due = None
        if moment < math.inf:
            self._due = max(moment, now)
            self._timer = asyncio.get_running_loop().call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._due = None
        self._pauses = False
        self._admit()

    def _send(self, request: Attempt, now: float) -> None:
        call: ApiCall = request.call  # type: ignore[assignment]  # as are all calls here
        call.request, breaker = request, self._breakers[call.path]
        call.probe = breaker.start(now, call.key) if breaker.is_open else None
        call.attempts += 1
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "%s: request sent %.3f s after its call", call.api_key.label, now - call.entered
            )
        # Not made by the loop's task factory, which might run the first step at once.
        call.task = _AttemptTask(
            self._attempt(call), loop=asyncio.get_running_loop(), context=call.context
        )
        call.task.on_cancelled = partial(self._on_cancelled, call)

    async def _attempt(self, call: ApiCall) -> None:
        try:
            got = await self.transport.attempt(call.path, call.api_key, self._request_timeout)
            now = _now()
            result, answer = self._read(call, got, now)
            self._ended(call, answer, now)
            if isinstance(result, Balance):
                call.on_end(result)
            else:
                self._go_on(call, result, now)
            self._admit(now)
        except asyncio.CancelledError:
            self._break_off(call, None)
            raise
        except Exception as error:  # noqa: BLE001  # an unexpected failure
            self._break_off(call, error)

    # --- ending

    def _on_cancelled(self, call: ApiCall, task: asyncio.Task[None]) -> None:
        """Handle the cancellation of a request, perhaps before its first step."""
        if call.task is task and task.cancelled():
            self._break_off(call, None)

    def _break_off(self, call: ApiCall, error: Exception | None) -> None:
        """End the call of a request that was cancelled from outside or failed unexpectedly."""
        if call.task is not None:
            self._ended(call, AttemptResult(status=None), _now())
        call.on_broken_off(error)
        self._admit()

    def _ended(self, call: ApiCall, answer: AttemptResult, now: float) -> None:
        path, probe, scheduler = call.path, call.probe, self._schedulers[call.path]
        call.task = None
        if probe is not None:
            self._breakers[path].end(probe, now)
        scheduler.ended(call.request, answer, now)
        if scheduler.is_barring or probe is not None:
            scheduler.is_barring = self._breakers[path].is_open
            if probe is not None or (self._barred[path] and not scheduler.is_barring):
                self._on_probed(path, now)

    def _read(
        self, call: ApiCall, got: Response | Failure, now: float
    ) -> tuple[Balance | CrustCreditsError, AttemptResult]:
        """The result of a request, for the waiters and for the scheduler.

        The circuit breaker records the answer.
        """
        if isinstance(got, Failure):
            # If only the headers arrived, the server has counted the request, and has neither
            # served nor refused it.
            status = 500 if got.fate is Fate.ANSWERED else None
            return got.error, AttemptResult(status=status, unsent=got.fate is Fate.UNSENT)
        result = read_response(
            call.path, call.api_key, got, now=datetime.now(UTC), period=self._period
        )
        breaker, said = self._breakers[call.path], result.rate_limit
        limit, remaining = (None, None) if said is None else (said.limit, said.remaining)
        if isinstance(result, Balance):
            breaker.api_answered(call.key)
            return result, AttemptResult(status=got.status, limit=limit, remaining=remaining)
        own = is_apis_own(got)
        if isinstance(result, GatewayError):
            sent = call.probe or Sent(call.request.started, call.key, is_probe=False)
            breaker.gateway_answered(sent, result, now)
            self._schedulers[call.path].is_barring = breaker.is_open
        elif own:
            breaker.api_answered(call.key)
        is_html = not own and not is_json_object(got)
        wait = asked_wait(result)
        return result, AttemptResult(
            status=got.status, is_html=is_html, limit=limit, remaining=remaining, wait=wait
        )

    def _go_on(self, call: ApiCall, result: CrustCreditsError, now: float) -> None:
        """End a call, or retry it later. A call without a waiter is not retried."""
        if not call.wanted:
            call.on_end(result)
            return
        if call.failing_since is None:
            call.failing_since = now
        elapsed, patience = now - call.failing_since, call.patience(now)
        delay = retry_delay(
            self._retry,
            result,
            call.attempts,
            spared=call.spared,
            elapsed=elapsed,
            patience=patience,
        )
        if delay is None:
            call.on_end(result)
            return
        counted = f"attempt {call.attempts} of {self._retry.attempts}"
        if call.spared:
            counted = f"request {call.attempts}, {call.spared} of them not counted as attempts"
        _log.info("%s; this was %s; next attempt in %.2f s", result, counted, delay)
        call.last = result
        self._park(call, 1)
        self._resume_at(call, now + delay)

    # --- tokens

    def _make_bucket(
        self,
        path: str,
        store: TokenStore,
        whose: Hashable | None,
        limit: int,
        wake: Callable[[Hashable | None], None],
    ) -> Bucket:
        if whose is not None and self._scope == "client":
            return TokenBucket(limit)

        def came() -> None:
            wake(whose)
            self._admit()

        tokens = store.tokens(path, cast("str | bytes | None", whose), limit)
        return LeasedTokens(tokens, came, partial(self._on_outage, path, whose))

    def _on_outage(self, path: str, whose: Hashable | None) -> None:
        """End the calls that wait for a token of this bucket: no token can be had."""
        said = "not sent: the count that processes share is out of reach; see the log for the cause"
        for call in self._schedulers[path].give_up(whose, _now()):
            call = cast("ApiCall", call)
            call.on_end(BucketsUnavailableError(said, key_name=call.api_key.label))


def _now() -> float:
    return asyncio.get_running_loop().time()
