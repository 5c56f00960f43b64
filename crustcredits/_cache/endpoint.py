"""`Endpoint`: an admission queue, a circuit breaker, and the calls that wait for a probe."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from datetime import UTC, datetime, timedelta
from typing import cast

from crustcredits._cache.answer_store import StoredAnswer
from crustcredits._cache.api_call import ApiCall, Resumptions, Stage
from crustcredits._cache.backend_buckets import BackendBuckets
from crustcredits._cache.cache_entry import OF_THE_KEY
from crustcredits._cache.circuit_breaker import CircuitBreaker, Sent
from crustcredits._cache.streams import Streams
from crustcredits._errors import (
    BackendUnavailableError,
    CrustCreditsError,
    GatewayError,
    renamed,
)
from crustcredits._http.protocol import Responder, Response, read_response, responder_of
from crustcredits._http.retry import asked_wait
from crustcredits._http.stored_response import load_response
from crustcredits._http.transport_types import Failure, Fate
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance
from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.config import RateLimit
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.flow import Call, Flow
from crustcredits._ratelimit.leased_tokens import Backend
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.scheduler import Scheduler
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import local_bucket

# Seconds for which a call waits while a gateway has answered for long, so that an endless source is
# not drained at full speed.
_REFUSED_AFTER = 1.0
# Calls that one iteration of the loop ends in an outage.
_SLICE = 1_000


class Endpoint:
    """One endpoint of a client.

    Args:
        path: Its path.
        rate_limit: The rate limit of the client.
        terms: The settings of its scheduler.
        pace: How many requests start per second, on all endpoints.
        slots: How many requests are on the wire, on all endpoints.
        later: The calls that resume later.
        backend: Where several processes count their tokens together, or None.
        on_tokens: Called when the backend has brought tokens.
        shares: Whether calls may look for answers of other processes.
        probes: Failed probes in a row, of any call, after which a call waits 1 s at the most.

    Attributes:
        path: Its path.
        counts_accounts: Whether the keys of a declared account share its tokens.
        scheduler: Its admission queue.
        streams: The streams with a timeout whose keys are asked about here.
        to_requeue: Calls that waited for a probe, which has ended: `requeue` takes them.
    """

    def __init__(
        self,
        path: str,
        *,
        rate_limit: RateLimit,
        terms: SchedulerTerms,
        pace: Pace,
        slots: ConnectionSlots[Attempt],
        later: Resumptions,
        backend: Backend | None,
        on_tokens: Callable[[], None],
        shares: bool,
        probes: int,
    ) -> None:
        self.path = path
        self._later = later
        self.counts_accounts = rate_limit.scope != "key"
        self._probes = probes
        self._shares = shares
        self._period = rate_limit.period
        self._breaker = CircuitBreaker(path)
        self._barred: dict[ApiCall, None] = {}  # calls that wait for the end of a probe
        self.to_requeue: OrderedDict[ApiCall, None] = OrderedDict()
        make_bucket, make_permits = local_bucket, Permits
        if backend is not None:
            buckets = BackendBuckets(backend, path, rate_limit.scope, on_tokens, self._on_outage)
            make_bucket, make_permits = buckets.make, buckets.make_permits
        self.scheduler = Scheduler(
            terms,
            pace=pace,
            slots=slots,
            make_bucket=make_bucket,
            make_permits=make_permits,
            is_barred=self.is_barred,
        )
        self.streams = Streams(self.scheduler.estimates)
        self._on_tokens = on_tokens

    # --- calls

    def enqueue(self, call: ApiCall, now: float) -> None:
        """Put a call into the queue, unless the circuit breaker refuses it."""
        self._later.drop(call)
        refusal = self._breaker.refusal(now, call.key) if self._breaker.is_open else None
        if refusal is not None:
            self._bar(call, refusal, now)
            return
        call.barred_since = None
        if not call.attempts:
            call.last = None
        self.scheduler.put(call)

    def resume(self, call: ApiCall, now: float) -> None:
        """Put a call into the queue again, for a retry or as a probe."""
        self._unbar(call)
        call.park(parks=False)
        self.enqueue(call, now)

    def leave(self, call: ApiCall, now: float) -> bool:
        """Give up a call that waits. Returns whether another call may start because of that."""
        makes_room = self.scheduler.remove(call, now)
        self._unbar(call)
        self._later.drop(call)
        call.park(parks=False)
        return makes_room

    def _unbar(self, call: ApiCall) -> None:
        """Let a call wait for no probe any more."""
        self._barred.pop(call, None)
        self.to_requeue.pop(call, None)

    def earliest(self, call: ApiCall, now: float) -> float:
        """The time before which certainly no request for this call starts."""
        if call.stage in {Stage.TO_LOOK_UP, Stage.LOOKS}:
            return now  # another process may have the answer
        if call.task is not None or call in self._barred or call in self.to_requeue:
            return now  # an answer on its way may close the circuit breaker
        if call.resumes is not None:
            return max(now, call.resumes)
        return self.scheduler.earliest(call.account, now)

    def waiting_in(self, flow: Flow) -> int:
        """How many calls of a flow wait for a start or for a common token."""
        common = self.scheduler.permits.common
        return self.scheduler.ready.of_flow(flow) + common.of_flow(flow)

    def waits_in_turn(self, call: Call) -> bool:
        """Whether a call waits for a start or for a common token, and not for its account."""
        return call.queue is self.scheduler.ready or self.scheduler.permits.common.holds(call)

    # --- keys without a call

    def account_of(self, key: ApiKey) -> Hashable:
        """The account of a key: the declared one, else the key's digest."""
        account = key.account if self.counts_accounts else None
        return key.digest if account is None else account

    def earliest_for(self, key: ApiKey, now: float) -> float:
        """The time before which certainly no request starts for a key."""
        return self.scheduler.earliest(self.account_of(key), now)

    def hopeless(self, keys: Sequence[ApiKey], deadline: float, now: float) -> list[int]:
        """Numbers of the keys for which certainly no request starts before the deadline."""
        return self.scheduler.hopeless(map(self.account_of, keys), deadline, now)

    @property
    def is_cut_off(self) -> bool:
        """Whether the place in which several processes count is out of reach."""
        return self.scheduler.permits.common.bucket.is_cut_off

    # --- the circuit breaker

    def requeue(self, now: float, most: int) -> None:
        """Ask again for calls that waited for a probe, up to `most` of them.

        The probe has ended, or the API has answered an older request.
        """
        for _ in range(min(most, len(self.to_requeue))):
            call, _ = self.to_requeue.popitem(last=False)
            self.enqueue(call, now)

    def breaker_error(self, now: float) -> GatewayError | None:
        """The circuit breaker's error for requests now, or None."""
        return self._breaker.refusal(now)

    def is_barred(self, call: Call, now: float) -> bool:
        """Whether no request may be sent for this call now.

        The circuit breaker refuses it, or the call has to look for a shared answer first.
        """
        return self.is_refused(call, now) or cast("ApiCall", call).stage is Stage.TO_LOOK_UP

    def is_refused(self, call: Call, now: float) -> bool:
        """Whether the circuit breaker refuses a request for this call now."""
        return self._breaker.is_open and self._breaker.refusal(now, call.key) is not None

    def note_sent(self, call: ApiCall, now: float) -> None:
        """Note that a request is sent for a call: a probe, if the circuit breaker is open."""
        call.attempts += 1
        call.probe = self._breaker.start(now, call.key) if self._breaker.is_open else None

    def ended(self, call: ApiCall, answer: AttemptResult, now: float) -> None:
        """Note that the request of a call has ended."""
        call.task = None
        probe, scheduler = call.probe, self.scheduler
        if probe is not None:
            self._breaker.end(probe, now)
        scheduler.ended(call.request, answer, now)
        if scheduler.is_barring or probe is not None:
            scheduler.is_barring = self._breaker.is_open or self._shares
            if probe is not None or (self._barred and not self._breaker.is_open):
                self.to_requeue.update(self._barred)
                self._barred.clear()

    def read(
        self, call: ApiCall, got: Response | Failure, now: float
    ) -> tuple[Balance | CrustCreditsError, AttemptResult]:
        """The result of a request, for the waiters and for the scheduler.

        The circuit breaker records the answer.
        """
        if isinstance(got, Failure):
            return got.error, _without_response(got.fate)
        result = read_response(
            call.path, call.api_key, got, now=datetime.now(UTC), period=self._period
        )
        breaker, status = self._breaker, result.rate_limit
        limit, remaining = (None, None) if status is None else (status.limit, status.remaining)
        if isinstance(result, Balance):
            breaker.api_answered(call.key)
            return result, AttemptResult(status=got.status, limit=limit, remaining=remaining)
        responder = responder_of(got)
        if isinstance(result, GatewayError):
            sent = call.probe or Sent(call.request.started, call.key, is_probe=False)
            breaker.gateway_answered(sent, result, now)
            self.scheduler.is_barring = breaker.is_open or self._shares
        elif responder is Responder.API:
            breaker.api_answered(call.key)
        return result, AttemptResult(
            status=got.status,
            by_gateway=responder is Responder.GATEWAY,
            limit=limit,
            remaining=remaining,
            wait=asked_wait(result),
        )

    def read_stored(
        self, call: ApiCall, answer: StoredAnswer
    ) -> Balance | CrustCreditsError | None:
        """The result in an answer of another process; None if it cannot be read."""
        response = load_response(answer.text)
        if response is None:
            return None
        age = asyncio.get_running_loop().time() - answer.began
        arrived = datetime.now(UTC) - timedelta(seconds=age)
        result = read_response(call.path, call.api_key, response, now=arrived, period=self._period)
        is_expected = isinstance(result, OF_THE_KEY if answer.is_error else Balance)
        return result if is_expected else None

    def _bar(self, call: ApiCall, refusal: GatewayError, now: float) -> None:
        """Let a call wait while the circuit breaker is open, or end it.

        The call ends with its own last error, if it has one. It waits for a probe on the wire, and
        in the first seconds also for the next probe: for as many probes as a call has attempts.
        """
        error = (
            call.last
            if call.last is not None and call.attempts
            else renamed(refusal, call.api_key.label)
        )
        if not call.is_foreground or call.can_fall_back():
            call.on_end(error)
            return
        if call.barred_since is None:
            call.barred_since = now
        until: float | None = None
        if not self._breaker.is_probing:
            until = self._breaker.next_probe(call.key)
            if self._breaker.failed_probes >= self._probes:
                until = min(until, call.barred_since + _REFUSED_AFTER)
                if now >= until:
                    call.on_end(error)
                    return
        call.last = error
        self._barred[call] = None
        if until is None:
            call.on_wait()
        else:
            self._later.add(call, until)

    # --- tokens

    def _on_outage(self, whose: Hashable | None) -> None:
        """End the calls that wait for a token of this bucket: no token can be had.

        A slice at a time, so that other tasks run in between.
        """
        loop = asyncio.get_running_loop()
        message = (
            "not sent: Redis, which counts for all processes, is out of reach; see the log for the "
            "cause, and try again when Redis answers"
        )
        calls = self.scheduler.drain(whose, loop.time(), _SLICE)
        for call in calls:
            call = cast("ApiCall", call)
            call.on_end(BackendUnavailableError(message, key_name=call.api_key.label))
        if len(calls) == _SLICE:
            loop.call_soon(self._on_outage, whose)
        self._on_tokens()  # calls that waited behind these for their account are ready now


def _without_response(fate: Fate) -> AttemptResult:
    """The result of a request without a complete response, for the scheduler."""
    return AttemptResult(status=None, unsent=fate is Fate.UNSENT, incomplete=fate is Fate.ANSWERED)
