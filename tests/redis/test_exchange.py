"""The script in Redis: one message at a time, without a process around it."""

from __future__ import annotations

import attrs
import pytest
from redis.exceptions import ResponseError

from crustcredits.redis.protocol import (
    SCRIPT,
    SHA,
    AnswersPart,
    BucketReport,
    PermitRequest,
    PublishAnswer,
    Request,
    Response,
)
from tests.redis.lua import EPOCH, FakeRedis, opened

LEASE = 81.0
PAUSE = 1.25
STILL, GRACE = 1.5, 2.0


@attrs.define
class Process:
    """Sends messages to a server and reads the answers."""

    redis: FakeRedis
    name: str
    epoch: int = 0
    number: int = 0
    sent: Request | None = None
    share: float = 0.0
    is_strict: bool = False
    served: int = 0
    """Redis's clock at the last message with an answer; 0 for none."""

    def request(self, buckets: list[BucketReport], asks: list[PermitRequest]) -> Request:
        self.number += 1
        return Request(
            marker="{p}:epoch",
            process=self.name,
            number=self.number,
            epoch=self.epoch,
            fresh=100 + self.number,
            stops_grants=False,
            still=STILL,
            grace=GRACE,
            clock=self.served,
            age=self.redis.clock() - self.served / 1e6 if self.served else 0.0,
            tolerance=2.0,
            pause=PAUSE,
            lease=LEASE,
            retention=21.0,
            life=86_400.0,
            share=self.share,
            is_strict=self.is_strict,
            buckets=buckets,
            asks=asks,
        )

    def send(self, request: Request, *, is_answered: bool = True) -> Response:
        self.sent = request
        names, said = request.encode()
        answer = Response.decode(self.redis.execute(names, said, sha=SHA, script=SCRIPT), self.sent)
        if is_answered:
            self.served = answer.clock
        return answer

    def ask(self, *wanted: tuple[str, int, int], first: int = 0, common_limit: int = 0) -> Response:
        """Ask for permits for accounts, each with its limit; and for one common token each."""
        names = [*(name for name, _, _ in wanted), *(["common"] if common_limit else [])]
        asks = []
        for index, (_, limit, count) in enumerate(wanted):
            limits = [(index, limit), *([(len(wanted), common_limit)] if common_limit else [])]
            asks.append(PermitRequest(wanted=count, first=first, limits=limits))
            first += count
        answer = self.send(
            self.request([BucketReport(name=f"{{p}}:{name}") for name in names], asks)
        )
        self.epoch = answer.epoch
        return answer


class Clock:
    def __init__(self) -> None:
        self.at = EPOCH

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def redis(clock: Clock) -> FakeRedis:
    return opened(clock=clock, prefix="p")


def out(redis: FakeRedis, name: str) -> int:
    return redis.out(f"{{p}}:{name}")


def test_a_permit_takes_a_token_of_each_bucket_or_none(redis: FakeRedis) -> None:
    one = Process(redis, "one")
    answer = one.ask(("a", 3, 5), ("b", 3, 2), common_limit=4)
    assert answer.granted == (3, 1)
    assert [out(redis, name) for name in ("a", "b", "common")] == [3, 1, 4]
    assert [state.out for state in answer.buckets] == [3, 1, 4]


def test_the_answer_tells_which_bucket_stops_a_permit_and_when_its_tokens_return(
    redis: FakeRedis, clock: Clock
) -> None:
    one, two = Process(redis, "one"), Process(redis, "two")
    one.ask(("a", 2, 2), common_limit=9)
    clock.at += 1
    a, everything = two.ask(("a", 2, 3), common_limit=9).buckets
    assert (a.missing, a.returns) == (3, [LEASE - 1, LEASE - 1])
    assert (everything.missing, everything.returns) == (0, [])
    b, everything = two.ask(("b", 5, 5), common_limit=4).buckets
    assert (b.missing, b.out) == (0, 2)
    assert (everything.missing, len(everything.returns)) == (3, 3)


