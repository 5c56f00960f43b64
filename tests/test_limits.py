"""The token bucket and its buckets, one behaviour at a time, in virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiolimiter import AsyncLimiter

from crustcredits import ApiKey, ConfigurationError, RateLimit, RateLimitWaitError
from crustcredits._buckets import Buckets, account_of
from crustcredits._limits import TokenBucket
from tests.virtual import VirtualLoop, keys, now

pytestmark = pytest.mark.virtual

PATH = "/user/credits"


async def take(bucket: TokenBucket, log: list[Any], name: Any, deadline: float | None = None, *, again: bool = False) -> None:
    await bucket.acquire(deadline, again=again)
    log.append((name, now()))


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


async def test_a_wait_that_cannot_end_in_time_fails_at_once_and_says_how_long_it_would_be() -> None:
    """Two tokens, both out until 60; the third in the queue needs one for the second time."""
    bucket = TokenBucket(2, 60.0)
    for _ in range(2):
        await bucket.acquire()
        bucket.ended()
    log: list[Any] = []
    waiters = [asyncio.create_task(take(bucket, log, place)) for place in range(2)]
    await settle()
    with pytest.raises(RateLimitWaitError, match=r"limit of 2 requests would hold this call back for 120\.0 s") as caught:
        await bucket.acquire(deadline=119.0)
    assert caught.value.wait == pytest.approx(120)
    assert now() == 0
    await asyncio.gather(*waiters)
    assert [time for _, time in log] == pytest.approx([60, 60])


async def test_a_deadline_that_passes_in_the_queue_says_how_long_it_would_have_been() -> None:
    """As things stood the token could have come in time, and then it did not."""
    bucket = TokenBucket(1, 60.0, late=10.0)
    await bucket.acquire()
    late = asyncio.create_task(bucket.acquire(deadline=61.0))
    await asyncio.sleep(5)
    bucket.ended()
    with pytest.raises(RateLimitWaitError) as caught:
        await late
    assert now() == pytest.approx(61)
    assert caught.value.wait == pytest.approx(65)


async def test_a_deadline_behind_others_counts_those_who_are_still_ahead() -> None:
    """The place in the queue is known when time is over."""
    bucket = TokenBucket(2, 60.0)
    await bucket.acquire()
    await bucket.acquire()
    patient = asyncio.create_task(bucket.acquire())
    hasty = asyncio.create_task(bucket.acquire(deadline=61.0))
    await asyncio.sleep(10)
    bucket.ended()
    bucket.ended()
    with pytest.raises(RateLimitWaitError) as caught:
        await hasty
    assert caught.value.wait == pytest.approx(70)
    await patient


async def test_everybody_can_leave_at_once() -> None:
    """20,000 waiters with one deadline leave in one go, each with its error, and nobody is left in the queue."""
    bucket = TokenBucket(1, 1.0)
    await bucket.acquire()
    crowd = [asyncio.create_task(bucket.acquire(deadline=30_000.0)) for _ in range(20_000)]
    await settle()
    results = await asyncio.gather(*crowd, return_exceptions=True)
    assert all(isinstance(result, RateLimitWaitError) for result in results)
    assert bucket.quota().waiting == 0


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
        assert bucket.held(0)
        bucket.unused()
        tasks.append(asyncio.create_task(take(bucket, log, name, again=True)))
        await settle()
    assert bucket.quota().waiting == 3
    await asyncio.sleep(6)
    assert [name for name, _ in log] == ["first"]
    assert not bucket.held(bucket._probe)
    bucket.succeeded()
    bucket.ended(bucket._probe)
    await asyncio.gather(*tasks)
    assert [name for name, _ in log] == ["first", "second", "newcomer"]


async def test_those_whom_a_pause_sent_back_have_deadlines_too() -> None:
    """And a place in the queue."""
    bucket = TokenBucket(1, 60.0)
    await refused(bucket, 5.0)
    bucket.refused("one", 5.0)
    assert bucket.refused("two", 5.0)
    first = asyncio.create_task(bucket.acquire(again=True))
    await settle()
    with pytest.raises(RateLimitWaitError) as caught:
        await bucket.acquire(deadline=100.0, again=True)
    assert caught.value.wait == pytest.approx(120)
    hasty = asyncio.create_task(bucket.acquire(deadline=121.0))
    await asyncio.sleep(1)
    first.cancel()
    assert await hasty
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
    assert bucket.held(0)
    for number in range(1000):
        bucket.refused(number, None)
    assert len(bucket._refused) == 3


async def test_a_success_between_refusals_starts_the_count_again() -> None:
    """A bucket in which some get through is not refused as a whole."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0)
    bucket.succeeded()
    await refused(bucket, 30.0, 30.0)
    await bucket.acquire()
    assert now() == 0


