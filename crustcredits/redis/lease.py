"""`Lease`: one leader among the processes of a prefix.

This module owns the time for which a process is the leader, and the messages that acquire, renew
and release the lease; `lease.lua` answers them. It must not know tokens, degraded mode or the
client.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import secrets
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final, Literal, Self

import attrs
from redis.exceptions import NoScriptError, RedisError

from crustcredits._errors import ClientClosedError, ConfigurationError
from crustcredits.redis.server_check import check_server, mistake

_log = logging.getLogger("crustcredits")

_SCRIPT: Final = files("crustcredits.redis").joinpath("lease.lua").read_text(encoding="utf-8")
_SHA: Final = hashlib.sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

# Parts of the lease's time: how long a process is the leader after it asked, when it renews, most
# of the wait for one answer, the wait after a failure, and most of the random part of a
# candidate's wait. The rest of the time covers clocks of different rates.
_VALID = 0.9
_RENEWAL = 1 / 3
_PATIENCE = 1 / 3
_BACKOFF = 1 / 20
_JITTER = 1 / 20
# Most seconds of a wait for one answer, and of the wait after a failure.
_MOST = 1.0
# Redis's times are whole milliseconds, and a key expires after its last one.
_MILLISECOND = 0.001


@attrs.frozen
class _Moment:
    """A moment on two clocks, in seconds: uvloop's clock stands still while a callback runs."""

    loop: float
    machine: float


@attrs.frozen(kw_only=True)
class _Answer:
    """Redis's answer.

    Attributes:
        number: The fencing number; 0 if this process does not hold the lease.
        left: Seconds until the lease expires; negative if it does not.
        valid_until: Until when this process is the leader, if it holds the lease.
    """

    number: int
    left: float
    valid_until: _Moment


