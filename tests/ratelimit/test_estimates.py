"""`Estimates`: the state of the buckets for users, and when calls are likely to start."""

from __future__ import annotations

import attrs
import pytest

from crustcredits._ratelimit.attempt import AttemptResult
from crustcredits._ratelimit.flow import Flow, Kind
from crustcredits._ratelimit.quota import Quota
from crustcredits._ratelimit.token_bucket import TokenBucket
from tests.ratelimit.calls import (
    OK,
    OutsideTokens,
    Pool,
    call,
    refused,
    served,
    start_call,
    started,
    terms,
)
from tests.ratelimit.worlds import scheduler as scheduler_of


def quota_of(limit: int, free: int, **state: object) -> Quota:
    """A quota of a scheduler with the terms of these tests and 32 slots, without a pace."""
    return Quota(**{"limit": limit, "free": free, "period": 60.5, **state})  # type: ignore[arg-type]  # checked by each test


# --- tokens, pace and slots


@pytest.mark.parametrize("account", [None, "a"])
def test_a_scheduler_without_requests_has_all_tokens(account: str | None) -> None:
    """The pace and the slots are those of the client."""
    scheduler = scheduler_of(terms(requests=4), pace=50.0, slots=7)
    assert scheduler.quota(account, 5.0) == quota_of(
        4, 4, pace=50.0, slots=7, returns=(0.0, 0.0, 0.0, 0.0)
    )


def test_tokens_on_the_wire_return_a_period_after_now_at_the_earliest() -> None:
    """Tokens of ended requests return a period after their end. Times are seconds from now."""
    scheduler, flow = scheduler_of(terms(requests=4), pace=None), Flow()
    first = start_call(scheduler, call("a1", flow, "A"), 0.0)
    start_call(scheduler, call("a2", flow, "A"), 0.0)
    start_call(scheduler, call("b", flow), 0.0)
    scheduler.ended(first, OK, 0.5)
    assert scheduler.quota(None, 2.0) == quota_of(
        4, 1, in_flight=2, answer_seconds=0.5, returns=(0.0, 59.0, 60.5, 60.5)
    )
    assert scheduler.quota("A", 2.0) == quota_of(
        4, 2, in_flight=1, answer_seconds=0.5, returns=(0.0, 0.0, 59.0, 60.5)
    )
    assert scheduler.quota("b", 2.0) == quota_of(
        4, 3, in_flight=1, answer_seconds=0.5, returns=(0.0, 0.0, 0.0, 60.5)
    )
    assert scheduler.quota("c", 2.0) == quota_of(4, 4, answer_seconds=0.5)


def test_every_quota_of_a_degraded_process_is_marked() -> None:
    """Of each bucket, also of one that was not made yet."""

    class Degraded(TokenBucket):
        is_degraded = is_cut_off = True

    scheduler = scheduler_of(
        terms(requests=4),
        pace=None,
        make_bucket=lambda whose, limit, wake: (Degraded if whose is None else TokenBucket)(limit),
    )
    start_call(scheduler, call("a", Flow()), 0.0)
    quotas = [scheduler.quota(name, 0.0) for name in (None, "a", "b")]
    assert [(quota.degraded, quota.cut_off) for quota in quotas] == [(True, True)] * 3


# --- calls that wait


