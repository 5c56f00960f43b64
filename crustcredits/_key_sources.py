"""Where keys come from: text, files, the environment, and records such as a database's rows.

Nothing but an API key may become one, so a file is plain text, an env file, JSON or CSV, and any other is refused as a whole. A
reader returns its problem as a value; each public function raises it once its own frame holds no secret.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

from crustcredits._errors import ConfigurationError
from crustcredits._key_checks import is_setting, looks_secret
from crustcredits._keys import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    UnusableKey,
    clear_text,
    contradiction,
    contradicts,
    make_key,
    split_label,
    unusable,
)

_Pool: TypeAlias = list[ApiKey] | ConfigurationError
_Entries: TypeAlias = Iterable[ApiKey | UnusableKey]

_COLUMNS: Final = ("secret", "name", "account")

_BYTE_ORDER_MARK = "\ufeff"
_COMMENT = re.compile(r"(^|\s)#.*")

_PLAIN: Final = frozenset({"", ".txt", ".text", ".keys", ".list"})
_JSON: Final = frozenset({".json"})
_CSV: Final = frozenset({".csv", ".tsv"})
_ENV: Final = frozenset({".env"})
_SUFFIXES: Final = _PLAIN | _JSON | _CSV | _ENV

_OURS = re.compile(rf"^[ \t]*(?:export[ \t]+)?{KEY_VARIABLE}S?[ \t]*=", re.MULTILINE)
_EXPORT = re.compile(r"^[ \t]*export[ \t]+\w+=", re.MULTILINE)
_ASSIGNMENT = re.compile(
    r"""
    ^[ \t]* (?:export[ \t]+)? (?P<name>[A-Za-z_][\w.]*) [ \t]* = [ \t]*
    (?: '(?P<single>[^']*)' | "(?P<double>(?:[^"\\]|\\.)*)" | (?P<bare>[^\n]*) )
    """,
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)

_A_SETTING = (
    "its name is that of a setting, so this seems to be the configuration of a program; of an env file only "
    f"{KEY_VARIABLE} and {KEYS_VARIABLE} are read, and keys need names such as prod or acme/prod"
)


# A path of lower-case words, which no generated key is.
_WORDS = re.compile(r"[a-z_.-]*(/[a-z_.-]+)+")


# --- public


def keys_from_text(text: str) -> list[ApiKey]:
    """Read keys from text: one a line or divided by commas, each `secret`, `name=secret` or `account/name=secret`.

    A `#` at the start of a line or after white space begins a comment. An env file, JSON, and CSV with a header row are read as
    `keys_from_file` says.

    Raises:
        ConfigurationError: A line cannot be used (the error names it by its number); two keys of one account have one name; one
            secret stands under two accounts; or the text is of another kind, such as the settings of a program.
    """
    pool = _pool_of_text(text)
    del text
    return _or_raise(pool)


def keys_from_file(path: str | os.PathLike[str]) -> list[ApiKey]:
    """Read keys from a UTF-8 file: plain text, an env file, JSON or CSV, by its suffix and its content.

    - Plain text has no suffix, or `.txt`, and is read as `keys_from_text` says.
    - An env file has a line `CRUSTDATA_API_KEY=…` or `CRUSTDATA_API_KEYS=…`, with or without `export`. Only these two
      variables are read, as `keys_from_env` reads them, and all others are ignored.
    - JSON is an object of labels and secrets, `{"acme/prod": "…"}`, or a list of objects with `secret`, `name` and `account`.
    - CSV has a header row with a column `secret`, and `name` and `account` where they are known; other columns are ignored.

    Any other file is refused as a whole, so that no other secret of a service is sent as a key.

    Raises:
        ConfigurationError: The file cannot be read or is of another kind; or as `keys_from_text`. A path that may be a key in the
            wrong place is not repeated.
    """
    pool = _pool_of_file(path, "the keys file")
    del path
    return _or_raise(pool)


def keys_from_env(environ: Mapping[str, str] | None = None) -> list[ApiKey]:
    """Read keys from the environment.

    `CRUSTDATA_API_KEY` is one secret. `CRUSTDATA_API_KEYS` holds many, as `keys_from_text` reads them. `CRUSTDATA_API_KEY_FILE` and
    `CRUSTDATA_API_KEYS_FILE` name files in their place, as Docker's and Kubernetes' secrets are; the second may be any file that
    `keys_from_file` reads. A secret that stands in both is kept once, under the name it has among the many. Returns an
    empty list when no variable is set.

    Raises:
        ConfigurationError: A variable or its file cannot be used, or both are set.
    """
    pool = _pool_of_environ(os.environ if environ is None else environ)
    del environ
    return _or_raise(pool)


def keys_from_records(rows: Iterable[Mapping[str, Any]]) -> list[ApiKey | UnusableKey]:
    """Read keys from mappings with `secret`, and `name` and `account` where they are known, such as a database's rows.

    Other columns are ignored; a name or an account may be None or empty. A row that cannot be used becomes an `UnusableKey`,
    and so does a row with the label of an earlier one, or with its secret under another account. In a check it fails alone.

    Raises:
        ConfigurationError: These are no rows at all.
    """
    problem = _rows_problem(rows)
    if problem is not None:
        del rows
        raise ConfigurationError(problem)
    source = iter(rows)
    del rows
    return _pool_of_rows(source)


def _or_raise(pool: _Pool) -> list[ApiKey]:
    if isinstance(pool, ConfigurationError):
        raise pool
    return pool


# --- the environment and env files


def _pool_of_environ(environ: Mapping[str, str]) -> _Pool:
    paths = {name: environ.get(f"{name}_FILE", "").strip() for name in (KEY_VARIABLE, KEYS_VARIABLE)}
    for name, path in paths.items():
        if path and environ.get(name, "").strip():
            return ConfigurationError(f"{name} and {name}_FILE are both set; keep one of them")
    if paths[KEYS_VARIABLE]:
        many = _pool_of_file(paths[KEYS_VARIABLE], f"the file of {KEYS_VARIABLE}_FILE")
    else:
        many = _pool_of(environ.get(KEYS_VARIABLE, ""), place=f"{KEYS_VARIABLE}, line")
    if not paths[KEY_VARIABLE]:
        return _joined(environ.get(KEY_VARIABLE, ""), many, place=KEY_VARIABLE)
    single = _text_of(paths[KEY_VARIABLE], f"the file of {KEY_VARIABLE}_FILE")
    if isinstance(single, ConfigurationError):
        return single
    return _joined(single, many, place=f"{KEY_VARIABLE}_FILE", required=True)


def _pool_of_variables(values: Mapping[str, Any], file: str) -> _Pool:
    """Of an env file: the two variables, and nothing else."""
    single, many = values.get(KEY_VARIABLE, ""), values.get(KEYS_VARIABLE, "")
    if not (isinstance(single, str) and isinstance(many, str)):
        return _refused(file, f"{KEY_VARIABLE} and {KEYS_VARIABLE} hold text")
    return _joined(single, _pool_of(many, place=_at(file, f"{KEYS_VARIABLE}, line")), place=_at(file, KEY_VARIABLE))


def _joined(single: str, many: _Pool, *, place: str, required: bool = False) -> _Pool:
    if isinstance(many, ConfigurationError) or not (single.strip() or required):
        return many
    key = make_key(single, None, None, place=place)
    if isinstance(key, UnusableKey):
        return key.error
    return many if key.digest in {other.digest for other in many} else [key, *many]


def _assignments(text: str) -> dict[str, str]:
    """The variables of an env file. A value in quotes may go over several lines, which are no variables then."""
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


def _pool_of_file(path: Any, file: str) -> _Pool:
    text = _text_of(path, file)
    if isinstance(text, ConfigurationError):
        return text
    name = Path(path).name
    suffix = ".env" if name.startswith(".env") else Path(path).suffix.lower()
    return _pool_of(text, place=f"{name}, line", suffix=suffix)


def _text_of(path: Any, file: str) -> str | ConfigurationError:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except (TypeError, ValueError):
        problem = "that is no path"
    if _may_be_shown(path):
        return ConfigurationError(f"{file} {str(path)!r} cannot be read: {problem}")
    hint = "its path is not repeated, because it may be a key; keys themselves go through keys_from_text()"
    return ConfigurationError(f"{file} cannot be read: {problem}; {hint}")


def _may_be_shown(path: Any) -> bool:
    """Whether it is certainly a path, and not a key in the wrong place."""
    try:
        text = os.fsdecode(path)
        path = Path(text)
        named = path.suffix.lower() in _SUFFIXES - {""} or (os.sep in text and path.parent.is_dir())
        return path.exists() or bool(_WORDS.fullmatch(text)) or (named and text.isprintable() and not looks_secret(path.name))
    except (TypeError, ValueError, OSError):
        return False


def _pool_of_text(text: object) -> _Pool:
    if not isinstance(text, str):
        return ConfigurationError(f"keys are read from a str, not {type(text).__name__}; decode it first")
    return _pool_of(text, place="line")


def _pool_of(text: str, *, place: str, suffix: str = "") -> _Pool:
    """The keys of a text of any kind; suffix and content tell which. The number of a line is put behind `place`."""
    text = text.removeprefix(_BYTE_ORDER_MARK)
    file = place.removesuffix("line").removesuffix(", ")
    if suffix in _JSON or (suffix in _PLAIN and text.lstrip()[:1] in {"{", "["}):
        document = _json_of(text)
        if document is not None:
            return _pool_of_json(document, file)
        if suffix in _JSON:
            return _refused(file, "it is not JSON, or a name stands in it twice")
    delimiter = _delimiter_of(text) if suffix in _PLAIN | _CSV else None
    if delimiter is not None:
        return _checked(_rows_of_csv(text, delimiter, place))
    if suffix in _CSV:
        return _refused(file, "a CSV file needs a header row with a column 'secret', and 'name' and 'account' where they are known")
    if _OURS.search(text):
        return _pool_of_variables(_assignments(text), file)
    if suffix in _ENV or _EXPORT.search(text):
        return _refused(file, f"this env file sets neither {KEY_VARIABLE} nor {KEYS_VARIABLE}; no other variable is read")
    if suffix not in _PLAIN:
        kinds = "plain text (.txt or no suffix), an env file, JSON or CSV"
        return _refused(file, f"files of this kind are not read, because they may hold other secrets; keys may stand in {kinds}")
    return _checked(_keys_of_entries(list(_entries_of(text, place))))


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
    """The entries between commas and line ends, each with its place."""
    for number, line in enumerate(text.splitlines(), 1):
        for entry in _COMMENT.sub("", line).split(","):
            if entry.strip():
                yield entry.strip(), f"{place} {number}"


def _keys_of_entries(entries: list[tuple[str, str]]) -> Iterator[ApiKey | UnusableKey]:
    # Where some bare entries look like keys, the others are the cells beside them, or anything else that is no key.
    mixed = any("=" not in entry.rstrip("=") and looks_secret(entry) for entry, _ in entries)
    for entry, place in entries:
        if mixed and "=" not in entry and not looks_secret(entry):
            yield unusable("it does not look like the other keys without a name; if it is a key, give it one: NAME=SECRET", place)
        else:
            yield _key_of_entry(entry, place)


def _key_of_entry(entry: str, place: str) -> ApiKey | UnusableKey:
    label, equals, secret = entry.partition("=")
    if not equals or (not secret.strip("= ") and looks_secret(label)):  # "=" at the end of a bare key is base64's padding
        return make_key(entry, None, None, place=place)
    if secret.strip() and not secret.strip("= "):
        return unusable("nothing but '=' stands behind a name; a key that ends in '=' needs a name before it", place)
    return _labelled(label, secret, place)


def _labelled(label: str, secret: object, place: str) -> ApiKey | UnusableKey:
    account, name = split_label(label)
    key = make_key(secret, name, account, place=place)
    if isinstance(key, UnusableKey):
        return unusable(key.error.message, place)  # in a file a line is easier to find than a name
    return unusable(_A_SETTING, place) if is_setting(key.name) else key


# --- JSON


class _TwiceError(ValueError):
    pass


def _json_of(text: str) -> Any:
    """The document, or None when it is no JSON, or a name stands in it twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise _TwiceError
    return names


