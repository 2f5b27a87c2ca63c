"""How does this process share tokens and usage plans with the others? Imported only where it does."""

from contextlib import AsyncExitStack

from proxy.config import Config
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.redis_limiter import RedisRateLimiter
from proxy.store.encryption import TokenCipher
from proxy.store.redis_buckets import RedisBuckets
from proxy.store.redis_client import RedisClient
from proxy.store.redis_tokens import RedisTokenStore


async def open_shared(
    config: Config, metrics: Metrics, stack: AsyncExitStack
) -> tuple[RedisTokenStore, RedisRateLimiter]:
    """Return what lies in the Redis of `config.store`, there or not; `stack` closes it."""
    redis, cipher = RedisClient(config.store, metrics), TokenCipher(config.store_key)
    store, plans = RedisTokenStore(redis, cipher, metrics, timeout=config.timeouts.token), RedisBuckets(redis, cipher)
    stack.push_async_callback(store.close)
    stack.push_async_callback(plans.close)
    await redis.start()
    return store, RedisRateLimiter(metrics, plans, pace=config.limits.pace, max_queue=config.limits.max_queue)
