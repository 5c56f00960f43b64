"""The client of an app: opened with the app, closed with the app, found through a dependency.

It must not know routes. A test puts another client in the dependency's place.
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
from crustcredits._validation import hides_arguments

_STATE = "crustcredits_client"


# --- the client


@hides_arguments
def credits_lifespan(
    make_client: Callable[[], CreditsClient] = CreditsClient,
    *,
    lifespan: Lifespan[FastAPI] | None = None,
) -> Lifespan[FastAPI]:
    """A lifespan for `FastAPI(lifespan=…)` that opens a client with the app and closes it with the app.

    Args:
        make_client: Makes the client, each time the app starts: `CreditsClient`, or a
            `functools.partial` or `lambda` of it with arguments.
        lifespan: Your own. It runs inside: the client is there before it starts and until it has
            ended. To nest the other way, enter this one in yours: `async with
            credits_lifespan()(app): yield`.

    Raises:
        ConfigurationError: `make_client` is a client and no function that makes one.
    """
    if isinstance(make_client, Starlette):
        raise ConfigurationError(
            "credits_lifespan was given the app; call it: FastAPI(lifespan=credits_lifespan())"
        )
    if not (lifespan is None or callable(lifespan)):
        raise ConfigurationError(
            f"lifespan is what FastAPI takes for one, not {type(lifespan).__name__}"
        )
    if not callable(make_client):
        raise ConfigurationError(
            "make_client is a function that makes a client, because each start of the app "
            "needs a new one; "
            "give CreditsClient itself, or functools.partial(CreditsClient, …)"
        )
    make = _unprinted(
        make_client
    )  # a partial prints its arguments, and this function's frame lives as long as the app
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
                    # In the lifespan's state too, which reaches the apps that are mounted below
                    # this one.
                    yield {**(state or {}), _STATE: client}
            finally:
                setattr(app.state, _STATE, outer)

    return with_client


def _unprinted(make_client: Callable[[], CreditsClient]) -> Callable[[], CreditsClient]:
    @hides_arguments
    def make() -> CreditsClient:
        made: object = make_client()
        if not isinstance(made, CreditsClient):
            raise ConfigurationError(
                f"make_client is to make a CreditsClient, and made a {type(made).__name__}"
            )
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

    It belongs to the app's loop, which under `TestClient` is another than the test's. An override
    of `get_credits_client` reaches the routes and not this: where your lifespan uses the client,
    let `make_client` make another in tests.

    Raises:
        ConfigurationError: The lifespan did not run, or has ended.
    """
    while not hasattr(app, "state") and hasattr(
        app, "app"
    ):  # a TestClient, and middlewares around the app
        app = app.app
    return _client_or_error(getattr(getattr(app, "state", None), _STATE, None))


def _client_or_error(client: CreditsClient | None) -> CreditsClient:
    if client is None:
        raise ConfigurationError(
            "the app has no credits client, because its lifespan did not run: make it with "
            "FastAPI(lifespan=credits_lifespan()), "
            "and in tests use `with TestClient(app)` or override get_credits_client"
        )
    return client
