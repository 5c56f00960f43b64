"""`GrantedTokens`: which token is used, given back and reported when."""

from __future__ import annotations

import pytest

from crustcredits.redis.granted_tokens import GrantedTokens
from crustcredits.redis.local_tokens import FRESH

LEASE = 81.0


@pytest.fixture
def tokens() -> GrantedTokens:
    return GrantedTokens(LEASE)


def numbers(tokens: GrantedTokens) -> list[int]:
    return [token.number for token in tokens.unused]


def test_a_call_may_take_the_tokens_that_leave_enough(tokens: GrantedTokens) -> None:
    tokens.grant(range(2), 1.0, 0)
    tokens.grant(range(2, 5), 1.0, 3)
    assert [tokens.free(kept) for kept in (0, 3, 4)] == [5, 3, 0]


@pytest.mark.parametrize(("kept", "left"), [(0, [1, 2, 3]), (2, [0, 1, 3]), (3, [0, 1, 2])])
def test_a_call_takes_the_token_that_suits_it_best(
    tokens: GrantedTokens, kept: int, left: list[int]
) -> None:
    """Of these the one granted first."""
    tokens.grant(range(2), 1.0, 0)
    tokens.grant(range(2, 3), 2.0, 2)
    tokens.grant(range(3, 4), 2.0, 3)
    tokens.take_for(kept)
    assert numbers(tokens) == left


def test_a_common_token_is_taken_in_the_order_of_grants(tokens: GrantedTokens) -> None:
    tokens.grant(range(2), 1.0, 3)
    tokens.grant(range(2, 3), 2.0, 0)
    tokens.take_first()
    assert numbers(tokens) == [1, 2]


def test_the_token_used_first_ends_first(tokens: GrantedTokens) -> None:
    tokens.grant(range(2), 1.0, 0)
    for _ in range(2):
        tokens.take_first()
    tokens.end(61.0, is_reported=True)
    assert tokens.returns(1.0, all_tokens=False) == [(0, 60.0)]
    assert tokens.returns(1.0, all_tokens=True) == [(0, 60.0), (1, LEASE)]


def test_a_reported_return_is_reported_once(tokens: GrantedTokens) -> None:
    """One that came while the message was under way is reported by the next."""
    tokens.grant(range(2), 1.0, 0)
    for _ in range(2):
        tokens.take_first()
    tokens.end(61.0, is_reported=True)
    tokens.begin_report(1.0)
    tokens.end(62.0, is_reported=True)
    tokens.reported()
    assert tokens.returns(2.0, all_tokens=False) == [(1, 60.0)]


def test_an_unused_token_is_given_back_after_a_second(tokens: GrantedTokens) -> None:
    tokens.grant(range(1), 1.0, 0)
    assert not tokens.has_expired(1.0 + FRESH)
    assert tokens.has_expired(1.001 + FRESH)
    assert tokens.give_back_unused(is_known=False)
    assert tokens.given_back() == [0]
    assert tokens.has_reports
    assert not tokens.has_expired(9.0)


@pytest.mark.parametrize("is_known", [True, False])
def test_redis_need_not_know_of_a_token_that_it_did_not_grant(
    tokens: GrantedTokens, is_known: bool
) -> None:
    """Unless this process has registered it."""
    tokens.take_own(7, 1.0)
    assert tokens.give_back_taken(is_known=is_known) == is_known
    assert tokens.given_back() == [7] * is_known


def test_tokens_of_a_lost_message_are_given_back_until_their_lease_ends(
    tokens: GrantedTokens,
) -> None:
    tokens.give_back_lost(range(3), 1.0)
    tokens.begin_report(LEASE)
    assert tokens.given_back() == [0, 1, 2]
    tokens.begin_report(1.0 + LEASE)
    assert tokens.given_back() == []
    assert tokens.is_empty


def test_a_token_is_out_until_its_return(tokens: GrantedTokens) -> None:
    tokens.grant(range(1), 1.0, 0)
    tokens.take_first()
    tokens.end(61.0, is_reported=False)
    emptied = []
    for now in (60.9, 61.0):
        tokens.forget_returned(now)
        emptied.append(tokens.is_empty)
    assert emptied == [False, True]
    assert not tokens.has_reports


def test_returns_are_forgotten_that_will_be_registered_again(tokens: GrantedTokens) -> None:
    tokens.grant(range(1), 1.0, 0)
    tokens.take_first()
    tokens.end(61.0, is_reported=True)
    tokens.forget_reports()
    assert not tokens.has_reports
    assert tokens.returns(1.0, all_tokens=True) == [(0, 60.0)]
