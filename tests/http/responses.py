"""Responses read for one key at one time, as the tests of this folder need them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from crustcredits import Account, ApiKey, Balance, CrustCreditsError
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import Response, read_response

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = ApiKey("sk-0123456789", name="prod")


def read(
    body: str | bytes | None, *, status: int = 200, path: str = USER_CREDITS, **headers: str
) -> Balance | CrustCreditsError:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    raw = body.encode() if isinstance(body, str) else body
    return read_response(path, KEY, Response(status, named, raw), now=NOW, period=60.0)


def balance(body: str, **headers: str) -> Balance:
    result = read(body, **headers)  # type: ignore[arg-type]  # headers only
    assert isinstance(result, Balance)
    return result


def account(**fields: Any) -> Account:
    result = read(json.dumps({"account": {"credits": 1} | fields}), path=ACCOUNT_CREDITS)
    assert isinstance(result, Account)
    return result


def error(body: str | bytes | None, **options: Any) -> CrustCreditsError:
    result = read(body, **options)
    assert isinstance(result, CrustCreditsError)
    assert result.key_name == "prod"
    return result
