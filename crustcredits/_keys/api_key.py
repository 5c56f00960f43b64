"""`ApiKey`, a secret that never prints; `UnusableKey`, its placeholder in a pool.

This module knows nothing of pools, files, requests or balances. A problem is returned as a value,
and raised only when no frame holds a secret any more: many tools print tracebacks with local
variables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, TypeAlias, runtime_checkable

import attrs

from crustcredits._errors import ConfigurationError
from crustcredits._keys.checks import (
    is_likely_key,
    label_problem,
    looks_secret,
    secret_problem,
    setting_problem,
    slash_problem,
    trimmed,
)

KEY_VARIABLE: Final = "CRUSTDATA_API_KEY"
KEYS_VARIABLE: Final = "CRUSTDATA_API_KEYS"


@runtime_checkable
class SecretValue(Protocol):
    """An object that holds a secret, such as pydantic's `SecretStr`."""

    def get_secret_value(self) -> str:
        """The secret in the clear."""
        ...


@attrs.frozen
class Unreadable:
    """Replaces a secret that could not be read; `error` is the name of the exception."""

    error: str


class ApiKey:
    """One Crustdata API key: a secret with a name, and the account whose balance it draws from.

    Args:
        secret: The key itself, a `str` or a `SecretStr`. Outer white space and a byte-order mark
            are dropped.
        name: A name for people, unique within an account. The default is a short fingerprint that
            gives nothing of the secret away.
        account: Keys with the same account share one balance, and a report counts it once. The API
            does not tell which keys share an account, so only you can.

    Raises:
        ConfigurationError: The secret cannot be an API key: it is empty, a placeholder or a URL, or
            holds white space, commas, quotation marks, brackets or characters outside ASCII. Or the
            name or the account is empty or unprintable, holds a `/` that would make the label
            ambiguous, or gives a secret away.

    Only `get_secret_value()` returns the secret: no attribute holds it in the clear, and the key
    neither prints nor pickles it. Keys are equal when secret, name and account are equal.
    """

    __slots__ = ("__weakref__", "_account", "_digest", "_name", "_reveal")

    _account: str | None
    _digest: bytes
    _name: str
    _reveal: Callable[[], str]  # a closure, because tools that print an object print its attributes

    def __init__(
        self, secret: str | SecretValue, *, name: str | None = None, account: str | None = None
    ) -> None:
        self._name, self._account = (
            "unfinished",
            None,
        )  # a traceback with local variables prints this half-made key
        clear = clear_text(secret)
        problem = _problem(clear, name, account)
        if problem is not None:
            key_name = printable_label(clear, name, account)
            del secret, clear, name, account
            raise ConfigurationError(problem, key_name=key_name)
        self._fill(clear, name, account)

    def _fill(self, secret: object, name: object, account: object) -> None:
        """Set the parts, which have been checked."""
        assert isinstance(secret, str)
        assert name is None or isinstance(name, str)
        assert account is None or isinstance(account, str)
        kept = trimmed(secret)
        self._reveal = lambda: kept
        self._digest = digest_of(kept)
        self._name = f"key-{self._digest[:6].hex()}" if name is None else name.strip()
        self._account = None if account is None else account.strip()

    def get_secret_value(self) -> str:
        """The key itself, for sending and never for display."""
        return self._reveal()

    @property
    def name(self) -> str:
        """The name for people; unique within its account."""
        return self._name

    @property
    def account(self) -> str | None:
        """The declared account, from which the key draws its balance, or None."""
        return self._account

    @property
    def label(self) -> str:
        """`account/name` where an account is declared, else the name.

        Errors, logs, tables, JSON and routers show this label.
        """
        return self._name if self._account is None else label_of(self._name, self._account)

    @property
    def digest(self) -> bytes:
        """16 bytes, equal for equal secrets, that give nothing of them away."""
        return self._digest

    def __repr__(self) -> str:
        account = "" if self._account is None else f", account={self._account!r}"
        return f"ApiKey('***', name={self._name!r}{account})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ApiKey):
            return NotImplemented
        return (self._digest, self._name, self._account) == (
            other._digest,
            other._name,
            other._account,
        )

    def __hash__(self) -> int:
        return hash((self._digest, self._name, self._account))

    def __copy__(self) -> ApiKey:
        return self

    def __deepcopy__(self, memo: object) -> ApiKey:
        return self

    def __getstate__(self) -> NoReturn:
        raise _not_pickled()

    def __reduce__(self) -> NoReturn:
        raise _not_pickled()


