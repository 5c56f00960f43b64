"""The script in Redis: one message at a time, without a process around it."""

from __future__ import annotations

import attrs
import pytest

from crustcredits.redis.protocol import (
    SCRIPT,
    SHA,
    BucketReport,
    PermitRequest,
    Request,
    Response,
)
from tests.redis.lua import EPOCH, FakeRedis, opened

LEASE = 81.0
PAUSE = 1.25
STILL = 1.0


@attrs.define
class Process:
    """Sends messages to a server and reads the answers."""

    redis: FakeRedis
    name: str
    epoch: int = 0
    number: int = 0
    sent: Request | None = None

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
            clock=0,
            age=0.0,
            tolerance=2.0,
            pause=PAUSE,
            lease=LEASE,
            retention=21.0,
            life=86_400.0,
            buckets=buckets,
            asks=asks,
        )

    def send(self, request: Request) -> Response:
        self.sent = request
        names, said = request.encode()
        answer = self.redis.execute(names, said, sha=SHA, script=SCRIPT)
        return Response.decode(answer, self.sent)

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


@pytest.mark.parametrize(("others_are_served", "pause"), [(False, PAUSE), (True, 0.0)])
def test_permits_stop_after_an_outage_only_if_no_other_process_had_answers(
    clock: Clock, redis: FakeRedis, others_are_served: bool, pause: float
) -> None:
    """All of them may have sent messages meanwhile, and may have lost the answers."""
    one, two = Process(redis, "one"), Process(redis, "two")
    clock.at += 60
    two.ask(("a", 1, 9))
    answer = one.ask(("a", 1, 9))
    for _ in range(12):
        clock.at += 0.5
        request = attrs.evolve(two.request([], []), stops_grants_if_silent=not others_are_served)
        two.send(request)
        answer = one.send(attrs.evolve(one.request([], []), stops_grants_if_silent=True))
    assert answer.pause == pause