def test_a_process_that_waits_longer_is_served_first(redis: FakeRedis, clock: Clock) -> None:
    one, two, three = (Process(redis, name) for name in ("one", "two", "three"))
    one.ask(("a", 1, 1))
    for waits in (two, three):
        clock.at += 0.1
        assert waits.ask(("a", 1, 1), first=10).granted == (0,)
    one.send(one.request([BucketReport(name="{p}:a", unused=[0])], []))
    assert three.ask(("a", 1, 1), first=20).granted == (0,)
    assert two.ask(("a", 1, 1), first=20).granted == (1,)


def test_a_process_waits_for_the_second_bucket_only_with_requests_that_the_first_one_allows(
    redis: FakeRedis, clock: Clock
) -> None:
    """Two processes that are before each other at one bucket each would both wait for ever."""
    one, two, three = (Process(redis, name) for name in ("one", "two", "three"))
    three.ask(("a", 1, 1), common_limit=1)
    clock.at += 0.1
    one.ask(("a", 1, 1), first=10, common_limit=1)
    clock.at += 0.1
    two.ask(("b", 1, 1), first=10, common_limit=1)
    three.send(
        three.request([BucketReport(name=name, unused=[0]) for name in ("{p}:a", "{p}:common")], [])
    )
    clock.at += 0.1
    assert two.ask(("a", 1, 1), first=20, common_limit=1).granted == (0,)
    assert one.ask(("a", 1, 1), first=20, common_limit=1).granted == (1,)


@pytest.mark.parametrize("later", [0, 1])
def test_a_message_that_arrives_again_changes_nothing(
    redis: FakeRedis, clock: Clock, later: int
) -> None:
    """Also after the next message, when its permits are used and one is given back."""
    one = Process(redis, "one")
    first = one.ask(("a", 3, 2), common_limit=9)
    again = one.sent
    assert again is not None
    for _ in range(later):
        report = BucketReport(name="{p}:a", returns=[(0, 60.0)], unused=[1])
        one.send(one.request([report], []))
    before = redis.text()
    clock.at += 5
    answer = one.send(again)
    assert answer.granted == ((2,) if not later else (1,))
    assert redis.text() == before
    assert answer.epoch == first.epoch


def test_a_lost_count_waits_for_the_tokens_of_all_processes(clock: Clock) -> None:
    redis = opened(clock=clock, prefix="p")
    redis.flush()
    assert Process(redis, "two").ask(("a", 3, 2)).granted == (0,)
    assert Process(redis, "three").ask(("a", 3, 2)).pause == PAUSE
    clock.at += PAUSE
    assert Process(redis, "four").ask(("a", 3, 2)).granted == (2,)


def test_a_server_that_has_taken_over_is_a_lost_count(redis: FakeRedis) -> None:
    one = Process(redis, "one")
    one.ask(("a", 3, 2))
    redis.run += 1
    answer = one.send(one.request([], []))
    assert not answer.is_known
    assert answer.epoch != one.epoch
    assert answer.pause == PAUSE


def of_all(redis: FakeRedis, clock: Clock, *, count: int = 2) -> list[Process]:
    """Return processes with tokens out and a share of half of the limit, which were just served."""
    processes = [Process(redis, f"process {place}", share=1 / 2) for place in range(count)]
    clock.at += 2 * LEASE
    for _ in range(2):
        clock.at += 0.1
        for place, process in enumerate(processes):
            process.ask(("a", 10, 1), first=100 * place + process.number)
    return processes


def test_after_an_outage_of_all_no_permits_are_granted_until_each_process_can_report(
    redis: FakeRedis, clock: Clock
) -> None:
    """The other process may count by itself since two seconds without an answer."""
    one, _ = of_all(redis, clock)
    clock.at += GRACE
    answer = one.ask(("a", 10, 1))
    assert (answer.granted, answer.pause) == ((0,), PAUSE)
    clock.at += PAUSE
    assert one.ask(("a", 10, 1)).granted == (1,)


