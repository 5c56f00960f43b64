"""Stand-ins for the API: `SandboxServer` on a loopback socket, `fake_client` without one.

Both answer as the API's documents say, have balances that change with time, and fail in every way
that `Fault` lists. This package owns the fake API and its faults; the core of the library never
imports it. It imports no pytest; `crustcredits.testing.fixtures` does. Start reading in `_api.py`.
"""

from crustcredits.testing._api import FakeAPI
from crustcredits.testing._arrivals import Arrival
from crustcredits.testing._faults import Fault
from crustcredits.testing._memory import FakeClient, fake_client
from crustcredits.testing._server import SandboxServer

__all__ = ["Arrival", "FakeAPI", "FakeClient", "Fault", "SandboxServer", "fake_client"]
