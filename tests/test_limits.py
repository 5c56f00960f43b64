"""The token bucket and its buckets, one behaviour at a time, in virtual time."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from aiolimiter import AsyncLimiter

from crustcredits import ApiKey, ConfigurationError, Quota, RateLimit
from crustcredits._buckets import _CLAIMS, Buckets, account_of
from crustcredits._limits import TokenBucket
from crustcredits._line import Line
from crustcredits._pause import Pause
from crustcredits._quota import grant_time
from crustcredits._tokens import LocalStore
from crustcredits._turn import Turn
from tests.virtual import VirtualLoop, keys, now

pytestmark = pytest.mark.virtual

PATH = "/user/credits"


async def take(bucket: TokenBucket, log: list[Any], name: Any, *, turn: Turn | None = None, again: bool = False) -> None:
    await bucket.acquire(turn, again=again)
    log.append((name, now()))


def waits(bucket: TokenBucket, *, again: bool = False) -> tuple[Turn, asyncio.Task[int]]:
    turn = Turn()
    return turn, asyncio.create_task(bucket.acquire(turn, again=again))


def bucket_of(buckets: Buckets, path: str, key: ApiKey) -> TokenBucket:
    """The last one that counts a request."""
    return buckets.claim(path, key)._buckets[-1]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_token_comes_back_one_period_after_its_end() -> None:
    """Not after its start: the attempt may have arrived as late as it ended."""
    bucket = TokenBucket(1, 60.0)
    await bucket.acquire()
    await asyncio.sleep(7)
    bucket.ended()
    await bucket.acquire()
    assert now() == pytest.approx(67)


async def test_the_token_of_an_abandoned_attempt_stays_out_longer() -> None:
    """It may still arrive."""
    bucket = TokenBucket(1, 60.0, late=10.0)
    await bucket.acquire()
    bucket.abandoned()
    await bucket.acquire()
    assert now() == pytest.approx(70)


async def test_an_unused_token_is_free_at_once() -> None:
    """What certainly never left counts nowhere; the first who waits has it in the same moment."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    waiter = asyncio.create_task(take(bucket, log, "next"))
    await settle()
    bucket.unused()
    await waiter
    assert log == [("next", 0.0)]


async def test_a_joiner_does_not_overtake_those_who_wait_when_a_token_comes_home_in_that_moment() -> None:
    """The token that came home belongs to the first in the queue, even if its timer has not run yet."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    bucket.ended()
    first = asyncio.create_task(take(bucket, log, "first"))
    await settle()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop._virtual.now = 60.0
    second = asyncio.create_task(take(bucket, log, "second"))
    await first
    bucket.ended()
    await second
    assert [name for name, _ in log] == ["first", "second"]


async def test_a_waiter_cancelled_in_the_moment_of_its_grant_hands_the_token_on() -> None:
    """Nothing is lost between the grant and the waiter's awakening."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    first = asyncio.create_task(take(bucket, log, "first"))
    second = asyncio.create_task(take(bucket, log, "second"))
    await settle()
    bucket.unused()  # grants it to the first,
    first.cancel()  # who leaves before it can run
    await second
    assert first.cancelled() or first.cancelling()
    assert log == [("second", 0.0)]