async def test_a_pause_counts_in_what_a_deadline_can_expect() -> None:
    """A call that cannot start before the pause ends fails at once."""
    bucket = TokenBucket(10, 60.0)
    await refused(bucket, 30.0, 30.0, 30.0)
    with pytest.raises(RateLimitWaitError) as caught:
        await bucket.acquire(deadline=20.0)
    assert caught.value.wait == pytest.approx(30)


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
    assert repr(quota) == "Quota(limit=2, free=0, in_flight=1, waiting=1)"
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
        buckets = Buckets(RateLimit(scope=scope), late=1.0)  # type: ignore[arg-type]  # the three scopes
        taken = buckets.bucket(PATH, one)
        await taken.acquire()
        assert (buckets.bucket(PATH, two) is taken, buckets.bucket(PATH, other) is taken) == shared
        assert buckets.bucket("/account/credits", one) is not taken


async def test_the_period_is_stretched_by_the_margin() -> None:
    """Against clocks that run at different rates."""
    bucket = Buckets(RateLimit(requests=1, period=60.0, margin=0.005), late=1.0).bucket(PATH, keys(1)[0])
    await bucket.acquire()
    bucket.ended()
    await bucket.acquire()
    assert now() == pytest.approx(60.3)


async def test_only_the_last_periods_buckets_are_remembered() -> None:
    """A client that has seen 20,000 keys, 100 in each period, holds at most half as many more buckets."""
    buckets = Buckets(RateLimit(period=60.0, scope="key"), late=10.0)
    for key in keys(20_000):
        bucket = buckets.bucket(PATH, key)
        await bucket.acquire()
        bucket.ended()
        await asyncio.sleep(0.603)
    assert len(buckets) <= 150


async def test_after_a_rest_the_idle_are_forgotten_bit_by_bit() -> None:
    """So that no call takes long for it."""
    buckets = Buckets(RateLimit(period=60.0, scope="key"), late=10.0)
    for key in keys(3000):
        bucket = buckets.bucket(PATH, key)
        await bucket.acquire()
        bucket.ended()
    await asyncio.sleep(86_400)
    counts = []
    for _ in range(3):
        buckets.bucket(PATH, keys(1)[0])
        counts.append(len(buckets))
    assert counts == [2000, 1000, 1]


async def test_a_bucket_in_use_is_never_forgotten() -> None:
    """However many others come after it, and however long its call takes."""
    buckets = Buckets(RateLimit(requests=1, period=1.0, scope="key"), late=0.0)
    busy, *others = keys(50)
    await buckets.bucket(PATH, busy).acquire()
    for key in others:
        await buckets.bucket(PATH, key).acquire()
        buckets.bucket(PATH, key).ended()
        await asyncio.sleep(2)
    assert buckets.bucket(PATH, busy).quota(None, 0.0).in_flight == 1
    assert len(buckets) < 5


async def test_a_quota_needs_a_key_where_each_has_its_own() -> None:
    """And looking does not make a bucket."""
    key = keys(1)[0]
    buckets = Buckets(RateLimit(scope="key"), late=1.0)
    with pytest.raises(ConfigurationError, match="name the key"):
        buckets.quota(PATH, None, 0)
    assert buckets.quota(PATH, key, 0).free == 300
    assert len(buckets) == 0
    assert Buckets(RateLimit(pace=None), late=1.0).quota(PATH, None, 0).seconds_for(300) == 0


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
        ({"period": "60"}, "period is a finite number"),
        ({"margin": 2}, "margin is a finite number of at least 0 and at most 1, not 2"),
        ({"pace": 0}, "pace is a finite number above 0"),
        ({"scope": "team"}, "scope is one of 'client', 'account', 'key', not 'team'"),
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
