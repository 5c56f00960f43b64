"""The FastAPI part on the real loop: calls of the app in process, with the sandbox as the API."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.testclient import TestClient
from httpx2 import ASGITransport, AsyncClient
from starlette.testclient import WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from crustcredits import (
    Account,
    APIConnectionError,
    ApiKey,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BackendUnavailableError,
    BadRequestError,
    Balance,
    ClientClosedError,
    ConfigurationError,
    CreditsClient,
    CreditsRequirementError,
    CreditsUnknownError,
    CrustCreditsError,
    GatewayError,
    InsufficientCreditsError,
    InternalServerError,
    InvalidKeyError,
    Known,
    MissingKeyError,
    Outcome,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimit,
    RateLimitError,
    RateLimitWaitError,
    Report,
    Retry,
    UnexpectedResponseError,
    Unknown,
)
from crustcredits.fastapi import (
    AccountResponse,
    BalanceResponse,
    CreditsDep,
    KeyResponse,
    PoolResponse,
    credits_client_of,
    credits_lifespan,
    credits_router,
    get_credits_client,
    install_exception_handlers,
)
from crustcredits.fastapi.problem_details import problem_of
from crustcredits.redis import RedisBackend
from crustcredits.testing import Fault, SandboxServer
from tests.conftest import eventually
from tests.servers import free_port
from tests.virtual import FakeServer, fake_client

pytestmark = pytest.mark.own_loops

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = ApiKey("sk-0123456789", name="prod", account="acme")
QUICK = Retry(attempts=1)


@asynccontextmanager
async def calling(app: FastAPI) -> AsyncIterator[AsyncClient]:
    """Run the app and yield a caller of it."""
    async with (
        app.router.lifespan_context(app),
        AsyncClient(
            transport=ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
        ) as caller,
    ):
        yield caller


def app_of(
    sandbox: SandboxServer, *keys: Any, client: dict[str, Any] | None = None, **options: Any
) -> FastAPI:
    app = FastAPI(
        lifespan=credits_lifespan(
            partial(CreditsClient, base_url=sandbox.url, retry=QUICK, **(client or {}))
        )
    )
    app.include_router(
        credits_router(keys, **({"public": True, "max_age": 0} | options)), prefix="/credits"
    )
    return app


# --- lifespan and dependency


def test_the_client_opens_and_closes_with_the_app() -> None:
    """Each start of the app has a new one."""
    app = FastAPI(lifespan=credits_lifespan())

    @app.get("/")
    async def opened(client: CreditsDep) -> bool:
        return await client.__aenter__() is client

    seen = []
    for _ in range(2):
        with TestClient(app) as caller:
            assert caller.get("/").json() is True
            seen.append(credits_client_of(caller))
            assert credits_client_of(app) is seen[-1]
    for client in seen:
        with pytest.raises(ClientClosedError):
            asyncio.run(client.balance("some-key"))
    assert seen[0] is not seen[1]


def test_an_inner_lifespan_runs_inside_and_its_state_stays() -> None:
    """The client is open from its start to its end."""
    log: list[Any] = []

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        log.append((await credits_client_of(app).balance(KEY)).credits)
        yield {"database": 7}
        log.append((await credits_client_of(app).balance(KEY)).credits)

    app = FastAPI(lifespan=credits_lifespan(partial(fake_client, FakeServer()), lifespan=own))

    @app.get("/")
    async def state(client: CreditsDep, request: Request) -> int:
        database: int = request.state.database
        return database

    with TestClient(app) as caller:
        assert caller.get("/").json() == 7
    assert log == [9406, 9406]


def test_credits_lifespan_can_be_entered_in_another_lifespan() -> None:
    """Also around a bare generator function."""
    log: list[Any] = []

    async def bare(app: FastAPI) -> AsyncGenerator[None, None]:
        log.append((await credits_client_of(app).balance(KEY)).credits)
        yield

    @asynccontextmanager
    async def own(app: FastAPI) -> AsyncIterator[None]:
        make = partial(fake_client, FakeServer())
        async with credits_lifespan(make, lifespan=bare)(app):  # type: ignore[arg-type]  # FastAPI once accepted a generator function
            yield

    app = FastAPI(lifespan=own)

    @app.get("/")
    async def found(client: CreditsDep) -> str:
        return type(client).__name__

    with TestClient(app) as caller:
        assert caller.get("/").json() == "CreditsClient"
    assert log == [9406]


def test_a_mounted_app_and_a_web_socket_find_the_client_too() -> None:
    """Only the outermost app has a lifespan."""
    inner, outer = FastAPI(), FastAPI(lifespan=credits_lifespan())
    outer.mount("/inner", inner)

    @inner.get("/")
    async def found(client: CreditsDep) -> bool:
        return client is credits_client_of(outer)

    @outer.websocket("/socket")
    async def talk(socket: WebSocket, client: CreditsDep) -> None:
        await socket.accept()
        await socket.send_json(client is credits_client_of(outer))
        await socket.close()

    with TestClient(outer) as caller:
        assert caller.get("/inner/").json() is True
        with caller.websocket_connect("/socket") as socket:
            assert socket.receive_json() is True


def test_without_the_lifespan_an_error_names_the_remedy() -> None:
    """In a request and in the accessor; also after the end of the app."""
    app = FastAPI(lifespan=credits_lifespan())

    @app.get("/")
    async def never(client: CreditsDep) -> None: ...

    with pytest.raises(ConfigurationError, match="its lifespan did not run; make the app with"):
        TestClient(app).get("/")
    with TestClient(app):
        pass
    with pytest.raises(ConfigurationError, match="override get_credits_client"):
        credits_client_of(app)


async def test_a_client_instead_of_a_function_is_refused() -> None:
    """It could serve one start of the app only."""
    for mistake in (CreditsClient(), None, 5):
        with pytest.raises(
            ConfigurationError, match=r"give CreditsClient itself, or functools\.partial"
        ):
            credits_lifespan(mistake)  # type: ignore[arg-type]  # the mistake under test


def test_two_concurrent_starts_of_one_app_have_a_client_each() -> None:
    """As with two `TestClient`s; each start has its own loop."""
    quick = partial(CreditsClient, retry=QUICK)
    app = FastAPI(lifespan=credits_lifespan(quick, lifespan=credits_lifespan(quick)))

    @app.get("/")
    async def ask(client: CreditsDep) -> str:
        with pytest.raises(APIConnectionError):
            await client.balance(KEY)
        return "on the right loop"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRUSTDATA_API_URL", "http://127.0.0.1:9")
        with TestClient(app) as one:
            with TestClient(app) as two:
                assert [caller.get("/").status_code for caller in (one, two)] == [200, 200]
                inner = credits_client_of(app)
            assert credits_client_of(app) is not inner
            assert one.get("/").status_code == 200
    with pytest.raises(ConfigurationError):
        credits_client_of(app)


def test_the_accessor_finds_the_app_inside_wrappers() -> None:
    """A `TestClient`, and middlewares; an object without an app has no client."""
    app = FastAPI(lifespan=credits_lifespan())
    with TestClient(CORSMiddleware(app)) as caller:
        assert credits_client_of(caller) is credits_client_of(app)
    with pytest.raises(ConfigurationError, match="no credits client"):
        credits_client_of(object())


def test_an_unusable_lifespan_is_refused() -> None:
    """Common mistakes: not called, no lifespan, and a function that returns another object."""
    with (
        pytest.raises(ConfigurationError, match=r"write FastAPI\(lifespan=credits_lifespan\(\)\)"),
        TestClient(
            FastAPI(lifespan=credits_lifespan)  # type: ignore[arg-type]  # the mistake under test
        ),
    ):
        pass
    with pytest.raises(
        ConfigurationError, match="lifespan must be a callable lifespan of FastAPI, not a str"
    ):
        credits_lifespan(lifespan="x")  # type: ignore[arg-type]  # the mistake under test
    with (
        pytest.raises(ConfigurationError, match="must return a CreditsClient, not a dict"),
        TestClient(
            FastAPI(lifespan=credits_lifespan(dict))  # type: ignore[arg-type]  # the mistake under test
        ),
    ):
        pass


async def test_a_test_can_override_the_client(
    sandbox: SandboxServer, credits_client: CreditsClient
) -> None:
    """The router uses it, without a lifespan."""
    app = FastAPI()
    app.include_router(credits_router([sandbox.add_key("prod", credits="7.50")], public=True))
    app.dependency_overrides[get_credits_client] = lambda: credits_client
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as caller:
        assert (await caller.get("/keys/prod")).json()["credits"] == "7.50"


# --- models


def outcome(credits: str) -> Outcome:
    return Known(balance=Balance(key=KEY, credits=Decimal(credits), checked_at=NOON))


@pytest.mark.parametrize(
    "credits", ["138940.37", "0.10", "1E+3", "9" * 64, "-0.5", "0." + "0" * 60 + "1"]
)
def test_credits_are_text_exact_to_the_digit(credits: str) -> None:
    """Without an exponent, and parsed back to the same number."""
    response = KeyResponse.model_validate(outcome(credits))
    text = json.loads(response.model_dump_json())["credits"]
    assert text == format(Decimal(credits), "f")
    again = KeyResponse.model_validate_json(response.model_dump_json())
    assert again.credits == Decimal(credits)
    assert (again.key, again.account) == ("acme/prod", "acme")


def test_times_are_in_utc_and_the_age_counts_from_them() -> None:
    """For any zone of the clock; never below 0."""
    east = NOON.astimezone(timezone(timedelta(hours=5)))
    balance = BalanceResponse.model_validate(Balance(key=KEY, credits=Decimal(1), checked_at=east))
    plain = json.loads(balance.model_dump_json())
    assert plain["checked_at"] == "2026-01-01T12:00:00Z"
    assert plain["age"] == pytest.approx((datetime.now(UTC) - NOON).total_seconds(), abs=60)
    ahead = BalanceResponse.model_validate(
        Balance(key=KEY, credits=Decimal(1), checked_at=datetime.now(UTC) + timedelta(days=1))
    )
    assert ahead.age == 0


def test_an_account_response_has_every_field() -> None:
    """Numbers in its untyped parts are text too."""
    account = Account(
        key=KEY,
        credits=Decimal("5.0"),
        checked_at=NOON,
        recurring_credits=Decimal("1E+2"),
        recurring_credits_frequency="monthly",
        recurring_credits_refresh_date=NOON,
        credit_rollover=True,
        wallets=[{"left": Decimal("1E+1")}],
        extra={"plan": Decimal("9.99")},
    )
    plain = json.loads(AccountResponse.model_validate(account).model_dump_json())
    assert plain.pop("age") > 0
    assert plain == {
        "key": "acme/prod",
        "account": "acme",
        "credits": "5.0",
        "checked_at": "2026-01-01T12:00:00Z",
        "stale": False,
        "recurring_credits": "100",
        "recurring_credits_frequency": "monthly",
        "recurring_credits_refresh_date": "2026-01-01T12:00:00Z",
        "credit_rollover": True,
        "wallets": [{"left": "10"}],
        "credit_topups": None,
        "extra": {"plan": "9.99"},
    }


async def test_own_routes_can_return_the_clients_objects(sandbox: SandboxServer) -> None:
    """The response model converts them."""
    sandbox.add_account("acme", credits="9.5", recurring_credits=10)
    key = sandbox.add_key("prod", account="acme")
    app = app_of(sandbox)

    @app.get("/balance", response_model=BalanceResponse)
    async def balance(client: CreditsDep) -> Any:
        return await client.balance(key)

    @app.get("/account", response_model=AccountResponse)
    async def account(client: CreditsDep) -> Any:
        return await client.account(key)

    @app.get("/pool", response_model=PoolResponse)
    async def pool(client: CreditsDep) -> Any:
        return await client.check([key])

    async with calling(app) as caller:
        answers = [(await caller.get(path)).json() for path in ("/balance", "/account", "/pool")]
    assert [
        answers[0]["credits"],
        answers[1]["recurring_credits"],
        answers[2]["total_credits"],
    ] == ["9.5", "10", "9.5"]
    assert answers[2]["accounts"] == {"acme": "9.5"}


def test_a_pool_response_can_be_read_back() -> None:
    """A client in Python has the same models."""
    error = InvalidKeyError("no such key", status=401, key_name="prod")
    failed = Unknown(key=ApiKey("sk-2", name="dev"), error=error, checked_at=NOON, attempts=1)
    report = Report([outcome("5"), failed])
    response = PoolResponse.model_validate(report)
    again = PoolResponse.model_validate_json(
        response.model_dump_json(exclude={"keys": {"__all__": {"age"}}})
    )
    assert again == response
    assert again.keys[1].error is not None
    assert again.keys[1].error.title == "The credits API does not know the key"


# --- the router


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "access to the credits is undecided; give dependencies"),
        ({"dependencies": []}, "access to the credits is undecided; give dependencies"),
        ({"public": True, "dependencies": [Depends(list)]}, "are both given; keep one of them"),
        ({"public": None}, "public must be True or False, not None"),
        (
            {"public": 1, "dependencies": [Depends(list)]},
            "public must be True or False, not an int",
        ),
        ({"public": "no"}, "public must be True or False, not a str"),
        ({"dependencies": [list]}, r"dependencies must be Depends\(…\), not a type; wrap it"),
        ({"public": True, "keys": "sk-0123456789"}, "put it in a list"),
        (
            {"public": True, "keys": {"a": "sk-1", "a ": "sk-2"}},
            "two different keys have this label",
        ),
        (
            {"public": True, "max_age": -1},
            "max_age must be a finite number of seconds of at least 0",
        ),
        ({"public": True, "stale_if_error": "1h"}, "stale_if_error must be a finite number"),
        ({"public": True, "timeout": 0}, "timeout must be a finite number of seconds above 0"),
    ],
)
def test_an_unusable_router_is_refused(options: dict[str, Any], said: str) -> None:
    """When it is made; first of all a router without a decision about access."""
    with pytest.raises(ConfigurationError, match=said):
        credits_router(**({"keys": [KEY]} | options))


async def test_the_pool_is_shown_by_name(sandbox: SandboxServer) -> None:
    """With totals; a broken or unusable key is unknown, not zero."""
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    app = app_of(sandbox, sandbox.add_key("prod", credits="7.50"), broken, "two words")
    async with calling(app) as caller:
        pool = (await caller.get("/credits/keys")).json()
    assert [(key["key"], key["state"], key["credits"]) for key in pool["keys"]] == [
        ("prod", "fresh", "7.50"),
        ("broken", "failed", None),
        ("keys[2]", "failed", None),
    ]
    assert {
        name: pool[name] for name in ("ok", "succeeded", "failed", "stale", "total_credits")
    } == {
        "ok": False,
        "succeeded": 1,
        "failed": 2,
        "stale": 0,
        "total_credits": "7.50",
    }
    assert pool["keys"][1]["error"] == {
        "type": "urn:crustcredits:PermissionDeniedError",
        "title": "The plan or the key's rights do not allow the request",
    }


async def test_the_pool_can_be_filtered_and_sorted(sandbox: SandboxServer) -> None:
    """By state and account; by name, credits and age. The totals are those of the keys listed."""
    sandbox.add_account("acme", credits=20)
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    pool = [
        broken,
        sandbox.add_key("b", account="acme"),
        sandbox.add_key("c", credits=3),
        sandbox.add_key("a", credits=100),
    ]

    async with calling(app_of(sandbox, *pool, max_age=60)) as caller:

        async def names(query: str) -> list[str]:
            return [
                key["key"] for key in (await caller.get(f"/credits/keys{query}")).json()["keys"]
            ]

        for key in pool:
            await caller.get(f"/credits/keys/{key.label}")
        assert await names("") == ["broken", "acme/b", "c", "a"]
        assert await names("?sort=name") == ["a", "acme/b", "broken", "c"]
        assert await names("?sort=credits") == ["c", "acme/b", "a", "broken"]
        assert await names("?sort=-credits") == ["a", "acme/b", "c", "broken"]
        assert await names("?sort=-age") == ["acme/b", "c", "a", "broken"]
        assert await names("?sort=age") == ["a", "c", "acme/b", "broken"]
        assert await names("?sort=age&state=fresh") == ["a", "c", "acme/b"]
        assert await names("?state=failed") == ["broken"]
        assert await names("?state=stale") == []
        filtered = (await caller.get("/credits/keys?account=acme")).json()
        assert [key["key"] for key in filtered["keys"]] == ["acme/b"]
        assert filtered["total_credits"] == "20"
        assert (await caller.get("/credits/keys?state=nice")).status_code == 422
        assert (await caller.get("/credits/keys?sort=nice")).status_code == 422


async def test_one_key_is_shown_by_label(sandbox: SandboxServer) -> None:
    """Account and name with a slash; an unknown label is not repeated."""
    sandbox.add_account("acme", credits="0.10")
    app = app_of(sandbox, sandbox.add_key("prod", account="acme"))
    async with calling(app) as caller:
        answer = await caller.get("/credits/keys/acme/prod")
        assert (answer.status_code, answer.json()["credits"]) == (200, "0.10")
        assert (await caller.get("/credits/keys/acme%2Fprod")).json()["key"] == "acme/prod"
        unknown = await caller.get("/credits/keys/sk-0123456789")
    assert unknown.status_code == 404
    assert unknown.headers["content-type"] == "application/problem+json"
    assert "sk-0123456789" not in unknown.text


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Fault.FORBIDDEN, 502),
        (Fault.PAYMENT_REQUIRED, 502),
        (Fault.BAD_GATEWAY, 502),
        (Fault.NOT_JSON, 502),
        (Fault.RESET, 503),
        (Fault.REFUSED, 503),
        (Fault.SILENCE, 504),
    ],
)
async def test_a_failed_check_is_a_problem_document(
    sandbox: SandboxServer, fault: Fault, status: int
) -> None:
    """Its status tells client from server errors, and it has no text of the API."""
    key = sandbox.add_key("prod")
    sandbox.fail(key, fault, retry_after=7)
    async with calling(app_of(sandbox, key, timeout=0.2)) as caller:
        answer = await caller.get("/credits/keys/prod")
    assert answer.status_code == answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("retry-after") == ("7" if fault is Fault.REFUSED else None)
    assert answer.json()["key"] == "prod"
    assert "plan" not in answer.text or fault is Fault.FORBIDDEN
    assert "nginx" not in answer.text


async def test_callers_may_accept_older_answers_but_not_demand_newer_ones(
    sandbox: SandboxServer,
) -> None:
    """Otherwise they could use up the rate limit."""
    app = app_of(sandbox, sandbox.add_key("prod"), max_age=timedelta(seconds=5))
    async with calling(app) as caller:
        for _ in range(3):
            assert (await caller.get("/credits/keys/prod?max_age=60")).status_code == 200
            assert (await caller.get("/credits/keys")).status_code == 200
        for path in ("/credits/keys", "/credits/keys/prod"):
            for wrong in ("1", "nan", "inf", "x"):
                assert (await caller.get(f"{path}?max_age={wrong}")).status_code == 422
    assert sandbox.requests == 1


async def test_a_failure_is_cached_for_max_age(sandbox: SandboxServer) -> None:
    """On its own and in the pool, beside the balances of the other keys."""
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    app = app_of(
        sandbox,
        sandbox.add_key("a", credits=1),
        broken,
        sandbox.add_key("b", credits=2),
        max_age=30,
    )
    async with calling(app) as caller:
        for _ in range(2):
            assert (await caller.get("/credits/keys/broken?max_age=60")).status_code == 502
            pool = (await caller.get("/credits/keys?max_age=60")).json()
            assert [key["credits"] for key in pool["keys"]] == ["1", None, "2"]
    assert sandbox.requests == 3


async def test_a_failing_key_is_checked_again_after_max_error_age(sandbox: SandboxServer) -> None:
    """Its failure is not shown for ever."""
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    async with calling(app_of(sandbox, broken, max_age=0.01, max_error_age=0.01)) as caller:
        assert (await caller.get("/credits/keys/broken?max_age=60")).status_code == 502
        sandbox.heal(broken)
        await asyncio.sleep(0.05)
        assert (await caller.get("/credits/keys/broken?max_age=60")).status_code == 200
        assert (await caller.get("/credits/keys?max_age=60")).json()["ok"] is True
    assert sandbox.requests == 2


async def test_an_age_may_exceed_the_range_of_dates(sandbox: SandboxServer) -> None:
    """As for 1e200 s."""
    broken = sandbox.add_key("broken")
    sandbox.fail(broken, Fault.FORBIDDEN)
    async with calling(app_of(sandbox, broken, max_age=1e200)) as caller:
        assert {(await caller.get("/credits/keys/broken")).status_code for _ in range(2)} == {502}


async def test_a_failing_key_is_logged_once(
    sandbox: SandboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Callers never see the API's text; a new failure after a success is logged again."""
    key = sandbox.add_key("prod")
    async with calling(
        app_of(sandbox, key, sandbox.add_key("dev"), stale_while_revalidate=0, stale_if_error=0)
    ) as caller:
        for _ in range(2):
            sandbox.fail(key, Fault.FORBIDDEN, times=3)
            for _ in range(5):
                await caller.get("/credits/keys")
    said = (
        "prod: the plan or the key's rights do not allow the request (Not in your plan); change "
        "them, or use another key (HTTP 403); logged once until the key is answered again"
    )
    assert caplog.messages == [said] * 2


