"""Token store in the memory of this process. The only file that imports aiocache.

aiocache's Redis backend is not used: its serializers do not receive the key, so that a value could not be bound to it;
it reads values of any size; and its `clear` deletes the whole database.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiocache import SimpleMemoryCache

from proxy.config import Secret
from proxy.store.interface import IsUsable, StoredToken


class MemoryStore:
    """A Store that ends with the process."""

    timeout = 0.0  # nothing is locked, so nothing waits

    def __init__(self) -> None:
        # timeout=None: memory never blocks, and with aiocache's default (5 s) every lookup runs in asyncio.wait_for.
        self._cache = SimpleMemoryCache(timeout=None)

    @asynccontextmanager
    async def get_or_lock(
        self, key: str, fits: IsUsable, refused: Secret | None = None
    ) -> AsyncIterator[StoredToken | None]:
        """Yield the token of `key` if it fits. No lock: the TokenProvider shares one token request per process."""
        found = await self._cache.get(key)
        if isinstance(found, StoredToken) and found.value == refused:
            await self._cache.delete(key)
            found = None
        yield found if isinstance(found, StoredToken) and fits(found) else None

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Store `token` for `life` seconds."""
        await self._cache.set(key, token, ttl=life)

    async def close(self) -> None:
        """Delete all tokens and cancel their expiry timers."""
        await self._cache.clear()
        await self._cache.close()
