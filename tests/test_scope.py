"""How the server counts, as it is found out: by account or all together, and up to which limit. In virtual time."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crustcredits import ApiKey, Balance, ConfigurationError, CrustCreditsError, InvalidKeyError, RateLimit, RateLimitStatus
from crustcredits._buckets import Buckets
from crustcredits._learned import LearnedLimits
from crustcredits._limits import TokenBucket
from crustcredits._proof import LAG, WITNESSES, Witnesses
from crustcredits._tokens import LocalStore
from crustcredits._turn import Turn
from tests.told import answered, at, balance, refusal, sent
from tests.virtual import FakeServer, WindowServer, fake_client, keys, now

pytestmark = pytest.mark.virtual

PATH = "/user/credits"
LATE = 10.0


def make(**options: Any) -> Buckets:
    return Buckets(RateLimit(**options), LocalStore(), late=LATE)


def free(buckets: Buckets, key: ApiKey | None = None) -> int:
    """Free tokens of the common bucket, or of the one of this key's account."""
    return buckets.quota(PATH, key, pacing=0, refreshing=0).free


# --- the proof


def ended_in(bucket: TokenBucket) -> int:
    """Tokens that are out there although their requests have ended."""
    return len(bucket._tokens.homes())


SERVED = balance(300, 299)


@attrs.frozen
class Scene:
    """Others' requests, all at once, and then one of another account, of which it is asked whether it leaves the common bucket.

    As it stands it does, and would not with the least bit of anything less.
    """

    others: int = WITNESSES
    others_answer: Balance | CrustCreditsError = SERVED
    own_before: int = 0  # of the account itself, beside the others
    ended: float = 0.0  # the others' answers
    started: float = LAG
    answered: float = LAG + 0.01
    answer: Balance | CrustCreditsError = SERVED
    own_beside: int = 0  # of the account itself, on the wire at the same time

    async def leaves(self) -> bool:
        """Whether its token has left the common bucket, and is out in its own alone."""
        buckets = make()
        *others, key = keys(self.others + 1)
        early = [await sent(buckets.claim(PATH, other)) for other in [*others, *[key] * self.own_before]]
        at(self.ended)
        for claim in early:
            answered(claim, self.others_answer)
        at(self.started)
        beside = [await sent(buckets.claim(PATH, key)) for _ in range(self.own_beside)]
        claim = await sent(buckets.claim(PATH, key))
        at(self.answered)
        answered(claim, self.answer)
        own, common = claim._buckets
        assert ended_in(own) == self.own_before + 1
        assert own.quota().in_flight == common.quota().in_flight == len(beside)
        return ended_in(common) < self.others + self.own_before + 1


async def test_a_token_leaves_the_common_bucket_when_ten_others_are_missing_from_the_count() -> None:
    """Counted together they would all be in it; it stays out in the bucket of its own account."""
    assert await Scene().leaves()


INVALID = InvalidKeyError("no", status=401, rate_limit=RateLimitStatus(limit=300, remaining=299))


