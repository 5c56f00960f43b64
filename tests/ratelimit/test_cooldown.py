"""Trials after a refusal, and the endpoint cooldown after a run of refused probes."""

from __future__ import annotations

import attrs
import pytest

from crustcredits._ratelimit.cooldown import EndpointCooldown, Evidence, Trial

PERIOD = 60.0
UNKNOWN = Evidence(has_counts=False, is_foreign=False, is_sure=False, is_counted_apart=False)
WITH_COUNTS = attrs.evolve(UNKNOWN, has_counts=True)
FOREIGN = attrs.evolve(UNKNOWN, is_foreign=True)
TOGETHER = attrs.evolve(UNKNOWN, is_sure=True)
ALONE = attrs.evolve(UNKNOWN, is_counted_apart=True)
# Served probes in a row that end a trial.
DOUBLINGS = 5


def refusals_until_a_cooldown(
    cooldown: EndpointCooldown, evidence: Evidence, now: float, wait: float | None = None
) -> int:
    """The number of refusals in a row that start a cooldown; each but the first is of a probe."""
    return next(
        number
        for number in range(1, 100)
        if cooldown.refused("a", cooldown.trial, wait, evidence, now)
    )


def held(
    evidence: Evidence = UNKNOWN, now: float = 0.0, wait: float | None = None
) -> tuple[EndpointCooldown, Trial]:
    """An endpoint in a cooldown that has just started, and its trial."""
    cooldown = EndpointCooldown(PERIOD)
    refusals_until_a_cooldown(cooldown, evidence, now, wait)
    return cooldown, trial_of(cooldown)


def trial_of(cooldown: EndpointCooldown) -> Trial:
    assert cooldown.trial is not None
    return cooldown.trial


def spans(wait: float | None, evidence: Evidence, count: int) -> list[float]:
    """Seconds of a cooldown and of its extensions by refused probes, each sent when it is over."""
    cooldown, trial = held(evidence, 0.0, wait)
    found, now = [trial.until], trial.until
    while len(found) < count:
        assert cooldown.refused("a", trial, wait, evidence, now)
        found.append(trial.until - now)
        now = trial.until
    return found


# --- trials


def test_a_refusal_begins_a_trial_of_one_probe() -> None:
    """It is no cooldown: the first probe may start at once."""
    cooldown = EndpointCooldown(PERIOD)
    assert cooldown.trial is None
    assert not cooldown.refused("a", None, 5.0, UNKNOWN, 3.0)
    trial = trial_of(cooldown)
    assert (trial.account, trial.until, trial.width, trial.refused) == ("a", 3.0, 1, 0)
    assert not trial.is_cooldown


def test_a_second_refused_account_makes_a_trial_one_of_several() -> None:
    """It stays so when the first account is refused again."""
    cooldown = EndpointCooldown(PERIOD)
    several = []
    for account in "aaba":
        cooldown.refused(account, None, None, UNKNOWN, 0.0)
        several.append(trial_of(cooldown).is_of_several)
    assert several == [False, False, True, True]


@pytest.mark.parametrize(
    ("is_of_several", "account", "concerned"),
    [(False, "a", False), (False, "b", True), (True, "a", True), (True, "b", True)],
)
def test_a_trial_concerns_other_accounts_than_the_one_that_began_it(
    *, is_of_several: bool, account: str, concerned: bool
) -> None:
    """And all, if several are refused."""
    trial = Trial(0.0, "a", is_of_several=is_of_several)
    assert trial.concerns_others_than(account) is concerned


def test_each_served_probe_doubles_the_width_of_a_trial_until_it_ends() -> None:
    """Beyond 16 at a time."""
    cooldown = EndpointCooldown(PERIOD)
    cooldown.served(None, apart=False)
    cooldown.refused("a", None, None, UNKNOWN, 0.0)
    trial, widths = trial_of(cooldown), []
    for _ in range(DOUBLINGS):
        assert cooldown.trial is trial
        widths.append(trial.width)
        cooldown.served(trial, apart=False)
    assert (widths, cooldown.trial) == ([1, 2, 4, 8, 16], None)


