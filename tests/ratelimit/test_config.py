"""`RateLimit`: accepted values, and the messages for all others."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from crustcredits import ConfigurationError, RateLimit


def test_the_default_is_the_limit_of_the_credits_page() -> None:
    """300 requests in 60 s, in the scope that the answers prove."""
    assert attrs.asdict(RateLimit()) == {
        "requests": 300,
        "period": 60.0,
        "margin": 0.005,
        "scope": "auto",
        "pace": 100.0,
        "reserve": 0.0,
        "adopt_server_limit": "lower",
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("requests", 1),
        ("period", 0.001),
        ("margin", 0),
        ("margin", 1),
        *[("scope", scope) for scope in ("auto", "client", "account", "key")],
        ("pace", 0.001),
        ("pace", None),
        ("reserve", 0),
        ("reserve", 1),
        *[("adopt_server_limit", which) for which in ("lower", "any", "never")],
    ],
)
def test_a_value_in_range_is_accepted(option: str, value: Any) -> None:
    """The bounds included."""
    assert getattr(RateLimit(**{option: value}), option) == value


WHOLE = "requests must be a whole number of at least 1, not "
SECONDS = "{} must be a finite number of seconds above 0, not "
ABOVE = "{} must be a finite number above 0, not "
SHARE = "{} must be a finite number of at least 0 and at most 1, not "
SCOPES = "scope has an unknown value; pass one of 'auto', 'client', 'account', 'key'"
ADOPTS = "adopt_server_limit has an unknown value; pass one of 'lower', 'any', 'never'"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("requests", 0, WHOLE + "0"),
        ("requests", 300.0, WHOLE + "300.0"),
        ("requests", True, WHOLE + "True"),
        ("period", 0, SECONDS.format("period") + "0"),
        ("period", float("inf"), SECONDS.format("period") + "inf"),
        ("period", "60", SECONDS.format("period") + "a str"),
        ("period", None, SECONDS.format("period") + "None"),
        ("margin", -0.1, SHARE.format("margin") + "-0.1"),
        ("margin", 1.1, SHARE.format("margin") + "1.1"),
        ("margin", None, SHARE.format("margin") + "None"),
        ("scope", "team", SCOPES),
        ("scope", None, SCOPES),
        ("pace", 0, ABOVE.format("pace") + "0"),
        ("pace", float("nan"), ABOVE.format("pace") + "nan"),
        ("reserve", -1, SHARE.format("reserve") + "-1"),
        ("reserve", 2, SHARE.format("reserve") + "2"),
        ("reserve", None, SHARE.format("reserve") + "None"),
        ("adopt_server_limit", "higher", ADOPTS),
        ("adopt_server_limit", False, ADOPTS),
    ],
)
def test_any_other_value_is_refused_with_the_option_and_the_remedy(
    option: str, value: Any, message: str
) -> None:
    """A text is not shown: it may be a misplaced key."""
    with pytest.raises(ConfigurationError) as raised:
        RateLimit(**{option: value})
    assert str(raised.value) == message


def test_options_are_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        RateLimit(300)  # type: ignore[call-arg]  # refused