@pytest.mark.parametrize(
    "less",
    [
        pytest.param({"others": WITNESSES - 1}, id="nine others"),
        pytest.param({"others": WITNESSES - 1, "own_before": 1}, id="nine others and one of its own"),
        pytest.param({"others": WITNESSES - 1, "own_before": 1, "answer": balance(300, 298)}, id="and that was counted too"),
        pytest.param({"started": 1.499}, id="started too soon after them"),
        pytest.param({"ended": 0.001}, id="they ended too late before it"),
        pytest.param({"answered": 59.71, "started": 59.0}, id="they may have aged"),
        pytest.param({"answer": balance(300, 298)}, id="one more was counted"),
        pytest.param({"answer": INVALID}, id="a 401"),
        pytest.param({"answer": refusal(300, 1.0)}, id="a 429"),
        pytest.param({"answer": balance(299, 298)}, id="a lower limit"),
        pytest.param({"answer": balance(301, 300)}, id="a higher limit"),
        pytest.param({"answer": balance(300)}, id="no count"),
        pytest.param({"answer": balance(None, 299)}, id="no limit"),
        pytest.param({"answer": balance(300, 301)}, id="a count below nought"),
        pytest.param({"answer": balance()}, id="no headers"),
        pytest.param({"others_answer": INVALID}, id="they were told 401"),
        pytest.param({"others_answer": balance(299, 298)}, id="they were told a lower limit"),
        pytest.param({"others_answer": balance(1000, 999)}, id="they were told a higher limit"),
        pytest.param({"others_answer": balance()}, id="they were told nothing"),
        pytest.param({"own_beside": 1}, id="its own may be all that stand"),
    ],
)
async def test_what_is_not_proven_to_the_last_bit_stays(less: dict[str, Any]) -> None:
    """Nine others are no proof, nor are those of the account itself; nor 1.499 s, a count of one more, or another limit."""
    assert not await Scene(**less).leaves()


@pytest.mark.parametrize(
    "enough",
    [
        pytest.param({"answered": 59.69, "started": 59.0}, id="just not aged"),
        pytest.param({"own_before": 3, "answer": balance(300, 296)}, id="its own before are counted"),
        pytest.param({"own_before": 3}, id="its own before are not counted"),
        pytest.param({"others": WITNESSES + 1, "own_beside": 1, "answer": balance(300, 298)}, id="another one beside it"),
    ],
)
async def test_what_is_proven_leaves(enough: dict[str, Any]) -> None:
    """Also of an account that has sent before, or at the same time: that is its own count."""
    assert await Scene(**enough).leaves()


async def test_many_requests_of_one_account_at_a_time_prove_nothing() -> None:
    """A hundred on the wire would be enough for any count; what it is told of so far, eleven, are all that there were."""
    buckets = make()
    *others, key = [*keys(WITNESSES), ApiKey("secret-many", account="acme")]
    for claim in [await sent(buckets.claim(PATH, other)) for other in others]:
        answered(claim, balance(300, 290))
    at(2.0)
    parallel = [await sent(buckets.claim(PATH, key)) for _ in range(100)]
    at(2.01)
    for count, claim in enumerate(parallel, 1):
        answered(claim, balance(300, 290 - count))
    assert free(buckets) == 300 - 110


async def test_keys_of_one_declared_account_are_one() -> None:
    """The bucket of the account holds the requests of all of its keys."""
    buckets = make()
    one, two = ApiKey("secret-one", account="acme"), ApiKey("secret-two", account="acme")
    await sent(buckets.claim(PATH, one))
    assert (free(buckets, two), free(buckets)) == (299, 299)


async def test_a_proof_is_no_proof_for_others() -> None:
    """Each request's own answer has to show it."""
    buckets = make()
    for claim in [await sent(buckets.claim(PATH, key)) for key in keys(WITNESSES + 5)]:
        answered(claim, balance(300, 299))
    at(2.0)
    answered(await sent(buckets.claim(PATH, keys(1, "apart")[0])), balance(300, 299))
    assert free(buckets) == 300 - 15
    answered(await sent(buckets.claim(PATH, keys(1, "silent")[0])), balance())
    assert free(buckets) == 300 - 16


async def test_endpoints_do_not_testify_for_each_other() -> None:
    """Each counts for itself."""
    buckets = make()
    for claim in [await sent(buckets.claim(PATH, key)) for key in keys(20)]:
        answered(claim, balance(300, 299))
    at(2.0)
    claim = await sent(buckets.claim("/account/credits", keys(1)[0]))
    answered(claim, balance(300, 299))
    assert buckets.quota("/account/credits", None, pacing=0, refreshing=0).free == 299


