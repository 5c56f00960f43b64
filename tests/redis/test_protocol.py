"""The script's requests and answers as records."""

from __future__ import annotations

import math
from typing import Any

import attrs
import pytest

from crustcredits.redis.protocol import (
    AnswerOperation,
    AnswersPart,
    BadReplyError,
    BucketReport,
    BucketState,
    FindAnswer,
    Found,
    FoundAnswer,
    FreeAnswer,
    InvalidateAnswer,
    PermitRequest,
    PublishAnswer,
    Request,
    Response,
)

REQUEST = Request(
    marker="{p}:epoch",
    process="one",
    number=7,
    epoch=11,
    fresh=12,
    stops_grants=True,
    still=1.0,
    grace=2.0,
    clock=1_700_000_000_000_000,
    age=0.25,
    tolerance=2.0,
    pause=1.25,
    lease=81.0,
    retention=21.0,
    life=86_400.0,
    is_strict=True,
    share=1 / 3,
    silence=5.0,
    buckets=[
        BucketReport(
            name="{p}:a", waits=3, most=250, returns=[(3, 60.0000001), (4, -0.5)], unused=[5]
        ),
        BucketReport(name="{p}:all"),
    ],
    asks=[
        PermitRequest(wanted=2, first=100, limits=[(0, 290), (1, 300)]),
        PermitRequest(wanted=1, first=102, limits=[(1, 270)]),
    ],
)


def test_a_request_is_names_and_numbers_in_the_order_of_the_script() -> None:
    """Durations are whole microseconds, rounded up; the marker's life is in milliseconds."""
    names, said = REQUEST.encode()
    assert names == [
        "{p}:epoch",
        "{p}:epoch:one",
        "{p}:epoch:shares",
        "{p}:a",
        "{p}:a:line",
        "{p}:all",
        "{p}:all:line",
    ]
    process = [7, 11, 12, 1, 1_000_000, 2_000_000, 1_700_000_000_000_000, 250_000, 2_000_000]
    durations = [1_250_000, 81_000_000, 21_000_000, 86_400_000]
    strict = [1, 0, 333_333_333, 1, 5_000_000, 0]
    buckets = [3, 250, 2, 1, 3, 60_000_001, 4, -500_000, 5, 0, 0, 0, 0]
    asks = [2, 100, 1, 290, 2, 300, 1, 102, 2, 270, 0, 0]
    numbers = [*process, *durations, *strict, *buckets, *asks]
    assert said == ["one", " ".join(map(str, numbers))]


@pytest.mark.parametrize(("is_strict", "others"), [(True, "shares"), (False, "busy")])
def test_strict_processes_have_a_key_of_their_own(is_strict: bool, others: str) -> None:
    names, _ = attrs.evolve(REQUEST, is_strict=is_strict).encode()
    assert names[2] == "{p}:epoch:" + others


def test_shared_answers_travel_as_numbers_and_one_text() -> None:
    """Times are whole microseconds; an age without end is a long one."""
    operations: list[AnswerOperation] = [
        PublishAnswer(name="abc", asked=5, kept=60.0, is_error=True, value="e30=", frees=False),
        FreeAnswer(name="de"),
        InvalidateAnswer(name="*"),
        FindAnswer(name="f", max_age=1.0, max_error_age=math.inf, usable_age=0.0),
    ]
    part = AnswersPart(operations=operations, fetches=True, lease=5.0, most=9, memory=600.0)
    request = attrs.evolve(REQUEST, answers=part)
    names, (_, said, texts) = request.encode()
    assert names[-3:] == [f"{{p}}:epoch:answers{part}" for part in ("", ":times", ":fetchers")]
    assert texts == "abce30=de*f"
    publish = [2, 3, 4, 5, 60_000_000, 2, 0]
    rest = [3, 2, 4, 1, 1, 1, 1_000_000, 100_000_000_000_000, 0]
    numbers = [1, 4, 1, 5_000_000, 9, 600_000_000, *publish, *rest]
    assert " ".join(map(str, numbers)) in said


def test_values_of_shared_answers_follow_in_a_second_line() -> None:
    find = FindAnswer(name="f", max_age=1.0, max_error_age=1.0, usable_age=1.0)
    part = AnswersPart(operations=[find] * 3, fetches=True, lease=5.0, most=9, memory=600.0)
    request = attrs.evolve(REQUEST, answers=part)
    answer = b"1 11 0 99 1 2500000 5 2 0 0 3 7 3 8 0 3 0 300 2 0 0 2 0\n1e30=2AA"
    assert Response.decode(answer, request).answers == (
        FoundAnswer(found=Found.YES, age=2.5, value="e30="),
        FoundAnswer(found=Found.OTHER_FETCHES),
        FoundAnswer(found=Found.FETCH, age=7e-6, is_error=True, value="AA"),
    )


def test_an_answer_has_the_state_of_each_bucket_and_what_was_granted() -> None:
    answer = "1 11 500000 99 8 0 3 0 300 2 0 2 1000000 2500000 2 0"
    assert Response.decode(answer, REQUEST) == Response(
        is_known=True,
        epoch=11,
        pause=0.5,
        clock=99,
        buckets=(
            BucketState(out=8, missing=0, free=3, returns=[]),
            BucketState(out=300, missing=2, free=0, returns=[1.0, 2.5]),
        ),
        granted=(2, 0),
    )


@pytest.mark.parametrize("answer", ["0 12 0 99", b"0 12 0 99"])
def test_an_answer_may_come_as_text_or_bytes(answer: str | bytes) -> None:
    """A client may decode answers itself."""
    assert Response.decode(answer, REQUEST) == Response(
        is_known=False, epoch=12, pause=0.0, clock=99
    )


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"OK",
        [],
        b"",
        b"1 2",
        b"1 11 0 99",
        b"1 11 0 99 8 0 0 0 1 1 0",
        b"1 11 0 99 8 0 0 0 1 1 0 0 2",
        b"1 11 0 99 8 0 0 1 1 1 0 0 2 0",
        b"1 11 0 99 8 x 0 0 1 1 0 0 2 0",
    ],
)
def test_an_answer_of_another_script_is_refused(answer: Any) -> None:
    with pytest.raises(BadReplyError, match="not from the script; look for a proxy"):
        Response.decode(answer, REQUEST)
