"""Checks of arguments, with one wording for all errors, and tracebacks without the arguments."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable, Coroutine
from datetime import timedelta
from decimal import Decimal
from functools import partial
from typing import Any, ParamSpec, TypeAlias, TypeVar, cast

import attrs

from crustcredits._errors import ConfigurationError

# Far beyond use, and within the range of a float: 10**400 is a finite number too.
_MOST = 1e300
_PACKAGE = __name__.partition(".")[0]

_P = ParamSpec("_P")
_T = TypeVar("_T")

#: The error for an argument that cannot be used or is unknown.
Refusal = ConfigurationError | TypeError

#: Seconds, or a timedelta.
Seconds: TypeAlias = float | timedelta

# Seconds up to this bound skip the full check.
_SENSIBLE = 1e9


def attempt(function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T | Refusal:
    """The result, or the error for an argument: not raised, and without its traceback.

    The frames of a traceback hold the arguments. An argument may be a secret in the wrong place,
    and many tools print local variables. Callers drop their own variables, then raise.
    """
    try:
        return function(*args, **kwargs)
    except (ConfigurationError, TypeError) as error:
        return error.with_traceback(None)


def hides_arguments(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function or coroutine function to clear local variables from its tracebacks.

    When it raises, no frame of this library holds local variables. An argument may hold a secret,
    in the right place or a wrong one, and many tools print tracebacks with local variables.
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
            del raised  # breaks the reference cycle of frame and exception

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
            del raised  # breaks the reference cycle of frame and exception

    return call


def _without_locals(error: BaseException) -> BaseException:
    """The error with its traceback, but without variables in the frames of this library.

    The loop stops at the first frame of the caller's code and leaves the frames below it unchanged:
    a re-raised error still has the frames of its earlier raise, perhaps in another running task.
    """
    entry = error.__traceback__
    while entry is not None:
        module = str(entry.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if module == _PACKAGE:
            with contextlib.suppress(RuntimeError):  # the frame is still running
                entry.tb_frame.clear()
        elif module != "None" and module not in sys.stdlib_module_names:
            break
        entry = entry.tb_next
    # The first frame is the decorator's; raising adds it again.
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)


def init_hides_arguments(cls: type[_T]) -> type[_T]:
    """Apply `hides_arguments` to a class with a generated `__init__`."""
    cls.__init__ = hides_arguments(cls.__init__)  # type: ignore[method-assign]  # intended
    return cls


def check_whole(what: str, value: object, *, minimum: int) -> None:
    """Raise `ConfigurationError` unless `value` is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _MOST:
        raise ConfigurationError(
            f"{what} must be a whole number of at least {minimum}, not {shown(value)}"
        )


def check_number(
    what: str,
    value: object,
    *,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    unit: str = "",
) -> None:
    """Raise `ConfigurationError` unless `value` is a finite number within the bounds."""
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= _MOST
        and above < value
        and minimum <= value <= maximum
    ):
        return
    bounds: list[str] = []
    if above > -math.inf:
        bounds.append(f" above {above:g}")
    if minimum > -math.inf:
        bounds.append(f" of at least {minimum:g}")
    if maximum < math.inf:
        bounds.append(f" at most {maximum:g}")
    raise ConfigurationError(
        f"{what} must be a finite number{unit}{' and'.join(bounds)}, not {shown(value)}"
    )


def seconds(what: str, value: Seconds, *, above: float = -math.inf) -> float:
    """The duration in seconds, from a number or a `timedelta`.

    Raises:
        ConfigurationError: The value is not a finite number of at least 0, or not above `above`.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if (
        type(value) is not float or not max(0.0, above) < value <= _SENSIBLE
    ):  # the short way for most calls
        minimum = 0.0 if above < 0 else -math.inf
        check_number(what, value, above=above, minimum=minimum, unit=" of seconds")
    return value


def check_flag(what: str, value: object) -> bool:
    """The value, when it is True or False. Raises `ConfigurationError` otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{what} must be True or False, not {kind_of(value)}")
    return value


def check_kind(what: str, value: object, kind: type) -> None:
    """Raise `ConfigurationError` unless `value` is a `kind`."""
    if not isinstance(value, kind):
        raise ConfigurationError(f"{what} must be {_a(kind)}, not {kind_of(value)}")


def is_plain_function(function: object) -> bool:
    """Whether it is callable and returns no coroutine, also if its class defines the call."""
    if not callable(function):
        return False
    call = function.func if isinstance(function, partial) else function
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    return not any(kind(each) for kind in kinds for each in (call, type(call).__call__))


def shown(value: object) -> str:
    """A number as it is, and only the type of anything else, which may be a misplaced key."""
    return repr(value)[:80] if isinstance(value, (int, float, Decimal)) else kind_of(value)


def kind_of(value: object) -> str:
    """The type of a value in words, such as `a str`; `None` for None."""
    if value is None or isinstance(value, bytes):
        return "None" if value is None else "bytes"
    return _a(type(value))


def _a(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOaeio' else 'a'} {kind.__name__}"


class Whole:
    """An attrs validator: a whole number of at least `minimum`."""

    def __init__(self, minimum: int) -> None:
        self._minimum = minimum

    def __call__(self, instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        check_whole(attribute.name, value, minimum=self._minimum)


class Number:
    """An attrs validator: a finite number within the bounds, or None with `optional=True`."""

    def __init__(
        self,
        *,
        above: float = -math.inf,
        minimum: float = -math.inf,
        maximum: float = math.inf,
        unit: str = "",
        optional: bool = False,
    ) -> None:
        self._check = partial(
            check_number, above=above, minimum=minimum, maximum=maximum, unit=unit
        )
        self._optional = optional

    def __call__(self, instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not (value is None and self._optional):
            self._check(attribute.name, value)
