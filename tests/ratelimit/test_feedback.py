"""`Feedback`: the effects of an ended request on tokens, limits, trials, pace and later proofs."""

from __future__ import annotations

import logging

import attrs
import pytest

from crustcredits._ratelimit.attempt import Attempt, AttemptResult
from crustcredits._ratelimit.connection_slots import ConnectionSlots
from crustcredits._ratelimit.cooldown import Trial
from crustcredits._ratelimit.flow import Call, Flow
from crustcredits._ratelimit.pace import Pace
from crustcredits._ratelimit.scheduler import Scheduler
from tests.ratelimit.calls import (
    FAILED,
    INCOMPLETE,
    LOST,
    OK,
    UNSENT,
    call,
    refused,
    served,
    start_call,
    terms,
)


class Endpoint:
    """A scheduler without a configured pace; the first cut sets one of 50 requests per second."""

    def __init__(self, **settings: object) -> None:
        self.pace = Pace(None, 5.0)
        self.scheduler = Scheduler(
            terms(**settings), pace=self.pace, slots=ConnectionSlots[Attempt](32), seed=1
        )
        self.flow = Flow()

    @property
    def trial(self) -> Trial | None:
        return self.scheduler.cooldown.trial

    @property
    def width(self) -> int:
        """Most probes on the wire; 0 without a trial."""
        return 0 if self.trial is None else self.trial.width

    def start(self, name: str, at: float, account: str | None = None) -> Attempt:
        return start_call(self.scheduler, call(name, self.flow, account), at)

    def ask(self, name: str, at: float, answer: AttemptResult, seconds: float = 0.25) -> Call:
        """Send a request of a new call, which ends after `seconds`. Returns the call."""
        request = self.start(name, at)
        self.scheduler.ended(request, answer, at + seconds)
        return request.call

    def limit(self, account: str | None, at: float = 0.0) -> int:
        return self.scheduler.quota(account, at).limit

    def free(self, account: str | None, at: float) -> int:
        return self.scheduler.quota(account, at).free


# --- tokens


@pytest.mark.parametrize(
    ("answer", "returns"),
    [
        (OK, 60.5),
        (AttemptResult(status=401), 60.5),
        (FAILED, 60.5),
        (INCOMPLETE, 60.5),
        (LOST, 68.5),
        (AttemptResult(status=408), 68.5),
        (AttemptResult(status=502), 68.5),
        (AttemptResult(status=503, wait=1.0), 68.5),
        (AttemptResult(status=504), 68.5),
        (AttemptResult(status=200, by_gateway=True), 68.5),
        (AttemptResult(status=429), 0.0),
        (AttemptResult(status=429, by_gateway=True), 0.0),
        (UNSENT, 0.0),
    ],
    ids=(
        *("served", "401", "500", "incomplete", "lost", "408", "502", "503", "504", "html"),
        *("refused", "refused with html", "unsent"),
    ),
)
@pytest.mark.parametrize("scope", ["auto", "client", "account"])
def test_the_tokens_of_a_request_return_by_the_way_in_which_it_ended(
    scope: str, answer: AttemptResult, returns: float
) -> None:
    """At once if it is not counted; later by the longest request if it may still arrive."""
    endpoint = Endpoint(requests=1, scope=scope)
    request = endpoint.start("a", 0.0)
    endpoint.scheduler.ended(request, answer, 2.0)
    for name, seconds in (("a", returns), (None, 0.0 if scope == "account" else returns)):
        quota = endpoint.scheduler.quota(name, 2.0)
        assert quota == attrs.evolve(
            quota, free=0 if seconds else 1, in_flight=0, returns=(seconds,)
        )


@pytest.mark.parametrize(
    ("answer", "forgotten"), [(OK, 62.5), (LOST, 70.5), (refused(3.0), 5.0), (UNSENT, 2.0)]
)
def test_an_account_is_forgotten_when_its_tokens_are_back(
    answer: AttemptResult, forgotten: float
) -> None:
    """And its cooldown is over."""
    endpoint = Endpoint()
    accounts = endpoint.scheduler.permits.accounts
    endpoint.scheduler.ended(endpoint.start("a", 0.0), answer, 2.0)
    accounts.forget_idle(forgotten - 0.25)
    known = len(accounts)
    accounts.forget_idle(forgotten)
    assert (known, len(accounts)) == (0 if answer is UNSENT else 1, 0)


