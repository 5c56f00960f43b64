"""One run of a check on the command line: its progress bar on standard error, and its report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from crustcredits._client import CreditsClient
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._models import Balance, Outcome, Unknown
from crustcredits._ratelimit.config import RateLimit
from crustcredits._report import Report
from crustcredits.cli.tables import NOT_CHECKED, console_of, echo
from crustcredits.testing import SandboxServer


class Run:
    """One check of a pool, and its outcomes so far, however it ends."""

    def __init__(
        self, pool: list[ApiKey], *, detail: bool, timeout: float | None = None, lines: bool = False
    ) -> None:
        self.pool = pool
        self.landed: dict[ApiKey | UnusableKey, Outcome[Balance]] = {}
        self.interrupted: bool = False
        self.detail = detail
        self._timeout, self._lines = timeout, lines
        self._bar: Bar | None = None

    async def check(self, client: CreditsClient) -> None:
        """Check every key, with a progress bar on an interactive terminal, and close the client."""
        async with client:
            # Lines on the same terminal would run into the bar, and show progress themselves.
            console = console_of(sys.stderr)
            if console.is_interactive and not (self._lines and sys.stdout.isatty()):
                self._bar = Bar(client, self, console)
            with self._bar or contextlib.nullcontext():
                await client.check(
                    self.pool, detail=self.detail, timeout=self._timeout, on_outcome=self._land
                )

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work`, which checks the pool, until its end or Ctrl-C."""
        try:
            asyncio.run(work)
        except KeyboardInterrupt:
            self.interrupted = True

    def report(self) -> Report:
        """Return the outcomes so far, in the order of the pool; the rest are "not checked"."""
        now = datetime.now(UTC)
        return Report(
            self.landed.get(key) or Unknown(key=key, error=NOT_CHECKED, checked_at=now)
            for key in self.pool
        )

    def _land(self, outcome: Outcome[Balance]) -> None:
        self.landed[outcome.key] = outcome
        if self._lines:
            echo(json.dumps(outcome.to_dict()) + "\n")
        if self._bar is not None:
            self._bar.move()


async def rehearse(sandbox: SandboxServer, run: Run, limit: RateLimit) -> None:
    async with sandbox:
        await run.check(CreditsClient(base_url=sandbox.url, rate_limit=limit))


class Bar(Progress):
    """Progress of a run on standard error, with the time until its last call may start."""

    def __init__(self, client: CreditsClient, run: Run, console: Console) -> None:
        # Standard output may be redirected, so the bar leaves it unchanged.
        super().__init__(
            BarColumn(24),
            MofNCompleteColumn(),
            TimeLeft(),
            console=console,
            transient=True,
            redirect_stdout=False,
        )
        self._client, self._run = client, run
        self._count = len(set(run.pool))
        self._task = self.add_task("", total=self._count)
        self.move()

    def move(self) -> None:
        """Show the outcomes so far."""
        quota = self._client.quota(detail=self._run.detail)
        remaining = self._count - len(self._run.landed)
        to_come = max(0, remaining - quota.waiting - quota.in_flight)
        held = quota.waiting + to_come if quota.waiting else 0
        end = self.get_time() + quota.start_of(quota.waiting + to_come)
        self.update(self._task, completed=len(self._run.landed), held=held, end=end)


class TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        held = task.fields["held"]
        left = max(math.ceil(task.fields["end"] - task.get_time()), bool(held))
        words = f"ETA {timedelta(seconds=left)}" if left > 0 else "last answers"
        return Text(f"{words}, rate limit holds back {held}" if held else words)
