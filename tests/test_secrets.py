"""A canary secret goes through every source and failure, and appears in no output of any tool."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import logging
import operator
import os
import pprint
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rich
import sentry_sdk
import structlog
from fastapi import FastAPI
from rich.console import Console
from rich.traceback import Traceback

from crustcredits import (
    ApiKey,
    Balance,
    ConfigurationError,
    CreditsClient,
    CrustCreditsError,
    Outcome,
    RateLimit,
    Report,
    Retry,
    keys_from_env,
    keys_from_file,
    keys_from_records,
    keys_from_text,
)
from crustcredits.fastapi import (
    credits_client_of,
    credits_lifespan,
    credits_router,
    install_exception_handlers,
)
from crustcredits.redis import RedisBackend
from crustcredits.testing import Fault, SandboxServer

CANARY = "sk-canary9f8e7d6c5b4a3928171605f4e3d2c1b0"
OTHER = "sk-canary0011223344556677889900aabbccddee"
# Tools cut long texts, so any piece of the canary counts.
PIECES = [CANARY[start : start + 10] for start in range(3, len(CANARY) - 9)] + ["canary00112233"]
HERE = Path(__file__).name


def assert_no_canary(text: str) -> None:
    assert not [piece for piece in PIECES if piece in text]


def everything_shown(error: BaseException) -> Iterator[str]:
    """The output of each tool that prints local variables, by default and with long values."""
    yield "".join(traceback.format_exception(error))
    yield "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    shapes: list[dict[str, Any]] = [{}, {"locals_max_string": 10_000, "locals_max_length": 1_000}]
    for options in shapes:
        yield printed(
            Traceback.from_exception(
                type(error), error, error.__traceback__, show_locals=True, **options
            )
        )
        transformed = structlog.tracebacks.ExceptionDictTransformer(show_locals=True, **options)
        yield json.dumps(transformed((type(error), error, error.__traceback__)))
    yield by_sentry(error)
    yield f"{error} {error!r} {vars(error)} {error.__cause__!r} {error.__context__!r}"


def printed(shown: Any) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=False)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def by_sentry(error: BaseException) -> str:
    events: list[Any] = []
    client = sentry_sdk.Client(
        dsn="http://nobody@127.0.0.1:1/1",
        default_integrations=False,
        before_send=lambda event, hint: events.append(event),  # returns None: nothing is sent
        max_value_length=10_000,
    )
    with sentry_sdk.new_scope() as scope:
        scope.set_client(client)
        scope.capture_exception(error)
    client.close(timeout=0)
    (event,) = events
    assert HERE in json.dumps(event, default=repr), "frames are shown"
    return json.dumps(event, default=repr)


# --- sources


# Module level, so that no frame of the mistakes below has these in a local variable.
TEXTS = {
    "with a bad line": f"a={CANARY}\nb={OTHER} x",
    "the wrong way round": f"{CANARY}=prod",
    "with two of one name": f"a={CANARY}\na={OTHER}",
    "with two accounts": f"x/a={CANARY}\ny/b={CANARY}",
    "with other entries": f"{CANARY}\nhunter2",
    "with long lines": f"a={CANARY * 20}; b={OTHER}",
}
FILES = {
    "bad-line": f"a={CANARY}\nb=x {OTHER}\n",
    "broken.json": f'{{"a": "{CANARY}"',
    "other.json": json.dumps({"a": {"b": CANARY}}),
    "swapped.json": json.dumps({CANARY: "prod"}),
    "headless.csv": f"prod,{CANARY}\n",
    "broken.csv": f'name,secret\nprod,"{CANARY}\n',
    ".env": f"STRIPE_KEY={CANARY}\n",
    "keys.ini": f"[keys]\na={CANARY}\n",
}
ENVIRONMENTS = {
    "a bad variable": {
        "CRUSTDATA_API_KEY": f"{CANARY};{OTHER}",
        "DATABASE_URL": f"postgres://x:{CANARY}@db",
    },
    "a bad list": {
        "CRUSTDATA_API_KEY": CANARY,
        "CRUSTDATA_API_KEYS": f"a={OTHER}, Bearer {CANARY}",
    },
    "a key for a path": {"CRUSTDATA_API_KEY_FILE": CANARY},
    "both": {"CRUSTDATA_API_KEY": CANARY, "CRUSTDATA_API_KEY_FILE": "x"},
}

MISTAKES: dict[str, Callable[[str, Path], object]] = {
    **dict.fromkeys(TEXTS, lambda name, folder: keys_from_text(TEXTS[name])),
    **dict.fromkeys(FILES, lambda name, folder: keys_from_file(written(name, folder))),
    **dict.fromkeys(ENVIRONMENTS, lambda name, folder: keys_from_env(ENVIRONMENTS[name])),
    "a key in quotes": lambda name, folder: ApiKey(f"'{CANARY}'"),
    "a scheme": lambda name, folder: ApiKey(f"Bearer {CANARY}", name="prod"),
    "two keys as one": lambda name, folder: ApiKey(f"{CANARY},{OTHER}"),
    "a key as its name": lambda name, folder: ApiKey(CANARY, name=CANARY),
    "a key as a name": lambda name, folder: ApiKey("prod", name=CANARY),
    "a key as an account": lambda name, folder: ApiKey("prod", account=CANARY),
    "bytes": lambda name, folder: ApiKey(CANARY.encode()),  # type: ignore[arg-type]  # the mistake under test
    "text in bytes": lambda name, folder: keys_from_text(CANARY.encode()),  # type: ignore[arg-type]  # as above
    "a key as a path": lambda name, folder: keys_from_file(CANARY),
    "keys as a path": lambda name, folder: keys_from_file(f"{CANARY},{OTHER}"),
    "a list as a path": lambda name, folder: keys_from_file([CANARY]),  # type: ignore[arg-type]  # as above
    "one row": lambda name, folder: keys_from_records({"secret": CANARY}),  # type: ignore[dict-item]  # as above
    "a key as rows": lambda name, folder: keys_from_records(CANARY),  # type: ignore[arg-type]  # as above
    "rows that break off": lambda name, folder: keys_from_records(broken_rows()),
    "a pickled key": lambda name, folder: ApiKey(CANARY).__reduce__(),
    "a key's state": lambda name, folder: ApiKey(CANARY).__getstate__(),
}


def written(name: str, folder: Path) -> Path:
    path = folder / name
    path.write_text(FILES[name], encoding="utf-8")
    return path


def broken_rows() -> Iterator[dict[str, str]]:
    yield {"secret": CANARY}
    raise LookupError("the database is gone")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_source_shows_no_secret(mistake: str, tmp_path: Path) -> None:
    """In the output of any tool that prints the error."""
    with pytest.raises((CrustCreditsError, TypeError, LookupError)) as caught:
        MISTAKES[mistake](mistake, tmp_path)
    error = caught.value
    if isinstance(error, CrustCreditsError):
        assert error.__cause__ is error.__context__ is None
    for shown in everything_shown(error):
        assert_no_canary(shown)


def test_the_printing_tools_do_show_a_secret_that_is_there() -> None:
    """So an output without the canary means something."""

    def fails(held: str) -> None:
        raise LookupError(len(held))

    with pytest.raises(LookupError) as caught:
        fails(CANARY)
    by_tool = [any(piece in shown for piece in PIECES) for shown in everything_shown(caught.value)]
    assert by_tool == [False, True, True, True, True, True, True, False]


# --- calls


async def keys_and_failures(sandbox: SandboxServer) -> list[ApiKey]:
    good = sandbox.add_key("good", secret=CANARY)
    pool = [good, ApiKey(OTHER, name="revoked")]
    for fault in (
        Fault.FORBIDDEN,
        Fault.CHALLENGE,
        Fault.RESET,
        Fault.NOT_JSON,
        Fault.SILENCE,
        Fault.REDIRECT,
        Fault.REFUSED,
    ):
        key = sandbox.add_key(fault.name, secret=f"{CANARY}{fault.name}")
        sandbox.fail(key, fault)
        pool.append(key)
    return pool


async def test_no_failing_call_shows_a_secret(
    sandbox: SandboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """In the error with all its frames, the log at DEBUG, and asyncio's own debug log."""
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    pool = await keys_and_failures(sandbox)
    options: dict[str, Any] = {
        "retry": Retry(attempts=2, backoff=0.001, wait_max=0.01),
        "request_timeout": 0.1,
    }
    failures = 0
    async with CreditsClient(base_url=sandbox.url, **options) as client:
        for number in range(len(pool)):
            try:
                await client.balance(pool[number].get_secret_value(), timeout=2)
            except CrustCreditsError as error:
                failures += 1
                for shown in everything_shown(error):
                    assert_no_canary(shown)
        report = await client.check({CANARY: "prod", "two": f"{OTHER},x", "three": CANARY})
        for shown in (
            repr(list(report)),
            json.dumps(report.to_dict()),
            pprint.pformat(list(report)),
            printed(list(report)),
        ):
            assert_no_canary(shown)
        assert_no_canary(pprint.pformat(vars(client)) + pprint.pformat(vars(sandbox)))
    assert failures == len(pool) - 1
    assert_no_canary(caplog.text)


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "http://127.0.0.1:1"},
        {"base_url": "https://127.0.0.1:1", "trust_env": True},
        {"proxy": f"http://bob:{CANARY}@127.0.0.1:1"},
        {"base_url": "http://127.0.0.1:1", "backend": f"redis://:{CANARY}@127.0.0.1:1"},
    ],
)
async def test_no_unreachable_server_shows_a_secret(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The API, a proxy or Redis is unreachable; their own credentials are not shown either."""
    caplog.set_level(logging.DEBUG)
    if "backend" in options:
        options = options | {"backend": RedisBackend(options["backend"], on_outage="raise")}
    client = CreditsClient(**options, retry=Retry(attempts=1), rate_limit=RateLimit(pace=None))
    with pytest.raises(CrustCreditsError) as caught:
        await client.balance(CANARY, timeout=4)
    await client.close()
    options.clear()  # this frame is shown too
    for shown in everything_shown(caught.value):
        assert_no_canary(shown)
    assert_no_canary(caplog.text)


class Fails:
    """A failing store, source of keys and service, with a repr that shows its contents."""

    def __init__(self, held: str) -> None:
        self.held = held

    def __repr__(self) -> str:
        return f"Fails({self.held!r})"

    def open(self, **terms: object) -> None:
        del self  # the frame is the caller's own
        raise OSError

    tokens = close = open
    __call__ = open

    def __iter__(self) -> Fails:
        return self

    __aiter__ = __iter__

    def __next__(self) -> str:
        del self  # as above
        raise LookupError

    async def __anext__(self) -> str:
        del self  # as above
        raise LookupError


async def streamed(client: CreditsClient) -> None:
    async for _ in client.stream(Fails(CANARY)):
        pass


CALLS: dict[str, Callable[[Any], object]] = {
    "a key for a pool": lambda client: client.check(CANARY),
    "a pool of two with one name": lambda client: client.check({"a": CANARY, "a ": OTHER}),
    "an environment": lambda client: client.check({"CRUSTDATA_API_KEY": CANARY}),
    "a gate": lambda client: client.require(10**9, [CANARY]),
    "a gate's arguments in each other's place": lambda client: client.require([CANARY], 5),
    "a key as credits": lambda client: client.require(CANARY, ["x"]),
    "a key as a margin": lambda client: client.require(5, ["x"], margin=CANARY),
    "a key as a gate's timeout": lambda client: client.require(5, ["x"], timeout=CANARY),
    "a key as a timeout": lambda client: client.balance("x", timeout=CANARY),
    "a key as an age": lambda client: client.balance("x", max_age=CANARY),
    "a key as an account's timeout": lambda client: client.account("x", timeout=CANARY),
    "a key as a pool's timeout": lambda client: client.check(["x"], timeout=CANARY),
    "a key as a pool's age": lambda client: client.check(["x"], stale_if_error=CANARY),
    "a key as a function": lambda client: client.check(["x"], on_outcome=CANARY),
    "a key beyond the last argument": lambda client: client.check(["x"], CANARY),
    "a key as another argument": lambda client: client.balance("x", api_key=CANARY),
    "a key as another argument of a pool": lambda client: client.check(["x"], api_key=CANARY),
    "a key as a stream's timeout": lambda client: client.stream(["x"], timeout=CANARY),
    "a key as a stream's age": lambda client: client.stream(["x"], max_age=CANARY),
    "a key as a known one's age": lambda client: client.peek("x", max_age=CANARY),
    "a gate with a key as a flag": lambda client: client.require(10**9, ["x"], detail=CANARY),
    "a pool with a key as a flag": lambda client: client.check(["x"], detail=CANARY),
    "a gate that says no": lambda client: client.require(10**9, {"prod": CANARY}),
    "a key for the name of an argument": lambda client: client.check(["x"], **{CANARY: "prod"}),
    "a source that fails": lambda client: client.check(Fails(CANARY)),
    "an endless source that fails": streamed,
    "a key that cannot be used": lambda client: client.peek(f"{CANARY} x"),
    "a key to be dropped": lambda client: client.invalidate(f"{CANARY} x"),
    "a key of a quota": lambda client: client.quota(key=f"{CANARY},x"),
}


def each_argument(
    function: Callable[..., object], *first: object, but: str = "", **others: object
) -> dict[str, partial[object]]:
    """Calls of `function`, each with the key as one of its optional arguments.

    `but` names the arguments that may be any text.
    """
    names = [
        name
        for name, each in inspect.signature(function).parameters.items()
        if each.default is not each.empty
    ]
    calls = {
        name: partial(function, *first, **others | {name: CANARY})
        for name in [*names, "api_key"]
        if name not in but.split()
    }
    return {f"{function.__qualname__}: {name}": call for name, call in calls.items()}


SANDBOX = SandboxServer()
PLACES: dict[str, Callable[[], object]] = {
    **each_argument(CreditsClient),
    **each_argument(Retry),
    **each_argument(RateLimit),
    **each_argument(credits_router, ["x"], but="prefix tags", public=True),
    **each_argument(credits_lifespan),
    **each_argument(RedisBackend, "redis://x", but="prefix"),
    **each_argument(RedisBackend("redis://x", on_outage="raise").lease, "watcher"),
    **each_argument(SandboxServer, but="record"),
    **each_argument(SANDBOX.add_key, but="name declared secret"),
    "the client's only argument": partial(CreditsClient, CANARY),  # type: ignore[call-arg]  # as above
    "a router's pool": partial(credits_router, CANARY, public=True),
    "Redis": partial(RedisBackend, CANARY),
    "a sandbox account's credits": partial(SANDBOX.add_account, "x", credits=CANARY),
    "a sandbox key": partial(SANDBOX.fail, CANARY, Fault.RESET),  # type: ignore[arg-type]  # as above
    "a sandbox key with credits": partial(SANDBOX.set_credits, CANARY, 5),  # type: ignore[arg-type]  # as above
    "a sandbox key that works again": partial(SANDBOX.heal, CANARY),  # type: ignore[arg-type]  # as above
    "a router with a good pool": partial(
        credits_router, {"prod": CANARY}, public=True, prefix="credits"
    ),
    "a router's prefix": partial(credits_router, ["x"], public=True, prefix=CANARY),
    "a router's source": partial(credits_router, Fails(CANARY), public=True),
    "a client with a good proxy": partial(
        CreditsClient,
        proxy=f"http://bob:{CANARY}@127.0.0.1:1",
        backend=Fails(CANARY),  # type: ignore[arg-type]  # as above
    ),
    "Redis with an option": partial(
        RedisBackend, f"rediss://:{CANARY}@127.0.0.1:1/0?ssl_cert_reqs=CERT_NONE"
    ),
    "Redis with another protocol": partial(
        RedisBackend, f"redis://:{CANARY}@127.0.0.1:1/0?protocol=5"
    ),
    "an app": partial(install_exception_handlers, CANARY),  # type: ignore[arg-type]  # as above
    "an app of a client": partial(credits_client_of, CANARY),
    "a report's label": partial(operator.getitem, Report([]), CANARY),
    "a report's key": partial(Report([]).credits_of, CANARY),
    "records": partial(keys_from_records, Fails(CANARY)),  # type: ignore[arg-type]  # as above
    "a report's credits": partial(Report([]).require, CANARY),  # type: ignore[arg-type]  # as above
    "a report's threshold": partial(Report([]).low, CANARY),  # type: ignore[arg-type]  # as above
    "a report's least credits": partial(Report([]).ranked, CANARY),  # type: ignore[arg-type]  # as above
}


async def test_frames_of_other_code_keep_their_variables() -> None:
    """Another task that awaits the same error would end with its frame."""
    start: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def falls_back(client: CreditsClient) -> str:
        try:
            await start
        except OSError:
            with pytest.raises(ConfigurationError):
                await client.check("oops")
            await asyncio.sleep(0)
        return "went on"

    async with CreditsClient() as client:
        tasks = [asyncio.create_task(falls_back(client)) for _ in range(3)]
        await asyncio.sleep(0)
        start.set_exception(OSError())
        assert await asyncio.wait_for(asyncio.gather(*tasks), 1) == ["went on"] * 3


def test_a_circular_chain_of_exceptions_ends() -> None:
    """Two errors here name each other as context."""

    def source() -> Iterator[dict[str, str]]:
        first, second = LookupError("first"), LookupError("second")
        second.__context__ = first
        first.__context__ = second
        if CANARY:
            raise first
        yield {}

    with pytest.raises(LookupError):
        keys_from_records(source())


async def test_a_lifespan_shows_nothing_of_its_clients_arguments() -> None:
    """A partial prints its arguments, and any start that fails has its frame."""

    @asynccontextmanager
    async def no_database(app: FastAPI) -> AsyncIterator[None]:
        if CANARY:
            raise LookupError("the database is down")
        yield

    lifespan = credits_lifespan(
        partial(CreditsClient, proxy=f"http://bob:{CANARY}@127.0.0.1:1"), lifespan=no_database
    )
    with pytest.raises(LookupError) as caught:
        async with lifespan(FastAPI()):
            pass
    del lifespan
    for shown in everything_shown(caught.value):
        assert_no_canary(shown)


def test_hiding_arguments_keeps_the_lines_of_the_traceback() -> None:
    """The frames of the caller's own code are there."""
    with pytest.raises(LookupError) as caught:
        credits_router(Fails(CANARY), public=True)
    lines = traceback.format_exception(caught.value)
    assert "__next__" in "".join(lines)
    assert sum("in call\n" in line for line in lines) == 1, "the decorator is one frame"


@pytest.mark.parametrize("place", PLACES)
def test_no_misplaced_argument_is_shown(place: str) -> None:
    """Neither in the message nor in a frame."""
    with pytest.raises(
        (CrustCreditsError, TypeError, LookupError, OSError, AttributeError)
    ) as caught:
        PLACES[place]()
    for shown in everything_shown(caught.value):
        assert_no_canary(shown)


async def called(call: Callable[[Any], object], client: CreditsClient) -> None:
    result = call(client)
    if inspect.isawaitable(result):
        await result


@pytest.mark.parametrize("mistake", CALLS)
async def test_no_mistaken_call_shows_a_secret(sandbox: SandboxServer, mistake: str) -> None:
    """Misplaced arguments are not repeated."""
    sandbox.add_key(secret=CANARY)
    async with CreditsClient(base_url=sandbox.url) as client:
        with pytest.raises((CrustCreditsError, TypeError, LookupError)) as caught:
            await called(CALLS[mistake], client)
    for shown in everything_shown(caught.value):
        assert_no_canary(shown)


# --- objects


def attributes(value: object, depth: int = 4) -> Iterator[str]:
    """Everything reachable from an object by its attributes and items, as text."""
    yield repr(value)
    if depth == 0 or isinstance(value, (type, str, bytes, int, float)) or callable(value):
        return
    names = [
        *getattr(value, "__dict__", ()),
        *(slot for kind in type(value).__mro__ for slot in getattr(kind, "__slots__", ())),
    ]
    for name in names:
        yield from attributes(getattr(value, name, None), depth - 1)
    if isinstance(value, dict):
        yield from (
            text for part in [*value, *value.values()] for text in attributes(part, depth - 1)
        )
    elif isinstance(value, (list, tuple, set)):
        yield from (text for part in value for text in attributes(part, depth - 1))


async def test_no_object_holds_a_secret_in_the_clear() -> None:
    """Keys, results, clients and the sandbox: by no attribute, private ones included."""
    async with (
        SandboxServer(record=False) as sandbox,
        CreditsClient(base_url=sandbox.url, max_age=60) as client,
    ):
        key = sandbox.add_key("prod", secret=CANARY)
        report = await client.check([key, "two words"])
        for value in (key, report[0].result(), report[0], report[1], report, client, sandbox):
            assert_no_canary("\n".join(attributes(value)))
            assert_no_canary(repr(inspect.getmembers(value, lambda part: not callable(part))))
            screen = Console(file=io.StringIO(), width=300)
            rich.inspect(value, console=screen, private=True)
            assert isinstance(screen.file, io.StringIO)
            assert_no_canary(screen.file.getvalue())


# --- the command line


async def printed_by(
    sandbox: SandboxServer, *arguments: str, given: bytes = b"", **environ: str
) -> str:
    """All output of a real process, and its command line as other processes see it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CRUSTDATA_")}
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "crustcredits", *arguments),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env=clean | {"CRUSTDATA_API_URL": sandbox.url} | environ,
    )
    seen = await asyncio.to_thread(Path(f"/proc/{process.pid}/cmdline").read_text, encoding="utf-8")
    out, err = await asyncio.wait_for(process.communicate(given), 20)
    assert process.returncode in {0, 2, 3}, err
    return seen.replace("\0", " ") + out.decode() + err.decode()


@pytest.mark.any_loop
@pytest.mark.timeout(120)  # every command, with every mistake
async def test_the_command_line_prints_no_secret(sandbox: SandboxServer, tmp_path: Path) -> None:
    """Good, unknown and unusable keys, from every source, in each format.

    No argument takes a secret.
    """
    sandbox.add_key("prod", secret=CANARY)
    (tmp_path / "keys.json").write_text(json.dumps({"acme/prod": CANARY, "dev": OTHER}))
    pool = f"prod={CANARY},dev={OTHER}"
    runs = [
        printed_by(sandbox, "check", CRUSTDATA_API_KEYS=pool),
        printed_by(sandbox, "check", "--json", "--detail", CRUSTDATA_API_KEY=CANARY),
        printed_by(sandbox, "check", "--jsonl", "--keys-file", "-", given=pool.encode()),
        printed_by(sandbox, "check", "--keys-file", str(tmp_path / "keys.json")),
        printed_by(sandbox, "check", CRUSTDATA_API_KEYS=f"{CANARY}=prod"),
        printed_by(sandbox, "check", CRUSTDATA_API_KEY_FILE=CANARY),
    ]
    for run in runs:
        assert_no_canary(await run)
    assert len(sandbox.arrivals) >= 6


def test_frames_below_standard_library_frames_are_cleared_too() -> None:
    """Standard library frames keep their variables; frames of this library below them do not."""
    with pytest.raises(json.JSONDecodeError) as unread:
        keys_from_records(map(json.loads, ["no JSON"]))
    assert any(
        "decoder" in entry.filename for entry in traceback.extract_tb(unread.value.__traceback__)
    )


async def test_a_re_raised_error_ends_no_other_task() -> None:
    """Its traceback has frames of an earlier raise, perhaps in a running task.

    Here one check closes the calls that it began.
    """
    shared = LookupError("the same each time")
    others: list[asyncio.Task[object]] = []

    async with SandboxServer() as server, CreditsClient(base_url=server.url, max_age=60) as client:
        kept, *new = (server.add_key(f"k{number}") for number in range(3))
        await client.check([kept])

        def on_outcome(outcome: Outcome[Balance]) -> None:
            if not others:
                others.append(asyncio.create_task(client.check([kept], on_outcome=on_outcome)))
            raise shared

        with pytest.raises(LookupError):
            await client.check(new, on_outcome=on_outcome)
        with pytest.raises(LookupError):
            await others[0]
