"""Token store in Redis: replicas share each token, and the token request that fetches it.

A replica that finds no usable token takes a lock, fetches one, stores it and releases the lock. The others poll with
backoff. The lock expires after LOCK_LIFETIME and its holder renews it, so a crashed holder blocks nobody for longer.
"""

import asyncio
import hashlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial

from redis.exceptions import RedisError

from proxy.config import Secret
from proxy.observability.metrics import Metrics
from proxy.store.encryption import MAX_BYTES, DecryptionFailed, TokenCipher
from proxy.store.interface import IsUsable, StoredToken
from proxy.store.redis_client import RedisClient, StoreUnavailable

# Short, because the other replicas wait for a crashed holder so long; renewed at a third of it, so that a late renewal
# does not lose the lock.
LOCK_LIFETIME = 3.0  # seconds
FIRST_POLL, POLL_BACKOFF, MAX_POLL = 0.03, 1.6, 0.5  # seconds between two polls, and their backoff factor

# Returns the value, its remaining lifetime in ms, and whether the lock was acquired. Nothing is locked where there is a
# value other than the one known to be unusable. A lock without expiry is not ours and would never end: it is deleted.
# GETRANGE includes its last index: one byte more than MAX_BYTES shows that a value is too long, without reading all of
# it. It returns an empty string for a missing key, and an error for another type, which `pcall` turns into a value.
# PTTL is -1 for a key without expiry.
_CLAIM = """
local value = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[3])
if type(value) ~= 'string' then value = '?' end
if value ~= '' and redis.sha1hex(value) ~= ARGV[4] then return {value, redis.call('PTTL', KEYS[1]), 0} end
if redis.call('PTTL', KEYS[2]) == -1 then redis.call('DEL', KEYS[2]) end
local locked = redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
return {value, -1, locked and 1 or 0}
"""
# Compared with the owner first: the lock may have expired and be another's by now (Redis documentation, "Distributed
# Locks with Redis"). In a script, so that nothing happens in between.
_KEEP = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
# Only the value that was refused: another replica may have stored its successor meanwhile.
_FORGET = """
local value = redis.pcall('GETRANGE', KEYS[1], 0, ARGV[1])
if type(value) ~= 'string' or redis.sha1hex(value) == ARGV[2] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class RedisTokenStore:
    """A Store in Redis; while it is down, every replica fetches its own tokens."""

    def __init__(
        self,
        redis: RedisClient,
        cipher: TokenCipher,
        metrics: Metrics,
        *,
        timeout: float,
        wall: Callable[[], float] = time.time,
        lock_life: float = LOCK_LIFETIME,
    ) -> None:
        self._redis = redis
        self._cipher = cipher
        self._metrics = metrics
        self.timeout = timeout
        self._wall = wall
        self._lock_lifetime = lock_life
        self._claim = redis.client.register_script(_CLAIM)
        self._keep = redis.client.register_script(_KEEP)
        self._release = redis.client.register_script(_RELEASE)
        self._forget = redis.client.register_script(_FORGET)

    @asynccontextmanager
    async def get_or_lock(
        self, key: str, fits: IsUsable, refused: Secret | None = None
    ) -> AsyncIterator[StoredToken | None]:
        """Yield the token of `key` if it fits, else None with the lock that excludes other processes."""
        # One per claim and not per process: two tasks of one process must not release each other's lock.
        owner = secrets.token_hex(8)
        found, is_locked = None, False
        with suppress(StoreUnavailable, RedisError):
            found, is_locked = await self._found_or_locked(key, owner, fits, refused)
        if not is_locked:
            yield found
            return
        keeping = asyncio.create_task(self._kept_alive(key, owner), name="token lock")
        try:
            yield None
        finally:
            # First, so that no renewal starts while the release is under way.
            keeping.cancel()
            with suppress(StoreUnavailable, RedisError):
                await self._redis.execute(partial(self._release, keys=[self._lock(key)], args=[owner]))

    async def _found_or_locked(
        self, key: str, owner: str, fits: IsUsable, refused: Secret | None
    ) -> tuple[StoredToken | None, bool]:
        """Return a token that fits, or whether the lock was acquired; neither after `timeout`."""
        end, pause, unfit = time.monotonic() + self.timeout, FIRST_POLL, ""
        while True:
            value, life, is_locked = await self._poll(key, owner, unfit)
            if is_locked:
                return None, True
            # SHA-1, because Redis's Lua has no other hash (redis.sha1hex). It recognises a value and protects nothing.
            fingerprint = hashlib.sha1(value, usedforsecurity=False).hexdigest()
            if value and fingerprint != unfit:
                token = self._decrypt(key, value, life)
                if token is not None and token.value == refused:
                    name = self._cipher.name("token", key)
                    # Deleted before its successor is there, so that no other replica sends a token which Amazon has
                    # refused.
                    await self._redis.execute(partial(self._forget, keys=[name], args=[MAX_BYTES, fingerprint]))
                elif token is not None and fits(token):
                    return token, False
                unfit = fingerprint
                continue  # claim again at once, now for the lock
            # Checked after a claim, so that there is at least one whatever the timeout.
            if time.monotonic() >= end:
                return None, False
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - jitter: waiters must not poll at once
            pause = min(MAX_POLL, pause * POLL_BACKOFF)

    async def _poll(self, key: str, owner: str, unfit: str) -> tuple[bytes, float, bool]:
        names = [self._cipher.name("token", key), self._lock(key)]
        args: list[str | int] = [owner, round(self._lock_lifetime * 1000), MAX_BYTES, unfit]
        response = await self._redis.execute(partial(self._claim, keys=names, args=args))
        match response:
            case [bytes(value), int(life), int(locked)]:
                return value, life / 1000, bool(locked)
        # A script of ours never replies so: it is another service, or one that is not compatible.
        self._redis.mark_down("nonsense")
        raise StoreUnavailable

    def _decrypt(self, key: str, value: bytes, life: float) -> StoredToken | None:
        """Return the token in a value; count and return None for one that does not decrypt."""
        try:
            token = self._cipher.decrypt(key, value)
        except DecryptionFailed:
            self._metrics.store_ignored.labels("too_large" if len(value) > MAX_BYTES else "not_ours").inc()
            return None
        # Redis counts the lifetime too, so that a wrong clock of the writer or the reader does not matter.
        return token if life < 0 else StoredToken(token.value, min(token.expires_at, self._wall() + life))

    async def _kept_alive(self, key: str, owner: str) -> None:
        with suppress(StoreUnavailable, RedisError):
            keep = partial(self._keep, keys=[self._lock(key)], args=[owner, round(self._lock_lifetime * 1000)])
            while True:
                # If Redis fails, the task ends and the lock expires; the fetch continues, and another replica may fetch
                # a token, too.
                await asyncio.sleep(self._lock_lifetime / 3)
                await self._redis.execute(keep)

    def _lock(self, key: str) -> str:
        return self._cipher.name("lock", key)

    async def put(self, key: str, token: StoredToken, life: float) -> None:
        """Store `token` for `life` seconds; do nothing while Redis is down, when each process caches its own."""
        name, value = self._cipher.name("token", key), self._cipher.encrypt(key, token)
        # Every reader would reject a longer one (`_Ciphers.decrypt`).
        if len(value) <= MAX_BYTES:
            with suppress(StoreUnavailable, RedisError):
                # At least 1 ms: Redis rejects PX 0 as an invalid expire time.
                await self._redis.execute(lambda: self._redis.client.set(name, value, px=max(1, int(life * 1000))))

    async def close(self) -> None:
        """Close the connections; the tokens stay in Redis for the other replicas."""
        await self._redis.close()
