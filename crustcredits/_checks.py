"""Checks of numbers that callers give, with one wording for all of them."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import attrs

from crustcredits._errors import ConfigurationError

# Far beyond use, and within what floats can hold: 10**400 is a finite number too.
_MOST = 1e300


def check_whole(what: str, value: object, *, minimum: int) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MOST:
        raise ConfigurationError(f"{what} is a whole number of at least {minimum}, not {_shown(value)}")


def check_number(
    what: str, value: object, *, above: float = -math.inf, minimum: float = -math.inf, maximum: float = math.inf
) -> None:
    """Raise `ConfigurationError` unless `value` is a finite number of that range."""
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= _MOST
        and above < value
        and minimum <= value <= maximum
    ):
        return
    bounds = [f" above {above:g}"] * (above > -math.inf) + [f" of at least {minimum:g}"] * (minimum > -math.inf)
    bounds += [f" at most {maximum:g}"] * (maximum < math.inf)
    raise ConfigurationError(f"{what} is a finite number{' and'.join(bounds)}, not {_shown(value)}")


def check_kind(what: str, value: object, kind: type) -> None:
    """Raise `ConfigurationError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ConfigurationError(f"{what} is a {kind.__name__}, not {type(value).__name__}")


def _shown(value: object) -> str:
    """Numbers as they are. Of anything else, which may be a key in the wrong place, only what it is."""
    return repr(value)[:80] if value is None or isinstance(value, (int, float, Decimal)) else f"a {type(value).__name__}"


class Whole:
    """An attrs validator: a whole number of at least `minimum`."""

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum

    def __call__(self, instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        check_whole(attribute.name, value, minimum=self._minimum)


class Number:
    """An attrs validator: a finite number of a range, or None where that is said to be allowed."""

    def __init__(self, *, optional: bool = False, **bounds: float) -> None:
        self._optional = optional
        self._bounds = bounds

    def __call__(self, instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not (value is None and self._optional):
            check_number(attribute.name, value, **self._bounds)