async def test_a_waiter_cancelled_just_before_its_grant_is_passed_over() -> None:
    """Its future is done but it has not left the queue yet."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    first = asyncio.create_task(take(bucket, log, "first"))
    second = asyncio.create_task(take(bucket, log, "second"))
    await settle()
    first.cancel()
    bucket.unused()
    await second
    assert log == [("second", 0.0)]


async def test_the_last_waiter_to_leave_takes_the_timer_along() -> None:
    """A bucket that nobody waits for keeps no timer in the loop."""
    bucket = TokenBucket(1, 60.0)
    await bucket.acquire()
    bucket.ended()
    waiters = [asyncio.create_task(bucket.acquire()) for _ in range(3)]
    await settle()
    assert bucket._timer is not None
    for waiter in waiters:
        waiter.cancel()
    await asyncio.gather(*waiters, return_exceptions=True)
    assert bucket._timer is None


async def test_it_says_when_a_turn_is_to_come_as_things_stand() -> None:
    """Two tokens, both out until 60; the third in the queue needs one for the second time."""
    bucket = TokenBucket(2, 60.0)
    for _ in range(2):
        await bucket.acquire()
        bucket.ended()
    waiting = [waits(bucket) for _ in range(3)]
    await settle()
    assert [turn.earliest(now()) for turn, _ in waiting] == pytest.approx([60, 60, 120])
    for _, task in waiting:
        await task
        bucket.ended()
    assert now() == pytest.approx(120)
    assert waiting[2][0].earliest(now()) == now()


async def test_what_is_to_come_takes_what_is_under_way_to_end_now() -> None:
    """And counts those who are still ahead."""
    bucket = TokenBucket(2, 60.0)
    await bucket.acquire()
    await bucket.acquire()
    (patient, first), (hasty, second) = waits(bucket), waits(bucket)
    await asyncio.sleep(5)
    assert (patient.earliest(now()), hasty.earliest(now())) == pytest.approx((65, 65))
    bucket.ended()
    await asyncio.sleep(5)
    assert (patient.earliest(now()), hasty.earliest(now())) == pytest.approx((65, 70))
    first.cancel()
    await settle()
    assert hasty.earliest(now()) == pytest.approx(65)
    second.cancel()


async def test_those_who_have_left_are_not_ahead() -> None:
    """However many have come and gone behind somebody patient."""
    bucket = TokenBucket(1, 60.0)
    await bucket.acquire()
    bucket.ended()
    _, patient = waits(bucket)
    for _ in range(100):
        _, hasty = waits(bucket)
        await settle()
        hasty.cancel()
    turn, last = waits(bucket)
    await settle()
    assert turn.earliest(now()) == pytest.approx(120)
    patient.cancel()
    last.cancel()


async def test_whoever_begins_to_wait_is_told() -> None:
    """Once it has its place, and only if it has to wait."""
    told: list[float] = []

    class Told(Turn):
        def on_wait(self) -> None:
            told.append(self.earliest(now()))

    bucket = TokenBucket(1, 60.0)
    await bucket.acquire(Told())
    bucket.ended()
    await bucket.acquire(Told())
    assert told == [pytest.approx(60)]


async def test_everybody_can_leave_at_once() -> None:
    """20,000 waiters leave in one go, and nobody is left in the queue."""
    bucket = TokenBucket(1, 1.0)
    await bucket.acquire()
    crowd = [asyncio.create_task(bucket.acquire()) for _ in range(20_000)]
    await settle()
    for waiter in crowd:
        waiter.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    assert bucket.quota().waiting == 0


# --- refreshes: turns that nobody wants


def refreshes(bucket: TokenBucket, log: list[Any], name: str) -> tuple[Turn, asyncio.Task[None]]:
    turn = Turn()
    turn.wanted = False
    return turn, asyncio.create_task(take(bucket, log, name, turn=turn))


async def test_refreshes_are_spread_evenly() -> None:
    """Nine tenths of the tokens over the period, one after the other."""
    bucket = TokenBucket(10, 90.0)
    log: list[Any] = []
    await asyncio.gather(*(refreshes(bucket, log, name)[1] for name in ("one", "two", "three")))
    assert log == [("one", 0.0), ("two", pytest.approx(10)), ("three", pytest.approx(20))]


@pytest.mark.parametrize(("tokens", "reserve"), [(1, 0), (2, 1), (5, 1), (20, 2), (21, 3), (300, 30)])
async def test_a_refresh_leaves_a_tenth_of_the_tokens_alone(tokens: int, reserve: int) -> None:
    """And takes the next when one more has come home. Of a single one it leaves nothing, or it could never go."""
    bucket = TokenBucket(tokens, 60.0)
    for _ in range(tokens - reserve):
        await bucket.acquire()
    log: list[Any] = []
    _, task = refreshes(bucket, log, "refresh")
    await asyncio.sleep(5)
    assert not log
    bucket.ended()
    await task
    assert log == [("refresh", pytest.approx(65))]


async def test_refreshes_do_not_use_up_what_a_burst_has_left() -> None:
    """They go slower until the burst comes home, instead of stopping for it."""
    bucket = TokenBucket(300, 60.0)
    for _ in range(100):
        await bucket.acquire()
        bucket.ended()
    times: list[float] = []
    for _ in range(500):
        turn = Turn()
        turn.wanted = False
        await bucket.acquire(turn)
        times.append(now())
        bucket.ended()
    gaps = [after - before for before, after in pairwise(times)]
    assert max(gaps[:165]) < 60 / 165
    assert max(gaps) < 60 / 165
    assert gaps[-100:] == pytest.approx([60 / 270] * 100, rel=0.05)


async def test_a_refresh_goes_behind_all_who_are_waited_for() -> None:
    """Also those who come later."""
    bucket = TokenBucket(1, 60.0)
    await bucket.acquire()
    bucket.ended()
    log: list[Any] = []
    _, refresh = refreshes(bucket, log, "refresh")
    await settle()
    tasks = [asyncio.create_task(take(bucket, log, name)) for name in ("one", "two")]
    for expected in ("one", "two", "refresh"):
        await asyncio.sleep(61)
        assert log[-1][0] == expected
        bucket.ended()
    await asyncio.gather(refresh, *tasks)


async def test_a_refresh_that_somebody_wants_moves_up() -> None:
    """To the end of those who are waited for: it needs no spare token, and overtakes no one."""
    bucket = TokenBucket(20, 60.0)
    for _ in range(20):
        await bucket.acquire()
    log: list[Any] = []
    turn, refresh = refreshes(bucket, log, "refresh")
    _, other = refreshes(bucket, log, "other")
    first = asyncio.create_task(take(bucket, log, "first"))
    await settle()
    turn.want()
    last = asyncio.create_task(take(bucket, log, "last"))
    await settle()
    assert turn.earliest(now()) == pytest.approx(60)
    bucket.move_up(turn)  # it has moved already
    for _ in range(3):
        bucket.unused()
    await asyncio.gather(first, refresh, last)
    assert [name for name, _ in log] == ["first", "refresh", "last"]
    other.cancel()
    await settle()
    assert bucket._timer is None


async def test_a_refresh_that_is_wanted_takes_of_the_tenth_at_once() -> None:
    """Nobody who is waited for waits while a token is free."""
    bucket = TokenBucket(10, 60.0)
    for _ in range(9):
        await bucket.acquire()
    log: list[Any] = []
    turn, refresh = refreshes(bucket, log, "refresh")
    await settle()
    turn.want()
    await refresh
    assert log == [("refresh", 0.0)]


async def test_a_refresh_cancelled_in_the_moment_of_its_grant_gives_the_token_back() -> None:
    """Or just before it."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    refresh, late = refreshes(bucket, log, "refresh")[1], refreshes(bucket, log, "late")[1]
    await settle()
    bucket.unused()
    refresh.cancel()
    await settle()
    assert bucket.quota().free == 1
    await asyncio.sleep(59)
    late.cancel()
    await asyncio.sleep(2)
    assert not log
    assert bucket.idle(now())


