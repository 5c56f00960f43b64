"""API keys: accepted and refused secrets and labels, and the usual sources."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import pprint
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import rich
from pydantic import SecretStr
from rich.console import Console

from crustcredits import (
    ApiKey,
    ConfigurationError,
    UnusableKey,
    keys_from_env,
    keys_from_file,
    keys_from_text,
)
from crustcredits._keys.api_key import as_key
from crustcredits._keys.key_pool import as_keys

SECRET = "sk-0123456789abcdef"


def test_only_get_secret_value_returns_the_secret() -> None:
    """No attribute, property or state holds it in the clear."""
    key = ApiKey(SECRET, name="prod", account="acme")
    assert key.get_secret_value() == SECRET
    screen = io.StringIO()
    rich.inspect(key, console=Console(file=screen), all=True)
    for shown in (repr(inspect.getmembers(key)), pprint.pformat(key), screen.getvalue()):
        assert SECRET[3:11] not in shown
    assert not [name for name in dir(key) if SECRET in repr(getattr(key, name))]
    with pytest.raises(TypeError, match="not pickled"):
        key.__getstate__()
    with pytest.raises(TypeError):
        vars(key)


def test_a_secret_str_is_accepted_as_a_secret() -> None:
    """Any object with `get_secret_value()` is, as a single key and in a pool."""
    assert ApiKey(SecretStr(SECRET)).get_secret_value() == SECRET
    assert as_key(SecretStr(SECRET)) == ApiKey(SECRET)
    pool = as_keys({"acme/prod": SecretStr(SECRET)})
    assert isinstance(pool, Iterator)
    assert next(pool) == ApiKey(SECRET, name="prod", account="acme")
    assert "(SecretStr), but many are expected; put it in a list" in str(as_keys(SecretStr(SECRET)))


def test_the_label_is_account_and_name() -> None:
    """Without an account it is the name. Only a name with an account may hold a slash."""
    assert ApiKey(SECRET, name="prod").label == "prod"
    assert ApiKey(SECRET, name="prod", account="acme").label == "acme/prod"
    assert ApiKey(SECRET, name="eu/prod", account="acme").label == "acme/eu/prod"
    with pytest.raises(
        ConfigurationError,
        match=r"the name of the API key holds a '/'.*give both separately: account= and name=",
    ):
        ApiKey(SECRET, name="acme/prod")
    with pytest.raises(ConfigurationError, match="the account of the API key holds a '/'"):
        ApiKey(SECRET, name="prod", account="big/co")
    refused = as_key(ApiKey(SECRET, account="globex"), label="acme/prod")
    assert isinstance(refused, UnusableKey)
    assert "declare different accounts" in str(refused.error)


def test_a_secret_object_that_raises_fails_only_its_own_key() -> None:
    """The error and the placeholder can be printed safely."""

    class Sealed:
        def get_secret_value(self) -> str:
            raise RuntimeError(SECRET)

    with pytest.raises(
        ConfigurationError,
        match=r"prod: the API key cannot be read: its get_secret_value\(\) raised RuntimeError",
    ):
        ApiKey(Sealed(), name="prod")
    refused = as_key(Sealed())
    assert isinstance(refused, UnusableKey)
    assert SECRET not in repr(refused)


@pytest.mark.parametrize("name", [SECRET.upper(), SECRET[:18], f"x {SECRET[3:]}"])
def test_a_name_with_a_part_of_the_secret_is_refused(name: str) -> None:
    """In any case, and where other text surrounds the secret."""
    for secret in (SECRET, f"Bearer {SECRET}", f"'{SECRET}'"):
        refused = as_key(secret, label=name)
        assert isinstance(refused, UnusableKey)
        assert name not in repr(refused)


def test_a_key_does_not_print_its_secret() -> None:
    """Neither by repr, str and format, nor inside a container."""
    key = ApiKey(SECRET, name="prod", account="acme")
    assert repr(key) == "ApiKey('***', name='prod', account='acme')"
    assert SECRET not in f"{key} {key!r} {[key]} { {key: key} }"
    assert key.get_secret_value() == SECRET


def test_a_key_without_a_name_is_named_by_a_fingerprint() -> None:
    """It is equal for equal secrets, and holds no part of the secret."""
    key = ApiKey(SECRET)
    assert key.name == ApiKey(f" {SECRET}\n").name
    assert key.name != ApiKey(SECRET + "0").name
    assert key.name.startswith("key-")
    assert len(key.name) == 16
    assert SECRET[:4] not in key.name


@pytest.mark.parametrize("raw", [f" {SECRET} ", f"\ufeff{SECRET}\r\n", f"\t\ufeff {SECRET}"])
def test_outer_white_space_and_a_byte_order_mark_are_dropped(raw: str) -> None:
    """Files and clipboards add them."""
    assert ApiKey(raw).get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("\ufeff", "is empty"),
        (f"Bearer {SECRET}", "begins with 'Bearer' or 'Token'"),
        (f"token {SECRET}", "begins with 'Bearer' or 'Token'"),
        ("Bearer", "begins with 'Bearer' or 'Token'"),
        ('"sk-0123"', "begins or ends with a quotation mark"),
        ("'sk-0123", "begins or ends with a quotation mark"),
        ('sk-0123"', "begins or ends with a quotation mark"),
        ("sk 0123", "white space or control characters inside"),
        ("sk\x000123", "white space or control characters inside"),
        ("sk\n0123", "white space or control characters inside"),
        ("sk\u200b0123", "outside ASCII"),
        ("skł0123", "outside ASCII"),
        ("postgres://app:0123@db", "holds '://': it seems to be a URL"),
        ("sk-0123,sk-0124", "holds a comma: it seems to be a list of keys"),
        ("sk-0123;sk-0124", "holds a semicolon"),
        ('sk"0123', "holds a quotation mark"),
        ("[sk-0123]", "holds a square bracket: it seems to be a section of an ini file"),
        ("{sk-0123}", "holds a brace"),
        ("f(0123)", "holds a parenthesis"),
        ("a<0123", "holds an angle bracket"),
        ("bob0123@example.com", "holds an '@'"),
        ("-----BEGIN-0123", "a line of a PEM file"),
        ("prod=0123", "holds '=': it seems to be a line NAME=SECRET"),
        (7, "not an int"),
        ({"secret": "0123"}, "not a dict; rows of a database go through keys_from_records"),
        (b"sk-0123", "not bytes; decode it first"),
        (None, "not None"),
    ],
)
def test_an_unusable_secret_is_refused_under_the_keys_name(raw: str, said: str) -> None:
    """The error has the remedy, and repeats nothing of the secret."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        ApiKey(raw, name="prod")
    assert caught.value.key_name == "prod"
    assert str(caught.value).startswith("prod: ")
    assert "0123" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        "${KEY_0123}",
        "$KEY_0123",
        "%KEY_0123%",
        "$(vault read 0123)",
        "{{ key_0123 }}",
        "<key 0123>",
        "op://vault/0123",
        "YOUR_API_KEY_0123",
        "your-key-0123",
        "sk-your-api-key-0123",
        "REPLACE_ME_0123",
        "sk-0123****",
        "xxxx",
        "sk-xxx",
        "XXXX-XXXX-0123",
        "sk0123xxxxxxxx",
        "sk-0123...",
        "sk-0123…",
        "undefined",
        "None",
    ],
)
def test_a_placeholder_is_refused(raw: str) -> None:
    """An unfilled template is no key."""
    with pytest.raises(
        ConfigurationError, match="is a placeholder, or a reference that was not replaced"
    ) as caught:
        ApiKey(raw)
    assert "0123" not in str(caught.value)


