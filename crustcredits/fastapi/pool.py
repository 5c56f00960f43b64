"""`Pool`: the keys that a router shows, and the answers of its routes.

It knows the client, and nothing of HTTP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from crustcredits._cache.policy import CachePolicy
from crustcredits._client import CreditsClient
from crustcredits._keys.api_key import ApiKey, UnusableKey
from crustcredits._keys.key_pool import contradiction
from crustcredits._models import Known, Outcome, State, Unknown, time_text
from crustcredits._report import Report
from crustcredits.fastapi.problem_details import problem_of
from crustcredits.fastapi.schemas import HealthResponse

_log = logging.getLogger("crustcredits")

Sort: TypeAlias = Literal["given", "name", "credits", "-credits", "age", "-age"]
_Key: TypeAlias = ApiKey | UnusableKey


class Pool:
    """The keys of a router, and the answers of its routes."""

    def __init__(self, keys: Iterable[_Key], freshness: CachePolicy, timeout: float) -> None:
        self._keys = list(keys)
        problem = contradiction(self._keys)
        if problem is not None:
            raise problem
        if not self._keys:
            _log.warning(
                "the pool of the router is empty, because it was made without keys; if they come "
                "from the environment, set CRUSTDATA_API_KEYS or CRUSTDATA_API_KEY"
            )
        # Of two keys with the same label, the usable one.
        self._by_label = {
            key.label: key for key in sorted(self._keys, key=lambda key: isinstance(key, ApiKey))
        }
        self._freshness = freshness
        self._timeout = timeout
        self._ailing: set[_Key] = set()

    async def report(
        self,
        client: CreditsClient,
        state: State | None,
        account: str | None,
        sort: Sort,
        max_age: float,
    ) -> Report[Any]:
        """Check the keys that declare `account`, and list those in `state`; None means all.

        Raises:
            ClientClosedError: The client was closed.
        """
        keys = (
            self._keys if account is None else [key for key in self._keys if key.account == account]
        )
        report = await self._check(client, keys, max_age)
        if state is None and sort == "given":
            return report
        return Report(
            _sorted((outcome for outcome in report if state in {None, outcome.state}), sort)
        )

    async def outcome(
        self, client: CreditsClient, label: str, max_age: float
    ) -> Outcome[Any] | None:
        """Check the key of this label; None if there is none.

        Raises:
            CrustCreditsError: There is no balance; the error says why.
        """
        key = self._by_label.get(label)
        if key is None:
            return None
        outcome = (await self._check(client, [key], max_age))[0]
        outcome.result()
        return outcome

    async def _check(self, client: CreditsClient, keys: list[_Key], max_age: float) -> Report[Any]:
        report = await client.check(
            keys,
            timeout=self._timeout,
            max_age=max_age,
            stale_while_revalidate=self._freshness.revalidate,
            stale_if_error=self._freshness.if_error,
            # Errors have an age limit of their own, so that a repaired key is noticed.
            max_error_age=self._freshness.error_age,
        )
        if report.failed or self._ailing:
            self._note(report)
        return report

    def _note(self, report: Report[Any]) -> None:
        """Log each key that begins to fail, because callers never see the API's text."""
        failed = {outcome.key: outcome for outcome in report.failed}
        for key in failed.keys() - self._ailing:
            _log.warning("%s; logged once until the key is answered again", failed[key].error)
        self._ailing = (self._ailing - {outcome.key for outcome in report}) | failed.keys()

    def health(self, client: CreditsClient) -> HealthResponse:
        """Sum up the cache entries, without a request."""
        # The client's upper bound for an age.
        recent = min(self._freshness.max_age + self._freshness.revalidate, 1e300)
        outcomes = [
            (key, None if isinstance(key, UnusableKey) else client.peek(key, max_age=recent))
            for key in self._keys
        ]
        known = sum(outcome is not None and outcome.ok for _, outcome in outcomes)
        never = sum(
            outcome is None and not isinstance(key, UnusableKey) for key, outcome in outcomes
        )
        reasons = [*self._backend_reasons(client)]
        reasons += [reason for key, outcome in outcomes for reason in _reasons(key, outcome)]
        if never:
            reasons.append(
                f"keys not checked so far: {never} of {len(outcomes)}; GET /keys checks them"
            )
        if not outcomes:
            reasons.append("the pool is empty; give the router keys")
        if len(reasons) > _REASONS:
            reasons[_REASONS - 1 :] = [f"and {len(reasons) - _REASONS + 1} more reasons"]
        status: Literal["ok", "degraded", "unknown"] = "degraded" if reasons else "ok"
        if not known:
            status = "unknown"
        return HealthResponse(status=status, keys=len(outcomes), known=known, reasons=reasons)

    def _backend_reasons(self, client: CreditsClient) -> list[str]:
        """Why calls wait or fail, if the count that several processes share is out of reach."""
        key = next((key for key in self._keys if isinstance(key, ApiKey)), None)
        quota = None if key is None else client.quota(key=key)
        if quota is None or not quota.cut_off:
            return []
        effect = "this process counts by itself" if quota.degraded else "calls wait or fail"
        return [f"Redis is out of reach: {effect} until it answers; the log has the cause"]


# Most reasons that a health check lists.
_REASONS = 20


def _reasons(key: _Key, outcome: Outcome[Any] | None) -> list[str]:
    """List the problems of one key."""
    if isinstance(key, UnusableKey):
        return [f"{key.label}: the key cannot be used; GET /keys logs the cause"]
    if outcome is None:
        return []
    reasons = [] if outcome.error is None else [problem_of(outcome.error).title]
    if outcome.stale:
        reasons.append(f"the balance of {time_text(outcome.checked_at)} is stale")
    return [f"{key.label}: {'; '.join(reasons)}"] if reasons else []


def _sorted(outcomes: Iterable[Outcome[Any]], sort: Sort) -> list[Outcome[Any]]:
    listed = list(outcomes)
    if sort == "name":
        listed.sort(key=lambda outcome: outcome.key.label)
    elif sort != "given":
        known = [outcome for outcome in listed if isinstance(outcome, Known)]
        if sort in {"age", "-age"}:
            known.sort(key=lambda outcome: outcome.checked_at, reverse=sort == "age")
        else:
            known.sort(key=lambda outcome: outcome.credits, reverse=sort == "-credits")
        listed = [*known, *(outcome for outcome in listed if isinstance(outcome, Unknown))]
    return listed