async def test_a_refresh_cancelled_just_before_its_grant_is_passed_over() -> None:
    """The next one has it."""
    bucket = TokenBucket(1, 60.0)
    log: list[Any] = []
    await bucket.acquire()
    first, second = refreshes(bucket, log, "first")[1], refreshes(bucket, log, "second")[1]
    await settle()
    first.cancel()
    bucket.unused()
    await second
    assert log == [("second", 0.0)]


async def test_a_refresh_may_be_the_probe_that_ends_a_pause() -> None:
    """Where nobody else is there to go first."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0, 30.0)
    log: list[Any] = []
    first, second = refreshes(bucket, log, "probe")[1], refreshes(bucket, log, "next")[1]
    await asyncio.sleep(40)
    assert log == [("probe", pytest.approx(30))]
    await first
    bucket.succeeded()
    bucket.ended(bucket._probe)
    await second


# --- pauses


async def refused(bucket: TokenBucket, *waits: float | None) -> None:
    for number, wait in enumerate(waits):
        await bucket.acquire()
        bucket.refused(f"account {number}", wait)
        bucket.ended()


async def test_one_or_two_refused_accounts_hold_back_nobody() -> None:
    """Their accounts may be hammered from elsewhere."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0)
    bucket.refused("account 0", 30.0)
    await bucket.acquire()
    assert now() == 0