def test_waiting_calls_are_counted_in_every_queue() -> None:
    """Ready calls, and those that wait for the common bucket or for their account."""
    scheduler = scheduler_of(terms(requests=2), pace=None)
    singles, check, stream, refreshes = (
        Flow(Kind.SINGLE),
        Flow(),
        Flow(),
        Flow(Kind.BACKGROUND),
    )
    for name in ("a1", "a2"):
        start_call(scheduler, call(name, check, "A"), 0.0)
    for name, flow, account in (
        ("a3", singles, "A"),
        ("a4", check, "A"),
        ("b1", check, "B"),
        ("b2", singles, "B"),
        ("b3", refreshes, "B"),
        ("a5", refreshes, "A"),
    ):
        scheduler.put(call(name, flow, account))
    assert started(scheduler, 0.0) == []
    for name, flow, account in (
        ("b4", stream, "B"),
        ("c1", singles, "C"),
        ("c2", check, "C"),
        ("c3", refreshes, "C"),
        ("a6", singles, "A"),
    ):
        scheduler.put(call(name, flow, account))
    on_wire = (60.5, 60.5)
    assert scheduler.quota(None, 0.0) == quota_of(
        2,
        0,
        in_flight=2,
        waiting=8,
        singles=4,
        lengths=(3, 1),
        refreshing=3,
        returns=on_wire,
    )
    assert scheduler.quota("A", 0.0) == quota_of(
        2, 0, in_flight=2, waiting=3, singles=3, refreshing=1, returns=on_wire
    )
    assert scheduler.quota("B", 0.0) == quota_of(2, 2, waiting=3, singles=3, refreshing=1)
    assert scheduler.quota("C", 0.0) == quota_of(2, 2, waiting=2, singles=2, refreshing=1)
    assert scheduler.quota("D", 0.0) == quota_of(2, 2)


def test_refreshes_on_the_wire_are_counted_until_they_end() -> None:
    """With those that wait, for the account and in all; they are not waiting calls."""
    scheduler, refreshes = scheduler_of(terms(requests=20), pace=None), Flow(Kind.BACKGROUND)
    request = start_call(scheduler, call("a1", refreshes, "A"), 0.0)
    start_call(scheduler, call("b1", Flow(), "B"), 0.0)

    def refreshing() -> list[int]:
        return [scheduler.quota(name, 0.0).refreshing for name in (None, "A", "B")]

    assert refreshing() == [1, 1, 0]
    scheduler.put(call("a2", refreshes, "A"))  # too early for another refresh of the account
    scheduler.put(call("b2", refreshes, "B"))  # and of all accounts
    assert started(scheduler, 0.0) == []
    assert refreshing() == [3, 2, 1]
    assert [scheduler.quota(name, 0.0).waiting for name in (None, "A", "B")] == [0, 0, 0]
    (second,) = started(scheduler, 20.0)
    assert second.call.key == "a2"
    assert refreshing() == [3, 2, 1]
    scheduler.ended(request, OK, 20.0)
    assert refreshing() == [2, 1, 1]
    scheduler.ended(second, OK, 20.0)
    assert refreshing() == [1, 0, 1]


def test_a_pool_whose_last_number_was_taken_out_is_no_flow_that_waits() -> None:
    """The next check takes no turns with it."""
    scheduler, pool = scheduler_of(terms(requests=2), pace=None), Pool([None])
    scheduler.put_pool(pool)
    assert scheduler.quota(None, 0.0) == quota_of(2, 2, waiting=1, lengths=(1,))
    pool.take_out(0)
    assert scheduler.quota(None, 0.0) == quota_of(2, 2)


# --- cooldowns


def test_a_cooldown_of_an_account_is_that_of_no_other() -> None:
    """It is over in the moment at which a call may start again."""
    scheduler, flow = scheduler_of(terms(requests=4), pace=None), Flow()
    request = start_call(scheduler, call("a", flow), 0.0)
    scheduler.ended(request, refused(30.0), 1.0)
    assert [scheduler.quota("a", at).cooldown for at in (1.0, 30.5, 31.0, 32.0)] == [
        30.0,
        0.5,
        None,
        None,
    ]
    assert [scheduler.quota(name, 1.0).cooldown for name in (None, "b")] == [None, None]


