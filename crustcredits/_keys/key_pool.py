"""Many keys as a pool: iterables, mappings and asynchronous sources; contradictions between keys.

This module knows nothing of files, requests or balances. It iterates a source through objects that
do not print it, and no frame keeps a caller's key, because many tools print local variables.
"""

from __future__ import annotations

import os
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    Key,
    KeyLike,
    SecretValue,
    UnusableKey,
    as_key,
)
from crustcredits._validation import kind_of

#: Many keys: an iterable of them, or a mapping of label (`name` or `account/name`) to key.
KeysLike: TypeAlias = Iterable[KeyLike] | Mapping[str, KeyLike] | Mapping[str, str]

# Variable names that tell an environment from a pool of keys.
_ENVIRONMENT = frozenset(
    {
        KEY_VARIABLE,
        KEYS_VARIABLE,
        f"{KEY_VARIABLE}_FILE",
        f"{KEYS_VARIABLE}_FILE",
        "PATH",
        "HOME",
        "PWD",
    }
)


def as_keys(keys: object) -> Iterator[Key] | ConfigurationError:
    """The keys of a pool, lazily; or the error, not raised, for a value such as a single `str`."""
    problem = _pool_problem(keys)
    if problem is not None:
        return ConfigurationError(problem)
    # A `map` does not print its source, unlike some iterators. A source that may change during the
    # iteration is copied.
    if isinstance(keys, Mapping):
        return _each_labelled(iter(tuple(keys.items())))
    assert isinstance(keys, Iterable)
    return _each(map(_same, tuple(keys) if isinstance(keys, AbstractSet) else keys))


def pool_of(keys: object) -> Iterator[Key]:
    """The keys of a pool, lazily.

    Raises:
        ConfigurationError: The value is not a pool.
    """
    pool = as_keys(keys)
    if isinstance(pool, ConfigurationError):
        raise pool
    return pool


def _same(key: Any) -> Any:
    return key


def _each(keys: Iterator[Any]) -> Iterator[Key]:
    for number, key in enumerate(keys):
        if type(key) is not ApiKey:
            key = as_key(key, place=f"keys[{number}]")  # noqa: PLW2901  # so that this frame does not hold the secret
        yield key


def _each_labelled(keys: Iterator[tuple[Any, Any]]) -> Iterator[Key]:
    for number, (label, key) in enumerate(keys):
        key = as_key(key, label=label, place=f"keys[{number}]")  # noqa: PLW2901  # as above
        label = None  # noqa: PLW2901  # a label may be a secret, in a mapping of secret to name
        yield key


def async_pool_of(keys: AsyncIterable[Any]) -> AsyncGenerator[Key, None]:
    """The keys of an asynchronous source, as they come. At the end the source is always closed."""
    source = aiter(keys)

    async def close() -> None:
        if isinstance(source, AsyncGenerator):
            await source.aclose()

    # Functions, unlike some iterators, do not print the source.
    return _each_async(lambda: source, close)


async def _each_async(
    advance: Callable[[], AsyncIterator[Any]], close: Callable[[], Awaitable[None]]
) -> AsyncGenerator[Key, None]:
    number = 0
    try:
        async for key in advance():
            key = as_key(key, place=f"keys[{number}]")  # noqa: PLW2901  # as above
            number += 1
            yield key
    finally:
        await close()


class Uniqueness:
    """Checks the keys of a pool one by one: labels are unique, and a secret has one account."""

    def __init__(self) -> None:
        self._by_label: dict[str, ApiKey] = {}
        self._accounts: dict[bytes, str] = {}

    def take(self, key: ApiKey) -> str | None:
        """Add a key and return None, or return the problem with an earlier key."""
        label, declared = key.label, key.account
        namesake = self._by_label.get(label, key)
        if namesake is not key and namesake.digest != key.digest:
            return (
                "two different keys have this label, but names are unique within an account; "
                "rename one of the two"
            )
        if declared is not None:
            account = self._accounts.setdefault(key.digest, declared)
            if account != declared:
                return (
                    f"the secret of the key is declared under two accounts, {account!r} and "
                    f"{declared!r}; remove the wrong entry"
                )
        self._by_label[label] = key
        return None


def contradiction(keys: Iterable[Key]) -> ConfigurationError | None:
    """The contradiction in a pool, or None: a duplicate label, or one secret under two accounts."""
    taken = Uniqueness()
    for key in keys:
        problem = None if isinstance(key, UnusableKey) else taken.take(key)
        if problem is not None:
            return ConfigurationError(problem, key_name=key.label)
    return None


def _pool_problem(keys: object) -> str | None:
    if isinstance(keys, (str, bytes, bytearray, SecretValue, UnusableKey)):
        return (
            f"keys is one key ({type(keys).__name__}), but many are expected; put it in a list: "
            "[key]"
        )
    if isinstance(keys, type(os.environ)) or (
        isinstance(keys, Mapping) and not _ENVIRONMENT.isdisjoint(keys)
    ):
        return (
            "keys is an environment, and its other values are no API keys; read it with "
            "keys_from_env()"
        )
    if isinstance(keys, Mapping) and "secret" in keys and not {"name", "account"}.isdisjoint(keys):
        return (
            "keys is one row, not a mapping of label to secret; read it with "
            "keys_from_records([row])"
        )
    if isinstance(keys, AsyncIterable) and not isinstance(keys, Iterable):
        return (
            "keys is an asynchronous source, which only stream() takes; give it to stream(), or "
            "give an iterable or a mapping of label to secret"
        )
    if not isinstance(keys, (Iterable, Mapping)):
        return (
            "keys must be an iterable of str or ApiKey, or a mapping of label to secret, not "
            f"{kind_of(keys)}"
        )
    return None
