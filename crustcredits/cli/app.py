"""The command line: `crustcredits demo` on a sandbox of its own, `crustcredits check` on your keys.

It owns options, exit statuses and what people see: the bar, the tables, the words. It must not know how a key is asked or
how calls are held back; both are the client's. Standard output carries the result, standard error everything else.
Secrets come from the environment, a file or standard input, never from an argument, and nothing here prints one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Annotated, Any, TextIO

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.table import Column, Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from crustcredits._client import CreditsClient
from crustcredits._errors import ConfigurationError, CrustCreditsError
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._keys.sources import keys_from_env, keys_from_file, keys_from_text
from crustcredits._models import Account, Balance, Outcome, Unknown
from crustcredits._ratelimit.config import RateLimit
from crustcredits._report import Report
from crustcredits._version import __version__
from crustcredits.testing import SandboxServer
from crustcredits.testing._demo import demo_pool

_LOW, _USAGE, _FAILED = 1, 2, 3
_UNWRITTEN, _INTERRUPTED, _CLOSED_PIPE = 74, 130, 141  # as sysexits.h has it, and 128 and the signal's number
_NOT_CHECKED = CrustCreditsError("not checked: interrupted before its answer came")
_NARROWEST = 76  # columns; on fewer the terminal wraps the lines, so that no digit is cut
_LONGEST = 20  # characters of a number on one line; a balance may have over a hundred


# Typer does not export the base of its errors about usage.
_UsageError: type[Exception] = typer.BadParameter.__base__ or Exception


class _WrongValueError(typer.BadParameter):
    """A value that cannot be used, in words of our own."""


def _without_values(parse: Callable[[], list[str]], context: Any) -> list[str]:
    """What `parse` returns; or a usage error that repeats no argument, because it may be a key in the wrong place."""
    try:
        return parse()
    except _WrongValueError:
        raise
    except typer.BadParameter as error:
        option: Any = error.param
        problem = f"Invalid value for '{option.opts[0]}': it takes {option.metavar}. {option.help}"
    except _UsageError as error:
        if getattr(error, "option_name", None) in {name for param in context.command.params for name in param.opts}:
            raise
        near = getattr(error, "possibilities", None)
        problem = "No such option; it is not repeated here, because it may be a key."
        if near:
            problem += f" Is {' or '.join(sorted(near))} meant?"
    raise _UsageError(problem, context)


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return _without_values(partial(super().parse_args, ctx, args), ctx)


class _Commands(TyperGroup):
    """Commands by their names. One that does not exist is not repeated either."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return _without_values(partial(super().parse_args, ctx, args), ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or ctx.fail("No such command.")


app: typer.Typer = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # they print local variables
    rich_markup_mode=None,  # its boxes keep their escape sequences with NO_COLOR
)
_SETTINGS = {"allow_extra_args": True}  # only to be refused without being repeated


def _positive(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise _WrongValueError("it is a finite number of seconds above 0.")
    return seconds


def _show_version(wanted: bool) -> None:
    if wanted:
        _echo(f"crustcredits {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    *, version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False
) -> None:
    """How many credits each of your Crustdata API keys has left."""


@app.command(cls=_Command, context_settings=_SETTINGS)
def demo(
    context: typer.Context,
    *,
    keys: Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="How many keys.")] = 120,
    window: Annotated[float, typer.Option(callback=_positive, metavar="SECONDS", help="In which 300 requests are allowed.")] = 60,
) -> None:
    """Check a made-up pool, broken here and there, on a stand-in for the API. Needs no key and no network; exits with 0."""
    with _exit_statuses(context):
        sandbox = SandboxServer(period=window, delay=(0.01, 0.12))
        run = _Run(demo_pool(sandbox, keys), detail=True)
        began = time.monotonic()
        run.finish(_rehearse(sandbox, run, RateLimit(period=window)))
        sent = f"Requests: {sandbox.requests} in {time.monotonic() - began:.1f} s, at most {sandbox.worst_window()} of 300 allowed"
        _print(*_tables(run.report(), None), Text(f"{sent} in any {window:g} s; 429s: {sandbox.refused}"))
        _leave(run, 0)