def test_an_empty_pool_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It is mostly a variable that is not set."""
    credits_router([], public=True)
    assert (
        "the pool of the router is empty, because it was made without keys; if they come from the "
        "environment, set CRUSTDATA_API_KEYS" in caplog.text
    )


async def test_a_balance_young_enough_goes_before_a_failure(sandbox: SandboxServer) -> None:
    """Each caller's own `max_age` decides."""
    key = sandbox.add_key("prod")
    app = app_of(sandbox, key, max_age=0.05, stale_while_revalidate=0, stale_if_error=0)
    async with calling(app) as caller:
        await caller.get("/credits/keys/prod")
        sandbox.fail(key, Fault.UNAVAILABLE)
        await asyncio.sleep(0.05)
        answers = [
            (await caller.get(f"/credits/keys/prod{query}")).status_code
            for query in ("", "", "?max_age=60")
        ]
    assert answers == [502, 502, 200]
    assert sandbox.requests == 2


async def test_a_closed_client_is_answered_as_shutting_down(sandbox: SandboxServer) -> None:
    """Also without the exception handlers."""
    app = app_of(sandbox, sandbox.add_key("prod"))
    async with calling(app) as caller:
        await credits_client_of(app).close()
        for path in ("keys", "keys/prod"):
            answer = await caller.get(f"/credits/{path}")
            assert (answer.status_code, answer.json()["title"]) == (
                503,
                "The service is shutting down",
            )


