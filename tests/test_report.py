"""Reports of a pool: sums, rankings and `require`."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crustcredits import (
    Account,
    APIConnectionError,
    ApiKey,
    APITimeoutError,
    Balance,
    ConfigurationError,
    CreditsRequirementError,
    CreditsUnknownError,
    CrustCreditsError,
    GatewayError,
    InsufficientCreditsError,
    InternalServerError,
    InvalidKeyError,
    Known,
    Outcome,
    PaymentRequiredError,
    PermissionDeniedError,
    RateLimitError,
    RateLimitWaitError,
    Report,
    UnexpectedResponseError,
    Unknown,
    keys_from_records,
)
from crustcredits.fastapi.problem_details import problem_of
from tests import searches

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def good(
    name: str,
    credits: str,
    *,
    account: str | None = None,
    later: int = 0,
    secret: str | None = None,
) -> Known[Balance]:
    key = ApiKey(secret or f"secret of {name}".replace(" ", "-"), name=name, account=account)
    at = NOON + timedelta(seconds=later)
    return Known(balance=Balance(key=key, credits=Decimal(credits), checked_at=at))


def bad(
    name: str, *, account: str | None = None, error: CrustCreditsError | None = None
) -> Unknown:
    key = ApiKey(f"secret-of-{name}", name=name, account=account)
    error = error or InvalidKeyError("no such key", status=401, key_name=name)
    return Unknown(key=key, error=error, checked_at=NOON, attempts=1, source="fetched")


def names(outcomes: Sequence[Outcome[Any]]) -> list[str]:
    return [outcome.key.name for outcome in outcomes]


def test_a_report_is_a_sequence_of_outcomes() -> None:
    """They are in the order the keys were given."""
    first, second = good("a", "1"), bad("b")
    report = Report([first, second])
    assert list(report) == [first, second]
    assert (len(report), report[1], report[:1]) == (2, second, (first,))
    assert not report.ok
    assert (report.succeeded, report.failed) == ((first,), (second,))
    assert repr(report) == "<Report of 2 keys: 1 succeeded, 1 failed>"
    assert Report([first]).ok


def test_an_empty_report_is_ok_with_zero_credits() -> None:
    """No key was checked and none is unknown."""
    assert Report([]).ok
    assert Report([]).total_credits == 0


def test_each_declared_account_counts_once_by_its_newest_answer() -> None:
    """All its keys draw from one balance."""
    newest = good("a", "10", account="acme"), good("b", "11", account="acme")
    report = Report([newest[1], newest[0], good("c", "5")])
    assert report.total_credits == 16
    assert dict(report.accounts) == {"acme": Decimal(11)}


def test_the_newest_answer_is_the_last_to_arrive() -> None:
    """A wall clock set back and a renamed outcome do not matter."""
    first, second = good("a", "10", account="acme", later=3600), good("b", "11", account="acme")
    assert Report([first, second]).total_credits == Report([second, first]).total_credits == 11
    key = ApiKey("secret-of-a", name="c", account="acme")
    renamed = attrs.evolve(first, balance=attrs.evolve(first.result(), key=key))
    assert Report([second, renamed]).total_credits == 11


def test_a_failed_key_is_unknown_and_never_zero() -> None:
    """An account or a pool without a known balance has None, not 0."""
    report = Report([bad("a", account="acme"), bad("b", account="x"), good("c", "5", account="x")])
    assert dict(report.accounts) == {"acme": None, "x": Decimal(5)}
    assert report.total_credits == 5
    assert Report([bad("a")]).total_credits is None


def test_the_same_secret_counts_once_with_or_without_its_account() -> None:
    """It is one account, however often the pool holds it."""
    twice = [
        good("a", "10", secret="s-1"),
        good("b", "10", secret="s-1", account="acme"),
        good("c", "1", account="acme", later=1),
    ]
    assert Report(twice).total_credits == 1
    assert (
        Report([good("a", "10", secret="s-1"), good("b", "10", secret="s-1")]).total_credits == 10
    )


def test_sums_are_exact_to_the_last_digit() -> None:
    """The caller's decimal context does not matter."""
    tiny, huge = "0." + "0" * 60 + "1", "9" * 64
    with localcontext() as context:
        context.prec = 3
        report = Report([good("a", huge), good("b", tiny), good("c", "0.10")])
        assert str(report.total_credits) == f"{huge}.1" + "0" * 59 + "1"


