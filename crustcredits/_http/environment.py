"""The addresses that the environment names: of the API, and of a proxy on the way.

Only the client's constructor calls these functions; the protocol never reads the environment.
"""

from __future__ import annotations

import os
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from crustcredits._errors import ConfigurationError
from crustcredits._http.addresses import DEFAULT_BASE_URL, parse_base_url

BASE_URL_VARIABLE: Final = "CRUSTDATA_API_URL"


def api_origin(base_url: str | None) -> str | ConfigurationError:
    """The origin to send to: the argument, else `CRUSTDATA_API_URL`, else the API's own.

    Returns an error, not raised, when the URL cannot be used; see `parse_base_url`.
    """
    if base_url is not None:
        return parse_base_url(base_url)
    named = os.environ.get(BASE_URL_VARIABLE, "").strip()
    return parse_base_url(named or DEFAULT_BASE_URL, BASE_URL_VARIABLE)


def proxy_from_env(origin: str) -> str | None:
    """The proxy for `origin` from the environment: `HTTPS_PROXY` and the like, else None.

    None also when `NO_PROXY` excludes the origin, and for plain http, which stays on this machine:
    a proxy elsewhere would see the key.
    """
    parts = urlsplit(origin)
    if parts.scheme != "https" or proxy_bypass(f"{parts.hostname}:{parts.port or 443}"):
        return None
    proxies = getproxies_environment()
    proxy = proxies.get("https") or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy
