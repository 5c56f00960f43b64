"""crustcredits in a FastAPI service: a lifespan, a dependency, a router and exception handlers.

This package owns the lifespan, routes, schemas and problem documents. It must not know how a
balance is requested. Needs the extra `fastapi`. Start reading in `router.py`.
"""

from crustcredits.fastapi.exception_handlers import install_exception_handlers
from crustcredits.fastapi.lifespan import (
    CreditsDep,
    credits_client_of,
    credits_lifespan,
    get_credits_client,
)
from crustcredits.fastapi.router import credits_router
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
