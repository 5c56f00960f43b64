"""`RedisBackend` with a real server: connections, commands and their effects."""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Literal

import pytest
from redis import Redis as SynchronousRedis
from redis.asyncio import Redis, RedisCluster

from crustcredits import (
    BackendUnavailableError,
    ConfigurationError,
    CreditsClient,
    RateLimit,
    RateLimitWaitError,
)
from crustcredits.redis import RedisBackend
from crustcredits.redis.server_check import address_of, check_server
from crustcredits.testing import SandboxServer
from tests.conftest import eventually
from tests.servers import RedisServer, forget, free_port, own_server, redis_server

__all__ = ["own_server", "redis_server"]  # fixtures, found by their names

# An empty Redis grants no tokens for a second; tests do not wait for that.
OPENED: dict[str, str | int] = {"epoch": 1, "opens": 0}


def open_prefix(server: RedisServer, prefix: str) -> None:
    """Make the prefix look as if in use for a while."""
    own = str(server.ask("INFO", "replication")["master_replid"])  # type: ignore[index]  # what redis-py makes of it
    for field, value in {**OPENED, "server": own}.items():
        server.ask("HSET", f"{{{prefix}}}:epoch", field, value)


@pytest.fixture
def prefix(redis_server: RedisServer) -> str:
    prefix = uuid.uuid4().hex
    open_prefix(redis_server, prefix)
    return prefix


async def client(
    sandbox: SandboxServer, backend: RedisBackend, stack: AsyncExitStack, **limit: Any
) -> CreditsClient:
    return await stack.enter_async_context(
        CreditsClient(
            base_url=sandbox.url, rate_limit=RateLimit(pace=None, **limit), backend=backend
        )
    )


@pytest.mark.parametrize("scope", ["client", "auto", "account", "key"])
async def test_clients_with_one_prefix_share_one_quota(
    redis_server: RedisServer, prefix: str, scope: str
) -> None:
    """Together they never trip the server's limit."""
    async with (
        SandboxServer(
            limit=20, period=0.3, scope="client" if scope in {"client", "auto"} else "key"
        ) as sandbox,
        AsyncExitStack() as stack,
    ):
        keys = [sandbox.add_key() for _ in range(30)]
        clients = [
            await client(
                sandbox,
                RedisBackend(redis_server.url, prefix=prefix, fallback_share=1 / 4),
                stack,
                requests=20,
                period=0.3,
                scope=scope,
            )
            for _ in range(2)
        ]
        reports = await asyncio.gather(*(one.check(keys, timeout=20) for one in clients))
        assert [len(report.succeeded) for report in reports] == [30, 30]
        assert sandbox.refused == 0


@pytest.mark.parametrize("decodes", [False, True])
async def test_processes_share_answers(
    redis_server: RedisServer, prefix: str, decodes: bool
) -> None:
    """Also through a client of redis-py that decodes answers itself."""
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        keys = [sandbox.add_key(credits=number) for number in range(5)]
        reports = []
        for _ in range(2):
            redis = Redis.from_url(redis_server.url, decode_responses=decodes)
            stack.push_async_callback(redis.aclose)
            backend = RedisBackend(redis, prefix=prefix, fallback_share=1 / 4, share_answers=True)
            one = await client(sandbox, backend, stack)
            reports.append(await one.check(keys, timeout=5, max_age=60))
            await asyncio.sleep(0.01)
            await one.close()  # publishes what is not yet published
        assert [[outcome.credits for outcome in report] for report in reports] == [[*range(5)]] * 2
        assert {outcome.source for outcome in reports[1]} == {"shared"}
        assert len(sandbox.arrivals) == 5


async def test_another_prefix_is_another_quota(redis_server: RedisServer, prefix: str) -> None:
    """One prefix's requests do not delay those of another."""
    other = uuid.uuid4().hex
    open_prefix(redis_server, other)
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        key = sandbox.add_key()
        for name in (prefix, other):
            one = await client(
                sandbox,
                RedisBackend(redis_server.url, prefix=name, fallback_share=1 / 4),
                stack,
                requests=1,
                scope="client",
            )
            assert (await one.balance(key, timeout=5)).credits == 1000


def scripts_sent(server: RedisServer) -> int:
    """How many messages had the whole script in them."""
    commands: Any = server.ask("INFO", "commandstats")
    return int(commands.get("cmdstat_eval", {"calls": 0})["calls"])