@attrs.frozen(kw_only=True)
class UnusableKey:
    """The placeholder of a key that cannot be used, so that the rest of its pool can be checked.

    It holds no secret.

    Attributes:
        name: The given name; without one that may be shown, the key's position, such as `keys[3]`.
        account: The declared account, or None.
        error: The reason why the key cannot be used, and the remedy.
    """

    name: str
    account: str | None = None
    error: ConfigurationError = attrs.field(eq=str)

    @property
    def label(self) -> str:
        """`account/name` where an account is declared, else the name."""
        return label_of(self.name, self.account)

    @property
    def digest(self) -> bytes:
        """16 bytes, different from those of other keys."""
        return hashlib.blake2b(
            f"{self.label}\n{self.error}".encode(), digest_size=16, person=b"unusable"
        ).digest()


#: One key.
# A key of a pool.
Key: TypeAlias = ApiKey | UnusableKey
KeyLike: TypeAlias = str | SecretValue | ApiKey | UnusableKey


def digest_of(secret: str) -> bytes:
    """16 bytes, equal for equal secrets, that give nothing of them away."""
    return hashlib.blake2b(secret.encode(), digest_size=16, person=b"crustcredits").digest()


def label_of(name: str, account: str | None) -> str:
    """`account/name`, or the name without an account."""
    return name if account is None else f"{account}/{name}"


def split_label(label: str) -> tuple[str | None, str]:
    """Account and name of a label, split at the first `/`, because an account holds none."""
    account, slash, name = label.partition("/")
    return (account, name) if slash else (None, label)


def unusable(problem: str, name: str, account: str | None = None) -> UnusableKey:
    """An `UnusableKey` with this problem."""
    return UnusableKey(
        name=name,
        account=account,
        error=ConfigurationError(problem, key_name=label_of(name, account)),
    )


def as_key(key: object, *, label: object = None, place: str = "the key") -> ApiKey | UnusableKey:
    """A caller's key as an `ApiKey`, under `label` if given, or an `UnusableKey`; never raises.

    Callers rebind their own variable to the result before anything can be raised.
    """
    if isinstance(key, UnusableKey) or (isinstance(key, ApiKey) and label is None):
        return key
    account, name = split_label(label) if isinstance(label, str) else (None, label)
    if isinstance(key, ApiKey) and key.account is not None:
        if account not in {None, key.account}:
            return unusable(
                "the label and the ApiKey declare different accounts; keep the right one", place
            )
        account = key.account
    secret = clear_text(key)
    problem = setting_problem(name, account, secret)
    if problem is not None:
        return unusable(problem, printable_label(secret, name, account) or place)
    return make_key(secret, name, account, place=place)


def make_key(secret: object, name: object, account: object, *, place: str) -> ApiKey | UnusableKey:
    """The key of these parts, or an `UnusableKey` with the reason.

    The `UnusableKey` is named by `place` where its label must not be shown.
    """
    problem = _problem(secret, name, account)
    if problem is not None:
        label = printable_label(secret, name, account)
        shown_account, shown_name = (None, place) if label is None else split_label(label)
        return unusable(problem, shown_name, shown_account)
    key = ApiKey.__new__(ApiKey)  # its __init__ would repeat the checks
    key._fill(secret, name, account)  # noqa: SLF001  # of this module
    return key


def clear_text(secret: object) -> object:
    """The secret of an object such as a `SecretStr`, or `Unreadable` when its method raised.

    Any other value is returned as it is.
    """
    if type(secret) is str:  # the usual case; the check against the protocol is slow
        return secret
    if isinstance(secret, type) or not isinstance(secret, SecretValue):
        return secret
    try:
        return secret.get_secret_value()
    except Exception as error:  # noqa: BLE001  # of a vault or a cipher: only this key fails
        return Unreadable(type(error).__name__)


def _problem(secret: object, name: object, account: object) -> str | None:
    if isinstance(secret, Unreadable):
        return (
            f"the API key cannot be read: its get_secret_value() raised {secret.error}; repair the "
            "source of the secret"
        )
    return (
        secret_problem(secret)
        or label_problem("name", name, secret)
        or label_problem("account", account, secret)
        or slash_problem(name, account)
    )


def printable_label(secret: object, name: object, account: object) -> str | None:
    """The label of an unusable key, or None without one or where it may give a secret away."""
    usable = (
        label_problem("name", name, secret)
        or label_problem("account", account, secret)
        or slash_problem(name, account)
    )
    if (
        usable is not None
        or not isinstance(name, str)
        or any(looks_secret(part) or is_likely_key(part) for part in (name, account))
    ):
        return None  # secret and name may be swapped
    return label_of(name.strip(), account.strip() if isinstance(account, str) else None)


def _not_pickled() -> TypeError:
    return TypeError(
        "an ApiKey is not pickled, so that its secret is never written out; pass its label, "
        "and read the secret in the other process"
    )
