"""The pool of the demo."""

from __future__ import annotations

from crustcredits.testing import SandboxServer
from crustcredits.testing._demo import demo_pool


def test_the_demo_pool_is_the_same_every_time() -> None:
    """Names, accounts and their order do not change from run to run."""
    first, again = (demo_pool(SandboxServer(), 250) for _ in range(2))
    assert [(key.name, key.account) for key in first] == [(key.name, key.account) for key in again]
    assert len({key.label for key in first}) == 250
    assert len({key.account for key in first}) == 40
    assert [key.label for key in first][:4] == [
        "acme/prod",
        "acme/dev",
        "acme/batch",
        "acme/prod-2",
    ]
