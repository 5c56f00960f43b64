"""`RateLimit`: the limit that a client keeps, as its user says it."""

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
        raise ConfigurationError(f"scope is one of {', '.join(map(repr, _SCOPES))}")


def _check_adopts(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value not in _ADOPTS:
        raise ConfigurationError(f"adopt_server_limit is one of {', '.join(map(repr, _ADOPTS))}")


@init_hides_arguments
@attrs.frozen(kw_only=True)
class RateLimit:
    """The limit to keep: `requests` in any `period` seconds, for each endpoint.

    Attributes:
        requests: Requests that the server allows in any one period. 300 by Crustdata's credits
            page.
        period: Seconds that each request counts for after its arrival.
        margin: A share of the period that is added to it, against clocks that run at different
            rates and clocks that are coarse: uvloop's ticks in milliseconds.
        scope: What the server is taken to count by, which is not documented: `"client"`, all keys
            together, the cautious reading; `"account"`, the keys that declare one account together
            and each other key for itself; `"key"`, each key for itself. `"auto"` begins as
            `"client"`, and goes on as `"account"` with each request whose answer proves that the
            server counts it so.
        pace: Calls a second to start at the most, over all scopes and both endpoints, spread
            evenly: "spreading traffic evenly is safer than bursting" (Crustdata's best-practices
            page). None for no such bound.
        reserve: A share of the limit that only single calls (`balance`, `account`) may take. With 0
            a `check` is as fast as can be, and a single call beside it may wait for the next
            request to age out; a service that mixes both sets 0.1.
        adopt_server_limit: Which limit to follow when the API states another one than `requests`
            (`x-ratelimit-limit`): `"lower"`, a lower one where the count beside it agrees with the
            requests of this client; `"any"`, a higher one too, although it may speak of another
            limit, such as a key's over all endpoints; `"never"`, none.

    Raises:
        ConfigurationError: A value is not of that range.
    """

    requests: int = attrs.field(default=300, validator=Whole(1))
    period: float = attrs.field(default=60.0, validator=Number(above=0))
    margin: float = attrs.field(default=0.005, validator=Number(minimum=0, maximum=1))
    scope: Scope = attrs.field(default="auto", validator=_check_scope)
    pace: float | None = attrs.field(default=100.0, validator=Number(above=0, optional=True))
    reserve: float = attrs.field(default=0.0, validator=Number(minimum=0, maximum=1))
    adopt_server_limit: AdoptServerLimit = attrs.field(default="lower", validator=_check_adopts)