class Lease:
    """The right to be the leader: see `RedisBackend.lease`, which makes it.

    Each object serves one `async with` block. Entering waits until this process is the leader, also
    while Redis is out of reach; the log reports the start and the end of an outage once each.
    Cancel the task, or use `asyncio.timeout`, to wait no longer. Leaving releases the lease and
    raises nothing, also when it was lost or Redis is out of reach: then it expires.

    A lost lease stays lost, and the block is not interrupted: read `is_held` before each step, or
    stop the work in `on_lost`.
    """

    def __init__(
        self,
        client: Any,
        prefix: str,
        name: str,
        *,
        seconds: float,
        on_lost: Callable[[], object] | None,
        active: set[Lease],
    ) -> None:
        self._client = client
        self._keys = (f"{prefix}lease:{name}", f"{prefix}term:{name}")
        self._name = name
        self._seconds = seconds
        self._on_lost = on_lost
        self._active = active
        self._holder = ""  # made on entering, since a process may fork before
        self._number = 0
        self._valid_until: _Moment | None = None  # None outside of a term
        self._may_hold = False  # whether Redis may have this holder
        self._is_checked = False
        self._trouble = ""  # the last failure, while messages fail
        self._task: asyncio.Task[None] | None = None
        self._is_ending = False

    @property
    def is_held(self) -> bool:
        """Whether this process is the leader: False from the moment at which another may be.

        It is decided by the clock, so it is right at once after the process stood still. Any thread
        may read it.
        """
        until = self._valid_until
        return (
            until is not None
            and self._loop.time() < until.loop
            and time.monotonic() < until.machine
        )

    @property
    def fencing_number(self) -> int:
        """The number of this term: higher than that of each earlier term; 0 before the term."""
        return self._number

    async def __aenter__(self) -> Self:
        """Wait until this process is the leader.

        Raises:
            ConfigurationError: Redis refuses the user, the database or the script; or it is too
                old, may evict keys, or is no Redis. Or this object was entered before.
            ClientClosedError: The backend was closed meanwhile.
        """
        if self._task is not None:
            raise ConfigurationError(
                "this lease was entered before; call backend.lease() for each block"
            )
        self._loop = asyncio.get_running_loop()
        self._holder = secrets.token_hex(8)
        self._acquired: asyncio.Future[None] = self._loop.create_future()
        self._task = self._loop.create_task(self._run())
        self._active.add(self)
        self._task.add_done_callback(lambda _: self._active.discard(self))
        try:
            await asyncio.wait([self._acquired, self._task], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self._end()
            raise
        if not self._acquired.done():
            if self._task.cancelled():
                raise ClientClosedError(
                    f"the backend was closed before this process got the lease {self._name!r}"
                )
            await self._task
        return self

    async def __aexit__(self, *error: object) -> None:
        """Release the lease, if it is still this process's own."""
        if not self.is_held:
            self._lose("this process stood still")
        self._valid_until = None
        await self._end()

    async def close(self) -> None:
        """Release the lease before its block ends, as `RedisBackend.close` does.

        It counts as lost. Entering that still waits fails with `ClientClosedError`.
        """
        self._lose("the backend was closed")
        await self._end()

    async def _end(self) -> None:
        """End the task, which releases the lease."""
        if self._task is None:
            return
        if not self._is_ending:  # a second cancellation would stop the release
            self._is_ending = True
            self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.exception()  # a mistake that no caller waits for any more

    # --- the task

    async def _run(self) -> None:
        """Acquire the lease, renew it until it is lost or its block ends, and release it."""
        try:
            await self._acquire()
            self._acquired.set_result(None)
            self._lose(await self._renew())
        finally:
            self._valid_until = None
            if self._may_hold:
                await self._release()

    async def _acquire(self) -> None:
        while not self.is_held:
            answer = await self._ask("acquire")
            if answer is None:
                await asyncio.sleep(self._backoff)
            elif answer.number:
                self._number, self._valid_until = answer.number, answer.valid_until
            else:
                # Another's lease may be longer than this one, or never expire.
                left = answer.left if 0 <= answer.left < self._seconds else self._seconds
                jitter = random.uniform(0, _JITTER * self._seconds)
                await asyncio.sleep(left + _MILLISECOND + jitter)
        _log.info("this process holds the lease %r, fencing number %d", self._name, self._number)

    async def _renew(self) -> str:
        """Renew the lease until it is lost. Returns the cause."""
        until = self._valid_until
        assert until is not None
        try:
            async with asyncio.timeout(None) as end:
                while True:
                    end.reschedule(until.loop)
                    await asyncio.sleep(self._until_renewal(until))
                    answer = await self._ask("renew")
                    while answer is None:
                        await asyncio.sleep(self._backoff)
                        answer = await self._ask("renew")
                    if not answer.number:
                        return "another process holds it, or Redis lost it"
                    if not self.is_held:  # it was seen as lost, so it stays lost
                        break
                    until = self._valid_until = answer.valid_until
        except TimeoutError:
            pass
        if self._trouble:
            return f"Redis did not answer in time ({self._trouble})"
        return "this process stood still"

    async def _release(self) -> None:
        try:
            await self._send("release")
        except Exception as error:  # noqa: BLE001  # the lease expires by itself
            _log.info(
                "the lease %r was not released (%s); it expires within %.3g s",
                self._name,
                _why(error),
                self._seconds,
            )

    def _lose(self, cause: str) -> None:
        """End the term before its block ends, once."""
        if self._valid_until is None:
            return
        self._valid_until = None
        _log.warning(
            "lease %r lost (fencing number %d), because %s; stop the leader's work in this process",
            self._name,
            self._number,
            cause,
        )
        if self._on_lost is None:
            return
        try:
            self._on_lost()
        except Exception:  # noqa: BLE001  # the lease is released all the same
            _log.exception("on_lost of the lease %r failed; correct the function", self._name)

    # --- messages

    async def _ask(self, action: Literal["acquire", "renew"]) -> _Answer | None:
        """The answer to a message, or None when there is none; the log tells of it once.

        Raises:
            ConfigurationError: A mistake that does not heal, before the term.
        """
        try:
            answer = await self._send(action)
        except Exception as error:  # noqa: BLE001  # any error is an outage
            problem = error if isinstance(error, ConfigurationError) else mistake(error)
            why = _why(error)
        else:
            if self._trouble:
                self._log_return(answer)
            self._trouble = ""
            return answer
        if problem is not None and not self._acquired.done():
            self._may_hold = False  # Redis would refuse the release too
            raise problem
        if not self._trouble:
            effect = "waits until it answers"
            if self._acquired.done():
                effect = "stops being the leader if no answer comes in time"
            _log.warning(
                "no reply from Redis for lease %r (%s); this process %s; look at Redis and at the "
                "network",
                self._name,
                why,
                effect,
            )
        self._trouble = why
        return None

    def _log_return(self, answer: _Answer) -> None:
        if not self._acquired.done():
            _log.warning(
                "Redis answers again; this process competes for lease %r again", self._name
            )
        else:
            state = "continues" if answer.number and self.is_held else "has ended"
            _log.warning("Redis answers again; lease %r %s", self._name, state)

    async def _send(self, action: Literal["acquire", "renew", "release"]) -> _Answer:
        async with asyncio.timeout(min(_MOST, _PATIENCE * self._seconds)):
            if not self._is_checked:
                await check_server(self._client)
                self._is_checked = True
            self._may_hold = True
            valid = _VALID * self._seconds
            valid_until = _Moment(self._loop.time() + valid, time.monotonic() + valid)
            number, left = map(int, await self._call(action))
        self._may_hold = number > 0
        return _Answer(number=number, left=left / 1e3, valid_until=valid_until)

    async def _call(self, action: str) -> Any:
        said = (*self._keys, self._holder, action, math.ceil(self._seconds * 1e3))
        try:
            return await self._client.evalsha(_SHA, len(self._keys), *said)
        except NoScriptError:  # unknown script, or SCRIPT FLUSH
            return await self._client.eval(_SCRIPT, len(self._keys), *said)

    @property
    def _backoff(self) -> float:
        return min(_MOST, _BACKOFF * self._seconds)

    def _until_renewal(self, until: _Moment) -> float:
        """Seconds until a third of the lease has passed since the last message."""
        return until.loop - (_VALID - _RENEWAL) * self._seconds - self._loop.time()


def _why(error: Exception) -> str:
    return type(error).__name__ + (f": {error}" if isinstance(error, RedisError) else "")
