"""`Pace`: how many requests start per second.

Built on aiolimiter, with the scheduler as its only waiter.
"""

from __future__ import annotations

from contextlib import suppress

from aiolimiter import AsyncLimiter

# Most starts at one moment, and the starts that one wake-up waits for. Single wake-ups cost the
# most processor time, and large groups are refused together where several clients share a limit.
_BURST = 5
_GROUP = 3
# A cooldown halves the rate, which recovers by a fraction of the configured rate per second.
_CUT = 0.5
_RECOVERY = 0.02
# Requests per second that the first cut sets where no pace is configured.
_AFTER_A_CUT = 100.0
_ROUNDING = 1e-3


class Pace:
    """Requests per second over all keys of a client, in groups of up to five.

    Args:
        rate: The configured rate; None for no bound.
        least: The rate below which no cut goes.
    """

    __slots__ = ("_ceiling", "_changed", "_least", "_limiter", "_next", "_rate")

    def __init__(self, rate: float | None, least: float) -> None:
        self._ceiling = rate
        self._least = least
        self._rate = rate
        self._changed = 0.0
        self._next = 0.0
        self._limiter = None if rate is None else _limiter(rate)

    def wait(self, now: float) -> float | None:
        """When the next request may start; None for now."""
        if self._rate is None:
            return None
        assert self._ceiling is not None
        if self._rate < self._ceiling:
            self._recover(now)
            return self._next if self._next > now else None
        assert self._limiter is not None
        if self._limiter.has_capacity():
            return None
        burst = _burst(self._rate)
        return max(self._next - (burst - min(_GROUP, burst)) / self._rate, now)

    def take(self, now: float) -> None:
        """Note that a request starts, which `wait` allows."""
        if self._rate is None:
            return
        self._next = max(self._next, now) + 1 / self._rate
        if self._limiter is not None and self._rate == self._ceiling:
            _take(self._limiter)

    def current(self, now: float) -> float | None:
        """Requests per second at the moment; None for no bound."""
        self._recover(now)
        return self._rate

    def cut(self, now: float) -> None:
        """Halve the rate: an endpoint cooldown began, or something in front of the API refuses."""
        if self._ceiling is None:
            self._ceiling = self._rate = max(self._least, _AFTER_A_CUT)
            self._limiter = _limiter(self._ceiling)
        self._recover(now)
        assert self._rate is not None
        self._rate = max(min(self._least, self._ceiling), self._rate * _CUT)

    def _recover(self, now: float) -> None:
        if self._ceiling is not None and self._rate is not None and self._rate < self._ceiling:
            self._rate = min(
                self._ceiling, self._rate + (now - self._changed) * _RECOVERY * self._ceiling
            )
        self._changed = now


def _burst(rate: float) -> float:
    return min(float(_BURST), max(1.0, rate))


def _limiter(rate: float) -> AsyncLimiter:
    burst = _burst(rate)
    # A little more, so that the sum of five rounded parts still fits.
    return AsyncLimiter(burst + _ROUNDING, (burst + _ROUNDING) / rate)


def _take(limiter: AsyncLimiter) -> None:
    """Take free capacity of the limiter without a turn of the loop."""
    acquiring = limiter.acquire()
    with suppress(StopIteration):
        acquiring.send(None)
        raise AssertionError("unreachable: the limiter has capacity, so it does not wait")
