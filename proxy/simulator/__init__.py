"""A local Selling Partner API and Login with Amazon, for tests and for first steps.

It imports no other package of the proxy and shares no code with it: a bug must not be able to agree with itself.

    async with Simulator(Settings(token_lifetime=60)) as simulator:
        simulator.endpoints  # {"na": "http://127.0.0.1:…", "eu": …, "fe": …, "lwa": …, "control": …}
        simulator.journal    # the received requests, the newest last
"""

from proxy.simulator.cli import main
from proxy.simulator.server import Simulator
from proxy.simulator.state import Fault, Recorded, Seller, Settings
from proxy.simulator.swagger_examples import Example, examples

__all__ = ["Example", "Fault", "Recorded", "Seller", "Settings", "Simulator", "examples", "main"]