def witness(endpoint: Endpoint, at: float) -> None:
    """Ten requests of other accounts that count for an answer from 1.75 s later on."""
    for number in range(10):
        endpoint.ask(f"w{number}", at, served(1))


def test_a_proven_separate_count_returns_the_common_token_at_once() -> None:
    """The account's own token returns a period later all the same."""
    endpoint = Endpoint()
    witness(endpoint, 0.0)
    assert endpoint.free(None, 1.0) == 290
    endpoint.ask("early", 1.5, served(1))
    assert endpoint.free(None, 1.75) == 289
    endpoint.ask("proven", 1.75, served(1))
    assert (endpoint.free(None, 2.0), endpoint.free("proven", 2.0)) == (289, 299)
    endpoint.ask("without counts", 4.0, OK)
    endpoint.ask("two", 4.0, served(2))
    assert endpoint.free(None, 5.0) == 287


def test_without_a_common_token_a_proof_returns_none() -> None:
    """Where accounts are counted separately anyway, as configured."""
    endpoint = Endpoint(scope="account", requests=20)
    witness(endpoint, 0.0)
    endpoint.ask("proven", 4.0, served(1))
    assert (endpoint.free(None, 5.0), endpoint.free("proven", 5.0)) == (20, 19)


# --- limits


@pytest.mark.parametrize(
    ("ended", "start", "late", "counted"),
    [
        (18.0, 69.0, 8.0, True),
        (17.5, 69.0, 8.0, False),  # may have left the window when the second answer was made
        (40.0, 69.0, 40.0, True),
        (39.5, 69.0, 40.0, False),  # at most half a window is left out
        (68.5, 68.5, 8.0, True),
        (69.0, 68.5, 8.0, False),  # on the wire when the second request started
    ],
)
def test_a_stated_limit_is_followed_unless_its_count_misses_requests_of_the_account(
    ended: float, start: float, late: float, *, counted: bool
) -> None:
    """Those that ended before its request started, and surely are in the server's window."""
    endpoint = Endpoint(scope="account", late=late)
    first = endpoint.start("a1", 0.0, "A")
    if ended < start:
        endpoint.scheduler.ended(first, OK, ended)
    second = endpoint.start("a2", start, "A")
    if ended >= start:
        endpoint.scheduler.ended(first, OK, ended)
    endpoint.scheduler.ended(second, served(0, limit=30), 70.0)
    assert endpoint.limit("A", 70.0) == (300 if counted else 30)


def test_a_count_of_a_smaller_number_than_has_ended_is_about_another_limit() -> None:
    """For the common bucket all accounts' requests count, that ended 1.5 s before the start."""
    endpoint = Endpoint(scope="client")
    for number in range(3):
        endpoint.ask(str(number), 0.0, OK, seconds=1.0)
    endpoint.ask("early", 0.5, served(2, limit=40))
    assert endpoint.limit(None, 1.0) == 40
    endpoint.ask("late", 1.0, served(2, limit=30))
    assert (endpoint.limit(None, 2.0), endpoint.limit("late", 2.0)) == (300, 30)


@pytest.mark.parametrize(
    ("adopts", "scope", "limits"),
    [
        ("lower", "client", [30, 300]),
        ("any", "client", [30, 1_200]),
        ("never", "client", [300, 300]),
        ("lower", "auto", [300, 300]),
        ("any", "auto", [300, 300]),
        ("lower", "account", [30, 300]),
    ],
)
def test_one_answer_decides_the_common_limit_where_the_scope_is_known(
    adopts: str, scope: str, limits: list[int]
) -> None:
    """A higher limit is followed only if configured."""
    found: list[int] = []
    for stated in (30, 1_200):
        endpoint = Endpoint(adopts=adopts, scope=scope)
        endpoint.ask("a", 0.0, served(1, limit=stated))
        found.append(endpoint.limit(None))
    assert found == limits


@pytest.mark.parametrize(
    ("adopts", "stated", "limit"), [("lower", 30, 30), ("lower", 900, 300), ("any", 900, 900)]
)
def test_three_accounts_decide_the_common_limit_where_the_scope_is_found(
    adopts: str, stated: int, limit: int
) -> None:
    """One account that states it three times is no three accounts."""
    endpoint, limits = Endpoint(adopts=adopts), list[int]()
    for number, name in enumerate("aaabc"):
        endpoint.ask(name, float(number), served(9, limit=stated))
        limits.append(endpoint.limit(None))
    assert limits == [300, 300, 300, 300, limit]


