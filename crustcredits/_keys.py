"""API keys: a secret that cannot print, and reading many of them from the environment, a file or text.

It knows nothing of requests or balances. What is wrong with a key is worked out as a value and raised only once the
frame no longer holds the secret, because tracebacks are printed with their local variables by many tools.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from crustcredits._errors import ConfigurationError

_SCHEME = re.compile(r"(bearer|token)(\s|$)", re.IGNORECASE)
_COMMENT = re.compile(r"(^|\s)#.*")
_BYTE_ORDER_MARK = "\ufeff"


class ApiKey:
    """One Crustdata API key: its secret, what people call it, and whose balance it draws from.

    Args:
        secret: The key itself. Outer white space and a byte-order mark are dropped.
        name: What reports, logs and errors call it. Without one it is called by a short fingerprint of the secret,
            which gives nothing of it away.
        account: Keys that name the same account share one balance: a report counts it once. The API does not tell
            which keys share an account, so only you can.

    Raises:
        ConfigurationError: The secret is empty, holds white space, control or non-ASCII characters, or begins with
            `Bearer ` or `Token `; or the name or account is empty, unprintable, or gives the secret away.

    It does not print, pickle or compare by anything but its parts; `secret` is the one way to the secret.
    """

    __slots__ = ("__weakref__", "_account", "_digest", "_name", "_secret")

    _secret: str
    _digest: bytes
    _name: str
    _account: str | None

    def __init__(self, secret: str, *, name: str | None = None, account: str | None = None) -> None:
        problem = _secret_problem(secret) or _label_problem("name", name, secret) or _label_problem("account", account, secret)
        if problem is not None:
            key_name = _printable(name, secret)
            self._name, self._account = "refused", None  # a traceback with local variables prints this half-made key
            del secret, name, account
            raise ConfigurationError(problem, key_name=key_name)
        secret = _trimmed(secret)
        self._secret = secret
        self._digest = hashlib.blake2b(secret.encode(), digest_size=16, person=b"crustcredits").digest()
        self._name = f"key-{self._digest[:6].hex()}" if name is None else name.strip()
        self._account = None if account is None else account.strip()

    @property
    def secret(self) -> str:
        """The key itself, to be sent and never to be shown."""
        return self._secret

    @property
    def name(self) -> str:
        """What people call the key."""
        return self._name

    @property
    def account(self) -> str | None:
        """The account whose balance it draws from, if declared."""
        return self._account

    @property
    def digest(self) -> bytes:
        """16 bytes that are equal for equal secrets and give nothing of them away."""
        return self._digest

    def __repr__(self) -> str:
        account = "" if self._account is None else f", account={self._account!r}"
        return f"ApiKey('***', name={self._name!r}{account})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ApiKey):
            return NotImplemented
        return (self._digest, self._name, self._account) == (other._digest, other._name, other._account)

    def __hash__(self) -> int:
        return hash((self._digest, self._name, self._account))

    def __copy__(self) -> ApiKey:
        return self

    def __deepcopy__(self, memo: object) -> ApiKey:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ApiKey is not pickled, so that its secret is never written out; pass its name and read the secret there"
        )


#: One key.
KeyLike: TypeAlias = str | ApiKey
#: Many keys: an iterable of them, or a mapping of name to key.
KeysLike: TypeAlias = Iterable[KeyLike] | Mapping[str, KeyLike] | Mapping[str, str]


class RefusedKey(ApiKey):
    """Stands in a pool for a key that cannot be used, so that the others can be checked; it has no secret."""

    __slots__ = ("error",)

    error: ConfigurationError

    def __init__(self, message: str, *, name: str, account: str | None = None) -> None:
        self._secret = ""
        self._digest = hashlib.blake2b(name.encode(), digest_size=16, person=b"refused").digest()
        self._name = name
        self._account = account
        self.error = ConfigurationError(message, key_name=name)


def as_key(key: object, *, name: str | None = None, place: str = "the key") -> ApiKey:
    """Make an `ApiKey` of what a caller gave; a `RefusedKey` with the reason where that is impossible, never a raise.

    Callers rebind their own variable to the result before anything can be raised.
    """
    if isinstance(key, ApiKey) and name is None:
        return key
    account = key.account if isinstance(key, ApiKey) else None
    secret = key.secret if isinstance(key, ApiKey) else key
    problem = _secret_problem(secret) or _label_problem("name", name, secret)
    if problem is not None:
        return RefusedKey(problem, name=_printable(name, secret) or place)
    assert isinstance(secret, str)
    return ApiKey(secret, name=name, account=account)


def as_keys(keys: object) -> Iterator[ApiKey] | ConfigurationError:
    """The keys of a pool, lazily; the error, not raised, when this is no pool at all, such as a lone `str`."""
    problem = _pool_problem(keys)
    if problem is not None:
        return ConfigurationError(problem)
    # Iterators do not print what they iterate over; and what can be changed meanwhile is copied.
    if isinstance(keys, Mapping):
        return _each_named(iter(tuple(keys.items())))
    assert isinstance(keys, Iterable)
    return _each(iter(tuple(keys) if isinstance(keys, AbstractSet) else keys))


def _each(keys: Iterator[Any]) -> Iterator[ApiKey]:
    for number, key in enumerate(keys):
        if type(key) is not ApiKey:
            key = as_key(key, place=f"keys[{number}]")  # noqa: PLW2901  # so that this frame does not hold the secret
        yield key


def _each_named(keys: Iterator[tuple[Any, Any]]) -> Iterator[ApiKey]:
    for number, (name, key) in enumerate(keys):
        key = as_key(key, name=name, place=f"keys[{number}]")  # noqa: PLW2901  # as above
        yield key


async def as_keys_async(keys: AsyncIterable[KeyLike]) -> AsyncGenerator[ApiKey, None]:
    """The keys of an asynchronous source, as they come. However it ends, the source is closed, if it can be."""
    source, number = aiter(keys), 0
    try:
        async for key in source:
            key = as_key(key, place=f"keys[{number}]")  # noqa: PLW2901  # as above
            number += 1
            yield key
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


def refuse_contradictions(keys: Iterable[ApiKey]) -> None:
    """Refuse a pool whose report could not be right.

    Raises:
        ConfigurationError: Two different keys have one name, or one secret stands under two accounts.
    """
    by_name: dict[str, ApiKey] = {}
    accounts: dict[bytes, ApiKey] = {}
    for key in keys:
        if isinstance(key, RefusedKey):
            continue
        if by_name.setdefault(key.name, key).digest != key.digest:
            raise ConfigurationError("two different keys have this name; give each a name of its own", key_name=key.name)
        if key.account is None:
            continue
        declared = accounts.setdefault(key.digest, key)
        if declared.account != key.account:
            raise ConfigurationError(
                f"its secret stands under two accounts, {declared.account!r} and {key.account!r}; keep the right one",
                key_name=key.name,
            )


def keys_from_text(text: str) -> list[ApiKey]:
    """Read keys from text: one a line or divided by commas, each `secret`, `name=secret` or `account/name=secret`.

    A `#` at the start of a line or after white space begins a comment. A secret that holds a `=` needs a name before it.

    Raises:
        ConfigurationError: A line is wrong (it is named by its number), two keys have one name, or one secret stands
            under two accounts.
    """
    problem = _text_problem(text)
    if problem is not None:
        del text
        raise ConfigurationError(problem)
    text = _Lines(text)
    return _keys_from_text(text, source="line")


def keys_from_file(path: str | os.PathLike[str]) -> list[ApiKey]:
    """Read keys from a UTF-8 file as `keys_from_text` does.

    Raises:
        ConfigurationError: The file cannot be read, or what `keys_from_text` says.
    """
    text, problem = "", None
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except (TypeError, ValueError):
        problem = "that is no path"
    if problem is not None:
        raise ConfigurationError(f"the keys file {str(path)!r} cannot be read: {problem}")
    text = _Lines(text)
    return _keys_from_text(text, source=f"{Path(path).name}, line")


def keys_from_env(environ: Mapping[str, str] | None = None) -> list[ApiKey]:
    """Read keys from the environment: `CRUSTDATA_API_KEY`, one secret, and `CRUSTDATA_API_KEYS`, as `keys_from_text` reads.

    A secret that stands in both is kept once, under the name it has in `CRUSTDATA_API_KEYS`. Returns an empty list when
    neither is set.

    Raises:
        ConfigurationError: One of them cannot be used.
    """
    environ = os.environ if environ is None else environ
    lines = _Lines(environ.get("CRUSTDATA_API_KEYS", ""))
    single = as_key(environ.get("CRUSTDATA_API_KEY", ""), place="CRUSTDATA_API_KEY")
    single_is_set = bool(environ.get("CRUSTDATA_API_KEY", "").strip())
    del environ
    pool = _keys_from_text(lines, source="CRUSTDATA_API_KEYS, line")
    if not single_is_set:
        return pool
    if isinstance(single, RefusedKey):
        raise single.error
    return pool if single.digest in {key.digest for key in pool} else [single, *pool]


class _Lines(str):
    """Text that holds secrets, in a shape that a traceback with local variables does not print."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{len(self.splitlines())} lines of keys>"


