"""The text of a report for people: tables, totals and failures, in terminals of any width."""

from __future__ import annotations

import os
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from typing import TextIO

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from crustcredits._errors import CrustCreditsError
from crustcredits._models import Account, Balance, Outcome, Unknown
from crustcredits._report import Report

NOT_CHECKED = CrustCreditsError("not checked, because the check was interrupted; check again")
NARROWEST = 76  # columns; a narrower terminal wraps the lines, so that no digit is cut
LONGEST = 20  # characters of a number on one line; a balance may have over a hundred


def tables_of(report: Report, floor: Decimal | None) -> Iterator[RenderableType]:
    yield _keys_table(report, floor)
    if report.accounts:
        yield _accounts_table(report)
    failures = [outcome for outcome in report.failed if outcome.error is not NOT_CHECKED]
    if failures:
        yield Group(Text("Could not be checked", style="bold"), _failures_table(failures))
    # An account with 0 credits adds nothing, however often it is counted.
    alike = [
        outcome.key.label for group in report.lookalikes if group[0].credits for outcome in group
    ]
    if alike:
        share = (
            "if they share an account, declare it (ACCOUNT/NAME=SECRET), or the total counts "
            "it more than once"
        )
        yield Text(
            f"{len(alike)} keys have the same answer as another key, such as {alike[0]} and "
            f"{alike[1]}; {share}"
        )
    yield Text(total_line(report), style="bold")


def _failures_table(failures: list[Unknown]) -> Table:
    table = Table.grid(Column(max_width=30), Column(), padding=(0, 2, 0, 0))
    for outcome in failures:
        words = str(outcome.error).removeprefix(f"{outcome.key.label}: ")
        if outcome.attempts > 1:
            words += f"; attempts: {outcome.attempts}"
        table.add_row(_cell(outcome.key.label), Text(printable(words)))
    return table


def _keys_table(report: Report, floor: Decimal | None) -> Table:
    detail = any(isinstance(outcome.balance, Account) for outcome in report)
    details = ("grant", "next grant") if detail else ()
    table = plain_table("key", "credits", *details, "state")
    for outcome in report:
        about = [_cell(outcome.key.label), _number(outcome.credits)]
        table.add_row(
            *about, *(_grant(outcome.balance) if detail else ()), _state(report, outcome, floor)
        )
    return table


def _grant(balance: Balance | None) -> tuple[Text, Text]:
    if not isinstance(balance, Account) or not balance.recurring_credits:
        return Text(), Text()
    date = balance.recurring_credits_refresh_date
    grant = _number(balance.recurring_credits, balance.recurring_credits_frequency)
    return grant, Text("" if date is None else f"{date:%Y-%m-%d}")


def _state(report: Report, outcome: Outcome[Balance], floor: Decimal | None) -> Text:
    if isinstance(outcome, Unknown):
        return (
            Text("not checked", style="yellow")
            if outcome.error is NOT_CHECKED
            else Text("failed", style="red")
        )
    credits = report.credits_of(outcome)
    if credits <= 0 or credits < (floor or 0):
        return Text("empty" if credits <= 0 else "low", style="yellow")
    return Text("retried" if outcome.attempts > 1 else "ok", style="green")


def _accounts_table(report: Report) -> Table:
    keys = Counter(outcome.key.account for outcome in report)
    table = plain_table("account", "keys", "credits")
    for account, credits in report.accounts.items():
        table.add_row(_cell(account), str(keys[account]), _number(credits))
    return table


def total_line(report: Report) -> str:
    credits = report.total_credits
    unknown = sum(
        report.accounts.get(outcome.key.account or "") is None for outcome in report.failed
    )
    known = "unknown" if credits is None else f"{credits:,f} credits"
    return f"Total: {known}" + (f"; keys with unknown credits: {unknown}" if unknown else "")


def plain_table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in headers:
        # Only these columns may be narrowed, because their text may be long.
        names = header in {"key", "account"}
        table.add_column(
            header, justify="right" if header in {"keys", "credits"} else "left", no_wrap=not names
        )
    return table


def _cell(text: str) -> Text:
    return Text(printable(text), overflow="fold")


def _number(credits: Decimal | None, often: str | None = None) -> Text:
    words = "unknown" if credits is None else f"{credits:,f} {often or '':.20}"
    return Text("\n".join(textwrap.wrap(printable(words), LONGEST)))


def printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)


def console_of(stream: TextIO | None) -> Console:
    # Set explicitly, since FORCE_COLOR and the like would colour files.
    lively = stream is not None and stream.isatty() and not os.environ.get("NO_COLOR")
    return Console(file=stream, force_terminal=lively, highlight=False, emoji=False)


def print_parts(*parts: RenderableType) -> None:
    console = console_of(sys.stdout)
    console.width = max(console.width, NARROWEST)
    with console.capture() as capture:
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(part)
    echo(capture.get())


def echo(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), nl=False)


def say(text: str) -> None:
    typer.echo(f"crustcredits: {printable(text)}", err=True)