def test_accounts_that_state_the_configured_limit_count_against_a_lower_one() -> None:
    """Of the last three accounts all have to state a lower one."""
    endpoint, limits = Endpoint(), list[int]()
    for number, stated in enumerate((30, 300, 30, 30, 30)):
        endpoint.ask(str(number), number / 4, served(9, limit=stated), seconds=0.125)
        limits.append(endpoint.limit(None))
    assert limits == [300, 300, 300, 300, 30]


def test_an_account_with_a_lower_limit_gets_the_configured_one_back() -> None:
    """When its answer states it, although the common limit is already the configured one again."""
    endpoint, limits = Endpoint(scope="client"), list[tuple[int, int]]()
    for number, (name, stated) in enumerate((("a", 30), ("b", 300), ("a", 300))):
        endpoint.ask(name, number / 4, served(9, limit=stated), seconds=0.125)
        limits.append((endpoint.limit("a", 1.0), endpoint.limit(None, 1.0)))
    assert limits == [(30, 30), (30, 300), (300, 300)]


def test_a_limit_without_a_count_is_not_followed() -> None:
    """Neither is a count without a limit."""
    endpoint = Endpoint(scope="client")
    endpoint.ask("a", 0.0, AttemptResult(status=200, limit=30))
    endpoint.ask("b", 0.0, AttemptResult(status=200, remaining=30))
    endpoint.ask("c", 0.0, AttemptResult(status=200, limit=30, remaining=31))
    assert [endpoint.limit(name) for name in ("a", "b", "c", None)] == [300] * 4


def test_a_change_of_the_limit_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """With the way to keep the configured one."""
    caplog.set_level(logging.INFO, "crustcredits")
    endpoint = Endpoint(scope="client")
    for number, stated in enumerate((30, 30, 300, 300)):
        endpoint.ask(str(number), number / 4, served(9, limit=stated), seconds=0.125)
    assert [record.getMessage() for record in caplog.records] == [
        f"rate limit is now {new} requests a period instead of {old}, because the API states it; "
        "to keep the configured one, set RateLimit(adopt_server_limit='never')"
        for new, old in ((30, 300), (300, 30))
    ]


# --- trials


def test_a_refusal_starts_a_trial_and_served_probes_end_it() -> None:
    """Each doubles the width; requests of before the trial, and other failures, do not."""
    endpoint = Endpoint()
    before = endpoint.start("before", 0.0)
    endpoint.ask("refused", 0.0, refused(1.0))
    assert endpoint.width == 1
    endpoint.scheduler.ended(before, OK, 0.5)
    endpoint.ask("failed", 1.0, FAILED)
    assert endpoint.width == 1
    widths: list[int] = []
    for number in range(5):
        endpoint.ask(str(number), 2.0 + number, OK)
        widths.append(endpoint.width)
    assert widths == [2, 4, 8, 16, 0]


def test_an_answer_counted_separately_ends_a_trial() -> None:
    """Also that of a request sent before; an answer without counts does not."""
    endpoint = Endpoint()
    endpoint.ask("other", 0.0, OK)
    before, silent = endpoint.start("before", 2.0), endpoint.start("silent", 2.0)
    endpoint.ask("refused", 2.0, refused(1.0))
    endpoint.scheduler.ended(silent, OK, 3.0)
    assert endpoint.trial is not None
    endpoint.scheduler.ended(before, served(1), 3.0)
    assert endpoint.trial is None


def test_a_refusal_cools_its_account_down() -> None:
    """For the longest wait that a refusal has asked for; without a wait not at all."""
    endpoint = Endpoint()
    requests = [endpoint.start(str(number), 0.0, "A") for number in range(3)]
    for request, wait in zip(requests, (30.0, 10.0, None), strict=True):
        endpoint.scheduler.ended(request, refused(wait), 1.0)
    assert endpoint.scheduler.quota("A", 1.0).cooldown == 30.0
    endpoint = Endpoint()
    endpoint.ask("a", 0.0, refused())
    assert endpoint.scheduler.quota("a", 0.25).cooldown is None