def test_ranking_is_by_the_credits_of_the_account() -> None:
    """Richest first, ties in the order given, failed keys left out."""
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


def test_low_returns_the_keys_below_a_threshold() -> None:
    """In the order given; unknown keys are not low."""
    report = Report([good("a", "5"), bad("b"), good("c", "4.99"), good("d", "0")])
    assert names(report.low(5)) == ["c", "d"]
    assert names(report.low(0)) == []


@pytest.mark.parametrize(
    "threshold", [float("nan"), Decimal("Infinity"), Decimal("sNaN"), 10**400, "5"]
)
def test_a_threshold_is_a_finite_number(threshold: Any) -> None:
    """Any other value is refused, with the argument's name."""
    with pytest.raises(ConfigurationError, match="credits must be a finite number"):
        Report([]).low(threshold)
    with pytest.raises(ConfigurationError, match="grant_share must be a finite number"):
        Report([]).low_accounts(grant_share=threshold)
    with pytest.raises(ConfigurationError, match="min_credits must be a finite number"):
        Report([]).ranked(threshold)


def test_undeclared_keys_with_the_same_answer_are_lookalikes() -> None:
    """Equal to the last digit. Declared keys, failed keys and one secret given twice are not."""
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


def test_lookalike_accounts_agree_in_all_fields() -> None:
    """With full accounts, equal credits are not enough."""

    def account(name: str, grant: int) -> Known[Account]:
        key = ApiKey(f"secret-of-{name}", name=name)
        balance = Account(
            key=key,
            credits=Decimal(5),
            checked_at=NOON,
            request_id=name,
            recurring_credits=Decimal(grant),
        )
        return Known(balance=balance)

    report = Report([account("a", 100), account("b", 200), account("c", 100)])
    assert [names(group) for group in report.lookalikes] == [["a", "c"]]


def old(name: str, credits: str, **options: Any) -> Known[Balance]:
    outcome = good(name, credits, **options)
    error = InternalServerError("down", status=503, key_name=name)
    return attrs.evolve(outcome, balance=attrs.evolve(outcome.result(), stale=True), error=error)


def test_a_stale_balance_counts_and_is_marked() -> None:
    """It is in all sums, not in `failed`, and last in the ranking."""
    report = Report([old("a", "9"), good("b", "5"), bad("c"), old("d", "10")])
    assert report.total_credits == report.available_credits == 24
    assert not report.ok
    assert names(report.stale) == ["a", "d"]
    assert names(report.succeeded) == ["a", "b", "d"]
    assert names(report.ranked()) == ["b", "d", "a"]
    assert names(report.low(10)) == ["a", "b"]
    assert repr(report) == "<Report of 4 keys: 3 succeeded (2 stale), 1 failed>"
    assert report.to_dict()["stale"] == 2
    assert Report([old("a", "1"), good("b", "1")]).lookalikes


def test_available_credits_count_identical_answers_once() -> None:
    """Those of undeclared keys, also beside a declared account.

    Declared accounts are always different.
    """
    twins = [
        good("a", "5"),
        good("b", "5.0"),
        good("c", "7"),
        good("d", "7", account="x"),
        good("e", "7", account="y"),
    ]
    report = Report(twins)
    assert report.total_credits == 31
    assert report.available_credits == 24
    assert Report([bad("a")]).available_credits == 0
    assert (
        Report(
            [good("a", "5", account="x"), good("b", "3", account="x", later=1)]
        ).available_credits
        == 3
    )
    assert Report([good("a", "5"), good("b", "5")]).available_credits == 5


def test_an_account_with_a_later_402_adds_nothing_to_available_credits() -> None:
    """A balance after the 402 counts again."""
    before, other = good("a", "5", account="x", later=3600), good("a", "5", account="y")
    first, failed = (
        bad(name, account="x", error=PaymentRequiredError("out of credits", status=402))
        for name in "cb"
    )
    after = good("a", "5", account="x")
    assert Report([before, failed]).available_credits == 0, "whatever the wall clock said"
    assert Report([before, failed]).ranked() == ()
    assert Report([after, failed]).available_credits == 5
    assert names(Report([after, failed]).ranked()) == ["a"]
    assert Report([other, failed]).available_credits == 5
    between = (
        good("a", "5", account="x"),
        bad("d", account="x", error=PaymentRequiredError("out of credits", status=402)),
    )
    for order in ((*between, first), (first, *between), (between[1], first, between[0])):
        assert Report(order).available_credits == 0