async def test_the_script_is_sent_again_after_script_flush(
    redis_server: RedisServer, prefix: str
) -> None:
    """After SCRIPT FLUSH the next call sends the whole script."""
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        one = await client(
            sandbox, RedisBackend(redis_server.url, prefix=prefix, fallback_share=1 / 4), stack
        )
        before = scripts_sent(redis_server)
        for _ in range(2):
            await asyncio.to_thread(redis_server.ask, "SCRIPT", "FLUSH")
            await one.balance(sandbox.add_key(), timeout=5)
        assert scripts_sent(redis_server) == before + 2


async def registered(server: RedisServer, *, wanted: int) -> int:
    """How many tokens Redis knows to be out: after three seconds, or once it knows of `wanted`."""
    found = 0
    for _ in range(100):
        found = int(str(await asyncio.to_thread(server.ask, "ZCARD", "{p}:/user/credits")))
        if found == wanted:
            break
        await asyncio.sleep(0.03)
    return found


def restart(server: RedisServer) -> None:
    server.restart()


def flush(server: RedisServer) -> None:
    server.ask("FLUSHALL")


@pytest.mark.parametrize("lose", [restart, flush])
async def test_tokens_are_registered_again_when_redis_has_lost_the_count(
    own_server: RedisServer, lose: Callable[[RedisServer], None]
) -> None:
    """No further call is needed for that."""
    open_prefix(own_server, "p")
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        one = await client(
            sandbox,
            RedisBackend(own_server.url, prefix="p", fallback_share=1 / 4),
            stack,
            scope="client",
        )
        for _ in range(3):
            await one.balance(sandbox.add_key(), timeout=5)
        await asyncio.to_thread(lose, own_server)
        assert await registered(own_server, wanted=3) == 3