async def test_an_account_that_is_counted_apart_still_keeps_its_own_limit() -> None:
    """What has left the common bucket is out in its own."""
    buckets = make(requests=20)
    for claim in [await sent(buckets.claim(PATH, key)) for key in keys(15)]:
        answered(claim, balance(20, 19))
    at(2.0)
    key = keys(1, "apart")[0]
    for count in range(1, 6):
        answered(await sent(buckets.claim(PATH, key)), balance(20, 20 - count))
    assert (free(buckets), free(buckets, key)) == (5, 15)


async def test_all_requests_of_an_account_are_in_one_bucket() -> None:
    """One that has just been looked up is not forgotten in the same moment, however idle it is and all others are."""
    buckets = make()
    for number, key in enumerate(keys(20)):
        at(number * 100.0)
        for count in (1, 2):
            answered(await sent(buckets.claim(PATH, key)), balance())
            assert free(buckets, key) == 300 - count


async def test_a_claim_takes_both_tokens_or_none() -> None:
    """An account that has none left takes none of the common ones, and the other way round."""
    buckets = make(requests=2)
    one, two = keys(2)
    first = buckets.claim(PATH, one)
    assert first.try_acquire()
    assert buckets.claim(PATH, one).try_acquire()
    assert not buckets.claim(PATH, two).try_acquire()
    assert (free(buckets), free(buckets, one), free(buckets, two)) == (0, 0, 2)
    first.put_back()
    assert (free(buckets), free(buckets, one)) == (1, 1)


async def test_whoever_waits_for_its_own_account_holds_up_no_other() -> None:
    """It holds no common token while it waits."""
    buckets = make(requests=20)
    for claim in [await sent(buckets.claim(PATH, key)) for key in keys(15)]:
        answered(claim, balance(20, 19))
    at(2.0)
    busy, other = keys(2, "apart")
    for count in range(1, 21):
        answered(await sent(buckets.claim(PATH, busy)), balance(20, 20 - count))
    waiting = asyncio.create_task(buckets.claim(PATH, busy).acquire(Turn()))
    await asyncio.sleep(1)
    assert buckets.claim(PATH, other).try_acquire()
    waiting.cancel()


# --- the witnesses


@attrs.frozen
class Naive:
    """All requests ever answered, by start and end."""

    requests: list[tuple[float, float]] = attrs.field(factory=list)

    def standing(self, started: float, now: float, period: float) -> int:
        """As the rule says it: those that have been settled, less all that may have aged."""
        settled = sum(ended <= started - LAG for _, ended in self.requests)
        return settled - sum(start < now - period for start, _ in self.requests)

    def counted(self, started: float, now: float, period: float) -> int:
        """What the server must have in its count if all count together."""
        return sum(ended <= started - LAG and start >= now - period for start, ended in self.requests)


ANSWERS = st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 2, 5, 20, 80]), st.integers(0, 10)), max_size=60)


@given(answers=ANSWERS, chunk=st.integers(1, 4))
@example(answers=[(0, 0)] * 3 + [(75, 2)] * 3, chunk=1)
def test_what_is_forgotten_of_the_witnesses_changes_no_answer(answers: list[tuple[int, int]], chunk: int) -> None:
    """And no more stand in a count than the server must have."""
    period, end = 60.0, 0.0
    witnesses, naive = Witnesses(period, LATE), Naive()
    with patch("crustcredits._proof._CHUNK", chunk):
        for wait, took in answers:
            end += wait
            start = end - took
            standing = witnesses.standing(start, end)
            assert standing == naive.standing(start, end, period) <= naive.counted(start, end, period)
            witnesses.add(start, end)
            naive.requests.append((start, end))


async def test_witnesses_of_the_last_periods_only_are_kept() -> None:
    """However long it goes on, and after a burst too."""
    witnesses = Witnesses(60.0, LATE)
    for _ in range(10_000):
        witnesses.add(0.0, 0.01)
    kept = []
    for second in range(100, 2000):
        for tenth in range(10):
            witnesses.add(second + tenth / 10, second + tenth / 10 + 0.05)
        kept.append(len(witnesses._ends))
    assert max(kept[100:]) <= 10 * (60 + 10 + 2) + 512 + 1
    assert len(witnesses._starts) == len(witnesses._ends)


