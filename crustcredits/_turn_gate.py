"""`TurnGate`: lets a stream ask about a key when the key is likely to have its turn in time.

The module knows nothing of requests or limits: `Turns` estimates, and is passed in.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Protocol

from crustcredits._keys.api_key import Key
from crustcredits._models import Outcome

# Seconds for which an estimate of the keys that have their turn in time is used, also one of 0, and
# the most seconds until the next one.
_ESTIMATED = 0.1
_LATER = 1.0
# After a key without a turn, the least and the most seconds until the next key that needs one.
_LEAST_BACKOFF = 0.1
_MOST_BACKOFF = 1.0


class Turns(Protocol):
    """Says which keys of a source are likely to have their turn in time."""

    # If no key is under way for so many seconds, the next one is tried in any case.
    patience: float

    def needs_turn(self, key: Key) -> bool:
        """Whether the outcome of a key has to wait for a turn."""
        ...

    def likely(self, most: int) -> tuple[int, float]:
        """How many more keys are likely to have their turn in time, up to `most`.

        Returns the number, and the seconds until the first such key if the number is 0.
        """
        ...

    def had_no_turn(self, outcome: Outcome[Any]) -> bool:
        """Whether no request was sent for a key, because its turn did not come in time."""
        ...


class TurnGate:
    """Admits the keys of one source.

    No key is asked about before it is likely to have its turn in time: otherwise an endless source
    would be drained, and most would fail. That is an estimate, which does not know the account of a
    key. So after a key without a turn, the next key that needs one waits 0.1 s, and the others
    twice as long each time, up to 1 s. Each outcome of a request then lets two keys start without
    such a wait.

    Args:
        turns: Estimates.
        room: Most keys at a time for which an estimate is needed.
        wake: Called when a key that was not admitted should be tried again.
    """

    def __init__(self, turns: Turns, room: int, wake: Callable[[], None]) -> None:
        self._turns = turns
        self._room = room
        self._wake = wake
        # Keys that are likely to have their turn in time; None without an estimate.
        self._estimate: int | None = None
        self._estimated_at = -math.inf
        self._waits_since: float | None = None  # since when no key is under way and one waits
        self._timer: asyncio.Handle | None = None  # for the next estimate, or the backoff's end
        # Keys that may take a turn without a wait: infinite until a key has had no turn.
        self._credit = math.inf
        self._backoff = 0.0  # seconds between two keys beyond these; 0 after a turn
        self._backs_off_until = -math.inf
        self._backed_off_at = 0  # number of keys when the backoff was set or doubled last

    def admit(self, key: Key, *, is_idle: bool) -> bool:
        """Admit a key, unless it has to wait: then `wake` is called later. Returns whether.

        `is_idle` says that no other key of the source is under way.
        """
        if not self._turns.needs_turn(key):
            self._waits_since = None
            return True
        now = asyncio.get_running_loop().time()
        if not self._credit and now < self._backs_off_until:
            self._set_timer(self._backs_off_until - now)
            return False
        if not self._renew_estimate(now) and not self._wait_idle(now, is_idle=is_idle):
            return False
        self._waits_since = None
        if self._estimate:
            self._estimate = self._estimate - 1 or None
        if self._credit:
            self._credit -= 1
        else:
            self._backs_off_until = now + max(_LEAST_BACKOFF, self._backoff)
        return True

    def land(self, outcome: Outcome[Any], number: int, started: int, *, is_at_once: bool) -> None:
        """Take note of the outcome of a key.

        Args:
            outcome: Its outcome.
            number: The number of the key.
            started: How many keys were asked about so far.
            is_at_once: Whether the outcome was there when the key was asked about: then its
                requests were sent for other callers before.
        """
        if self._turns.had_no_turn(outcome) or (is_at_once and outcome.attempts):
            self._back_off(number, started)
        elif outcome.attempts and self._credit < math.inf:
            self._backoff = 0.0
            self._credit = self._credit + 2 if self._credit < self._room else math.inf
            self._wake()

    def close(self) -> None:
        """Call `wake` no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _renew_estimate(self, now: float) -> int:
        """Estimate anew, if due. Returns how many more keys are likely to be in time."""
        if self._estimate is None or now - self._estimated_at > _ESTIMATED:
            self._estimate, wait = self._turns.likely(self._room)
            self._estimated_at = now
            if not self._estimate:
                self._set_timer(min(max(wait, _ESTIMATED), _LATER))
        return self._estimate

    def _wait_idle(self, now: float, *, is_idle: bool) -> bool:
        """Count the time without a key under way. Returns whether a key has to be tried.

        After a long time it is tried although it is not likely to have its turn, so that its
        failure is seen.
        """
        if not is_idle:
            self._waits_since = None
            return False
        self._waits_since = now if self._waits_since is None else self._waits_since
        return now - self._waits_since >= self._turns.patience

    def _back_off(self, number: int, started: int) -> None:
        """Let the next key that needs a turn wait, unless the failed one began before that."""
        if number < self._backed_off_at:
            return
        self._credit, self._backed_off_at = 0, started
        self._backoff = min(max(_LEAST_BACKOFF, 2 * self._backoff), _MOST_BACKOFF)
        self._backs_off_until = asyncio.get_running_loop().time() + self._backoff

    def _set_timer(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if not self._estimate:
            self._estimate = None
        self._wake()
