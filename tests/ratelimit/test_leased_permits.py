"""`LeasedPermits`: calls ask for whole permits, and wait for them in their order."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from crustcredits._ratelimit.fair_queue import FairQueue
from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.leased_permits import LeasedPermits
from crustcredits._ratelimit.leased_tokens import LeasedTokens, PermitGate
from crustcredits._ratelimit.scope_detection import ScopeDetection
from tests.ratelimit.calls import Pool, call, terms
from tests.ratelimit.leases import Tokens


class Endpoint:
    """Leased permits, the queue of ready calls beside them, and the tokens by account."""

    def __init__(self, *, askable: int = 15, answers: int = 10, **settings: object) -> None:
        self.ready = FairQueue()
        self.tokens: dict[Hashable | None, Tokens] = {}
        self._wake: dict[Hashable | None, Callable[[], None]] = {}
        settled = terms(**settings)
        self.scope = ScopeDetection(settled.window, settled.late, proves=True)
        for _ in range(answers):  # which can witness, so that no tokens are withheld
            self.scope.served(-5.0, -5.0)
        self.permits = LeasedPermits(
            settled, scope=self.scope, ready=self.ready, make_bucket=self._make_bucket
        )
        self.tokens[None].askable = askable

    def _make_bucket(
        self, whose: Hashable | None, limit: int, wake: Callable[[Hashable | None], None]
    ) -> LeasedTokens:
        tokens = self.tokens[whose] = Tokens(limit)
        self._wake[whose] = lambda: wake(whose)
        make = PermitGate if whose is None else LeasedTokens
        return make(tokens, self._wake[whose], lambda: None)

    def comes(self, whose: Hashable | None, count: int = 0, now: float = 0.0) -> None:
        """Let an answer come, with this many tokens of an account."""
        if count:
            self.tokens[whose].unused += count
        self._wake[whose]()
        self.permits.release_due(now)

    def wait(self, each: Call, now: float = 0.0) -> Call:
        assert self.permits.admit(each, now) is None
        return each

    def asked(self, whose: Hashable) -> list[tuple[object, ...]]:
        return [entry[1:] for entry in self.tokens[whose].log if entry[0] == "need"]

    def let_out(self) -> list[object]:
        return [self.ready.pop().key for _ in range(len(self.ready))]


def test_calls_leave_common_tokens_until_ten_answers_can_witness() -> None:
    """A twentieth before the process has ten answers, then a tenth until these can witness."""
    endpoint = Endpoint(answers=0, askable=99)
    endpoint.wait(call("a", Flow()))
    for _ in range(10):
        endpoint.scope.served(0.1, 0.1)
    endpoint.wait(call("b", Flow()), 1.0)
    endpoint.wait(call("c", Flow()), 1.7)
    assert [endpoint.asked(name) for name in "abc"] == [[(1, 0, 15)], [(1, 0, 30)], [(1, 0, 0)]]


def test_a_call_without_a_permit_asks_for_one_and_waits_for_its_account() -> None:
    endpoint = Endpoint()
    endpoint.wait(call("a", Flow()))
    assert endpoint.asked("a") == [(1, 0, 0)]
    assert len(endpoint.permits.common) == 0
    endpoint.comes("a", 1)
    assert endpoint.let_out() == ["a"]


def test_a_call_with_a_permit_starts_whatever_may_be_asked_for() -> None:
    endpoint = Endpoint(askable=1)
    waits = endpoint.wait(call("a", Flow()))
    endpoint.comes("a", 1)
    endpoint.tokens[None].askable = 0
    assert endpoint.ready.pop() is waits
    account = endpoint.permits.admit(waits, 0.0)
    assert account is endpoint.permits.accounts.find("a")


def test_calls_that_may_not_ask_wait_for_the_common_tokens() -> None:
    """They ask in their order when there is room."""
    endpoint = Endpoint(askable=0)
    single, many = Flow(Kind.SINGLE), Flow()
    for each in (call("m1", many), call("m2", many), call("s", single)):
        endpoint.wait(each)
    assert len(endpoint.permits.common) == 3
    endpoint.tokens[None].askable = 2
    endpoint.comes(None)
    assert [endpoint.asked(name) for name in ("s", "m1", "m2")] == [[(1, 0, 0)], [(1, 0, 0)], []]
    assert len(endpoint.permits.common) == 1
    endpoint.comes(None)
    assert len(endpoint.permits.common) == 0
    assert endpoint.tokens[None].log[-1] == ("need", 0, 0, 0)
    endpoint.comes(None)
    assert endpoint.let_out() == []


def test_calls_of_a_pool_that_may_not_ask_wait_together() -> None:
    endpoint = Endpoint(askable=0)
    pool = Pool([None] * 50)
    endpoint.ready.push_pool(pool)
    endpoint.wait(endpoint.ready.pop())
    assert endpoint.ready.length == 0
    assert len(endpoint.permits.common) == 50


def test_waiting_calls_say_how_many_tokens_they_leave() -> None:
    """Here, of an account with several keys, and of all accounts together."""
    endpoint = Endpoint(requests=20, reserve=0.25)
    flow = Flow()
    endpoint.wait(call("a1", flow, "A"))
    endpoint.wait(call("a2", flow, "A"))
    endpoint.wait(call("a3", Flow(Kind.SINGLE), "A"))
    assert endpoint.asked("A") == [(1, 0, 5), (2, 5, 5), (1, 0, 0)]


def test_calls_whose_account_has_no_token_wait_for_it_and_hold_up_no_others() -> None:
    """Also those that waited until they could ask."""
    endpoint = Endpoint(askable=0)
    flow = Flow()
    for each in (call("a1", flow, "A"), call("a2", flow, "A"), call("b", flow)):
        endpoint.wait(each)
    account = endpoint.permits.accounts.of(call("a1", flow, "A"))
    account.cools_until = 50.0
    endpoint.tokens[None].askable = 1
    endpoint.comes(None)
    endpoint.permits.release_due(0.0)
    assert len(account) == 1
    assert endpoint.asked("b") == [(1, 0, 0)]
    endpoint.comes(None)
    assert len(account) == 2
    endpoint.tokens["A"].not_before = 70.0
    endpoint.permits.release_due(50.0)
    assert len(account) == 2
    endpoint.wait(call("a3", flow, "A"), 50.0)
    assert len(account) == 3


def test_a_call_that_may_ask_starts_without_it_where_a_permit_is_left() -> None:
    endpoint = Endpoint(askable=0)
    flow = Flow()
    endpoint.wait(call("a1", flow, "A"))
    endpoint.tokens["A"].unused = 1
    endpoint.tokens[None].askable = 1
    endpoint.comes(None)
    assert endpoint.let_out() == ["a1"]
    assert endpoint.asked("A") == []


def test_without_a_common_token_calls_that_asked_give_others_their_turn() -> None:
    """They wait for the common tokens again, as the first of their flow."""
    endpoint = Endpoint(askable=2)
    flow = Flow()
    parked: list[int] = []
    flow.on_parked = parked.append
    for name in ("a", "b"):
        endpoint.wait(call(name, flow))
    endpoint.tokens[None].askable = 0
    endpoint.wait(call("c", flow))
    endpoint.tokens[None].not_before = 9.0
    for name in ("a", "b"):
        endpoint.comes(name)
    assert parked == [1, 1, -1, -1]
    assert [endpoint.tokens[name].log[-1] for name in ("a", "b")] == [("ask later",)] * 2
    assert len(endpoint.permits.common) == 3
    assert endpoint.permits.next_moment == 9.0
    endpoint.wait(call("s", Flow(Kind.SINGLE)))
    endpoint.tokens[None].askable = 4
    endpoint.tokens[None].log.clear()
    endpoint.permits.release_due(9.0)
    asked = [name for name in ("s", "b", "a", "c") if endpoint.asked(name)[-1] == (1, 0, 0)]
    assert asked == ["s", "b", "a", "c"]


def test_in_degraded_mode_each_scope_has_tokens_of_its_own() -> None:
    endpoint = Endpoint()
    for name in (None, "a"):
        endpoint.permits.accounts.of(call("a", Flow()))
        tokens = endpoint.tokens[name]
        tokens.degraded, tokens.share, tokens.unused = True, 5, 0
    waits = endpoint.wait(call("a", Flow()))
    endpoint.tokens["a"].unused = 1
    endpoint.comes("a")
    assert endpoint.ready.pop() is waits
    endpoint.wait(waits)
    assert len(endpoint.permits.common) == 1
    endpoint.tokens[None].unused = 1
    endpoint.comes(None)
    assert endpoint.ready.pop() is waits
    assert endpoint.permits.admit(waits, 0.0) is not None


def test_refreshes_are_spaced_among_all_only_where_all_are_counted_together() -> None:
    for scope, spaced in (("auto", True), ("account", False)):
        endpoint = Endpoint(scope=scope, requests=20)
        refresh = endpoint.wait(call("a", Flow(Kind.BACKGROUND)))
        endpoint.comes("a", 1)
        account = endpoint.permits.admit(endpoint.ready.pop(), 0.0)
        assert account is not None
        endpoint.permits.take(refresh, account, 0.0)
        assert (endpoint.permits.common.bucket.next_refresh > 0) == spaced
        assert account.bucket.next_refresh > 0
