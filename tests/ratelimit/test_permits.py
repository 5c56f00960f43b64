"""`Permits`: which call has a token of each scope, and which waiting call a token lets out."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.permits import Permits
from crustcredits._ratelimit.scope_detection import ScopeDetection
from crustcredits._ratelimit.token_bucket import MakeBucket, local_bucket
from crustcredits._ratelimit.token_queue import AccountQueue
from tests.ratelimit.calls import Outside, Pool, call, terms


class Endpoint:
    """Permits with the queue of ready calls beside them."""

    def __init__(self, make_bucket: MakeBucket = local_bucket, **settings: object) -> None:
        self.ready = FairQueue()
        settled = terms(**settings)
        self.scope = ScopeDetection(settled.window, settled.late, proves=settled.scope == "auto")
        self.permits = Permits(settled, scope=self.scope, ready=self.ready, make_bucket=make_bucket)

    def start(self, each: Call, now: float) -> AccountQueue:
        """Let a call take its tokens."""
        account = self.permits.admit(each, now)
        assert account is not None
        self.permits.take(each, account, now)
        return account

    def wait(self, each: Call, now: float = 0.0) -> Call:
        """Let a call wait for the token that it lacks."""
        assert self.permits.admit(each, now) is None
        return each

    def let_out(self) -> list[object]:
        """The keys of the calls that are ready, which leave the queue."""
        return [self.ready.pop().key for _ in range(len(self.ready))]


# --- buckets


def test_each_account_has_a_bucket_of_its_own_beside_the_common_one() -> None:
    """Each is made with the configured limit, when the first call of the account comes."""
    outside = Outside()
    endpoint = Endpoint(outside, requests=7)
    assert list(outside.buckets) == [None]
    endpoint.start(call("a1", Flow(), "A"), 3.0)
    endpoint.start(call("a2", Flow(), "A"), 4.0)
    assert {name: bucket.limit for name, bucket in outside.buckets.items()} == {None: 7, "A": 7}
    assert [bucket.taken for bucket in outside.buckets.values()] == [[3.0, 4.0]] * 2


@pytest.mark.parametrize(
    ("scope", "common"), [("auto", True), ("client", True), ("account", False)]
)
def test_a_permit_has_a_common_token_unless_accounts_are_counted_separately(
    scope: str, *, common: bool
) -> None:
    """The marks tell the requests of the account, and of all, from the call's own on."""
    endpoint = Endpoint(requests=5, scope=scope)
    permits = endpoint.permits
    assert permits.counts_common is common
    endpoint.start(call("a", Flow()), 0.0)
    second = call("b", Flow())
    account = permits.admit(second, 0.0)
    assert account is permits.accounts.find("b")
    assert account is not None
    own, all_together = permits.take(second, account, 0.0)
    assert account.bucket.own(own) == 1
    assert (all_together is not None) is common
    assert permits.common.bucket.on_wire == (2 if common else 0)
    if all_together is not None:
        assert permits.common.bucket.own(all_together) == 2


@pytest.mark.parametrize(("keys", "admitted"), [("aa", True), ("ab", False)])
def test_the_reserve_of_an_account_holds_once_two_of_its_keys_have_asked(
    keys: str, *, admitted: bool
) -> None:
    """A check may take all tokens of an account of one key."""
    endpoint, flow = Endpoint(requests=2, scope="account", reserve=0.5), Flow()
    first, second = (call(key, flow, "A") for key in keys)
    endpoint.start(first, 0.0)
    assert (endpoint.permits.admit(second, 0.0) is not None) is admitted


# --- tokens that come from outside


@pytest.mark.parametrize("scope", ["A", None])
def test_tokens_from_outside_let_waiting_calls_out(scope: str | None) -> None:
    """As many calls as tokens have come, when the scheduler looks for the next start."""
    outside = Outside({scope: 3})
    endpoint, flow = Endpoint(outside, requests=3), Flow()
    permits = endpoint.permits
    for number in range(3):
        permits.admit(call(str(number), flow, "A"), 0.0)
    assert permits.next_moment == math.inf
    permits.release_due(1e9)
    assert endpoint.let_out() == []
    outside.buckets[scope].held = 1
    outside.buckets[scope].wake()
    assert endpoint.let_out() == []
    assert permits.next_moment == -math.inf
    permits.release_due(1.0)
    assert endpoint.let_out() == ["0", "1"]
    assert permits.next_moment == math.inf