def test_messages_without_answers_are_no_sign_that_a_process_is_served(
    redis: FakeRedis, clock: Clock
) -> None:
    """They may arrive while their answers are lost. All may count by themselves."""
    one, two = of_all(redis, clock)
    for _ in range(5):
        clock.at += 0.5
        for process in (one, two):
            process.send(process.request([], []), is_answered=False)
    assert one.ask(("a", 10, 1)).pause == PAUSE


def test_a_silence_of_one_process_stops_no_other(redis: FakeRedis, clock: Clock) -> None:
    """It may be cut off, or killed."""
    one, _, _ = of_all(redis, clock, count=3)
    for _ in range(8):
        clock.at += 0.5
        assert one.ask(("a", 10, 0)).pause == 0


def test_a_process_alone_waits_for_nobody_after_an_outage(redis: FakeRedis, clock: Clock) -> None:
    (one,) = of_all(redis, clock, count=1)
    clock.at += 10
    assert one.ask(("a", 10, 1)).granted == (1,)


def test_processes_that_were_idle_do_not_wait_for_each_other(
    redis: FakeRedis, clock: Clock
) -> None:
    """The first message of each tells of an answer long ago."""
    one, two = of_all(redis, clock)
    for process in (one, two):
        process.send(attrs.evolve(process.request([], []), leaves=True))
    clock.at += 20
    for place, process in enumerate((one, two)):
        assert process.ask(("a", 10, 1), first=50 + place).granted == (1,)


def test_a_process_with_nothing_out_is_not_waited_for(redis: FakeRedis, clock: Clock) -> None:
    """It has no tokens that it could use by itself."""
    one, two = of_all(redis, clock)
    two.send(attrs.evolve(two.request([], []), leaves=True))
    clock.at += 10
    assert one.ask(("a", 10, 1)).granted == (1,)


def test_a_process_that_never_counts_by_itself_waits_for_nobody(
    redis: FakeRedis, clock: Clock
) -> None:
    """Its calls fail while Redis is out of reach."""
    one, two = of_all(redis, clock)
    one.share = two.share = 0.0
    clock.at += 10
    assert one.ask(("a", 10, 1)).granted == (1,)


def test_after_a_lease_without_a_served_process_each_has_its_share_first(
    redis: FakeRedis, clock: Clock
) -> None:
    """Others that count by themselves have no more than theirs out."""
    one, two = of_all(redis, clock)
    clock.at += LEASE
    answer = one.ask(("a", 10, 7))
    assert (answer.granted, answer.pause) == ((5,), 0.0)
    assert answer.buckets[0].returns == [PAUSE, PAUSE]
    assert [each.ask(("a", 10, 7), first=20).granted for each in (one, two)] == [(0,), (5,)]
    one.ask(("a", 10, 0))
    clock.at += PAUSE
    assert one.ask(("a", 11, 7), first=40).granted == (1,)


def test_a_second_outage_soon_after_a_long_one_is_waited_for_like_the_first(
    redis: FakeRedis, clock: Clock
) -> None:
    """Between them only one process was served, and the other one still counts by itself."""
    one, _ = of_all(redis, clock)
    clock.at += LEASE + 20
    one.ask(("a", 10, 0))
    clock.at += 0.2
    one.ask(("a", 10, 0))
    clock.at += 5
    assert one.ask(("a", 10, 9)).granted == (5,)


def test_a_process_that_lost_redis_a_little_earlier_may_use_its_share(
    redis: FakeRedis, clock: Clock
) -> None:
    """The outage was a lease long for it, and not quite for the others."""
    one, two = of_all(redis, clock)
    for _ in range(2):
        clock.at += 0.2
        one.ask(("a", 10, 0))
    clock.at += LEASE - 0.3
    assert one.ask(("a", 10, 9)).granted == (5,)
    assert two.number


def test_a_token_of_this_moment_is_registered_for_a_whole_lease(
    redis: FakeRedis, clock: Clock
) -> None:
    """Durations are rounded up, so it can be out for a microsecond longer."""
    one = Process(redis, "one")
    one.send(one.request([BucketReport(name="{p}:a", returns=[(1, LEASE + 2e-6)])], []))
    assert out(redis, "a") == 1


