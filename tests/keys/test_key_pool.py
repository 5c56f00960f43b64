"""Pools: iterables and mappings of keys, and the contradictions between keys."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from crustcredits import ApiKey, ConfigurationError, UnusableKey
from crustcredits._keys.api_key import as_key
from crustcredits._keys.key_pool import as_keys, contradiction

SECRET = "sk-0123456789abcdef"


def test_a_pool_is_an_iterable_or_a_mapping() -> None:
    """It holds secrets and keys, in their order."""
    prod = ApiKey("s-prod", name="prod", account="acme")
    listed = as_keys(iter([prod, "s-2"]))
    assert isinstance(listed, Iterator)
    assert next(listed) is prod
    second = next(listed)
    assert isinstance(second, ApiKey)
    assert second.get_secret_value() == "s-2"
    mapped = as_keys({"one": "s-1", "acme/two": prod, "globex/three": "s-3"})
    assert isinstance(mapped, Iterator)
    assert [(key.label, key.get_secret_value()) for key in mapped if isinstance(key, ApiKey)] == [
        ("one", "s-1"),
        ("acme/two", "s-prod"),
        ("globex/three", "s-3"),
    ]


@pytest.mark.parametrize("lone", ["sk-1", b"sk-1", bytearray(b"sk-1"), ApiKey("sk-1")])
def test_a_single_key_is_refused_as_a_pool(lone: object) -> None:
    """A str would be read letter by letter."""
    refusal = as_keys(lone)
    assert isinstance(refusal, ConfigurationError)
    assert "put it in a list" in str(refusal)
    assert "sk-1" not in str(refusal)


def test_a_value_that_is_no_pool_is_refused() -> None:
    """The error names the remedy."""
    assert "not an int" in str(as_keys(7))

    async def source() -> None: ...

    class Source:
        def __aiter__(self) -> None: ...

    assert "give it to stream()" in str(as_keys(Source()))


def test_an_unusable_key_does_not_fail_its_pool() -> None:
    """It is named by its name in a mapping, else by its position."""
    refused = list(as_keys(["s-1", "", b"s-3"]))  # type: ignore[arg-type]  # an Iterator here
    assert [key.name for key in refused[1:]] == ["keys[1]", "keys[2]"]
    assert all(isinstance(key, UnusableKey) for key in refused[1:])
    named = list(as_keys({"empty": "", "sk-0123456789": "sk-0123456789", 3: "s-3"}))  # type: ignore[arg-type]  # as above
    assert [key.name for key in named] == ["empty", "keys[1]", "keys[2]"]


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        (
            [ApiKey("s-1", name="prod"), ApiKey("s-2", name="prod")],
            "prod: two different keys have this label",
        ),
        (
            [ApiKey("s-1", name="a", account="acme"), ApiKey("s-1", name="b", account="emca")],
            "b: the secret of the key is declared under two accounts, 'acme' and 'emca'",
        ),
    ],
)
def test_a_contradictory_pool_is_refused(pool: list[ApiKey], said: str) -> None:
    """No report of it could be right."""
    assert said in str(contradiction(pool))


def test_one_secret_may_have_two_names() -> None:
    """It may occur with its account and without; unusable keys never contradict others."""
    twice = [
        ApiKey("s-1", name="a", account="acme"),
        ApiKey("s-1", name="b"),
        ApiKey("s-1", name="a", account="acme"),
    ]
    assert contradiction([*twice, as_key(""), as_key("")]) is None


def test_an_environment_is_refused_as_a_pool() -> None:
    """Its other values would be sent as keys."""
    for environ in (
        os.environ,
        {"CRUSTDATA_API_KEY": SECRET, "DATABASE_URL": "x"},
        {"CRUSTDATA_API_KEYS_FILE": "x"},
        {"PATH": "x"},
    ):
        assert "read it with keys_from_env()" in str(as_keys(environ))
    assert "read it with keys_from_records([row])" in str(
        as_keys({"secret": SECRET, "name": "production-key"})
    )


def test_a_mapping_of_secret_to_name_does_not_show_the_secret() -> None:
    """Each key fails on its own, named by its position."""
    for name in (
        "prod",
        "jane.doe@example-company.com",
        "Acme Corp, Inc. (prod)",
        "https://api.crustdata.com/x",
        "${CRUSTDATA_API_KEY}",
    ):
        pool = as_keys({SECRET: name})
        assert isinstance(pool, Iterator)
        (key,) = pool
        assert isinstance(key, UnusableKey)
        assert SECRET not in f"{key!r} {key.error} {key.label}"


def test_a_pool_that_changes_during_iteration_is_read_as_it_was() -> None:
    """Mappings and sets are copied first."""
    mapping, secrets = {"a": "s-1", "b": "s-2"}, {"s-3", "s-4"}
    named, bare = as_keys(mapping), as_keys(secrets)
    assert isinstance(named, Iterator)
    assert isinstance(bare, Iterator)
    next(named), next(bare)
    mapping["c"] = "s-5"
    secrets.add("s-6")
    assert [key.name for key in named] == ["b"]
    assert len(list(bare)) == 1
