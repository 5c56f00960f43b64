"""crustcredits in a FastAPI service: a lifespan, a dependency, a router and exception handlers. Needs the extra `fastapi`.

The client lives as long as the app and is found through its dependency only, so that a test can put another in its place.
Keys appear by their labels. What a router answers is `_pool`'s, in the models of `_responses`; what becomes of errors is
`_problems`'.
"""

import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Depends, FastAPI, Query, WebSocket, status
from fastapi.params import Depends as DependsParam
from fastapi.responses import JSONResponse
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.types import Lifespan
from starlette.websockets import WebSocketState

from crustcredits._cache.policy import NEW, Seconds, seconds
from crustcredits._client import CreditsClient
from crustcredits._errors import ClientClosedError, ConfigurationError, CrustCreditsError
from crustcredits._keys.api_key import KeysLike, pool_of
from crustcredits._models import State
from crustcredits._validation import check_kind, hides_arguments
from crustcredits.fastapi.pool import Pool, Sort
from crustcredits.fastapi.problem_details import Problem, problem_of
from crustcredits.fastapi.schemas import (
    AccountResponse,
    BalanceResponse,
    ErrorResponse,
    HealthResponse,
    KeyResponse,
    PoolResponse,
    ProblemResponse,
)

__all__ = [
    "AccountResponse",
    "BalanceResponse",
    "CreditsDep",
    "ErrorResponse",
    "HealthResponse",
    "KeyResponse",
    "PoolResponse",
    "ProblemResponse",
    "credits_client_of",
    "credits_lifespan",
    "credits_router",
    "get_credits_client",
    "install_exception_handlers",
]

_log = logging.getLogger("crustcredits")

_STATE = "crustcredits_client"


# --- the client


@hides_arguments
def credits_lifespan(
    make_client: Callable[[], CreditsClient] = CreditsClient, *, lifespan: Lifespan[FastAPI] | None = None
) -> Lifespan[FastAPI]:
    """A lifespan for `FastAPI(lifespan=…)` that opens a client with the app and closes it with the app.

    Args:
        make_client: Makes the client, each time the app starts: `CreditsClient`, or a `functools.partial` or `lambda` of it
            with arguments.
        lifespan: Your own. It runs inside: the client is there before it starts and until it has ended. To nest the
            other way, enter this one in yours: `async with credits_lifespan()(app): yield`.

    Raises:
        ConfigurationError: `make_client` is a client and no function that makes one.
    """
    if isinstance(make_client, Starlette):
        raise ConfigurationError("credits_lifespan was given the app; call it: FastAPI(lifespan=credits_lifespan())")
    if not (lifespan is None or callable(lifespan)):
        raise ConfigurationError(f"lifespan is what FastAPI takes for one, not {type(lifespan).__name__}")
    if not callable(make_client):
        raise ConfigurationError(
            "make_client is a function that makes a client, because each start of the app needs a new one; "
            "give CreditsClient itself, or functools.partial(CreditsClient, …)"
        )
    make = _unprinted(make_client)  # a partial prints its arguments, and this function's frame lives as long as the app
    inner = lifespan or _no_lifespan
    if inspect.isasyncgenfunction(inner):
        inner = asynccontextmanager(inner)

    @asynccontextmanager
    async def with_client(app: FastAPI) -> AsyncGenerator[Mapping[str, Any], None]:
        async with make() as client:
            outer = getattr(app.state, _STATE, None)
            setattr(app.state, _STATE, client)
            try:
                async with inner(app) as state:
                    # In the lifespan's state too, which reaches the apps that are mounted below this one.
                    yield {**(state or {}), _STATE: client}
            finally:
                setattr(app.state, _STATE, outer)

    return with_client


def _unprinted(make_client: Callable[[], CreditsClient]) -> Callable[[], CreditsClient]:
    @hides_arguments
    def make() -> CreditsClient:
        made: object = make_client()
        if not isinstance(made, CreditsClient):
            raise ConfigurationError(f"make_client is to make a CreditsClient, and made a {type(made).__name__}")
        return made

    return make


@asynccontextmanager
async def _no_lifespan(app: Any) -> AsyncIterator[None]:
    yield