def test_an_overdrawn_account_takes_nothing_from_the_others() -> None:
    """No other account pays its debt; `total_credits` stays exact."""
    report = Report([good("a", "-50", account="x"), good("b", "100"), good("c", "-5")])
    assert report.available_credits == 100
    assert report.total_credits == 45
    report.require(80)
    Report([good("a", "-50")]).require(0)
    Report([bad("a")]).require(0)
    Report([]).require(0)


def test_a_failed_key_of_a_known_account_does_not_decide() -> None:
    """Nor does one of a spent account: the credits are too few, even if these keys answered."""
    spent = bad("d", account="y", error=PaymentRequiredError("out of credits", status=402))
    silent = bad("c", account="y", error=APITimeoutError("too late"))
    known: list[Outcome] = [
        good("a", "5", account="x"),
        bad("b", account="x", error=APITimeoutError("too late")),
    ]
    report = Report([*known, silent, spent])
    with pytest.raises(InsufficientCreditsError) as caught:
        report.require(6)
    assert caught.value.report is report
    assert caught.value.errors == tuple(outcome.error for outcome in report.failed)
    assert str(caught.value) == (
        "too few credits: 6 needed, 5 known to be available; unknown: x/b, y/c, y/d; top up, "
        "or run a smaller batch"
    )
    with pytest.raises(CreditsUnknownError) as undecided:
        Report([*known, silent]).require(6)
    assert undecided.value.deciding == (silent.error,)
    assert not isinstance(undecided.value, InsufficientCreditsError)
    assert isinstance(undecided.value, CreditsRequirementError)
    assert undecided.value.may_recover
    assert str(undecided.value).endswith(
        "hold the rest: y/c; see the errors of these keys, and check again"
    )


OF_KEYS: list[CrustCreditsError | None] = [
    None,
    PaymentRequiredError("spent", status=402),
    InvalidKeyError("revoked", status=401),
    PermissionDeniedError("not allowed", status=403),
    ConfigurationError("no key"),
    UnexpectedResponseError("odd", status=200),
    APIConnectionError("bad certificate", retryable=False),
    APITimeoutError("too late"),
    APIConnectionError("refused"),
    InternalServerError("down", status=500),
    GatewayError("blocked", status=403),
    RateLimitError("too many"),
    RateLimitWaitError("no room", wait=5.0),
]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "x", "y"]),
            st.integers(-5, 20),
            st.booleans(),
            st.sampled_from(OF_KEYS),
        ),
        max_size=8,
    ),
    st.integers(0, 60),
)
@settings(max_examples=searches.examples(300))
def test_require_agrees_with_an_independent_count(
    pool: list[tuple[str | None, int, bool, CrustCreditsError | None]], needed: int
) -> None:
    """It passes, or is 409, 502 or 503 over HTTP."""
    outcomes: list[Outcome[Balance]] = []
    balances: dict[str, int] = {}  # the last one of each account and of each undeclared key
    errors: dict[str, list[CrustCreditsError]] = defaultdict(list)
    for number, (account, credits, stale, error) in enumerate(pool):
        owner = account or f"key {number}"
        if error is None:
            # Answers of undeclared keys all differ, so that each counts.
            amount = credits if account else credits * 1000 + number + 100
            outcomes.append(
                (old if stale else good)(f"k{number}", str(amount), account=account, later=number)
            )
            balances[owner] = amount
        else:
            outcomes.append(bad(f"k{number}", account=account, error=error))
            errors[owner].append(error)
            if isinstance(error, PaymentRequiredError) and owner in balances:
                balances[owner] = 0  # a 402 after the balance: spent since
    spent = {
        owner
        for owner, said in errors.items()
        if any(isinstance(each, PaymentRequiredError) for each in said)
    }
    available = sum(max(0, credits) for credits in balances.values())
    deciding = [
        error
        for owner, said in errors.items()
        if owner not in {*balances, *spent}
        for error in said
    ]
    may_recover = any(error in OF_KEYS[-6:] for error in deciding)
    expected = None if needed <= available else 409 if not deciding else 503 if may_recover else 502
    report = Report(outcomes)
    assert report.available_credits == available
    if expected is None:
        report.require(needed)
        return
    with pytest.raises(CreditsRequirementError) as caught:
        report.require(needed)
    error, problem = caught.value, problem_of(caught.value)
    assert problem.status == expected
    assert (problem.retry_after is not None) == (expected == 503)
    assert isinstance(error, InsufficientCreditsError) == (expected == 409)
    assert (int(error.needed), int(error.available), error.report) == (needed, available, report)


