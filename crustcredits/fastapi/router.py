"""`credits_router`: routes that show a pool of keys. Keys appear by their labels.

`pool` makes the answers, in the models of `schemas`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.params import Depends as DependsParam

from crustcredits._cache.policy import NEW
from crustcredits._errors import ClientClosedError, ConfigurationError, CrustCreditsError
from crustcredits._keys.key_pool import KeysLike, pool_of
from crustcredits._models import State
from crustcredits._validation import Seconds, check_kind, hides_arguments, kind_of, seconds
from crustcredits.fastapi.exception_handlers import _problem_response
from crustcredits.fastapi.lifespan import CreditsDep
from crustcredits.fastapi.pool import Pool, Sort
from crustcredits.fastapi.problem_details import Problem, problem_of
from crustcredits.fastapi.schemas import (
    HealthResponse,
    KeyResponse,
    PoolResponse,
    ProblemResponse,
)

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
    """Return a router: `GET /keys`, `GET /keys/{label}` and `GET /healthz` below `prefix`.

    `/healthz` does no I/O: it reads the cache, and its status is `ok`, `degraded` or `unknown`,
    always with HTTP status 200. An unusable key is listed as failed.

    Args:
        keys: The pool; keys are shown by their labels.
        public: `True` lets everybody see it.
        dependencies: Access checks, as for `APIRouter`: `[Depends(…)]` of functions that raise to
            refuse a caller.
        max_age: Seconds, or a timedelta, as for `CreditsClient`. Callers may accept older answers,
            but not demand newer ones, so that they cannot use up the rate limit.
        stale_while_revalidate: The same, as for `CreditsClient`. The client's own setting is
            not used here.
        stale_if_error: The same, as for `CreditsClient`.
        max_error_age: The same, as for `CreditsClient`; by default `max_age`, and at least 1 s.
        timeout: Most seconds that a caller waits, or a timedelta.
        prefix: As for `APIRouter`.
        tags: As for `APIRouter`.

    Raises:
        ConfigurationError: Neither or both of `public` and `dependencies` are given; `keys` is no
            pool, or has two different keys of one name or two accounts of one secret; or another
            argument cannot be used.
    """
    pool = pool_of(keys)
    check_kind("prefix", prefix, str)
    if prefix and (not prefix.startswith("/") or prefix.endswith("/")):
        raise ConfigurationError(
            "prefix must begin with '/' and not end with one; give it as in prefix='/credits'"
        )
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
    _add_pool_route(router, shown, freshness.max_age)
    _add_key_route(router, shown, freshness.max_age)
    _add_health_route(router, shown)
    return router


def _audience_problem(public: object, dependencies: Sequence[object]) -> str | None:
    # Only True makes the router public: a missing setting or a text must not.
    if not isinstance(public, bool):
        return (
            "access to the credits is undecided: public must be True or False, not "
            f"{kind_of(public)}"
        )
    if public and dependencies:
        return (
            "access to the credits is ambiguous, because public=True and dependencies= are both "
            "given; keep one of them"
        )
    if not public and not dependencies:
        return (
            "access to the credits is undecided; give dependencies=[Depends(…)], or public=True "
            "for everybody"
        )
    wrong = next((each for each in dependencies if not isinstance(each, DependsParam)), None)
    return (
        None
        if wrong is None
        else f"dependencies must be Depends(…), not {kind_of(wrong)}; wrap it in Depends(…)"
    )


def _documented(answers: Mapping[int, str]) -> dict[int | str, dict[str, Any]]:
    """Return the error responses for the OpenAPI document."""
    content = {"application/problem+json": {"schema": ProblemResponse.model_json_schema()}}
    documented: dict[int | str, dict[str, Any]] = {
        status: {"description": description, "content": content}
        for status, description in answers.items()
    }
    documented[503]["headers"] = {
        "Retry-After": {"description": "Seconds, where known.", "schema": {"type": "integer"}}
    }
    return documented


_CLOSING = {503: "The service is shutting down"}
_UNKNOWN = {
    404: "No key of the pool has this label",
    500: "The key cannot be used",
    502: "The credits API refuses the service's key, or its answer is no balance",
    503: (
        "The credits API cannot be reached, its rate limit refuses or delays the request, or the "
        "service is shutting down"
    ),
    504: "The credits API did not answer in time",
}


def _age(floor: float) -> Any:
    """The query parameter `max_age`, in seconds: `floor` or more."""
    return Query(
        ge=floor,
        le=max(floor, 1e9),
        description="Age in seconds up to which a balance is fresh.",
    )


def _add_pool_route(router: APIRouter, pool: Pool, floor: float) -> None:
    @router.get(
        "/keys",
        response_model=PoolResponse,
        responses=_documented(_CLOSING),
        summary="The pool, by label",
    )
    async def get_keys(
        client: CreditsDep,
        state: Annotated[State | None, Query(description="Only keys in this state.")] = None,
        account: Annotated[
            str | None, Query(description="Only keys that declare this account.")
        ] = None,
        sort: Annotated[
            Sort, Query(description="`-` for the largest first; unknown values come last.")
        ] = "given",
        max_age: Annotated[float, _age(floor)] = floor,
    ) -> Any:
        try:
            return await pool.report(client, state, account, sort, max_age)
        except ClientClosedError as error:
            return _problem_response(problem_of(error))


def _add_key_route(router: APIRouter, pool: Pool, floor: float) -> None:
    @router.get(
        "/keys/{label:path}",
        response_model=KeyResponse,
        responses=_documented(_UNKNOWN),
        summary="One key, by label",
    )
    async def get_key(
        label: str, client: CreditsDep, max_age: Annotated[float, _age(floor)] = floor
    ) -> Any:
        try:
            outcome = await pool.outcome(client, label, max_age)
        except CrustCreditsError as error:
            return _problem_response(problem_of(error))
        # The answer does not repeat the label, which may be a secret in the wrong place.
        return outcome or _problem_response(
            Problem(status=404, type="about:blank", title="Not Found")
        )


def _add_health_route(router: APIRouter, pool: Pool) -> None:
    @router.get(
        "/healthz",
        response_model=HealthResponse,
        summary="State of the pool, without a request",
    )
    async def get_health(client: CreditsDep) -> Any:
        return pool.health(client)