def _keys_from_text(text: str, *, source: str) -> list[ApiKey]:
    text = _Lines(text.removeprefix(_BYTE_ORDER_MARK))
    pool = [
        key for number, line in enumerate(map(_Lines, text.splitlines()), 1) for key in _keys_of_line(line, f"{source} {number}")
    ]
    refused = next((key for key in pool if isinstance(key, RefusedKey)), None)
    if refused is not None:
        raise refused.error
    refuse_contradictions(pool)
    return pool


def _keys_of_line(line: str, place: str) -> Iterator[ApiKey]:
    for entry in _COMMENT.sub("", line).split(","):
        if entry.strip():
            yield _key_of_entry(entry.strip(), place)


def _key_of_entry(entry: str, place: str) -> ApiKey:
    label, equals, secret = entry.partition("=")
    if not equals:
        return as_key(entry, place=place)
    account, slash, name = label.rpartition("/")
    problem = (
        _secret_problem(secret)
        or _padding_problem(secret)
        or _label_problem("name", name, secret)
        or (_label_problem("account", account, secret) if slash else None)
    )
    if problem is not None:
        return RefusedKey(problem, name=place)
    return ApiKey(secret, name=name, account=account if slash else None)


def _trimmed(secret: str) -> str:
    return secret.strip().removeprefix(_BYTE_ORDER_MARK).strip()