async def test_a_process_enters_and_leaves_degraded_mode_by_itself(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards it shares the count with other processes again."""
    monkeypatch.setattr("crustcredits.redis.outage.GRACE", 0.03)
    monkeypatch.setattr("crustcredits.redis.outage.LEAST_OUTAGE", 0.0)
    open_prefix(own_server, "p")
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        backend = RedisBackend(own_server.url, prefix="p", fallback_share=1 / 4)
        one = await client(sandbox, backend, stack, requests=1, scope="client")
        await one.balance(sandbox.add_key(), timeout=5)
        await asyncio.to_thread(own_server.stop)
        with pytest.raises(RateLimitWaitError):
            await one.balance(sandbox.add_key(), timeout=0.05)
        await eventually(lambda: one.quota().degraded)
        await asyncio.to_thread(own_server.start)
        await eventually(lambda: not one.quota().degraded)
        await eventually(lambda: own_server.ask("ZCARD", "{p}:/user/credits") == 1)
    assert [record.message[:16] for record in caplog.records][:3] == [
        "Redis is out of ",
        "prefix p: Redis ",  # lost the count
        "Redis answers ag",
    ]


async def opens(url: str, **options: Any) -> CreditsClient:
    """Open a client, and close it again."""
    backend = RedisBackend(url, **{"fallback_share": 1 / 4, **options})
    async with CreditsClient(base_url="http://127.0.0.1:1", backend=backend) as client:
        return client


@pytest.mark.parametrize("on_outage", ["local", "strict", "raise"])
async def test_a_wrong_password_is_refused_when_the_client_opens(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture, on_outage: str
) -> None:
    """It is repeated neither in the log nor in the error, nor in its traceback with locals."""
    await asyncio.to_thread(own_server.ask, "CONFIG", "SET", "requirepass", "correct")
    with pytest.raises(ConfigurationError, match="refuses the user name or the password") as caught:
        await opens(f"unix://:hunter2@{own_server.socket}", on_outage=on_outage)
    shown = "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )
    assert "hunter2" not in shown[shown.index("crustcredits/_client.py") :] + caplog.text + repr(
        caught.value
    )


@pytest.mark.parametrize("on_outage", ["local", "raise"])
async def test_a_password_that_is_changed_later_is_an_outage(
    own_server: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    on_outage: Literal["local", "raise"],
) -> None:
    """As where the client is used without `async with`."""
    monkeypatch.setattr("crustcredits.redis.outage.GRACE", 0.0)
    monkeypatch.setattr("crustcredits.redis.outage.LEAST_OUTAGE", 0.0)
    await asyncio.to_thread(own_server.ask, "CONFIG", "SET", "requirepass", "correct")
    async with SandboxServer() as sandbox:
        backend = RedisBackend(
            f"unix://:hunter2@{own_server.socket}", on_outage=on_outage, fallback_share=1 / 4
        )
        one = CreditsClient(base_url=sandbox.url, backend=backend)
        with pytest.raises((BackendUnavailableError, RateLimitWaitError)):
            await one.balance(sandbox.add_key(), timeout=0.3)
        await one.close()
    assert "hunter2" not in caplog.text
    assert "Redis is out of reach" in caplog.text


async def test_a_database_that_does_not_exist_is_refused(own_server: RedisServer) -> None:
    with pytest.raises(ConfigurationError, match="no database of this number"):
        await opens(f"unix://{own_server.socket}?db=99")


async def test_a_server_that_is_no_redis_is_refused() -> None:
    async with SandboxServer() as sandbox:
        with pytest.raises(ConfigurationError, match="is not a Redis; correct the URL"):
            await opens(sandbox.url.replace("http", "redis"))


async def test_a_user_without_the_right_to_run_the_script_is_refused(
    own_server: RedisServer,
) -> None:
    rights = ["on", "nopass", "~*", "+@all", "-evalsha", "-eval"]
    await asyncio.to_thread(own_server.ask, "ACL", "SETUSER", "limited", *rights)
    with pytest.raises(ConfigurationError, match="no right to run the script"):
        await opens(f"unix://limited:any@{own_server.socket}")


async def test_a_server_that_may_evict_the_count_is_refused(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a bound of its memory it does not yet, and the log warns."""
    ask = own_server.ask
    await asyncio.to_thread(ask, "CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    await opens(own_server.url)
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("Redis may evict the rate limit's count and leases once maxmemory")
    await asyncio.to_thread(ask, "CONFIG", "SET", "maxmemory", "100mb")
    with pytest.raises(ConfigurationError, match="set noeviction, or use another Redis"):
        await opens(own_server.url)


@pytest.mark.parametrize(
    ("version", "refused"), [("6.0.16", True), ("6.2.0", False), ("7.2.4", False), ("odd", False)]
)
async def test_a_server_that_is_too_old_is_refused(version: str, *, refused: bool) -> None:
    class Server:
        async def info(self, section: str) -> dict[str, object]:
            return {"redis_version": version}

    if refused:
        with pytest.raises(ConfigurationError, match=f"Redis {version} is too old"):
            await check_server(Server())
    else:
        await check_server(Server())


async def test_each_node_of_a_cluster_is_checked() -> None:
    class Cluster:
        async def info(self, section: str) -> dict[str, object]:
            return {"one": {"redis_version": "7.0.0"}, "two": {"redis_version": "5.0.0"}}

    with pytest.raises(ConfigurationError, match=r"Redis 5\.0\.0 is too old"):
        await check_server(Cluster())


async def test_a_server_out_of_reach_is_an_outage_when_the_client_opens(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A line of the log names the address, without credentials, the database and the prefix."""
    caplog.set_level(logging.INFO)
    port = free_port()
    await opens(f"redis://me:hunter2@127.0.0.1:{port}/3", prefix="acme")
    (line,) = [record.message for record in caplog.records]
    assert line == f"this process counts in Redis at 127.0.0.1:{port}, database 3, prefix acme"


async def test_a_user_without_the_info_command_works(
    own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a user with it: neither takes the other for a loss of the count."""
    await asyncio.to_thread(
        own_server.ask, "ACL", "SETUSER", "limited", "on", "nopass", "~*", "+@all", "-info"
    )
    open_prefix(own_server, "p")
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        limited: dict[str, Any] = {"username": "limited", "password": "any"}
        for login in (limited, {}, limited):
            given = await stack.enter_async_context(
                Redis(unix_socket_path=str(own_server.socket), **login)
            )
            one = await client(sandbox, RedisBackend(given, prefix="p", on_outage="raise"), stack)
            await one.balance(sandbox.add_key(), timeout=5)
    assert not caplog.records


@pytest.mark.parametrize(
    "options", [{"protocol": 2}, {"protocol": 3}, {"decode_responses": True, "protocol": 3}]
)
async def test_a_client_of_either_protocol_works(
    redis_server: RedisServer, prefix: str, options: dict[str, Any]
) -> None:
    """The script's answers are numbers in both."""
    given = Redis(unix_socket_path=str(redis_server.socket), **options)
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        one = await client(
            sandbox, RedisBackend(given, prefix=prefix, on_outage="raise"), stack, requests=5
        )
        assert (await one.check([sandbox.add_key() for _ in range(5)], timeout=5)).ok
    await given.aclose()


@pytest.mark.own_loops
def test_another_client_may_use_the_buckets_when_the_first_is_closed(
    redis_server: RedisServer, prefix: str
) -> None:
    """Also on another loop: an app with a client of its own may start again."""
    backend = RedisBackend(redis_server.url, prefix=prefix, on_outage="raise")

    async def uses() -> None:
        async with (
            SandboxServer() as sandbox,
            CreditsClient(base_url=sandbox.url, backend=backend) as client,
        ):
            await client.balance(sandbox.add_key(), timeout=5)
            with pytest.raises(ConfigurationError, match="in use by another client"):
                CreditsClient(backend=backend)

    open_prefix(redis_server, prefix)
    for _ in range(3):
        asyncio.run(uses())


async def test_a_given_client_is_used_and_not_closed(
    redis_server: RedisServer, prefix: str
) -> None:
    """Also one that decodes its answers."""
    given = Redis(unix_socket_path=str(redis_server.socket), decode_responses=True)
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        await (
            await client(sandbox, RedisBackend(given, prefix=prefix, fallback_share=1 / 4), stack)
        ).balance(sandbox.add_key(), timeout=5)
    assert await given.ping()
    await given.aclose()


async def test_an_own_client_is_closed(redis_server: RedisServer, prefix: str) -> None:
    """Together with the credits client."""
    before = int(str(redis_server.ask("INFO", "clients")["connected_clients"]))  # type: ignore[index]  # what redis-py makes of it
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        await (
            await client(
                sandbox, RedisBackend(redis_server.url, prefix=prefix, fallback_share=1 / 4), stack
            )
        ).balance(sandbox.add_key(), timeout=5)

    def closed() -> bool:
        clients = redis_server.ask("INFO", "clients")
        return int(str(clients["connected_clients"])) <= before  # type: ignore[index]  # as above

    await eventually(closed)


async def test_names_and_values_hold_no_secret_and_expire(
    redis_server: RedisServer, prefix: str
) -> None:
    """Nor the name of an account."""
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        sandbox.add_account("acme-secret-account")
        keys = [
            sandbox.add_key(secret="the-secret-itself"),
            sandbox.add_key(account="acme-secret-account"),
        ]
        one = await client(
            sandbox, RedisBackend(redis_server.url, prefix=prefix, fallback_share=1 / 4), stack
        )
        await one.check(keys, timeout=5)
        names = [name.decode() for name in redis_server.ask("KEYS", f"{{{prefix}}}:*")]  # type: ignore[attr-defined]  # bytes
        told = repr(
            [
                redis_server.ask("ZRANGE", name, 0, -1)
                for name in names
                if "credits" in name and "line" not in name
            ]
        )
        # The marker, the processes with tokens out, this one's last message, the common bucket and
        # two account buckets.
        assert len(names) == 6
        assert not [word for word in ("secret", "acme") if word in " ".join(names) + told]
        assert all(0 < int(str(redis_server.ask("PTTL", name))) <= 86_400_000 for name in names)


@pytest.fixture
def cluster() -> Iterator[RedisServer]:
    # A cluster's nodes talk to each other on their port plus 10,000.
    port = next(port for port in iter(free_port, 0) if port < 55_000)
    server = RedisServer("--cluster-enabled", "yes", port=port)
    server.ask("CLUSTER", "ADDSLOTS", *range(16384))
    yield server
    server.remove()


@pytest.mark.timeout(60)
async def test_buckets_and_leases_work_on_a_cluster(cluster: RedisServer) -> None:
    """All keys of a prefix lie in one slot."""
    for _ in range(200):
        if b"cluster_state:ok" in str(
            cluster.ask("CLUSTER", "INFO")
        ).encode() or "'cluster_state': 'ok'" in str(cluster.ask("CLUSTER", "INFO")):
            break
        await asyncio.sleep(0.03)
    open_prefix(cluster, "p")
    given = RedisCluster(host="127.0.0.1", port=cluster.port)
    assert address_of(given) == "a cluster"
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        one = await client(sandbox, RedisBackend(given, prefix="p", on_outage="raise"), stack)
        assert (await one.check([sandbox.add_key() for _ in range(5)], timeout=10)).ok
    async with RedisBackend(given, prefix="p", on_outage="raise").lease("watcher") as lease:
        assert lease.is_held
    await given.aclose()


async def test_calls_fail_without_redis_when_on_outage_is_raise() -> None:
    """The error names the key."""
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        one = await client(
            sandbox, RedisBackend(f"redis://127.0.0.1:{free_port()}", on_outage="raise"), stack
        )
        with pytest.raises(BackendUnavailableError, match="prod: not sent: Redis, which counts"):
            await one.balance(sandbox.add_key("prod"), timeout=5)
        assert sandbox.requests == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url_or_client": "http://:hunter2@localhost"}, "url_or_client is not a Redis URL"),
        ({"url_or_client": "redis://:hunter2@localhost:port"}, "url_or_client is not a Redis URL"),
        ({"url_or_client": 5}, "a redis.asyncio client, not an int"),
        (
            {"url_or_client": SynchronousRedis()},
            "not a Redis of redis.client; use redis.asyncio.Redis in place of redis.Redis$",
        ),
        ({"url_or_client": None}, "set the variable"),
        (
            {"url_or_client": "redis://:hunter2@localhost?retires=5"},
            "^url_or_client has the option 'retires', which redis-py refuses",
        ),
        (
            {"url_or_client": "redis://:hunter2@localhost?socket_timeout=soon"},
            "^url_or_client has the option 'socket_timeout', which redis-py refuses",
        ),
        (
            {"url_or_client": "redis://:6379?hunter2=5@localhost"},
            "^url_or_client is not a Redis URL, or has an option",
        ),
        ({"prefix": ""}, "non-empty"),
        ({"prefix": "a{b}"}, "without braces"),
        ({"prefix": "a\nb"}, "printable"),
        ({"prefix": b"acme"}, "prefix must be a str, not bytes"),
        ({"on_outage": "ignore"}, "'local', 'strict' or 'raise'"),
        ({"on_outage": ["raise"]}, "'local', 'strict' or 'raise'"),
        ({"fallback_share": None}, "on_outage='local' needs it"),
        ({"on_outage": "strict", "fallback_share": None}, "pass 1 divided by the number of your"),
        ({"fallback_share": 0}, "fallback_share must be a finite number above 0"),
        ({"fallback_share": 1.5}, "at most 1"),
    ],
)
def test_bad_arguments_are_refused_and_a_password_is_not_repeated(
    arguments: dict[str, Any], message: str
) -> None:
    """Neither in the message nor in a traceback with local variables."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        RedisBackend(
            **{"url_or_client": "redis://:hunter2@localhost", "fallback_share": 0.25, **arguments}
        )
    shown = "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )
    assert "hunter2" not in str(caught.value) + shown[shown.index("crustcredits/_validation.py") :]


def test_without_redis_py_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the library works without it."""
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    forget("crustcredits.redis", monkeypatch)
    with pytest.raises(ImportError, match="needs redis-py, which is not installed"):
        importlib.import_module("crustcredits.redis")


def test_another_missing_module_is_not_taken_for_redis_py(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is shown as it is."""
    forget("crustcredits.redis", monkeypatch)
    monkeypatch.setitem(sys.modules, "crustcredits.redis.coordinator", None)
    with pytest.raises(ModuleNotFoundError, match=r"crustcredits\.redis\.coordinator"):
        importlib.import_module("crustcredits.redis")


def test_a_password_does_not_print() -> None:
    """Making the backend opens no connection and prints nothing."""
    backend = RedisBackend("redis://:hunter2@localhost", fallback_share=1 / 4)
    assert "hunter2" not in repr(backend) + str(backend)


async def test_no_answer_is_lost_with_tokens_from_redis(
    redis_server: RedisServer, prefix: str
) -> None:
    """100 calls at once all have an answer.

    On uvloop a timer handle that is due does not give its time.
    """
    async with SandboxServer() as sandbox, AsyncExitStack() as stack:
        keys = [sandbox.add_key() for _ in range(100)]
        one = await client(
            sandbox, RedisBackend(redis_server.url, prefix=prefix, fallback_share=1 / 4), stack
        )
        balances = await asyncio.gather(*(one.balance(key, timeout=10) for key in keys))
    assert [balance.key for balance in balances] == keys
