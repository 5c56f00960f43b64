"""The command line: its output, its exit statuses, and the secrets that it never prints."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pytest
import typer
from rich.cells import cell_len
from rich.progress import Task, TaskID
from typer.testing import CliRunner

from crustcredits import (
    Account,
    ApiKey,
    CreditsClient,
    CrustCreditsError,
    Known,
    Outcome,
    RateLimit,
    Report,
    Unknown,
    __version__,
    cli,
)
from crustcredits.__main__ import main
from crustcredits.cli import tables
from crustcredits.cli.run import Bar, Run, TimeLeft
from crustcredits.testing import Fault, SandboxServer
from tests.servers import forget

pytestmark = pytest.mark.own_loops

NOW = datetime(2026, 1, 2, tzinfo=UTC)


Stream: TypeAlias = TextIO | None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "CRUSTDATA_API_KEY",
        "CRUSTDATA_API_KEYS",
        "CRUSTDATA_API_URL",
        "NO_COLOR",
        "FORCE_COLOR",
        "COLORTERM",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxServer]:
    """A sandbox on a loop of its own, because the command line brings one too.

    `CRUSTDATA_API_URL` names it.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = SandboxServer()
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(5)
    monkeypatch.setenv("CRUSTDATA_API_URL", server.url)
    yield server
    asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Result:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.out = out
        self.err = err
        self.lines = out.splitlines()


def run(*arguments: str, given: bytes = b"", **environ: str) -> Result:
    result = CliRunner(env=environ).invoke(cli.app, arguments, input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def run_main(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, out: Stream = None, err: Stream = None
) -> int:
    monkeypatch.setattr(sys, "argv", ["crustcredits", *arguments])
    monkeypatch.setattr(sys, "stdout", out if out is not None else io.StringIO())
    monkeypatch.setattr(sys, "stderr", err if err is not None else io.StringIO())
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def entries(*keys: ApiKey) -> str:
    return "\n".join(f"{key.label}={key.get_secret_value()}" for key in keys)


def row(result: Result, name: str) -> str:
    return next(" ".join(line.split()) for line in result.lines if line.startswith(name + " "))


def widest(text: str) -> int:
    return max(map(cell_len, text.splitlines()))


def outcome(name: str, credits: str | None = None, **fields: Any) -> Outcome[Account]:
    key = ApiKey(
        f"a-secret-of-some-length-{len(name)}-{hash(name)}",
        name=name,
        account=fields.pop("account", None),
    )
    error = fields.pop("error", None)
    balance = (
        None
        if credits is None
        else Account(key=key, credits=Decimal(credits), checked_at=NOW, **fields)
    )
    return (
        Unknown(key=key, error=error, attempts=1)
        if balance is None
        else Known(balance=balance, error=error)
    )


def show(*outcomes: Outcome[Account], floor: Decimal | None = None) -> str:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        tables.print_parts(*tables.tables_of(Report(outcomes), floor))
    return stream.getvalue()


# --- demo


@pytest.mark.parametrize("columns", [80, 120])
def test_the_demo_fits_the_width(columns: int) -> None:
    """At 80 and 120 columns no line is longer, no name is cut, no escape sequence is there."""
    result = run("demo", COLUMNS=str(columns))
    assert result.status == 0
    assert result.err == ""
    assert widest(result.out) <= columns
    assert "…" not in result.out
    assert "\x1b" not in result.out
    assert row(result, "keystone/batch").startswith("keystone/batch 6,554,897 ok")


def test_the_demo_shows_every_kind_of_key() -> None:
    """Good, empty, retried and failed keys, totals by account, failures, and requests sent."""
    result = run("demo", "--keys", "40")
    assert row(result, "alpine/prod").endswith(" ok")
    assert row(result, "boreal/prod").endswith(" retried")
    assert row(result, "cascade/prod").startswith("cascade/prod 0 ")
    assert row(result, "cascade/prod").endswith(" empty")
    assert "contoso/prod unknown failed" in " ".join(result.out.split())
    assert row(result, "waystar") == "waystar 1 unknown"
    assert row(result, "alpine") == "alpine 1 17,041,325"
    assert "Total: 281,552,662.24 credits; keys with unknown credits: 3\n" in result.out
    assert "contoso/prod the API does not know the key (Invalid API key in request); " in " ".join(
        result.out.split()
    )
    assert result.lines[-1].startswith("Requests: 45 in ")
    assert result.lines[-1].endswith(", at most 45 of 300 allowed in any 60 s; refused (429): 0")


def test_the_demo_takes_another_window() -> None:
    """`--window` is the period of the sandbox and of the client."""
    result = run("demo", "--keys", "3", "--window", "0.5")
    assert result.lines[-1].endswith("of 300 allowed in any 0.5 s; refused (429): 0")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--keys", "0"),
        ("--keys", "x"),
        ("--window", "0"),
        ("--window", "-1"),
        ("--window", "nan"),
        ("--window", "inf"),
    ],
)
def test_the_demo_refuses_unusable_numbers(arguments: tuple[str, str]) -> None:
    """A usage error names the option, with status 2."""
    result = run("demo", *arguments)
    assert result.status == 2
    assert result.out == ""
    assert f"Invalid value for '{arguments[0]}'" in result.err