def test_a_cooldown_of_the_endpoint_is_that_of_every_account() -> None:
    """At 0 a probe tests whether it is over. Of an account's own cooldown the longer one counts."""
    scheduler, flow = scheduler_of(terms(requests=4, scope="client"), pace=None), Flow()
    first = start_call(scheduler, call("a", flow), 0.0)
    scheduler.ended(first, refused(50.0), 0.5)
    probe = start_call(scheduler, call("b", flow), 1.0)
    assert [scheduler.quota(name, 1.0).probing for name in (None, "a", "b", "c")] == [True] * 4
    assert scheduler.quota(None, 1.0).cooldown is None
    scheduler.ended(probe, refused(20.0), 1.5)

    def cooldowns(at: float) -> list[float | None]:
        return [scheduler.quota(name, at).cooldown for name in (None, "a", "b", "c")]

    assert cooldowns(1.5) == [20.0, 49.0, 20.0, 20.0]
    assert cooldowns(21.5) == [0.0, 29.0, 0.0, 0.0]
    assert not scheduler.quota(None, 22.0).probing
    start_call(scheduler, call("d", flow), 22.0)
    assert scheduler.quota(None, 22.0).probing
    assert cooldowns(51.0) == [0.0] * 4


def test_without_a_trial_a_request_is_no_probe() -> None:
    """Nor is a trial under way while no request of it is on the wire."""
    scheduler, flow = scheduler_of(terms(requests=4), pace=None), Flow()
    request = start_call(scheduler, call("a", flow), 0.0)
    assert not scheduler.quota(None, 0.0).probing
    scheduler.ended(request, refused(), 0.5)
    assert not scheduler.quota(None, 0.5).probing


# --- other clients


