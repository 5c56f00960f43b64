"""The JSON document of a body: numbers as exact decimals, and bounds for size, digits and depth.

This module must not know what a document means: no key, no model, no error of the library.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Context, Decimal, InvalidOperation
from typing import Any, Final

# Bytes. A balance is a few hundred bytes; a body near this bound is not a balance.
MAX_BODY: Final = 64 * 1024

# `1E+999999999` and 5,000-digit integers are valid JSON, and would stall or break arithmetic. No
# balance comes near these bounds.
MAX_NUMBER_TEXT: Final = 64
MAX_EXPONENT: Final = 64

# Our own context: under a caller's context without traps, invalid text would become a NaN.
_CONTEXT = Context(traps=[InvalidOperation])


class _UnusableNumberError(ValueError):
    pass


class _TwiceError(ValueError):
    pass


def _number(text: str) -> Decimal:
    if len(text) > MAX_NUMBER_TEXT:
        raise _UnusableNumberError
    try:
        number = Decimal(text, _CONTEXT)
    except InvalidOperation:  # an exponent of twenty digits
        raise _UnusableNumberError from None
    # Applies to zero as well: written out, 0E-50000000 takes 50 MB.
    if abs(number.adjusted()) > MAX_EXPONENT:
        raise _UnusableNumberError
    return number


def _no_constant(text: str) -> Any:
    raise _UnusableNumberError


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise _TwiceError
    return document


# JSON's white space, and a byte-order mark.
_AROUND_JSON = " \t\r\n\ufeff"
_DECODER = json.JSONDecoder(
    parse_float=_number, parse_int=_number, parse_constant=_no_constant, object_pairs_hook=_once
)
# `raw_decode` without the cost of one more function call.
_scan: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]


def parse(body: bytes | None) -> tuple[Any, str | None]:
    """The document of a body, or None and the problem; `body` is None beyond `MAX_BODY`."""
    if body is None:
        return None, f"more than {MAX_BODY // 1024} KiB, which is too large for a balance"
    try:
        text = body.decode().strip(_AROUND_JSON)
        document, end = _scan(text, 0)
        return (document, None) if end == len(text) else (None, "something that is not JSON")
    except _TwiceError:
        return None, "JSON in which a name occurs twice"
    except _UnusableNumberError:
        return None, "a number that cannot be credits (NaN, infinite or too long)"
    except (ValueError, RecursionError, StopIteration):
        return None, "something that is not JSON"


def is_cut_short(body: bytes | None) -> bool:
    """Whether a body ends in the middle of an object."""
    if body is None:
        return False
    text = body.decode(errors="replace").strip(_AROUND_JSON)
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return not text or (text[0] == "{" and (error.pos >= len(text) or text[-1] != "}"))
    except (ValueError, RecursionError):
        return False
    return False


def parse_leniently(body: bytes | None) -> Any:
    """The document of an error, without checks of numbers and names; None when it is not JSON."""
    try:
        return json.loads(body or b"")
    except (ValueError, RecursionError):
        return None


def is_deeper(value: Any, depth: int) -> bool:
    """Whether a document has more than `depth` levels of objects and lists."""
    level = [value]
    for _ in range(depth):
        level = [part for item in level for part in _parts(item)]
    return bool(level)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
