"""The known accounts: which of them are forgotten, and when."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from crustcredits._ratelimit.flow import Call, Flow, Kind
from crustcredits._ratelimit.registry import Accounts
from crustcredits._ratelimit.terms import SchedulerTerms
from crustcredits._ratelimit.token_bucket import TokenBucket
from crustcredits._ratelimit.token_queue import AccountQueue

PERIOD = 60.0


class Bucket(TokenBucket):
    """A bucket that other processes may not know to be whole."""

    __slots__ = ("is_settling",)

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.is_settling = False

    @property
    def is_whole(self) -> bool:
        return super().is_whole and not self.is_settling


def make_bucket(name: Hashable) -> Bucket:
    return Bucket(3)


def known(*names: str, reserve: float = 0.0) -> tuple[Accounts, list[AccountQueue]]:
    """Accounts with these names, of which no check is planned."""
    accounts = Accounts(SchedulerTerms(period=PERIOD, reserve=reserve), make_bucket)
    return accounts, [accounts.of(call(name)) for name in names]


def call(account: str, kind: Kind = Kind.MANY) -> Call:
    return Call(f"key of {account}", account, Flow(kind))


def used(account: AccountQueue, *, returns: float) -> None:
    """A request of this account has ended; its token returns then."""
    account.bucket.take(0.0)
    account.bucket.return_at(returns)


# --- known accounts


def test_an_account_is_known_from_its_first_call_on() -> None:
    """With the first key, and with tokens made for it by name."""
    made: list[Hashable] = []

    def make(name: Hashable) -> TokenBucket:
        made.append(name)
        return TokenBucket(300)

    accounts = Accounts(SchedulerTerms(reserve=0.1), make)
    assert (len(accounts), accounts.find("A")) == (0, None)
    account = accounts.of(Call("k1", "A", Flow()))
    assert accounts.of(Call("k2", "A", Flow())) is account
    assert accounts.find("A") is account
    assert (account.name, account.key, account.bucket.limit) == ("A", "k1", 300)
    other = accounts.of(Call("k3", "B", Flow()))
    assert other is not account
    assert (len(accounts), made) == (2, ["A", "B"])


def test_an_account_keeps_to_the_settings_of_the_scheduler() -> None:
    _, (account,) = known("A", reserve=0.5)
    account.has_several_keys = True
    assert account.reserve == 0.5


# --- when a check comes


@pytest.mark.parametrize(("cools_until", "checked_at"), [(0.0, 70.0), (70.0, 70.0), (100.0, 100.0)])
def test_a_check_is_planned_once_and_after_the_cooldown(
    cools_until: float, checked_at: float
) -> None:
    accounts, (account,) = known("A")
    account.cools_until = cools_until
    accounts.forget_later(account, 70.0)
    accounts.forget_later(account, 200.0)
    assert account.idles_at == checked_at
    accounts.forget_idle(checked_at - 0.1)
    assert len(accounts) == 1
    accounts.forget_idle(checked_at)
    assert len(accounts) == 0


def test_an_account_is_not_forgotten_without_a_planned_check() -> None:
    accounts, _ = known("A")
    accounts.forget_idle(1000.0)
    assert len(accounts) == 1


def test_each_idle_account_is_forgotten_and_a_busy_one_behind_them_stays() -> None:
    accounts, (a, b, c) = known("A", "B", "C")
    for account, when in ((a, 10.0), (b, 20.0), (c, 30.0)):
        accounts.forget_later(account, when)
    accounts.forget_idle(20.0)
    assert [accounts.find(name) for name in "ABC"] == [None, None, c]


def test_a_forgotten_account_starts_again_with_all_its_tokens() -> None:
    accounts, (account,) = known("A")
    account.bucket.limit = 1
    accounts.forget_later(account, 0.0)
    accounts.forget_idle(0.0)
    again = accounts.of(call("A"))
    assert again is not account
    assert again.bucket.limit == 3


def test_one_look_checks_a_thousand_accounts() -> None:
    """The rest is checked by the next look, so that no turn of the event loop takes long."""
    accounts, each = known(*map(str, range(2_001)))
    for account in each:
        accounts.forget_later(account, 0.0)
    sizes = []
    for _ in range(3):
        accounts.forget_idle(0.0)
        sizes.append(len(accounts))
    assert sizes == [1_001, 1, 0]


# --- accounts that stay


def test_an_account_whose_tokens_are_not_back_is_checked_when_the_last_one_is() -> None:
    accounts, (account,) = known("A")
    for when in (70.0, 75.0, 80.0):
        used(account, returns=when)
    accounts.forget_later(account, 60.0)
    accounts.forget_idle(60.0)
    assert account.idles_at == 80.0
    accounts.forget_idle(79.9)
    assert len(accounts) == 1
    accounts.forget_idle(80.0)
    assert len(accounts) == 0


def test_an_account_with_a_request_on_the_wire_waits_for_a_new_plan() -> None:
    """Its end plans the next check."""
    accounts, (account,) = known("A")
    account.bucket.take(0.0)
    accounts.forget_later(account, 60.0)
    accounts.forget_idle(60.0)
    assert account.idles_at is None
    account.bucket.return_at(90.0)
    accounts.forget_idle(500.0)
    assert len(accounts) == 1
    accounts.forget_later(account, 500.0)
    accounts.forget_idle(500.0)
    assert len(accounts) == 0


def test_an_account_is_checked_again_after_a_cooldown_that_has_begun_meanwhile() -> None:
    accounts, (account,) = known("A")
    accounts.forget_later(account, 60.0)
    account.cools_until = 100.0
    accounts.forget_idle(60.0)
    assert (len(accounts), account.idles_at) == (1, 100.0)
    accounts.forget_idle(100.0)
    assert len(accounts) == 0


def test_an_account_is_checked_again_until_other_processes_know_of_its_tokens() -> None:
    """After two seconds each time."""
    accounts, (account,) = known("A")
    assert isinstance(account.bucket, Bucket)
    account.bucket.is_settling = True
    accounts.forget_later(account, 60.0)
    for now in (60.0, 62.0):
        accounts.forget_idle(now)
        assert (len(accounts), account.idles_at) == (1, now + 2.0)
    account.bucket.is_settling = False
    accounts.forget_idle(63.9)
    assert len(accounts) == 1
    accounts.forget_idle(64.0)
    assert len(accounts) == 0


@pytest.mark.parametrize("kind", list(Kind))
def test_an_account_for_which_a_call_waits_or_was_let_out_stays(kind: Kind) -> None:
    """The start or the end of the call plans the next check; accounts behind it are checked."""
    accounts, (a, b, c) = known("A", "B", "C")
    a.push(call("A", kind))
    b.push(call("B", kind))
    (let_out,) = b.release(0.0)
    for account in (a, b, c):
        accounts.forget_later(account, 60.0)
    accounts.forget_idle(60.0)
    assert [accounts.find(name) for name in "ABC"] == [a, b, None]
    assert (a.idles_at, b.idles_at) == (None, None)
    b.take_back(let_out)
    list(a.drain())
    for account in (a, b):
        accounts.forget_later(account, 60.0)
    accounts.forget_idle(60.0)
    assert len(accounts) == 0


# --- accounts that delay no others


def test_a_long_cooldown_delays_no_other_account() -> None:
    """An account whose check is more than a period away goes to the end, one with each look."""
    accounts, (a, b, c) = known("A", "B", "C")
    a.cools_until = b.cools_until = 1000.0
    for account in (a, b, c):
        accounts.forget_later(account, 60.0)
    accounts.forget_idle(60.0)
    assert len(accounts) == 3
    accounts.forget_idle(60.0)
    assert len(accounts) == 3
    accounts.forget_idle(60.0)
    assert [accounts.find(name) for name in "ABC"] == [a, b, None]


@pytest.mark.parametrize(("now", "remain"), [(40.0, 2), (39.9, 1)])
def test_an_account_whose_check_comes_within_a_period_keeps_its_place(
    now: float, remain: int
) -> None:
    """The accounts behind it are checked with it."""
    accounts, (a, b) = known("A", "B")
    accounts.forget_later(a, 100.0)
    accounts.forget_later(b, 0.0)
    accounts.forget_idle(now)
    accounts.forget_idle(now)
    assert len(accounts) == remain


# --- accounts whose call has left without a request


def test_an_account_of_which_nothing_is_out_is_forgotten_at_once() -> None:
    """Its bucket is new, or all its tokens have returned."""
    accounts, (new, returned) = known("new", "returned")
    used(returned, returns=60.0)
    accounts.forget_if_unused(new, 1.0)
    assert accounts.find("new") is None
    accounts.forget_if_unused(returned, 60.0)
    assert len(accounts) == 0
    accounts.forget_if_unused(returned, 60.0)  # a call of it that left a moment later
    assert len(accounts) == 0


@pytest.mark.parametrize("why", ["token", "waits", "let out", "refresh", "cooldown", "planned"])
def test_an_account_that_is_in_use_is_checked_later(why: str) -> None:
    """Something of it is out, a call waits for it, or stands for one of its tokens."""
    accounts, (account,) = known("a")
    if why == "token":
        used(account, returns=60.0)
    elif why == "waits":
        account.push(call("a"))
    elif why == "let out":
        account.push(call("a"))
        (_,) = account.release(0.0)
    elif why == "refresh":
        account.push(call("a", Kind.BACKGROUND))
        (_,) = account.release(0.0)
    elif why == "cooldown":
        account.cools_until = 5.0
    else:
        accounts.forget_later(account, 9.0)
    accounts.forget_if_unused(account, 1.0)
    assert accounts.find("a") is account
    assert account.idles_at == {"cooldown": 5.0, "planned": 9.0}.get(why, 1.0)


def test_an_account_is_forgotten_when_its_cooldown_is_just_over() -> None:
    """Not a moment later."""
    accounts, (account,) = known("a")
    account.cools_until = 5.0
    accounts.forget_if_unused(account, 5.0)
    assert len(accounts) == 0