def _secret_problem(secret: object) -> str | None:
    if not isinstance(secret, str):
        hint = "; decode it first" if isinstance(secret, bytes) else ""
        return f"an API key is a str or an ApiKey, not {type(secret).__name__}{hint}"
    secret = _trimmed(secret)
    if not secret:
        return "the API key is empty; is its variable set?"
    if _SCHEME.match(secret):
        return "the API key begins with 'Bearer' or 'Token'; give the bare key, the scheme is added when it is sent"
    if secret[0] in "'\"" or secret[-1] in "'\"":
        return "the API key begins or ends with a quotation mark; give it bare"
    if not secret.isascii():
        return "the API key holds characters outside ASCII; copy it again from where it was issued"
    if not secret.isprintable() or " " in secret:
        return "the API key holds white space or control characters inside; is it one key, copied whole?"
    return None


def _padding_problem(secret: str) -> str | None:
    # A bare secret in base64, whose end looks like an empty value; taken for a name, it would be printed.
    return (
        None if secret.strip().strip("=") else "nothing but '=' stands behind a name; a key that ends in '=' needs a name before it"
    )


def _text_problem(text: object) -> str | None:
    return None if isinstance(text, str) else f"keys are read from a str, not {type(text).__name__}; decode it first"


def _label_problem(what: str, label: object, secret: object) -> str | None:
    if label is None:
        return None
    if not isinstance(label, str):
        return f"the {what} of an API key is a str, not {type(label).__name__}"
    label = label.strip()
    if not label:
        return f"the {what} of the API key is empty; leave it out or say what to call it"
    if not label.isprintable():
        return f"the {what} of the API key holds unprintable characters"
    if label[0] in "'\"" or label[-1] in "'\"":
        return f"the {what} of the API key begins or ends with a quotation mark; are there quotes around all of it?"
    if _gives_away(label, secret):
        return f"the {what} of the API key holds its secret; give it another, because it is printed"
    return None


def _gives_away(label: str, secret: object) -> bool:
    # A short secret (in a test, say) may stand inside an innocent word; a real one never does.
    bare = _trimmed(secret) if isinstance(secret, str) else ""
    return label == bare or (len(bare) >= 8 and bare in label)


def _printable(name: object, secret: object) -> str | None:
    usable = isinstance(name, str) and _label_problem("name", name, secret) is None
    return name.strip() if isinstance(name, str) and usable else None


def _pool_problem(keys: object) -> str | None:
    if isinstance(keys, (str, bytes, bytearray, ApiKey)):
        return f"many keys are expected here and this is one ({type(keys).__name__}); put it in a list: [key]"
    if isinstance(keys, AsyncIterable) and not isinstance(keys, Iterable):
        return "an asynchronous source of keys goes to stream(); this takes an iterable or a mapping of name to secret"
    if not isinstance(keys, (Iterable, Mapping)):
        return f"keys are an iterable of str or ApiKey, or a mapping of name to secret, not {type(keys).__name__}"
    return None
