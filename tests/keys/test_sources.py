"""Sources of keys: the kinds of text and files, refusals, and a search for wrongly read secrets."""

from __future__ import annotations

import base64
import json
import random
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from crustcredits import (
    ApiKey,
    ConfigurationError,
    UnusableKey,
    keys_from_env,
    keys_from_file,
    keys_from_records,
    keys_from_text,
)
from crustcredits._keys.checks import looks_secret
from tests.searches import examples
from tests.virtual import FakeServer, fake_client

ONE, TWO = "sk-0123456789abcdef01", "sk-fedcba987654321000"


def parts(keys: list[ApiKey]) -> list[tuple[str, str]]:
    """The labels and secrets of keys."""
    return [(key.label, key.get_secret_value()) for key in keys]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, content: str) -> Path:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return path

    return write


File = Callable[[str, str], Path]


# --- env files

ENV = f"""
# the service's settings
DATABASE_URL=postgres://app:hunter2@db/app
STRIPE_KEY=sk_live_51H0123456789abcdef
export CRUSTDATA_API_KEYS="acme/prod={ONE},
  acme/dev={TWO}"  # two of them
PRIVATE_KEY='-----BEGIN KEY-----
CRUSTDATA_API_KEY=not-this-one
-----END KEY-----'
EMPTY=
"""


