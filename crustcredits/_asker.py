"""`Asker`: one key's answer. Token, pace, place on the wire, attempt, retry, in this order.

How long to wait, what an answer means and how bytes travel is decided elsewhere. Errors are values here: a pool has as many
as it has bad keys, and what is never raised needs no traceback. It must not know who waits, for how long, or what is kept.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Hashable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from crustcredits._buckets import Buckets
from crustcredits._circuit_breaker import CircuitBreaker
from crustcredits._claim import Claim
from crustcredits._errors import BucketsUnavailableError, CrustCreditsError, GatewayError
from crustcredits._keys import ApiKey
from crustcredits._limits import RateLimit
from crustcredits._models import Balance
from crustcredits._quota import Quota
from crustcredits._refreshes import RefreshGate
from crustcredits._retry import Retry
from crustcredits._slots import Slots
from crustcredits._tokens import TokenStore
from crustcredits._transport import Failure, Fate, Transport
from crustcredits._turn import Turn
from crustcredits._wire import ACCOUNT_CREDITS, USER_CREDITS, is_apis_own, read_response

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

_log = logging.getLogger("crustcredits")

# Seconds for which a call waits where a gateway has answered for long; so a source without end is not read in vain at full speed.
_REFUSED_AFTER = 1.0

# Of the places on the wire, refreshes may have one in so many, and stand in the way of others nowhere else.
_REFRESHES = 4


class Asker:
    """Asks the API about one key at a time, for as many callers as there are, within one rate limit."""

    def __init__(
        self,
        transport: Transport,
        *,
        rate_limit: RateLimit,
        store: TokenStore,
        concurrency: int,
        request_timeout: float,
        retry: Retry,
    ) -> None:
        self.transport = transport
        self._rate_limit = rate_limit
        self._buckets = Buckets(rate_limit, store, late=request_timeout)
        self._pace = rate_limit.limiter()
        self._pacing = 0  # calls that have a token and wait for the pace
        self._slots = Slots(concurrency)
        self._breakers = {path: CircuitBreaker(path) for path in (USER_CREDITS, ACCOUNT_CREDITS)}
        self._probed = {path: asyncio.Event() for path in self._breakers}  # set and cleared when a probe has ended
        self._room = max(1, concurrency // _REFRESHES)
        self._wire = RefreshGate(self._room)  # what refreshes go through on their way to the wire
        self._gates: dict[Hashable, RefreshGate] = {}  # and before that to each bucket, of those that have any
        self._request_timeout = request_timeout
        self._retry = retry

    def quota(self, path: str, key: ApiKey | None) -> Quota:
        """What the rate limit still allows on `path`."""
        gate = self._gates.get(self._buckets.place(path, key))
        return self._buckets.quota(path, key, pacing=self._pacing, refreshing=0 if gate is None else len(gate))

    def refusal(self, path: str) -> GatewayError | None:
        """Why no key may be asked on `path` now, because a gateway answers there; or None."""
        return self._breakers[path].refusal(_now())

    async def ask(self, path: str, key: ApiKey, turn: Turn) -> Balance | CrustCreditsError:
        """Attempt after attempt, until there is a balance or an error that stays. What nobody wants any more is not tried again."""
        while True:
            if self._breakers[path].is_open:
                refusal = await self._wait_for_probe(path, key, turn)
                if refusal is not None:
                    return refusal
            result = await self._attempt(path, key, turn)
            if result is None:
                continue
            if isinstance(result, Balance):
                return result
            now = _now()
            if turn.failing_since is None:
                turn.failing_since = now
            if not turn.wanted:
                return result
            elapsed, patience = now - turn.failing_since, turn.patience(now)
            delay = self._retry.delay(result, turn.attempts, elapsed=elapsed, patience=patience)
            if delay is None:
                return result
            _log.info("%s; that was attempt %d of %d, the next is in %.2f s", result, turn.attempts, self._retry.attempts, delay)
            turn.last = result
            turn.waits(now + delay)
            await asyncio.sleep(delay)

    async def refresh(self, path: str, key: ApiKey, turn: Turn) -> Balance | CrustCreditsError:
        """The same for what nobody wants: it lets others go first."""
        place = self._buckets.place(path, key)
        gate = self._gates.setdefault(place, RefreshGate(self._room))
        try:
            await gate.enter(turn)
            return await self.ask(path, key, turn)
        finally:
            self._wire.leave(turn)
            gate.leave(turn)
            if not len(gate) and self._gates.get(place) is gate:  # of several that end in one turn, the first removes it
                del self._gates[place]

    async def _wait_for_probe(self, path: str, key: ApiKey, turn: Turn) -> CrustCreditsError | None:
        """Wait while the circuit breaker is open. Returns the refusal, or the call's own last error, when that takes too long.

        A probe on the wire is waited for, and in the first seconds so is the next one: as many of them as a call has attempts.
        """
        breaker, began = self._breakers[path], _now()
        while (refusal := breaker.refusal(_now(), key.digest)) is not None:
            attempted = turn.last is not None and turn.attempts
            error = turn.last if turn.last is not None and attempted else refusal.under(key.label)
            if not turn.wanted or turn.can_fall_back():
                return error
            until: float | None = None
            if not breaker.is_probing:
                until = breaker.next_probe(key.digest)
                if breaker.failed_probes >= self._retry.attempts:
                    until = min(until, began + _REFUSED_AFTER)
                    if _now() >= until:
                        return error
            turn.last = error
            turn.waits(_now() if until is None else until)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._probed[path].wait()
            if not attempted:
                turn.last = None
        return None

    async def _attempt(self, path: str, key: ApiKey, turn: Turn) -> Balance | CrustCreditsError | None:
        """One request, with tokens of its own; the errors are values. None when a gateway has begun to answer before it."""
        # Asked for anew each time: a bucket that was idle during a backoff may have been forgotten.
        breaker = self._breakers[path]
        claim = self._buckets.claim(path, key)
        try:
            slot = self._admit_at_once(claim, turn) or await self._admit(claim, key, turn, breaker)
        except BucketsUnavailableError as error:
            return BucketsUnavailableError(error.message, key_name=key.label)
        if slot is None:
            return None
        answered = False
        request = breaker.start(_now(), key.digest)
        claim.start()
        turn.attempts += 1
        turn.on_wire = True
        try:
            sent = await self.transport.attempt(path, key, self._request_timeout)
            if isinstance(sent, Failure):
                answered = sent.fate is Fate.ANSWERED
                _settle(claim, sent)
                return sent.error
            answered = True
            result = read_response(path, key, sent, now=datetime.now(UTC), period=self._rate_limit.period)
            claim.answered(sent.status, result)
            if isinstance(result, GatewayError):
                breaker.gateway_answered(request, result, _now())
            elif isinstance(result, Balance) or is_apis_own(sent):
                breaker.api_answered()
            return result
        finally:
            turn.on_wire = False
            breaker.end(request, _now())
            if request.is_probe:
                self._probed[path].set()
                self._probed[path].clear()
            self._slots.release(slot, answered=answered)
            claim.abandoned()  # unless an answer has said otherwise

    def _admit_at_once(self, claim: Claim, turn: Turn) -> object | None:
        """What `_admit` does, where there is nothing to wait for: the short way of most calls without a pace."""
        if self._pace is not None or not turn.wanted or not claim.try_acquire():
            return None
        slot = self._slots.try_acquire()
        if slot is None:
            claim.put_back()
        return slot

    async def _admit(self, claim: Claim, key: ApiKey, turn: Turn, breaker: CircuitBreaker) -> object | None:
        """Wait for the tokens, the pace and a place on the wire, in this order.

        Returns the place; or None where the circuit breaker has opened meanwhile, with nothing taken.
        """
        began, again = _now(), False
        while True:
            try:
                await claim.acquire(turn, again=again)
                if breaker.refusal(_now(), key.digest) is not None:  # now, so that nobody waits for the pace in vain
                    claim.put_back()
                    return None
                if not turn.wanted:
                    await self._wire.enter(turn)
                if self._pace is not None:
                    await self._keep_pace(self._pace, turn)
                slot = self._slots.try_acquire() or await self._slots.acquire()
            except BaseException:
                claim.put_back()
                raise
            refused = breaker.refusal(_now(), key.digest) is not None
            if not refused and claim.may_start():
                _log.debug("%s: its turn came after %.3f s", key.label, _now() - began)
                return slot
            self._slots.release(slot, answered=False)
            if refused:
                claim.put_back()
                return None
            again = True

    async def _keep_pace(self, pace: AsyncLimiter, turn: Turn) -> None:
        ahead = self._pacing
        self._pacing += 1
        try:
            if ahead and not pace.has_capacity():
                turn.waits(_now() + (ahead - 1) * pace.time_period / pace.max_rate)
            await pace.acquire()
        finally:
            self._pacing -= 1


def _settle(claim: Claim, failure: Failure) -> None:
    if failure.fate is Fate.ANSWERED:
        claim.answered(None, failure.error)
    elif failure.fate is Fate.UNSENT:
        claim.unsent()
    else:
        claim.abandoned()


def _now() -> float:
    return asyncio.get_running_loop().time()