# --- the whole of it


@attrs.frozen
class Run:
    """What came of checking a pool."""

    seconds: float
    refused: int
    worst: int


async def check(server: WindowServer, pool: list[ApiKey], **options: Any) -> Run:
    async with fake_client(server, **options) as client:
        assert (await client.check(pool)).ok
    return Run(now(), len(server.refused), server.worst_window())


def by_key(key: ApiKey) -> Any:
    return key.digest


def by_account(key: ApiKey) -> Any:
    return key.account or key.digest


def acme_undeclared(key: ApiKey) -> Any:
    """Those whose name begins with "acme" share an account, which nobody has said."""
    return "acme" if key.name.startswith("acme") else key.digest


async def test_a_thousand_accounts_take_ten_seconds() -> None:
    """The pace's, as if nothing held them together; and none is refused."""
    outcome = await check(WindowServer(scope=by_key), keys(1000))
    assert outcome.refused == 0
    assert outcome.seconds == pytest.approx(10, abs=2)


async def test_a_thousand_keys_that_are_counted_together_take_three_minutes() -> None:
    """300 at once, and three times more; none is refused."""
    outcome = await check(WindowServer(), keys(1000))
    assert (outcome.refused, outcome.worst) == (0, 300)
    assert outcome.seconds == pytest.approx(182, abs=2)


@pytest.mark.parametrize("scope", [None, by_key])
async def test_a_count_that_lags_misleads_nobody(scope: Callable[[ApiKey], Any] | None) -> None:
    """What the server does not count yet is no witness."""
    outcome = await check(WindowServer(lag=0.5, scope=scope or (lambda key: None)), keys(1000))
    assert outcome.refused == 0
    assert outcome.seconds == pytest.approx(10 if scope else 182, abs=2)


@pytest.mark.parametrize("order", ["first", "last", "mixed"])
async def test_keys_of_one_account_that_nobody_declared_are_caught_by_their_count(order: str) -> None:
    """Of 400 beside 600 that are accounts of their own, at most two are refused."""
    single, acme = keys(600), keys(400, "acme")
    pool = [*acme, *single] if order == "first" else [*single, *acme]
    if order == "mixed":
        random.Random(7).shuffle(pool)
    server = WindowServer(scope=acme_undeclared)
    outcome = await check(server, pool)
    assert outcome.refused <= 2
    assert outcome.seconds < 75


async def test_declared_accounts_keep_each_its_own_limit() -> None:
    """Four with 250 keys each are done in a period, five hundred keys of one in two; none is refused."""
    server = WindowServer(scope=by_account)
    pool = [ApiKey(f"secret-{number}", account=f"account {number % 4}") for number in range(1000)]
    assert (await check(server, pool)).refused == 0
    assert now() < 75


@pytest.mark.parametrize("scope", ["auto", "account"])
async def test_one_declared_account_of_many_keys_is_counted_together_by_any_reading(scope: str) -> None:
    """All of one account, counted by account or not."""
    pool = [ApiKey(f"secret-{number}", account="acme") for number in range(700)]
    outcome = await check(WindowServer(scope=by_account), pool, rate_limit=RateLimit(scope=scope))  # type: ignore[arg-type]
    assert (outcome.refused, outcome.worst) == (0, 300)
    assert outcome.seconds == pytest.approx(122, abs=2)


async def test_without_headers_all_are_counted_together() -> None:
    """Nothing can be proven."""
    server = FakeServer()
    async with fake_client(server) as client:
        assert (await client.check(keys(400))).ok
    assert now() == pytest.approx(61.5, abs=1)


# --- the limits that the API says


def limit_of(buckets: Buckets) -> int:
    return buckets.quota(PATH, None, pacing=0, refreshing=0).limit