def test_the_name_of_a_variable_is_refused() -> None:
    """The value of the variable was meant."""
    with pytest.raises(ConfigurationError, match="is the name of a variable"):
        ApiKey("CRUSTDATA_API_KEY")


@pytest.mark.parametrize(
    "raw", [f"{SECRET}=", f"{SECRET}==", "a.b_c~d+e/f-g", "0" * 300, "x-1", "Foxxxy", "yourself-7"]
)
def test_a_text_that_may_be_a_key_is_accepted(raw: str) -> None:
    """Base64 padding may end it."""
    assert ApiKey(raw).get_secret_value() == raw


@pytest.mark.parametrize(
    ("name", "account", "said"),
    [
        (
            "a8f5f167f44f4964e6c998dee827110c",
            None,
            "the name of the API key looks more like a secret than its value does",
        ),
        (
            "3fa85f64-5717-4562-b3fc-2c963f66afa6",
            None,
            "the name of the API key looks more like a secret",
        ),
        ("dev", "sk_live_0123456789abcdef", "the account of the API key looks more like a secret"),
    ],
)
def test_a_name_that_looks_more_like_a_secret_is_not_repeated(
    name: str, account: str | None, said: str
) -> None:
    """Name and secret may be swapped. Beside a secret that looks like one, any name is accepted."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        ApiKey("prod", name=name, account=account)
    assert "0123" not in str(caught.value)
    assert "a8f5" not in str(caught.value)
    assert "3fa8" not in str(caught.value)
    assert caught.value.key_name is None
    assert ApiKey(SECRET, name="550e8400-e29b-41d4-a716-446655440000").name.startswith("550e")
    for innocent in (
        "customer-number-1",
        "production",
        "customer20260101",
        "eu1-db2-node3-prod",
        "a-very-long-name-of-a-customer",
        "c" * 60,
    ):
        assert ApiKey("s-1", name=innocent).name == innocent


@pytest.mark.parametrize(
    ("name", "account", "said"),
    [
        ("", None, "the name of the API key is empty"),
        ("a\tb", None, "the name of the API key holds unprintable"),
        ('"prod', None, "the name of the API key begins or ends with a quotation mark"),
        ("prod", "acme'", "the account of the API key begins or ends with a quotation mark"),
        (SECRET, None, "the name of the API key holds the secret"),
        (f"my {SECRET}", None, "the name of the API key holds the secret"),
        (7, None, "the name of the API key must be a str, not an int"),
        ("prod", " ", "the account of the API key is empty"),
        ("prod", SECRET, "the account of the API key holds the secret"),
    ],
)
def test_an_unprintable_label_is_refused(name: str, account: str | None, said: str) -> None:
    """Logs and reports show names and accounts."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        ApiKey(SECRET, name=name, account=account)
    assert SECRET not in str(caught.value)