@pytest.mark.parametrize(
    "name",
    [".env", ".env.local", "prod.env", "settings", "settings.txt", "settings.sh", "app.conf"],
)
def test_only_the_librarys_variables_of_an_env_file_are_read(file: File, name: str) -> None:
    """The file may have any name.

    Other secrets, and lines inside another quoted value, are ignored.
    """
    assert parts(keys_from_file(file(name, ENV))) == [("acme/prod", ONE), ("acme/dev", TWO)]


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        (f"CRUSTDATA_API_KEY={ONE}", ONE),
        (f"export CRUSTDATA_API_KEY='{ONE}'", ONE),
        (f'CRUSTDATA_API_KEY = "{ONE}"', ONE),
        (f"CRUSTDATA_API_KEY={ONE} # a comment", ONE),
        (f"CRUSTDATA_API_KEY=old-one\nCRUSTDATA_API_KEY={ONE}\r\n", ONE),
    ],
)
def test_a_variable_of_an_env_file_may_have_shell_syntax(line: str, secret: str) -> None:
    """With quotes, comments and spaces; the last assignment counts.

    The same text may come from stdin.
    """
    assert [key.get_secret_value() for key in keys_from_text(f"OTHER=1\n{line}\n")] == [secret]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (".env", "STRIPE_KEY=sk_live_51H0123456789abcdef\n"),
        (".env.production", "plain=value1\n"),
        ("secrets", "export GITHUB_TOKEN=ghp_0123456789abcdef\n"),
    ],
)
def test_an_env_file_without_the_librarys_variables_is_refused(
    file: File, name: str, content: str
) -> None:
    """None of its secrets is read as a key."""
    with pytest.raises(
        ConfigurationError, match="sets neither CRUSTDATA_API_KEY=… nor CRUSTDATA_API_KEYS=…"
    ) as caught:
        keys_from_file(file(name, content))
    assert caught.value.key_name == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"customer #42={ONE}", "line 1: a name cannot hold ' #'"),
        (f"a={ONE},\\\nb={TWO}", "line 1: the API key holds a backslash"),
        ("db.internal:5432:app:app:s3cret", "line 1: the API key holds a colon"),
        (f"prod: {ONE}", "line 1: the API key holds a colon: it seems to be a line of YAML"),
        ("/run/secrets/crustdata-1", "is the path of a file"),
        ("../secrets/key1", "is the path of a file"),
        ("ghp_0123456789abcdef0123456789abcdef0123", "is a key of another service"),
        ("JWTSECRET=aB3dE5fG7hJ9kL1mN3", "line 1: the name of the entry is a setting's name"),
        ("~/keys", "is the path of a file"),
        ("keys.json", "is the path of a file"),
        ("--keys-file", "is an option of a command"),
        ("crustdata_api_key", "is the name of a variable"),
        ("/", "holds no letter and no digit"),
        (
            "name,email,password\nbob,bob,hunter2",
            "the CSV text has no column 'secret'",
        ),
        ("user=admin\nport=5432", "line 1: the name of the entry is a setting's name"),
        ("dbPassword=aB3dE5fG7hJ9kL1mN3", "line 1: the name of the entry is a setting's name"),
        ("secret_key_base=aB3dE5fG7hJ9kL1mN3", "line 1: the name of the entry is a setting's name"),
        ('{"name": "x", "version": "1.0.0"}', "entry 1: the name of the entry is a setting's name"),
        (f"MSG='it\nCRUSTDATA_API_KEY={ONE}\nB='x'", "is inside the quotes of another value"),
        (f"name,secret,secret\nprod,{ONE},{TWO}", "line 1: a column occurs twice"),
    ],
)
def test_text_of_another_kind_is_refused_with_the_reason(text: str, said: str) -> None:
    """None of it is sent."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_text(text)
    assert ONE not in str(caught.value)


def test_setting_words_are_accepted_as_names_of_a_likely_key() -> None:
    """An account before the name decides as well, and comments are ignored."""
    for label in (
        "user",
        "PROD_EU",
        "ACME_PROD",
        "acme/token",
        "acme/api-key",
        "name",
        "Token Metrics",
        "url-shortener",
        "client-key",
    ):
        assert [key.label for key in keys_from_text(f"{label}={ONE} # old={TWO}")] == [label]
    assert len(keys_from_text(f"{ONE} # {TWO}=x")) == 1


FORMATS: dict[str, Callable[[random.Random], str]] = {
    "hexadecimal": lambda draw: draw.randbytes(16).hex(),
    "long hexadecimal": lambda draw: draw.randbytes(20).hex(),
    "UUID": lambda draw: str(uuid.UUID(int=draw.getrandbits(128), version=4)),
    "base64 of 16": lambda draw: base64.b64encode(draw.randbytes(16)).decode(),
    "base64 of 20": lambda draw: base64.b64encode(draw.randbytes(20)).decode(),
    "base64 of 24": lambda draw: base64.b64encode(draw.randbytes(24)).decode(),
    "base64url of 32": lambda draw: (
        base64.urlsafe_b64encode(draw.randbytes(32)).decode().rstrip("=")
    ),
    "with a prefix": lambda draw: "sk_live_" + base64.b32encode(draw.randbytes(15)).decode(),
    "with dots": lambda draw: f"{draw.randbytes(8).hex()}.{draw.randbytes(12).hex()}",
}


@pytest.mark.parametrize("form", FORMATS)
def test_keys_of_usual_formats_are_read(form: str) -> None:
    """Bare, in lists of 1 to 100 keys, and with names that look generated."""
    draw = random.Random(form)
    for count in (1, 2, 3, 10, 100) * 20:
        secrets = [FORMATS[form](draw) for _ in range(count)]
        assert [key.get_secret_value() for key in keys_from_text("\n".join(secrets))] == secrets
        assert (
            len(keys_from_text(",".join(f"{uuid.uuid4()}={secret}" for secret in secrets))) == count
        )


class Broken(dict[str, str]):
    """An environment with an unreachable vault behind it."""

    def get(self, name: str, default: object = None) -> Any:
        raise LookupError(ONE)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"CRUSTDATA_API_KEY": 7, "CRUSTDATA_API_KEYS": ONE},
            "CRUSTDATA_API_KEY must be a str, not an int",
        ),
        (Broken(), "environ cannot be read \\(LookupError\\)"),
        (ONE, "environ must be a mapping of names to text, not a str"),
    ],
)
def test_a_value_that_is_no_environment_is_refused(environ: Any, said: str) -> None:
    """A variable with None for a value, as from dotenv, counts as not set."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_env(environ)
    assert ONE not in str(caught.value)
    unset: Any = {"CRUSTDATA_API_KEY": None, "CRUSTDATA_API_KEYS": f"a={ONE}"}
    assert [key.name for key in keys_from_env(unset)] == ["a"]


@pytest.mark.parametrize(
    "line",
    [
        "DB_PASSWORD=hunter2",
        "password=hunter2",
        "db.password = hunter2",
        "stripe-api-key=sk_live_51H01234",
        "REDIS_AUTH=a1",
        "STRIPE_KEY=a1",
    ],
)
def test_the_name_of_a_setting_is_refused_in_text(line: str) -> None:
    """Other programs write their secrets as `name=secret`, too."""
    with pytest.raises(
        ConfigurationError, match="line 2: the name of the entry is a setting's name"
    ):
        keys_from_text(f"prod={ONE}\n{line}\n")


