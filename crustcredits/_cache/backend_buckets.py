"""`BackendBuckets`: the token buckets of an endpoint, as several processes count them together."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import cast

from crustcredits._ratelimit.config import Scope
from crustcredits._ratelimit.leased_permits import LeasedPermits
from crustcredits._ratelimit.leased_tokens import Backend, LeasedTokens, PermitGate
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.token_bucket import Bucket, TokenBucket


class BackendBuckets:
    """Makes the buckets of one endpoint.

    Args:
        backend: Where the processes count their tokens together.
        path: The endpoint.
        scope: The scope of the rate limit; with `"client"` the tokens of accounts count here alone.
        on_tokens: Called when the backend has brought tokens.
        on_outage: Called with the account of a bucket, or None for the common one, when no token
            can be had.

    Attributes:
        make_permits: Makes the permits for these buckets.
    """

    def __init__(
        self,
        backend: Backend,
        path: str,
        scope: Scope,
        on_tokens: Callable[[], None],
        on_outage: Callable[[Hashable | None], None],
    ) -> None:
        self._backend = backend
        self._path = path
        self._shares_accounts = scope != "client"
        self.make_permits = LeasedPermits if self._shares_accounts else Permits
        self._on_tokens = on_tokens
        self._on_outage = on_outage

    def make(
        self, whose: Hashable | None, limit: int, wake: Callable[[Hashable | None], None]
    ) -> Bucket:
        """The bucket of an account, or the common one; `wake` is called when it has tokens."""
        if whose is not None and not self._shares_accounts:
            return TokenBucket(limit)

        def came() -> None:
            wake(whose)
            self._on_tokens()

        fail = partial(self._on_outage, whose)
        if whose is None and self._shares_accounts:
            return PermitGate(self._backend.gate(self._path, limit), came, fail)
        tokens = self._backend.tokens(self._path, cast("str | bytes | None", whose), limit)
        return LeasedTokens(tokens, came, fail)
