"""What others spend, as a bucket hears of it: one behaviour at a time, in virtual time."""

from __future__ import annotations

import asyncio
import math
from typing import Any, Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crustcredits import APIConnectionError, RateLimit, RateLimitStatus
from crustcredits._buckets import Buckets
from crustcredits._claim import Claim
from crustcredits._debt import Debt, Told
from crustcredits._limits import TokenBucket
from crustcredits._tokens import LocalStore, LocalTokens
from crustcredits._turn import Turn
from tests.told import answered, at, balance, refusal, sent, settle
from tests.virtual import WindowServer, fake_client, keys, now

PATH = "/user/credits"
PERIOD = 60.0
LATE = 10.0


@attrs.frozen
class Sent:
    """A request on the wire."""

    bucket: TokenBucket
    token: int
    mark: int
    started: float

    def tells(self, used: int, reset: float | None = None, account: str = "somebody") -> None:
        """Its answer has come, and says so."""
        self.bucket.heard(Told(account, self.started, now(), used, reset), self.mark)
        self.bucket.ended(self.token, now())


async def send(bucket: TokenBucket) -> Sent:
    token = await bucket.acquire()
    assert bucket.may_start(token, now())
    return Sent(bucket, token, bucket.start(), now())


async def send_and_log(bucket: TokenBucket, log: list[Any]) -> Sent:
    request = await send(bucket)
    log.append((now(), request.token))
    return request


async def indebted(*, reset: float | None = None, debt: int = 9) -> TokenBucket:
    """A bucket of ten tokens of which one is out, and `debt` are others' by the answer that has come just now."""
    bucket = TokenBucket(10, PERIOD, late=LATE)
    (await send(bucket)).tells(1 + debt, reset)
    return bucket


def debt_of(bucket: TokenBucket) -> int:
    return bucket.quota().debt


def waits(bucket: TokenBucket) -> tuple[Turn, asyncio.Task[int]]:
    turn = Turn()
    return turn, asyncio.create_task(bucket.acquire(turn))


pytestmark = pytest.mark.virtual


# --- how much it is


async def test_what_the_server_counts_beyond_our_own_is_held_back() -> None:
    """One of the ten is ours, three are others': six are left."""
    bucket = await indebted(debt=3)
    assert (debt_of(bucket), bucket.quota().free) == (3, 6)


@pytest.mark.parametrize(("used", "debt"), [(3, 0), (4, 1)])
async def test_our_own_on_the_wire_may_have_been_counted(used: int, debt: int) -> None:
    """Those that started before it, and those that started until its answer came."""
    bucket = TokenBucket(10, PERIOD)
    await send(bucket)
    request = await send(bucket)
    await send(bucket)
    request.tells(used)
    assert debt_of(bucket) == debt


@pytest.mark.parametrize(("started", "debt"), [(59.99, 0), (60.0, 1)])
async def test_our_own_of_a_period_before_have_aged(started: float, debt: int) -> None:
    """One that ended a whole period before this one started is not in its count."""
    bucket = TokenBucket(10, PERIOD)
    (await send(bucket)).tells(1)
    at(started)
    (await send(bucket)).tells(2)
    assert debt_of(bucket) == debt


async def test_our_own_that_age_while_it_is_on_the_wire_may_have_been_counted() -> None:
    """It may have arrived before that."""
    bucket = TokenBucket(10, PERIOD)
    (await send(bucket)).tells(1)
    at(59.0)
    request = await send(bucket)
    at(69.0)
    request.tells(2)
    assert debt_of(bucket) == 0


@pytest.mark.parametrize(("started", "debt"), [(69.99, 0), (70.0, 1)])
async def test_our_own_that_were_given_up_on_may_be_counted_longer(started: float, debt: int) -> None:
    """They may have arrived as late as a request can."""
    bucket = TokenBucket(10, PERIOD, late=LATE)
    lost = await send(bucket)
    bucket.abandoned(lost.token)
    at(started)
    (await send(bucket)).tells(2)
    assert debt_of(bucket) == debt


async def test_what_never_left_is_not_taken_for_our_own() -> None:
    """Neither an attempt that came to nothing before it, nor one that does so while it is on the wire."""
    bucket = TokenBucket(10, PERIOD)
    bucket.unsent((await send(bucket)).token)
    hopeless = await send(bucket)
    request = await send(bucket)
    bucket.unsent(hopeless.token)
    bucket.unused(await bucket.acquire())
    request.tells(2)
    assert debt_of(bucket) == 1


