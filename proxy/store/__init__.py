"""Where are tokens and usage plans kept: in this process, or in the Redis that several share?

Whatever happens to Redis, the proxy goes on with what the process keeps itself. What speaks to it stands in modules
that are imported only where it is used: `link.py`, `seal.py`, `shared.py`, `plans.py`.
"""

from proxy.store.interface import Store, StoredToken
from proxy.store.memory import MemoryStore

__all__ = ["MemoryStore", "Store", "StoredToken"]