def test_tokens_of_a_forgotten_account_wake_no_call() -> None:
    """Nor those of an account without waiting calls."""
    outside = Outside()
    endpoint = Endpoint(outside, requests=1)
    permits = endpoint.permits
    account = endpoint.start(call("a", Flow()), 0.0)
    outside.buckets["a"].wake()
    permits.release_due(1.0)
    for bucket in (account.bucket, permits.common.bucket):
        bucket.put_back()
    permits.accounts.forget_later(account, 1.0)
    permits.accounts.forget_idle(1.0)
    assert len(permits.accounts) == 0
    outside.buckets["a"].wake()
    assert permits.next_moment == math.inf


def test_a_bucket_knows_how_many_calls_wait() -> None:
    """So that it leases tokens for them, and stops doing so."""
    outside = Outside({"A": 2})
    endpoint, flow = Endpoint(outside, requests=2), Flow()
    for number in range(2):
        endpoint.wait(call(str(number), flow, "A"))
    bucket = outside.buckets["A"]
    assert bucket.wanted == [(1, 0), (2, 0)]
    queue = endpoint.permits.accounts.find("A")
    assert queue is not None
    has_waiters = [queue.has_waiters]
    for held in (1, 0, 0):
        bucket.held = held
        endpoint.permits.release(queue, 1.0)
        endpoint.let_out()
        has_waiters.append(queue.has_waiters)
    assert bucket.wanted[2:] == [(1, 0), (0, 0)]
    assert has_waiters == [True, True, False, False]


# --- tokens that return


@pytest.mark.parametrize("scope", ["A", None])
def test_a_returning_token_lets_one_call_out(scope: str | None) -> None:
    """At the moment of its return; calls that were let out stand for their tokens."""
    endpoint, flow = Endpoint(requests=2, scope="client" if scope is None else "account"), Flow()
    permits = endpoint.permits
    running = [endpoint.start(call(name, flow, scope), 0.0) for name in ("one", "two")]
    queue = permits.common if scope is None else running[0]
    for when in (61.5, 63.5):
        queue.bucket.return_at(when)
    waiting = [endpoint.wait(call(str(number), flow, scope), 3.0) for number in range(4)]
    assert permits.next_moment == 61.5
    permits.release_due(61.25)
    assert endpoint.let_out() == []
    permits.release_due(61.5)
    assert endpoint.let_out() == ["0"]
    assert waiting[0].let_out_of is queue
    assert permits.next_moment == 63.5
    permits.release_due(63.5)
    assert endpoint.let_out() == ["1"]
    permits.release_due(1e9)
    assert endpoint.let_out() == []


def test_a_flow_counts_its_calls_that_wait_for_their_account() -> None:
    """When they begin to wait, and when that is over: let out, removed or given up."""
    outside = Outside({"A": 1, "B": 1})
    endpoint, parked = Endpoint(outside, requests=1), list[int]()
    permits, flow = endpoint.permits, Flow(on_parked=parked.append)
    calls = [endpoint.wait(call(f"a{number}", flow, "A")) for number in range(4)]
    quiet = endpoint.wait(call("b", Flow(), "B"))
    assert parked == [1, 1, 1, 1]
    assert permits.lengths() == {flow: 4, quiet.flow: 1}
    outside.buckets["A"].held = 0
    outside.buckets["A"].wake()
    permits.release_due(1.0)
    assert endpoint.let_out() == ["a0"]
    assert parked[4:] == [-1]
    outside.buckets["A"].held = 1
    assert permits.remove(calls[1], 1.0) is False
    assert parked[5:] == [-1]
    assert permits.lengths() == {flow: 2, quiet.flow: 1}
    assert permits.give_up("A", 1.0) == calls[2:]
    assert parked[6:] == [-1, -1]
    assert permits.lengths() == {quiet.flow: 1}
    assert permits.remove(quiet, 1.0) is False
    assert permits.lengths() == {}