async def get_credits_client(connection: HTTPConnection) -> CreditsClient:
    """The dependency: the app's client, for requests and web sockets. What to override in tests.

    Raises:
        ConfigurationError: The lifespan did not run.
    """
    # The lifespan's state is that of this very start of the app; a server may know none.
    client = getattr(connection.state, _STATE, None) or getattr(connection.app.state, _STATE, None)
    return _client_or_error(client)


#: The parameter of a route that wants the client.
CreditsDep: TypeAlias = Annotated[CreditsClient, Depends(get_credits_client)]


@hides_arguments
def credits_client_of(app: Any) -> CreditsClient:
    """The client of a running app, or of the app in a `TestClient`: for your own lifespan, and for tasks beside the requests.

    It belongs to the app's loop, which under `TestClient` is another than the test's. An override of `get_credits_client`
    reaches the routes and not this: where your lifespan uses the client, let `make_client` make another in tests.

    Raises:
        ConfigurationError: The lifespan did not run, or has ended.
    """
    while not hasattr(app, "state") and hasattr(app, "app"):  # a TestClient, and middlewares around the app
        app = app.app
    return _client_or_error(getattr(getattr(app, "state", None), _STATE, None))


def _client_or_error(client: CreditsClient | None) -> CreditsClient:
    if client is None:
        raise ConfigurationError(
            "the app has no credits client, because its lifespan did not run: make it with FastAPI(lifespan=credits_lifespan()), "
            "and in tests use `with TestClient(app)` or override get_credits_client"
        )
    return client


# --- errors


@hides_arguments
def install_exception_handlers(app: FastAPI) -> None:
    """Answer this library's errors, wherever a route raises them, with `application/problem+json`; web sockets are closed.

    Timeouts are 504; out of reach is 503; refused or held back by the rate limit is 503 with `Retry-After`. Not enough credits
    is 409. Credits that are unknown are 503 with `Retry-After` where a key that decides may recover, else 502. A mistake in
    the service's own set-up is 500; and the rest, also the API's 401, 402 and 403, is 502. What the
    API said goes to the log, and none of it into the answer.
    """
    app.add_exception_handler(CrustCreditsError, _on_error)  # type: ignore[arg-type]  # typed for requests or for web sockets