async def test_an_empty_list_has_zero_credits(sandbox: SandboxServer) -> None:
    """An empty list holds 0 credits, and nothing is unknown."""
    async with calling(app_of(sandbox, sandbox.add_key("prod", account=None))) as caller:
        for query in ("account=typo", "state=stale"):
            pool = (await caller.get(f"/credits/keys?{query}")).json()
            assert (pool["keys"], pool["total_credits"]) == ([], "0")


async def test_a_stale_answer_has_its_error_beside_it(sandbox: SandboxServer) -> None:
    """While the API is down."""
    key = sandbox.add_key("prod", credits=5)
    async with calling(app_of(sandbox, key, stale_while_revalidate=0)) as caller:
        await caller.get("/credits/keys/prod")
        sandbox.fail(key, Fault.UNAVAILABLE)
        answer = (await caller.get("/credits/keys/prod")).json()
    assert (answer["state"], answer["credits"], answer["source"]) == ("stale", "5", "cached")
    assert answer["error"]["title"] == "The credits API failed"


async def test_dependencies_guard_every_route(sandbox: SandboxServer) -> None:
    """A refused caller causes no request."""

    async def refuse() -> None:
        raise HTTPException(403)

    app = app_of(sandbox, sandbox.add_key("prod"), public=False, dependencies=[Depends(refuse)])
    async with calling(app) as caller:
        for path in ("keys", "keys/prod", "healthz"):
            assert (await caller.get(f"/credits/{path}")).status_code == 403
    assert sandbox.requests == 0


