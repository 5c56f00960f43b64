"""The account in a document: the object that holds the credits, and the fields beside them.

This module must not know statuses, headers or errors.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from crustcredits._http.documents import is_deeper
from crustcredits._http.redaction import without_secret
from crustcredits._keys.api_key import ApiKey

_log = logging.getLogger("crustcredits")

# Levels of nesting: deeper than any account, and shallow enough to print and copy.
MAX_DEPTH: Final = 16


def user_of(document: Any) -> Any:
    """The object that holds the credits: the document, or the account in it.

    Both shapes have been seen at both addresses.
    """
    if (
        isinstance(document, dict)
        and "credits" not in document
        and isinstance(document.get("account"), dict)
    ):
        return document["account"]
    return document


def account_of(document: Any, key: ApiKey) -> tuple[Any, str | None]:
    """The account without the secret, or None and the problem."""
    account = document.get("account") if isinstance(document, dict) else None
    if account is None and isinstance(document, dict) and "credits" in document:
        account = document  # the flat shape; see `user_of`
    if not isinstance(account, dict):
        return None, "no account"
    if is_deeper(account, MAX_DEPTH):
        return None, f"an account of more than {MAX_DEPTH} levels"
    return without_secret(account, key), None


def account_fields(account: dict[str, Any], key: ApiKey) -> dict[str, Any]:
    """The fields of an `Account`: the documented ones, and all others in `extra`."""
    fields = {
        name: account[name]
        for name, kind in _ACCOUNT_FIELDS.items()
        if isinstance(account.get(name), kind)
    }
    kept = {"credits", *fields, *(name for name in _ACCOUNT_FIELDS if account.get(name) is None)}
    # An informational field must not cost the balance: a field of an undocumented kind goes into
    # `extra` as sent.
    extra = {name: value for name, value in account.items() if name not in kept}
    for name in extra.keys() & _ACCOUNT_FIELDS.keys():
        _log.warning(
            "%s: %s is None, because the API sent another kind of value than it documents; read "
            "the value in Account.extra",
            key.label,
            name,
        )
    _read_refresh_date(fields, extra, key)
    return fields | {"extra": extra}


# API reference, the fields of /account/credits. Sub-fields of wallets and top-ups are not
# documented.
_ACCOUNT_FIELDS: Final[dict[str, type]] = {
    "recurring_credits": Decimal,
    "recurring_credits_frequency": str,
    "recurring_credits_refresh_date": str,
    "credit_rollover": bool,
    "wallets": list,
    "credit_topups": list,
}


def _read_refresh_date(fields: dict[str, Any], extra: dict[str, Any], key: ApiKey) -> None:
    name = "recurring_credits_refresh_date"
    if name not in fields:
        return
    text = fields.pop(name)
    try:
        date = datetime.fromisoformat(text.strip())
        # API reference: an ISO timestamp such as 2026-09-01T00:00:00Z. Without an offset it is
        # read as UTC.
        fields[name] = date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
    except (ValueError, OverflowError):
        extra[name] = text
        _log.warning(
            "%s: %s is None, because the API sent no ISO date; read the value in Account.extra",
            key.label,
            name,
        )