@pytest.mark.virtual
async def test_the_name_of_a_setting_is_refused_in_a_mapping() -> None:
    """As in text: the values of a program's configuration are no keys. An account decides."""
    server = FakeServer()
    config = {"DB_PASSWORD": "hunter2", "SECRET_KEY": "djangoinsecure7d8f", "port": "5432"}
    keys = {**config, "prod": ONE, "user": SecretStr(TWO), "acme/token": "a-short-one"}
    async with fake_client(server) as client:
        report = await client.check(keys)
    assert [outcome.key.label for outcome in report.failed] == list(config)
    for outcome in report.failed:
        assert "the name of the entry is a setting's name" in str(outcome.error)
    assert {name for _, name in server.arrivals} == {"prod", "user", "token"}


# --- JSON


@pytest.mark.parametrize("name", ["keys.json", "keys.txt", "keys"])
def test_json_is_an_object_of_labels_or_a_list_of_objects(file: File, name: str) -> None:
    """The suffix or the content decides that it is JSON."""
    assert parts(keys_from_file(file(name, json.dumps({"acme/prod": ONE, "dev": TWO})))) == [
        ("acme/prod", ONE),
        ("dev", TWO),
    ]
    rows = [
        {"secret": ONE, "name": "prod", "account": "acme", "id": 7},
        {"secret": TWO, "name": None},
    ]
    assert parts(keys_from_file(file(name, json.dumps(rows)))) == [
        ("acme/prod", ONE),
        (ApiKey(TWO).label, TWO),
    ]
    variables = {
        "CRUSTDATA_API_KEY": ONE,
        "DATABASE_URL": "postgres://app:hunter2@db/app",
        "DEBUG": True,
    }
    assert [
        key.get_secret_value() for key in keys_from_file(file(name, json.dumps(variables)))
    ] == [ONE]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "the text begins like JSON, but is not valid JSON"),
        (f'{{"a": "{ONE}", "a": "{TWO}"}}', "a name occurs twice in one JSON object"),
        (json.dumps([ONE, TWO]), "the JSON does not hold keys"),
        (json.dumps({"secret": ONE, "name": "prod"}), "the JSON does not hold keys"),
        (json.dumps(ONE), "the JSON does not hold keys"),
        (
            json.dumps({"prod": {"secret": ONE}}),
            "keys.json, entry 1: the API key must be a str, a SecretStr or an ApiKey, not a dict",
        ),
        (
            json.dumps({"prod": ONE, "DB_PASSWORD": "hunter2"}),
            "keys.json, entry 2: the name of the entry is a setting's name",
        ),
        (
            json.dumps([{"secret": ONE}, {"name": "dev"}]),
            "keys.json, entry 2: the row has no column 'secret'",
        ),
        (
            json.dumps({"CRUSTDATA_API_KEYS": [ONE]}),
            "CRUSTDATA_API_KEY and CRUSTDATA_API_KEYS must be text",
        ),
    ],
)
def test_other_json_is_refused(file: File, content: str, said: str) -> None:
    """The message has the position, and shows no value."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_file(file("keys.json", content))
    assert ONE not in str(caught.value)


# --- CSV


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["keys.csv", "keys.txt", "keys"])
def test_csv_has_a_header_row(file: File, name: str, delimiter: str) -> None:
    """Columns may have any order, unknown ones are ignored, and cells may be empty."""
    rows = [
        ["owner", "Name", "Secret", "account"],
        ["bob@x.io", "prod", f'"{ONE}"', "acme"],
        [],
        ["", "", TWO, ""],
    ]
    content = "\ufeff" + "\n".join(delimiter.join(row) for row in rows)
    assert parts(keys_from_file(file(name, content))) == [
        ("acme/prod", ONE),
        (ApiKey(TWO).label, TWO),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            f"name,key\nprod,{ONE}\n",
            "keys.csv: the CSV text has no column 'secret'",
        ),
        (
            f"name,secret\nprod,{ONE}\ndev,{TWO},x\n",
            "keys.csv, line 3: the row and the header row have different numbers",
        ),
        (f'name,secret\nprod,"{ONE}\n', "keys.csv, line 2: the row is not valid CSV"),
        ("name,secret\nprod,\n", "keys.csv, line 2: the API key is empty"),
    ],
)
def test_other_csv_is_refused(file: File, content: str, said: str) -> None:
    """Cells and headers are no keys."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_file(file("keys.csv", content))
    assert ONE not in str(caught.value)