# --- health


async def test_health_is_read_from_the_cache(sandbox: SandboxServer) -> None:
    """`unknown`, then `degraded` with reasons, then `ok`, and never a request for it."""
    keys = [sandbox.add_key("prod"), sandbox.add_key("dev")]
    sandbox.fail(keys[1], Fault.FORBIDDEN)
    async with calling(app_of(sandbox, *keys, max_error_age=0)) as caller:

        async def health() -> dict[str, Any]:
            answer = await caller.get("/credits/healthz")
            assert answer.status_code == 200
            health: dict[str, Any] = answer.json()
            return health

        assert await health() == {
            "status": "unknown",
            "keys": 2,
            "known": 0,
            "reasons": ["keys not checked so far: 2 of 2; GET /keys checks them"],
        }
        await caller.get("/credits/keys/prod")
        assert (await health())["status"] == "degraded"
        await caller.get("/credits/keys/dev")
        assert await health() == {
            "status": "degraded",
            "keys": 2,
            "known": 1,
            "reasons": ["dev: The plan or the key's rights do not allow the request"],
        }
        sandbox.heal(keys[1])
        asked = sandbox.requests
        await caller.get("/credits/keys/dev")
        assert await health() == {"status": "ok", "keys": 2, "known": 2, "reasons": []}
        assert sandbox.requests == asked + 1


