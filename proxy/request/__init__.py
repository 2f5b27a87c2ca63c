"""The life of a request.

1. **validate**: are these bytes a valid request to this proxy? (`validation.py`)
2. **authenticate**: which caller sent it, and what may it do? (`authentication.py`, `authorization.py`)
3. **route**: which account, region, operation and token? (`route_cache.py`, `routing.py`)
4. **admit**: circuit breaker, token, usage plan and slot, by one deadline. (`upstream/circuit_breaker.py`, `tokens/`,
   `ratelimit/`)
5. **forward**: clean headers, credentials last, stream out. (`upstream/forward.py`)
6. **judge**: done, throttled, token refused or failed; again or not? (`upstream/retry.py`, `forbidden_hints.py`)
7. **record**: metrics, history, log line, trace. (`access_log.py`, `tracing.py`)

`handler.py` alone knows this order and exports `Handler`. The other files directly in this package are the steps and
their shared vocabulary (`Route`, `RequestContext`, `RequestOptions`); they import none of the four sub-packages.
May import: `amazon`, `store`, `config`, `errors`, `observability`.
"""