async def hears(buckets: Buckets, limit: int) -> int:
    """An answer says that it is this; the limit that is kept then."""
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(limit, limit - 1))
    return limit_of(buckets)


async def test_a_lower_limit_is_followed_at_once() -> None:
    """The rest of what was free is not."""
    buckets = make(scope="client")
    assert await hears(buckets, 100) == 100
    assert free(buckets) == 99
    assert await hears(buckets, 50) == 50


async def test_a_lower_limit_keeps_back_what_was_granted() -> None:
    """Whoever has a token and has not begun puts it back."""
    buckets = make(requests=3, scope="client")
    first, second = (buckets.claim(PATH, key) for key in keys(2))
    await sent(first)
    assert second.try_acquire()
    answered(first, balance(1, 0))
    assert not second.may_start()


async def test_a_higher_limit_is_another_one() -> None:
    """It may be a key's over all endpoints."""
    buckets = make(scope="client")
    assert await hears(buckets, 1000) == 300


async def test_a_higher_limit_is_followed_by_whoever_asks_for_it() -> None:
    """At once, and back again."""
    buckets = make(scope="client", follow="both")
    assert await hears(buckets, 1000) == 1000
    assert free(buckets) == 999
    assert await hears(buckets, 300) == 300


async def test_who_waits_for_a_token_has_it_when_the_limit_grows() -> None:
    """In the same moment."""
    buckets = make(requests=1, scope="client", follow="both")
    claim = await sent(buckets.claim(PATH, keys(1)[0]))
    waiting = asyncio.create_task(buckets.claim(PATH, keys(1)[0]).acquire(Turn()))
    await asyncio.sleep(1)
    answered(claim, balance(2, 1))
    await waiting
    assert now() == pytest.approx(1)


@pytest.mark.parametrize("follow", ["down", "both"])
@pytest.mark.parametrize("absurd", [0, 1_000_001, 10**18])
async def test_an_absurd_limit_is_none(follow: str, absurd: int) -> None:
    """No plan has it."""
    buckets = make(scope="client", follow=follow)
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(absurd, 0))
    assert limit_of(buckets) == 300


@pytest.mark.parametrize("follow", ["down", "both"])
async def test_the_limit_grows_back_when_no_lower_one_was_said_for_a_period(follow: str) -> None:
    """Until then keys of several plans may share a bucket, and the lowest counts."""
    buckets = make(scope="client", follow=follow)
    assert await hears(buckets, 100) == 100
    at(30.0)
    assert await hears(buckets, 100) == 100
    at(89.99)
    assert await hears(buckets, 300) == 100
    at(90.0)
    assert await hears(buckets, 200) == 200
    at(149.99)
    assert await hears(buckets, 300) == 200
    at(150.0)
    assert await hears(buckets, 300) == 300
    assert await hears(buckets, 100) == 100


async def test_while_a_lower_limit_is_kept_the_configured_one_teaches_no_debt() -> None:
    """It is another one's count."""
    buckets = make(scope="client")
    await hears(buckets, 100)
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(300, 100))
    assert buckets.quota(PATH, None, pacing=0, refreshing=0).debt == 0
    answered(await sent(buckets.claim(PATH, keys(1)[0])), balance(100, 90))
    assert buckets.quota(PATH, None, pacing=0, refreshing=0).debt == 7


async def test_each_bucket_has_its_limit() -> None:
    """Accounts can have different plans."""
    buckets = make(scope="account")
    one, two = keys(2)
    for key, limit in ((two, 300), (one, 100)):
        answered(await sent(buckets.claim(PATH, key)), balance(limit, limit - 1))
    assert [buckets.quota(PATH, key, pacing=0, refreshing=0).limit for key in (one, two)] == [100, 300]