def test_a_share_below_one_token_is_one(redis: FakeRedis, clock: Clock) -> None:
    """As in degraded mode, so that a single call after a quiet time need not wait."""
    one, _ = of_all(redis, clock)
    clock.at += LEASE
    assert [one.ask(("b", 1, 1), first=10 * step).granted for step in range(2)] == [(1,), (0,)]


def test_too_many_answers_push_out_the_ones_that_would_be_forgotten_next(
    redis: FakeRedis, clock: Clock
) -> None:
    """So that answers never take the memory of the count."""
    one = Process(redis, "one")
    one.ask(("a", 3, 1))
    published = [
        PublishAnswer(
            name=f"name {number}",
            asked=one.served,
            kept=60.0 + number,
            is_error=False,
            value="e30=",
            frees=True,
        )
        for number in range(9)
    ]
    part = AnswersPart(operations=published, fetches=False, lease=5.0, most=4, memory=600.0)
    one.send(attrs.evolve(one.request([], []), answers=part))
    assert sorted(redis.content("{p}:epoch:answers")) == [
        f"name {number}" for number in range(5, 9)
    ]


def test_an_answer_of_an_unknown_time_is_not_stored(redis: FakeRedis) -> None:
    one = Process(redis, "one")
    one.ask(("a", 3, 1))
    published = PublishAnswer(
        name="name", asked=0, kept=60.0, is_error=False, value="e30=", frees=True
    )
    part = AnswersPart(operations=[published], fetches=False, lease=5.0, most=4, memory=600.0)
    one.send(attrs.evolve(one.request([], []), answers=part))
    assert redis.content("{p}:epoch:answers")["name"] == "1 0 0 0 - "


def test_processes_that_were_killed_are_forgotten_after_a_lease(
    redis: FakeRedis, clock: Clock
) -> None:
    one, _ = of_all(redis, clock)
    for _ in range(200):
        clock.at += 0.5
        one.ask(("a", 10, 0))
    assert "process 1" in str(redis.content("{p}:epoch:busy"))
    Process(redis, "three", share=1 / 2).ask(("a", 10, 1))
    assert "process 1" not in str(redis.content("{p}:epoch:busy"))


def test_the_first_message_of_a_strict_process_adds_no_share(
    redis: FakeRedis, clock: Clock
) -> None:
    """It may be read so late that the process uses its share by itself meanwhile."""
    one, two = (Process(redis, name, share=1 / 2, is_strict=True) for name in ("one", "two"))
    granted = [one.ask(("a", 10, 9), first=10 * place).granted for place in range(2)]
    assert granted == [(0,), (5,)]
    two.ask(("a", 10, 0))
    assert one.ask(("a", 10, 9), first=50).granted == (0,)
    two.ask(("a", 10, 0))
    assert one.ask(("a", 10, 9), first=70).granted == (5,)


@pytest.mark.parametrize("marker", ["text", "fields"])
def test_a_marker_of_another_program_is_replaced(
    redis: FakeRedis, clock: Clock, marker: str
) -> None:
    """As a lost count."""
    fields = ["epoch", "opens", "longest", "heard", "served", "cautious_until"]
    redis.spoil("{p}:epoch", "text" if marker == "text" else dict.fromkeys(fields, "x"))
    one = Process(redis, "one")
    assert one.ask(("a", 3, 2)).pause == PAUSE
    clock.at += PAUSE
    assert one.ask(("a", 3, 2)).granted == (2,)


def test_a_marker_that_cannot_be_read_is_kept(redis: FakeRedis, clock: Clock) -> None:
    """Only a marker of another program is deleted; any other error reaches the process."""
    one = Process(redis, "one")
    one.ask(("a", 3, 2))
    before = dict(redis.content("{p}:epoch"))
    redis.refusal = "LOADING Redis is loading the dataset in memory"
    with pytest.raises(ResponseError, match="LOADING"):
        one.ask(("a", 3, 2))
    assert redis.content("{p}:epoch") == before