# --- check: the table


def test_check_prints_a_table_of_credits(api: SandboxServer) -> None:
    """Labels, credits and states; each declared account once in the total."""
    api.add_account("acme", credits=Decimal("138940.37"))
    pool = [
        api.add_key("prod", account="acme"),
        api.add_key("ci", account="acme"),
        api.add_key("solo", credits=0),
    ]
    result = run("check", CRUSTDATA_API_KEYS=entries(*pool))
    assert (result.status, result.err) == (0, "")
    assert [" ".join(line.split()) for line in result.lines] == [
        "key credits state",
        "─" * 28,
        "acme/prod 138,940.37 ok",
        "acme/ci 138,940.37 ok",
        "solo 0 empty",
        "",
        "account keys credits",
        "─" * 25,
        "acme 2 138,940.37",
        "",
        "Total: 138,940.37 credits",
    ]
    assert {arrival.path for arrival in api.arrivals} == {"/user/credits"}


def test_detail_shows_grants(api: SandboxServer) -> None:
    """Each account's grant with its next date, and nothing where there is none."""
    grant = {"recurring_credits": 5000, "recurring_credits_frequency": "monthly"}
    api.add_account(
        "acme", credits=7, **grant, recurring_credits_refresh_date="2026-09-01T00:00:00Z"
    )
    api.add_account("bare", credits=7, **grant)
    pool = [
        api.add_key(account="acme", name="a"),
        api.add_key(account="bare", name="b"),
        api.add_key("c"),
    ]
    result = run("check", "--detail", CRUSTDATA_API_KEYS=entries(*pool))
    assert row(result, "key") == "key credits grant next grant state"
    assert row(result, "acme/a") == "acme/a 7 5,000 monthly 2026-09-01 ok"
    assert row(result, "bare/b") == "bare/b 7 5,000 monthly ok"
    assert row(result, "c") == "c 1,000 ok"


def test_unknown_is_not_zero(api: SandboxServer) -> None:
    """If no key is known, credits and total are unknown."""
    key = ApiKey("not-known-to-anyone", name="lost", account="acme")
    result = run("check", CRUSTDATA_API_KEYS=entries(key))
    assert result.status == 3
    assert row(result, "acme/lost") == "acme/lost unknown failed"
    assert row(result, "acme") == "acme 1 unknown"
    assert "Total: unknown; keys with unknown credits: 1\n" in result.out


def test_a_failure_shows_its_number_of_tries(api: SandboxServer) -> None:
    """A failure after retries says how often it was tried."""
    key = api.add_key("down")
    api.fail(key, Fault.BAD_GATEWAY)
    result = run("check", CRUSTDATA_API_KEYS=entries(key))
    said = "down the API or a gateway before it failed; try again later (HTTP 502); attempts: 4"
    assert said in " ".join(result.out.split())