async def test_health_names_stale_and_failing_keys(sandbox: SandboxServer) -> None:
    """A balance that was not refreshed in time, and the reason."""
    key = sandbox.add_key("prod")
    async with calling(
        app_of(sandbox, key, "two words", max_age=0.01, stale_while_revalidate=0)
    ) as caller:
        await caller.get("/credits/keys/prod")
        await asyncio.sleep(0.02)
        health = (await caller.get("/credits/healthz")).json()
        assert health["status"] == "degraded"
        assert health["reasons"][0].startswith("prod: the balance of 20")
        assert health["reasons"][1] == "keys[1]: the key cannot be used; GET /keys logs the cause"
        sandbox.fail(key, Fault.UNAVAILABLE)
        await caller.get("/credits/keys/prod")
        assert (
            (await caller.get("/credits/healthz"))
            .json()["reasons"][0]
            .startswith("prod: The credits API failed; the balance")
        )


async def test_health_shows_a_failure_beside_a_fresh_balance(
    sandbox: SandboxServer,
) -> None:
    """An outage shows before the balances are stale."""
    key = sandbox.add_key("prod")
    async with calling(app_of(sandbox, key)) as caller:
        await caller.get("/credits/keys/prod")
        assert (await caller.get("/credits/healthz")).json()["status"] == "ok"
        sandbox.fail(key, Fault.UNAVAILABLE)
        await caller.get("/credits/keys/prod")  # refreshes it in the background
        await eventually(lambda: sandbox.requests == 2)
        await asyncio.sleep(0.01)
        assert (await caller.get("/credits/healthz")).json() == {
            "status": "degraded",
            "keys": 1,
            "known": 1,
            "reasons": ["prod: The credits API failed"],
        }