def test_a_flow_does_not_count_its_calls_that_wait_for_the_common_bucket() -> None:
    """They count as ready there; each flow is counted once."""
    endpoint, parked = Endpoint(requests=1, scope="client"), list[int]()
    permits, flow, singles = endpoint.permits, Flow(on_parked=parked.append), Flow(Kind.SINGLE)
    endpoint.start(call("first", flow, "A"), 0.0)
    calls = [
        endpoint.wait(each)
        for each in (call("b", flow), call("c", flow), call("s", singles), call("a", flow, "A"))
    ]
    assert parked == [1]
    assert permits.lengths() == {flow: 3, singles: 1}
    assert permits.remove(calls[0], 0.0) is False
    assert permits.give_up(None, 0.0) == [calls[2], calls[1]]
    assert parked == [1]
    assert permits.lengths() == Counter({flow: 1})


# --- calls that leave


@pytest.mark.parametrize("scope", ["A", None])
def test_a_call_that_was_let_out_and_leaves_lets_the_next_one_out(scope: str | None) -> None:
    """It stood for a token, which is free now."""
    outside = Outside({scope: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    permits = endpoint.permits
    first, second = (endpoint.wait(call(name, flow, "A")) for name in ("first", "second"))
    outside.buckets[scope].held = 0
    outside.buckets[scope].wake()
    permits.release_due(1.0)
    assert len(endpoint.ready) == 1
    assert permits.remove(first, 2.0) is True
    assert first.let_out_of is None
    assert first.queue is None
    assert endpoint.let_out() == ["second"]
    assert permits.remove(second, 2.0) is True
    third = call("third", flow, "A")
    assert endpoint.start(third, 2.0).name == "A"


def test_a_ready_call_that_leaves_frees_no_token() -> None:
    """Nor does it concern the calls that wait."""
    outside = Outside({"A": 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    endpoint.wait(call("waits", flow, "A"))
    ready = call("ready", flow, "A")
    endpoint.ready.push(ready)
    assert endpoint.permits.remove(ready, 1.0) is False
    unknown = call("unknown", flow)
    endpoint.ready.push(unknown)
    assert endpoint.permits.remove(unknown, 1.0) is False
    assert len(endpoint.ready) == 0
    assert endpoint.permits.lengths() == {flow: 1}


@pytest.mark.parametrize("scope", ["A", None])
def test_the_token_of_a_call_that_is_not_sent_goes_to_the_next(scope: str | None) -> None:
    """Its own account's at once, the common one when the scheduler looks for the next start."""
    outside = Outside({scope: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    permits = endpoint.permits
    first, _ = (endpoint.wait(call(name, flow, "A")) for name in ("first", "second"))
    outside.buckets[scope].held = 0
    outside.buckets[scope].wake()
    permits.release_due(1.0)
    assert endpoint.ready.pop() is first
    permits.drop(first, 2.0)
    assert first.let_out_of is None
    permits.release_due(2.0)
    assert endpoint.let_out() == ["second"]


def test_a_call_of_an_unknown_account_is_dropped_without_a_trace() -> None:
    """No token had let it out."""
    endpoint = Endpoint(requests=1)
    endpoint.permits.drop(call("a", Flow()), 0.0)
    assert len(endpoint.permits.accounts) == 0
    assert endpoint.permits.next_moment == math.inf


@pytest.mark.parametrize("how", ["removed", "dropped", "given up"])
def test_an_account_whose_last_call_leaves_is_forgotten(how: str) -> None:
    """At once, because none of its tokens is out."""
    outside = Outside({None: 1})
    endpoint = Endpoint(outside, requests=1)
    permits = endpoint.permits
    each = endpoint.wait(call("a", Flow()), 1.0)
    if how == "removed":
        permits.remove(each, 2.0)
    elif how == "given up":
        assert permits.give_up(None, 2.0) == [each]
    else:
        outside.buckets[None].held = 0
        outside.buckets[None].wake()
        permits.release_due(2.0)
        permits.drop(endpoint.ready.pop(), 2.0)
    assert len(permits.accounts) == 0


def test_calls_that_wait_for_their_account_are_given_up_alone() -> None:
    """Calls of other accounts, and calls that wait for the common bucket, go on waiting."""
    outside = Outside({"A": 1, "B": 1, None: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    permits = endpoint.permits
    one, other, third = (
        endpoint.wait(call(key, flow, account))
        for key, account in (("one", "A"), ("other", "B"), ("third", "C"))
    )
    assert permits.give_up("A", 0.0) == [one]
    assert permits.give_up("unknown", 0.0) == []
    assert (one.queue, one.let_out_of) == (None, None)
    assert permits.give_up(None, 0.0) == [third]
    assert permits.give_up("B", 0.0) == [other]


# --- calls that were let out, and wait again


def test_a_call_let_out_by_a_common_token_that_its_account_stops_passes_it_on() -> None:
    """The token goes to the next call when the scheduler looks for the next start."""
    outside = Outside({None: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    permits = endpoint.permits
    first, _ = (endpoint.wait(call(name, flow)) for name in ("first", "second"))
    outside.buckets[None].held = 0
    outside.buckets[None].wake()
    permits.release_due(1.0)
    assert endpoint.ready.pop() is first
    outside.buckets["first"].held = 1
    endpoint.wait(first, 2.0)
    assert first.let_out_of is None
    assert endpoint.let_out() == []
    assert permits.next_moment == 2.0
    permits.release_due(2.0)
    assert endpoint.let_out() == ["second"]


def test_a_call_of_a_check_that_its_account_stops_passes_its_token_to_a_single_call() -> None:
    """The account's token may serve a call of a better kind, which waits for the same account."""
    outside = Outside({"A": 2})
    endpoint, check, singles = (
        Endpoint(outside, requests=2, reserve=0.5),
        Flow(),
        Flow(Kind.SINGLE),
    )
    permits = endpoint.permits
    first = endpoint.wait(call("check", check, "A"))
    outside.buckets["A"].held = 0
    outside.buckets["A"].wake()
    permits.release_due(1.0)
    assert endpoint.ready.pop() is first
    outside.buckets["A"].held = 2
    endpoint.wait(call("single", singles, "A"), 2.0)
    assert endpoint.let_out() == []
    outside.buckets["A"].held = 1  # kept for single calls
    endpoint.wait(first, 3.0)
    assert endpoint.let_out() == ["single"]
    assert permits.lengths() == {check: 1}


def test_a_call_of_a_check_that_the_common_bucket_stops_passes_its_token_on() -> None:
    """A single call may take the last common token."""
    outside = Outside({None: 2})
    endpoint, check, singles = (
        Endpoint(outside, requests=2, reserve=0.5, scope="client"),
        Flow(),
        Flow(Kind.SINGLE),
    )
    permits = endpoint.permits
    first = endpoint.wait(call("check", check))
    outside.buckets[None].held = 0
    outside.buckets[None].wake()
    permits.release_due(1.0)
    assert endpoint.ready.pop() is first
    outside.buckets[None].held = 2
    endpoint.wait(call("single", singles), 2.0)
    outside.buckets[None].held = 1
    endpoint.wait(first, 3.0)
    assert endpoint.let_out() == ["single"]


@pytest.mark.parametrize(
    ("waiting", "expected"), [(Kind.SINGLE, ["next"]), (Kind.MANY, []), (Kind.BACKGROUND, [])]
)
def test_an_account_token_of_a_call_that_the_common_bucket_stops_serves_a_better_kind(
    waiting: Kind, expected: list[str]
) -> None:
    """A call of the same kind could not start either."""
    outside = Outside({"A": 3})
    endpoint = Endpoint(outside, requests=3, scope="client")
    permits, check = endpoint.permits, Flow()
    first = endpoint.wait(call("check", check, "A"))
    outside.buckets["A"].held = 2
    outside.buckets["A"].wake()
    permits.release_due(1.0)
    assert endpoint.ready.pop() is first
    outside.buckets["A"].held = 3
    endpoint.wait(call("next", Flow(waiting), "A"), 2.0)
    outside.buckets["A"].held = 1
    outside.buckets[None].held = 3
    endpoint.wait(first, 3.0)
    assert first.queue in permits.common.queues
    assert endpoint.let_out() == expected


def test_numbers_of_a_pool_wait_with_their_call_for_the_common_bucket() -> None:
    """A pool that waits elsewhere, or that is not ready, stays where it is."""
    endpoint, pool, other = Endpoint(requests=1, scope="client"), Pool([None] * 3), Flow()
    permits = endpoint.permits
    endpoint.start(call("first", other), 0.0)
    endpoint.ready.push_pool(pool)
    endpoint.wait(endpoint.ready.pop())
    assert (len(endpoint.ready), permits.lengths()) == (0, {pool: 3})
    endpoint.wait(call("p9", pool))
    assert permits.lengths() == {pool: 4}


# --- refreshes


def test_a_refresh_spaces_the_next_one_in_both_scopes() -> None:
    """Its account counts it while it is on the wire; calls of other kinds are not spaced."""
    endpoint, refreshes, flow = Endpoint(requests=11), Flow(Kind.BACKGROUND), Flow()
    permits = endpoint.permits
    account = endpoint.start(call("a", flow, "A"), 5.0)
    assert (account.refreshing, account.bucket.next_refresh) == (0, 0.0)
    endpoint.start(call("r", refreshes, "A"), 5.0)
    assert account.refreshing == 1
    gap = 60.5 / 8
    assert account.bucket.next_refresh == 5.0 + gap
    assert permits.common.bucket.next_refresh == 5.0 + gap
    own, common = call("own", refreshes, "A"), call("other", refreshes, "B")
    endpoint.wait(own, 6.0)
    endpoint.wait(common, 6.0)
    assert own.queue in account.queues
    assert common.queue in permits.common.queues
    assert permits.next_moment == 5.0 + gap
    permits.release_due(5.0 + gap)
    assert set(endpoint.let_out()) == {"own", "other"}


@pytest.mark.parametrize("scope", ["account", "client"])
def test_refreshes_that_wait_are_let_out_one_by_one(scope: str) -> None:
    """The next one's moment is known when the one before it has taken its token."""
    endpoint, refreshes = Endpoint(requests=11, scope=scope), Flow(Kind.BACKGROUND)
    permits = endpoint.permits
    one_account = scope == "account"
    names = ["A"] * 4 if one_account else ["A", "B", "C", "D"]
    calls = [call(str(number), refreshes, name) for number, name in enumerate(names)]
    account = endpoint.start(calls[0], 0.0)
    for each in calls[1:]:
        endpoint.wait(each)
    at = 0.0
    for each in calls[1:3]:
        bucket = account.bucket if one_account else permits.common.bucket
        assert at < permits.next_moment == bucket.next_refresh
        at = permits.next_moment
        permits.release_due(at)
        assert endpoint.ready.pop() is each
        assert permits.next_moment == math.inf
        endpoint.start(each, at)
        assert each.let_out_of is None


def test_a_call_given_up_at_the_common_bucket_leaves_its_account_to_the_next() -> None:
    """The token of its account had let it out, and lets the next call out then."""
    outside = Outside({None: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    permits = endpoint.permits
    outside.held = {"A": 1}
    first, second = (endpoint.wait(call(name, flow, "A")) for name in ("first", "second"))
    outside.buckets["A"].held = 0
    outside.buckets["A"].wake()
    permits.release_due(1.0)
    assert permits.admit(endpoint.ready.pop(), 1.0) is None
    assert permits.give_up(None, 2.0) == [first]
    assert endpoint.let_out() == ["second"]
    assert second.let_out_of is permits.accounts.find("A")


@pytest.mark.parametrize(
    ("waiting", "order"),
    [(1, "before ready"), (2, "first before ready"), (3, "first before ready")],
)
def test_a_call_let_out_goes_first_while_others_wait_for_its_account(
    waiting: int, order: str
) -> None:
    """They may not take the token for which it stands; otherwise it goes to the end."""
    outside = Outside({"A": 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    for name in ("first", "second", "third")[:waiting]:
        endpoint.wait(call(name, flow, "A"))
    for name in ("before", "ready"):
        endpoint.ready.push(call(name, flow))
    outside.buckets["A"].held = 0
    outside.buckets["A"].wake()
    endpoint.permits.release_due(1.0)
    expected = order if waiting > 1 else f"{order} first"
    assert endpoint.let_out() == expected.split()


def test_a_call_let_out_of_the_common_bucket_goes_to_the_end() -> None:
    """Also while others wait there: no call of another account stands behind its token."""
    outside = Outside({None: 1})
    endpoint, flow = Endpoint(outside, requests=1), Flow()
    for name in ("first", "second"):
        endpoint.wait(call(name, flow))
    endpoint.ready.push(call("ready", flow))
    outside.buckets[None].held = 0
    outside.buckets[None].wake()
    endpoint.permits.release_due(1.0)
    assert endpoint.let_out() == ["ready", "first"]