async def test_three_refused_accounts_pause_the_bucket_until_the_moment_they_were_told() -> None:
    """Then one goes first, and its success ends the pause for all."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.4, 29.6)
    log: list[Any] = []
    waiters = [asyncio.create_task(take(bucket, log, name)) for name in ("probe", "second", "third")]
    await asyncio.sleep(35)
    assert log == [("probe", pytest.approx(29.6))]
    bucket.succeeded()
    bucket.ended(bucket._probe)
    await asyncio.gather(*waiters)
    assert [name for name, _ in log] == ["probe", "second", "third"]
    assert log[1][1] == pytest.approx(35)


async def test_a_refused_probe_pauses_it_again() -> None:
    """Until the moment that the probe was told."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 5.0, 5.0, 5.0)
    probe = await bucket.acquire()
    assert now() == pytest.approx(5)
    assert not bucket.refused("account 9", 7.0)
    bucket.ended(probe)
    await bucket.acquire()
    assert now() == pytest.approx(12)


async def test_a_probe_that_says_nothing_is_followed_by_the_next() -> None:
    """A timeout proves neither; nobody waits for ever, and they still go one at a time."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 5.0, 5.0, 5.0)
    probe = await bucket.acquire()
    log: list[Any] = []
    second = asyncio.create_task(take(bucket, log, "second"))
    third = asyncio.create_task(take(bucket, log, "third"))
    await asyncio.sleep(3)
    assert not log
    bucket.abandoned(probe)
    await settle()
    assert [name for name, _ in log] == ["second"]
    bucket.unused(bucket._probe)
    await asyncio.gather(second, third)


async def test_a_request_that_hangs_does_not_hold_up_the_probe() -> None:
    """What was on the wire before the pause is not waited for."""
    bucket = TokenBucket(10, 60.0)
    await bucket.acquire()
    await refused(bucket, 5.0, 5.0, 5.0)
    await bucket.acquire()
    assert now() == pytest.approx(5)


async def test_a_pause_is_never_shortened() -> None:
    """Not by a request that was on the wire before and was told less."""
    bucket = TokenBucket(10, 60.0)
    await bucket.acquire()
    await refused(bucket, 5.0, 5.0, 5.0)
    bucket.refused("another", 1.0)
    bucket.ended()
    await bucket.acquire()
    assert now() == pytest.approx(5)


async def test_those_whom_a_pause_sends_back_go_before_those_who_had_no_token_yet() -> None:
    """In the order in which they had had theirs."""
    bucket = TokenBucket(5, 60.0)
    for _ in range(2):
        assert await bucket.acquire() == 0
    await refused(bucket, 5.0, 5.0, 5.0)
    log: list[Any] = []
    tasks = [asyncio.create_task(take(bucket, log, "newcomer"))]
    await settle()
    for name in ("first", "second"):
        assert not bucket.may_start(now=now(), token=0)
        bucket.unused()
        tasks.append(asyncio.create_task(take(bucket, log, name, again=True)))
        await settle()
    assert bucket.quota().waiting == 3
    await asyncio.sleep(6)
    assert [name for name, _ in log] == ["first"]
    assert bucket.may_start(bucket._probe, now())
    bucket.succeeded()
    bucket.ended(bucket._probe)
    await asyncio.gather(*tasks)
    assert [name for name, _ in log] == ["first", "second", "newcomer"]


async def test_those_whom_a_pause_sent_back_know_their_turn_too() -> None:
    """And others count them as ahead."""
    bucket = TokenBucket(1, 60.0)
    await refused(bucket, 5.0)
    bucket.refused("one", 5.0)
    assert bucket.refused("two", 5.0)
    (_, first), (second, again), (newcomer, last) = waits(bucket, again=True), waits(bucket, again=True), waits(bucket)
    await settle()
    assert (second.earliest(now()), newcomer.earliest(now())) == pytest.approx((120, 180))
    first.cancel()
    await settle()
    assert (second.earliest(now()), newcomer.earliest(now())) == pytest.approx((60, 120))
    again.cancel()
    assert await last
    assert now() == pytest.approx(60)


async def test_a_refused_probe_without_a_wait_lets_the_next_go() -> None:
    """Nothing says how long; the refused key itself backs off."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 5.0, 5.0, 5.0)
    probe = await bucket.acquire()
    bucket.refused("account 9", None)
    bucket.ended(probe)
    await bucket.acquire()
    assert now() == pytest.approx(5)


