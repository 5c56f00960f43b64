"""`Dispatcher`: sends the attempts that the schedulers grant, and retries the failed ones.

A call that waits has no task, token or timer of its own. One function starts all attempts. It runs
when a call enters, when a request ends, and from one timer, and asks the schedulers again. Errors
are values here: a pool has as many as it has bad keys, and an error that is never raised needs no
traceback. The module must not know the cache, nor more of waiters than `ApiCall` declares.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, cast

from crustcredits._cache.alarm import Alarm
from crustcredits._cache.api_call import ApiCall, AttemptTask, Resumptions, Stage
from crustcredits._cache.endpoint import Endpoint
from crustcredits._cache.sharing import Sharing
from crustcredits._errors import ConfigurationError, CrustCreditsError
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.retry import Retry, retry_delay
from crustcredits._http.transport_types import Transport
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance
from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.leased_tokens import Backend
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.pool_flow import PoolFlow
from crustcredits._ratelimit.terms import SchedulerTerms

if TYPE_CHECKING:
    from crustcredits._ratelimit.config import RateLimit
    from crustcredits._ratelimit.quota import Quota

_log = logging.getLogger("crustcredits")

# Calls that one iteration of the loop handles without sending them.
_SLICE = 1_000


class Dispatcher:
    """Asks the API about keys, within one rate limit, over both endpoints.

    Attributes:
        transport: Sends the requests.
        endpoints: The endpoints by their paths.
        sharing: The answers that are shared with other processes.
        singles: The flow of all single calls.
        refreshes: The flow of background calls, which have no waiter.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        rate_limit: RateLimit,
        backend: Backend | None,
        concurrency: int,
        request_timeout: float,
        retry: Retry,
        origin: str = "",
    ) -> None:
        self.transport = transport
        self.singles, self.refreshes = Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
        self._scope = rate_limit.scope
        self._request_timeout = request_timeout
        self._retry = retry
        terms = SchedulerTerms.of(rate_limit, late=request_timeout)
        if backend is not None:
            pace = rate_limit.pace
            backend.open(period=terms.period, late=request_timeout, pace=pace, scope=terms.scope)
        self.sharing = Sharing(getattr(backend, "answers", None), origin, self._resume)
        self._later = Resumptions()
        shared_pace = Pace(rate_limit.pace, rate_limit.requests / rate_limit.period)
        slots = ConnectionSlots[Attempt](concurrency)
        self.endpoints = {
            path: Endpoint(
                path,
                rate_limit=rate_limit,
                terms=terms,
                pace=shared_pace,
                slots=slots,
                later=self._later,
                backend=backend,
                on_tokens=self._start_due,
                shares=self.sharing.is_on,
                probes=retry.attempts,
            )
            for path in (USER_CREDITS, ACCOUNT_CREDITS)
        }
        self._turns = [*self.endpoints.values()]  # the endpoint that started last comes last
        self._alarm = Alarm(self._on_alarm)
        self._admitting = self._stopped = False
        self._is_deferred = False  # until the alarm rings, which is due

    # --- calls

    def enter(self, call: ApiCall) -> None:
        """Begin a call."""
        call.entered = now = _now()
        if call.stage is Stage.TO_LOOK_UP:
            self.sharing.look_up(call)
            return
        endpoint = self.endpoints[call.path]
        # If other calls are held back, the same cause holds back this one too.
        is_behind = endpoint.scheduler.holds_back
        endpoint.enqueue(call, now)
        if not is_behind:
            self._start_due(now)

    def enter_pool(self, path: str, pool: PoolFlow) -> None:
        """Begin the calls of a collection of known size, each at its turn."""
        self.endpoints[path].scheduler.put_pool(pool)
        self._start_due()

    def leave_pool(self, path: str, pool: PoolFlow) -> None:
        """Give up the calls of a pool that have not begun."""
        self.endpoints[path].scheduler.remove_pool(pool)

    def leave(self, call: ApiCall) -> None:
        """Give up a call before its request is on the wire."""
        if self.endpoints[call.path].leave(call, _now()):
            self._start_due()

    def move(self, call: ApiCall, flow: Flow) -> None:
        """Move a call to the flow of a waiter with a higher priority."""
        call.is_foreground = True
        is_parked = call.is_parked
        call.park(parks=False)
        self.endpoints[call.path].scheduler.move(call, flow, _now())
        call.park(parks=is_parked)
        self._start_due()

    def quota(self, path: str, key: ApiKey | None) -> Quota:
        """The part of the rate limit that is left on `path`.

        Raises:
            ConfigurationError: Each key or account has a bucket of its own and no key was named.
        """
        if key is None and self._scope in {"account", "key"}:
            raise ConfigurationError(
                f"quota() needs a key, because with scope {self._scope!r} each key or account has "
                "a quota of its own; name the key: quota(key=…)"
            )
        endpoint = self.endpoints[path]
        account = None if key is None or self._scope == "client" else endpoint.account_of(key)
        return endpoint.scheduler.quota(account, _now())

    def breaker_error(self, path: str) -> CrustCreditsError | None:
        """The circuit breaker's error for requests on `path` now, or None."""
        return self.endpoints[path].breaker_error(_now())

    def stop(self) -> None:
        """Start no more attempts."""
        self._stopped = True
        self._alarm.set(math.inf)

    # --- starting

    def _start_due(self, now: float | None = None) -> None:
        """Send every attempt that may start now, and set the alarm for the next one."""
        if self._admitting or self._stopped or self._is_deferred:
            return
        self._admitting = True
        try:
            now = _now() if now is None else now
            if self._later.next_at < math.inf:
                for call in itertools.islice(self._later.due(now), _SLICE):
                    self.endpoints[call.path].resume(call, now)
            for endpoint in self._turns:
                if endpoint.to_requeue:
                    endpoint.requeue(now, _SLICE)
            moment = min(self._start_all(now), self._later.next_at)
            for endpoint in self._turns:
                if endpoint.to_requeue:
                    moment = now
            # The rest in the next iteration of the loop, so that other tasks run meanwhile.
            self._is_deferred = moment <= now
            # An alarm that is set for an earlier moment stays: it is set again when it rings.
            if moment < self._alarm.at:
                self._alarm.set(max(moment, now))
            elif moment == math.inf and self._alarm.at < math.inf:
                self._alarm.set(math.inf)
        finally:
            self._admitting = False

    def _start_all(self, now: float) -> float:
        """Start every attempt that may start now. Returns the time of the next possible start."""
        moment, looks = math.inf, _SLICE
        last: Endpoint | None = None
        busy = [*self._turns]
        while busy and looks > 0:
            for endpoint in tuple(busy):  # in turns
                granted = endpoint.scheduler.grant(now, looks)
                looks -= endpoint.scheduler.looks
                if isinstance(granted, Attempt):
                    self._send(endpoint, granted, now)
                    last = endpoint
                elif isinstance(granted, Call):
                    self._not_sent(endpoint, cast("ApiCall", granted), now)
                else:
                    busy.remove(endpoint)
                    if granted is not None:
                        moment = min(moment, granted)
        if last is not None and self._turns[-1] is not last:
            self._turns.remove(last)
            self._turns.append(last)
        return now if busy else moment

    def _not_sent(self, endpoint: Endpoint, call: ApiCall, now: float) -> None:
        """Handle a granted call that is not sent.

        It is too late, the circuit breaker is open, or it looks for a shared answer first.
        """
        if endpoint.is_refused(call, now):
            endpoint.enqueue(call, now)
        elif call.stage is Stage.TO_LOOK_UP:
            self.sharing.look_up(call)
        else:
            call.on_late()

    def _resume(self, call: ApiCall) -> None:
        """Let a call go on to the API that has looked for a shared answer."""
        now = _now()
        self.endpoints[call.path].resume(call, now)
        self._start_due(now)

    def _on_alarm(self) -> None:
        self._is_deferred = False
        self._start_due()

    def _send(self, endpoint: Endpoint, request: Attempt, now: float) -> None:
        call: ApiCall = request.call  # type: ignore[assignment]  # as are all calls here
        call.request = request
        endpoint.note_sent(call, now)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug(
                "%s: attempt sent %.3f s after the call began",
                call.api_key.label,
                now - call.entered,
            )
        # Not made by the loop's task factory, which might run the first step at once.
        call.task = AttemptTask(
            self._attempt(endpoint, call), loop=asyncio.get_running_loop(), context=call.context
        )
        call.task.on_cancelled = partial(self._on_cancelled, endpoint, call)

    async def _attempt(self, endpoint: Endpoint, call: ApiCall) -> None:
        try:
            got = await self.transport.attempt(call.path, call.api_key, self._request_timeout)
            now = _now()
            result, answer = endpoint.read(call, got, now)
            self.sharing.publish(call, got, result)
            endpoint.ended(call, answer, now)
            if isinstance(result, Balance):
                call.on_end(result)
            else:
                self._go_on(call, result, now)
            self._start_due(now)
        except asyncio.CancelledError:
            self._break_off(endpoint, call, None)
            raise
        except Exception as error:  # noqa: BLE001  # an unexpected failure
            self._break_off(endpoint, call, error)

    # --- ending

    def _on_cancelled(self, endpoint: Endpoint, call: ApiCall, task: asyncio.Task[None]) -> None:
        """Handle the cancellation of a request, perhaps before its first step."""
        if call.task is task and task.cancelled():
            self._break_off(endpoint, call, None)

    def _break_off(self, endpoint: Endpoint, call: ApiCall, error: Exception | None) -> None:
        """End the call of a request that was cancelled from outside or failed unexpectedly."""
        if call.task is not None:
            endpoint.ended(call, AttemptResult(status=None), _now())
        call.on_broken_off(error)
        self._start_due()

    def _go_on(self, call: ApiCall, result: CrustCreditsError, now: float) -> None:
        """End a call, or retry it later. A call without a waiter is not retried."""
        if not call.is_foreground:
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
            counted = (
                f"attempt {call.attempts} of {self._retry.attempts + call.spared} "
                f"(refusals not counted: {call.spared})"
            )
        _log.info("%s; this was %s; next attempt in %.2f s", result, counted, delay)
        call.last = result
        call.park(parks=True)
        self._later.add(call, now + delay)


def _now() -> float:
    return asyncio.get_running_loop().time()
