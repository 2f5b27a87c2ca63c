"""Storage of tokens and usage plans: in this process, or in the Redis server that replicas share.

Without Redis, or while it is unavailable, the proxy continues with the memory of this process. Exports the interface
and the memory store. The modules for Redis (`redis_*`, `encryption`) are imported only where it is configured, because
importing them takes time. May import `config` and `observability`; only this package imports aiocache, redis and
cryptography.
"""

from proxy.store.interface import Store, StoredToken
from proxy.store.memory import MemoryStore

__all__ = ["MemoryStore", "Store", "StoredToken"]
