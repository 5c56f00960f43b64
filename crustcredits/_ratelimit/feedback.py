"""`Feedback`: the effects of an ended request on tokens, scope, limit, cooldown and pace.

An answer shows the server's count, its limit, or a refusal. How a request ended decides when its
tokens return.
"""

from __future__ import annotations

import logging
from collections import deque

from crustcredits._ratelimit.advertised_limit import AdvertisedLimit
from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.cooldown import EndpointCooldown, Evidence
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.terms import SchedulerTerms

_log = logging.getLogger("crustcredits")

# Refusals that cost a call no attempt: of probes while other accounts are refused too, and by
# something in front of the API.
_SPARED = 4
# Last probes of calls without an earlier request, and how many of them something in front of the
# API may refuse; with more, the pace is halved.
_LATEST_PROBES = 16
_FEW_FOREIGN = 6
# Accounts that have to state another limit before it holds back all, where accounts may be counted
# separately.
_AGREEING_ACCOUNTS = 3


class Feedback:
    """Notes how the requests of one endpoint ended.

    Args:
        terms: The settings of the scheduler.
        permits: The tokens.
        scope: The evidence about the scope that the server counts by.
        cooldown: The trials and cooldowns of the endpoint.
        pace: How many requests start per second.

    Attributes:
        used_by_others: Requests of the last count that were not this client's.
    """

    def __init__(
        self,
        terms: SchedulerTerms,
        *,
        permits: Permits,
        scope: ScopeDetection,
        cooldown: EndpointCooldown,
        pace: Pace,
    ) -> None:
        self._terms = terms
        self._permits = permits
        self._common = permits.common.bucket
        self._scope = scope
        self._cooldown = cooldown
        self._pace = pace
        self._adopts = terms.adopts != "never"
        follows_higher = terms.adopts == "any"
        self._own_limit = AdvertisedLimit(terms.requests, follows_higher=follows_higher)
        self._common_limit = AdvertisedLimit(
            terms.requests,
            follows_higher=follows_higher,
            agreeing=_AGREEING_ACCOUNTS if terms.scope == "auto" else 1,
        )
        # Whether something in front of the API refused each of the latest first probes.
        self._foreign: deque[bool] = deque(maxlen=_LATEST_PROBES)
        self.used_by_others = 0

    def served(self, request: Attempt, answer: AttemptResult, now: float) -> None:
        """Note a request that the API has answered, and has neither refused nor failed."""
        proved, apart = self._learn(request, answer, now)
        self._return_tokens(request, now + self._terms.period, proved=proved)
        if self._cooldown.trial is not None:
            self._cooldown.served(request.trial, apart=apart)
        if request.trial is not None:
            self._note_probe(request, foreign=False)

    def not_served(self, request: Attempt, answer: AttemptResult, now: float) -> None:
        """Note any other end of a request. A refusal may count as spared for its call."""
        self._return_unserved(request, answer, now)
        foreign = answer.is_refused and answer.used is None and self._scope.has_seen_counts
        if answer.is_answered:
            self._note_probe(request, foreign=foreign)
        if answer.is_refused:
            self._refused(request, answer, now, foreign=foreign)

    # --- counts and limits

    def _learn(self, request: Attempt, answer: AttemptResult, now: float) -> tuple[bool, bool]:
        """Update scope and limit from a served answer.

        Returns whether it proves a separate count, and whether it is a weaker sign of one.
        """
        used, limit, started = answer.used, answer.limit, request.started
        if used is None or limit is None:
            self._scope.served(started, now)
            return False, False
        bucket = request.account.bucket
        if self._adopts and (
            limit != bucket.limit
            or limit != self._common.limit
            or self._common_limit.is_news(limit)
        ):
            self._adopt(request, limit, used, now)
        own = bucket.own(request.own)
        proved, apart = self._scope.counted(used, own, started, now)
        if request.common is not None:
            self.used_by_others = max(0, used - self._common.own(request.common))
        return proved, apart

    def _adopt(self, request: Attempt, limit: int, used: int, now: float) -> None:
        """Follow the limit of an answer where its count supports it.

        Called when the stated limit differs from the followed one, or did recently.
        """
        account, period, window = request.account, self._terms.period, self._terms.window
        # Tokens return a period after the end. A request that ended so long ago may not be in the
        # server's window any more.
        aged = now + period - window + min(self._terms.late, window / 2)
        seen_of_account = account.bucket.returning(aged, request.started + period)
        account.bucket.limit = self._own_limit.note(account.name, limit, used, seen_of_account)
        # An answer that proves a separate count has `used` below `seen`, so its limit is ignored.
        adopted = self._common_limit.note(
            account.name, limit, used, self._scope.ended_before(request.started, now)
        )
        if adopted != self._common.limit:
            _log.info(
                "rate limit is now %d requests a period instead of %d, because the API states it; "
                "to keep the configured one, set RateLimit(adopt_server_limit='never')",
                adopted,
                self._common.limit,
            )
            self._common.limit = adopted

    # --- tokens

    def _return_unserved(self, request: Attempt, answer: AttemptResult, now: float) -> None:
        """Return the tokens of a request: at once if the server does not count it.

        Later if the time at which the server counts it is unknown.
        """
        if answer.status == 429 or answer.unsent:
            request.account.bucket.put_back()
            if request.common is not None:
                self._common.put_back()
            self._permits.accounts.forget_later(request.account, now)
        else:
            when = now + self._terms.period + (self._terms.late if answer.may_come_late else 0.0)
            self._return_tokens(request, when)

    def _return_tokens(self, request: Attempt, when: float, *, proved: bool = False) -> None:
        """Return the tokens at a moment; the common one at once if it was `proved` not to count."""
        account = request.account
        account.bucket.return_at(when)
        self._permits.accounts.forget_later(account, when)
        if request.common is None:
            return
        if proved:
            self._common.put_back()
        else:
            self._common.return_at(when)

    # --- refusals

    def _note_probe(self, request: Attempt, *, foreign: bool) -> None:
        """Note for a call's first probe whether something in front of the API refused it."""
        if request.trial is not None and request.first:
            self._foreign.append(foreign)

    def _refused(
        self, request: Attempt, answer: AttemptResult, now: float, *, foreign: bool
    ) -> None:
        """Note a refusal."""
        account, trial = request.account, request.trial
        if answer.wait is not None:
            account.cools_until = max(account.cools_until, now + answer.wait)
        expected = foreign or (trial is not None and trial.concerns_others_than(account.name))
        if expected and request.call.spared < _SPARED:
            request.call.spared += 1
        latest = self._foreign
        if foreign and len(latest) == _LATEST_PROBES and sum(latest) > _FEW_FOREIGN:
            self._pace.cut(now)
            latest.clear()
        self._cool_down(request, answer, now, foreign=foreign)

    def _cool_down(
        self, request: Attempt, answer: AttemptResult, now: float, *, foreign: bool
    ) -> None:
        """Let a refusal start or extend a trial, which may become a cooldown of the endpoint."""
        evidence = Evidence(
            has_counts=answer.used is not None,
            is_foreign=foreign,
            is_sure=not foreign and (self._scope.is_together or self._terms.scope == "client"),
            is_counted_apart=self._scope.is_counted_apart(now),
        )
        before = self._cooldown.trial
        was_held = before is not None and before.is_cooldown
        if not self._cooldown.refused(
            request.account.name, request.trial, answer.wait, evidence, now
        ):
            return
        self._pace.cut(now)
        trial = self._cooldown.trial
        if not was_held and trial is not None:
            _log.info(
                "endpoint cooldown of %.1f s, because several requests in a row were refused; then "
                "one probe at a time starts until one is served; if it repeats, look for other "
                "clients of the same rate limit, or lower RateLimit(requests=)",
                max(0.0, trial.until - now),
            )
        if evidence.has_counts:
            self._scope.contradicted(now)
