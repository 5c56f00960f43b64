"""The origin of the API, and the URL of a proxy."""

from __future__ import annotations

import pytest

from crustcredits import ConfigurationError
from crustcredits._http.addresses import parse_base_url, proxy_problem


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://api.crustdata.com", "https://api.crustdata.com"),
        ("https://API.crustdata.com/", "https://api.crustdata.com"),
        (" https://proxy.example:8443 ", "https://proxy.example:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.3.2.1", "http://127.3.2.1"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_a_base_url_is_an_origin(given: str, origin: str) -> None:
    """https to any host, or http to loopback."""
    assert parse_base_url(given) == origin
    assert proxy_problem(given.strip()) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("http://api.crustdata.com", "is plain http"),
        ("http://127.0.0.1.example", "is plain http"),
        ("https://api.crustdata.com/v2", "has a path, query or fragment"),
        ("https://api.crustdata.com?x=1", "has a path, query or fragment"),
        ("https://api.crustdata.com#x", "has a path, query or fragment"),
        ("https://user:sk-secret@api.crustdata.com", "holds credentials"),
        ("api.crustdata.com", "has no http"),
        ("ftp://api.crustdata.com", "has no http"),
        ("https://", "has no http"),
        ("https://api crustdata.com", "has white space"),
        ("https://api.crustdata.com:port", "is not a URL"),
        ("https://a..b", "is not a URL"),
        (b"https://api.crustdata.com", "must be a str, not bytes"),
    ],
)
def test_any_other_base_url_is_refused_with_the_reason(given: str, said: str) -> None:
    """The URL is not repeated, because it may hold credentials."""
    refusal = parse_base_url(given)
    assert isinstance(refusal, ConfigurationError)
    assert f"base_url {said}" in str(refusal)
    assert "sk-secret" not in str(refusal)


@pytest.mark.parametrize("given", [5, "", "proxy", "ftp://proxy", "http://[", "http://"])
def test_a_proxy_that_is_not_a_url_is_refused(given: object) -> None:
    """The value is not repeated, because it may hold credentials."""
    assert "give it as http://host:port" in str(proxy_problem(given))
    assert proxy_problem(None) is None