def test_lookalikes_are_named() -> None:
    """Keys that may share an undeclared account, because the total counts it for each of them."""
    out = show(outcome("a", "5"), outcome("b", "5"), outcome("c", "0"), outcome("d", "0"))
    assert "2 keys have the same answer as another key, such as a and b; if they share an" in out
    assert "ACCOUNT/NAME=SECRET" in out


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_credits_are_never_cut(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep every digit on a line of their own, or are folded when absurdly long.

    Long names are folded beside them.
    """
    monkeypatch.setenv("COLUMNS", str(columns))
    name, digits = "a-very-long-name-" * 5, "123456789" * 7
    grant: dict[str, Any] = {
        "recurring_credits": Decimal(50_000),
        "recurring_credits_frequency": "monthly\x1b[31m",
    }
    out = show(
        outcome(
            name, "98765432101.345", account="b" * 60, recurring_credits_refresh_date=NOW, **grant
        ),
        outcome("absurd", digits),
        outcome("c" * 60, error=CrustCreditsError("wrong " * 30, key_name="c" * 60)),
    )
    assert widest(out) <= max(columns, 76)
    assert "\x1b" not in out
    first = next(line for line in out.splitlines() if line.startswith("bbb"))
    assert first.split()[1:] == [
        "98,765,432,101.345",
        "50,000",
        "monthly",
        "[31m",
        "2026-01-02",
        "ok",
    ]
    assert f"{int(digits):,}" in "".join(
        re.findall(r"(?<= )[\d,]{3,}(?= )", out[out.index("absurd") :])
    )
    assert out.count("wrong") == 30


def test_markup_and_escapes_are_printed_literally() -> None:
    """Neither a name nor the server's text can colour or move anything."""
    error = CrustCreditsError(
        "[bold]no[/bold] :smile: \x1b[31mred\x1b[0m", key_name="[link]/[red]x[/red]"
    )
    out = show(
        outcome("[red]x[/red]", error=error, account="[link]"),
        outcome("[/]", "1", account="[b]c[b]"),
    )
    assert "\x1b" not in out
    assert "[link]/[red]x[/red]  [bold]no[/bold] :smile:  [31mred [0m" in out
    assert "[b]c[b]/[/] " in out


# --- check: where keys come from


def test_keys_are_read_from_a_file(api: SandboxServer, tmp_path: Path) -> None:
    """`--keys-file` reads keys from a file, and ignores the environment's."""
    path = tmp_path / "keys.txt"
    path.write_text(f"# ours\n{entries(api.add_key('a'), api.add_key('b'))}\n")
    result = run(
        "check",
        "--json",
        "--keys-file",
        str(path),
        CRUSTDATA_API_KEY=api.add_key().get_secret_value(),
    )
    assert [each["key"] for each in json.loads(result.out)["outcomes"]] == ["a", "b"]


def test_keys_are_read_from_standard_input(api: SandboxServer) -> None:
    """`--keys-file -` reads them from standard input, with or without a byte-order mark."""
    result = run(
        "check",
        "--json",
        "--keys-file",
        "-",
        given=b"\xef\xbb\xbf" + entries(api.add_key("a")).encode(),
    )
    assert [each["key"] for each in json.loads(result.out)["outcomes"]] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (
            (),
            b"",
            (
                "no keys found; set CRUSTDATA_API_KEY or CRUSTDATA_API_KEYS, or name a file with "
                "--keys-file"
            ),
        ),
        (
            ("--keys-file", "-"),
            b"# none\n",
            "no keys found; set CRUSTDATA_API_KEY or CRUSTDATA_API_KEYS",
        ),
        (("--keys-file", "-"), b"\xff\xfe\x00", "standard input cannot be read as UTF-8 text"),
        (
            ("--keys-file", "-"),
            b"a=fine-secret\nb=two words-secret\n",
            "line 2: the API key holds white space",
        ),
        (
            ("--keys-file", "no/such/file"),
            b"",
            "the keys file 'no/such/file' cannot be read: No such file or directory",
        ),
    ],
)
def test_without_usable_keys_the_status_is_2(
    arguments: tuple[str, ...], given: bytes, said: str
) -> None:
    """One line on standard error names the problem or the remedy, and no secret."""
    result = run("check", *arguments, given=given)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(f"crustcredits: {said}")
    assert result.err.count("\n") == 1
    assert "secret" not in result.err


def test_an_unusable_url_is_a_usage_error() -> None:
    """One line names `CRUSTDATA_API_URL`, with status 2."""
    result = run("check", CRUSTDATA_API_KEY="some-secret", CRUSTDATA_API_URL="http://example.com")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("crustcredits: CRUSTDATA_API_URL is plain http")


# --- check: exit statuses


