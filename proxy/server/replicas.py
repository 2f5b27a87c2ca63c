"""How does this process share tokens and usage plans with the others? Imported only where it does."""

from contextlib import AsyncExitStack

from proxy.config import Config
from proxy.observability.metrics import Metrics
from proxy.request.ratelimit.redis_limiter import SharedLimits
from proxy.store.encryption import Seal
from proxy.store.redis_buckets import SharedPlans
from proxy.store.redis_client import Link
from proxy.store.redis_tokens import SharedStore


async def joined(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[SharedStore, SharedLimits]:
    """Return what lies in the Redis of `config.store`, there or not; `stack` closes it."""
    link, seal = Link(config.store, metrics), Seal(config.store_key)
    store, plans = SharedStore(link, seal, metrics, patience=config.timeouts.token), SharedPlans(link, seal)
    stack.push_async_callback(store.close)
    stack.push_async_callback(plans.close)
    await link.start()
    return store, SharedLimits(metrics, plans, pace=config.limits.pace, max_queue=config.limits.max_queue)
