"""Faults that are ordered for single keys."""

from __future__ import annotations

from itertools import pairwise

from crustcredits.testing import Fault, SandboxServer
from tests.testing.requests import ask


async def test_faults_follow_one_another_and_can_be_healed(sandbox: SandboxServer) -> None:
    """Each for its number of times, then a good answer; or until healed."""
    key = sandbox.add_key()
    bearer = {"Authorization": f"Bearer {key.get_secret_value()}"}
    sandbox.fail(key, Fault.FORBIDDEN, times=2)
    sandbox.fail(key, Fault.PAYMENT_REQUIRED, times=1)
    assert [(await ask(sandbox, **bearer))[0] for _ in range(4)] == [403, 403, 402, 200]
    sandbox.fail(key, Fault.FORBIDDEN)
    assert (await ask(sandbox, **bearer))[0] == 403
    sandbox.heal(key)
    assert (await ask(sandbox, **bearer))[0] == 200


async def test_ordered_refusals_ask_for_different_waits(sandbox: SandboxServer) -> None:
    """As windows of different accounts would."""
    resets = []
    for _ in range(6):
        key = sandbox.add_key()
        sandbox.fail(key, Fault.REFUSED)
        resets.append(
            int(
                (await ask(sandbox, Authorization=f"Bearer {key.get_secret_value()}"))[2][
                    "x-ratelimit-reset"
                ]
            )
        )
    assert all(1 <= reset <= 60 for reset in resets)
    key = sandbox.add_key()
    sandbox.fail(key, Fault.REFUSED, retry_after=7)
    assert (await ask(sandbox, Authorization=f"Bearer {key.get_secret_value()}"))[2][
        "x-ratelimit-reset"
    ] == "7"
    assert all(abs(one - other) > 2 for one, other in pairwise(resets))
