"""What a pool came to: sums, ranks and gates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import attrs
import pytest

from crustcredits import (
    Account,
    ApiKey,
    Balance,
    ConfigurationError,
    InsufficientCreditsError,
    InternalServerError,
    InvalidKeyError,
    Outcome,
    PaymentRequiredError,
    Report,
)
from crustcredits._report import needed_credits

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def good(name: str, credits: str, *, account: str | None = None, later: int = 0, secret: str | None = None) -> Outcome[Balance]:
    key = ApiKey(secret or f"secret of {name}".replace(" ", "-"), name=name, account=account)
    at = NOON + timedelta(seconds=later)
    return Outcome(key=key, balance=Balance(key=key, credits=Decimal(credits), checked_at=at), checked_at=at, attempts=1)


def bad(name: str, *, account: str | None = None) -> Outcome[Balance]:
    key = ApiKey(f"secret-of-{name}", name=name, account=account)
    error = InvalidKeyError("no such key", status=401, key_name=name)
    return Outcome(key=key, error=error, checked_at=NOON, attempts=1)


def names(outcomes: Sequence[Outcome[Any]]) -> list[str]:
    return [outcome.key.name for outcome in outcomes]


def test_a_report_is_a_sequence_of_outcomes() -> None:
    """In the order the keys were given."""
    first, second = good("a", "1"), bad("b")
    report = Report([first, second])
    assert list(report) == [first, second]
    assert (len(report), report[1], report[:1]) == (2, second, (first,))
    assert not report.ok
    assert (report.succeeded, report.failed) == ((first,), (second,))
    assert repr(report) == "<Report of 2 keys: 1 checked, 1 failed>"
    assert Report([first]).ok


def test_an_empty_report_is_ok_and_holds_nothing() -> None:
    """Nothing was asked and nothing is unknown."""
    assert Report([]).ok
    assert Report([]).total_credits == 0


def test_each_declared_account_counts_once_by_its_newest_answer() -> None:
    """Its keys draw from one balance, whichever was asked last."""
    report = Report([good("a", "10", account="acme", later=2), good("b", "11", account="acme"), good("c", "5")])
    assert report.total_credits == 15
    assert dict(report.accounts) == {"acme": Decimal(10)}


def test_a_failed_key_is_unknown_and_never_zero() -> None:
    """An account of which nothing is known has no credits, not 0; a pool of which nothing is known no total."""
    report = Report([bad("a", account="acme"), bad("b", account="x"), good("c", "5", account="x")])
    assert dict(report.accounts) == {"acme": None, "x": Decimal(5)}
    assert report.total_credits == 5
    assert Report([bad("a")]).total_credits is None


def test_the_same_secret_counts_once_with_or_without_its_account() -> None:
    """It is one account, however often it stands in the pool."""
    twice = [good("a", "10", secret="s-1"), good("b", "10", secret="s-1", account="acme"), good("c", "1", account="acme", later=1)]
    assert Report(twice).total_credits == 1
    assert Report([good("a", "10", secret="s-1"), good("b", "10", secret="s-1")]).total_credits == 10


def test_sums_are_exact_to_the_last_digit() -> None:
    """Whatever decimal context the caller has."""
    tiny, huge = "0." + "0" * 60 + "1", "9" * 64
    with localcontext() as context:
        context.prec = 3
        report = Report([good("a", huge), good("b", tiny), good("c", "0.10")])
        assert str(report.total_credits) == f"{huge}.1" + "0" * 59 + "1"


def test_ranking_goes_by_the_credits_of_the_account() -> None:
    """Richest first, ties in the order given, failed ones left out."""
    report = Report(
        [
            good("a", "5"),
            bad("b"),
            good("c", "9", account="x"),
            good("d", "5"),
            good("e", "7", account="x", later=1),
            good("f", "0"),
        ]
    )
    assert names(report.ranked()) == ["c", "e", "a", "d", "f"]
    assert names(report.ranked(min_credits=5.5)) == ["c", "e"]
    assert names(report.ranked(Decimal("7.01"))) == []


def test_low_names_the_keys_below_a_threshold() -> None:
    """In the order given; what is unknown is not low."""
    report = Report([good("a", "5"), bad("b"), good("c", "4.99"), good("d", "0")])
    assert names(report.low(5)) == ["c", "d"]
    assert names(report.low(0)) == []


@pytest.mark.parametrize("threshold", [float("nan"), Decimal("Infinity"), Decimal("sNaN"), 10**400, "5", None])
def test_a_threshold_is_a_finite_number(threshold: Any) -> None:
    """Anything else is refused by its name."""
    with pytest.raises(ConfigurationError, match="threshold is a finite number"):
        Report([]).low(threshold)
    with pytest.raises(ConfigurationError, match="min_credits is a finite number"):
        Report([]).ranked(threshold)


def test_undeclared_keys_with_the_same_answer_are_lookalikes() -> None:
    """To the last digit; declared ones, failed ones and one secret given twice are not."""
    report = Report(
        [
            good("a", "138940.37"),
            good("b", "138940.37"),
            good("c", "138940.4", account="x"),
            good("d", "138940.370"),
            good("e", "5", secret="s-1"),
            good("f", "5", secret="s-1"),
            good("g", "138940.37", account="y"),
            bad("h"),
        ]
    )
    assert [names(group) for group in report.lookalikes] == [["a", "b"]]


def test_lookalike_accounts_agree_in_everything_they_say() -> None:
    """With the whole account at hand, equal credits alone are no likeness."""

    def account(name: str, grant: int) -> Outcome[Account]:
        key = ApiKey(f"secret-of-{name}", name=name)
        balance = Account(key=key, credits=Decimal(5), checked_at=NOON, request_id=name, recurring_credits=Decimal(grant))
        return Outcome(key=key, balance=balance, checked_at=NOON, attempts=1)

    report = Report([account("a", 100), account("b", 200), account("c", 100)])
    assert [names(group) for group in report.lookalikes] == [["a", "c"]]


def old(name: str, credits: str, **options: Any) -> Outcome[Balance]:
    outcome = good(name, credits, **options)
    error = InternalServerError("down", status=503, key_name=name)
    return attrs.evolve(outcome, balance=attrs.evolve(outcome.result(), stale=True), error=error)


def test_a_stale_balance_counts_and_is_told() -> None:
    """It is known, only not of now: in all sums, not among the failed, and last in the ranking."""
    report = Report([old("a", "9"), good("b", "5"), bad("c"), old("d", "10")])
    assert report.total_credits == report.available_credits == 24
    assert not report.ok
    assert names(report.stale) == ["a", "d"]
    assert names(report.succeeded) == ["a", "b", "d"]
    assert names(report.ranked()) == ["b", "d", "a"]
    assert names(report.low(10)) == ["a", "b"]
    assert repr(report) == "<Report of 4 keys: 3 checked (2 stale), 1 failed>"
    assert report.to_dict()["stale"] == 2
    assert Report([old("a", "1"), good("b", "1")]).lookalikes


def test_available_credits_count_once_what_may_be_counted_twice() -> None:
    """Undeclared keys with one answer, also with that of a declared account; declared accounts are different ones."""
    twins = [good("a", "5"), good("b", "5.0"), good("c", "7"), good("d", "7", account="x"), good("e", "7", account="y")]
    report = Report(twins)
    assert report.total_credits == 31
    assert report.available_credits == 24
    assert Report([bad("a")]).available_credits == 0
    assert Report([good("a", "5", account="x"), good("b", "3", account="x", later=1)]).available_credits == 3
    assert Report([good("a", "5"), good("b", "5")]).available_credits == 5


def test_an_account_that_is_out_of_credits_adds_nothing_to_the_available() -> None:
    """As another of its keys has just been told; what was answered after that counts again."""
    spent = PaymentRequiredError("out of credits", status=402)
    failed: Outcome[Balance] = attrs.evolve(bad("b", account="x"), error=spent, checked_at=NOON + timedelta(seconds=5))
    assert Report([good("a", "5", account="x"), failed]).available_credits == 0
    assert Report([good("a", "5", account="x", later=9), failed]).available_credits == 5
    assert Report([good("a", "5", account="y"), failed]).available_credits == 5


def test_require_passes_or_names_what_is_unknown_and_stale() -> None:
    """Exactly what is needed is enough."""
    report = Report([good("a", "5"), old("b", "4.5"), bad("c"), *(bad(f"other-{number}") for number in range(12))])
    report.require(Decimal("9.5"))
    report.require(0)
    with pytest.raises(InsufficientCreditsError) as caught:
        report.require(10)
    error = caught.value
    assert error.needed == 10
    assert error.available == Decimal("9.5")
    assert (error.stale, error.unknown[0], error.unknown[-1]) == (("b",), "c", "other-11")
    assert len(error.unknown) == 13
    listed = ", ".join(["c", *(f"other-{number}" for number in range(9))])
    assert str(error) == f"10 credits are needed and 9.5 are known to be there; unknown: {listed} and 3 more; stale: b"


@pytest.mark.parametrize("mistake", [-1, float("nan"), Decimal("Infinity"), Decimal("-0.1"), "5", None, True, Decimal("1E+400")])
def test_what_is_required_is_a_number_of_at_least_0(mistake: Any) -> None:
    """And so is the margin."""
    with pytest.raises(ConfigurationError, match="credits is a finite number"):
        Report([]).require(mistake)
    with pytest.raises(ConfigurationError, match="margin is a finite number"):
        needed_credits(5, mistake)


def test_more_digits_than_can_be_summed_are_refused() -> None:
    """Not rounded."""
    with pytest.raises(ConfigurationError, match="too many digits") as caught:
        needed_credits(Decimal("1." + "3" * 300), Decimal("1." + "3" * 300))
    assert caught.value.__context__ is None


def test_raise_on_error_raises_all_errors_together() -> None:
    """And nothing when there are none."""
    Report([good("a", "1")]).raise_on_error()
    with pytest.raises(ExceptionGroup, match="2 of 3 keys could not be checked") as caught:
        Report([bad("a"), good("b", "1"), bad("c")]).raise_on_error()
    assert [str(error) for error in caught.value.exceptions] == ["a: no such key (HTTP 401)", "c: no such key (HTTP 401)"]


def test_a_report_becomes_plain_data() -> None:
    """With totals as text, and null where they are unknown."""
    report = Report([good("a", "1.50", account="acme"), bad("b", account="x"), good("c", "2"), good("d", "2")])
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [outcome["key"] for outcome in plain.pop("outcomes")] == ["acme/a", "x/b", "c", "d"]
    assert plain == {
        "ok": False,
        "checked": 3,
        "failed": 1,
        "stale": 0,
        "total_credits": "5.50",
        "accounts": {"acme": "1.50", "x": None},
        "lookalikes": [["c", "d"]],
    }
    assert Report([bad("a")]).to_dict()["total_credits"] is None