async def test_a_token_that_is_only_held_is_not_taken_for_our_own() -> None:
    """Its attempt has not begun, so the server cannot have counted it."""
    bucket = TokenBucket(10, PERIOD)
    await bucket.acquire()
    (await send(bucket)).tells(2)
    assert debt_of(bucket) == 1


@attrs.define
class Attempt:
    """One request of ours, as the formula sees it."""

    starts: int
    mark: int
    counts_until: float = math.inf  # its end, or the last moment at which it can have arrived


class Requests:
    """Tokens, and beside them the list of all requests that were ever made."""

    def __init__(self, tokens: LocalTokens) -> None:
        self.tokens = tokens
        self.all: list[Attempt] = []
        self.on_wire: list[Attempt] = []

    def start(self, moment: int) -> None:
        self.tokens.take()
        attempt = Attempt(moment, self.tokens.start(moment))
        self.all.append(attempt)
        self.on_wire.append(attempt)

    def end(self, attempt: Attempt, fate: str, moment: int) -> None:
        """With an answer, given up on, or without ever having left."""
        assert self.tokens.own(attempt.mark) == self.formula(attempt)
        self.on_wire.remove(attempt)
        if fate == "unsent":
            self.all.remove(attempt)
            self.tokens.unsend()
            return
        attempt.counts_until = moment + (LATE if fate == "abandoned" else 0.0)
        self.tokens.end(attempt.counts_until + PERIOD)

    def formula(self, attempt: Attempt) -> int:
        """Own attempts that started by now and have not ended, or ended after this one's start less a period."""
        return sum(other.counts_until > attempt.starts - PERIOD for other in self.all)


STEPS = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from(["start", "start", "start", "ended", "abandoned", "unsent"]), st.integers(0, 9)),
    max_size=80,
)


@given(steps=STEPS)
def test_our_own_are_counted_as_the_formula_says(steps: list[tuple[int, str, int]]) -> None:
    """Whatever starts, ends, is lost or never leaves meanwhile, and in whatever order."""
    requests = Requests(LocalTokens(len(steps)))
    moment = 0
    for wait, what, which in steps:
        moment += wait
        requests.tokens.collect(moment)
        if what == "start":
            requests.start(moment)
        elif requests.on_wire:
            requests.end(requests.on_wire[which % len(requests.on_wire)], what, moment)


async def test_what_was_spent_long_ago_is_not_taken_for_our_own_without_a_pace_either() -> None:
    """Where a token is taken and used in one go, nothing else looks for those that have come home."""
    server = WindowServer()
    async with fake_client(server, rate_limit=RateLimit(scope="client", pace=None)) as client:
        await client.check(keys(100))
        await asyncio.sleep(200)
        server.spend(100)
        await client.balance(keys(1)[0])
        assert client.quota().debt == 100


# --- which answer says it


async def test_a_newer_answer_lowers_it_at_once() -> None:
    """And those who wait go, as many as it frees."""
    bucket = await indebted()
    log: list[Any] = []
    newer = Sent(bucket, 0, bucket.start(), 0.0)
    bucket._tokens.take()
    waiters = [asyncio.create_task(send_and_log(bucket, log)) for _ in range(3)]
    at(5.0)
    newer.tells(8)
    await settle()
    assert (debt_of(bucket), log) == (6, [(pytest.approx(5), 0)] * 2)
    waiters[-1].cancel()


@pytest.mark.parametrize("newest_first", [True, False])
async def test_the_answer_to_the_newest_request_sets_it(newest_first: bool) -> None:
    """Whether it comes before or after that to an older one."""
    bucket = TokenBucket(10, PERIOD)
    older = await send(bucket)
    at(1.0)
    newer = await send(bucket)
    told = [(newer, 5), (older, 9)] if newest_first else [(older, 9), (newer, 5)]
    for request, used in told:
        at(now() + 1)
        request.tells(used)
    assert debt_of(bucket) == 3


async def test_of_two_that_started_together_the_later_answer_sets_it() -> None:
    """Neither is newer; the server counted the one after the other."""
    bucket = TokenBucket(10, PERIOD)
    first, second = await send(bucket), await send(bucket)
    first.tells(5)
    second.tells(6)
    assert debt_of(bucket) == 4


