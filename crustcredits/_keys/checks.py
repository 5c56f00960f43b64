"""Checks of API keys and labels: whether a text can be one, and which other kind it seems to be.

Pure functions: a problem is returned as a sentence and never raised, and no sentence repeats a
secret. This module must not know key objects or sources.
"""

from __future__ import annotations

import itertools
import re

from crustcredits._validation import kind_of

_BYTE_ORDER_MARK = "\ufeff"
_SCHEME = re.compile(r"(bearer|token)(\s|$)", re.IGNORECASE)

_PLACEHOLDER = re.compile(
    r"""
      [$%]\{?\w | \$\( | \{\{ | ^<.*>$        # ${KEY}, $KEY, %KEY%, $(command), {{ key }}, <key>
    | ^op://                                  # a reference to a secret store
    | ^your[-_ ] | (^|[-_. ])your[-_ ]?(api|secret|key|token) | (key|token|secret)[-_ ]here$
    | (^|[-_. ])(replace|change)[-_ ]?me | ^(insert|enter|paste)[-_ ] | ^placeholder
    | \*{3,} | \.{3,} | … | (^|[-_.])x{3,}($|[-_.]) | x{6,}  # masked
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Quick filter: a placeholder contains one of these words, or a character that no key has.
_HINTS = (
    "your",
    "here",
    "replace",
    "change",
    "insert",
    "enter",
    "paste",
    "placeholder",
    "xxx",
    "...",
)
_NO_VALUES = frozenset({"todo", "tbd", "fixme", "redacted", "null", "none", "nil", "undefined"})
# Only letters, digits and the punctuation of keys. Almost every key matches, and its characters
# need no further check.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9+/_.~-]+=*")
_VARIABLE = re.compile(r"[A-Z]{2,}(_[A-Z]{2,})+|(?i:(crustdata[-_])?api[-_]?keys?)")
_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?")
# Lower-case words between slashes, or a name with a file suffix. No generated key is either.
_PATH = re.compile(
    r"(~|\.\.?)/.*|/(etc|home|mnt|opt|root|run|srv|tmp|usr|var)/.*|[a-z_.~-]*(/[a-z_.-]+)+"
    r"|.*\.(txt|json|csv|tsv|env|ini|toml|ya?ml|pem|conf|cfg)",
    re.DOTALL,
)

# GitHub, GitLab, Slack, AWS, Google, SendGrid, Anthropic and OpenAI publish their key prefixes.
_OTHER_SERVICE = re.compile(
    r"gh[oprsu]_|github_pat_|glpat-|xox[abeprs]-|(AKIA|ASIA)[A-Z0-9]{16}$|AIza[\w-]{35}$"
    r"|SG\.[\w-]+\.|sk-ant-|sk-proj-|npm_|pypi-|hf_|whsec_|rk_live_|shpat_|dop_v1_|hvs\.|xapp-|sk-or-v1-|sk-svcacct-|AGE-SECRET-KEY-"
)

# Characters that no key has, and the kind of text that they come from. The first match counts.
_SEEMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("://"), "'://': it seems to be a URL, as in an env file; put the key itself there"),
    (
        re.compile("@"),
        (
            "an '@': it seems to be an e-mail address, or a part of a connection string; put the "
            "key itself there"
        ),
    ),
    (re.compile("-----"), "'-----': it seems to be a line of a PEM file; put the key itself there"),
    (
        re.compile("['\"`]"),
        (
            "a quotation mark: it seems to be a line of JSON, TOML or a shell script; give the "
            "key bare"
        ),
    ),
    (
        re.compile(","),
        (
            "a comma: it seems to be a list of keys, or a line of a CSV file; put a list into "
            "CRUSTDATA_API_KEYS"
        ),
    ),
    (
        re.compile(";"),
        (
            "a semicolon: it seems to be a list, or a line of a CSV or ini file; divide keys by "
            "commas or lines"
        ),
    ),
    (
        re.compile(r"[\[\]]"),
        (
            "a square bracket: it seems to be a section of an ini file, or a JSON list; give the "
            "key bare"
        ),
    ),
    (re.compile(r"[{}]"), "a brace: it seems to be JSON or a template; give the key bare"),
    (
        re.compile(r"[<>]"),
        "an angle bracket: it seems to be a placeholder, or a line of XML; give the key bare",
    ),
    (re.compile(r"[()]"), "a parenthesis: it seems to be a line of a program; give the key bare"),
    (
        re.compile(":"),
        (
            "a colon: it seems to be a line of YAML, a user with a password, or a path; give the "
            "key bare, or in text as NAME=SECRET"
        ),
    ),
    (
        re.compile("[|&!?^*]"),
        (
            "a character that no key has (one of | & ! ? ^ *): it seems to be a list, or a part of "
            "a URL; give the key bare"
        ),
    ),
    (
        re.compile(r"\\"),
        (
            "a backslash: it seems to be a path, or a line that continues on the next; give the "
            "key bare, on one line"
        ),
    ),
)


def trimmed(secret: str) -> str:
    """The secret without outer white space and byte-order mark, which files and clipboards add."""
    return secret.strip().removeprefix(_BYTE_ORDER_MARK).strip()


def secret_problem(secret: object) -> str | None:
    """The reason why a value cannot be an API key, or None."""
    if not isinstance(secret, str):
        return _kind_problem(secret)
    secret = trimmed(secret)
    if not secret:
        return "the API key is empty; put the key there, or leave the entry out"
    if _SCHEME.match(secret):
        return (
            "the API key begins with 'Bearer' or 'Token'; give the bare key, because the client "
            "adds the scheme itself"
        )
    if _is_placeholder(secret):
        return (
            "the API key is a placeholder, or a reference that was not replaced; put the key "
            "itself there"
        )
    if _VARIABLE.fullmatch(secret):
        return "the API key is the name of a variable; put the key itself there"
    if secret[0] == "-" and _OPTION.fullmatch(secret):
        return "the API key is an option of a command; put the key itself there"
    if _OTHER_SERVICE.match(secret):
        return "the API key is a key of another service; put the Crustdata key there"
    if ("/" in secret or "." in secret) and _PATH.fullmatch(secret):
        return (
            "the API key is the path of a file; read the file with keys_from_file(), or name it "
            "in CRUSTDATA_API_KEYS_FILE"
        )
    return _character_problem(secret)


def _kind_problem(secret: object) -> str:
    hint = ""
    if isinstance(secret, (bytes, bytearray)):
        hint = "; decode it first"
    elif isinstance(secret, dict):
        hint = "; rows of a database go through keys_from_records()"
    elif secret is None:
        hint = "; look for an unset variable or an empty column at its source"
    return f"the API key must be a str, a SecretStr or an ApiKey, not {kind_of(secret)}{hint}"


def _is_placeholder(secret: str) -> bool:
    lower = secret.casefold()
    if lower in _NO_VALUES:
        return True
    if _PLAIN_KEY.fullmatch(secret) and not any(hint in lower for hint in _HINTS):
        return False
    return _PLACEHOLDER.search(secret) is not None


def _character_problem(secret: str) -> str | None:
    if _PLAIN_KEY.fullmatch(secret) and "-----" not in secret:
        return None if any(map(str.isalnum, secret)) else _NO_LETTER
    if secret[0] in "'\"" or secret[-1] in "'\"":
        return "the API key begins or ends with a quotation mark; give the key bare"
    seems = next((said for mark, said in _SEEMS if mark.search(secret)), None)
    if seems is not None:
        return f"the API key holds {seems}"
    if not secret.isascii():
        return "the API key holds characters outside ASCII; copy it again from where it was issued"
    if not secret.isprintable() or " " in secret:
        return (
            "the API key holds white space or control characters inside; copy one whole key, and "
            "divide several by commas or lines"
        )
    if "=" in secret.rstrip("="):  # a trailing '=' is base64 padding
        return (
            "the API key holds '=': it seems to be a line NAME=SECRET, as in an env file; give "
            "only the secret"
        )
    return None if any(map(str.isalnum, secret)) else _NO_LETTER


_NO_LETTER = "the API key holds no letter and no digit; copy it again from where it was issued"


def label_problem(part: str, label: object, secret: object) -> str | None:
    """The problem of `label` as the `part` (name or account) of this secret's key, or None."""
    if label is None:
        return None
    if not isinstance(label, str):
        return f"the {part} of the API key must be a str, not {kind_of(label)}"
    label = label.strip()
    if not label:
        return f"the {part} of the API key is empty; give one, or leave it out"
    if not label.isprintable():
        return f"the {part} of the API key holds unprintable characters; remove them"
    if label[0] in "'\"" or label[-1] in "'\"":
        return (
            f"the {part} of the API key begins or ends with a quotation mark; remove the "
            "quotation marks around the whole entry"
        )
    if _gives_away(label, secret):
        return (
            f"the {part} of the API key holds the secret, but labels are printed; choose another "
            f"{part}"
        )
    if (looks_secret(label) or is_likely_key(label)) and (
        secret_problem(secret) is not None or not may_be_key(secret)
    ):
        return (
            f"the {part} of the API key looks more like a secret than its value does, and is not "
            "shown; if the two are swapped, write NAME=SECRET, or {name: secret}"
        )
    return None


def slash_problem(name: object, account: object) -> str | None:
    """The reason why a label of this name and account would be ambiguous, or None."""
    if isinstance(account, str) and "/" in account:
        return (
            "the account of the API key holds a '/', which divides account and name; choose "
            "another account name"
        )
    if account is None and isinstance(name, str) and "/" in name:
        return (
            "the name of the API key holds a '/', which divides account and name; give both "
            "separately: account= and name="
        )
    return None


def _gives_away(label: str, secret: object) -> bool:
    # A short secret, as in tests, may be part of an ordinary word; a real secret never is.
    whole = secret.casefold() if isinstance(secret, str) else ""
    bare, name = trimmed(whole), label.casefold()
    runs = _RUN.findall(name) if looks_secret(label) else []
    return name == bare or (len(bare) >= 8 and bare in name) or any(run in whole for run in runs)


_RUN = re.compile(r"[A-Za-z0-9]{12,}")
_VARIED = 8  # different characters
_WORD_OR_NUMBER = re.compile(r"[A-Za-z]{12,24}|[A-Za-z]+[0-9]{1,8}|[0-9]+[A-Za-z]?")


def looks_secret(text: object) -> bool:
    """Whether a text looks generated: it has a varied run of at least 12 letters and digits.

    A run that is a word, a number or a word with a number does not count.
    """
    runs = _RUN.findall(text) if isinstance(text, str) else []
    return any(len(set(run)) >= _VARIED and not _WORD_OR_NUMBER.fullmatch(run) for run in runs)


_SHORTEST_KEY = 16
_WORD = "(?:[a-z]{1,24}|[A-Z][a-z]{0,24}|[A-Z]{1,12})?[0-9]{0,4}"
_WORDS = re.compile(f"{_WORD}(?:[-_./ ]{_WORD})*")


def may_be_key(text: object) -> bool:
    """Whether a text is long enough for an API key, and is not words with numbers.

    This test is weaker than `looks_secret`: real keys almost never fail it.
    """
    return isinstance(text, str) and len(text) >= _SHORTEST_KEY and not _WORDS.fullmatch(text)


_MIXED = 7  # changes between letters and digits


def is_likely_key(text: object) -> bool:
    """Whether a text is too long and mixed of letters and digits for a name, such as a UUID."""
    if not isinstance(text, str) or len(text) < _SHORTEST_KEY or not _PLAIN_KEY.fullmatch(text):
        return False
    kinds = [char.isdigit() for char in text if char.isalnum()]
    return sum(before != after for before, after in itertools.pairwise(kinds)) >= _MIXED


# Words in the names of settings that hold other secrets or addresses: `DB_PASSWORD`,
# `spring.datasource.url`, `clientSecret`.
_PASSWORDS = frozenset({"password", "passwd", "passphrase", "pwd"})
_SECRETS = (
    "pass",
    "pw",
    "secret",
    "token",
    "salt",
    "cookie",
    "dsn",
    "url",
    "uri",
    "credential",
    "credentials",
)
_ENDS = ("password", "passwd", "secret", "token", "apikey", "secretkey", "accesskey", "privatekey")
_KINDS_OF_KEYS = frozenset({"api", "access", "private", "secret", "public", "encryption", "ssh"})
# Words in the names of both settings and keys: here the value decides.
_PLAIN = frozenset(
    {
        *(
            "user",
            "username",
            "login",
            "email",
            "host",
            "hostname",
            "port",
            "path",
            "home",
            "name",
            "version",
            "id",
            "type",
        ),
        *("level", "region", "env", "debug", "db", "database", "auth"),
    }
)
_PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")


def setting_problem(name: object, account: object, secret: object) -> str | None:
    """The reason why an entry seems to be a setting and no key, or None."""
    if account is not None or not isinstance(name, str) or not _is_setting(name, secret):
        return None
    return (
        "the name of the entry is a setting's name: it seems to be configuration of a program, and "
        "no key; in an env file set CRUSTDATA_API_KEYS, in a list rename the key, or write its "
        "account before the name, as in acme/prod"
    )


def _is_setting(name: str, secret: object) -> bool:
    """Whether a line `name=secret` looks like a setting (`DB_PASSWORD=…`, `port=…`), not a key."""
    words = [word.lower() for word in _PART.findall(name)]
    last = words[-1] if words else ""
    if not _PASSWORDS.isdisjoint(words) or last in _SECRETS or last.endswith(_ENDS):
        return True
    if any(
        kind in _KINDS_OF_KEYS and key in {"key", "keys"} for kind, key in itertools.pairwise(words)
    ):
        return True
    upper = "_" in name and name.isupper() and last in {"key", "keys", "pat", "pin"}
    return upper or (last in _PLAIN and not may_be_key(secret))
