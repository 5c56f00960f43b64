"""The context in which a request runs, over sockets: tracing spans and eager task factories."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp
import pytest
from opentelemetry.instrumentation.aiohttp_client import create_trace_config
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from crustcredits import ApiKey, CreditsClient, RateLimit
from crustcredits.testing import SandboxServer

COUNT = 50


class Tracing:
    """Spans of the requests of one client, and of its callers."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("tests")

    def spans(self) -> tuple[list[ReadableSpan], dict[int, str]]:
        """The spans of requests, and the names of the other spans by their ids."""
        spans = self.exporter.get_finished_spans()
        requests = [span for span in spans if span.name.startswith("GET")]
        others = {
            span.context.span_id: span.name
            for span in spans
            if span not in requests and span.context is not None
        }
        return requests, others


@pytest.fixture
async def traced(sandbox: SandboxServer) -> AsyncIterator[tuple[Tracing, CreditsClient]]:
    tracing = Tracing()
    config = create_trace_config(tracer_provider=tracing.provider)
    limit = RateLimit(pace=1000.0)
    async with (
        aiohttp.ClientSession(trace_configs=[config]) as session,
        # Most calls wait for a connection slot, and the end of another call's request starts them.
        CreditsClient(
            base_url=sandbox.url, session=session, rate_limit=limit, concurrency=4
        ) as client,
    ):
        yield tracing, client


def parents(requests: list[ReadableSpan], others: dict[int, str]) -> list[str]:
    return [
        others.get(0 if span.parent is None else span.parent.span_id, "none") for span in requests
    ]


async def test_each_request_has_the_span_of_its_caller_as_parent(
    sandbox: SandboxServer, traced: tuple[Tracing, CreditsClient]
) -> None:
    """Also if the end of another call has started the request. No span shows a secret."""
    tracing, client = traced
    keys = [sandbox.add_key(f"k{number}") for number in range(COUNT)]

    async def ask(key: ApiKey) -> None:
        with tracing.tracer.start_as_current_span(key.name):
            await client.balance(key)

    await asyncio.gather(*map(ask, keys))
    requests, others = tracing.spans()
    assert sorted(parents(requests, others)) == sorted(key.name for key in keys)
    assert not any(key.get_secret_value() in span.to_json() for span in requests for key in keys)


async def test_the_requests_of_a_check_have_its_span_as_parent(
    sandbox: SandboxServer, traced: tuple[Tracing, CreditsClient]
) -> None:
    """This holds for every key of the pool."""
    tracing, client = traced
    keys = [sandbox.add_key(f"k{number}") for number in range(COUNT)]
    with tracing.tracer.start_as_current_span("check"):
        assert (await client.check(keys)).ok
    requests, others = tracing.spans()
    assert parents(requests, others) == ["check"] * COUNT


# uvloop 0.22 passes the factory an argument that Python 3.13.0's factory does not accept.
@pytest.mark.any_loop
@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python 3.11 has no eager tasks")
async def test_an_eager_task_factory_changes_nothing(
    sandbox: SandboxServer,
) -> None:
    """The tasks of requests are not made by the factory."""
    keys = [sandbox.add_key(f"k{number}") for number in range(COUNT)]
    loop = asyncio.get_running_loop()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # new in Python 3.12
    try:
        async with CreditsClient(
            base_url=sandbox.url, rate_limit=RateLimit(pace=None), concurrency=4
        ) as client:
            assert (await client.check(keys)).ok
            balances = await asyncio.gather(*map(client.balance, keys))
        assert len(balances) == COUNT
    finally:
        loop.set_task_factory(None)
