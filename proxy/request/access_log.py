"""Record of a finished request: metrics, request history, log line and audit line."""

import logging
import re

from proxy.observability.logging import AUDIT, LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.observability.request_history import RequestHistory
from proxy.request.context import RequestContext

CLIENT_CLOSED_REQUEST = 499  # as nginx logs it: the client left before there was a response
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"})


def record_request(
    context: RequestContext, duration: float, metrics: Metrics, history: RequestHistory | None, listener: str
) -> None:
    """Count and log one finished request; `duration` in seconds, `listener` is its name."""
    route = context.route
    if context.truncated:
        metrics.truncated.inc()
    if context.fault is not None:
        metrics.errors.labels(context.error, context.fault).inc()
    account, region, operation = (
        (route.account, route.region, route.operation_name) if route is not None else context.labels()
    )
    source = "amazon" if not context.error and not context.local_operation else _local_source(context)
    labels = (account, region, operation, _method_label(context.method), str(context.status), context.token, source)
    series = metrics.series_cache.get(labels) or metrics.series_of(*labels)
    series.requests += 1
    series.duration.observe(duration)
    if history is not None:
        history.add(series.labels, context, duration)
    if route is not None:
        if context.rate_limit_wait:
            metrics.limit_wait.observe(context.rate_limit_wait)
        else:
            metrics.limit_wait.zero_count += 1
    if context.upstream_duration is not None:
        series.upstream_duration.observe(context.upstream_duration)
        if context.token_wait:
            metrics.token_wait.observe(context.token_wait)
        else:
            metrics.token_wait.zero_count += 1
        traffic = series.traffic
        traffic.sent += context.request_bytes
        traffic.received += context.response_bytes
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info("request", extra=extra(**_log_fields(context, duration)))
    if AUDIT.isEnabledFor(logging.INFO):
        AUDIT.info("request", extra=extra(listener=listener, **_audit_fields(context)))


def _local_source(context: RequestContext) -> str:
    """Return the label `source` of a response that is not Amazon's: `client` where the client left before it."""
    return "client" if context.error and context.status == CLIENT_CLOSED_REQUEST else "proxy"


def _method_label(method: str) -> str:
    """Return the method, or `other`: a label must not take any value that a client sends."""
    return method if method in _METHODS else "other"


def _well_formed_id(text: str | bytes | None) -> str:
    """Return a request id of the client's or of Amazon's for the log; empty where it is not a plain id."""
    if isinstance(text, bytes):
        text = text.decode("latin-1").rstrip(" \t")
    return text if text is not None and _ID.fullmatch(text) else ""


def _log_fields(context: RequestContext, duration: float) -> dict[str, object]:
    """Return the fields of the log line; of what the client sent, it has only the method and a plain id."""
    upstream = context.upstream_duration
    return {
        "code": context.status,
        "method": _method_label(context.method),
        "caller": context.caller or None,
        "account": context.account,
        "region": context.region,
        "operation": context.operation,
        "token": context.token,
        "dropped": ",".join(context.dropped_elements) or None,
        "token_age": round(context.token_age) if context.hint else None,
        "hint": context.hint or None,
        "duration": round(duration, 4),
        "upstream": None if upstream is None else round(upstream, 4),
        "wait": round(context.rate_limit_wait, 3),
        "attempts": context.attempts,
        "amazon_request_id": _well_formed_id(context.amazon_request_id),
        "request_id": _well_formed_id(context.request_id),
        "error": context.error,
        "broken": context.truncated or None,
    }


def _audit_fields(context: RequestContext) -> dict[str, object]:
    """Return the fields of the audit line: who did what, without personal data."""
    return {
        "caller": context.caller or None,
        "account": context.account,
        "region": context.region,
        "method": _method_label(context.method),
        "operation": context.operation,
        "token": context.token,
        "data_elements": list(context.data_elements),
        "status": context.status,
        "error": context.error or None,
        "attempts": context.attempts,
        "amazon_request_id": _well_formed_id(context.amazon_request_id) or None,
        "request_id": _well_formed_id(context.request_id) or None,
    }