async def test_an_older_answer_does_not_keep_it_longer() -> None:
    """It ends one period after the one that set it."""
    bucket = TokenBucket(10, PERIOD)
    older = await send(bucket)
    at(1.0)
    (await send(bucket)).tells(10)
    at(31.0)
    older.tells(10)
    at(61.0)
    assert debt_of(bucket) == 0


# --- when it ends, and how that is found out


async def test_it_ends_one_period_after_the_answer_that_set_it() -> None:
    """All that the server had counted has aged out then."""
    bucket = await indebted()
    at(59.99)
    assert (debt_of(bucket), bucket.quota().free) == (9, 0)
    at(60.0)
    assert (debt_of(bucket), bucket.quota().free) == (0, 10)


async def test_those_who_wait_go_when_it_ends() -> None:
    """Without a word of the server's on when a slot is free, none of them is a probe."""
    bucket = await indebted()
    log: list[Any] = []
    await asyncio.gather(*(send_and_log(bucket, log) for _ in range(10)))
    assert log == [(pytest.approx(60), 0)] * 10


async def test_one_finds_out_when_the_server_says_that_a_slot_is_free() -> None:
    """The others wait for what it learns."""
    bucket = await indebted(reset=20.0)
    log: list[Any] = []
    waiters = [asyncio.create_task(send_and_log(bucket, log)) for _ in range(3)]
    await asyncio.sleep(19.9)
    assert not log
    await asyncio.sleep(30)
    assert log == [(pytest.approx(20), 1)]
    await asyncio.gather(*waiters)
    assert [when for when, _ in log[1:]] == pytest.approx([60, 60])


@pytest.mark.parametrize(("reset", "when"), [(0.0, 6.0), (-5.0, 6.0), (5.0, 6.0), (7.0, 7.0)])
async def test_a_moment_in_whole_seconds_is_never_sooner_than_slots_become_free(reset: float, when: float) -> None:
    """Ten in sixty seconds are one in six; 0 would mean one probe after the other."""
    bucket = await indebted(reset=reset)
    assert await bucket.acquire() == 1
    assert now() == pytest.approx(when)


async def test_a_moment_after_the_end_of_it_is_not_waited_for() -> None:
    """Then nobody needs to find out."""
    bucket = await indebted(reset=1000.0)
    assert await bucket.acquire() == 0
    assert now() == pytest.approx(60)


async def test_a_probe_that_finds_it_gone_opens_the_bucket_for_all() -> None:
    """In that moment, not at the probe's reset."""
    bucket = await indebted(reset=20.0)
    log: list[Any] = []
    probe = await send_and_log(bucket, log)
    waiters = [asyncio.create_task(send_and_log(bucket, log)) for _ in range(3)]
    await asyncio.sleep(2)
    probe.tells(2, 58.0)
    await asyncio.gather(*waiters)
    assert log == [(pytest.approx(20), 1), *[(pytest.approx(22), 0)] * 3]


async def test_a_probe_that_finds_it_there_is_followed_by_the_next() -> None:
    """At the moment that it was told, one at a time."""
    bucket = await indebted(reset=20.0)
    log: list[Any] = []
    waiters = [asyncio.create_task(send_and_log(bucket, log)) for _ in range(3)]
    for _ in range(2):
        await asyncio.sleep(20)
        probe = waiters.pop(0)
        (await probe).tells(10, 18.0)
    await waiters.pop()
    assert log == [(pytest.approx(20), 1), (pytest.approx(38), 1), (pytest.approx(58), 1)]


async def test_an_older_answer_meanwhile_asks_for_no_second_probe() -> None:
    """There is never more than one."""
    bucket = TokenBucket(10, PERIOD)
    older = await send(bucket)
    at(1.0)
    (await send(bucket)).tells(10, 10.0)
    assert await bucket.acquire() == 1
    log: list[Any] = []
    waiter = asyncio.create_task(send_and_log(bucket, log))
    older.tells(10, 6.0)
    await asyncio.sleep(40)
    assert not log
    waiter.cancel()