def test_outcomes_are_found_by_label() -> None:
    """Of two keys with one label, the usable key is found."""
    unusable = Unknown(
        key=keys_from_records([{"secret": "", "name": "b"}])[0], error=ConfigurationError("empty")
    )
    report = Report([good("a", "1", account="x"), good("b", "2"), unusable])
    assert report.by_label["x/a"] is report[0]
    assert report.by_label["b"] is report[1]
    assert "c" not in report.by_label


def test_credits_of_a_key_are_those_of_its_account() -> None:
    """A failed key has them from another key of the account.

    An outcome of another report is refused.
    """
    report = Report(
        [
            good("a", "1", account="x"),
            good("b", "2", account="x", later=1),
            bad("c", account="x"),
            bad("d"),
        ]
    )
    assert [report.credits_of(outcome) for outcome in report] == [2, 2, 2, None]
    with pytest.raises(ConfigurationError, match="e: the key is not in this report"):
        report.credits_of(good("e", "1"))


def test_low_is_by_credits_or_by_a_share_of_the_grant() -> None:
    """An equal value is not low, and without a grant the share does not apply."""

    def granted(name: str, credits: str, grant: int | None) -> Known[Account]:
        key = ApiKey(f"secret-of-{name}", name=name, account=name)
        recurring = None if grant is None else Decimal(grant)
        return Known(
            balance=Account(
                key=key, credits=Decimal(credits), checked_at=NOON, recurring_credits=recurring
            )
        )

    report = Report(
        [
            granted("a", "9.9", 100),
            granted("b", "10", 100),
            granted("c", "0", 0),
            granted("d", "1", None),
        ]
    )
    assert report.low_accounts(grant_share=0.1) == ("a",)
    assert report.low_accounts(1, grant_share=0.1) == ("a", "c")
    assert names(report.low(grant_share=Decimal("0.11"))) == ["a", "b"]
    assert Report(
        [good("a", "1"), good("b", "1", account="x"), bad("c", account="y")]
    ).low_accounts(5) == ("x",)
    with pytest.raises(ConfigurationError, match="detail=True"):
        Report([good("a", "1")]).low(grant_share=0.1)
    with pytest.raises(ConfigurationError, match="pass credits=, grant_share= or both"):
        Report([]).low_accounts()


def test_reports_with_the_same_outcomes_are_equal() -> None:
    """Tests can compare them."""
    first = good("a", "1")
    assert Report([first]) == Report([first])
    assert len({Report([first]), Report([first]), Report([])}) == 2
    assert Report([first]) != [first]


def test_require_passes_or_names_the_unknown_and_stale_keys() -> None:
    """The exact number needed is enough."""
    report = Report(
        [
            good("a", "5"),
            old("b", "4.5"),
            bad("c"),
            *(bad(f"other-{number}") for number in range(12)),
        ]
    )
    report.require(Decimal("9.5"))
    report.require(0)
    with pytest.raises(CreditsUnknownError) as caught:
        report.require(10)
    error = caught.value
    assert error.needed == 10
    assert error.available == Decimal("9.5")
    assert (error.stale, error.unknown[0], error.unknown[-1]) == (("b",), "c", "other-11")
    assert len(error.unknown) == 13
    listed = ", ".join(["c", *(f"other-{number}" for number in range(9))])
    assert str(error) == (
        "credits unknown: 10 needed, 9.5 known to be available; keys that could not be "
        f"checked may hold the rest: {listed} and 3 more; stale: b; "
        "see the errors of these keys, and correct or remove the keys"
    )


