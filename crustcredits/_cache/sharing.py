"""`Sharing`: looks for an answer of another process before a call asks the API.

A call that may be answered so looks before its first request starts. If another process fetches the
answer, the call waits for it. If none does, the call leases the answer, goes on to the API, and
publishes what it gets. With `max_age=0` nothing is shared.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from functools import partial

from crustcredits._cache.answer_store import Ages, AnswerStore, Finding, StoredAnswer
from crustcredits._cache.api_call import ApiCall, Stage
from crustcredits._cache.cache_entry import OF_THE_KEY
from crustcredits._cache.policy import CachePolicy
from crustcredits._errors import CrustCreditsError
from crustcredits._http.addresses import ACCOUNT_CREDITS, USER_CREDITS
from crustcredits._http.protocol import API_VERSION, Response
from crustcredits._http.stored_response import store_response
from crustcredits._http.transport_types import Failure
from crustcredits._keys.api_key import ApiKey
from crustcredits._models import Balance

# Seconds for which a published answer is kept at least, for clients with longer ages.
_KEPT = 60.0


class Sharing:
    """The answers that this client shares with other processes.

    Args:
        store: Where they are; None if this client shares none.
        origin: `https://host` of the API. Clients of another address share nothing with this one.
        resume: Called with a call that goes on to the API.
    """

    def __init__(
        self, store: AnswerStore | None, origin: str, resume: Callable[[ApiCall], None]
    ) -> None:
        self._store = store
        self._origin = origin
        self._resume = resume

    @property
    def is_on(self) -> bool:
        """Whether answers are shared."""
        return self._store is not None

    # --- calls

    def begin(self, call: ApiCall, policy: CachePolicy) -> None:
        """Let a new call look for a shared answer that its first waiter accepts."""
        if self._store is not None and policy.max_age:
            call.policy, call.stage = policy, Stage.TO_LOOK_UP

    def join(self, call: ApiCall, policy: CachePolicy) -> None:
        """Let a call look only for answers that one more waiter accepts."""
        if call.stage is None or call.stage is Stage.FETCHES:
            return
        call.policy = call.policy.stricter(policy)
        if call.policy.max_age:
            return
        was_looking = call.stage is Stage.LOOKS
        self.end(call)
        if was_looking:
            self._resume(call)

    def look_up(self, call: ApiCall) -> None:
        """Look for the answer of a call, which waits meanwhile."""
        call.stage = Stage.LOOKS
        policy = call.policy
        ages = Ages(
            fresh=policy.max_age,
            error=policy.error_age,
            usable=policy.max_age + max(policy.revalidate, policy.if_error),
        )
        self._find(call, ages)

    def publish(
        self, call: ApiCall, got: Response | Failure, result: Balance | CrustCreditsError
    ) -> None:
        """Publish what a call has got that fetches for all: a balance, or an error of its key."""
        if call.stage is not Stage.FETCHES or isinstance(got, Failure) or self._store is None:
            return
        is_error = isinstance(result, OF_THE_KEY)
        text = (
            store_response(got, call.api_key) if isinstance(result, Balance) or is_error else None
        )
        if text is None:
            return
        policy = call.policy
        longest = max(policy.max_age + max(policy.revalidate, policy.if_error), policy.error_age)
        answer = StoredAnswer(began=call.request.started, is_error=is_error, text=text)
        self._store.publish(self._name(call.path, call.api_key), answer, kept=max(_KEPT, longest))
        call.stage = None

    def end(self, call: ApiCall) -> None:
        """Stop the search or the fetch of a call: it has ended, or asks the API for itself."""
        stage, call.stage = call.stage, None
        if self._store is None or stage in {None, Stage.TO_LOOK_UP}:
            return
        name = self._name(call.path, call.api_key)
        if stage is Stage.LOOKS:
            self._store.stop(name)
        else:
            self._store.free(name)

    # --- keys

    def invalidate(self, key: ApiKey | None) -> None:
        """Let no process find an answer for a key, or for any key, that was asked for before."""
        if self._store is None:
            return
        if key is None:
            self._store.invalidate(None)
            return
        for path in (USER_CREDITS, ACCOUNT_CREDITS):
            self._store.invalidate(self._name(path, key))

    # --- inside

    def _find(self, call: ApiCall, ages: Ages) -> None:
        assert self._store is not None
        self._store.find(self._name(call.path, call.api_key), ages, partial(self._found, call))

    def _found(self, call: ApiCall, finding: Finding, answer: StoredAnswer | None) -> None:
        """Go on with a call: end it, let it fetch the answer, or let it wait."""
        if call.stage is not Stage.LOOKS:  # it has ended, or looks no more
            return
        if finding is Finding.FETCH:
            call.stage = Stage.FETCHES
        if answer is not None and call.on_stored(answer):
            return
        if finding is Finding.OTHER_FETCHES:
            call.park(parks=True)
        elif finding is Finding.FOUND:  # it cannot be read, or is too old on this clock
            self._find(call, Ages(fresh=0.0, error=0.0, usable=0.0))
        else:
            if finding is Finding.OUT_OF_REACH:
                call.stage = None
            self._resume(call)

    def _name(self, path: str, key: ApiKey) -> str:
        """HMAC-SHA256, keyed by the API key itself: it tells nobody which keys are asked about."""
        about = f"{API_VERSION} {self._origin}{path}".encode()
        return hmac.new(key.get_secret_value().encode(), about, hashlib.sha256).hexdigest()