async def test_a_newer_answer_while_a_probe_is_out_asks_for_no_second_one() -> None:
    """Its moment is that of the next, once the first is back."""
    bucket = TokenBucket(10, PERIOD)
    (await send(bucket)).tells(9, 10.0)
    newer = await send(bucket)
    probe = await send(bucket)
    assert probe.token == 1
    assert now() == pytest.approx(10)
    newer.tells(10, 6.0)
    log: list[Any] = []
    waiter = asyncio.create_task(send_and_log(bucket, log))
    await asyncio.sleep(20)
    assert not log
    bucket.ended(probe.token)
    await waiter
    assert log == [(pytest.approx(30), 1)]


async def test_a_probe_that_is_told_nothing_changes_nothing() -> None:
    """The others wait until all of it must have aged out."""
    bucket = await indebted(reset=20.0)
    probe = await send(bucket)
    waiter = asyncio.create_task(bucket.acquire())
    at(21.0)
    bucket.ended(probe.token)
    assert await waiter == 0
    assert now() == pytest.approx(60)


async def test_a_probe_that_was_not_sent_after_all_is_followed_by_the_next() -> None:
    """Nothing was found out by it."""
    bucket = await indebted(reset=20.0)
    probe = await bucket.acquire()
    waiter = asyncio.create_task(bucket.acquire())
    await asyncio.sleep(1)
    bucket.unused(probe)
    assert await waiter == 1
    assert now() == pytest.approx(21)


async def test_a_probe_that_could_not_be_sent_is_followed_by_the_next() -> None:
    """The server knows nothing of it."""
    bucket = await indebted(reset=20.0)
    probe = await send(bucket)
    waiter = asyncio.create_task(bucket.acquire())
    await asyncio.sleep(1)
    bucket.unsent(probe.token)
    assert await waiter == 1
    assert now() == pytest.approx(21)


async def test_a_probe_that_was_not_sent_leaves_the_next_its_moment_where_a_newer_answer_has_told_it() -> None:
    """A slot is free then, and not before."""
    bucket = TokenBucket(10, PERIOD)
    (await send(bucket)).tells(9, 10.0)
    newer = await send(bucket)
    probe = await bucket.acquire()
    newer.tells(10, 6.0)
    waiter = asyncio.create_task(bucket.acquire())
    await asyncio.sleep(1)
    bucket.unused(probe)
    assert await waiter == 1
    assert now() == pytest.approx(16)


async def test_a_probe_cancelled_in_the_moment_of_its_grant_is_followed_by_the_next() -> None:
    """The next has its turn, and finds out."""
    bucket = await indebted(reset=20.0)
    first, second = waits(bucket)[1], waits(bucket)[1]
    await settle()
    at(20.0)
    bucket._wake()
    first.cancel()
    assert await second == 1
    assert now() == pytest.approx(20)


@pytest.mark.parametrize("again", [False, True])
async def test_a_probe_cancelled_just_before_its_grant_is_passed_over(again: bool) -> None:
    """Also when it is the only one of those who had been sent back."""
    bucket = await indebted(reset=20.0)
    first = asyncio.create_task(bucket.acquire(again=again))
    second = asyncio.create_task(bucket.acquire())
    await settle()
    at(20.0)
    asyncio.get_running_loop().call_soon(first.cancel)
    assert await second == 1
    assert now() == pytest.approx(20)


async def test_nobody_finds_out_where_our_own_hold_it_shut_too() -> None:
    """A probe goes beyond what others have spent, never beyond the limit."""
    bucket = TokenBucket(3, PERIOD)
    held = [await bucket.acquire() for _ in range(2)]
    (await send(bucket)).tells(3, 25.0)
    _, waiter = waits(bucket)
    await asyncio.sleep(40)
    assert not waiter.done()
    bucket.unused(held.pop())
    assert await waiter == 1
    assert now() == pytest.approx(40)


async def test_a_refresh_does_not_find_out() -> None:
    """What nobody waits for can wait until the debt is over."""
    bucket = await indebted(reset=20.0)
    turn = Turn()
    turn.wanted = False
    assert await bucket.acquire(turn) == 0
    assert now() == pytest.approx(60)


async def test_a_refresh_that_somebody_wants_may_find_out() -> None:
    """From then on it waits like any other."""
    bucket = await indebted(reset=20.0)
    turn = Turn()
    turn.wanted = False
    refresh = asyncio.create_task(bucket.acquire(turn))
    await asyncio.sleep(30)
    turn.want()
    assert await refresh == 1
    assert now() == pytest.approx(30)


