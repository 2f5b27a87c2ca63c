"""Admission of calls: usage plans of Amazon's (token buckets and queues) and concurrency limits.

Exports `RateLimiter` (`limiter.py`), `RedisRateLimiter` (`redis_limiter.py`, for several processes that share plans) and
`ConcurrencyLimiter` (`concurrency.py`). `plan.py` is one usage plan, `token_bucket.py` the arithmetic without waiting.
May import: the files directly in `request`, `store`, `errors`, `config`, `observability`; no other package of `request`.
"""
