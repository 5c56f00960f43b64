"""Sources of keys: text, files, the environment, and records such as a database's rows.

Only an API key may become an `ApiKey`, so a file is plain text, an env file, JSON or CSV, and any
other kind is refused as a whole. Readers return a problem as a value; each public function raises
it once its own frame holds no secret.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    UnusableKey,
    clear_text,
    make_key,
    split_label,
    unusable,
)
from crustcredits._keys.checks import (
    is_likely_key,
    looks_secret,
    may_be_key,
    secret_problem,
    setting_problem,
)
from crustcredits._keys.key_pool import Uniqueness, contradiction
from crustcredits._validation import hides_arguments

_Pool: TypeAlias = list[ApiKey] | ConfigurationError
_Entries: TypeAlias = Iterable[ApiKey | UnusableKey]

_COLUMNS: Final = ("secret", "name", "account")
_VARIABLES: Final = (KEY_VARIABLE, f"{KEY_VARIABLE}_FILE", KEYS_VARIABLE, f"{KEYS_VARIABLE}_FILE")

_BYTE_ORDER_MARK = "\ufeff"
_COMMENT = re.compile(r"(^|\s)#.*")

_PLAIN: Final = frozenset({"", ".txt", ".text", ".keys", ".list"})
_JSON: Final = frozenset({".json"})
_CSV: Final = frozenset({".csv", ".tsv"})
_ENV: Final = frozenset({".env"})
_SUFFIXES: Final = _PLAIN | _JSON | _CSV | _ENV

# Column names of CSV files for other programs, or without a column `secret`.
_OTHER_COLUMNS: Final = frozenset(
    {
        "name",
        "account",
        "key",
        "api_key",
        "apikey",
        "token",
        "password",
        "email",
        "user",
        "username",
    }
)

_OURS = re.compile(rf"^[ \t]*(?:(?:export|declare -x)[ \t]+)?{KEY_VARIABLE}S?[ \t]*=", re.MULTILINE)
_EXPORT = re.compile(r"^[ \t]*(?:export|declare -x)[ \t]+\w+=", re.MULTILINE)
_ASSIGNMENT = re.compile(
    r"""
    ^[ \t]* (?:(?:export|declare[ ]-x)[ \t]+)? (?P<name>[A-Za-z_][\w.]*) [ \t]* = [ \t]*
    (?: '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<bare>[^\n]*) )
    """,
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)

# A path of lower-case words; no generated key has this form.
_WORDS = re.compile(r"[a-z_.-]*(/[a-z_.-]+)+")


# --- public


@hides_arguments
def keys_from_text(text: str) -> list[ApiKey]:
    """Read keys from text with one key on each line, or with commas between keys.

    A key is `secret`, `name=secret` or `account/name=secret`. A `#` at the start of a line or after
    white space begins a comment. An env file, JSON, and CSV with a header row are read as in
    `keys_from_file`.

    Raises:
        ConfigurationError: A line cannot be used (the error has its number); two keys of one
            account have the same name; one secret is declared under two accounts; or the text is
            of another kind, such as the settings of a program.
    """
    pool = _read_any(text)
    del text
    return _or_raise(pool)


@hides_arguments
def keys_from_file(path: str | os.PathLike[str]) -> list[ApiKey]:
    """Read keys from a UTF-8 file: plain text, an env file, JSON or CSV.

    The suffix and the content decide the kind:

    - Plain text has no suffix, or `.txt`, `.text`, `.keys` or `.list`, and is read as in
      `keys_from_text`.
    - An env file has a line `CRUSTDATA_API_KEY=…` or `CRUSTDATA_API_KEYS=…`, with or without
      `export`. Only these two variables are read, as in `keys_from_env`; all others are ignored.
    - JSON is an object of labels and secrets, `{"acme/prod": "…"}`, or a list of objects with
      `secret`, `name` and `account`.
    - CSV (`.csv` or `.tsv`) has a header row with a column `secret`, and optional columns `name`
      and `account`; other columns are ignored.

    Any other file is refused as a whole, so that no other secret of a service is sent as a key.

    Raises:
        ConfigurationError: The file cannot be read or is of another kind; or as in
            `keys_from_text`. A path that may be a misplaced key is not repeated.
    """
    pool = _read_file(path, "the keys file")
    del path
    return _or_raise(pool)


@hides_arguments
def keys_from_env(environ: Mapping[str, str] | None = None) -> list[ApiKey]:
    """Read keys from the environment.

    `CRUSTDATA_API_KEY` is one secret. `CRUSTDATA_API_KEYS` holds many, in the format of
    `keys_from_text`. `CRUSTDATA_API_KEY_FILE` and `CRUSTDATA_API_KEYS_FILE` name files instead, as
    for Docker's and Kubernetes' secrets; the second may be any file that `keys_from_file` reads. A
    secret in both variables is returned once, under its name in `CRUSTDATA_API_KEYS`. Returns an
    empty list when no variable is set.

    Raises:
        ConfigurationError: A variable or its file cannot be used, or a variable and its `_FILE` are
            both set.
    """
    pool = _read_environ(os.environ if environ is None else environ)
    del environ
    return _or_raise(pool)


@hides_arguments
def keys_from_records(rows: Iterable[Mapping[str, Any]]) -> list[ApiKey | UnusableKey]:
    """Read keys from mappings such as a database's rows, with `secret`, `name` and `account`.

    A name or an account may be missing, None or empty; other columns are ignored. A row that cannot
    be used becomes an `UnusableKey`. So does a row that repeats an earlier label, or an earlier
    secret under another account. In a check only that key fails.

    Raises:
        ConfigurationError: `rows` is not an iterable of rows.
    """
    problem = _rows_problem(rows)
    if problem is not None:
        del rows
        raise ConfigurationError(problem)
    source = iter(rows)
    del rows
    return _read_rows(source)


def _or_raise(pool: _Pool) -> list[ApiKey]:
    if isinstance(pool, ConfigurationError):
        raise pool
    return pool


# --- the environment and env files


def _read_environ(environ: object) -> _Pool:
    if not isinstance(environ, Mapping):
        return ConfigurationError(
            f"an environment must be a mapping of names to text, not {type(environ).__name__}"
        )
    try:
        values = {name: environ.get(name) or "" for name in _VARIABLES}
    except Exception as error:  # noqa: BLE001  # of a vault behind it; its frames may hold secrets
        return ConfigurationError(f"the environment cannot be read ({type(error).__name__})")
    wrong = next((name for name, value in values.items() if not isinstance(value, str)), None)
    if wrong is not None:
        return ConfigurationError(f"{wrong} must be text, not {type(values[wrong]).__name__}")
    texts: dict[str, str] = {name: value.strip() for name, value in values.items()}
    for name in (KEY_VARIABLE, KEYS_VARIABLE):
        if texts[name] and texts[f"{name}_FILE"]:
            return ConfigurationError(f"{name} and {name}_FILE are both set; keep one of them")
    path = texts[f"{KEYS_VARIABLE}_FILE"]
    if path:
        many = _read_file(path, f"the file of {KEYS_VARIABLE}_FILE")
    else:
        many = _read(texts[KEYS_VARIABLE], place=f"{KEYS_VARIABLE}, line")
    path = texts[f"{KEY_VARIABLE}_FILE"]
    if not path:
        return _joined(texts[KEY_VARIABLE], many, place=KEY_VARIABLE)
    single = _text_of(path, f"the file of {KEY_VARIABLE}_FILE")
    if isinstance(single, ConfigurationError):
        return single
    return _joined(single, many, place=f"{KEY_VARIABLE}_FILE", required=True)


def _read_variables(values: Mapping[str, Any], file: str) -> _Pool:
    """The keys of an env file, from the two variables and no other."""
    single, many = values.get(KEY_VARIABLE, ""), values.get(KEYS_VARIABLE, "")
    if not (isinstance(single, str) and isinstance(many, str)):
        return _refused(file, f"{KEY_VARIABLE} and {KEYS_VARIABLE} must be text")
    return _joined(
        single,
        _read(many, place=_at(file, f"{KEYS_VARIABLE}, line")),
        place=_at(file, KEY_VARIABLE),
    )


def _joined(single: str, many: _Pool, *, place: str, required: bool = False) -> _Pool:
    if isinstance(many, ConfigurationError) or not (single.strip() or required):
        return many
    key = make_key(single, None, None, place=place)
    if isinstance(key, UnusableKey):
        return key.error
    return many if key.digest in {other.digest for other in many} else [key, *many]


def _assignments(text: str) -> dict[str, str]:
    """The variables of an env file. Lines inside a quoted value are not variables."""
    values: dict[str, str] = {}
    for found in _ASSIGNMENT.finditer(text):
        single, double, rest = found.group("single", "double", "bare")
        if single is not None:
            value = single
        elif double is not None:
            value = double.replace("\\n", "\n")
        else:
            value = _COMMENT.sub("", rest)
        values[found["name"]] = value
    return values


# --- files and text


def _read_file(path: Any, file: str) -> _Pool:
    text = _text_of(path, file)
    if isinstance(text, ConfigurationError):
        return text
    name = Path(path).name
    suffix = ".env" if name.startswith(".env") else Path(path).suffix.lower()
    return _read(text, place=f"{name}, line", suffix=suffix)


def _text_of(path: Any, file: str) -> str | ConfigurationError:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text; save it as UTF-8"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except (TypeError, ValueError):
        problem = "this is not a path"
    if _may_be_shown(path):
        return ConfigurationError(f"{file} {str(path)!r} cannot be read: {problem}")
    hint = (
        "its path is not repeated, because it may be a key; give the path of a file, and put "
        f"keys themselves into {KEYS_VARIABLE}"
    )
    return ConfigurationError(f"{file} cannot be read: {problem}; {hint}")


def _may_be_shown(path: Any) -> bool:
    """Whether a value is certainly a path, and not a misplaced key."""
    try:
        text = os.fsdecode(path)
        path = Path(text)
        named = path.suffix.lower() in _SUFFIXES - {""} or (os.sep in text and path.parent.is_dir())
        return (
            path.exists()
            or bool(_WORDS.fullmatch(text))
            or (
                named
                and text.isprintable()
                and not looks_secret(text)
                and not is_likely_key(path.stem)
            )
        )
    except (TypeError, ValueError, OSError):
        return False


def _read_any(text: object) -> _Pool:
    if not isinstance(text, str):
        return ConfigurationError(
            f"keys are read from a str, not {type(text).__name__}; decode it first"
        )
    return _read(text, place="line")


def _read(text: str, *, place: str, suffix: str = "") -> _Pool:
    """The keys of a text of any kind; suffix and content decide the kind.

    Errors append the line number to `place`.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    file = _file_of(place)
    if suffix in _JSON or (suffix in _PLAIN and text.lstrip()[:1] in {"{", "["}):
        try:
            return _read_json(json.loads(text, object_pairs_hook=_once), file)
        except _TwiceError:
            return _refused(file, "a name occurs twice in one JSON object; rename one of the two")
        except (ValueError, RecursionError):
            if suffix in _JSON or not text.lstrip().startswith(
                "["
            ):  # a leading "[" may be a section of an ini file
                return _refused(
                    file, "this is not valid JSON; correct it, or give the keys as text"
                )
    delimiter = _delimiter_of(text) if suffix in _PLAIN | _CSV else None
    if delimiter is not None:
        return _checked(_rows_of_csv(text, delimiter, place))
    if suffix in _CSV or _is_header(text):
        columns = "a column 'secret', and optional columns 'name' and 'account'"
        return _refused(file, f"a CSV file needs a header row with {columns}")
    return _read_lines(text, place, suffix)


def _read_lines(text: str, place: str, suffix: str) -> _Pool:
    """The keys of an env file or of plain text."""
    file = _file_of(place)
    variables = _assignments(text) if _OURS.search(text) else {}
    if not {KEY_VARIABLE, KEYS_VARIABLE}.isdisjoint(variables):
        return _read_variables(variables, file)
    if variables:
        return _refused(
            file,
            f"{KEY_VARIABLE} or {KEYS_VARIABLE} is inside the quotes of another value; "
            "is a quotation mark missing?",
        )
    if suffix in _ENV or _EXPORT.search(text):
        return _refused(
            file,
            f"this env file sets neither {KEY_VARIABLE}=… nor {KEYS_VARIABLE}=…; no other "
            "variable is read",
        )
    if suffix not in _PLAIN:
        kinds = "plain text (.txt or no suffix), an env file, JSON or CSV"
        return _refused(
            file,
            "files of this kind are not read, because they may hold other secrets; put the keys "
            f"into {kinds}",
        )
    return _checked(_keys_of_entries(list(_entries_of(text, place))))


def _file_of(place: str) -> str:
    """The file name in a place such as `keys.txt, line`, or an empty text."""
    return place.removesuffix("line").removesuffix(", ")


def _at(file: str, where: str) -> str:
    return f"{file}, {where}" if file else where


def _refused(file: str, problem: str) -> ConfigurationError:
    return ConfigurationError(problem, key_name=file or None)


def _checked(entries: _Entries) -> _Pool:
    pool: list[ApiKey] = []
    for key in entries:
        if isinstance(key, UnusableKey):
            return key.error
        pool.append(key)
    return contradiction(pool) or pool


def _entries_of(text: str, place: str) -> Iterator[tuple[str, str]]:
    """The entries between commas and line ends, each with its line number as place."""
    for number, line in enumerate(text.splitlines(), 1):
        for entry in _without_comment(line).split(","):
            if entry.strip():
                yield entry.strip(), f"{place} {number}"


def _without_comment(line: str) -> str:
    """The line without its comment, or all of it where the comment seems to be part of a name.

    An example is `customer #42=…`.
    """
    entry = _COMMENT.sub("", line)
    rest = line[len(entry) :].partition("=")[2].strip()
    return (
        line
        if entry.strip() and "=" not in entry and not may_be_key(entry.strip()) and may_be_key(rest)
        else entry
    )


def _keys_of_entries(entries: list[tuple[str, str]]) -> Iterator[ApiKey | UnusableKey]:
    # Where other entries look like keys, a bare entry that certainly is no key is a cell of a
    # table, or a part of a name.
    mixed = any(
        may_be_key(entry if _is_bare(entry) else entry.partition("=")[2].strip())
        for entry, _ in entries
    )
    for entry, place in entries:
        if mixed and "=" not in entry and not may_be_key(entry) and secret_problem(entry) is None:
            yield unusable(
                "this does not look like a key, as other entries do; if it is one, write "
                "NAME=SECRET",
                place,
            )
        else:
            yield _key_of_entry(entry, place)


def _is_bare(entry: str) -> bool:
    """Whether an entry has no name: it has no `=` except base64 padding at its end."""
    return "=" not in entry.rstrip("=") and (
        not entry.endswith("=") or may_be_key(entry.rstrip("="))
    )


def _key_of_entry(entry: str, place: str) -> ApiKey | UnusableKey:
    if _is_bare(entry):
        return make_key(entry, None, None, place=place)
    label, _, secret = entry.partition("=")
    if "#" in label and label.count(" #"):
        return unusable(
            "a name cannot hold ' #', which begins a comment; write such names in JSON or CSV",
            place,
        )
    if secret.strip() and not secret.strip("= "):
        return unusable(
            "only '=' follows the name; a key that ends in '=' needs a name before it",
            place,
        )
    return _labelled(label, secret, place)


def _labelled(label: str, secret: object, place: str) -> ApiKey | UnusableKey:
    account, name = split_label(label)
    problem = setting_problem(name, account, secret)
    if problem is not None:
        return unusable(problem, place)
    return _at_place(make_key(secret, name, account, place=place), place)


def _at_place(key: ApiKey | UnusableKey, place: str) -> ApiKey | UnusableKey:
    """The key; an `UnusableKey` is named by its line, which is easier to find than a name."""
    return unusable(key.error.message, place) if isinstance(key, UnusableKey) else key


# --- JSON


class _TwiceError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise _TwiceError
    return names


def _read_json(document: Any, file: str) -> _Pool:
    if isinstance(document, dict) and not {KEY_VARIABLE, KEYS_VARIABLE}.isdisjoint(document):
        return _read_variables(document, file)
    if isinstance(document, dict) and "secret" not in document:
        return _checked(
            _labelled(label, secret, _at(file, f"entry {n}"))
            for n, (label, secret) in enumerate(document.items(), 1)
        )
    if isinstance(document, list) and all(isinstance(row, dict) for row in document):
        places = (_at(file, f"entry {number}") for number in itertools.count(1))
        return _checked(
            _at_place(_key_of_row(row, place), place)
            for row, place in zip(document, places, strict=False)
        )
    shapes = "{\"name\": \"secret\"}, or a list of objects with 'secret', 'name' and 'account'"
    return _refused(file, f"this JSON does not hold keys; write it as {shapes}")


# --- CSV


def _delimiter_of(text: str) -> str | None:
    """The delimiter of a header row with a column `secret`; None without such a header row."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return next((mark for mark in ",;\t" if "secret" in _columns(first.split(mark))), None)


def _is_header(text: str) -> bool:
    """Whether the first line names columns, none of which is `secret`."""
    first = _columns(next((line for line in text.splitlines() if line.strip()), "").split(","))
    return (
        len(first) > 1
        and all(map(str.isidentifier, first))
        and not _OTHER_COLUMNS.isdisjoint(first)
    )


def _columns(cells: Iterable[str]) -> list[str]:
    return [cell.strip().strip('"').strip().lower() for cell in cells]


def _rows_of_csv(text: str, delimiter: str, place: str) -> Iterator[ApiKey | UnusableKey]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{place} {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(cells)
                if any(columns.count(column) > 1 for column in _COLUMNS):
                    yield unusable(
                        "a column occurs twice in the header row; rename one of the two", where
                    )
            elif len(cells) != len(columns):
                yield unusable("the row and the header row have different numbers of cells", where)
            else:
                yield _at_place(_key_of_row(dict(zip(columns, cells, strict=True)), where), where)
    except csv.Error:
        yield unusable(
            "the row is not CSV; is a quotation mark missing?", f"{place} {reader.line_num}"
        )


# --- records


def _rows_problem(rows: object) -> str | None:
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        kind = type(rows).__name__
        return (
            "rows must be an iterable of mappings with 'secret', 'name' and 'account', not "
            f"{kind}; put one row in a list: [row]"
        )
    return None


def _read_rows(rows: Iterator[Any]) -> list[ApiKey | UnusableKey]:
    pool: list[ApiKey | UnusableKey] = []
    taken = Uniqueness()
    for number, row in enumerate(rows):
        row = _key_of_row(row, f"rows[{number}]")  # noqa: PLW2901  # so that this frame does not hold the secret
        problem = None if isinstance(row, UnusableKey) else taken.take(row)
        # Named by its position, because an earlier row has its label.
        pool.append(
            row if problem is None else unusable(f"{row.label}: {problem}", f"rows[{number}]")
        )
    return pool


def _key_of_row(row: Any, place: str) -> ApiKey | UnusableKey:
    """The key of a mapping, or of a row with `keys()` and items by name, as of database drivers."""
    try:
        names = set(row.keys())
        secret, name, account = (row[column] if column in names else None for column in _COLUMNS)
    except Exception as error:  # noqa: BLE001  # of a driver, vault or cipher: only this row fails
        problem = (
            "a row must be a mapping with 'secret', 'name' and 'account', and this "
            f"{type(row).__name__} cannot be read as one"
        )
        return unusable(f"{problem} ({type(error).__name__})", place)
    key = make_key(clear_text(secret), _text(name), _text(account), place=place)
    if "secret" not in names and isinstance(key, UnusableKey):
        return unusable(
            "the row has no column 'secret'; give this name to the column that holds the keys",
            key.name,
            key.account,
        )
    return key


def _text(name: object) -> object:
    """A name or account from a row: numbers and UUIDs as text, an empty value as None."""
    return (
        str(name)
        if isinstance(name, (int, uuid.UUID)) and not isinstance(name, bool)
        else name or None
    )
