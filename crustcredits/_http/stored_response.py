"""A response as bytes, to be kept outside this process: without the secret, and bounded in size.

This module must not know where the bytes are kept.
"""

from __future__ import annotations

import json
from typing import Any, Final

from crustcredits._http.documents import parse_leniently
from crustcredits._http.protocol import Response
from crustcredits._http.redaction import without_secret
from crustcredits._keys.api_key import ApiKey

# Most bytes. A balance is a few hundred bytes.
MAX_STORED: Final = 4 * 1024

_HEADERS = ("x-request-id", "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")


def store_response(response: Response, key: ApiKey) -> bytes | None:
    """The response as bytes; None if it is too large, is no text, or repeats the secret."""
    if response.body is None or len(response.body) > MAX_STORED:
        return None
    try:
        body = response.body.decode()
    except UnicodeDecodeError:
        return None
    headers = {name: response.headers[name] for name in _HEADERS if name in response.headers}
    # JSON can write a secret in other characters, so its document is looked through too.
    texts = [body, headers, parse_leniently(response.body)]
    if without_secret(texts, key) != texts:
        return None
    stored = json.dumps({"status": response.status, "headers": headers, "body": body}).encode()
    return stored if len(stored) <= MAX_STORED else None


def load_response(stored: bytes) -> Response | None:
    """The response in these bytes, or None if there is none."""
    try:
        document: Any = json.loads(stored)
        status, headers, body = document["status"], document["headers"], document["body"]
        if isinstance(status, int) and all(isinstance(text, str) for text in headers.values()):
            return Response(status, headers, body.encode())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None
