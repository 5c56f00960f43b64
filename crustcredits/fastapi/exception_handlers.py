"""Errors of this library as `application/problem+json`, for every route that raises them.

`problem_details` decides the document for each error.
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
    """Answer this library's errors with `application/problem+json`; close web sockets.

    - 409: too few credits.
    - 500: a mistake in the service's own set-up.
    - 502: every other error, including the API's 401, 402 and 403.
    - 503: the API or Redis is out of reach, or the client is closed.
    - 503 with `Retry-After`: the rate limit refuses or delays the request.
    - 503 with `Retry-After`, else 502: credits are unknown, and a key that decides may recover.
    - 504: a timeout.

    The API's own text goes to the log and never into the answer.
    """
    app.add_exception_handler(CrustCreditsError, _on_error)  # type: ignore[arg-type]  # typed for requests or for web sockets


async def _on_error(connection: HTTPConnection, error: Exception) -> JSONResponse | None:
    assert isinstance(error, CrustCreditsError)
    problem = problem_of(error)
    _log.log(
        logging.INFO if problem.status == 409 else logging.WARNING,
        "request answered with %d: %s",
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
