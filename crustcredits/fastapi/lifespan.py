"""The client of an app: opened with the app, closed with the app, found through a dependency.

This module must not know routes. A test can override the dependency with another client.
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.types import Lifespan

from crustcredits._client import CreditsClient
from crustcredits._errors import ConfigurationError
from crustcredits._validation import hides_arguments, kind_of

_STATE = "crustcredits_client"


# --- the client


@hides_arguments
def credits_lifespan(
    make_client: Callable[[], CreditsClient] = CreditsClient,
    *,
    lifespan: Lifespan[FastAPI] | None = None,
) -> Lifespan[FastAPI]:
    """Return a lifespan for `FastAPI(lifespan=…)` that opens a client and closes it with the app.

    Args:
        make_client: Makes the client at each start of the app: `CreditsClient`, or a
            `functools.partial` or `lambda` of it with arguments.
        lifespan: Your own lifespan. It runs inside: the client opens before its start and closes
            after its end. To nest the other way, enter this one in yours: `async with
            credits_lifespan()(app): yield`.

    Raises:
        ConfigurationError: `make_client` is a client and not a function that makes one.
    """
    problem = _problem(make_client, lifespan)
    if problem is not None:
        raise ConfigurationError(problem)
    # A partial prints its arguments, and this function's frame lives as long as the app.
    make = _unprinted(make_client)
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
                    # Also in the lifespan's state, which mounted sub-apps can see.
                    yield {**(state or {}), _STATE: client}
            finally:
                setattr(app.state, _STATE, outer)

    return with_client


def _problem(make_client: object, lifespan: object) -> str | None:
    """The reason why arguments of `credits_lifespan` cannot be used, or None."""
    if isinstance(make_client, Starlette):
        return "make_client is the app, not a function; write FastAPI(lifespan=credits_lifespan())"
    if not (lifespan is None or callable(lifespan)):
        return f"lifespan must be a callable lifespan of FastAPI, not {kind_of(lifespan)}"
    if not callable(make_client):
        return (
            "make_client must be a function, because each start of the app needs a new client; "
            "give CreditsClient itself, or functools.partial(CreditsClient, …)"
        )
    return None


def _unprinted(make_client: Callable[[], CreditsClient]) -> Callable[[], CreditsClient]:
    @hides_arguments
    def make() -> CreditsClient:
        made: object = make_client()
        if not isinstance(made, CreditsClient):
            raise ConfigurationError(
                f"make_client must return a CreditsClient, not {kind_of(made)}"
            )
        return made

    return make


@asynccontextmanager
async def _no_lifespan(app: Any) -> AsyncIterator[None]:
    yield


async def get_credits_client(connection: HTTPConnection) -> CreditsClient:
    """Dependency: the app's client, for requests and web sockets. Override it in tests.

    Raises:
        ConfigurationError: The lifespan did not run.
    """
    # The lifespan's state belongs to this start of the app; some servers have none.
    client = getattr(connection.state, _STATE, None) or getattr(connection.app.state, _STATE, None)
    return _client_or_error(client)


#: Type of a route parameter that receives the client.
CreditsDep: TypeAlias = Annotated[CreditsClient, Depends(get_credits_client)]


@hides_arguments
def credits_client_of(app: Any) -> CreditsClient:
    """Return the client of a running app, for your own lifespan and for background tasks.

    `app` may also be a `TestClient`. The client belongs to the app's loop, which under `TestClient`
    is not the test's loop. An override of `get_credits_client` affects routes only: where your
    lifespan uses the client, let `make_client` make another one in tests.

    Raises:
        ConfigurationError: The lifespan did not run, or has ended.
    """
    # A TestClient, and middlewares around the app.
    while not hasattr(app, "state") and hasattr(app, "app"):
        app = app.app
    return _client_or_error(getattr(getattr(app, "state", None), _STATE, None))


def _client_or_error(client: CreditsClient | None) -> CreditsClient:
    if client is None:
        raise ConfigurationError(
            "the app has no credits client, because its lifespan did not run; make the app with "
            "FastAPI(lifespan=credits_lifespan()), "
            "and in tests use `with TestClient(app)`, or override get_credits_client"
        )
    return client