async def test_nobody_finds_out_during_a_pause() -> None:
    """The pause's own probe finds out for both."""
    bucket = await indebted(reset=10.0, debt=5)
    for account in range(3):
        request = await send(bucket)
        bucket.refused(account, 30.0)
        request.tells(10, 10.0)
    probe, waiter = waits(bucket)[1], waits(bucket)[1]
    await asyncio.sleep(35)
    assert (await probe, waiter.done()) == (1, False)
    waiter.cancel()


@pytest.mark.parametrize(("reset", "when", "token"), [(None, 60.0, 0), (20.0, 20.0, 1)])
async def test_a_lower_limit_beside_debt_locks_nobody_out(reset: float | None, when: float, token: int) -> None:
    """Also when others have spent more of the old limit than the new one is."""
    bucket = await indebted(reset=reset)
    bucket.follow(3)
    turn, waiter = waits(bucket)
    await settle()
    assert (bucket.quota().limit, bucket.quota().free) == (3, 0)
    assert turn.earliest(now()) == pytest.approx(when)
    assert await waiter == token
    assert now() == pytest.approx(when)


async def test_a_bucket_with_debt_is_not_as_good_as_new() -> None:
    """Forgotten and made anew it would not know of it."""
    bucket = TokenBucket(10, PERIOD)
    request = await send(bucket)
    bucket.heard(Told("somebody", 0.0, now(), 2, None), request.mark)
    bucket.unsent(request.token)
    assert not bucket.idle(59.99)
    assert bucket.idle(60.0)


async def test_a_bucket_whose_debt_was_found_gone_is_as_good_as_new() -> None:
    """Nothing is left of it but the memory of an answer."""
    bucket = await indebted()
    bucket._newest = -1.0
    request = await send_beyond(bucket)
    request.tells(1)
    bucket.idle(now())
    assert debt_of(bucket) == 0
    assert bucket.idle(60.0)


# --- what has been granted already


async def test_tokens_that_others_have_spent_meanwhile_go_back_and_have_the_first_turns_afterwards() -> None:
    """Those who held them go before whoever came later, in the order in which they had them."""
    buckets = Buckets(RateLimit(requests=3, period=PERIOD, margin=0.0, scope="client"), LocalStore(), late=LATE)
    first, second, third = (buckets.claim(PATH, key) for key in keys(3))
    log: list[str] = []

    async def waits_again(name: str, claim: Claim, *, again: bool) -> None:
        await claim.acquire(Turn(), again=again)
        log.append(name)

    await sent(first)
    for claim in (second, third):
        assert claim.try_acquire()
    newcomer = asyncio.create_task(waits_again("newcomer", buckets.claim(PATH, keys(4)[3]), again=False))
    await settle()
    answered(first, balance(3, 0))
    tasks = [newcomer]
    for name, claim in (("second", second), ("third", third)):
        assert not claim.may_start()
        tasks.append(asyncio.create_task(waits_again(name, claim, again=True)))
        await settle()
    await asyncio.gather(*tasks)
    assert log == ["second", "third", "newcomer"]
    assert now() == pytest.approx(60)


async def test_of_those_that_were_granted_as_many_start_as_others_have_left() -> None:
    """Five tokens, one on the wire, two of others: two of the three that wait for their start may begin."""
    bucket = TokenBucket(5, PERIOD)
    request = await send(bucket)
    held = [await bucket.acquire() for _ in range(3)]
    request.tells(3)
    began = []
    for token in held:
        began.append(bucket.may_start(token, now()))
        bucket.start() if began[-1] else bucket.unused(token)
    assert began == [True, True, False]


async def test_a_probe_may_start_whatever_others_have_spent() -> None:
    """That is what it is for."""
    bucket = await indebted(reset=20.0)
    assert bucket.may_start(await bucket.acquire(), now())


# --- what is told of it


async def test_a_quota_shows_debt_and_probe() -> None:
    """And counts both in how long more checks take."""
    bucket = await indebted(reset=20.0)
    assert bucket.quota().seconds_for(1) == pytest.approx(20)
    quota = bucket.quota()
    assert (quota.limit, quota.free, quota.debt, quota.paused, quota.probing) == (10, 0, 9, None, False)
    await bucket.acquire()
    assert bucket.quota().probing


async def test_a_quota_counts_what_others_have_left() -> None:
    """Six are free now, three when the debt is over, and ours comes home; then it begins again."""
    quota = (await indebted(debt=3)).quota()
    assert [quota.seconds_for(count) for count in (6, 7, 10, 16, 17)] == pytest.approx([0, 60, 60, 60, 120])


