"""`Pool`: the keys that a router shows, and what is answered of them. It knows the client, and nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from crustcredits._client import CreditsClient
from crustcredits._freshness import Freshness
from crustcredits._keys import ApiKey, UnusableKey, contradiction
from crustcredits._models import Outcome, State, time_text
from crustcredits._problems import problem_of
from crustcredits._report import Report
from crustcredits._responses import HealthResponse

_log = logging.getLogger("crustcredits")

Sort: TypeAlias = Literal["given", "name", "credits", "-credits", "age", "-age"]
_Key: TypeAlias = ApiKey | UnusableKey


class Pool:
    """The keys of a router, and what its routes answer."""

    def __init__(self, keys: Iterable[_Key], freshness: Freshness, timeout: float) -> None:
        self._keys = list(keys)
        problem = contradiction(self._keys)
        if problem is not None:
            raise problem
        if not self._keys:
            _log.warning(
                "the pool of this router is empty; are CRUSTDATA_API_KEYS or CRUSTDATA_API_KEY set, if it comes from there?"
            )
        # Of two with one label, the one that can be used.
        self._by_label = {key.label: key for key in sorted(self._keys, key=lambda key: isinstance(key, ApiKey))}
        self._freshness = freshness
        self._timeout = timeout
        # A client keeps no errors; but callers of a service shall not make it ask the more for a key that fails.
        self._failed: dict[_Key, tuple[Outcome[Any], float]] = {}  # and when, in the loop's time
        self._ailing: set[_Key] = set()

    async def report(
        self, client: CreditsClient, state: State | None, account: str | None, sort: Sort, max_age: float
    ) -> Report[Any]:
        """Of the keys that declare `account`, those in `state`; None for all.

        Raises:
            ClientClosedError: The client was closed.
        """
        keys = self._keys if account is None else [key for key in self._keys if key.account == account]
        report = await self._check(client, keys, max_age)
        if state is None and sort == "given":
            return report
        return Report(_sorted((outcome for outcome in report if state in {None, outcome.state}), sort))

    async def outcome(self, client: CreditsClient, label: str, max_age: float) -> Outcome[Any] | None:
        """What came of the key of this label; None when there is none.

        Raises:
            CrustCreditsError: There is no balance, and why.
        """
        key = self._by_label.get(label)
        if key is None:
            return None
        outcome = (await self._check(client, [key], max_age))[0]
        outcome.result()
        return outcome

    async def _check(self, client: CreditsClient, keys: list[_Key], max_age: float) -> Report[Any]:
        failed = self._still_failed(client, keys, max_age) if self._failed else {}
        report = await client.check(
            [key for key in keys if key not in failed] if failed else keys,
            timeout=self._timeout,
            max_age=max_age,
            stale_while_revalidate=self._freshness.revalidate,
            stale_if_error=self._freshness.if_error,
        )
        if report.failed or self._ailing:
            self._note(report)
        if not failed:
            return report
        checked = iter(report)
        return Report([failed.get(key) or next(checked) for key in keys])

    def _note(self, report: Report[Any]) -> None:
        """Remember what failed, and tell the log when a key begins to fail: callers are not told what the API said."""
        failed = {outcome.key: outcome for outcome in report.failed}
        for key in failed.keys() - self._ailing:
            _log.warning("%s", failed[key].error)
        self._ailing = (self._ailing - {outcome.key for outcome in report}) | failed.keys()
        now = asyncio.get_running_loop().time()
        self._failed |= {key: (outcome, now) for key, outcome in failed.items()}

    def _still_failed(self, client: CreditsClient, keys: list[_Key], max_age: float) -> dict[_Key, Outcome[Any]]:
        """The failures of these keys that are young enough to be shown again, where no balance is known that will do."""
        since = asyncio.get_running_loop().time() - self._freshness.max_age
        self._failed = {key: (outcome, at) for key, (outcome, at) in self._failed.items() if at > since}
        failed = [key for key in keys if key in self._failed]
        return {key: self._failed[key][0] for key in failed if not _is_fresh(client, key, max_age)}

    def health(self, client: CreditsClient) -> HealthResponse:
        """What is known without asking."""
        recent = min(self._freshness.max_age + self._freshness.revalidate, 1e300)  # what the client takes for an age
        outcomes = [(key, None if isinstance(key, UnusableKey) else client.peek(key, max_age=recent)) for key in self._keys]
        known = sum(outcome is not None and outcome.ok for _, outcome in outcomes)
        never = sum(outcome is None and not isinstance(key, UnusableKey) for key, outcome in outcomes)
        reasons = [reason for key, outcome in outcomes for reason in _reasons(key, outcome)]
        reasons += [f"{never} of {len(outcomes)} keys have not been answered for yet"] * bool(never)
        reasons = reasons or ["the pool is empty"] * (not outcomes)
        if len(reasons) > _REASONS:
            reasons[_REASONS - 1 :] = [f"and {len(reasons) - _REASONS + 1} more"]
        status: Literal["ok", "degraded", "unknown"] = "unknown" if not known else "degraded" if reasons else "ok"
        return HealthResponse(status=status, keys=len(outcomes), known=known, reasons=reasons)


# How many reasons a health check lists.
_REASONS = 20


def _reasons(key: _Key, outcome: Outcome[Any] | None) -> list[str]:
    """What is wrong with a key, if anything."""
    if isinstance(key, UnusableKey):
        return [f"{key.label}: the key cannot be used"]
    if outcome is None:
        return []
    reasons = [] if outcome.error is None else [problem_of(outcome.error).title]
    if outcome.stale:
        reasons.append(f"the balance of {time_text(outcome.checked_at)} is old")
    return [f"{key.label}: {'; '.join(reasons)}"] if reasons else []


def _is_fresh(client: CreditsClient, key: _Key, max_age: float) -> bool:
    known = None if isinstance(key, UnusableKey) else client.peek(key, max_age=max_age)
    return known is not None and known.state == "fresh"


def _sorted(outcomes: Iterable[Outcome[Any]], sort: Sort) -> list[Outcome[Any]]:
    listed = list(outcomes)
    if sort == "name":
        listed.sort(key=lambda outcome: outcome.key.label)
    elif sort != "given":
        known = [outcome for outcome in listed if outcome.ok]
        if sort in {"age", "-age"}:
            known.sort(key=lambda outcome: outcome.checked_at, reverse=sort == "age")
        else:
            known.sort(key=lambda outcome: outcome.result().credits, reverse=sort == "-credits")
        listed = [*known, *(outcome for outcome in listed if not outcome.ok)]
    return listed
