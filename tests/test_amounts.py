"""Numbers of credits: bounds, digits and margins."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from crustcredits import ConfigurationError, Report
from crustcredits._amounts import needed_credits


@pytest.mark.parametrize(
    "mistake",
    [-1, float("nan"), Decimal("Infinity"), Decimal("-0.1"), "5", None, True, Decimal("1E+400")],
)
def test_required_credits_and_margin_are_numbers_of_at_least_0(mistake: Any) -> None:
    """Any other value is refused."""
    with pytest.raises(ConfigurationError, match="credits must be a finite number"):
        Report([]).require(mistake)
    with pytest.raises(ConfigurationError, match="margin must be a finite number"):
        needed_credits(5, mistake)


def test_credits_with_too_many_digits_are_refused() -> None:
    """They are not rounded."""
    with pytest.raises(ConfigurationError, match="too many digits") as caught:
        needed_credits(Decimal("1." + "3" * 300), Decimal("1." + "3" * 300))
    assert caught.value.__context__ is None
