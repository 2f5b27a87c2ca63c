"""Where are tokens and usage plans kept: in this process, or in the Redis that several share?

Whatever happens to Redis, the proxy goes on with what the process keeps itself.
"""

from proxy.store.link import Link, Lost
from proxy.store.memory import MemoryStore
from proxy.store.plans import Held, Place, SharedPlans, Step
from proxy.store.seal import Seal
from proxy.store.shared import SharedStore
from proxy.store.token import Store, StoredToken

__all__ = [
    "Held",
    "Link",
    "Lost",
    "MemoryStore",
    "Place",
    "Seal",
    "SharedPlans",
    "SharedStore",
    "Step",
    "Store",
    "StoredToken",
]
