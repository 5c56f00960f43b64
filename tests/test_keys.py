"""Keys: what is taken, what is refused and how, and where many of them come from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crustcredits import ApiKey, ConfigurationError, keys_from_env, keys_from_file, keys_from_text
from crustcredits._keys import RefusedKey, as_key, as_keys, refuse_contradictions

SECRET = "sk-0123456789abcdef"


def test_a_key_does_not_print() -> None:
    """Neither by repr, str, format nor in a container."""
    key = ApiKey(SECRET, name="prod", account="acme")
    assert repr(key) == "ApiKey('***', name='prod', account='acme')"
    assert SECRET not in f"{key} {key!r} {[key]} { {key: key} }"
    assert key.secret == SECRET


def test_a_key_without_a_name_is_called_by_a_fingerprint() -> None:
    """Equal for equal secrets, and nothing of the secret is in it."""
    key = ApiKey(SECRET)
    assert key.name == ApiKey(f" {SECRET}\n").name
    assert key.name != ApiKey(SECRET + "0").name
    assert key.name.startswith("key-")
    assert len(key.name) == 16
    assert SECRET[:4] not in key.name


@pytest.mark.parametrize("raw", [f" {SECRET} ", f"\ufeff{SECRET}\r\n", f"\t\ufeff {SECRET}"])
def test_outer_white_space_and_a_byte_order_mark_are_dropped(raw: str) -> None:
    """They come from files and clipboards."""
    assert ApiKey(raw).secret == SECRET


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
        (b"sk-0123", "not bytes; decode it first"),
        (None, "not NoneType"),
    ],
)
def test_a_secret_that_cannot_be_one_is_refused_by_the_keys_name(raw: str, said: str) -> None:
    """The error says what to do, and shows nothing of what was given."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        ApiKey(raw, name="prod")
    assert caught.value.key_name == "prod"
    assert str(caught.value).startswith("prod: ")
    assert "0123" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "account", "said"),
    [
        ("", None, "the name of the API key is empty"),
        ("a\tb", None, "the name of the API key holds unprintable"),
        ('"prod', None, "the name of the API key begins or ends with a quotation mark"),
        ("prod", "acme'", "the account of the API key begins or ends with a quotation mark"),
        (SECRET, None, "the name of the API key holds its secret"),
        (f"my {SECRET}", None, "the name of the API key holds its secret"),
        (7, None, "the name of an API key is a str, not int"),
        ("prod", " ", "the account of the API key is empty"),
        ("prod", SECRET, "the account of the API key holds its secret"),
    ],
)
def test_a_label_that_cannot_be_printed_is_refused(name: str, account: str | None, said: str) -> None:
    """Names and accounts stand in logs and reports."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        ApiKey(SECRET, name=name, account=account)
    assert SECRET not in str(caught.value)


def test_a_short_secret_may_stand_in_an_innocent_word() -> None:
    """Tests use such; a real secret is long."""
    assert ApiKey("a", name="acme").name == "acme"
    with pytest.raises(ConfigurationError):
        ApiKey("a", name="a")


def test_keys_are_values() -> None:
    """Equal by their parts, hashable, copied as themselves, and never pickled."""
    key = ApiKey(SECRET, name="prod")
    assert key == ApiKey(SECRET, name="prod")
    assert hash(key) == hash(ApiKey(SECRET, name="prod"))
    assert key not in (ApiKey(SECRET, name="dev"), ApiKey(SECRET, name="prod", account="acme"), SECRET)
    assert copy.copy(key) is copy.deepcopy(key) is key
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)


# --- pools


def test_a_pool_is_an_iterable_or_a_mapping() -> None:
    """Of secrets and keys, in their order."""
    prod = ApiKey("s-prod", name="prod", account="acme")
    listed = as_keys(iter([prod, "s-2"]))
    assert isinstance(listed, Iterator)
    assert next(listed) is prod
    assert next(listed).secret == "s-2"
    mapped = as_keys({"one": "s-1", "two": prod})
    assert isinstance(mapped, Iterator)
    assert [(key.name, key.secret, key.account) for key in mapped] == [("one", "s-1", None), ("two", "s-prod", "acme")]


@pytest.mark.parametrize("lone", ["sk-1", b"sk-1", bytearray(b"sk-1"), ApiKey("sk-1")])
def test_a_lone_key_where_many_are_expected_is_refused(lone: object) -> None:
    """A str would be read letter by letter."""
    refusal = as_keys(lone)
    assert isinstance(refusal, ConfigurationError)
    assert "put it in a list" in str(refusal)
    assert "sk-1" not in str(refusal)


def test_what_is_no_pool_is_refused() -> None:
    """With the way to go."""
    assert "not int" in str(as_keys(7))

    async def source() -> None: ...

    class Source:
        def __aiter__(self) -> None: ...

    assert "goes to stream()" in str(as_keys(Source()))


def test_a_key_that_cannot_be_used_does_not_spoil_its_pool() -> None:
    """It is named by its name in a mapping, else by its place."""
    refused = list(as_keys(["s-1", "", b"s-3"]))  # type: ignore[arg-type]  # an Iterator here
    assert [key.name for key in refused[1:]] == ["keys[1]", "keys[2]"]
    assert all(isinstance(key, RefusedKey) for key in refused[1:])
    named = list(as_keys({"empty": "", "sk-0123456789": "sk-0123456789", 3: "s-3"}))  # type: ignore[arg-type]  # as above
    assert [key.name for key in named] == ["empty", "keys[1]", "keys[2]"]


@pytest.mark.parametrize(
    ("pool", "said"),
    [
        ([ApiKey("s-1", name="prod"), ApiKey("s-2", name="prod")], "prod: two different keys have this name"),
        (
            [ApiKey("s-1", name="a", account="acme"), ApiKey("s-1", name="b", account="emca")],
            "b: its secret stands under two accounts, 'acme' and 'emca'",
        ),
    ],
)
def test_a_pool_that_contradicts_itself_is_refused(pool: list[ApiKey], said: str) -> None:
    """Its report could not be right."""
    with pytest.raises(ConfigurationError, match=said):
        refuse_contradictions(pool)


def test_one_secret_may_have_two_names() -> None:
    """Also once with its account and once without; and a refused key contradicts nobody."""
    twice = [ApiKey("s-1", name="a", account="acme"), ApiKey("s-1", name="b"), ApiKey("s-1", name="a", account="acme")]
    refuse_contradictions([*twice, as_key(""), as_key("")])


# --- text, files, the environment


def test_text_gives_keys_by_line_and_comma() -> None:
    """With names, accounts and comments."""
    text = "\ufeff# the pool\ns-1\n\n prod = s-2 , s-3 # the third\nacme/dev=s-4=,\nbig/co/ci=s-5#6\n"
    found = [(key.secret, key.name, key.account) for key in keys_from_text(text)]
    assert found == [
        ("s-1", ApiKey("s-1").name, None),
        ("s-2", "prod", None),
        ("s-3", ApiKey("s-3").name, None),
        ("s-4=", "dev", "acme"),
        ("s-5#6", "ci", "big/co"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s-1\nprod=\n", "line 2: the API key is empty"),
        ("s-secretxxxxxxx==", "line 1: nothing but '=' stands behind a name"),
        ("=s-secret", "line 1: the name of the API key is empty"),
        ("/prod=s-secret", "line 1: the account of the API key is empty"),
        ("a=s-1\n\n# x\nb=s secret", "line 4: the API key holds white space"),
        ("ok\nBearer s-secret", "line 2: the API key begins with"),
        ("a=s-1\na=s-2", "a: two different keys have this name"),
        ("x/a=s-1, y/b=s-1", "b: its secret stands under two accounts"),
    ],
)
def test_a_bad_line_is_reported_by_its_number(text: str, said: str) -> None:
    """Its text may be a secret."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_text(text)
    assert "secret" not in str(caught.value).replace("its secret stands", "")