async def test_a_quota_shows_a_pause_and_its_probe() -> None:
    """Seconds until it ends, and 0 while one finds out."""
    bucket = TokenBucket(10, PERIOD)
    for account in range(3):
        bucket.refused(account, 30.0)
    at(10.0)
    assert bucket.quota().paused == pytest.approx(20)
    assert not bucket.quota().probing
    await bucket.acquire()
    assert (bucket.quota().paused, bucket.quota().probing) == (0.0, True)


@pytest.mark.parametrize(("reset", "expected"), [(None, 60.0), (20.0, 20.0), (1000.0, 60.0)])
async def test_a_wait_behind_debt_is_foretold_as_things_stand(reset: float | None, expected: float) -> None:
    """Until somebody may find out, or it is over."""
    bucket = await indebted(reset=reset)
    turn, waiter = waits(bucket)
    await settle()
    assert turn.earliest(now()) == pytest.approx(expected)
    await waiter
    assert now() == pytest.approx(expected)


async def test_a_wait_that_has_ended_is_foretold_to_end_now() -> None:
    """Also before whoever waited can run."""
    bucket = await indebted(reset=20.0)
    turn, waiter = waits(bucket)
    await settle()
    at(20.0)
    bucket._wake()
    assert turn.earliest(now()) == now()
    assert await waiter


async def test_a_wait_behind_a_probe_may_end_when_that_is_back() -> None:
    """As things stand what is under way ends now; whoever has less time than the debt lasts is not turned away for it."""
    bucket = await indebted(reset=20.0)
    probe = await send(bucket)
    turn, waiter = waits(bucket)
    await settle()
    foretold = turn.earliest(now())
    at(20.5)
    probe.tells(2)
    await waiter
    assert foretold <= now()


# --- how many have to say so


async def voices(bucket: TokenBucket, *told: tuple[str, int]) -> None:
    """Each of these accounts is told so much beyond what can be our own."""
    for account, beyond in told:
        request = await send_beyond(bucket)
        request.tells(bucket.own(request.mark) + beyond, account=account)


async def send_beyond(bucket: TokenBucket) -> Sent:
    """A request on the wire, whether or not a token is free."""
    bucket._tokens.take()
    return Sent(bucket, 0, bucket.start(), now())


async def test_several_accounts_have_to_agree_and_the_least_counts() -> None:
    """One or two of them may be hammered from elsewhere."""
    bucket = TokenBucket(100, PERIOD, voices=3)
    await voices(bucket, ("one", 50), ("two", 40))
    assert debt_of(bucket) == 0
    await voices(bucket, ("three", 60))
    assert debt_of(bucket) == 40


async def test_an_account_has_one_voice() -> None:
    """However often it is told; the last time counts."""
    bucket = TokenBucket(100, PERIOD, voices=3)
    await voices(bucket, ("one", 50), ("two", 40), ("one", 50), ("two", 40))
    assert debt_of(bucket) == 0
    await voices(bucket, ("three", 60), ("two", 55))
    assert debt_of(bucket) == 50


async def test_one_account_that_is_told_nothing_of_the_kind_ends_it() -> None:
    """Were the quota shared by all, it would have been told so too."""
    bucket = TokenBucket(100, PERIOD, voices=3)
    await voices(bucket, ("one", 50), ("two", 40), ("three", 60), ("four", -3))
    assert debt_of(bucket) == 0
    assert bucket.quota().free == 96


async def test_the_last_accounts_count() -> None:
    """What was told longest ago is superseded."""
    bucket = TokenBucket(200, PERIOD, voices=3)
    await voices(bucket, ("one", 10), ("two", 40), ("three", 60), ("four", 50))
    assert debt_of(bucket) == 40


@pytest.mark.parametrize(("third", "debt"), [(59.99, 40), (60.0, 0)])
async def test_what_an_account_was_told_a_period_ago_counts_no_more(third: float, debt: int) -> None:
    """All that it was told of has aged out, whatever others were told meanwhile."""
    bucket = TokenBucket(100, PERIOD, voices=3)
    await voices(bucket, ("one", 50))
    at(30.0)
    await voices(bucket, ("two", 40))
    at(third)
    await voices(bucket, ("three", 60))
    assert debt_of(bucket) == debt


