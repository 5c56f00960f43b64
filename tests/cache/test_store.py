"""Which answers are cached, and where, in virtual time."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from crustcredits import (
    ApiKey,
    ConfigurationError,
    CreditsClient,
)
from tests.cache.calls import KEY, UNKNOWN_KEY, counting, outcome
from tests.virtual import FakeServer, Reply, fake_client, keys

pytestmark = pytest.mark.virtual


# --- max_age


async def test_at_most_max_entries_answers_are_cached() -> None:
    """The least recently used are evicted first; failures count too."""
    server = FakeServer(
        lambda name, times: Reply(credits=str(times)) if name != "bad" else UNKNOWN_KEY
    )
    one, two, three = keys(3)
    async with fake_client(server, max_entries=2) as client:
        await client.check([one, two])
        await client.balance(one, max_age=60)
        await client.balance(three)
        assert (await outcome(client, one, max_age=60)).source == "cached"
        assert (await outcome(client, two, max_age=60)).source == "fetched"
        await outcome(client, ApiKey("secret-bad", name="bad"))
        assert client.peek(one) is None
    with pytest.raises(
        ConfigurationError, match="max_entries must be a whole number of at least 1"
    ):
        CreditsClient(max_entries=0)


async def test_no_secret_is_part_of_a_cache_key() -> None:
    """No dictionary of the process has a secret as its key."""
    # Made at run time, so that the dictionaries of this module do not hold it.
    secret = f"a-secret-{id(counting)}"
    async with fake_client(FakeServer()) as client:
        await client.balance(secret)
        dictionaries: list[dict[Any, Any]] = [
            each for each in gc.get_objects() if isinstance(each, dict)
        ]
        digest = ApiKey(secret).digest
        assert any(("/user/credits", digest) in each for each in dictionaries)
        assert not [
            each
            for each in dictionaries
            if any(secret in str(key) for key in list(each) if isinstance(key, (str, tuple)))
        ]


# --- stale_while_revalidate


async def test_401_and_402_drop_the_cached_balance_on_both_endpoints() -> None:
    """A 403 does not: permissions differ."""
    for status, is_left in ((401, False), (402, False), (403, True)):
        server = FakeServer(counting(Reply(), Reply(status=status, body="{}")))
        async with fake_client(server) as client:
            await client.balance(KEY)
            assert not (await outcome(client, detail=True)).ok
            assert (client.peek(KEY) is not None) is is_left