def test_keys_are_read_from_text_only() -> None:
    """Bytes would read as one strange key."""
    with pytest.raises(ConfigurationError, match="from a str, not bytes; decode it first"):
        keys_from_text(b"s-1")  # type: ignore[arg-type]  # the mistake under test


def test_a_file_is_read_as_text(tmp_path: Path) -> None:
    """UTF-8, with or without a byte-order mark; a bad line is named with the file."""
    path = tmp_path / "keys.txt"
    path.write_text("\ufeffprod=s-1\n", encoding="utf-8")
    assert [key.name for key in keys_from_file(path)] == ["prod"]
    path.write_text("prod=s-1\nBearer x\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"keys\.txt, line 2: the API key begins"):
        keys_from_file(str(path))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    """By the system's word or by its encoding."""
    with pytest.raises(ConfigurationError, match="No such file or directory"):
        keys_from_file(tmp_path / "missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00s")
    with pytest.raises(ConfigurationError, match="it is not UTF-8 text") as caught:
        keys_from_file(tmp_path / "binary")
    assert caught.value.__context__ is None
    for path in ("a\0b", None, 5):
        with pytest.raises(ConfigurationError, match="that is no path"):
            keys_from_file(path)  # type: ignore[arg-type]  # the mistake under test


def test_a_pool_that_changes_while_it_is_read_is_read_as_it_was() -> None:
    """And no frame shows its secrets."""
    mapping, secrets = {"a": "s-1", "b": "s-2"}, {"s-3", "s-4"}
    named, bare = as_keys(mapping), as_keys(secrets)
    assert isinstance(named, Iterator)
    assert isinstance(bare, Iterator)
    next(named), next(bare)
    mapping["c"] = "s-5"
    secrets.add("s-6")
    assert [key.name for key in named] == ["b"]
    assert len(list(bare)) == 1


def test_the_environment_holds_one_key_or_many() -> None:
    """A secret that stands in both is kept once, under its name."""
    assert keys_from_env({}) == []
    assert keys_from_env({"CRUSTDATA_API_KEY": " ", "CRUSTDATA_API_KEYS": ""}) == []
    assert [key.secret for key in keys_from_env({"CRUSTDATA_API_KEY": " s-1\n"})] == ["s-1"]
    both = keys_from_env({"CRUSTDATA_API_KEY": "s-1", "CRUSTDATA_API_KEYS": "a=s-2,b=s-3"})
    assert [key.secret for key in both] == ["s-1", "s-2", "s-3"]
    same = keys_from_env({"CRUSTDATA_API_KEY": "s-2", "CRUSTDATA_API_KEYS": "a=s-2,b=s-3"})
    assert [key.name for key in same] == ["a", "b"]


def test_the_environment_is_the_processes_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read when called."""
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
def test_a_variable_that_cannot_be_used_is_named(environ: dict[str, str], said: str) -> None:
    """So that one knows where to look."""
    with pytest.raises(ConfigurationError, match=said):
        keys_from_env(environ)


def local_variables(error: BaseException) -> str:
    """What a tool that prints tracebacks with local variables would show of the library's own frames."""
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
        lambda: keys_from_env({"CRUSTDATA_API_KEY": f"Bearer {SECRET}", "CRUSTDATA_API_KEYS": f"a={SECRET}"}),
        lambda: keys_from_env({"CRUSTDATA_API_KEYS": f"a={SECRET}, Bearer {SECRET}"}),
    ],
)
def test_no_frame_of_a_traceback_holds_a_secret(mistake: Callable[[], object]) -> None:
    """Many tools print tracebacks with their local variables."""
    with pytest.raises(ConfigurationError) as caught:
        mistake()
    assert SECRET not in local_variables(caught.value)