async def test_a_limit_is_remembered_when_its_bucket_is_forgotten() -> None:
    """Its bucket is made anew with it; and what it would be is told without one."""
    buckets = make(scope="key")
    key, *others = keys(30)
    answered(await sent(buckets.claim(PATH, key)), balance(100, 99))
    at(1000.0)
    for other in others:
        buckets.claim(PATH, other)
    assert (PATH, key.digest) not in buckets._buckets
    assert buckets.quota(PATH, key, pacing=0, refreshing=0).limit == 100
    buckets.claim(PATH, key)
    assert buckets.quota(PATH, key, pacing=0, refreshing=0).free == 100


@pytest.mark.parametrize("follow", ["down", "both"])
async def test_so_many_limits_are_remembered_and_no_more(follow: str) -> None:
    """Those that were heard longest ago go first, and one that is the configured one again needs no memory."""
    with patch("crustcredits._learned._ROOM", 3):
        limits = LearnedLimits(RateLimit(follow=follow))  # type: ignore[arg-type]  # the two there are
        places = [TokenBucket(300, 60.0, place=place) for place in range(5)]
        for bucket in places[:3]:
            limits.hear(bucket, "somebody", 100, 0.0)
        limits.hear(places[0], "somebody", 100, 1.0)
        limits.hear(places[3], "somebody", 100, 1.0)
        assert [limits.of(place) for place in range(5)] == [100, 300, 100, 100, 300]
        limits.hear(places[2], "somebody", 300, 60.0)
        limits.hear(places[4], "somebody", 100, 60.0)
        assert [limits.of(place) for place in range(5)] == [100 if follow == "down" else 300, 300, 300, 100, 100]
        assert len(limits._heard) <= 3


@pytest.mark.parametrize(
    ("follow", "told", "common"),
    [
        ("down", [5], 300),
        ("down", [5, 5], 300),
        ("down", [5, 5, 5], 5),
        ("down", [5, 300], 300),
        ("down", [300, 5], 300),
        ("down", [300, 300, 300, 100, 80], 300),
        ("down", [300, 300, 300, 100, 80, 90], 100),
        ("down", [100, 100, 100, 1000, 1000], 100),
        ("both", [400, 350, 500], 350),
        ("both", [500, 200, 500], 300),
    ],
)
async def test_one_account_of_another_plan_changes_only_its_own(follow: str, told: list[int], common: int) -> None:
    """As long as all keys may be counted together or not, the last three accounts have to agree on a limit for all."""
    buckets = make(follow=follow)
    pool = keys(len(told))
    for key, limit in zip(pool, told, strict=True):
        answered(await sent(buckets.claim(PATH, key)), balance(limit, limit - 1))
    assert buckets.quota(PATH, None, pacing=0, refreshing=0).limit == common
    own = [buckets.quota(PATH, key, pacing=0, refreshing=0).limit for key in pool]
    assert own == [limit if follow == "both" else min(limit, 300) for limit in told]


@pytest.mark.parametrize("scope", ["client", "auto"])
async def test_another_limit_is_told_to_the_log_once(scope: str, caplog: pytest.LogCaptureFixture) -> None:
    """However many keys hear it."""
    with caplog.at_level(logging.INFO, logger="crustcredits"):
        outcome = await check(WindowServer(limit=50), keys(40), rate_limit=RateLimit(scope=scope))  # type: ignore[arg-type]
    assert outcome.refused == 0
    said = [record.getMessage() for record in caplog.records if "limit is" in record.getMessage()]
    assert said == ["the API says that its limit is 50 requests, not 300; it is followed"]


async def test_a_server_of_a_lower_limit_than_configured_need_not_refuse() -> None:
    """Its first answer comes before its limit is reached."""
    outcome = await check(WindowServer(limit=30), keys(90))
    assert outcome.refused == 0
    assert outcome.seconds == pytest.approx(121, abs=2)


async def test_whether_to_follow_a_limit_up_is_asked_in_two_words() -> None:
    """Down always, or both ways."""
    with pytest.raises(ConfigurationError, match="follow is 'down' or 'both'"):
        RateLimit(follow="up")  # type: ignore[arg-type]  # that is the point
