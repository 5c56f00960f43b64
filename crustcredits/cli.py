"""The command line: `crustcredits demo` on a sandbox of its own, `crustcredits check` on your keys.

It owns options, exit statuses and what people see: the bar, the table, the words. It must not know how a key is asked or
how calls are held back; both are the client's. Standard output carries the result, standard error everything else.
Secrets come from the environment, a file or standard input, never from an argument, and nothing here prints one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import sys
import textwrap
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, TextIO

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from crustcredits._client import CreditsClient
from crustcredits._errors import ConfigurationError, CrustCreditsError
from crustcredits._keys import ApiKey, keys_from_env, keys_from_file, keys_from_text
from crustcredits._limits import RateLimit
from crustcredits._models import Account, Balance, Outcome
from crustcredits._report import Report
from crustcredits.testing import Fault, SandboxServer

_LOW, _USAGE, _FAILED, _INTERRUPTED, _CLOSED_PIPE = 1, 2, 3, 130, 141  # the last two are 128 and the signal's number

_NOT_CHECKED = CrustCreditsError("not checked: interrupted before its answer came")

_NARROWEST = 72  # columns; on fewer the terminal wraps the lines, so that no digit is cut
_LONGEST_NUMBER = 24  # characters on one line; a balance may have over a hundred


# --- the commands


class _Commands(TyperGroup):
    """Commands by their names. One that does not exist is not repeated: it may be a key in the wrong place."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or ctx.fail("No such command")


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables
    rich_markup_mode=None,  # its boxes keep their escape sequences with NO_COLOR
    help="How many credits each of your Crustdata API keys has left.",
)
# Arguments are taken only to be refused without being repeated.
_SETTINGS = {"allow_extra_args": True}


