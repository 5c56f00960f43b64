"""`Fault`: every way in which an answer can fail, in one table.

And the bodies of faults that are a plain answer.
"""

from __future__ import annotations

import enum


class Fault(enum.Enum):
    """Ways in which the answer to a key can fail; `fail` orders one, and `down` for all keys.

    | fault              | answer                                      | error                     |
    | ------------------ | ------------------------------------------- | ------------------------- |
    | `REFUSED`          | 429, as if others used the account          | `RateLimitError`          |
    | `INTERNAL_ERROR`   | 500 with a JSON error                       | `InternalServerError`     |
    | `BAD_GATEWAY`      | 502 with a gateway's HTML                   | `InternalServerError`     |
    | `UNAVAILABLE`      | 503 with an empty body                      | `InternalServerError`     |
    | `INVALID_KEY`      | 401, the API does not know the key          | `InvalidKeyError`         |
    | `PAYMENT_REQUIRED` | 402, out of credits                         | `PaymentRequiredError`    |
    | `FORBIDDEN`        | 403, the plan does not allow it             | `PermissionDeniedError`   |
    | `CHALLENGE`        | 403 with the HTML page of a gateway         | `GatewayError`            |
    | `RESET`            | a connection reset before an answer         | `APIConnectionError`      |
    | `RESET_IN_BODY`    | a reset in the middle of the body           | `APIConnectionError`      |
    | `CUT_SHORT`        | a body cut off before its announced end     | `APIConnectionError`      |
    | `SILENCE`          | nothing, for ever                           | `APITimeoutError`         |
    | `DRIP`             | an answer with a body that drips for ever   | `APITimeoutError`         |
    | `NOT_JSON`         | 200 with text that is not JSON              | `UnexpectedResponseError` |
    | `WRONG_SHAPE`      | 200 with JSON of another shape              | `UnexpectedResponseError` |
    | `NAN`              | 200 with NaN for the credits                | `UnexpectedResponseError` |
    | `REDIRECT`         | 302 to another origin                       | `UnexpectedResponseError` |
    | `ENDLESS`          | 200 with a body that does not end           | `UnexpectedResponseError` |
    | `BOMB`             | 200 with 16 KiB that swell to 16 MiB        | `UnexpectedResponseError` |
    | `COOKIE`           | the right answer, and a cookie              | none                      |
    | `GLITCH`           | 200 with 0 credits for any balance          | none                      |
    | `STALE`            | the right answer; its connection is lost    | none                      |
    |                    | while the next request is on its way        |                           |

    The cookie has the key's name. Without a socket (`fake_client`) `COOKIE` and `STALE` are just
    the right answer, and a body without end or one that swells counts as too large.
    """

    REFUSED = "429, as when the account is hammered from elsewhere"
    INTERNAL_ERROR = "500 with a JSON error"
    BAD_GATEWAY = "502 with a gateway's HTML"
    UNAVAILABLE = "503 with an empty body"
    INVALID_KEY = "401, the API does not know the key"
    PAYMENT_REQUIRED = "402, out of credits"
    FORBIDDEN = "403, the plan does not allow it"
    CHALLENGE = "403 with the HTML page of a gateway, which says nothing of the key"
    RESET = "the connection is reset before an answer"
    RESET_IN_BODY = "the connection is reset in the middle of the body"
    CUT_SHORT = "the connection is closed before the announced end of the body"
    SILENCE = "no answer, for ever"
    DRIP = "the answer begins, and its body drips for ever"
    NOT_JSON = "200 with text that is not JSON"
    WRONG_SHAPE = "200 with JSON of another shape"
    NAN = "200 with NaN for the credits"
    REDIRECT = "302 to another origin"
    ENDLESS = "200 with a body that does not end"
    BOMB = "200 with a small compressed body that swells to 16 MiB"
    COOKIE = "the right answer, and a cookie with the key's name"
    GLITCH = "200 with 0 credits, whatever the account holds"
    STALE = (
        "the right answer, and the kept connection is lost just when the next request is on its way"
    )


JSON_TYPE = "application/json"
PLAIN: dict[Fault, tuple[int, str, str]] = {
    Fault.INTERNAL_ERROR: (
        500,
        JSON_TYPE,
        '{"error": {"type": "internal_error", "message": "Something went wrong", "metadata": {}}}',
    ),
    Fault.BAD_GATEWAY: (
        502,
        "text/html",
        "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>",
    ),
    Fault.UNAVAILABLE: (503, "text/plain", ""),
    Fault.INVALID_KEY: (401, JSON_TYPE, '{"message": "Invalid API key in request"}'),
    Fault.PAYMENT_REQUIRED: (
        402,
        JSON_TYPE,
        '{"error": {"type": "insufficient_credits", "message": "Out of credits", "metadata": {}}}',
    ),
    Fault.FORBIDDEN: (
        403,
        JSON_TYPE,
        '{"error": {"type": "permission_error", "message": "Not in your plan", "metadata": {}}}',
    ),
    Fault.CHALLENGE: (
        403,
        "text/html",
        "<html><head><title>Just a moment...</title></head><body>gateway</body></html>",
    ),
    Fault.NOT_JSON: (200, JSON_TYPE, "credits: plenty"),
    Fault.WRONG_SHAPE: (200, JSON_TYPE, '{"credits": {"left": 9406}, "account": []}'),
    Fault.NAN: (200, JSON_TYPE, '{"credits": NaN, "account": {"credits": NaN}}'),
}