def _pool_of_json(document: Any, file: str) -> _Pool:
    if isinstance(document, dict) and not {KEY_VARIABLE, KEYS_VARIABLE}.isdisjoint(document):
        return _pool_of_variables(document, file)
    if isinstance(document, dict) and "secret" not in document:
        return _checked(_labelled(label, secret, _at(file, f"entry {n}")) for n, (label, secret) in enumerate(document.items(), 1))
    if isinstance(document, list) and all(isinstance(row, dict) for row in document):
        return _checked(_key_of_row(row, _at(file, f"entry {n}")) for n, row in enumerate(document, 1))
    shapes = "{\"name\": \"secret\"}, or a list of objects with 'secret', 'name' and 'account'"
    return _refused(file, f"this JSON does not hold keys; it has to be {shapes}")


# --- CSV


def _delimiter_of(text: str) -> str | None:
    """The delimiter of a header row with a column `secret`; None when the first line is no such row."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return next((mark for mark in ",;\t" if "secret" in _columns(first.split(mark))), None)


def _columns(cells: Iterable[str]) -> list[str]:
    return [cell.strip().strip('"').strip().lower() for cell in cells]


def _rows_of_csv(text: str, delimiter: str, place: str) -> Iterator[ApiKey | UnusableKey]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            where = f"{place} {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = _columns(cells)
            elif len(cells) != len(columns):
                yield unusable("the row has another number of cells than the header row", where)
            else:
                yield _key_of_row(dict(zip(columns, cells, strict=True)), where)
    except csv.Error:
        yield unusable("the row is not CSV; is a quotation mark missing?", f"{place} {reader.line_num}")


# --- records


def _rows_problem(rows: object) -> str | None:
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        kind = type(rows).__name__
        return f"rows are an iterable of mappings with 'secret', 'name' and 'account', not {kind}; put one row in a list: [row]"
    return None


def _pool_of_rows(rows: Iterator[Any]) -> list[ApiKey | UnusableKey]:
    pool: list[ApiKey | UnusableKey] = []
    by_label: dict[str, ApiKey] = {}
    accounts: dict[bytes, ApiKey] = {}
    for number, row in enumerate(rows):
        row = _key_of_row(row, f"rows[{number}]")  # noqa: PLW2901  # so that this frame does not hold the secret
        error = None if isinstance(row, UnusableKey) else contradicts(row, by_label, accounts)
        pool.append(row if error is None else UnusableKey(name=row.name, account=row.account, error=error))
    return pool


def _key_of_row(row: Any, place: str) -> ApiKey | UnusableKey:
    """The key of a mapping, or of anything with `keys()` and items by name, as the rows of database drivers have."""
    try:
        names = set(row.keys())
        secret, name, account = (row[column] if column in names else None for column in _COLUMNS)
    except (AttributeError, TypeError, LookupError):
        return unusable(f"a row is a mapping with 'secret', 'name' and 'account', not {type(row).__name__}", place)
    return make_key(clear_text(secret), name or None, account or None, place=place)
