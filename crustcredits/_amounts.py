"""Numbers of credits: exact arithmetic, and the credits that a batch needs.

This module must not know balances or reports.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from decimal import Decimal

from crustcredits._errors import ConfigurationError
from crustcredits._validation import check_number

# A balance has at most 64 digits between 10^64 and 10^-128, so the sum of any number of balances
# fits this precision; an inexact sum raises.
_EXACT = decimal.Context(
    prec=400,
    Emax=decimal.MAX_EMAX,
    Emin=decimal.MIN_EMIN,
    traps=[decimal.Inexact, decimal.InvalidOperation],
)

_LEAST_CREDITS, _MOST_CREDITS = Decimal("1e-300"), Decimal("1e300")


def exact_sum(numbers: Iterable[Decimal]) -> Decimal:
    """The sum of credits, to the last digit."""
    with decimal.localcontext(_EXACT):
        return sum(numbers, Decimal(0))


def exact_product(one: Decimal, other: Decimal) -> Decimal:
    """The product, to the last digit. Raises `decimal.Inexact` when it has too many digits."""
    return _EXACT.multiply(one, other)


def as_decimal(what: str, number: Decimal | float) -> Decimal:
    """The number, exactly.

    Raises:
        ConfigurationError: It is not a finite number.
    """
    if not isinstance(number, Decimal):
        check_number(what, number)
        return Decimal(str(number))
    if not number.is_finite():
        raise ConfigurationError(f"{what} must be a finite number, not {number}")
    return number


def needed_credits(credits: Decimal | float, margin: Decimal | float = 1) -> Decimal:
    """The credits that a batch needs: `credits` times `margin`.

    Raises:
        ConfigurationError: One argument is not a finite number of at least 0, or the product has
            too many digits.
    """
    factors = {"credits": as_decimal("credits", credits), "margin": as_decimal("margin", margin)}
    for what, factor in factors.items():
        if not 0 <= factor <= _MOST_CREDITS:
            raise ConfigurationError(
                f"{what} must be a finite number of at least 0 and at most {_MOST_CREDITS:g}, "
                f"not {factor:g}"
            )
        if 0 < factor < _LEAST_CREDITS:
            raise ConfigurationError(f"{what} has too many digits; round it up")
    if 0 in factors.values():
        return Decimal(0)
    try:
        product = exact_product(*factors.values())
    except decimal.Inexact:
        pass  # the error is raised below, where no `except` block links it
    else:
        whole = product.to_integral_value()
        return whole if whole == product else product  # 5000 and not 5000.0
    raise ConfigurationError("credits and margin have too many digits; round them up")
