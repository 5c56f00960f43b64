"""Checks of API keys and of their labels: whether a text can be one, and which other kind it seems to be.

Pure: a problem is returned as a sentence and never raised, and no sentence repeats a secret. It
must not know key objects or sources.
"""

from __future__ import annotations

import itertools
import re

_BYTE_ORDER_MARK = "\ufeff"
_SCHEME = re.compile(r"(bearer|token)(\s|$)", re.IGNORECASE)

_PLACEHOLDER = re.compile(
    r"""
      [$%]\{?\w | \$\( | \{\{ | ^<.*>$                      # ${KEY}, $KEY, %KEY%, $(command), {{ key }}, <key>
    | ^op://                                                # a reference to a secret store
    | ^your[-_ ] | (^|[-_. ])your[-_ ]?(api|secret|key|token) | (key|token|secret)[-_ ]here$
    | (^|[-_. ])(replace|change)[-_ ]?me | ^(insert|enter|paste)[-_ ] | ^placeholder
    | \*{3,} | \.{3,} | … | (^|[-_.])x{3,}($|[-_.]) | x{6,}  # masked
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Of these a placeholder has one, unless it has a mark that stands in no key; looking for them is
# quick.
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
# Nothing but letters, digits and the marks of keys. Almost every key is such, and needs no further
# look at its characters.
_PLAIN_KEY = re.compile(r"[A-Za-z0-9+/_.~-]+=*")
_VARIABLE = re.compile(r"[A-Z]{2,}(_[A-Z]{2,})+|(?i:(crustdata[-_])?api[-_]?keys?)")
_OPTION = re.compile(r"--[a-z][a-z-]*(=.*)?")
# Lower-case words between slashes, or a name with the suffix of a file. No generated key is either.
_PATH = re.compile(
    r"(~|\.\.?)/.*|/(etc|home|mnt|opt|root|run|srv|tmp|usr|var)/.*|[a-z_.~-]*(/[a-z_.-]+)+|.*\.(txt|json|csv|tsv|env|ini|toml|ya?ml|pem|conf|cfg)",
    re.DOTALL,
)

# GitHub, GitLab, Slack, AWS, Google, SendGrid, Anthropic and OpenAI publish how their keys begin.
_OTHER_SERVICE = re.compile(
    r"gh[oprsu]_|github_pat_|glpat-|xox[abeprs]-|(AKIA|ASIA)[A-Z0-9]{16}$|AIza[\w-]{35}$|SG\.[\w-]+\.|sk-ant-|sk-proj-"
    r"|npm_|pypi-|hf_|whsec_|rk_live_|shpat_|dop_v1_|hvs\.|xapp-|sk-or-v1-|sk-svcacct-|AGE-SECRET-KEY-"
)

# Marks that stand in no key, and the kind of text that they come from. The first one found counts.
_SEEMS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile("://"), "'://': it seems to be a URL, as in an env file"),
    (re.compile("@"), "an '@': it seems to be an e-mail address, or a part of a connection string"),
    (re.compile("-----"), "'-----': it seems to be a line of a PEM file"),
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
            "a comma: it seems to be a list of keys, or a line of a CSV file; a list goes into "
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
    (re.compile(r"[()]"), "a bracket: it seems to be a line of a program; give the key bare"),
    (
        re.compile(":"),
        (
            "a colon: it seems to be a line of YAML, a user with a password, or a path; in text "
            "write NAME=SECRET"
        ),
    ),
    (
        re.compile("[|&!?^*]"),
        (
            "a mark that stands in no key: it seems to be a list, or a part of a URL; give the "
            "key bare"
        ),
    ),
    (
        re.compile(r"\\"),
        (
            "a backslash: it seems to be a path, or a line that goes on in the next; give the "
            "key bare, on one line"
        ),
    ),
)


def trimmed(secret: str) -> str:
    """Without outer white space and a byte-order mark, which come from files and clipboards."""
    return secret.strip().removeprefix(_BYTE_ORDER_MARK).strip()


def secret_problem(secret: object) -> str | None:
    """Why this cannot be an API key, or None."""
    if not isinstance(secret, str):
        return _kind_problem(secret)
    secret = trimmed(secret)
    if not secret:
        return "the API key is empty; put the key there, or leave the entry out"
    if _SCHEME.match(secret):
        return (
            "the API key begins with 'Bearer' or 'Token'; give the bare key, the scheme is "
            "added when it is sent"
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
        return "the API key is a key of another service; put the key of Crustdata there"
    if ("/" in secret or "." in secret) and _PATH.fullmatch(secret):
        return (
            "the API key is the path of a file; files are read by keys_from_file(), and named "
            "by CRUSTDATA_API_KEYS_FILE"
        )
    return _character_problem(secret)


def _kind_problem(secret: object) -> str:
    hint = ""
    if isinstance(secret, (bytes, bytearray)):
        hint = "; decode it first"
    elif isinstance(secret, dict):
        hint = "; rows of a database go through keys_from_records()"
    elif secret is None:
        hint = "; is it missing where it comes from?"
    return f"an API key is a str, a SecretStr or an ApiKey, not {type(secret).__name__}{hint}"


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
        return "the API key begins or ends with a quotation mark; give it bare"
    seems = next((said for mark, said in _SEEMS if mark.search(secret)), None)
    if seems is not None:
        return f"the API key holds {seems}"
    if not secret.isascii():
        return "the API key holds characters outside ASCII; copy it again from where it was issued"
    if not secret.isprintable() or " " in secret:
        return (
            "the API key holds white space or control characters inside; is it one key, copied "
            "whole?"
        )
    if "=" in secret.rstrip("="):  # at the end it is base64's padding
        return (
            "the API key holds '=': it seems to be a line NAME=SECRET, as of an env file; give "
            "the secret alone"
        )
    return None if any(map(str.isalnum, secret)) else _NO_LETTER


_NO_LETTER = "the API key holds no letter and no digit; copy it again from where it was issued"


def label_problem(part: str, label: object, secret: object) -> str | None:
    """Why this cannot be the name or the account (`part` says which) of a key with that secret, or None."""
    if label is None:
        return None
    if not isinstance(label, str):
        return f"the {part} of an API key is a str, not {type(label).__name__}"
    label = label.strip()
    if not label:
        return f"the {part} of the API key is empty; leave it out or give one"
    if not label.isprintable():
        return f"the {part} of the API key holds unprintable characters"
    if label[0] in "'\"" or label[-1] in "'\"":
        return (
            f"the {part} of the API key begins or ends with a quotation mark; are there quotes "
            "around all of it?"
        )
    if _gives_away(label, secret):
        return f"the {part} of the API key holds its secret; give it another, because it is printed"
    if (looks_secret(label) or is_likely_key(label)) and (
        secret_problem(secret) is not None or not may_be_key(secret)
    ):
        return (
            f"the {part} of the API key looks more like a secret than its value does: are "
            "the two swapped? "
            "Write NAME=SECRET, or {name: secret}; the name is not shown, because it may be the key"
        )
    return None


def slash_problem(name: object, account: object) -> str | None:
    """Why a label of these two could be taken for another's, or None."""
    if isinstance(account, str) and "/" in account:
        return (
            "the account of the API key holds a '/', which divides account and name; give it "
            "another"
        )
    if account is None and isinstance(name, str) and "/" in name:
        return (
            "the name of the API key holds a '/', which divides account and name; give the two "
            "apart: account= and name="
        )
    return None


def _gives_away(label: str, secret: object) -> bool:
    # A short secret (in a test, say) may stand inside an innocent word; a real one never does.
    whole = secret.casefold() if isinstance(secret, str) else ""
    bare, name = trimmed(whole), label.casefold()
    runs = _RUN.findall(name) if looks_secret(label) else []
    return name == bare or (len(bare) >= 8 and bare in name) or any(run in whole for run in runs)


_RUN = re.compile(r"[A-Za-z0-9]{12,}")
_VARIED = 8  # different characters
_WORD_OR_NUMBER = re.compile(r"[A-Za-z]{12,24}|[A-Za-z]+[0-9]{1,8}|[0-9]+[A-Za-z]?")


def looks_secret(text: object) -> bool:
    """Whether it looks generated: 12 letters and digits in a row or more that are no word, no number and no word with a number."""
    runs = _RUN.findall(text) if isinstance(text, str) else []
    return any(len(set(run)) >= _VARIED and not _WORD_OR_NUMBER.fullmatch(run) for run in runs)


_SHORTEST_KEY = 16
_WORD = "(?:[a-z]{1,24}|[A-Z][a-z]{0,24}|[A-Z]{1,12})?[0-9]{0,4}"
_WORDS = re.compile(f"{_WORD}(?:[-_./ ]{_WORD})*")


def may_be_key(text: object) -> bool:
    """Whether it is long enough for an API key, and no words with numbers: a weaker test, which true keys almost never fail."""
    return isinstance(text, str) and len(text) >= _SHORTEST_KEY and not _WORDS.fullmatch(text)


_MIXED = 7  # changes between letters and digits


def is_likely_key(text: object) -> bool:
    """Whether it is so long, and mixes letters and digits so often, that it is no name, such as a UUID."""
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
# Words that settings have and keys may have too: then the value decides.
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


def is_setting(name: str, secret: object) -> bool:
    """Whether a line `name=secret` seems to be a setting of a program, such as `DB_PASSWORD=…` or `port=…`, and not a key."""
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