def refusals_until_cooldown(endpoint: Endpoint, answer: AttemptResult, at: float) -> int:
    """How many refusals in a row become a cooldown of the endpoint, the first one included."""
    for number in range(40):
        endpoint.ask(f"refused{number}", at + number / 4, answer, seconds=0.125)
        assert endpoint.trial is not None
        if endpoint.trial.is_cooldown:
            return number + 1
    raise AssertionError("no cooldown")


@pytest.mark.parametrize("answer", [refused(), refused(used=300)], ids=["silent", "counts"])
@pytest.mark.parametrize(
    ("scope", "before", "expected"),
    [
        ("auto", "nothing", [8, 8]),
        ("account", "nothing", [8, 8]),
        ("client", "nothing", [2, 2]),
        ("auto", "alone", [8, 24]),
        ("auto", "together", [8, 2]),
        ("client", "together", [8, 2]),
    ],
)
def test_the_counts_in_the_answers_decide_how_many_refusals_become_a_cooldown(
    scope: str, before: str, expected: list[int], answer: AttemptResult
) -> None:
    """A refusal without counts beside answers with counts is no evidence about the counts."""
    endpoint = Endpoint(scope=scope)
    if before == "alone":
        endpoint.ask("first", 0.0, OK)
        endpoint.ask("alone", 2.0, served(1))
    if before == "together":
        for number in range(10):
            endpoint.ask(str(number), 0.0, served(number + 2))
    found = refusals_until_cooldown(endpoint, answer, 3.0)
    assert found == expected[answer.used is not None]
    assert endpoint.trial is not None
    assert endpoint.trial.with_counts is (answer.used is not None)


def test_an_answer_counted_separately_is_no_evidence_after_a_period() -> None:
    """Then eight refusals are enough."""
    endpoint = Endpoint()
    endpoint.ask("first", 0.0, OK)
    endpoint.ask("alone", 2.0, served(1))
    assert refusals_until_cooldown(endpoint, refused(used=300), 62.5) == 8


def test_a_cooldown_of_the_endpoint_halves_the_pace_each_time_it_is_extended() -> None:
    """Refusals before it leave the pace as it is."""
    endpoint = Endpoint(scope="client")
    endpoint.ask("a", 0.0, refused(0.5))
    assert endpoint.pace.current(0.25) is None
    endpoint.ask("b", 1.0, refused(0.5))
    assert endpoint.pace.current(1.25) == 50
    assert endpoint.pace.current(2.25) == pytest.approx(52)
    endpoint.ask("c", 3.0, refused(0.5))
    assert endpoint.pace.current(3.25) == pytest.approx(27)


