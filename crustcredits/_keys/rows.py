"""One row of a database, of JSON or of CSV as a key.

This module knows neither the sources of rows nor pools.
"""

from __future__ import annotations

import uuid
from typing import Any, Final

from crustcredits._keys.api_key import ApiKey, UnusableKey, clear_text, make_key, unusable
from crustcredits._validation import kind_of

COLUMNS: Final = ("secret", "name", "account")


def key_of_row(row: Any, place: str) -> ApiKey | UnusableKey:
    """The key of a mapping, or of a row with `keys()` and items by name, as of database drivers."""
    try:
        names = set(row.keys())
        secret, name, account = (row[column] if column in names else None for column in COLUMNS)
    except Exception as error:  # noqa: BLE001  # of a driver, vault or cipher: only this row fails
        problem = f"the row, {kind_of(row)}, cannot be read ({type(error).__name__})"
        return unusable(f"{problem}; give a mapping with 'secret', 'name' and 'account'", place)
    key = make_key(clear_text(secret), _text(name), _text(account), place=place)
    if "secret" not in names and isinstance(key, UnusableKey):
        return unusable(
            "the row has no column 'secret'; give this name to the column that holds the keys",
            key.name,
            key.account,
        )
    return key


def _text(name: object) -> object:
    """A name or account from a row: numbers and UUIDs as text, an empty value as None."""
    return (
        str(name)
        if isinstance(name, (int, uuid.UUID)) and not isinstance(name, bool)
        else name or None
    )
