"""Admission of calls: Amazon's usage plans (token buckets and queues) and concurrency limits.

Exports `RateLimiter` (`limiter.py`), `RedisRateLimiter` (`redis_limiter.py`: several processes share the plans) and
`ConcurrencyLimiter` (`concurrency.py`). `plan.py` is one usage plan, `token_bucket.py` the arithmetic without waiting.
May import the files directly in `request`, `store`, `errors`, `config` and `observability`; no other sub-package.
"""
