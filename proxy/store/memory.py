"""How are tokens kept within this process? The only file that knows aiocache.

aiocache's Redis backend is not used beside it: its serializers are not told the key, so that a value could not be bound
to it, it reads values of any size, and its `clear` empties the whole database.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiocache import SimpleMemoryCache

from proxy.config import Secret
from proxy.store.interface import IsUsable, StoredToken


class MemoryStore:
    """A Store that does not outlive the process."""

    timeout = 0.0  # nobody waits here

    def __init__(self) -> None:
        # No timeout: memory answers at once, and the default would make a task of every look-up.
        self._cache = SimpleMemoryCache(timeout=None)

    @asynccontextmanager
    async def get_or_lock(
        self, key: str, fits: IsUsable, refused: Secret | None = None
    ) -> AsyncIterator[StoredToken | None]:
        """Give the token under `key` where it fits; one process needs no lock, its requests share one exchange."""
        found = await self._cache.get(key)
        if isinstance(found, StoredToken) and found.value == refused:
            await self._cache.delete(key)
            found = None
        yield found if isinstance(found, StoredToken) and fits(found) else None

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Keep `token` for `life` seconds."""
        await self._cache.set(key, token, ttl=life)

    async def close(self) -> None:
        """Forget everything and end its timers."""
        await self._cache.clear()
        await self._cache.close()