def _positive(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise typer.BadParameter("it is a finite number of seconds above 0")
    return seconds


_Keys = Annotated[int, typer.Option("--keys", min=1, max=100_000, metavar="N", help="How many keys.")]
_Window = Annotated[
    float, typer.Option("--window", callback=_positive, metavar="SECONDS", help="The rate limit's period, of 300 requests.")
]


@app.command(context_settings=_SETTINGS)
def demo(context: typer.Context, keys: _Keys = 120, window: _Window = 60.0) -> None:
    """Check a made-up pool on a stand-in for the API inside this process. Needs no key and no network.

    Some of its keys fail on purpose; the exit status is 0 all the same.
    """
    with _exit_statuses(context):
        sandbox = SandboxServer(period=window, delay=(0.01, 0.12))
        run = _Run(_demo_pool(sandbox, keys), detail=True)
        interrupted = _finish(_rehearse(sandbox, run, RateLimit(period=window)))
        _print(*_tables(run.report(), None), Text(_tally(sandbox, run, window)))
        _leave(run, interrupted=interrupted, status=0)


_KeysFile = Annotated[
    str | None, typer.Option("--keys-file", metavar="PATH", help="Read keys from this file, or with - from standard input.")
]
_Detail = Annotated[bool, typer.Option("--detail", help="Ask for grants and refresh dates too.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_Jsonl = Annotated[bool, typer.Option("--jsonl", help="Print a line of JSON for each key as its answer lands.")]
_MinCredits = Annotated[
    str | None, typer.Option("--min-credits", metavar="N", help="Exit with 1 when the account of some key holds fewer.")
]
_Timeout = Annotated[
    float | None,
    typer.Option("--timeout", callback=_positive, metavar="SECONDS", help="Time for all of it; what has no answer by then fails."),
]


@app.command(context_settings=_SETTINGS)
def check(
    context: typer.Context,
    keys_file: _KeysFile = None,
    detail: _Detail = False,
    as_json: _Json = False,
    as_jsonl: _Jsonl = False,
    min_credits: _MinCredits = None,
    timeout: _Timeout = None,
) -> None:
    """Check your keys, from CRUSTDATA_API_KEY and CRUSTDATA_API_KEYS or from a file.

    CRUSTDATA_API_KEYS and the file hold keys, one a line or divided by commas, each SECRET, NAME=SECRET or
    ACCOUNT/NAME=SECRET. Keys of one account share its balance, which the total counts once.

    \b
    Exit status:
      0    every key was checked, and none is below --min-credits
      1    some key is below --min-credits
      2    wrong usage, no keys, or keys or settings that cannot be used
      3    some key could not be checked: its credits are unknown,
           which is worse than 1 where both are true
      130  interrupted by Ctrl-C; what had landed is shown
    """  # noqa: D301  # \b keeps the lines below it as they are
    with _exit_statuses(context):
        if as_json and as_jsonl:
            context.fail("--json and --jsonl cannot be had together; give one of them")
        floor = _floor(min_credits)
        run = _Run(_read_keys(keys_file), detail=detail, timeout=timeout, lines=as_jsonl)
        interrupted = _finish(_ask(run))
        report = run.report()
        if as_json:
            _echo(json.dumps(report.to_dict(), indent=2) + "\n")
        elif not as_jsonl:
            _print(*_tables(report, floor))
        _leave(run, interrupted=interrupted, status=_status(report, floor))


@contextlib.contextmanager
def _exit_statuses(context: typer.Context) -> Iterator[None]:
    """What every command does with arguments, and with what may end it early."""
    if context.args:
        context.fail("Keys are not taken as arguments, which others can read; use CRUSTDATA_API_KEYS or --keys-file")
    try:
        yield
    except ConfigurationError as error:
        _say(str(error))
        raise typer.Exit(_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:
        # Or the interpreter would try once more to write what is left, at its end, and complain.
        for stream in (sys.stdout, sys.stderr):
            with open(os.devnull, "w") as nowhere, contextlib.suppress(OSError):  # noqa: PTH123, PLW1514
                os.dup2(nowhere.fileno(), stream.fileno())
        raise typer.Exit(_CLOSED_PIPE) from None


def _leave(run: _Run, *, interrupted: bool, status: int) -> None:
    if interrupted:
        _say(f"interrupted; {len(run.pool) - len(run.report().succeeded)} of {len(run.pool)} keys were not checked")
        status = _INTERRUPTED
    raise typer.Exit(status)


def _status(report: Report, floor: Decimal | None) -> int:
    if not report.ok:
        return _FAILED
    return _LOW if floor is not None and report.low(floor) else 0


def _floor(text: str | None) -> Decimal | None:
    try:
        floor = Decimal(text or 0)
    except InvalidOperation:
        floor = Decimal("NaN")
    if not floor.is_finite() or floor < 0:
        raise typer.BadParameter("it is a number of credits, 0 or more", param_hint="'--min-credits'")
    return None if text is None else floor


def _read_keys(path: str | None) -> list[ApiKey]:
    if path is None:
        pool = keys_from_env()
    else:
        pool = keys_from_text(_read_stdin()) if path == "-" else keys_from_file(path)
    if not pool:
        raise ConfigurationError("no keys found: set CRUSTDATA_API_KEY or CRUSTDATA_API_KEYS, or name a file with --keys-file")
    return pool


def _read_stdin() -> str:
    with contextlib.suppress(UnicodeDecodeError):
        return sys.stdin.buffer.read().decode("utf-8-sig")
    raise ConfigurationError("standard input cannot be read: it is not UTF-8 text")


# --- a run


class _Run:
    """One check of a pool, and what has landed of it so far, however it ends."""

    def __init__(self, pool: list[ApiKey], *, detail: bool, timeout: float | None = None, lines: bool = False) -> None:
        self.pool = pool
        self.landed: dict[ApiKey, Outcome[Balance]] = {}
        self.seconds = 0.0
        self._detail = detail
        self._timeout = timeout
        self._lines = lines

    async def check(self, client: CreditsClient) -> None:
        """Ask for every key, with a bar where there is a terminal for it."""
        # Lines on the same terminal would run into the bar, and are progress enough.
        shown = _is_lively(sys.stderr) and not (self._lines and sys.stdout.isatty())
        bar = _Bar(client, self, detail=self._detail) if shown else None
        loop = asyncio.get_running_loop()
        began = loop.time()

        def land(outcome: Outcome[Balance]) -> None:
            self.landed[outcome.key] = outcome
            if self._lines:
                _echo(json.dumps(outcome.to_dict()) + "\n")
            if bar is not None:
                bar.move()

        try:
            with bar or contextlib.nullcontext():
                await client.check(self.pool, detail=self._detail, timeout=self._timeout, on_outcome=land)
        finally:
            self.seconds = loop.time() - began

    def report(self) -> Report:
        """What has landed, in the order of the pool; of the rest, that it was not checked."""
        now = datetime.now(UTC)
        return Report(
            [self.landed.get(key) or Outcome(key=key, error=_NOT_CHECKED, checked_at=now, attempts=0) for key in self.pool]
        )


async def _ask(run: _Run) -> None:
    async with CreditsClient() as client:
        await run.check(client)


async def _rehearse(sandbox: SandboxServer, run: _Run, limit: RateLimit) -> None:
    async with sandbox, CreditsClient(base_url=sandbox.url, rate_limit=limit) as client:
        await run.check(client)


def _finish(work: Coroutine[Any, Any, None]) -> bool:
    """Run it to its end or to Ctrl-C; whether it was the latter."""
    try:
        asyncio.run(work)
    except KeyboardInterrupt:
        return True
    return False