@pytest.mark.parametrize("earlier", [None, Trial(0.0, "a")])
def test_requests_that_were_sent_before_a_trial_do_not_change_its_run(
    earlier: Trial | None,
) -> None:
    """Neither served nor refused ones, also if they were probes of an earlier trial."""
    cooldown = EndpointCooldown(PERIOD)
    cooldown.refused("a", None, None, UNKNOWN, 0.0)
    cooldown.served(earlier, apart=False)
    for _ in range(100):
        assert not cooldown.refused("a", earlier, None, UNKNOWN, 0.0)
    assert (trial_of(cooldown).width, trial_of(cooldown).refused) == (1, 0)


def test_a_served_probe_ends_a_run_of_refused_ones() -> None:
    """A run of eight refusals has to begin again."""
    cooldown = EndpointCooldown(PERIOD)
    cooldown.refused("a", None, None, UNKNOWN, 0.0)
    trial = trial_of(cooldown)
    for _ in range(6):
        assert not cooldown.refused("a", trial, None, UNKNOWN, 0.0)
    cooldown.served(trial, apart=False)
    for _ in range(6):
        assert not cooldown.refused("a", trial, None, UNKNOWN, 0.0)
    assert cooldown.refused("a", trial, None, UNKNOWN, 0.0)


@pytest.mark.parametrize(
    ("evidence", "ends"), [(None, True), (UNKNOWN, False), (WITH_COUNTS, True)]
)
def test_an_answer_of_an_account_counted_separately_ends_a_trial(
    evidence: Evidence | None, *, ends: bool
) -> None:
    """No cooldown that a refusal without counts has started; it only doubles the width.

    The request may have been sent before the trial.
    """
    cooldown = EndpointCooldown(PERIOD)
    cooldown.refused("a", None, None, UNKNOWN, 0.0)
    if evidence is not None:
        refusals_until_a_cooldown(cooldown, evidence, 0.0)
    trial = trial_of(cooldown)
    cooldown.served(None, apart=True)
    assert (cooldown.trial is None) is ends
    assert trial.width == 2


# --- the run that starts a cooldown


@pytest.mark.parametrize(
    ("evidence", "refusals"),
    [
        (UNKNOWN, 8),
        (WITH_COUNTS, 8),
        (FOREIGN, 8),
        (TOGETHER, 2),
        (ALONE, 24),
        (attrs.evolve(ALONE, is_sure=True, is_foreign=True), 2),
        (attrs.evolve(ALONE, is_foreign=True), 8),
    ],
)
def test_the_evidence_decides_how_many_refusals_in_a_row_start_a_cooldown(
    evidence: Evidence, refusals: int
) -> None:
    """Few if all accounts are counted together, many if an answer counted its account alone."""
    assert refusals_until_a_cooldown(EndpointCooldown(PERIOD), evidence, 0.0) == refusals


@pytest.mark.parametrize(
    ("evidence", "later", "refusals"),
    [
        (UNKNOWN, 119.9, 3),
        (UNKNOWN, 120.0, 8),
        (TOGETHER, 1.0, 2),
        (FOREIGN, 1.0, 8),
        (ALONE, 1.0, 24),
    ],
)
def test_three_refusals_start_a_cooldown_within_two_periods_of_the_last(
    evidence: Evidence, later: float, refusals: int
) -> None:
    """Unless the evidence is better."""
    cooldown, trial = held(now=50.0)
    for _ in range(DOUBLINGS):
        cooldown.served(trial, apart=False)
    assert cooldown.trial is None
    assert refusals_until_a_cooldown(cooldown, evidence, 50.0 + later) == refusals


def test_a_refusal_of_an_earlier_request_starts_a_cooldown_when_the_evidence_suffices() -> None:
    """Here after one refused probe, once all are known to be counted together."""
    cooldown = EndpointCooldown(PERIOD)
    for probe in (False, True):
        assert not cooldown.refused("a", cooldown.trial if probe else None, None, UNKNOWN, 0.0)
    assert cooldown.refused("b", None, 5.0, TOGETHER, 1.0)
    assert trial_of(cooldown).until == 6.0


def test_a_cooldown_reduces_a_trial_to_one_probe() -> None:
    """Its last refusal with or without counts decides what ends it."""
    cooldown = EndpointCooldown(PERIOD)
    cooldown.refused("a", None, None, UNKNOWN, 0.0)
    trial = trial_of(cooldown)
    cooldown.served(trial, apart=False)
    assert trial.width == 2
    refusals_until_a_cooldown(cooldown, WITH_COUNTS, 0.0)
    assert (trial.width, trial.is_cooldown, trial.with_counts, trial.holds) == (1, True, True, 1)
    assert cooldown.refused("a", trial, None, UNKNOWN, 1.0)
    assert (trial.is_cooldown, trial.with_counts, trial.holds) == (True, False, 2)