@pytest.mark.parametrize(
    ("floor", "status", "state"), [("1000", 0, "ok"), ("1000.01", 1, "low"), ("0", 0, "ok")]
)
def test_a_key_below_the_minimum_makes_the_status_1(
    api: SandboxServer, floor: str, status: int, state: str
) -> None:
    """`--min-credits` compares exactly."""
    result = run(
        "check", "--min-credits", floor, CRUSTDATA_API_KEYS=entries(api.add_key("a", credits=1000))
    )
    assert result.status == status
    assert row(result, "a") == f"a 1,000 {state}"


def test_a_failed_check_outweighs_a_low_key(api: SandboxServer) -> None:
    """The status is 3 when some key could not be checked, also when another is low."""
    pool = [api.add_key("a", credits=1), ApiKey("not-known-to-anyone", name="lost")]
    result = run("check", "--min-credits", "5", CRUSTDATA_API_KEYS=entries(*pool))
    assert result.status == 3
    assert row(result, "a") == "a 1 low"


@pytest.mark.parametrize("floor", ["nan", "-1", "inf", "many"])
def test_an_unusable_minimum_is_a_usage_error(floor: str) -> None:
    """`--min-credits` takes a number of 0 or more."""
    result = run("check", "--min-credits", floor, CRUSTDATA_API_KEY="some-secret")
    assert (result.status, result.out) == (2, "")
    assert (
        "Invalid value for '--min-credits': it must be a number of credits, 0 or more."
        in result.err
    )


def test_json_and_jsonl_exclude_each_other() -> None:
    """Both at once is a usage error."""
    result = run("check", "--json", "--jsonl", CRUSTDATA_API_KEY="some-secret")
    assert (result.status, result.out) == (2, "")
    assert "--json and --jsonl exclude each other" in result.err


def test_a_key_without_an_answer_in_time_has_failed(api: SandboxServer) -> None:
    """With `--timeout`.

    The other keys' answers are shown.
    """
    silent, good = api.add_key("silent"), api.add_key("good")
    api.fail(silent, Fault.SILENCE)
    result = run("check", "--timeout", "0.3", CRUSTDATA_API_KEYS=entries(silent, good))
    assert result.status == 3
    assert row(result, "good") == "good 1,000 ok"
    assert "silent no whole answer within 0." in " ".join(result.out.split())


def test_help_documents_the_exit_statuses() -> None:
    """`check --help` lists every status and fits 80 columns."""
    result = run("check", "--help")
    assert result.status == 0
    assert [line.split()[0] for line in result.lines if line.startswith("    ")] == [
        "0",
        "1",
        "2",
        "3",
        "74",
        "130",
    ]
    assert widest(result.out) <= 80


# --- check: documents


def test_json_prints_one_document(api: SandboxServer) -> None:
    """The report's `to_dict()`, with the account's fields with `--detail`, and nothing else."""
    pool = [api.add_key("a", credits=Decimal("0.10")), ApiKey("not-known-to-anyone", name="lost")]
    result = run("check", "--json", "--detail", CRUSTDATA_API_KEYS=entries(*pool))
    assert (result.status, result.err) == (3, "")
    document = json.loads(result.out)
    assert (document["succeeded"], document["failed"], document["total_credits"]) == (1, 1, "0.10")
    assert document["outcomes"][0]["recurring_credits"] == "0"
    assert document["outcomes"][1]["error"]["type"] == "InvalidKeyError"


def test_jsonl_prints_a_line_for_each_outcome(api: SandboxServer) -> None:
    """A line for each key as it lands, so a slow one comes last."""
    slow, good = api.add_key("slow"), api.add_key("good")
    api.fail(slow, Fault.UNAVAILABLE, times=1)
    result = run("check", "--jsonl", CRUSTDATA_API_KEYS=entries(slow, good))
    assert (result.status, result.err) == (0, "")
    assert [json.loads(line)["key"] for line in result.lines] == ["good", "slow"]


# --- secrets


