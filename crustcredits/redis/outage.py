"""`Outage`: whether Redis answers, and how a process counts while it does not.

An outage begins with the first message without an answer. After the grace time the process counts
by itself (degraded mode), or its calls fail.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from crustcredits.redis.timing import GRACE, LEAST_OUTAGE, PATIENCE, SILENCE

_log = logging.getLogger("crustcredits")

# Log repeated losses: this many within this many seconds. Stay silent until 60 s have passed
# without one.
_LOSSES, _LOSSES_WITHIN = 3, 10.0
_SAYS_LOSSES_EVERY = 60.0


class Affected(Protocol):
    """Tokens that an outage concerns."""

    def lose_touch(self) -> None:
        """Note how many tokens are out at the first failure."""
        ...

    def go_alone(self) -> None:
        """Enter degraded mode."""
        ...

    def change(self) -> None:
        """Adapt to the end of degraded mode, or to the use of the whole share."""
        ...

    def wake(self) -> None:
        """Wake the waiting calls."""
        ...

    def fail(self) -> None:
        """Fail every waiting call."""
        ...


class Outage:
    """The outage of one process.

    Args:
        tokens: Returns all tokens of the process.
        raises: Whether calls fail in an outage, instead of degraded mode.

    Attributes:
        since: The loop's time since which messages fail; None while Redis answers.
        is_long: Whether the failures last longer than the grace time.
        is_degraded: Whether the process counts by itself.
        is_settled: Whether degraded mode has lasted so long that each process can have at most its
            share out.
        settles_at: The time at which `is_settled` becomes true.
    """

    def __init__(self, tokens: Callable[[], Iterable[Affected]], *, raises: bool) -> None:
        self.since: float | None = None
        self.is_long: bool = False
        self.is_degraded: bool = False
        self.is_settled: bool = False
        self.settles_at: float = 0.0
        self._tokens = tokens
        self._raises = raises
        self._is_strict = False
        self._lease = self._share = 0.0
        self._losses: deque[float] = deque(maxlen=_LOSSES)  # when messages began to fail
        self._says_losses_at = -math.inf
        self._timer: asyncio.Handle | None = None
        self._is_closed = False

    def open(self, *, lease: float, share: float, is_strict: bool) -> None:
        """Set the terms of a client: its lease in seconds, and its share of the limit."""
        self._lease, self._share, self._is_strict = lease, share, is_strict

    def close(self) -> None:
        """Set no timer any more."""
        self._is_closed = True
        self._stop_timer()

    def lost(self, sent: float, why: str) -> bool:
        """Note that the message sent at `sent` got no reply.

        Returns whether degraded mode begins.
        """
        # A message is given up on after `PATIENCE`. Where more time has passed, this process stood
        # still, and Redis may have answered meanwhile.
        sent = max(sent, asyncio.get_running_loop().time() - PATIENCE)
        if self.since is None:
            self.since = sent
            self._note_loss(sent, why)
            for tokens in self._tokens():
                tokens.lose_touch()
        now = asyncio.get_running_loop().time()
        if now - self.since < GRACE or sent - self.since < LEAST_OUTAGE:
            return False
        if not self.is_long:
            self.is_long = True
            _log.warning(
                "Redis is out of reach (%s); until it answers, %s; look at Redis and at the "
                "network between it and this process",
                why,
                self._effect,
            )
        if self._raises:
            for tokens in self._tokens():
                tokens.fail()
            return False
        if self.is_degraded:
            return False
        self._go_alone(sent if self._is_strict else self.since)
        return True

    def ended(self) -> bool:
        """Note that a message was answered. Returns whether degraded mode ends."""
        since, self.since = self.since, None
        if self.is_long and since is not None:
            self.is_long = False
            _log.warning(
                "Redis answers again after %.0f s; this process counts in Redis again",
                asyncio.get_running_loop().time() - since,
            )
        if not self.is_degraded:
            return False
        self.is_degraded = self.is_settled = False
        self._stop_timer()
        for tokens in self._tokens():
            tokens.change()
        self._wake_all()
        return True

    @property
    def _effect(self) -> str:
        if self._raises:
            return "calls fail"
        alone = "sends nothing" if self._is_strict else "uses only the tokens that it already has"
        return (
            f"this process {alone} for {self._wait_alone:.0f} s (degraded mode), then up to "
            f"{self._share:.3g} of the limit"
        )

    @property
    def _wait_alone(self) -> float:
        """Seconds until others have returned all tokens that belong to this process's share."""
        # Redis may read a delayed message and still accept its age.
        return self._lease + (SILENCE + 2 * PATIENCE if self._is_strict else 0.0)

    def _go_alone(self, since: float) -> None:
        self.is_degraded = True
        # An attempt with a token of another process from before the outage may still arrive, and
        # then counts for a period.
        self.settles_at = since + self._wait_alone
        for tokens in self._tokens():
            tokens.go_alone()
        self._wake_all()
        if not self._is_closed:
            self._timer = asyncio.get_running_loop().call_at(self.settles_at, self._settle)

    def _settle(self) -> None:
        self.is_settled = True
        for tokens in self._tokens():
            tokens.change()
        self._wake_all()

    def _wake_all(self) -> None:
        """Wake the calls only after all buckets have changed, as a call takes tokens of two."""
        for tokens in self._tokens():
            tokens.wake()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _note_loss(self, sent: float, why: str) -> None:
        """Log when messages are lost again and again, although Redis answers between."""
        self._losses.append(sent)
        if len(self._losses) < _LOSSES or sent - self._losses[0] > _LOSSES_WITHIN:
            return
        if sent >= self._says_losses_at:
            _log.warning(
                "Redis lost %d messages within %.0f s, so calls wait longer; last cause: %s; look "
                "at the network and at Redis's log",
                _LOSSES,
                _LOSSES_WITHIN,
                why,
            )
        self._says_losses_at = sent + _SAYS_LOSSES_EVERY