# --- when the server does not count all of them together


async def test_debt_of_a_bucket_that_is_none_ends_at_once() -> None:
    """It is proven that the server counts those apart whose requests are counted here together."""
    bucket = await indebted()
    waiters = [waits(bucket)[1] for _ in range(9)]
    await settle()
    bucket.disproved(now())
    await asyncio.gather(*waiters)
    assert (debt_of(bucket), now()) == (0, 0.0)


@pytest.mark.parametrize(("at_", "debt"), [(69.99, 0), (70.0, 8)])
async def test_for_a_period_it_hears_of_none(at_: float, debt: int) -> None:
    """As long as what was proven to be counted elsewhere can still be in a count."""
    bucket = TokenBucket(10, PERIOD)
    bucket.disproved(10.0)
    request = await send(bucket)
    at(at_)
    bucket.heard(Told("somebody", 0.0, now(), 9, None), request.mark)
    assert debt_of(bucket) == debt


# --- what an answer says


def claims(limit: RateLimit) -> Buckets:
    return Buckets(limit, LocalStore(), late=LATE)


ONE_BUCKET = RateLimit(requests=10, period=PERIOD, margin=0.0, scope="client")


async def test_a_refusal_tells_of_the_count_too() -> None:
    """All are used, one of them by us."""
    buckets = claims(ONE_BUCKET)
    answered(await sent(buckets.claim(PATH, keys(1)[0])), refusal(10, 20.0))
    assert buckets.quota(PATH, None, pacing=0, refreshing=0).debt == 9


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"limit": 10},
        {"remaining": 0},
        {"reset": 5.0},
        {"limit": 10, "remaining": 11},
        {"limit": 0, "remaining": 0},
        {"limit": 1000, "remaining": 0},
    ],
    ids=str,
)
async def test_headers_that_are_absent_or_absurd_or_speak_of_another_limit_change_nothing(headers: dict[str, int]) -> None:
    """Neither make debt nor end it, and the limit stays."""
    buckets = claims(ONE_BUCKET)
    first = await sent(buckets.claim(PATH, keys(1)[0]))
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(**headers))
    before = buckets.quota(PATH, None, pacing=0, refreshing=0)
    assert (before.debt, before.limit) == (0, 10)
    answered(first, balance(10, 4, 20.0))
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(**headers))
    after = buckets.quota(PATH, None, pacing=0, refreshing=0)
    assert (after.debt, after.limit) == (4, 10)


async def test_an_answer_cut_short_tells_of_the_count_by_its_headers() -> None:
    """They came before it broke."""
    buckets = claims(ONE_BUCKET)
    claim = await sent(buckets.claim(PATH, keys(1)[0]))
    claim.answered(None, APIConnectionError("cut short", rate_limit=RateLimitStatus(limit=10, remaining=5, reset=1.0)))
    assert buckets.quota(PATH, None, pacing=0, refreshing=0).debt == 4


async def test_what_may_all_be_our_own_is_no_debt_of_one_account() -> None:
    """With "auto" the own bucket of an account hears only of what is more than all that we have sent."""
    buckets = claims(RateLimit(requests=10, period=PERIOD, margin=0.0))
    one, two = keys(2)
    for _ in range(2):
        answered(await sent(buckets.claim(PATH, one)), balance(10, 9))
    answered(await sent(buckets.claim(PATH, two)), balance(10, 7))
    assert buckets.quota(PATH, two, pacing=0, refreshing=0).debt == 0
    answered(await sent(buckets.claim(PATH, two)), balance(10, 5))
    assert buckets.quota(PATH, two, pacing=0, refreshing=0).debt == 3
    answered(await sent(buckets.claim(PATH, two)), balance(10, 5))
    assert buckets.quota(PATH, two, pacing=0, refreshing=0).debt == 0


# --- the whole of it


def ours(server: WindowServer) -> list[tuple[float, str]]:
    return [(when, name) for when, name in server.refused if name != "others"]


@pytest.mark.parametrize("scope", ["client", "auto"])
async def test_a_burst_of_somebody_elses_costs_a_few_refusals(scope: Literal["client", "auto"]) -> None:
    """Those that were under way when it came; the bucket then leaves the others their part until it has aged out."""
    server = WindowServer()
    async with fake_client(server, rate_limit=RateLimit(scope=scope)) as client:
        checking = asyncio.create_task(client.check(keys(600)))
        await asyncio.sleep(1)
        server.spend(150)
        await asyncio.sleep(2)
        assert client.quota().debt == pytest.approx(150, abs=15)
        report = await checking
    assert report.ok
    assert len(ours(server)) <= 10
    assert now() < 125