@app.command(cls=_Command, context_settings=_SETTINGS)
def check(
    context: typer.Context,
    *,
    keys_file: Annotated[str | None, typer.Option(metavar="PATH", help="Read keys from a file, or with - from stdin.")] = None,
    detail: Annotated[bool, typer.Option("--detail", help="Ask for grants and refresh dates too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_jsonl: Annotated[bool, typer.Option("--jsonl", help="Print a line of JSON for each key as its answer lands.")] = False,
    min_credits: Annotated[str | None, typer.Option(metavar="N", help="Exit with 1 when the account of a key holds fewer.")] = None,
    timeout: Annotated[float | None, typer.Option(callback=_positive, metavar="SECONDS", help="Time for them all.")] = None,
) -> None:
    """Check your keys, from CRUSTDATA_API_KEY and CRUSTDATA_API_KEYS or from a file.

    CRUSTDATA_API_KEYS and the file hold keys, one a line or divided by commas, each SECRET, NAME=SECRET or
    ACCOUNT/NAME=SECRET. The file may also be an env file with these variables, JSON or CSV, and CRUSTDATA_API_KEY_FILE and
    CRUSTDATA_API_KEYS_FILE name files in the variables' place. Keys of one account share its balance, which the total
    counts once.

    \b
    Exit status:
      0    every key was checked, and none is below --min-credits
      1    some key is below --min-credits
      2    wrong usage, no keys, or keys or settings that cannot be used
      3    some key could not be checked, whatever the others hold
      74   the result could not be written
      130  interrupted by Ctrl-C; what had landed is shown
    """  # noqa: D301  # \b keeps the lines below it as they are
    with _exit_statuses(context):
        if as_json and as_jsonl:
            context.fail("--json and --jsonl cannot be had together; give one of them.")
        floor = _floor(min_credits)
        run = _Run(_read_keys(keys_file), detail=detail, timeout=timeout, lines=as_jsonl)
        run.finish(run.check(CreditsClient(trust_env=True)))
        report = run.report()
        if as_json:
            _echo(json.dumps(report.to_dict(), indent=2) + "\n")
        elif not as_jsonl:
            _print(*_tables(report, floor))
        _leave(run, _FAILED if not report.ok else _LOW if floor is not None and report.low(floor) else 0)


@contextlib.contextmanager
def _exit_statuses(context: typer.Context) -> Iterator[None]:
    """What every command does with arguments, and with what may end it early."""
    if context.args:
        context.fail("Keys are not taken as arguments, which others can read; use CRUSTDATA_API_KEYS or --keys-file.")
    try:
        yield
    except ConfigurationError as error:
        _say(str(error))
        raise typer.Exit(_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except OSError as error:
        # Or the interpreter would try at its end to write what is left, and complain.
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):  # noqa: PTH123  # no path of a file is meant
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(_CLOSED_PIPE) from None
        _say(f"the result cannot be written: {error.strerror}")
        raise typer.Exit(_UNWRITTEN) from None


def _leave(run: _Run, status: int) -> None:
    if run.interrupted:
        _say(f"interrupted; {sum(key not in run.landed for key in run.pool)} of {len(run.pool)} keys were not checked")
    raise typer.Exit(_INTERRUPTED if run.interrupted else status)


def _floor(text: str | None) -> Decimal | None:
    with contextlib.suppress(InvalidOperation):  # as comparing NaN raises too
        floor = None if text is None else Decimal(text)
        if floor is None or 0 <= floor < math.inf:
            return floor
    raise typer.BadParameter("it is a number of credits, 0 or more.", param_hint="'--min-credits'")


def _read_keys(path: str | None) -> list[ApiKey]:
    pool = keys_from_env() if path is None else keys_from_text(_read_stdin()) if path == "-" else keys_from_file(path)
    if not pool:
        raise ConfigurationError("no keys found: set CRUSTDATA_API_KEY or CRUSTDATA_API_KEYS, or name a file with --keys-file")
    return pool


def _read_stdin() -> str:
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        return typer.get_binary_stream("stdin").read().decode("utf-8-sig")
    raise ConfigurationError("standard input cannot be read as UTF-8 text")


class _Run:
    """One check of a pool, and what has landed of it so far, however it ends."""

    def __init__(self, pool: list[ApiKey], *, detail: bool, timeout: float | None = None, lines: bool = False) -> None:
        self.pool = pool
        self.landed: dict[ApiKey | UnusableKey, Outcome[Balance]] = {}
        self.interrupted = False
        self.detail = detail
        self._timeout, self._lines = timeout, lines
        self._bar: _Bar | None = None

    async def check(self, client: CreditsClient) -> None:
        """Ask for every key, with a bar where there is a terminal for it, and close the client."""
        async with client:
            # Lines on the same terminal would run into the bar, and are progress enough.
            console = _console(sys.stderr)
            if console.is_interactive and not (self._lines and sys.stdout.isatty()):
                self._bar = _Bar(client, self, console)
            with self._bar or contextlib.nullcontext():
                await client.check(self.pool, detail=self.detail, timeout=self._timeout, on_outcome=self._land)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Let `work`, which checks, come to its end or to Ctrl-C."""
        try:
            asyncio.run(work)
        except KeyboardInterrupt:
            self.interrupted = True

    def report(self) -> Report:
        """What has landed, in the order of the pool; of the rest, that it was not checked."""
        now = datetime.now(UTC)
        return Report(self.landed.get(key) or Unknown(key=key, error=_NOT_CHECKED, checked_at=now) for key in self.pool)

    def _land(self, outcome: Outcome[Balance]) -> None:
        self.landed[outcome.key] = outcome
        if self._lines:
            _echo(json.dumps(outcome.to_dict()) + "\n")
        if self._bar is not None:
            self._bar.move()


async def _rehearse(sandbox: SandboxServer, run: _Run, limit: RateLimit) -> None:
    async with sandbox:
        await run.check(CreditsClient(base_url=sandbox.url, rate_limit=limit))


class _Bar(Progress):
    """How far a run has come, on standard error, and when the rate limit lets the last of it start."""

    def __init__(self, client: CreditsClient, run: _Run, console: Console) -> None:
        # Standard output may go elsewhere, so it is not led past the bar.
        super().__init__(BarColumn(24), MofNCompleteColumn(), _TimeLeft(), console=console, transient=True, redirect_stdout=False)
        self._client, self._run = client, run
        self._total = len(set(run.pool))
        self._task = self.add_task("", total=self._total)
        self.move()

    def move(self) -> None:
        """Show what has landed."""
        quota = self._client.quota(detail=self._run.detail)
        remaining = self._total - len(self._run.landed)
        to_come = max(0, remaining - quota.waiting - quota.in_flight)
        held = quota.waiting + to_come if quota.waiting else 0
        end = self.get_time() + quota.start_of(quota.waiting + to_come)
        self.update(self._task, completed=len(self._run.landed), held=held, end=end)


class _TimeLeft(ProgressColumn):
    def render(self, task: Task) -> Text:
        held = task.fields["held"]
        left = max(math.ceil(task.fields["end"] - task.get_time()), bool(held))
        words = f"ETA {timedelta(seconds=left)}" if left > 0 else "last answers"
        return Text(words + f", rate limit holds back {held}" * bool(held))


def _tables(report: Report, floor: Decimal | None) -> Iterator[RenderableType]:
    yield _keys_table(report, floor)
    if report.accounts:
        yield _accounts_table(report)
    failures = [outcome for outcome in report.failed if outcome.error is not _NOT_CHECKED]
    if failures:
        yield Group(Text("Could not be checked", style="bold"), _failures_table(failures))
    # What is 0 adds nothing, however often it is counted.
    alike = [outcome.key.label for group in report.lookalikes if group[0].credits for outcome in group]
    if alike:
        share = "if they share an account, declare it (ACCOUNT/NAME=SECRET), or the total counts it more than once"
        yield Text(f"{len(alike)} keys answer just like another one, such as {alike[0]} and {alike[1]}: {share}")
    yield Text(_total(report), style="bold")


def _failures_table(failures: list[Unknown]) -> Table:
    table = Table.grid(Column(max_width=30), Column(), padding=(0, 2, 0, 0))
    for outcome in failures:
        words = str(outcome.error).removeprefix(f"{outcome.key.label}: ")
        tries = f", after {outcome.attempts} tries" * (outcome.attempts > 1)
        table.add_row(_cell(outcome.key.label), Text(_printable(words + tries)))
    return table


def _keys_table(report: Report, floor: Decimal | None) -> Table:
    detail = any(isinstance(outcome.balance, Account) for outcome in report)
    table = _table("key", "credits", *("grant", "next grant") * detail, "state")
    for outcome in report:
        about = [_cell(outcome.key.label), _number(outcome.credits)]
        table.add_row(*about, *(_grant(outcome.balance) if detail else ()), _state(report, outcome, floor))
    return table


def _grant(balance: Balance | None) -> tuple[Text, Text]:
    if not isinstance(balance, Account) or not balance.recurring_credits:
        return Text(), Text()
    date = balance.recurring_credits_refresh_date
    grant = _number(balance.recurring_credits, balance.recurring_credits_frequency)
    return grant, Text("" if date is None else f"{date:%Y-%m-%d}")


def _state(report: Report, outcome: Outcome[Balance], floor: Decimal | None) -> Text:
    if isinstance(outcome, Unknown):
        return Text("not checked", style="yellow") if outcome.error is _NOT_CHECKED else Text("failed", style="red")
    credits = report.credits_of(outcome)
    if credits <= 0 or credits < (floor or 0):
        return Text("empty" if credits <= 0 else "low", style="yellow")
    return Text("retried" if outcome.attempts > 1 else "ok", style="green")


def _accounts_table(report: Report) -> Table:
    keys = Counter(outcome.key.account for outcome in report)
    table = _table("account", "keys", "credits")
    for account, credits in report.accounts.items():
        table.add_row(_cell(account), str(keys[account]), _number(credits))
    return table


def _total(report: Report) -> str:
    credits = report.total_credits
    unknown = sum(report.accounts.get(outcome.key.account or "") is None for outcome in report.failed)
    known = "unknown" if credits is None else f"{credits:,f} credits"
    return f"Total: {known}" + f"; keys of which nothing is known: {unknown}" * bool(unknown)


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        names = header in {"key", "account"}  # the only ones to be narrowed, because they may be long
        table.add_column(header, justify="right" if header in {"keys", "credits"} else "left", no_wrap=not names)
    return table


def _cell(text: str) -> Text:
    return Text(_printable(text), overflow="fold")


def _number(credits: Decimal | None, often: str | None = None) -> Text:
    words = "unknown" if credits is None else f"{credits:,f} {often or '':.20}"
    return Text("\n".join(textwrap.wrap(_printable(words), _LONGEST)))


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def _console(stream: TextIO | None) -> Console:
    # Said outright, or FORCE_COLOR and its like would colour files.
    lively = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
    return Console(file=stream, force_terminal=lively, highlight=False, emoji=False)


def _print(*parts: RenderableType) -> None:
    console = _console(sys.stdout)
    console.width = max(console.width, _NARROWEST)
    with console.capture() as capture:
        for number, part in enumerate(parts):
            console.print(*[""] * bool(number), part, sep="\n")
    _echo(capture.get())


def _echo(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), nl=False)


def _say(text: str) -> None:
    typer.echo(f"crustcredits: {_printable(text)}", err=True)