@pytest.mark.parametrize("waits", [(30.0, 12.0, 51.0, 30.0), (None, None, None, None), (30.0, None, 30.0, 12.0)])
async def test_refusals_that_name_different_moments_are_each_accounts_own(waits: tuple[float | None, ...]) -> None:
    """One shared window has one oldest request; accounts hammered from elsewhere have one each."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, *waits)
    await bucket.acquire()
    assert now() == 0


async def test_one_account_of_its_own_trouble_does_not_hide_the_pattern() -> None:
    """The last three count; and no more is remembered of a million."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 57.0, 20.0, 20.0, 20.0)
    assert not bucket.may_start(now=now(), token=0)
    for number in range(1000):
        bucket.refused(number, None)
    assert len(bucket._pause._refused) == 3


async def test_a_success_between_refusals_starts_the_count_again() -> None:
    """A bucket in which some get through is not refused as a whole."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0)
    bucket.succeeded()
    await refused(bucket, 30.0, 30.0)
    await bucket.acquire()
    assert now() == 0


async def test_a_pause_counts_in_what_can_be_expected() -> None:
    """No call can start before it ends."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0, 30.0)
    turn, task = waits(bucket)
    await settle()
    assert turn.earliest(now()) == pytest.approx(30)
    task.cancel()


# --- quota


async def test_a_quota_is_a_value_of_that_moment() -> None:
    """It says what is free, under way and waiting, and how long more checks would take."""
    bucket = TokenBucket(2, 60.0)
    await bucket.acquire()
    await bucket.acquire()
    bucket.ended()
    waiter = asyncio.create_task(bucket.acquire())
    await asyncio.sleep(10)
    quota = bucket.quota()
    assert (quota.limit, quota.free, quota.in_flight, quota.waiting) == (2, 0, 1, 1)
    assert quota.seconds_for(0) == pytest.approx(50)
    assert quota.seconds_for(1) == pytest.approx(60)
    assert quota.seconds_for(2) == pytest.approx(50 + 60)
    assert (
        repr(quota)
        == "Quota(limit=2, free=0, in_flight=1, waiting=1, refreshing=0, debt=0, paused=None, probing=False, alone=False)"
    )
    with pytest.raises(ConfigurationError, match="at least 0, not -1"):
        quota.seconds_for(-1)
    await waiter


async def test_a_quota_knows_the_pace() -> None:
    """With tokens enough the pace decides: 100 a second, five at once."""
    quota = TokenBucket(300, 60.0).quota(100.0, 5.0)
    assert quota.seconds_for(5) == 0
    assert quota.seconds_for(205) == pytest.approx(2.0)
    assert quota.seconds_for(301) == pytest.approx(60.0)
    assert quota.seconds_for(700) == pytest.approx(120.0 + 0.95, abs=0.06)
    assert TokenBucket(300, 60.0).quota(100.0, 5.0, 245).seconds_for(0) == pytest.approx(2.45)
    assert TokenBucket(300, 60.0).quota(100.0, 5.0, 245).seconds_for(20) == pytest.approx(2.6, abs=0.06)
    assert TokenBucket(300, 1.0).quota(100.0, 5.0).seconds_for(1005) == pytest.approx(10.0)


async def test_a_quota_says_when_the_last_of_those_who_wait_can_start() -> None:
    """That is what no more checks take."""
    bucket = TokenBucket(1, 60.0)
    assert bucket.quota().seconds_for(0) == 0
    await bucket.acquire()
    bucket.ended()
    waiters = [asyncio.create_task(bucket.acquire()) for _ in range(2)]
    await settle()
    assert bucket.quota().seconds_for(0) == pytest.approx(120)
    for waiter in waiters:
        waiter.cancel()


# --- buckets


async def test_scopes_decide_who_shares_a_bucket() -> None:
    """All keys, those of one declared account, or each for itself; and each endpoint apart."""
    one, two = ApiKey("secret-one", account="acme"), ApiKey("secret-two", account="acme")
    other = ApiKey("secret-three")
    for scope, shared in {"client": (True, True), "account": (True, False), "key": (False, False)}.items():
        buckets = Buckets(RateLimit(scope=scope), LocalStore(), late=1.0)  # type: ignore[arg-type]  # the three scopes
        taken = bucket_of(buckets, PATH, one)
        await taken.acquire()
        assert (bucket_of(buckets, PATH, two) is taken, bucket_of(buckets, PATH, other) is taken) == shared
        assert bucket_of(buckets, "/account/credits", one) is not taken


