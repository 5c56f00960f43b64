"""The addresses of the API: its origin, its endpoints, and a proxy on the way.

This module must not know the environment, which `environment.py` reads.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

from crustcredits._errors import ConfigurationError
from crustcredits._validation import kind_of

DEFAULT_BASE_URL: Final = "https://api.crustdata.com"

USER_CREDITS: Final = "/user/credits"
ACCOUNT_CREDITS: Final = "/account/credits"

_FORM: Final = "give it as https://host or https://host:port"


def parse_base_url(base_url: object, source: str = "base_url") -> str | ConfigurationError:
    """The origin to send to; or an error that names `source`, the place the URL comes from.

    A usable URL is `https://host[:port]`; plain `http` is accepted for loopback only. The error is
    not raised, because the URL may hold credentials.
    """
    origin, problem = _origin_or_problem(base_url)
    return origin if problem is None else ConfigurationError(f"{source} {problem}")


def proxy_problem(proxy: object, source: str = "proxy") -> ConfigurationError | None:
    """The problem of a proxy's URL, or None; the URL may hold credentials and is not repeated."""
    if proxy is None:
        return None
    try:
        parts = urlsplit(proxy) if isinstance(proxy, str) else None
        usable = (
            parts is not None
            and parts.scheme in {"http", "https"}
            and bool(parts.hostname)
            and parts.port != 0
        )
    except ValueError:  # also from an invalid port
        usable = False
    remedy = "" if source == "proxy" else ", or exclude the API with NO_PROXY=api.crustdata.com"
    return (
        None
        if usable
        else ConfigurationError(
            f"{source} is not an http(s) URL; give it as http://host:port{remedy}"
        )
    )


def _origin_or_problem(base_url: object) -> tuple[str, str | None]:
    if not isinstance(base_url, str):
        return "", f"must be a str, not {kind_of(base_url)}; {_FORM}"
    try:
        parts = urlsplit(base_url.strip())
        port = "" if parts.port is None else f":{parts.port}"
        (parts.hostname or "").encode("idna")
    except ValueError:
        return "", f"is not a URL; {_FORM}"
    problem = _url_problem(parts)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{port}", problem


def _url_problem(parts: SplitResult) -> str | None:
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return f"has no http(s) scheme and host; {_FORM}"
    if re.search(r"[\s\x00-\x20\x7f]", parts.netloc):
        return f"has white space in its host; {_FORM}"
    if "@" in parts.netloc:
        return f"holds credentials, but keys are given to each call; {_FORM}"
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        return f"has a path, query or fragment, but the client adds the API's paths itself; {_FORM}"
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        return (
            "is plain http, which would show every key to the network; use https (http is for "
            "loopback only)"
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