def test_requests_of_other_clients_count_once_ten_answers_show_a_common_count() -> None:
    """For the common bucket only: all but this client's own requests of the last count."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow()
    quotas: list[Quota] = []
    for number, others in enumerate([7] * 11 + [4]):
        request = start_call(scheduler, call(str(number), flow), 2.0 * number)
        scheduler.ended(request, served(number + 1 + others), 2.0 * number + 0.5)
        quotas.append(scheduler.quota(None, 2.0 * number + 0.5))
    expected = [0] * 9 + [7, 7, 4]
    assert quotas == with_others(quotas, expected)
    per_account = [scheduler.quota("11", 22.5)]
    assert per_account == with_others(per_account, [0])


def test_a_common_count_of_own_requests_alone_shows_no_other_clients() -> None:
    """Answers that count each request of this client, and no more."""
    scheduler, flow = scheduler_of(terms(), pace=None), Flow()
    for number in range(12):
        request = start_call(scheduler, call(str(number), flow), 2.0 * number)
        scheduler.ended(request, served(number + 1), 2.0 * number + 0.5)
    quotas = [scheduler.quota(None, 23.0)]
    assert quotas == with_others(quotas, [0])


def test_without_a_common_token_no_requests_of_other_clients_are_known() -> None:
    """Where accounts are counted separately, as configured, although the counts say otherwise."""
    scheduler, flow = scheduler_of(terms(scope="account"), pace=None), Flow()
    for number in range(12):
        request = start_call(scheduler, call(str(number), flow), 2.0 * number)
        scheduler.ended(request, served(number + 8), 2.0 * number + 0.5)
    quotas = [scheduler.quota(None, 23.0)]
    assert quotas == with_others(quotas, [0])


def with_others(quotas: list[Quota], others: list[int]) -> list[Quota]:
    """The same quotas with these numbers of requests of other clients."""
    return [
        attrs.evolve(quota, others=number) for quota, number in zip(quotas, others, strict=True)
    ]


# --- likely starts


def test_as_many_calls_are_likely_to_start_in_time_as_tokens_are_free_or_return() -> None:
    """If none is, the second value is the seconds until one is."""
    scheduler, flow = scheduler_of(terms(requests=4, scope="client"), pace=None), Flow()
    estimates = scheduler.estimates
    assert estimates.likely_starts(flow, 0.0, 10, 0.0) == (4, 0.0)
    assert estimates.likely_starts(flow, 0.0, 3, 0.0) == (3, 0.0)
    assert estimates.likely_starts(flow, 60.5, 10, 0.0) == (8, 0.0)
    assert estimates.likely_starts(flow, 60.0, 10, 0.0) == (4, 0.0)
    for name in "abcd":
        scheduler.ended(start_call(scheduler, call(name, flow), 0.0), OK, 0.5)
    assert estimates.likely_starts(flow, 20.0, 10, 1.0) == (0, 40.0)
    assert estimates.likely_starts(flow, 59.75, 10, 1.0) == (0, 0.25)
    assert estimates.likely_starts(flow, 60.0, 10, 1.0) == (4, 0.0)


def test_the_pace_bounds_the_likely_starts() -> None:
    """Beyond the first five, one for each part of a second."""
    scheduler, flow = scheduler_of(terms(requests=300, scope="client"), pace=8.0), Flow()
    assert scheduler.estimates.likely_starts(flow, 2.0, 100, 0.0) == (5 + 16, 0.0)
    assert scheduler.estimates.likely_starts(flow, 0.0, 100, 0.0) == (5, 0.0)


def test_flows_take_turns_in_the_likely_starts() -> None:
    """Calls of its own that wait come first, and so do single calls; of another check as many.

    Refreshes come last, and count for nothing.
    """
    scheduler, flow = scheduler_of(terms(requests=12, scope="client"), pace=None), Flow()
    other, singles, refreshes = Flow(), Flow(Kind.SINGLE), Flow(Kind.BACKGROUND)
    estimates = scheduler.estimates
    for number in range(4):
        scheduler.put(call(f"other{number}", other))
    scheduler.put(call("own", flow))
    assert estimates.likely_starts(flow, 0.0, 100, 0.0) == (7, 0.0)  # 1 + 7 + 4
    scheduler.put(call("single", singles))
    for number in range(5):
        scheduler.put(call(f"refresh{number}", refreshes))
    assert estimates.likely_starts(flow, 0.0, 100, 0.0) == (6, 0.0)
    assert estimates.likely_starts(other, 0.0, 100, 0.0) == (6, 0.0)  # 4 + 6 + 1 + 1
    small = scheduler_of(terms(requests=4, scope="client"), pace=None)
    for number in range(4):
        small.put(call(f"other{number}", other))
    assert small.estimates.likely_starts(flow, 0.0, 100, 0.0) == (2, 0.0)  # 2 + 2


@pytest.mark.parametrize(("kind", "starts"), [(Kind.SINGLE, 2), (Kind.MANY, 1)])
def test_calls_that_wait_take_their_tokens_before_the_likely_starts(
    kind: Kind, starts: int
) -> None:
    """All calls of its own; single calls take turns with it."""
    scheduler, flow = scheduler_of(terms(requests=4, scope="client"), pace=None), Flow()
    waiting = Flow(Kind.SINGLE) if kind is Kind.SINGLE else flow
    for number in range(3):
        scheduler.put(call(f"waits{number}", waiting))
    assert scheduler.estimates.likely_starts(flow, 0.0, 100, 0.0) == (starts, 0.0)


def test_a_quota_leaves_the_reserve_of_the_scheduler() -> None:
    """Of an account only if calls of several keys have asked for its tokens."""
    scheduler, flow = (
        scheduler_of(terms(requests=4, scope="account", reserve=0.5), pace=None),
        Flow(),
    )
    one = start_call(scheduler, call("a1", flow, "A"), 0.0)
    scheduler.ended(one, OK, 0.5)
    assert scheduler.quota("A", 1.0).seconds_for(3) == 0.0
    two = start_call(scheduler, call("a2", flow, "A"), 1.0)
    scheduler.ended(two, OK, 1.5)
    assert scheduler.quota("A", 2.0).seconds_for(1) == 59.0
    together = scheduler_of(terms(requests=4, scope="client", reserve=0.5), pace=None)
    assert [together.quota(None, 0.0).seconds_for(count) for count in (2, 3)] == [0.0, 60.5]


def test_without_a_common_bucket_any_number_of_calls_may_start() -> None:
    """Each account has tokens of its own."""
    scheduler = scheduler_of(terms(requests=1, scope="account"), pace=None)
    scheduler.ended(start_call(scheduler, call("first", Flow()), 0.0), OK, 0.0)
    assert scheduler.estimates.likely_starts(Flow(), 0.0, 1_000, 0.0) == (1_000, 0.0)


def test_during_a_trial_as_many_calls_are_likely_to_start_as_probes() -> None:
    """None while all of them are on the wire."""
    scheduler, flow = scheduler_of(terms(requests=100, scope="client"), pace=None), Flow()
    likely = scheduler.estimates.likely_starts
    scheduler.ended(start_call(scheduler, call("refused", flow), 0.0), refused(), 0.5)
    assert likely(flow, 10.0, 50, 1.0) == (1, 0.0)
    probe = start_call(scheduler, call("probe", flow), 1.0)
    assert likely(flow, 10.0, 50, 1.0) == (0, 0.0)
    scheduler.ended(probe, OK, 1.5)
    assert likely(flow, 10.0, 50, 2.0) == (2, 0.0)


@pytest.mark.parametrize("scope", ["account", "client"])
def test_pace_and_slots_bound_the_likely_starts_where_tokens_do_not(scope: str) -> None:
    """Each account has tokens of its own, or more common ones are free than are asked for."""
    flow = Flow()
    paced = scheduler_of(terms(requests=1_000, scope=scope), pace=8.0)
    assert paced.estimates.likely_starts(flow, 2.0, 100, 0.0) == (21, 0.0)
    slow = scheduler_of(terms(requests=1_000, scope=scope), pace=None, slots=2)
    slow.ended(start_call(slow, call("first", flow), 0.0), OK, 0.25)
    assert slow.estimates.likely_starts(flow, 0.5, 100, 1.0) == (6, 0.0)
    for number in range(4):
        slow.put(call(str(number), flow))
    assert slow.estimates.likely_starts(flow, 0.5, 100, 1.0) == (2, 0.0)
    assert slow.estimates.likely_starts(flow, 0.25, 100, 1.0) == (0, 0.125)


def test_where_answers_are_slow_their_time_bounds_the_likely_starts() -> None:
    """A request holds its slot for as long as its answer takes, and does not hang."""
    scheduler, flow = scheduler_of(terms(requests=1_000), pace=None, slots=2), Flow()
    scheduler.ended(start_call(scheduler, call("first", flow), 0.0), OK, 2.0)
    assert scheduler.estimates.likely_starts(flow, 4.0, 100, 2.0) == (6, 0.0)
    assert scheduler.quota(None, 2.0).seconds_for(6) == 4.0


@pytest.mark.parametrize("scope", ["account", "client"])
def test_requests_on_the_wire_hold_their_slots_before_the_likely_starts(scope: str) -> None:
    """For the time of an answer; an estimate for users assumes that they end now."""
    scheduler, flow = scheduler_of(terms(requests=7, scope=scope), pace=None, slots=2), Flow()
    scheduler.ended(start_call(scheduler, call("first", flow), 0.0), OK, 2.0)
    for name in "ab":
        start_call(scheduler, call(name, flow), 2.0)
    assert scheduler.estimates.likely_starts(flow, 3.0, 100, 2.0) == (3, 0.0)
    assert scheduler.estimates.likely_starts(flow, 0.5, 100, 2.0) == (0, 0.5)
    assert scheduler.quota("c", 2.0).seconds_for(2) == 0.0


def test_calls_that_wait_take_the_probes_of_a_trial_before_the_likely_starts() -> None:
    """Calls of its own, and those of another check in turn; refreshes come last."""
    scheduler, flow = scheduler_of(terms(requests=100, scope="client"), pace=None), Flow()
    likely = scheduler.estimates.likely_starts
    scheduler.ended(start_call(scheduler, call("refused", flow), 0.0), refused(), 0.5)
    scheduler.put(call("refresh", Flow(Kind.BACKGROUND)))
    assert likely(flow, 10.0, 50, 1.0) == (1, 0.0)
    scheduler.put(call("own", flow))
    assert likely(flow, 10.0, 50, 1.0) == (0, 0.0)
    assert likely(Flow(), 10.0, 50, 1.0) == (0, 0.0)
    (probe,) = started(scheduler, 1.0)
    assert probe.call.key == "own"
    scheduler.ended(probe, OK, 1.5)
    scheduler.put(call("own2", flow))
    assert likely(flow, 10.0, 50, 2.0) == (1, 0.0)
    assert likely(Flow(), 10.0, 50, 2.0) == (1, 0.0)  # in turn with the other flow


def test_before_the_first_answer_as_many_calls_are_likely_to_start_as_there_are_slots() -> None:
    """Nothing is known of the time that answers take, and all that wait count."""
    scheduler, flow = scheduler_of(terms(requests=100, scope="client"), pace=None, slots=8), Flow()
    likely = scheduler.estimates.likely_starts
    assert likely(flow, 10.0, 50, 0.0) == (8, 0.0)
    first = start_call(scheduler, call("first", flow), 0.0)
    for number in range(5):
        scheduler.put(call(str(number), flow))
    assert likely(flow, 10.0, 50, 0.0) == (3, 0.0)
    scheduler.ended(first, OK, 0.25)
    assert likely(flow, 10.0, 50, 0.25) == (50, 0.0)


def test_tokens_kept_for_a_proof_are_no_likely_starts_before_ten_requests_can_witness() -> None:
    """A tenth of the tokens, with scope `"auto"`."""
    scheduler, flow = scheduler_of(terms(requests=40), pace=None, slots=100), Flow()
    likely = scheduler.estimates.likely_starts
    assert likely(flow, 0.0, 50, 0.0) == (36, 0.0)
    requests = [start_call(scheduler, call(f"{number}", flow), 0.0) for number in range(36)]
    for number, request in enumerate(requests[1:]):
        scheduler.ended(request, OK if number < 9 else AttemptResult(status=503), 0.5)
    assert likely(flow, 30.0, 50, 10.0) == (0, 21.0)
    scheduler.ended(requests[0], OK, 10.0)
    assert likely(flow, 30.0, 50, 20.0) == (4, 0.0)


class Asking(OutsideTokens):
    """Shared tokens of which a few are asked for at a time."""

    def room(self, now: float, kept: int) -> int:
        return min(2, super().room(now, kept))

    def available(self, now: float) -> int:
        return max(0, super().room(now, 0))

    def returns(self, now: float, period: float) -> list[float]:
        return [*[now] * self.available(now), now + period]


def test_shared_tokens_that_are_not_asked_for_yet_are_likely_starts() -> None:
    scheduler = scheduler_of(
        terms(requests=20),
        pace=None,
        make_bucket=lambda whose, limit, wake: Asking(limit, lambda: wake(whose), 0),
    )
    answered = start_call(scheduler, call("a", Flow()), 0.0)
    scheduler.ended(answered, OK, 0.5)
    assert scheduler.estimates.likely_starts(Flow(), 1.0, 100, 1.0) == (19, 0.0)


def test_a_rival_flow_is_expected_to_start_as_many_calls_as_the_flow_itself() -> None:
    """However few wait now. The first call of a flow starts all the same."""
    scheduler, flow = scheduler_of(terms(requests=12, scope="client"), pace=None), Flow()
    rival, ended = Flow(), Flow()
    likely = scheduler.estimates.likely_starts
    scheduler.put(call("rival", rival))
    assert likely(flow, 0.0, 50, 0.0) == (11, 0.0)
    assert likely(flow, 0.0, 50, 0.0, rivals=[rival]) == (6, 0.0)
    assert likely(flow, 0.0, 50, 0.0, rivals=[rival, ended]) == (4, 0.0)
    scheduler.put(call("own", flow))
    assert likely(flow, 0.0, 50, 0.0, rivals=[rival]) == (5, 0.0)
    small = scheduler_of(terms(requests=1, scope="client"), pace=None)
    likely = small.estimates.likely_starts
    assert likely(flow, 0.0, 50, 0.0, rivals=[rival]) == (1, 0.0)
    small.put(call("own", flow))
    assert likely(flow, 0.0, 50, 0.0, rivals=[rival]) == (0, 60.5)
    assert likely(flow, 60.5, 50, 0.0, rivals=[rival]) == (0, 121.0)