async def test_health_names_redis_when_it_is_out_of_reach(
    sandbox: SandboxServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a worker that starts during the outage, before its first call."""
    backend = RedisBackend(f"redis://127.0.0.1:{free_port()}", fallback_share=1)
    app = app_of(sandbox, sandbox.add_key("prod"), client={"backend": backend})
    async with calling(app) as caller:
        health = (await caller.get("/credits/healthz")).json()
        assert health["reasons"][0] == (
            "Redis is out of reach: calls wait or fail until it answers; the log has the cause"
        )
        monkeypatch.setattr("crustcredits.redis.outage.GRACE", 0.0)
        monkeypatch.setattr("crustcredits.redis.outage.LEAST_OUTAGE", 0.0)
        await eventually(lambda: "Redis is out of reach" in caplog.text)
        health = (await caller.get("/credits/healthz")).json()
        assert "this process counts by itself" in health["reasons"][0]


async def test_health_lists_at_most_20_reasons(sandbox: SandboxServer) -> None:
    """And an empty pool is unknown."""
    async with calling(app_of(sandbox, *["two words"] * 30)) as caller:
        health = (await caller.get("/credits/healthz")).json()
    assert health["status"] == "unknown"
    assert len(health["reasons"]) == 20
    assert health["reasons"][-1] == "and 11 more reasons"
    async with calling(app_of(sandbox)) as caller:
        assert (await caller.get("/credits/healthz")).json() == {
            "status": "unknown",
            "keys": 0,
            "known": 0,
            "reasons": ["the pool is empty; give the router keys"],
        }


# --- errors of other routes

SAID = "the API said: sk-0123456789 is on fire"
REPORT = Report([Unknown(key=ApiKey("sk-2", name="dev"), error=InvalidKeyError(SAID, status=401))])


def requirement(*deciding: CrustCreditsError) -> CreditsUnknownError:
    return CreditsUnknownError(
        SAID, needed=Decimal("1E+2"), available=Decimal("0.5"), report=REPORT, deciding=deciding
    )


REVOKED = InvalidKeyError(SAID, status=401)
# The deciding errors, the status and `Retry-After`: only keys that may recover are worth a wait.
DECIDING: list[tuple[list[CrustCreditsError], int, str | None]] = [
    ([REVOKED], 502, None),
    ([REVOKED, PermissionDeniedError(SAID, status=403), ConfigurationError(SAID)], 502, None),
    ([UnexpectedResponseError(SAID, status=200)], 502, None),
    ([APIConnectionError(SAID, retryable=False)], 502, None),
    ([REVOKED, APITimeoutError(SAID)], 503, "5"),
    ([APIConnectionError(SAID)], 503, "5"),
    ([GatewayError(SAID, status=403)], 503, "5"),
    ([InternalServerError(SAID, status=500)], 503, "5"),
    ([BackendUnavailableError(SAID)], 503, "5"),
    ([RateLimitWaitError(SAID, wait=41.2), RateLimitError(SAID, retry_after=12.5)], 503, "13"),
    ([RateLimitError(SAID), REVOKED], 503, "60"),
    ([InternalServerError(SAID, status=503, retry_after=29.5)], 503, "30"),
]
ERRORS: list[tuple[CrustCreditsError, int, str | None]] = [
    (BadRequestError(SAID, status=400, key_name="prod"), 502, None),
    (AuthenticationError(SAID, status=401, key_name="prod"), 502, None),
    (MissingKeyError(SAID, status=401, key_name="prod"), 502, None),
    (InvalidKeyError(SAID, status=401, key_name="prod"), 502, None),
    (PaymentRequiredError(SAID, status=402, key_name="prod"), 502, None),
    (PermissionDeniedError(SAID, status=403, key_name="prod"), 502, None),
    (APIStatusError(SAID, status=418, key_name="prod"), 502, None),
    (InternalServerError(SAID, status=503, key_name="prod"), 502, None),
    (UnexpectedResponseError(SAID, status=200, key_name="prod"), 502, None),
    (RateLimitError(SAID, retry_after=6.2, key_name="prod"), 503, "7"),
    (RateLimitError(SAID, key_name="prod"), 503, "60"),
    (RateLimitWaitError(SAID, wait=0.01, key_name="prod"), 503, "1"),
    (BackendUnavailableError(SAID, key_name="prod"), 503, None),
    (APIConnectionError(SAID, key_name="prod"), 503, None),
    (GatewayError(SAID, status=403, key_name="prod"), 503, None),
    (APITimeoutError(SAID, key_name="prod"), 504, None),
    (ClientClosedError(SAID), 503, None),
    (ConfigurationError(SAID), 500, None),
    (
        InsufficientCreditsError(
            SAID, needed=Decimal("1E+2"), available=Decimal("0.5"), report=REPORT
        ),
        409,
        None,
    ),
    *((requirement(*deciding), status, retry_after) for deciding, status, retry_after in DECIDING),
]


@pytest.mark.parametrize(
    ("error", "status", "retry_after"), ERRORS, ids=[type(error).__name__ for error, *_ in ERRORS]
)
def test_an_error_becomes_a_problem_document(
    error: CrustCreditsError, status: int, retry_after: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With a status and a text of the service's own, and the API's text in the log only."""
    app = FastAPI()
    install_exception_handlers(app)

    @app.get("/")
    async def fail() -> None:
        raise error

    with caplog.at_level(logging.INFO, "crustcredits"):
        answer = TestClient(app).get("/")
    assert answer.status_code == answer.json()["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers.get("retry-after") == retry_after
    assert answer.json()["type"] == f"urn:crustcredits:{type(error).__name__}"
    assert answer.json()["title"]
    assert "on fire" not in answer.text
    assert f"answered with {status}: " in caplog.text
    if isinstance(error, CreditsRequirementError):
        assert (answer.json()["needed"], answer.json()["available"], answer.json()["unknown"]) == (
            "100",
            "0.5",
            ["dev"],
        )


def test_a_web_socket_is_closed_with_a_reason() -> None:
    """Before the socket is accepted, the answer is an HTTP response."""
    app = FastAPI()
    install_exception_handlers(app)

    @app.websocket("/open")
    async def fail_open(socket: WebSocket) -> None:
        await socket.accept()
        raise APITimeoutError(SAID)

    @app.websocket("/door")
    async def fail_at_the_door(socket: WebSocket) -> None:
        raise APITimeoutError(SAID)

    caller = TestClient(app)
    with caller.websocket_connect("/open") as socket, pytest.raises(WebSocketDisconnect) as closed:
        socket.receive_text()
    assert (closed.value.code, closed.value.reason) == (
        1011,
        "The credits API did not answer in time",
    )
    with pytest.raises(WebSocketDenialResponse) as denied, caller.websocket_connect("/door"):
        pass
    assert denied.value.status_code == 504


def test_every_error_has_an_answer() -> None:
    """No class of the tree is missing."""
    kinds = {type(error) for error, *_ in ERRORS} | {CrustCreditsError, CreditsRequirementError}

    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {
        kind
        for kind in below(CrustCreditsError)
        if kind.__module__ in {"crustcredits._errors", "crustcredits._report"}
    } == kinds


# --- the schema, and secrets


def test_the_openapi_document_describes_types_and_problems() -> None:
    """Credits are text, times are times, models have examples, problems their media type."""
    app = FastAPI(lifespan=credits_lifespan())
    app.include_router(credits_router([KEY], public=True), prefix="/credits")

    @app.get("/account", response_model=AccountResponse)
    async def account() -> None: ...

    document = TestClient(app).get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    key = schemas["KeyResponse"]
    assert list(key["properties"]) == [
        "key",
        "account",
        "state",
        "credits",
        "checked_at",
        "source",
        "error",
        "age",
    ]
    assert key["properties"]["credits"]["anyOf"][0] == {
        "type": "string",
        "pattern": r"^-?\d+(\.\d+)?$",
        "description": "Credits, exact to the last digit.",
    }
    assert key["properties"]["checked_at"]["format"] == "date-time"
    for name in ("KeyResponse", "AccountResponse", "HealthResponse"):
        assert schemas[name]["examples"]
    KeyResponse.model_validate(key["examples"][0])
    BalanceResponse.model_validate(schemas["AccountResponse"]["examples"][0])
    assert set(document["paths"]) == {
        "/credits/keys",
        "/credits/keys/{label}",
        "/credits/healthz",
        "/account",
    }
    answers = document["paths"]["/credits/keys/{label}"]["get"]["responses"]
    assert set(answers) == {"200", "404", "422", "500", "502", "503", "504"}
    assert answers["503"]["headers"]["Retry-After"]["schema"] == {"type": "integer"}
    assert set(document["paths"]["/credits/keys"]["get"]["responses"]) == {"200", "422", "503"}
    assert list(answers["504"]["content"]) == ["application/problem+json"]
    assert (
        answers["504"]["content"]["application/problem+json"]["schema"]["properties"]["title"][
            "type"
        ]
        == "string"
    )
    assert KEY.get_secret_value() not in json.dumps(document)


async def test_no_secret_is_in_any_answer_or_log(
    sandbox: SandboxServer, caplog: pytest.LogCaptureFixture
) -> None:
    """For every fault."""
    caplog.set_level(logging.DEBUG)
    keys = []
    for fault in (None, *Fault):
        keys.append(sandbox.add_key(fault.name if fault else "fine"))
        if fault is not None:
            sandbox.fail(keys[-1], fault)
    app = app_of(sandbox, *keys, timeout=0.3, client={"rate_limit": RateLimit(pace=None)})
    install_exception_handlers(app)

    @app.get("/raises")
    async def raises(client: CreditsDep) -> None:
        (await client.check(keys, timeout=0.3)).failed[0].result()

    async with calling(app) as caller:
        paths = [
            "/openapi.json",
            "/raises",
            "/credits/keys",
            "/credits/healthz",
            *(f"/credits/keys/{key.name}" for key in keys),
        ]
        answers = [await caller.get(path) for path in paths]
    shown = [caplog.text, *(answer.text + repr(answer.headers) for answer in answers)]
    assert {answer.status_code for answer in answers} >= {200, 502, 503, 504}
    for text in shown:
        assert not [key.name for key in keys if key.get_secret_value() in text]


def test_an_endless_wait_is_sent_as_a_day() -> None:
    """`Retry-After` must be a finite number of seconds."""
    assert problem_of(RateLimitWaitError("held back", wait=math.inf)).retry_after == 86_400
