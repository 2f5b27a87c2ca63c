"""Where are tokens kept beyond the request that fetched them? The only file that knows aiocache."""

from dataclasses import dataclass

from aiocache import SimpleMemoryCache

from proxy.config import Secret


@dataclass(frozen=True, slots=True)
class StoredToken:
    """A token and the moment it expires, in seconds of the Unix epoch: processes share no other clock."""

    value: Secret
    expires_at: float


class Store:
    """Keeps tokens by key until they expire. Memory now; what is kept does not outlive the process."""

    def __init__(self) -> None:
        # No timeout: memory answers at once, and the default would make a task of every look-up.
        self._cache = SimpleMemoryCache(timeout=None)

    async def get(self, key: str) -> StoredToken | None:
        """Return the token kept under `key`, or None."""
        found = await self._cache.get(key)
        return found if isinstance(found, StoredToken) else None

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Keep `token` for `life` seconds."""
        await self._cache.set(key, token, ttl=life)

    async def close(self) -> None:
        """Forget everything and end its timers."""
        await self._cache.clear()
        await self._cache.close()
