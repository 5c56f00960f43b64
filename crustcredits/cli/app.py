"""The command line: `crustcredits demo` on its own sandbox, `crustcredits check` on your keys.

This module owns options and exit statuses; requests and the rate limit are the client's. Standard
output carries the result, standard error everything else. Secrets come from the environment, a file
or standard input, never from an argument, and nothing here prints one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from crustcredits._client import CreditsClient
from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import ApiKey
from crustcredits._keys.sources import keys_from_env, keys_from_file, keys_from_text
from crustcredits._ratelimit.config import RateLimit
from crustcredits._version import __version__
from crustcredits.cli.run import Run, rehearse
from crustcredits.cli.tables import echo, print_parts, say, tables_of
from crustcredits.testing import SandboxServer
from crustcredits.testing._demo import demo_pool

_LOW, _USAGE, _FAILED = 1, 2, 3
# As in sysexits.h, and 128 plus the signal's number.
_UNWRITTEN, _INTERRUPTED, _CLOSED_PIPE = 74, 130, 141


# Typer does not export the base class of its usage errors.
_UsageError: type[Exception] = typer.BadParameter.__base__ or Exception


class _WrongValueError(typer.BadParameter):
    """An unusable value, with this module's own message."""


def _without_values(parse: Callable[[], list[str]], context: Any) -> list[str]:
    """Return the result of `parse`, or raise a usage error that repeats no argument.

    An argument may be a key in the wrong place.
    """
    try:
        return parse()
    except _WrongValueError:
        raise
    except typer.BadParameter as error:
        option: Any = error.param
        problem = f"Invalid value for '{option.opts[0]}': {_accepted(option)}"
    except _UsageError as error:
        if getattr(error, "option_name", None) in {
            name for param in context.command.params for name in param.opts
        }:
            raise
        near = getattr(error, "possibilities", None)
        problem = "No such option; its text is not repeated, because it may be a key."
        if near:
            problem += f" Is {' or '.join(sorted(near))} meant?"
    raise _UsageError(problem, context)


def _accepted(option: Any) -> str:
    """The values that a numeric option takes."""
    most = getattr(option, "max", None)
    return _SECONDS if most is None else f"it must be a whole number from {option.min} to {most}."


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return _without_values(partial(super().parse_args, ctx, args), ctx)