async def test_the_period_is_stretched_by_the_margin() -> None:
    """Against clocks that run at different rates."""
    bucket = bucket_of(Buckets(RateLimit(requests=1, period=60.0, margin=0.005), LocalStore(), late=1.0), PATH, keys(1)[0])
    await bucket.acquire()
    bucket.ended()
    await bucket.acquire()
    assert now() == pytest.approx(60.3)


async def test_only_the_last_periods_buckets_are_remembered() -> None:
    """A client that has seen 20,000 keys, 100 in each period, holds at most half as many more buckets."""
    buckets = Buckets(RateLimit(period=60.0, scope="key"), LocalStore(), late=10.0)
    for key in keys(20_000):
        bucket = bucket_of(buckets, PATH, key)
        await bucket.acquire()
        bucket.ended()
        await asyncio.sleep(0.603)
    assert len(buckets) <= 150


async def test_after_a_rest_the_idle_are_forgotten_bit_by_bit() -> None:
    """So that no call takes long for it."""
    buckets = Buckets(RateLimit(period=60.0, scope="key"), LocalStore(), late=10.0)
    for key in keys(3000):
        bucket = bucket_of(buckets, PATH, key)
        await bucket.acquire()
        bucket.ended()
    await asyncio.sleep(86_400)
    counts = []
    for _ in range(3):
        for _ in range(_CLAIMS):
            bucket_of(buckets, PATH, keys(1)[0])
        counts.append(len(buckets))
    assert counts == [2000, 1000, 1]


async def test_a_bucket_in_use_is_never_forgotten() -> None:
    """However many others come after it, and however long its call takes."""
    buckets = Buckets(RateLimit(requests=1, period=1.0, scope="key"), LocalStore(), late=0.0)
    busy, *others = keys(50)
    await bucket_of(buckets, PATH, busy).acquire()
    for key in others:
        await bucket_of(buckets, PATH, key).acquire()
        bucket_of(buckets, PATH, key).ended()
        await asyncio.sleep(2)
    assert bucket_of(buckets, PATH, busy).quota(None, 0.0).in_flight == 1
    assert len(buckets) < 5


async def test_a_quota_needs_a_key_where_each_has_its_own() -> None:
    """And looking does not make a bucket."""
    key = keys(1)[0]
    buckets = Buckets(RateLimit(scope="key"), LocalStore(), late=1.0)
    with pytest.raises(ConfigurationError, match="name the key"):
        buckets.quota(PATH, None, pacing=0, refreshing=0)
    assert buckets.quota(PATH, key, pacing=0, refreshing=7).free == 300
    assert len(buckets) == 0
    assert Buckets(RateLimit(pace=None), LocalStore(), late=1.0).quota(PATH, None, pacing=0, refreshing=0).seconds_for(300) == 0


def test_accounts_are_told_apart_by_name_or_by_secret() -> None:
    """A name can never be mistaken for a secret's digest."""
    assert account_of(ApiKey("secret-one", account="acme")) == "acme"
    assert account_of(ApiKey("secret-one")) == ApiKey("secret-one", name="other").digest


# --- RateLimit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"requests": 0}, "requests is a whole number of at least 1, not 0"),
        ({"requests": 2.5}, "requests is a whole number"),
        ({"requests": True}, "requests is a whole number"),
        ({"period": 0}, "period is a finite number above 0, not 0"),
        ({"period": float("nan")}, "period is a finite number"),
        ({"period": "60"}, "period is a finite number above 0, not a str"),
        ({"margin": 2}, "margin is a finite number of at least 0 and at most 1, not 2"),
        ({"pace": 0}, "pace is a finite number above 0"),
        ({"scope": "team"}, "scope is one of 'auto', 'client', 'account', 'key'$"),
    ],
)
async def test_a_rate_limit_that_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    """At once, by name, with what would do."""
    with pytest.raises(ConfigurationError, match=said):
        RateLimit(**options)


async def test_the_pace_spreads_calls_smoothly() -> None:
    """100 a second in bursts of five, because aiolimiter's period is its burst too."""
    limiter = RateLimit(pace=100.0).limiter()
    assert isinstance(limiter, AsyncLimiter)
    times = []
    for _ in range(105):
        await limiter.acquire()
        times.append(now())
    assert times[4] == 0
    assert times[5] > 0
    assert times[-1] == pytest.approx(1.0, rel=0.02)
    slow = RateLimit(pace=2.0).limiter()
    assert slow is not None
    assert (slow.max_rate, slow.time_period) == (1.0, 0.5)
    assert RateLimit(pace=None).limiter() is None