async def _on_error(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
    assert isinstance(error, CrustCreditsError)
    problem = problem_of(error)
    _log.log(logging.INFO if problem.status == 409 else logging.WARNING, "answered with %d: %s", problem.status, error)
    if isinstance(connection, WebSocket) and connection.application_state is WebSocketState.CONNECTED:
        await connection.close(status.WS_1011_INTERNAL_ERROR, problem.title)
        return None
    return _problem_response(problem)


def _problem_response(problem: Problem) -> JSONResponse:
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    return JSONResponse(problem.document(), status_code=problem.status, headers=headers, media_type="application/problem+json")


# --- the router


@hides_arguments
def credits_router(
    keys: KeysLike,
    *,
    public: bool = False,
    dependencies: Sequence[DependsParam] = (),
    max_age: Seconds = 5.0,
    stale_while_revalidate: Seconds = 120.0,
    stale_if_error: Seconds = 3600.0,
    max_error_age: Seconds | None = None,
    timeout: Seconds = 10.0,
    prefix: str = "",
    tags: Sequence[str] = ("credits",),
) -> APIRouter:
    """A router that shows a pool: `GET /keys`, `GET /keys/{label}` and `GET /healthz`, below `prefix`.

    `/healthz` never does I/O: it tells from kept answers whether the pool is `ok`, `degraded` or `unknown`, with status 200.
    A key that cannot be used is listed as failed.

    Args:
        keys: The pool; keys are shown by their labels.
        public: Say `True` to let everybody see it.
        dependencies: Else who may, as for `APIRouter`: `[Depends(…)]` of what raises where somebody may not.
        max_age: Seconds, or a timedelta, as for `CreditsClient`. Callers may ask for older answers, not for newer ones, so that
            they cannot use up the rate limit.
        stale_while_revalidate: The same, as for `CreditsClient`. What the client itself goes by does not count here.
        stale_if_error: The same, as for `CreditsClient`.
        max_error_age: The same, as for `CreditsClient`; by default `max_age`, and at least 1 s.
        timeout: Seconds, or a timedelta, that a caller waits at the most.
        prefix: As for `APIRouter`.
        tags: As for `APIRouter`.

    Raises:
        ConfigurationError: Neither or both of `public` and `dependencies` are given; this is no pool, or two different keys have
            one name, or one secret two accounts; or another argument cannot be used.
    """
    pool = pool_of(keys)
    check_kind("prefix", prefix, str)
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise ConfigurationError("prefix begins with '/' and does not end with one: prefix='/credits'")
    problem = _audience_problem(public, dependencies)
    if problem is not None:
        raise ConfigurationError(problem)
    freshness = NEW.given(
        max_age=max_age,
        stale_while_revalidate=stale_while_revalidate,
        stale_if_error=stale_if_error,
        max_error_age=max_error_age,
    )
    shown = Pool(pool, freshness, seconds("timeout", timeout, above=0))
    router = APIRouter(prefix=prefix, tags=list(tags), dependencies=list(dependencies))
    _add_routes(router, shown, freshness.max_age)
    return router


def _audience_problem(public: object, dependencies: Sequence[object]) -> str | None:
    # Nothing but True makes it public: a setting that is missing, or a text, is no such word.
    if not isinstance(public, bool):
        return f"say who may see the credits: public is True or False, not {type(public).__name__}"
    if public and dependencies:
        return "say who may see the credits: everybody, with public=True, or whom the dependencies let through, but not both"
    if not public and not dependencies:
        return "say who may see the credits: give dependencies=[Depends(…)], or public=True for everybody"
    wrong = next((each for each in dependencies if not isinstance(each, DependsParam)), None)
    return None if wrong is None else f"dependencies are Depends(…); wrap this {type(wrong).__name__} in it"


def _documented(answers: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document."""
    content = {"application/problem+json": {"schema": ProblemResponse.model_json_schema()}}
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": description, "content": content} for status, description in answers.items()
    }
    documented[503]["headers"] = {"Retry-After": {"description": "Seconds, where known.", "schema": {"type": "integer"}}}
    return documented


_CLOSING = {503: "The service is shutting down"}
_UNKNOWN = {
    404: "No key of the pool has this label",
    500: "The key cannot be used",
    502: "The API says no to the service's key, or something that is no balance",
    503: "The API cannot be reached, or the rate limit leaves no room, or the service is shutting down",
    504: "The API does not answer in time",
}


def _add_routes(router: APIRouter, pool: Pool, floor: float) -> None:
    bounds = Query(ge=floor, le=max(floor, 1e9), description="Seconds that a balance may be old without being stale.")

    @router.get("/keys", response_model=PoolResponse, responses=_documented(_CLOSING), summary="The pool, by label")
    async def get_keys(
        client: CreditsDep,
        state: Annotated[State | None, Query(description="Only keys in this state.")] = None,
        account: Annotated[str | None, Query(description="Only keys that declare this account.")] = None,
        sort: Annotated[Sort, Query(description="`-` for the largest first; what is unknown comes last.")] = "given",
        max_age: Annotated[float, bounds] = floor,
    ) -> Any:
        try:
            return await pool.report(client, state, account, sort, max_age)
        except ClientClosedError as error:
            return _problem_response(problem_of(error))

    @router.get(
        "/keys/{label:path}",
        response_model=KeyResponse,
        responses=_documented(_UNKNOWN),
        summary="One key, by label",
    )
    async def get_key(label: str, client: CreditsDep, max_age: Annotated[float, bounds] = floor) -> Any:
        try:
            outcome = await pool.outcome(client, label, max_age)
        except CrustCreditsError as error:
            return _problem_response(problem_of(error))
        # The label is not repeated: it may be a secret in the wrong place.
        return outcome or _problem_response(Problem(status=404, type="about:blank", title="Not Found"))

    @router.get("/healthz", response_model=HealthResponse, summary="What is known of the pool without asking")
    async def get_health(client: CreditsDep) -> Any:
        return pool.health(client)