def test_a_short_secret_may_be_part_of_a_name() -> None:
    """Tests use short secrets; a real secret is long."""
    assert ApiKey("a", name="acme").name == "acme"
    with pytest.raises(ConfigurationError):
        ApiKey("a", name="a")


def test_keys_are_values() -> None:
    """They are equal by their parts, hashable, copied as themselves, and never pickled."""
    key = ApiKey(SECRET, name="prod")
    assert key == ApiKey(SECRET, name="prod")
    assert hash(key) == hash(ApiKey(SECRET, name="prod"))
    assert key not in (
        ApiKey(SECRET, name="dev"),
        ApiKey(SECRET, name="prod", account="acme"),
        SECRET,
    )
    assert copy.copy(key) is copy.deepcopy(key) is key
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)


# --- text, files, the environment


def test_text_is_read_by_line_and_comma() -> None:
    """With names, accounts and comments."""
    text = (
        "\ufeff# the pool\ns-1\n\n prod = s-2 , s-3 # the third\nacme/dev=s-4=,\nbig/co/ci=s-5#6\n"
    )
    found = [(key.get_secret_value(), key.name, key.account) for key in keys_from_text(text)]
    assert found == [
        ("s-1", ApiKey("s-1").name, None),
        ("s-2", "prod", None),
        ("s-3", ApiKey("s-3").name, None),
        ("s-4=", "dev", "acme"),
        ("s-5#6", "co/ci", "big"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s-1\nprod=\n", "line 2: the API key is empty"),
        ("s-secretxxxxxxx==", "line 1: only '=' follows the name"),
        ("=s-secret", "line 1: the name of the API key is empty"),
        ("/prod=s-secret", "line 1: the account of the API key is empty"),
        ("a=s-1\n\n# x\nb=s secret", "line 4: the API key holds white space"),
        ("ok\nBearer s-secret", "line 2: the API key begins with"),
        ("a=s-1\na=s-2", "a: two different keys have this label"),
        ("x/a=s-1, y/b=s-1", "y/b: the secret of the key is declared under two accounts"),
    ],
)
def test_a_bad_line_is_reported_by_its_number(text: str, said: str) -> None:
    """Its text may be a secret."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_text(text)
    assert "secret" not in str(caught.value).replace("the secret of the key is declared", "")


def test_keys_are_read_from_text_only() -> None:
    """Bytes would be read as one strange key."""
    with pytest.raises(
        ConfigurationError, match="text must be a str, not bytes; decode bytes first"
    ):
        keys_from_text(b"s-1")  # type: ignore[arg-type]  # the mistake under test


def test_a_file_is_read_as_text(tmp_path: Path) -> None:
    """It is UTF-8, with or without a byte-order mark; an error has the file and the line."""
    path = tmp_path / "keys.txt"
    path.write_text("\ufeffprod=s-1\n", encoding="utf-8")
    assert [key.name for key in keys_from_file(path)] == ["prod"]
    path.write_text("prod=s-1\nBearer x\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"keys\.txt, line 2: the API key begins"):
        keys_from_file(str(path))


def test_an_unreadable_file_is_reported_with_the_reason(tmp_path: Path) -> None:
    """The reason is the system's text, or the encoding."""
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        keys_from_file(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ConfigurationError, match="it is not UTF-8 text") as caught:
        keys_from_file(tmp_path / "binary")
    assert caught.value.__context__ is None
    for path in ("a\0b", None, 5):
        with pytest.raises(ConfigurationError, match="the value is not a path"):
            keys_from_file(path)  # type: ignore[arg-type]  # the mistake under test