class _Commands(TyperGroup):
    """Commands by their names. An unknown name is not repeated either."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            echo(f"{ctx.get_help()}\n")
            ctx.exit()
        return _without_values(partial(super().parse_args, ctx, args), ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or ctx.fail(
            "No such command; its text is not repeated, because it may be a key. "
            f"Use {' or '.join(self.list_commands(ctx))}."
        )


app: typer.Typer = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,  # they print local variables
    rich_markup_mode=None,  # its boxes contain escape sequences even with NO_COLOR
)
_SECONDS = "it must be a finite number of seconds above 0."
_SETTINGS = {"allow_extra_args": True}  # only to refuse them without repeating them


def _positive(seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise _WrongValueError(_SECONDS)
    return seconds


def _show_version(wanted: bool) -> None:
    if wanted:
        echo(f"crustcredits {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """How many credits each of your Crustdata API keys has left."""


@app.command(cls=_Command, context_settings=_SETTINGS)
def demo(
    context: typer.Context,
    *,
    keys: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Number of keys.")
    ] = 120,
    window: Annotated[
        float,
        typer.Option(
            callback=_positive, metavar="SECONDS", help="Period of the limit of 300 requests."
        ),
    ] = 60,
) -> None:
    """Check a made-up pool with some broken keys on a sandbox of the API.

    Needs no key and no network; exits with 0.
    """
    with _exit_statuses(context):
        sandbox = SandboxServer(period=window, delay=(0.01, 0.12))
        run = Run(demo_pool(sandbox, keys), detail=True)
        began = time.monotonic()
        run.finish(rehearse(sandbox, run, RateLimit(period=window)))
        sent = (
            f"Requests: {sandbox.requests} in {time.monotonic() - began:.1f} s, at most "
            f"{sandbox.worst_window()} of 300 allowed"
        )
        print_parts(
            *tables_of(run.report(), None),
            Text(f"{sent} in any {window:g} s; refused (429): {sandbox.refused}"),
        )
        _leave(run, 0)


@app.command(cls=_Command, context_settings=_SETTINGS)
def check(
    context: typer.Context,
    *,
    keys_file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Read keys from a file, or with - from standard input."),
    ] = None,
    detail: Annotated[
        bool, typer.Option("--detail", help="Show grants and refresh dates too.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    as_jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a line of JSON for each key as its answer lands.")
    ] = False,
    min_credits: Annotated[
        str | None,
        typer.Option(metavar="N", help="Exit with 1 if the account of a key holds fewer credits."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(callback=_positive, metavar="SECONDS", help="Time limit for all keys."),
    ] = None,
) -> None:
    """Check your keys, from CRUSTDATA_API_KEY and CRUSTDATA_API_KEYS or from a file.

    CRUSTDATA_API_KEYS and the file hold keys, one a line or divided by commas, each SECRET,
    NAME=SECRET or ACCOUNT/NAME=SECRET. The file may also be an env file with these variables, JSON
    or CSV, and CRUSTDATA_API_KEY_FILE and CRUSTDATA_API_KEYS_FILE name files in the variables'
    place. Keys of one account share its balance, which the total counts once.

    \b
    Exit status:
      0    every key was checked, and none is below --min-credits
      1    some key is below --min-credits
      2    wrong usage, no keys, or keys or settings that cannot be used
      3    some key could not be checked, regardless of the others
      74   the result could not be written
      130  interrupted by Ctrl-C; the results so far are shown
    """  # noqa: D301  # \b keeps the line breaks below it
    with _exit_statuses(context):
        if as_json and as_jsonl:
            context.fail("--json and --jsonl exclude each other; give one of them.")
        floor = _floor(min_credits)
        run = Run(_read_keys(keys_file), detail=detail, timeout=timeout, lines=as_jsonl)
        run.finish(run.check(CreditsClient(trust_env=True)))
        report = run.report()
        if as_json:
            echo(json.dumps(report.to_dict(), indent=2) + "\n")
        elif not as_jsonl:
            print_parts(*tables_of(report, floor))
        if not report.ok:
            _leave(run, _FAILED)
        else:
            _leave(run, _LOW if floor is not None and report.low(floor) else 0)


@contextlib.contextmanager
def _exit_statuses(context: typer.Context) -> Iterator[None]:
    """Refuse arguments, and turn errors and interruptions into exit statuses."""
    if context.args:
        context.fail(
            "Keys cannot be arguments, because other users can read these; use "
            "CRUSTDATA_API_KEYS or --keys-file."
        )
    try:
        yield
    except ConfigurationError as error:
        say(str(error))
        raise typer.Exit(_USAGE) from None
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None
    except OSError as error:
        # Otherwise the interpreter would try to write the rest at its end, and complain.
        with open(os.devnull, "wb") as nowhere, contextlib.suppress(OSError):  # noqa: PTH123  # not the path of a file
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(_CLOSED_PIPE) from None
        say(f"the result cannot be written ({error.strerror}); write it elsewhere, or free space")
        raise typer.Exit(_UNWRITTEN) from None


def _leave(run: Run, status: int) -> None:
    if run.interrupted:
        say(
            f"interrupted; {sum(key not in run.landed for key in run.pool)} of "
            f"{len(run.pool)} keys were not checked; check again"
        )
    raise typer.Exit(_INTERRUPTED if run.interrupted else status)


def _floor(text: str | None) -> Decimal | None:
    with contextlib.suppress(InvalidOperation):  # comparing NaN raises too
        floor = None if text is None else Decimal(text)
        if floor is None or 0 <= floor < math.inf:
            return floor
    raise typer.BadParameter(
        "it must be a number of credits, 0 or more.", param_hint="'--min-credits'"
    )


def _read_keys(path: str | None) -> list[ApiKey]:
    if path is None:
        pool = keys_from_env()
    elif path == "-":
        pool = keys_from_text(_read_stdin())
    else:
        pool = keys_from_file(path)
    if not pool:
        raise ConfigurationError(
            "no keys found; set CRUSTDATA_API_KEY or CRUSTDATA_API_KEYS, or name a file with "
            "--keys-file"
        )
    return pool


def _read_stdin() -> str:
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        return typer.get_binary_stream("stdin").read().decode("utf-8-sig")
    raise ConfigurationError("standard input cannot be read as UTF-8 text; give the keys as UTF-8")
