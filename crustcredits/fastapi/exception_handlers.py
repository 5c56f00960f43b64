"""Errors of this library as `application/problem+json`, wherever a route raises them.

Which document an error becomes is decided in `problem_details`.
"""

import logging

from fastapi import FastAPI, WebSocket, status
from fastapi.responses import JSONResponse
from starlette.requests import HTTPConnection
from starlette.websockets import WebSocketState

from crustcredits._errors import CrustCreditsError
from crustcredits._validation import hides_arguments
from crustcredits.fastapi.problem_details import Problem, problem_of

# --- errors

_log = logging.getLogger("crustcredits")


@hides_arguments
def install_exception_handlers(app: FastAPI) -> None:
    """Answer this library's errors, wherever a route raises them, with `application/problem+json`; web sockets are closed.

    Timeouts are 504; out of reach is 503; refused or held back by the rate limit is 503 with
    `Retry-After`. Not enough credits is 409. Credits that are unknown are 503 with `Retry-After`
    where a key that decides may recover, else 502. A mistake in the service's own set-up is 500;
    and the rest, also the API's 401, 402 and 403, is 502. What the API said goes to the log, and
    none of it into the answer.
    """
    app.add_exception_handler(CrustCreditsError, _on_error)  # type: ignore[arg-type]  # typed for requests or for web sockets


async def _on_error(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
    assert isinstance(error, CrustCreditsError)
    problem = problem_of(error)
    _log.log(
        logging.INFO if problem.status == 409 else logging.WARNING,
        "answered with %d: %s",
        problem.status,
        error,
    )
    if (
        isinstance(connection, WebSocket)
        and connection.application_state is WebSocketState.CONNECTED
    ):
        await connection.close(status.WS_1011_INTERNAL_ERROR, problem.title)
        return None
    return _problem_response(problem)


def _problem_response(problem: Problem) -> JSONResponse:
    headers = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    return JSONResponse(
        problem.document(),
        status_code=problem.status,
        headers=headers,
        media_type="application/problem+json",
    )