@pytest.mark.parametrize(
    "arguments",
    [
        ("sk-very-secret",),
        ("--sk-very-secret",),
        ("check", "sk-very-secret"),
        ("demo", "sk-very-secret"),
        ("check", "--key=sk-very-secret"),
        ("check", "--sk-very-secret"),
        ("check", "--sk-very-secret=x"),
        ("check", "-sk-very-secret"),
        ("check", "--", "--sk-very-secret"),
        ("check", "--keys-file", "sk-very-secret"),
        ("check", "--keys-file", "sk-very-secret,sk-more-secret"),
        ("check", "--timeout", "sk-very-secret"),
        ("check", "--min-credits", "sk-very-secret"),
        ("check", "--json=sk-very-secret"),
        ("demo", "--keys", "sk-very-secret"),
        ("demo", "--window", "sk-very-secret"),
    ],
)
def test_a_secret_in_a_wrong_place_is_not_repeated(arguments: tuple[str, ...]) -> None:
    """A key given as an argument is refused, with status 2, and is not in the message."""
    result = run(*arguments)
    assert result.status == 2
    assert "secret" not in result.out + result.err


@pytest.mark.parametrize("option", [(), ("--json",), ("--jsonl",), ("--detail",)])
def test_no_secret_is_printed(api: SandboxServer, option: tuple[str, ...]) -> None:
    """For good, failed and unusable keys."""
    pool = [
        api.add_key("a", secret="sk-good-secret"),
        ApiKey("sk-lost-secret", name="b"),
        ApiKey("sk-bare-secret"),
    ]
    result = run(
        "check",
        *option,
        CRUSTDATA_API_KEYS=entries(*pool[:2]),
        CRUSTDATA_API_KEY=pool[2].get_secret_value(),
    )
    assert result.status == 3
    assert "sk-" not in result.out + result.err


# --- terminals