@pytest.mark.parametrize("text", [f"prod,{ONE},acme\n", f"hunter2\n{ONE}\n"])
def test_a_bare_entry_unlike_a_key_is_refused_beside_likely_keys(text: str) -> None:
    """An example is a cell of a CSV file without a header row. With a name the entry is a key."""
    with pytest.raises(
        ConfigurationError, match=r"line 1: the entry does not look like a key, as other entries do"
    ):
        keys_from_text(text)
    assert len(keys_from_text(f"a=hunter2\n{ONE}\n")) == 2
    assert [key.get_secret_value() for key in keys_from_text(f"{ONE}, {TWO}")] == [ONE, TWO]
    assert [key.get_secret_value() for key in keys_from_text("k1,k2")] == ["k1", "k2"]


# --- other files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("app.ini", f"[crustdata]\nkey={ONE}\n"),
        ("app.toml", f'key = "{ONE}"\n'),
        ("app.yaml", f"key: {ONE}\n"),
        ("app.properties", f"crustdata.key={ONE}\n"),
        ("id.pem", f"{ONE}\n"),
    ],
)
def test_a_file_of_another_kind_is_refused(file: File, name: str, content: str) -> None:
    """The suffix decides, and the message explains it."""
    with pytest.raises(ConfigurationError, match="files of this kind are not read"):
        keys_from_file(file(name, content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            f"[crustdata]\nkey={ONE}\n",
            "line 1: the API key holds a square bracket: it seems to be a section of an ini file",
        ),
        ("machine api login bob password hunter2", "white space"),
        ("-----BEGIN-KEY-----\nabc\n", "a line of a PEM file"),
        ("<key>abc</key>", "is a placeholder"),
        ("bob@example-company.com", "an '@': it seems to be an e-mail address"),
    ],
)
def test_content_of_another_kind_is_refused(file: File, content: str, said: str) -> None:
    """The name of the file would be accepted."""
    with pytest.raises(ConfigurationError, match=said):
        keys_from_file(file("keys", content))


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (ONE, False),
        (f"{ONE},{TWO}", False),
        (f"a={ONE}\nb={TWO}", False),
        ("c2VjcmV0/c2VjcmV0c2Vj+cmV0=", False),
        ("kyes.txt", True),
        (f"{ONE}.txt", False),
        (f"sub/{ONE}/x.txt", False),
        ("no/such/file", True),
    ],
)
def test_a_path_that_may_be_a_key_is_not_repeated(path: str, shown: bool) -> None:
    """A key given to `keys_from_file` by mistake must not appear in the error."""
    with pytest.raises(ConfigurationError, match=r"No such file|File name too long") as caught:
        keys_from_file(path)
    assert (path in str(caught.value)) is shown
    assert ONE not in str(caught.value)
    assert ("the path is not repeated" in str(caught.value)) is not shown


def test_an_existing_path_is_named_when_it_cannot_be_read(tmp_path: Path) -> None:
    """The path here is a directory."""
    with pytest.raises(ConfigurationError, match=str(tmp_path)):
        keys_from_file(tmp_path)
    with pytest.raises(ConfigurationError, match="the value is not a path"):
        keys_from_file([ONE])  # type: ignore[arg-type]  # the mistake under test


# --- the environment


def test_a_file_variable_replaces_a_variable(file: File) -> None:
    """Docker's and Kubernetes' secrets are such files: one key, or any file of keys."""
    single, many = (
        str(file("one", f"{ONE}\n")),
        str(file("many.json", json.dumps({"acme/prod": TWO}))),
    )
    assert parts(keys_from_env({"CRUSTDATA_API_KEY_FILE": single})) == [(ApiKey(ONE).label, ONE)]
    assert parts(keys_from_env({"CRUSTDATA_API_KEYS_FILE": many})) == [("acme/prod", TWO)]
    both = keys_from_env({"CRUSTDATA_API_KEY_FILE": single, "CRUSTDATA_API_KEYS_FILE": many})
    assert [key.get_secret_value() for key in both] == [ONE, TWO]
    assert keys_from_env({"CRUSTDATA_API_KEY_FILE": " ", "CRUSTDATA_API_KEYS_FILE": ""}) == []