def test_the_environment_holds_one_key_or_many() -> None:
    """A secret in both variables is returned once, under its name."""
    assert keys_from_env({}) == []
    assert keys_from_env({"CRUSTDATA_API_KEY": " ", "CRUSTDATA_API_KEYS": ""}) == []
    assert [key.get_secret_value() for key in keys_from_env({"CRUSTDATA_API_KEY": " s-1\n"})] == [
        "s-1"
    ]
    both = keys_from_env({"CRUSTDATA_API_KEY": "s-1", "CRUSTDATA_API_KEYS": "a=s-2,b=s-3"})
    assert [key.get_secret_value() for key in both] == ["s-1", "s-2", "s-3"]
    same = keys_from_env({"CRUSTDATA_API_KEY": "s-2", "CRUSTDATA_API_KEYS": "a=s-2,b=s-3"})
    assert [key.name for key in same] == ["a", "b"]


def test_the_default_environment_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at each call."""
    monkeypatch.setenv("CRUSTDATA_API_KEYS", "prod=s-1")
    monkeypatch.delenv("CRUSTDATA_API_KEY", raising=False)
    assert [key.name for key in keys_from_env()] == ["prod"]


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CRUSTDATA_API_KEY": "Bearer s-1"}, "CRUSTDATA_API_KEY: the API key begins with"),
        ({"CRUSTDATA_API_KEYS": "a=s-1\nb="}, "CRUSTDATA_API_KEYS, line 2: the API key is empty"),
    ],
)
def test_an_unusable_variable_is_named_in_the_error(environ: dict[str, str], said: str) -> None:
    """With the line inside its value."""
    with pytest.raises(ConfigurationError, match=said):
        keys_from_env(environ)


def local_variables(error: BaseException) -> str:
    """The local variables of the library's own frames, as many tools print them."""
    shown, traceback = [], error.__traceback__
    while traceback is not None:
        if "/crustcredits/" in traceback.tb_frame.f_code.co_filename:
            shown.append(repr(traceback.tb_frame.f_locals))
        traceback = traceback.tb_next
    assert shown
    return " ".join(shown)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: ApiKey(f"Bearer {SECRET}", name="prod"),
        lambda: ApiKey(SECRET, name=SECRET),
        lambda: ApiKey(SECRET, account=f"x{SECRET}"),
        lambda: keys_from_text(f"a={SECRET}\nb={SECRET} x"),
        lambda: keys_from_text(SECRET.encode()),  # type: ignore[arg-type]  # the mistake under test
        lambda: keys_from_env(
            {"CRUSTDATA_API_KEY": f"Bearer {SECRET}", "CRUSTDATA_API_KEYS": f"a={SECRET}"}
        ),
        lambda: keys_from_env({"CRUSTDATA_API_KEYS": f"a={SECRET}, Bearer {SECRET}"}),
    ],
)
def test_no_frame_of_a_traceback_holds_a_secret(mistake: Callable[[], object]) -> None:
    """Many tools print tracebacks with local variables."""
    with pytest.raises(ConfigurationError) as caught:
        mistake()
    assert SECRET not in local_variables(caught.value)
