"""Sources of keys: text, files, the environment, and records such as a database's rows.

`formats.py` reads text. Readers return a problem as a value; each public function raises it once
its own frame holds no secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from crustcredits._errors import ConfigurationError
from crustcredits._keys.api_key import (
    KEY_VARIABLE,
    KEYS_VARIABLE,
    ApiKey,
    UnusableKey,
    unusable,
)
from crustcredits._keys.checks import is_likely_key, looks_secret
from crustcredits._keys.formats import SUFFIXES, Pool, joined, read_text
from crustcredits._keys.key_pool import Uniqueness
from crustcredits._keys.rows import key_of_row
from crustcredits._validation import hides_arguments, kind_of

_VARIABLES: Final = (KEY_VARIABLE, f"{KEY_VARIABLE}_FILE", KEYS_VARIABLE, f"{KEYS_VARIABLE}_FILE")

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


def _or_raise(pool: Pool) -> list[ApiKey]:
    if isinstance(pool, ConfigurationError):
        raise pool
    return pool


# --- the environment


def _read_environ(environ: object) -> Pool:
    if not isinstance(environ, Mapping):
        return ConfigurationError(
            f"environ must be a mapping of names to text, not {kind_of(environ)}"
        )
    try:
        values = {name: environ.get(name) or "" for name in _VARIABLES}
    except Exception as error:  # noqa: BLE001  # of a vault behind it; its frames may hold secrets
        return ConfigurationError(
            f"environ cannot be read ({type(error).__name__}); repair its source, or set the "
            "variables in the environment of the process"
        )
    wrong = next((name for name, value in values.items() if not isinstance(value, str)), None)
    if wrong is not None:
        return ConfigurationError(f"{wrong} must be a str, not {kind_of(values[wrong])}")
    texts: dict[str, str] = {name: value.strip() for name, value in values.items()}
    for name in (KEY_VARIABLE, KEYS_VARIABLE):
        if texts[name] and texts[f"{name}_FILE"]:
            return ConfigurationError(f"{name} and {name}_FILE are both set; keep one of them")
    path = texts[f"{KEYS_VARIABLE}_FILE"]
    if path:
        many = _read_file(path, f"the file of {KEYS_VARIABLE}_FILE")
    else:
        many = read_text(texts[KEYS_VARIABLE], place=f"{KEYS_VARIABLE}, line")
    path = texts[f"{KEY_VARIABLE}_FILE"]
    if not path:
        return joined(texts[KEY_VARIABLE], many, place=KEY_VARIABLE)
    single = _text_of(path, f"the file of {KEY_VARIABLE}_FILE")
    if isinstance(single, ConfigurationError):
        return single
    return joined(single, many, place=f"{KEY_VARIABLE}_FILE", required=True)


# --- files and text


def _read_file(path: Any, file: str) -> Pool:
    text = _text_of(path, file)
    if isinstance(text, ConfigurationError):
        return text
    name = Path(path).name
    suffix = ".env" if name.startswith(".env") else Path(path).suffix.lower()
    return read_text(text, place=f"{name}, line", suffix=suffix)


def _text_of(path: Any, file: str) -> str | ConfigurationError:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        problem = "it is not UTF-8 text; save it as UTF-8"
    except OSError as error:
        problem = f"{error.strerror or type(error).__name__}; correct the path or the file's rights"
    except (TypeError, ValueError):
        problem = "the value is not a path"
    if _may_be_shown(path):
        return ConfigurationError(f"{file} {str(path)!r} cannot be read: {problem}")
    hint = (
        "the path is not repeated, because it may be a key; put keys themselves into "
        f"{KEYS_VARIABLE}"
    )
    return ConfigurationError(f"{file} cannot be read: {problem}; {hint}")


def _may_be_shown(path: Any) -> bool:
    """Whether a value is certainly a path, and not a misplaced key."""
    try:
        text = os.fsdecode(path)
        path = Path(text)
        named = path.suffix.lower() in SUFFIXES - {""} or (os.sep in text and path.parent.is_dir())
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


def _read_any(text: object) -> Pool:
    if not isinstance(text, str):
        return ConfigurationError(f"text must be a str, not {kind_of(text)}; decode bytes first")
    return read_text(text, place="line")


# --- records


def _rows_problem(rows: object) -> str | None:
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        return (
            "rows must be an iterable of mappings with 'secret', 'name' and 'account', not "
            f"{kind_of(rows)}; put one row in a list: [row]"
        )
    return None


def _read_rows(rows: Iterator[Any]) -> list[ApiKey | UnusableKey]:
    pool: list[ApiKey | UnusableKey] = []
    taken = Uniqueness()
    for number, row in enumerate(rows):
        row = key_of_row(row, f"rows[{number}]")  # noqa: PLW2901  # so that this frame does not hold the secret
        problem = None if isinstance(row, UnusableKey) else taken.take(row)
        # Named by its position, because an earlier row has its label.
        pool.append(
            row if problem is None else unusable(f"{row.label}: {problem}", f"rows[{number}]")
        )
    return pool
