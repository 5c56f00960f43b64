"""Text from the server without the secret: masked, bounded and fit for a log line.

This module must not know headers, documents or errors.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import quote

from crustcredits._keys.api_key import ApiKey

# Characters of the server's text in a message.
MAX_MESSAGE: Final = 300

# Text that URL quoting leaves unchanged (RFC 3986, unreserved characters).
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]*")

# A lone surrogate: JSON can escape it, but no encoding can write it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str | None, key: ApiKey) -> str | None:
    """Text from the server, fit for a log line: one line, at most 300 characters, secret masked."""
    if text is None:
        return None
    if (
        len(text) <= MAX_MESSAGE and text.isascii() and text.isprintable() and "%" not in text
    ):  # the short way for most values, such as a request id
        secret = key.get_secret_value()
        if secret.isascii() and secret.lower() not in text.lower():
            return text.strip() or None
    hidden = _hide(text, key)[:MAX_MESSAGE]
    if not hidden.isprintable():
        hidden = "".join(char if char.isprintable() else " " for char in hidden)
    return hidden.strip() or None


def without_secret(value: Any, key: ApiKey) -> Any:
    """A part of a document as sent, with the secret masked and lone surrogates replaced."""
    if isinstance(value, str):
        return _hide(_SURROGATE.sub("\ufffd", value), key)
    if isinstance(value, dict):
        return {
            without_secret(name, key): without_secret(part, key) for name, part in value.items()
        }
    return [without_secret(part, key) for part in value] if isinstance(value, list) else value


def _hide(text: str, key: ApiKey) -> str:
    """The text with the secret masked, also where it is URL-quoted or in another case."""
    secret = key.get_secret_value()
    if len(text) < len(secret):
        return text
    forms = {secret} if _UNRESERVED.fullmatch(secret) else {secret, quote(secret, safe="")}
    if (
        text.isascii() and secret.isascii()
    ):  # outside ASCII a letter's other case can be longer, or an ASCII letter
        lower = text.lower()
        forms = {form for form in forms if form.lower() in lower}
    for form in forms:
        text = re.sub(re.escape(form), "***", text, flags=re.IGNORECASE)
    return text