async def test_giving_back_without_anyone_waiting_sets_no_timer() -> None:
    """The uncontended way costs nothing that it does not need."""
    bucket = TokenBucket(2, 60.0)
    await bucket.acquire()
    bucket.ended()
    assert bucket._timer is None


@pytest.mark.parametrize(("ahead", "expected"), [(0, 0.0), (1, 60.0), (2, 120.0), (3, 130.0), (4, 180.0), (5, 190.0)])
async def test_a_token_that_comes_home_late_misses_rounds_and_keeps_its_place(ahead: int, expected: float) -> None:
    """Two tokens, one home now and one in 130 s: the first is used twice more before the other comes."""
    assert grant_time([0.0, 130.0], ahead, 60.0) == pytest.approx(expected)


async def test_the_distance_of_refreshes_is_nothing_to_who_is_wanted() -> None:
    """The next one may be far away when a token comes home."""
    bucket = TokenBucket(3, 60.0)
    await bucket.acquire()
    bucket.start()
    bucket.ended()
    await asyncio.sleep(50)
    await bucket.acquire(refresh())
    await bucket.acquire()
    await bucket.acquire()
    assert now() == pytest.approx(60)


async def test_a_bucket_of_this_process_is_always_sure() -> None:
    """Whoever waits knows for how long; nobody has to be told later."""
    bucket = TokenBucket(1, 60.0)
    await bucket.acquire()
    waits = [asyncio.create_task(bucket.acquire()) for _ in range(3)]
    await asyncio.sleep(1)
    assert bucket._unsure == []
    for task in waits:
        task.cancel()


# --- who waits, and what refusals do


def refresh() -> Turn:
    turn = Turn()
    turn.wanted = False
    return turn


def test_a_line_has_an_order_and_a_count() -> None:
    """Those who had a token before, then those who are wanted, then the rest."""
    line, first, again, last = Line(), Turn(), Turn(), refresh()
    line.join(last, again=False)
    line.join(first, again=False)
    line.join(again, again=True)
    assert [line.ahead_of(turn) for turn in (again, first, last)] == [0, 1, 2]
    assert line.waiting == 2
    assert not line.move_up(first)
    assert line.move_up(last)
    assert line.waiting == 3
    assert [line.next() for _ in range(3)] == [again, first, last]
    assert not line


def test_whoever_leaves_a_line_is_not_in_it() -> None:
    """Whatever he waited as."""
    line, turns = Line(), [Turn(), Turn(), refresh()]
    for turn, again in zip(turns, (False, True, False), strict=True):
        line.join(turn, again=again)
    for turn in turns:
        line.leave(turn)
        line.leave(turn)
    assert not line
    assert line.waiting == 0


def test_the_last_three_refusals_make_a_pause() -> None:
    """Whether it has changed is told; an account that is refused again counts as the newest."""
    pause = Pause()
    told = [("a", 0.0, 5.0), ("b", 0.0, 1.0), ("c", 0.0, 9.5), ("a", 3.0, 6.5)]
    assert [pause.refused(*each) for each in told] == [False] * 4
    assert pause.refused("d", 3.0, 6.5)  # it is "b" that goes
    assert pause.until == 9.5
    assert pause.refused("a", 4.0, 7.0)
    assert pause.until == 11.0
    assert not pause.refused("a", 4.0, None)
    assert pause.succeeded()
    assert not pause.succeeded()


@pytest.mark.parametrize(("apart", "begins"), [(1.0, True), (1.001, False)])
def test_refusals_mean_one_moment_within_a_second(apart: float, begins: bool) -> None:
    """What is said in whole seconds can differ by as much."""
    pause = Pause()
    assert [pause.refused(account, 0.0, wait) for account, wait in zip("abc", (5.0, 5.5, 5.0 + apart), strict=True)][2] == begins


def test_a_quota_can_be_made_by_hand() -> None:
    """For users' tests. The tokens that are not free are as if taken just now."""
    quota = Quota(limit=300, free=20)
    assert [quota.seconds_for(requests) for requests in (20, 21, 300, 321)] == [0.0, 60.0, 60.0, 120.0]
    assert Quota(limit=10, free=0, waiting=10).seconds_for(1) == 120.0
    assert Quota(limit=300, free=20) == Quota(limit=300, free=20)