def test_raise_on_error_raises_all_errors_together() -> None:
    """Without errors it does nothing."""
    Report([good("a", "1")]).raise_on_error()
    with pytest.raises(ExceptionGroup, match="2 of 3 keys could not be checked") as caught:
        Report([bad("a"), good("b", "1"), bad("c")]).raise_on_error()
    assert [str(error) for error in caught.value.exceptions] == [
        "a: no such key (HTTP 401)",
        "c: no such key (HTTP 401)",
    ]


def test_a_report_converts_to_json_data() -> None:
    """Totals are text, and null where they are unknown."""
    report = Report(
        [good("a", "1.50", account="acme"), bad("b", account="x"), good("c", "2"), good("d", "2")]
    )
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [outcome["key"] for outcome in plain.pop("outcomes")] == ["acme/a", "x/b", "c", "d"]
    assert plain == {
        "ok": False,
        "succeeded": 3,
        "failed": 1,
        "stale": 0,
        "total_credits": "5.50",
        "accounts": {"acme": "1.50", "x": None},
        "lookalikes": [["c", "d"]],
    }
    assert Report([bad("a")]).to_dict()["total_credits"] is None


def test_a_requirement_error_names_the_remedy() -> None:
    """Check again, correct the keys, or correct the cause that each error names."""
    for error, remedy in (
        (APIConnectionError("reset"), "check again"),
        (InvalidKeyError("unknown", status=401), "correct or remove the keys"),
        (
            UnexpectedResponseError("no JSON", status=200),
            "correct the cause that each names",
        ),
    ):
        report = Report[Balance]([Unknown(key=ApiKey("secret-0", name="prod"), error=error)])
        with pytest.raises(CreditsUnknownError, match=remedy) as caught:
            report.require(1)
        assert len(copy.deepcopy(caught.value).report) == 1


# --- equal answers, and the order of outcomes


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_available_credits_do_not_depend_on_the_order_of_outcomes(order: tuple[int, ...]) -> None:
    """Two undeclared keys answer alike, and one of them is out of credits since."""
    a, b = (ApiKey(f"secret-{name}", name=name) for name in "ab")
    outcomes: list[Outcome[Balance]] = [
        Known(balance=Balance(key=a, credits=Decimal(5), checked_at=NOON)),
        Known(balance=Balance(key=b, credits=Decimal(5), checked_at=NOON)),
        Unknown(
            key=a,
            error=PaymentRequiredError("out of credits", status=402, key_name="a"),
            checked_at=NOON + timedelta(seconds=1),
            attempts=1,
        ),
    ]
    assert Report([outcomes[index] for index in order]).available_credits == 0


def test_equal_answers_are_recognised_in_any_order_of_fields() -> None:
    """The API may send them in another order; numbers are equal to the last digit."""
    one, two = (
        Account(
            key=ApiKey(f"secret-{name}", name=name),
            credits=Decimal(credits),
            checked_at=NOON,
            extra=extra,
        )
        for name, credits, extra in (
            ("a", "5", {"x": 1, "y": [2]}),
            ("b", "5", {"y": [2], "x": 1}),
        )
    )
    report = Report([Known(balance=one), Known(balance=two)])
    assert [len(group) for group in report.lookalikes] == [2]
    assert report.available_credits == 5


@pytest.mark.parametrize(
    ("credits", "said"),
    [
        (Decimal("NaN"), "credits must be a finite number, not NaN"),
        (
            Decimal("-1E-400"),
            "of at least 0 and at most 1e+300, not -1e-400",
        ),
        (Decimal("1E-301"), "credits has too many digits; round it up"),
        (Decimal("1E+301"), "at most 1e+300, not 1e+301"),
        (Decimal("1E+300"), "5 known to be available"),
    ],
)
def test_needed_credits_are_compared_as_decimals(credits: Decimal, said: str) -> None:
    """No number passes through a float."""
    key = ApiKey("secret-a", name="a")
    report = Report([Known(balance=Balance(key=key, credits=Decimal(5), checked_at=NOON))])
    with pytest.raises((ConfigurationError, InsufficientCreditsError), match=re.escape(said)):
        report.require(credits)


def test_the_outcomes_by_label_cannot_be_changed() -> None:
    """All callers share them."""
    report = Report(
        [Known(balance=Balance(key=ApiKey("s", name="a"), credits=Decimal(5), checked_at=NOON))]
    )
    with pytest.raises(TypeError):
        report.by_label["b"] = report[0]  # type: ignore[index]  # the mistake under test
