"""Addresses that the environment names."""

from __future__ import annotations

import pytest

from crustcredits import ConfigurationError, CreditsClient
from crustcredits._http.environment import api_origin


def test_the_base_url_defaults_to_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument wins, and errors name the variable."""
    monkeypatch.delenv("CRUSTDATA_API_URL", raising=False)
    assert api_origin(None) == "https://api.crustdata.com"
    monkeypatch.setenv("CRUSTDATA_API_URL", " ")
    assert api_origin(None) == "https://api.crustdata.com"
    monkeypatch.setenv("CRUSTDATA_API_URL", " http://localhost:1 ")
    assert api_origin(None) == "http://localhost:1"
    assert api_origin("https://other.example") == "https://other.example"
    monkeypatch.setenv("CRUSTDATA_API_URL", "http://api.crustdata.com")
    assert "CRUSTDATA_API_URL is plain http" in str(api_origin(None))


def test_a_proxy_of_the_environment_that_is_not_a_url_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the variable and does not repeat the value."""
    monkeypatch.setenv("HTTPS_PROXY", "socks5://bob:hunter2@localhost:1080")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(
        ConfigurationError,
        match=r"the proxy of the environment \(HTTPS_PROXY or ALL_PROXY\) is not an http",
    ) as caught:
        CreditsClient(trust_env=True)
    assert "hunter2" not in str(caught.value)
    CreditsClient()