@pytest.mark.parametrize("rate", [0.1, 1.0, 2.5, 4.9])
async def test_somebody_who_keeps_spending_is_left_his_part(rate: float) -> None:
    """No refusal sets off others; all come through, as fast as what is left allows."""
    server = WindowServer()

    async def others() -> None:
        while True:
            await asyncio.sleep(1 / rate)
            server.spend(1)

    async with fake_client(server) as client:
        spending = asyncio.create_task(others())
        report = await client.check(keys(600))
        spending.cancel()
    assert report.ok
    assert len(ours(server)) <= 10
    assert now() < 125


@pytest.mark.parametrize("scope", ["client", "auto"])
async def test_two_clients_that_do_not_know_of_each_other_share_a_quota(scope: Literal["client", "auto"]) -> None:
    """Neither starves, and no more is lost than what each has under way when the quota runs out."""
    server = WindowServer()
    clients = [fake_client(server, rate_limit=RateLimit(scope=scope)) for _ in range(2)]
    reports = await asyncio.gather(*(client.check(keys(600, f"c{number}-")) for number, client in enumerate(clients)))
    for client in clients:
        await client.close()
    assert all(report.ok for report in reports)
    assert len(server.refused) <= 40
    assert now() < 250


@pytest.mark.parametrize("scope", ["client", "account", "key", "auto"])
async def test_who_is_alone_never_has_debt(scope: Literal["client", "account", "key", "auto"]) -> None:
    """Whatever the server counts by, what it counts is then our own."""
    server = WindowServer(scope=lambda key: None if scope in {"client", "auto"} else key.digest)
    async with fake_client(server, rate_limit=RateLimit(scope=scope)) as client:
        checking = asyncio.create_task(client.check(keys(700)))
        while not checking.done():
            await asyncio.sleep(0.25)
            debts = [bucket._debt for bucket in client._asker._buckets._buckets.values()]
            assert not any(debt.amount for debt in debts if debt is not None)
        assert (await checking).ok


async def test_a_token_that_comes_home_before_a_probe_is_due_goes_first() -> None:
    """The debt is not all that keeps the bucket shut."""
    bucket = TokenBucket(4, 60.0)
    for _ in range(3):
        await bucket.acquire()
    bucket.start()
    bucket.ended()
    at(30.0)
    mark = bucket.start()
    bucket.heard(Told("somebody", 30.0, 30.0, 3, 50.0), mark)
    assert bucket.quota().debt == 1
    await bucket.acquire()
    assert now() == pytest.approx(60, abs=0.1)


def test_the_last_accounts_are_those_that_were_heard_last() -> None:
    """One that is heard again is the newest, and not the first to be forgotten."""
    debt = Debt(2)
    for account, used in (("a", 5), ("b", 9), ("a", 5), ("c", 7)):
        debt.hear(Told(account, 0.0, 0.0, used, None), 0, period=60.0, spacing=1.0)
    assert debt.amount == 5


def test_who_did_not_find_out_after_all_is_followed_once() -> None:
    """By one."""
    debt = Debt(1)
    debt.probed()
    debt.not_probed(3.0)
    assert (debt.probe_at, debt.finding_out) == (3.0, False)
    debt.not_probed(9.0)
    assert debt.probe_at == 3.0


async def test_a_waiter_that_leaves_does_not_call_back_a_probe() -> None:
    """It is on the wire; and when it has told nothing, nobody goes beyond the debt before it ends."""
    bucket = TokenBucket(4, 60.0, late=1.0)
    token = await bucket.acquire()
    mark = bucket.start()
    bucket.heard(Told("somebody", 0.0, now(), 4, 5.0), mark)
    bucket.ended(token)
    at(20.0)
    probe = asyncio.create_task(bucket.acquire())
    await settle()
    assert bucket.quota().probing
    other = asyncio.create_task(bucket.acquire())
    await settle()
    other.cancel()
    await settle()
    bucket.start()
    bucket.ended(await probe)
    began = now()
    await bucket.acquire()
    assert now() - began > 30
