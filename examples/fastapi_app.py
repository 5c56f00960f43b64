"""A FastAPI service around a pool of keys: it shows their credits and guards batches.

A batch that would run out of credits is not started. Keys come from `CRUSTDATA_API_KEYS`, the
callers' token from `SERVICE_TOKEN`. In this directory:

    uvicorn --factory fastapi_app:create_app
"""

import os
import secrets
from functools import partial
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field

from crustcredits import CreditsClient, KeysLike, keys_from_env
from crustcredits.fastapi import (
    CreditsDep,
    credits_lifespan,
    credits_router,
    install_exception_handlers,
)


class Batch(BaseModel):
    credits: Annotated[int, Field(gt=0)]


async def require_token(
    given: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())],
) -> None:
    token = os.environ.get("SERVICE_TOKEN", "")
    if not token or not secrets.compare_digest(given.credentials.encode(), token.encode()):
        raise HTTPException(403, "not for you")


def create_app(keys: KeysLike | None = None) -> FastAPI:
    """Return the app; a test gives keys of its own."""
    pool = keys_from_env() if keys is None else keys
    may_see = [Depends(require_token)]
    make_client = partial(CreditsClient, max_age=5, stale_while_revalidate=120, stale_if_error=3600)

    app = FastAPI(title="Credits", lifespan=credits_lifespan(make_client))
    app.include_router(credits_router(pool, dependencies=may_see), prefix="/credits")
    install_exception_handlers(app)

    @app.post("/batches", dependencies=may_see)
    async def start(batch: Batch, client: CreditsDep) -> dict[str, str]:
        report = await client.require(batch.credits, pool, margin=1.1, timeout=10)
        return {"state": "started", "available": f"{report.available_credits:f}"}

    return app
