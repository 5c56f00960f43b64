"""Virtual time: a loop with a clock that moves only when no callback is ready.

And servers without a network.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import attrs

from crustcredits import ApiKey, APITimeoutError
from crustcredits._client import CreditsClient
from crustcredits._http.protocol import Response
from crustcredits._http.transport_types import Failure, Fate

T = TypeVar("T")

# A float residue can make a timer due "now" for ever, so each wait for a timer takes at least this.
_LEAST = 1e-6


class _Selector(selectors.DefaultSelector):
    """Waits by moving the clock; the loop waits once before each of its turns."""

    now = 0.0
    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("deadlock: no callback is scheduled, and all tasks wait")
        self.turns += 1
        if timeout > 0:
            self.now += max(timeout, _LEAST)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    @property
    def turns(self) -> int:
        """How often it has had callbacks run."""
        return self._virtual.turns

    def time(self) -> float:
        return self._virtual.now

    def move(self, seconds: float) -> None:
        """Let time pass while a coroutine works."""
        self._virtual.now += seconds


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run in virtual time, from a test that is no coroutine."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def now() -> float:
    return asyncio.get_running_loop().time()


@attrs.frozen
class Reply:
    """The fake server's reaction to a request.

    After `seconds`, this status, or a failure with this fate instead of an answer.
    """

    seconds: float = 0.01
    status: int = 200
    credits: str = "9406"
    headers: dict[str, str] = attrs.field(factory=dict)
    body: str | None = None
    failure: Failure | None = None


def refusal(reset: float | None = None, *, seconds: float = 0.01) -> Reply:
    headers = {} if reset is None else {"x-ratelimit-reset": str(reset)}
    return Reply(seconds=seconds, status=429, body="{}", headers=headers)


def lost(error: Exception, fate: Fate = Fate.ABANDONED, *, seconds: float = 0.01) -> Reply:
    return Reply(seconds=seconds, failure=Failure(error, fate))  # type: ignore[arg-type]  # only ours are given


class FakeServer:
    """Takes the place of the transport.

    `script` decides by key name and by how often that key was asked before.
    """

    def __init__(self, script: Callable[[str, int], Reply] = lambda name, times: Reply()) -> None:
        self.script = script
        self.arrivals: list[tuple[float, str]] = []
        self.asked: dict[str, int] = {}
        self.on_wire = 0
        self.most_on_wire = 0

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        times = self.asked.get(key.name, 0)
        self.asked[key.name] = times + 1
        self.arrivals.append((now(), key.name))
        reply = self.script(key.name, times)
        self.on_wire += 1
        self.most_on_wire = max(self.most_on_wire, self.on_wire)
        try:
            await asyncio.sleep(min(reply.seconds, timeout))
        finally:
            self.on_wire -= 1
        if reply.seconds > timeout:
            return Failure(
                APITimeoutError("no whole answer in time", key_name=key.name), Fate.ABANDONED
            )
        if reply.failure is not None:
            return reply.failure
        body = (
            reply.body
            or f'{{"credits": {reply.credits}, "account": {{"credits": {reply.credits}}}}}'
        )
        return Response(reply.status, reply.headers, body.encode())

    async def close(self) -> None:
        pass


class WindowServer:
    """The same with a sliding window, as the API documents it. Several clients may share it.

    `scope` maps a key to the scope that counts it; `lag` is the seconds by which its count is
    behind; `said` is the limit in its headers. Round trips take between the two `seconds`, and
    arrive somewhere within.
    """

    def __init__(
        self,
        *,
        limit: int = 300,
        period: float = 60.0,
        scope: Callable[[ApiKey], Any] = lambda key: None,
        seconds: tuple[float, float] = (0.0, 0.02),
        lag: float = 0.0,
        said: int | None = None,
        seed: int = 1,
    ) -> None:
        self.limit = limit
        self.said = said or limit
        self.period = period
        self.scope = scope
        self.seconds = seconds
        self.lag = lag
        self.random = random.Random(seed)
        self.windows: defaultdict[Any, deque[float]] = defaultdict(deque)
        self.served: list[tuple[float, str]] = []
        self.refused: list[tuple[float, str]] = []

    async def attempt(self, path: str, key: ApiKey, timeout: float) -> Response | Failure:
        whole = self.random.uniform(*self.seconds)
        travel = self.random.uniform(0.0, whole)
        await asyncio.sleep(travel)
        refused, headers = self.count(self.scope(key), key.name)
        await asyncio.sleep(whole - travel)
        body = b"{}" if refused else b'{"credits": 7, "account": {"credits": 7}}'
        return Response(429 if refused else 200, headers, body)

    def count(self, scope: Any, name: str) -> tuple[bool, dict[str, str]]:
        """Count a request that arrives, by the window as it was `lag` seconds ago."""
        window, when = self.windows[scope], now()
        while window and window[0] <= when - self.period:
            window.popleft()
        known = bisect_right(window, when - self.lag) if self.lag else len(window)
        refused = known >= self.limit
        if not refused:
            window.append(when)
            known += not self.lag
        (self.refused if refused else self.served).append((when, name))
        oldest = window[0] if window else when
        return refused, {
            "x-ratelimit-limit": str(self.said),
            "x-ratelimit-remaining": str(max(0, self.said - known)),
            "x-ratelimit-reset": str(math.ceil(oldest + self.period - when)),
        }

    def spend(self, requests: int, scope: Any = None) -> None:
        """Another client spends this many requests at once."""
        for _ in range(requests):
            self.count(scope, "others")

    def worst_window(self) -> int:
        times = sorted(when for when, _ in self.served)
        return max(
            (
                place + 1 - bisect_right(times, when - self.period)
                for place, when in enumerate(times)
            ),
            default=0,
        )

    async def close(self) -> None:
        pass


def fake_client(server: FakeServer | WindowServer, **options: Any) -> CreditsClient:
    return CreditsClient(_transport=server, **options)


def keys(count: int, prefix: str = "k") -> list[ApiKey]:
    return [
        ApiKey(f"secret-{prefix}-{number}", name=f"{prefix}{number}") for number in range(count)
    ]