def test_the_start_of_a_cooldown_is_logged_with_its_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its extensions are not."""
    caplog.set_level(logging.INFO, "crustcredits")
    endpoint = Endpoint(scope="client")
    endpoint.ask("a", 0.0, refused(0.5))
    assert not caplog.records
    endpoint.ask("b", 1.0, refused(0.75))
    endpoint.ask("c", 3.0, refused(9.0))
    (record,) = caplog.records
    assert record.getMessage() == (
        "endpoint cooldown of 0.8 s, because several requests in a row were refused; then one "
        "probe at a time starts until one is served; if it repeats, look for other clients of the "
        "same rate limit, or lower RateLimit(requests=)"
    )


@pytest.mark.parametrize(
    ("answer", "free"), [(refused(used=300), 288), (refused(), 289)], ids=["counts", "silent"]
)
def test_a_cooldown_against_an_answer_counted_separately_stops_proofs(
    answer: AttemptResult, free: int
) -> None:
    """If its refusals have counts: these may be of another limit."""
    endpoint = Endpoint()
    witness(endpoint, 0.0)
    endpoint.ask("proven", 2.0, served(1))
    assert endpoint.free(None, 2.5) == 290
    refusals_until_cooldown(endpoint, answer, 3.0)
    assert endpoint.trial is not None
    endpoint.ask("probe", endpoint.trial.until, served(1))
    assert endpoint.free(None, 20.0) == 290 - (answer.used is not None)


# --- refusals that cost no attempt


def spared_after(endpoint: Endpoint, each: Call, answer: AttemptResult, at: float) -> int:
    """Send a request of a call. Returns how many refusals have cost the call no attempt so far."""
    endpoint.scheduler.ended(start_call(endpoint.scheduler, each, at), answer, at + 0.125)
    return each.spared


def test_refused_probes_cost_no_attempt_while_another_account_is_refused() -> None:
    """Four times for each call; the first refusal, before the trial, costs one."""
    endpoint = Endpoint()
    assert endpoint.ask("first", 0.0, refused()).spared == 0
    each = call("each", endpoint.flow)
    spared = [spared_after(endpoint, each, refused(), 1.0 + number) for number in range(6)]
    assert spared == [1, 2, 3, 4, 4, 4]
    other = call("other", endpoint.flow)
    assert spared_after(endpoint, other, refused(), 9.0) == 1


def test_refused_probes_of_one_account_cost_an_attempt_each() -> None:
    """No other account is refused, so nothing speaks for a limit of all."""
    endpoint = Endpoint()
    for number in range(4):
        each = call(str(number), endpoint.flow, "A")
        assert spared_after(endpoint, each, refused(), float(number)) == 0


def test_a_refusal_by_something_in_front_of_the_api_costs_no_attempt() -> None:
    """It has no counts, beside answers with counts. Other failures cost one."""
    endpoint = Endpoint()
    endpoint.ask("a", 0.0, served(1))
    assert endpoint.ask("b", 1.0, refused(used=300)).spared == 0
    endpoint = Endpoint()
    endpoint.ask("a", 0.0, served(1))
    each = call("b", endpoint.flow)
    assert spared_after(endpoint, each, FAILED, 1.0) == 0
    spared = [spared_after(endpoint, each, refused(), 2.0 + number) for number in range(5)]
    assert spared == [1, 2, 3, 4, 4]


# --- refusals by something in front of the API

# Of a call's first probes S is served, F refused without counts, E fails, I has an incomplete
# answer, and L gets none.
# R is a refusal that starts a trial, and N a served request without a trial. Of probes of calls
# that sent a request before, G is refused and B fails.
_SEVEN = "R FSFSFSFSS R SFSFSSF"


@pytest.mark.parametrize(
    ("pattern", "cut"),
    [
        (_SEVEN, True),
        ("R FSFSFSFSS R SFSFSSS", False),  # six
        ("R FSFSFSFSS R SFSFSSS R F", False),
        ("R FSFSFSFSS R SFSFSF", False),  # seven of fifteen
        ("R FSFSFSFSS R SFSFSFS", False),  # the last one is served
        ("R FSFSFSFSS R SFSFSFSF", True),
        ("R SSSSS " + _SEVEN, True),
        ("R SSSSS R FSFSFSFSS R SFSFSS", False),
        (_SEVEN.replace(" R", " NNNNNNNN R"), True),
        (_SEVEN.replace("R ", "R LB"), True),
        (_SEVEN.replace("F", "G"), False),
        (_SEVEN.replace("SSF", "EEF"), True),
        (_SEVEN.replace("SSF", "IIF"), True),
        (_SEVEN.replace("SSF", "LLF"), False),
    ],
)
def test_frequent_refusals_in_front_of_the_api_halve_the_pace(pattern: str, *, cut: bool) -> None:
    """If more than six of the last sixteen first probes were refused so."""
    endpoint = Endpoint()
    endpoint.ask("counts", 0.0, served(9))
    at = play(endpoint, pattern, 1.0)
    assert endpoint.pace.current(at) == (50 if cut else None)


def play(endpoint: Endpoint, pattern: str, at: float) -> float:
    """Send one request for each letter. Returns the time of the last end."""
    answers = {
        **dict.fromkeys("FGR", refused()),
        **dict.fromkeys("EB", FAILED),
        "I": INCOMPLETE,
        "L": LOST,
    }
    for letter in pattern.replace(" ", ""):
        each = call(f"{at}", endpoint.flow)
        each.was_sent = letter in "BG"
        assert (endpoint.trial is None) is (letter in "RN"), (pattern, at)
        request = start_call(endpoint.scheduler, each, at)
        at += 0.125
        endpoint.scheduler.ended(request, answers.get(letter, served(9)), at)
    return at


def test_after_a_cut_sixteen_more_probes_decide_about_the_next() -> None:
    """The next refusal alone does not."""
    endpoint = Endpoint()
    endpoint.ask("counts", 0.0, served(9))
    at = play(endpoint, _SEVEN, 1.0)
    assert endpoint.pace.current(at) == 50
    at = play(endpoint, "F", at)
    assert endpoint.pace.current(at) == 50.25
