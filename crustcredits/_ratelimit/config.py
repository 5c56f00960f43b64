"""`RateLimit`: the rate limit that a client keeps to, as its user configures it."""

from __future__ import annotations

from typing import Any, Literal

import attrs

from crustcredits._errors import ConfigurationError
from crustcredits._validation import Number, Whole, init_hides_arguments

Scope = Literal["auto", "client", "account", "key"]
_SCOPES = ("auto", "client", "account", "key")
AdoptServerLimit = Literal["lower", "any", "never"]
_ADOPTS = ("lower", "any", "never")


def _check_scope(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _SCOPES:
        raise ConfigurationError(
            f"scope has an unknown value; pass one of {', '.join(map(repr, _SCOPES))}"
        )


def _check_adopts(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _ADOPTS:
        raise ConfigurationError(
            f"adopt_server_limit has an unknown value; pass one of {', '.join(map(repr, _ADOPTS))}"
        )


@init_hides_arguments
@attrs.frozen(kw_only=True)
class RateLimit:
    """The limit to keep: `requests` in any `period` seconds, for each endpoint.

    Attributes:
        requests: Requests that the server allows in any one period. 300 by Crustdata's credits
            page.
        period: Seconds for which each request counts after its arrival.
        margin: A fraction of the period that is added to it, against clocks that run at different
            rates and coarse clocks: uvloop's ticks in milliseconds.
        scope: The scope that the server is assumed to count by, which is not documented.
            `"client"`: all keys together, the cautious reading. `"account"`: the keys that declare
            one account together, each other key separately. `"key"`: each key separately. `"auto"`
            begins as `"client"`, and becomes `"account"` for each request whose answer proves that
            the server counts its account separately.
        pace: Most calls to start per second, over all scopes and both endpoints, spread evenly:
            "spreading traffic evenly is safer than bursting" (Crustdata's best-practices page).
            None for no such bound.
        reserve: A fraction of the limit that only single calls (`balance`, `account`) may take.
            With 0 a `check` is as fast as possible, and a single call beside it may wait for the
            next request to age out; a service that mixes both sets 0.1.
        adopt_server_limit: Which limit to follow when the API states another one than `requests`
            (`x-ratelimit-limit`): `"lower"`, a lower one where the count beside it agrees with the
            requests of this client; `"any"`, also a higher one, although it may be about another
            limit, such as a key's over all endpoints; `"never"`, none.

    Raises:
        ConfigurationError: A value is outside its range.
    """

    requests: int = attrs.field(default=300, validator=Whole(1))
    period: float = attrs.field(default=60.0, validator=Number(above=0, unit=" of seconds"))
    margin: float = attrs.field(default=0.005, validator=Number(minimum=0, maximum=1))
    scope: Scope = attrs.field(default="auto", validator=_check_scope)
    pace: float | None = attrs.field(default=100.0, validator=Number(above=0, optional=True))
    reserve: float = attrs.field(default=0.0, validator=Number(minimum=0, maximum=1))
    adopt_server_limit: AdoptServerLimit = attrs.field(default="lower", validator=_check_adopts)