def test_a_terminal_gets_colour_and_a_progress_bar(
    api: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is coloured.

    The bar is on standard error only, and gone at the end.
    """
    out, err = Terminal(), Terminal()
    monkeypatch.setenv("CRUSTDATA_API_KEYS", entries(api.add_key("a"), api.add_key("b")))
    assert run_main(monkeypatch, "check", out=out, err=err) == 0
    assert "\x1b[32mok" in out.getvalue()
    assert "2/2" in err.getvalue()
    assert err.getvalue().endswith("\r\x1b[1A\x1b[2K")


def test_no_color_is_respected(api: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `NO_COLOR` there is no escape sequence and no bar, on a terminal or not."""
    out, err = Terminal(), Terminal()
    monkeypatch.setenv("CRUSTDATA_API_KEYS", entries(api.add_key("a")))
    monkeypatch.setenv("NO_COLOR", "1")
    assert run_main(monkeypatch, "check", out=out, err=err) == 0
    assert "\x1b" not in out.getvalue()
    assert err.getvalue() == ""


def test_a_file_is_never_coloured(api: SandboxServer) -> None:
    """Not even when `FORCE_COLOR` is set."""
    result = run("check", CRUSTDATA_API_KEYS=entries(api.add_key("a")), FORCE_COLOR="1")
    assert "\x1b" not in result.out + result.err


def test_json_lines_on_a_terminal_replace_the_bar(
    api: SandboxServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines on a terminal show the progress; when they go to a file there is a bar."""
    monkeypatch.setenv("CRUSTDATA_API_KEYS", entries(api.add_key("a")))
    beside, err = Terminal(), Terminal()
    assert run_main(monkeypatch, "check", "--jsonl", out=Terminal(), err=beside) == 0
    assert beside.getvalue() == ""
    assert run_main(monkeypatch, "check", "--jsonl", out=io.StringIO(), err=err) == 0
    assert "1/1" in err.getvalue()


@pytest.mark.parametrize(
    ("end", "held", "words"),
    [
        (61.2, 0, "ETA 0:01:02"),
        (0.2, 0, "ETA 0:00:01"),
        (0.0, 0, "last answers"),
        (5.0, 7, "ETA 0:00:05, rate limit holds back 7"),
    ],
)
def test_the_bar_shows_the_time_left(end: float, held: int, words: str) -> None:
    """The time until the last call may start, and the number of delayed calls."""
    task = Task(TaskID(0), "", 10, 0, lambda: 0.0, fields={"end": end, "held": held})
    assert TimeLeft().render(task).plain == words


async def test_the_time_left_follows_the_rate_limit(sandbox: SandboxServer) -> None:
    """It counts the periods for which the remaining calls must wait."""
    pool = [sandbox.add_key(f"key-{number}") for number in range(3)]
    checked = Run(pool, detail=False)
    async with CreditsClient(
        base_url=sandbox.url, rate_limit=RateLimit(requests=1, period=30, margin=0)
    ) as client:
        bar = Bar(client, checked, tables.console_of(Terminal()))
        assert bar.tasks[0].fields["end"] - bar.get_time() == pytest.approx(60, abs=1)
        landed = asyncio.Event()

        def land(outcome: Outcome[Any]) -> None:
            checked.landed[outcome.key] = outcome
            bar.move()
            landed.set()

        first = asyncio.create_task(client.check(pool, on_outcome=land))
        await landed.wait()
        assert bar.tasks[0].completed == 1
        assert bar.tasks[0].fields["held"] == 2
        assert bar.tasks[0].fields["end"] - bar.get_time() == pytest.approx(60, abs=1)
        first.cancel()


# --- interrupted, closed, missing


@pytest.fixture
def interrupted(api: SandboxServer, monkeypatch: pytest.MonkeyPatch) -> SandboxServer:
    """A pool with a silent second key, and Ctrl-C after the first outcome."""
    good, silent = api.add_key("good", account=None), api.add_key("silent")
    api.fail(silent, Fault.SILENCE)
    monkeypatch.setenv("CRUSTDATA_API_KEYS", entries(good, silent))
    check: Any = CreditsClient.check

    async def check_until_ctrl_c(
        client: CreditsClient, keys: Any, *, on_outcome: Callable[[Any], object], **options: Any
    ) -> Any:
        def land_and_interrupt(outcome: Outcome[Any]) -> None:
            on_outcome(outcome)
            signal.raise_signal(signal.SIGINT)

        return await check(client, keys, on_outcome=land_and_interrupt, **options)

    monkeypatch.setattr(CreditsClient, "check", check_until_ctrl_c)
    return api


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_shows_the_results_so_far() -> None:
    """The table has the known balance and "not checked" for the rest; the status is 130."""
    result = run("check")
    assert result.status == 130
    assert row(result, "good") == "good 1,000 ok"
    assert row(result, "silent") == "silent unknown not checked"
    assert "Could not be checked" not in result.out
    assert result.err == "crustcredits: interrupted; 1 of 2 keys were not checked; check again\n"


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_leaves_one_json_document() -> None:
    """`--json` has every key, with "not checked" for the rest."""
    result = run("check", "--json")
    assert result.status == 130
    document = json.loads(result.out)
    assert not document["ok"]
    assert [each["credits"] for each in document["outcomes"]] == ["1000", None]
    assert (
        document["outcomes"][1]["error"]["message"]
        == "not checked, because the check was interrupted; check again"
    )


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_leaves_whole_lines() -> None:
    """`--jsonl` has lines for the results so far, and no others."""
    result = run("check", "--jsonl")
    assert result.status == 130
    assert [json.loads(line)["key"] for line in result.lines] == ["good"]


def test_ctrl_c_before_any_request_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While standard input is read, the status is 130 too, and nothing is printed."""
    monkeypatch.setattr(typer, "get_binary_stream", lambda name: signal.raise_signal(signal.SIGINT))
    result = run("check", "--keys-file", "-")
    assert (result.status, result.out, result.err) == (130, "", "")


@contextlib.asynccontextmanager
async def started(
    environ: dict[str, str], *arguments: str, out: int = asyncio.subprocess.PIPE
) -> AsyncIterator[asyncio.subprocess.Process]:
    command = (sys.executable, "-m", "crustcredits", *arguments)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=out, stderr=pipe, env={**os.environ, **environ}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.any_loop
async def test_ctrl_c_ends_a_real_process_at_once(sandbox: SandboxServer) -> None:
    """SIGINT while a key is silent ends it long before that key's timeout, without a traceback."""
    good, silent = sandbox.add_key("good"), sandbox.add_key("silent")
    sandbox.fail(silent, Fault.SILENCE)
    environ = {"CRUSTDATA_API_URL": sandbox.url, "CRUSTDATA_API_KEYS": entries(good, silent)}
    async with started(environ, "check", "--jsonl") as process, asyncio.timeout(8):
        assert process.stdout is not None
        assert json.loads(await process.stdout.readline())["key"] == "good"
        process.send_signal(signal.SIGINT)
        rest, said = await process.communicate()
        assert (process.returncode, rest) == (130, b"")
    assert said == b"crustcredits: interrupted; 1 of 2 keys were not checked; check again\n"


@pytest.mark.any_loop
async def test_a_pipe_without_a_reader_ends_the_process(sandbox: SandboxServer) -> None:
    """With 141, as SIGPIPE would, and without a message."""
    reads, writes = os.pipe()
    os.close(reads)
    environ = {
        "CRUSTDATA_API_URL": sandbox.url,
        "CRUSTDATA_API_KEYS": entries(sandbox.add_key("a")),
    }
    try:
        async with started(environ, "check", out=writes) as process:
            _, said = await process.communicate()
            assert (process.returncode, said) == (141, b"")
    finally:
        os.close(writes)


@pytest.mark.parametrize("option", ["--json", "--jsonl"])
def test_a_closed_pipe_ends_the_check(
    api: SandboxServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str
) -> None:
    """With 141, also in the middle of it, and the rest of the output is discarded."""
    monkeypatch.setenv("CRUSTDATA_API_KEYS", entries(api.add_key("a")))
    err = io.StringIO()
    with (tmp_path / "out").open("w") as out:

        class Closed(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

            def fileno(self) -> int:
                return out.fileno()

        assert run_main(monkeypatch, "check", option, out=Closed(), err=err) == 141
        out.write("left")
    assert (tmp_path / "out").read_text() == ""
    assert err.getvalue() == ""


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """One line on standard error, with status 2."""
    monkeypatch.setitem(sys.modules, missing, None)
    forget("crustcredits.cli", monkeypatch)
    err = io.StringIO()
    assert run_main(monkeypatch, "demo", err=err) == 2
    assert (
        err.getvalue()
        == "crustcredits: typer or rich is not installed; run pip install 'crustcredits[cli]'\n"
    )


def test_another_missing_module_is_not_taken_for_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only typer and rich belong to the extra."""
    monkeypatch.setitem(sys.modules, "crustcredits.testing", None)
    forget("crustcredits.cli", monkeypatch)
    with pytest.raises(ModuleNotFoundError, match=r"crustcredits\.testing"):
        main()


def test_the_package_is_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m crustcredits` is the command line; `--help` lists its commands."""
    monkeypatch.delitem(sys.modules, "crustcredits.__main__")
    monkeypatch.setattr(sys, "argv", ["crustcredits", "--help"])
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        runpy.run_module("crustcredits", run_name="__main__")
    assert ended.value.code == 0
    assert "demo" in out.getvalue()
    assert "check" in out.getvalue()


@pytest.mark.any_loop
async def test_an_unwritable_result_has_its_own_status() -> None:
    """Not that of a key below `--min-credits`."""
    command = f"{shlex.quote(sys.executable)} -m crustcredits demo --keys 5 >/dev/full"
    process = await asyncio.create_subprocess_shell(command, stderr=asyncio.subprocess.PIPE)
    _, err = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 74
    assert err.decode() == (
        "crustcredits: the result cannot be written (No space left on device); write it elsewhere, "
        "or free space\n"
    )


def test_an_unwritable_result_leaves_nothing_to_write_at_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same, and the interpreter has nothing left to write at its end."""
    with Path("/dev/full").open("w") as full:
        assert run_main(monkeypatch, "demo", "--keys", "5", out=full) == 74


def test_the_version_is_shown() -> None:
    """And nothing else is done."""
    assert run("--version").out == f"crustcredits {__version__}\n"


def test_a_similar_option_is_suggested() -> None:
    """A misspelt option names a similar one, and a known option its usage."""
    assert "Is --timeout meant?" in run("check", "--time-out", "3").err
    assert "Option '--timeout' requires an argument" in run("check", "--timeout").err
    assert (
        "Invalid value for '--keys': it must be a whole number from 1 to 100000."
        in run("demo", "--keys", "0").err
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_without_a_command_the_help_is_shown(columns: int) -> None:
    """It is no error."""
    result = run(COLUMNS=str(columns))
    assert (result.status, result.err) == (0, "")
    assert result.out == run("--help", COLUMNS=str(columns)).out
    assert "Commands:" in result.lines
    assert widest(result.out) <= columns