# --- the length of a cooldown


@pytest.mark.parametrize(("wait", "span"), [(None, 0.25), (0.0, 0.0), (20.0, 20.0), (90.0, 60.0)])
@pytest.mark.parametrize("evidence", [UNKNOWN, TOGETHER])
def test_a_first_cooldown_lasts_for_the_wait_that_its_refusal_states(
    wait: float | None, span: float, evidence: Evidence
) -> None:
    """A quarter of a second without a stated wait, and a period at the most."""
    assert held(evidence, 7.0, wait)[1].until == 7.0 + span


@pytest.mark.parametrize(
    ("wait", "evidence", "expected"),
    [
        (None, UNKNOWN, [0.25, 0.5, *[1] * 7, 2, 4, 8, 16, 32, 32]),
        (None, TOGETHER, [0.25, 0.5, 1, 2, 4, *[8] * 4, 16, 32, 32]),
        (20.0, UNKNOWN, [20, *[1] * 8, 2, 4, 8, 16, 32, 32]),
        (20.0, TOGETHER, [*[20] * 9, 32, 32]),
        (50.0, UNKNOWN, [50, *[1] * 8, 2, 4, 8, 16, 32, 50, 50]),
        (50.0, TOGETHER, [50] * 12),
        (0.5, UNKNOWN, [*[0.5] * 9, 1, 2, 4, 8, 16, 32, 32]),
        (0.0, TOGETHER, [*[0] * 9, 0.5, 1, 2, 4, 8, 16, 32, 32]),
    ],
)
def test_each_refused_probe_extends_a_cooldown(
    wait: float | None, evidence: Evidence, expected: list[float]
) -> None:
    """By the stated wait; without one by twice the last extension.

    By a second at the most, unless all accounts are known to be counted together. After nine
    refusals each extension is twice the last, up to 32 s or the stated wait.
    """
    assert spans(wait, evidence, len(expected)) == expected


@pytest.mark.parametrize("evidence", [UNKNOWN, TOGETHER])
def test_the_thousandth_refused_probe_extends_a_cooldown_like_the_twentieth(
    evidence: Evidence,
) -> None:
    """The number of doublings is bounded, so no number becomes too large."""
    assert spans(None, evidence, 1100)[-1] == spans(None, evidence, 20)[-1] == 32


def test_a_served_probe_in_a_cooldown_makes_its_next_extension_a_short_one() -> None:
    """One more refused probe extends it: no new run is needed."""
    cooldown, trial = held()
    for now in range(1, 12):
        cooldown.refused("a", trial, None, UNKNOWN, float(now))
    cooldown.served(trial, apart=False)
    assert (trial.is_cooldown, trial.width) == (True, 2)
    assert cooldown.refused("a", trial, None, UNKNOWN, 100.0)
    assert (trial.until, trial.width) == (100.25, 1)


@pytest.mark.parametrize("evidence", [UNKNOWN, TOGETHER])
def test_a_refused_probe_never_shortens_a_cooldown(evidence: Evidence) -> None:
    """A probe may hang while others go on."""
    cooldown, trial = held(evidence, 0.0, 30.0)
    assert cooldown.refused("a", trial, 0.5, evidence, 1.0)
    assert trial.until == 30.0


@pytest.mark.parametrize(("wait", "until"), [(None, 10.0), (2.0, 10.0), (7.0, 12.0), (90.0, 65.0)])
def test_a_refusal_of_a_request_before_a_cooldown_extends_it_by_its_own_wait(
    wait: float | None, until: float
) -> None:
    """It counts as no refused probe."""
    cooldown, trial = held(wait=10.0)
    assert not cooldown.refused("b", None, wait, UNKNOWN, 5.0)
    assert (trial.until, trial.holds) == (until, 1)


def test_a_refusal_without_a_wait_extends_no_cooldown_that_is_over() -> None:
    """If it is of a request before the cooldown."""
    cooldown, trial = held(wait=10.0)
    assert not cooldown.refused("b", None, None, UNKNOWN, 20.0)
    assert trial.until <= 20.0
