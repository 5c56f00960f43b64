"""Checks of arguments: one wording for all of them, and errors whose frames show none of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from decimal import Decimal
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import attrs

from crustcredits._errors import ConfigurationError

# Far beyond use, and within what floats can hold: 10**400 is a finite number too.
_MOST = 1e300
_PACKAGE = __name__.partition(".")[0]

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: An argument cannot be used, or is unknown.
Refusal = ConfigurationError | TypeError

#: Seconds, or a timedelta.
Seconds: TypeAlias = float | timedelta

# Seconds that need no closer look.
_SENSIBLE = 1e9


def attempt(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T | Refusal:
    """The result, or the refusal of an argument: not raised, and without the frames that hold the arguments.

    An argument may be a secret in the wrong place, and tracebacks are printed with local variables.
    Callers drop their own variables, then raise.
    """
    try:
        return function(*args, **kwargs)
    except (ConfigurationError, TypeError) as error:
        return error.with_traceback(None)


def hides_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """A decorator for functions and coroutine functions: when they raise, no frame of this library holds local variables.

    An argument may hold a secret, in its place or in a wrong one, and tracebacks are printed with
    local variables.
    """
    if inspect.iscoroutinefunction(function):
        return cast("Callable[_P, _T]", _hides_arguments_of_coroutine(function))

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001  # any of them is raised again
            raised = error
        del args, kwargs
        try:
            raise _without_locals(raised)
        finally:
            del raised  # an error that holds the frame that holds the error is freed late

    return call


def _hides_arguments_of_coroutine(
    function: Callable[_P, Coroutine[Any, Any, _T]],
) -> Callable[_P, Coroutine[Any, Any, _T]]:
    @functools.wraps(function)
    async def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        pending = attempt(function, *args, **kwargs)
        del args, kwargs  # the coroutine drops its own while it runs
        if isinstance(pending, Exception):
            raise pending
        try:
            return await pending
        except Exception as error:  # noqa: BLE001  # any of them is raised again
            raised = error
        try:
            raise _without_locals(raised)
        finally:
            del raised  # as above

    return call


def _without_locals(error: BaseException) -> BaseException:
    """The error, with the lines of its traceback, and no variables in the frames of this library.

    Other frames are left alone, and all that comes below one of the caller's: an error that is
    raised again has the frames of where it was raised before, perhaps by another task that runs
    still.
    """
    entry = error.__traceback__
    while entry is not None:
        module = str(entry.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if module == _PACKAGE:
            with contextlib.suppress(RuntimeError):  # it runs still
                entry.tb_frame.clear()
        elif module != "None" and module not in sys.stdlib_module_names:
            break
        entry = entry.tb_next
    # The first frame is the decorator's, which is added again when it raises.
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)


def init_hides_arguments(cls: type[_T]) -> type[_T]:
    """The same for classes whose `__init__` is generated."""
    cls.__init__ = hides_arguments(cls.__init__)  # type: ignore[method-assign]  # this is what is wanted
    return cls


def check_whole(what: str, value: object, *, minimum: int) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MOST:
        raise ConfigurationError(
            f"{what} is a whole number of at least {minimum}, not {shown(value)}"
        )


def check_number(
    what: str,
    value: object,
    *,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
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
    bounds = [f" above {above:g}"] * (above > -math.inf) + [f" of at least {minimum:g}"] * (
        minimum > -math.inf
    )
    bounds += [f" at most {maximum:g}"] * (maximum < math.inf)
    raise ConfigurationError(f"{what} is a finite number{' and'.join(bounds)}, not {shown(value)}")


def seconds(what: str, value: Seconds, *, above: float = -math.inf) -> float:
    """The seconds of what a caller gave.

    Raises:
        ConfigurationError: It is no number of seconds of at least 0, or above `above`.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if (
        type(value) is not float or not max(0.0, above) < value <= _SENSIBLE
    ):  # the short way of most calls
        check_number(what, value, above=above, minimum=0.0 if above < 0 else -math.inf)
    return value


def check_flag(what: str, value: object) -> bool:
    """It, if it is True or False. Raises `ConfigurationError` otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{what} is True or False, not {_a(type(value))}")
    return value


def check_kind(what: str, value: object, kind: type) -> None:
    """Raise `ConfigurationError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ConfigurationError(f"{what} is {_a(kind)}, not {type(value).__name__}")


def shown(value: object) -> str:
    """Numbers as they are.

    Of anything else, which may be a key in the wrong place, only what it is.
    """
    return (
        repr(value)[:80]
        if value is None or isinstance(value, (int, float, Decimal))
        else _a(type(value))
    )


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOaeio' else 'a'} {kind.__name__}"


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