def test_an_unusable_file_of_a_variable_is_refused(file: File) -> None:
    """The error names the variable, and no path that may be a key."""
    with pytest.raises(
        ConfigurationError, match="the file of CRUSTDATA_API_KEY_FILE cannot be read: No such file"
    ) as caught:
        keys_from_env({"CRUSTDATA_API_KEY_FILE": ONE})
    assert ONE not in str(caught.value)
    with pytest.raises(
        ConfigurationError, match="the file of CRUSTDATA_API_KEYS_FILE cannot be read"
    ):
        keys_from_env({"CRUSTDATA_API_KEYS_FILE": ONE})
    with pytest.raises(ConfigurationError, match="CRUSTDATA_API_KEY_FILE: the API key is empty"):
        keys_from_env({"CRUSTDATA_API_KEY_FILE": str(file("empty", "\n"))})
    for name in ("CRUSTDATA_API_KEY", "CRUSTDATA_API_KEYS"):
        with pytest.raises(
            ConfigurationError, match=f"{name} and {name}_FILE are both set; keep one of them"
        ):
            keys_from_env({name: ONE, f"{name}_FILE": "one"})


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"CRUSTDATA_API_KEY": f"{ONE},{TWO}"},
            "CRUSTDATA_API_KEY: the API key holds a comma: it seems to be a list of keys",
        ),
        (
            {"CRUSTDATA_API_KEYS": f"{ONE};{TWO}"},
            "CRUSTDATA_API_KEYS, line 1: the API key holds a semicolon: it seems to be a list",
        ),
    ],
)
def test_a_list_is_not_sent_as_one_key(environ: dict[str, str], said: str) -> None:
    """The message names the variable for a list."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        keys_from_env(environ)
    assert ONE not in str(caught.value)


# --- labels


def test_a_label_in_text_is_account_and_name() -> None:
    """The first slash divides them, because an account holds none.

    One name in two accounts is two keys.
    """
    found = keys_from_text(f"acme/prod={ONE}, globex/prod={TWO}, acme/eu/west=s-3")
    assert [(key.account, key.name, key.label) for key in found] == [
        ("acme", "prod", "acme/prod"),
        ("globex", "prod", "globex/prod"),
        ("acme", "eu/west", "acme/eu/west"),
    ]
    with pytest.raises(ConfigurationError, match="acme/prod: two different keys have this label"):
        keys_from_text(f"acme/prod={ONE}, acme/prod={TWO}")


def test_the_base64_padding_of_a_bare_key_is_no_empty_value() -> None:
    """One or two `=` may end a text that looks generated."""
    assert [key.get_secret_value() for key in keys_from_text(f"{ONE}=\n{TWO}==")] == [
        f"{ONE}=",
        f"{TWO}==",
    ]
    assert [key.get_secret_value() for key in keys_from_text(f"prod={ONE}=")] == [f"{ONE}="]


@pytest.mark.parametrize("text", [f"{ONE}=prod", f"a={TWO}\n{ONE}/prod=s-1"])
def test_a_secret_in_place_of_a_name_is_not_repeated(text: str) -> None:
    """The message has the right order."""
    with pytest.raises(
        ConfigurationError, match="looks more like a secret than its value does"
    ) as caught:
        keys_from_text(text)
    assert ONE not in str(caught.value)


# --- records


class BrokenRow:
    """A row of a database driver that fails."""

    def keys(self) -> list[str]:
        raise LookupError(TWO)


class Sealed:
    """A secret of an unreachable vault."""

    def get_secret_value(self) -> str:
        raise RuntimeError(TWO)


class Row:
    """A row of a database driver: no mapping, but with `keys()` and items by name."""

    def __init__(self, **cells: Any) -> None:
        self._cells = cells

    def keys(self) -> list[str]:
        return list(self._cells)

    def __getitem__(self, name: str) -> Any:
        return self._cells[name]


def test_records_are_rows_of_a_database() -> None:
    """Other columns are ignored, and a `SecretStr` is a secret."""
    rows = [
        {"id": 1, "secret": ONE, "name": "prod", "account": "acme", "password": "hunter2"},
        {"secret": SecretStr(TWO), "name": "", "account": None},
        Row(secret="s-3", name="dev"),
    ]
    found = keys_from_records(rows)  # type: ignore[arg-type]  # a driver's row is no Mapping
    assert all(isinstance(key, ApiKey) for key in found)
    assert [key.label for key in found] == ["acme/prod", ApiKey(TWO).label, "dev"]


def test_an_unusable_row_fails_only_its_own_key() -> None:
    """It is named by its label, or by its position where the label may show a secret."""
    rows: list[Any] = [
        {"secret": ONE, "name": "prod", "account": "acme"},
        {"secret": None, "name": "dev", "account": "acme"},
        {"secret": "https://x.io", "name": None},
        {"secret": "prod", "name": TWO},
        {"name": "lost"},
        ("prod", TWO),
        {"secret": TWO, "name": "prod", "account": "acme"},
        {"secret": ONE, "name": "other", "account": "globex"},
        {"secret": "s-9", "name": True},
        BrokenRow(),
        {"secret": Sealed(), "name": "sealed"},
    ]
    found = keys_from_records(rows)
    assert isinstance(found[0], ApiKey)
    assert all(isinstance(key, UnusableKey) for key in found[1:])
    assert [key.label for key in found] == [
        "acme/prod",
        "acme/dev",
        "rows[2]",
        "rows[3]",
        "lost",
        "rows[5]",
        "rows[6]",
        "rows[7]",
        "rows[8]",
        "rows[9]",
        "sealed",
    ]
    assert TWO not in repr(found)
    assert not hasattr(found[1], "get_secret_value")
    errors = [str(key.error) for key in found if isinstance(key, UnusableKey)]
    assert errors[0] == (
        "acme/dev: the API key must be a str, a SecretStr or an ApiKey, not None; look for an "
        "unset variable or an empty column at its source"
    )
    assert errors[3].startswith("lost: the row has no column 'secret'")
    assert errors[4].startswith("rows[5]: the row, ")
    assert errors[5].startswith("rows[6]: acme/prod: two different keys have this label")
    assert errors[6].startswith(
        "rows[7]: globex/other: the secret of the key is declared under two accounts"
    )
    assert errors[8].startswith("rows[9]: the row, a BrokenRow, cannot be read (LookupError); ")
    assert errors[9] == (
        "sealed: the API key cannot be read: its get_secret_value() raised RuntimeError; repair "
        "the source of the secret"
    )


@pytest.mark.parametrize("rows", [{"secret": ONE}, ONE, 7])
def test_a_value_that_is_no_iterable_of_rows_is_refused(rows: Any) -> None:
    """The remedy for one row is a list."""
    with pytest.raises(ConfigurationError, match=r"put one row in a list: \[row\]"):
        keys_from_records(rows)


def test_an_exception_of_the_source_of_rows_is_raised() -> None:
    """No frame of the library shows the earlier row."""

    def rows() -> Iterator[Mapping[str, Any]]:
        yield {"secret": ONE}
        raise LookupError("the database is gone")

    with pytest.raises(LookupError) as caught:
        keys_from_records(rows())
    traceback = caught.tb
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
        if "/crustcredits/" in traceback.tb_frame.f_code.co_filename:
            assert ONE not in repr(traceback.tb_frame.f_locals)


def test_a_refused_row_does_not_refuse_a_later_one() -> None:
    """Its label stays free for another key."""
    rows = [
        {"secret": ONE, "name": "a", "account": "x"},
        {"secret": ONE, "name": "a", "account": "y"},
        {"secret": TWO, "name": "a", "account": "y"},
    ]
    assert [type(key) for key in keys_from_records(rows)] == [ApiKey, UnusableKey, ApiKey]


def test_numbers_and_uuids_are_names_of_rows() -> None:
    """Databases have them as ids."""
    number = uuid.UUID(int=7)
    (key,) = keys_from_records([{"secret": ONE, "name": 7, "account": number}])
    assert key.label == f"{number}/7"


# --- nothing else is sent

TRUE_KEYS = [f"sk-{number:02}a1b2c3d4e5f6a7b8" for number in range(20)]
# Other contents of such files: each would be sent if it were read as a key.
OTHER_SECRETS = [
    "postgres://app:hunter2@db/app",
    "sk_live_51H0123456789abcdefghij",
    "hunter2",
    "correct-horse-battery-staple",
    "-----BEGIN PRIVATE KEY-----",
    "bob@example.com",
    "AKIAIOSFODNN7EXAMPLE",
    "{{ vault.key }}",
    "op://vault/item/key",
    "${CRUSTDATA}",
    "'quoted'",
    "a;b",
    "",
]
LABELS = st.sampled_from(["prod", "dev", "acme/prod", "acme/dev", "eu-west-1", "customer 7"])
OTHER_NAMES = st.sampled_from(
    [
        "DATABASE_URL",
        "STRIPE_KEY",
        "DB_PASSWORD",
        "db.password",
        "api_token",
        "SENTRY_DSN",
        "secret_key",
    ]
)
OTHERS = st.dictionaries(OTHER_NAMES, st.sampled_from(OTHER_SECRETS), max_size=4)
KEYS = st.dictionaries(LABELS, st.sampled_from(TRUE_KEYS), min_size=1, max_size=4)


def env_file(keys: dict[str, str], others: dict[str, str]) -> str:
    pool = ",".join(f"{label}={secret}" for label, secret in keys.items())
    lines = [f"{name}={value}" for name, value in others.items()]
    return "\n".join([*lines[:2], f'CRUSTDATA_API_KEYS="{pool}"', *lines[2:]])


def text_file(keys: dict[str, str], others: dict[str, str]) -> str:
    return "\n".join(f"{name}={value}" for name, value in {**keys, **others}.items())


def bare_file(keys: dict[str, str], others: dict[str, str]) -> str:
    """Bare entries, without other secrets that look like keys: they cannot be distinguished."""
    others = {name: value for name, value in others.items() if not looks_secret(value)}
    return "\n".join(",".join([*keys.values(), value]) for value in [*others.values(), ""])


def json_file(keys: dict[str, str], others: dict[str, str]) -> str:
    return json.dumps({**keys, **others})


def json_records(keys: dict[str, str], others: dict[str, str]) -> str:
    return json.dumps(
        [{**others, "name": label, "secret": secret} for label, secret in keys.items()]
    )


def csv_file(keys: dict[str, str], others: dict[str, str]) -> str:
    head = ["name", *others, "secret"]
    return "\n".join(
        ",".join(row)
        for row in [head, *([label, *others.values(), secret] for label, secret in keys.items())]
    )


def headless_csv(keys: dict[str, str], others: dict[str, str]) -> str:
    return "\n".join(",".join([label, secret, *others.values()]) for label, secret in keys.items())


def ini_file(keys: dict[str, str], others: dict[str, str]) -> str:
    return "[keys]\n" + text_file(keys, others)


SHAPES = [env_file, text_file, bare_file, json_file, json_records, csv_file, headless_csv, ini_file]


@settings(max_examples=examples(300))
@given(
    keys=KEYS,
    others=OTHERS,
    shape=st.sampled_from(SHAPES),
    indent=st.sampled_from(["", " ", "\n", "\ufeff"]),
)
def test_only_true_keys_are_ever_read_as_keys(
    keys: dict[str, str], others: dict[str, str], shape: Callable[..., str], indent: str
) -> None:
    """Any mix of keys and other secrets, in any format, gives true keys or an error."""
    try:
        found = keys_from_text(indent + shape(keys, others))
    except ConfigurationError as error:
        shown = str(error)
        assert not [secret for secret in [*TRUE_KEYS, *OTHER_SECRETS[:6]] if secret in shown]
        return
    assert {key.get_secret_value() for key in found} <= set(keys.values())


def test_the_searched_formats_are_readable() -> None:
    """Files with only keys are read, so the search above is not empty."""
    keys = {"prod": TRUE_KEYS[0], "acme/dev": TRUE_KEYS[1]}
    for shape in (env_file, text_file, json_file):
        assert parts(keys_from_text(shape(keys, {}))) == list(keys.items())
    for shape in (json_records, csv_file):
        assert [
            key.get_secret_value() for key in keys_from_text(shape({"prod": TRUE_KEYS[0]}, {}))
        ] == [TRUE_KEYS[0]]
    other = {"STRIPE_KEY": "sk_live_51H0123456789abcdefghij"}
    assert parts(keys_from_text(env_file(keys, other))) == list(keys.items())
    assert (
        keys_from_text(csv_file({"prod": TRUE_KEYS[0]}, other))[0].get_secret_value()
        == TRUE_KEYS[0]
    )


def test_a_part_of_a_name_is_not_sent_as_a_key() -> None:
    """A comma in a customer's name divides it.

    The rest does not look like a key, as other entries do.
    """
    with pytest.raises(
        ConfigurationError, match="the entry does not look like a key, as other entries do"
    ):
        keys_from_text("Acme, Inc=sk_live_0123456789abcdef0123")
    with pytest.raises(ConfigurationError, match="line 1: the entry does not look like a key"):
        keys_from_text("Production\nprod=sk_live_0123456789abcdef0123")
