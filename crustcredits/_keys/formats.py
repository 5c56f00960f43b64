"""Keys in text: plain entries, env files, JSON and CSV.

Only an API key may become an `ApiKey`, so text of any other kind is refused as a whole. This module
knows neither files nor the environment. A problem is returned as a value, never raised.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeAlias

from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    UnusableKey,
    make_key,
    split_label,
    unusable,
)
from crustcredits._keys.checks import may_be_key, secret_problem, setting_problem
from crustcredits._keys.key_pool import contradiction
from crustcredits._keys.rows import COLUMNS, key_of_row

#: The keys of a source, or the error for it.
Pool: TypeAlias = list[ApiKey] | ConfigurationError
_Entries: TypeAlias = Iterable[ApiKey | UnusableKey]

_BYTE_ORDER_MARK = "\ufeff"
_COMMENT = re.compile(r"(^|\s)#.*")

_PLAIN: Final = frozenset({"", ".txt", ".text", ".keys", ".list"})
_JSON: Final = frozenset({".json"})
_CSV: Final = frozenset({".csv", ".tsv"})
_ENV: Final = frozenset({".env"})
SUFFIXES: Final = _PLAIN | _JSON | _CSV | _ENV

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


def read_text(text: str, *, place: str, suffix: str = "") -> Pool:
    """The keys of a text of any kind; suffix and content decide the kind.

    Errors append the line number to `place`.
    """
    text = text.removeprefix(_BYTE_ORDER_MARK)
    file = _file_of(place)
    if suffix in _JSON or (suffix in _PLAIN and text.lstrip()[:1] in {"{", "["}):
        try:
            return _read_json(json.loads(text, object_pairs_hook=_once), file)
        except _TwiceError:
            return _refused(
                file, "a name occurs twice in one JSON object; rename one of the two entries"
            )
        except (ValueError, RecursionError):
            if suffix in _JSON or not text.lstrip().startswith(
                "["
            ):  # a leading "[" may be a section of an ini file
                return _refused(
                    file,
                    "the text begins like JSON, but is not valid JSON; correct it",
                )
    delimiter = _delimiter_of(text) if suffix in _PLAIN | _CSV else None
    if delimiter is not None:
        return _checked(_rows_of_csv(text, delimiter, place))
    if suffix in _CSV or _is_header(text):
        columns = "'secret', and if needed 'name' and 'account'"
        return _refused(file, f"the CSV text has no column 'secret'; name its columns {columns}")
    return _read_lines(text, place, suffix)


def _read_lines(text: str, place: str, suffix: str) -> Pool:
    """The keys of an env file or of plain text."""
    file = _file_of(place)
    variables = _assignments(text) if _OURS.search(text) else {}
    if not {KEY_VARIABLE, KEYS_VARIABLE}.isdisjoint(variables):
        return _read_variables(variables, file)
    if variables:
        return _refused(
            file,
            f"{KEY_VARIABLE} or {KEYS_VARIABLE} is inside the quotes of another value; "
            "add the missing quotation mark",
        )
    if suffix in _ENV or _EXPORT.search(text):
        return _refused(
            file,
            f"the env file sets neither {KEY_VARIABLE}=… nor {KEYS_VARIABLE}=…, and no other "
            "variable is read; set one of them",
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


def _checked(entries: _Entries) -> Pool:
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
                "the entry does not look like a key, as other entries do; remove it, or write "
                "NAME=SECRET if it is one",
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
            "only '=' follows the name, so there is no key; write NAME=SECRET, also for a key that "
            "ends in '='",
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


# --- the two variables


def _read_variables(values: Mapping[str, Any], file: str) -> Pool:
    """The keys of an env file, from the two variables and no other."""
    single, many = values.get(KEY_VARIABLE, ""), values.get(KEYS_VARIABLE, "")
    if not (isinstance(single, str) and isinstance(many, str)):
        return _refused(
            file, f"{KEY_VARIABLE} and {KEYS_VARIABLE} must be text, and one is not; quote it"
        )
    return joined(
        single,
        read_text(many, place=_at(file, f"{KEYS_VARIABLE}, line")),
        place=_at(file, KEY_VARIABLE),
    )


def joined(single: str, many: Pool, *, place: str, required: bool = False) -> Pool:
    """The keys of both variables; a secret in both is kept once, as one of `many`."""
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


# --- JSON


class _TwiceError(ValueError):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise _TwiceError
    return names


def _read_json(document: Any, file: str) -> Pool:
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
            _at_place(key_of_row(row, place), place)
            for row, place in zip(document, places, strict=False)
        )
    shapes = "{\"name\": \"secret\"}, or a list of objects with 'secret', 'name' and 'account'"
    return _refused(file, f"the JSON does not hold keys; write it as {shapes}")


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
                if any(columns.count(column) > 1 for column in COLUMNS):
                    yield unusable(
                        "a column occurs twice in the header row; rename one of the two columns",
                        where,
                    )
            elif len(cells) != len(columns):
                yield unusable(
                    "the row and the header row have different numbers of cells; add the missing "
                    "ones, or quote a cell that holds the delimiter",
                    where,
                )
            else:
                yield _at_place(key_of_row(dict(zip(columns, cells, strict=True)), where), where)
    except csv.Error:
        yield unusable(
            "the row is not valid CSV; look for a missing quotation mark",
            f"{place} {reader.line_num}",
        )
