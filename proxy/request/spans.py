"""What does a request look like in a trace? One span for it, and one below it for each wait and each call to Amazon.

The spans are made when the request is over, from what its record noted, and a thread of OpenTelemetry's SDK brings them
to the collector: one that is slow or gone costs spans, never a request. Nothing of a trace goes on to Amazon.

Only who wants traces imports this module: OpenTelemetry is an extra.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from multidict import CIMultiDictProxy
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy.config import Tracing
from proxy.logs import LOGGER, fields
from proxy.metrics import Metrics
from proxy.request.exchange import Exchange
from proxy.request.traces import Step, TracedExchange

FLUSH = 3.0  # seconds that spans get at the end
QUEUE = 4096  # spans that wait for the collector; more are dropped

# OpenTelemetry's semantic conventions for HTTP: what is not in this list is `_OTHER`.
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})

Attributes = dict[str, str | int | bool]


class _Watched(SpanExporter):
    """Brings spans to the collector; says once when they do not arrive, and counts those lost."""

    def __init__(self, exporter: SpanExporter, host: str, metrics: Metrics) -> None:
        self._exporter = exporter
        self._host = host
        self._metrics = metrics
        self._arrive = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Bring them; runs in the SDK's thread."""
        result = self._exporter.export(spans)
        arrive = result is SpanExportResult.SUCCESS
        if not arrive:
            self._metrics.lost_spans.inc(len(spans))
        if arrive != self._arrive:
            self._arrive = arrive
            text = "the collector takes spans again" if arrive else "the collector takes no spans: they are lost"
            LOGGER.log(logging.INFO if arrive else logging.WARNING, text, extra=fields(collector=self._host))
        return result

    def shutdown(self) -> None:
        """Try no more."""
        self._exporter.shutdown()


class Traces:
    """Makes spans of finished requests; `now` is the monotonic clock of their records, `wall` in nanoseconds."""

    def __init__(
        self,
        provider: TracerProvider,
        share: float,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sp-api-proxy")
        self._share = share
        self._now = now
        self._wall = wall

    def begin(self, method: str, started: float) -> TracedExchange:
        """Return the record of a request that may be traced."""
        return TracedExchange(method, started, self._now)

    def end(self, exchange: Exchange, headers: CIMultiDictProxy[str]) -> None:
        """Make the spans of a request that is over; never raise."""
        try:
            parent = _parent(headers) if "traceparent" in headers else None
            if isinstance(exchange, TracedExchange) and self._is_wanted(parent):
                self._spans(exchange, parent)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the request has its answer
            LOGGER.error("a request could not be traced", exc_info=exc)

    def _is_wanted(self, parent: Context | None) -> bool:
        """Return whether to trace: as the app that called decided, else by the share."""

        if parent is None:
            return random.random() < self._share  # noqa: S311 - a sample
        return trace.get_current_span(parent).get_span_context().trace_flags.sampled

    def _spans(self, exchange: TracedExchange, parent: Context | None) -> None:

        now, wall = self._now(), self._wall()
        exchange.close(now)

        def at(moment: float) -> int:
            return wall - round((now - moment) * 1e9)

        span = self._tracer.start_span(
            _name(exchange),
            context=parent or Context(),
            kind=trace.SpanKind.SERVER,
            attributes=_of_request(exchange),
            start_time=at(exchange.started),
        )
        below = trace.set_span_in_context(span, Context())
        calls = 0
        for step in exchange.steps:
            is_call = step.name == "call"
            child = self._tracer.start_span(
                _method(exchange.method) if is_call else f"wait for {step.name}",
                context=below,
                kind=trace.SpanKind.CLIENT if is_call else trace.SpanKind.INTERNAL,
                attributes=_of_call(exchange, step, calls) if is_call else None,
                start_time=at(step.began),
            )
            calls += is_call
            if is_call and (step.status >= 400 or not step.status):
                child.set_status(trace.StatusCode.ERROR)
            child.end(at(step.ended))
        if exchange.status >= 500 or exchange.broken:
            span.set_status(trace.StatusCode.ERROR)
        span.end(wall)

    async def close(self) -> None:
        """Give the spans that are left FLUSH seconds to reach the collector."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # nobody waits any more, and the loop is gone
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="last spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH):
                await done.wait()


def open_traces(settings: Tracing, version: str, metrics: Metrics) -> Traces:
    """Return what makes spans and brings them to the collector of the settings."""
    endpoint = settings.endpoint or ""
    # Its exporter says the same several times a batch; _Watched says it once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    # Which requests are traced is decided here, before anything is made of them.
    resource = Resource.create({"service.name": settings.service_name, "service.version": version})
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, headers=_headers(settings))
    watched = _Watched(exporter, urlsplit(endpoint).netloc, metrics)
    provider.add_span_processor(BatchSpanProcessor(watched, max_queue_size=QUEUE))
    return Traces(provider, settings.sample)


def _headers(settings: Tracing) -> dict[str, str]:
    """Return the collector's headers: OTLP percent-encodes the values."""
    if settings.headers is None:
        return {}
    pairs = (part.strip().partition("=") for part in settings.headers.reveal().split(","))
    return {name.lower(): unquote(value) for name, _, value in pairs}


def _parent(headers: CIMultiDictProxy[str]) -> Context | None:
    """Return the app's span; None where its header is not well-formed (W3C Trace Context section 3.2)."""

    given = headers.getall("traceparent")
    if len(given) != 1:
        return None
    carrier: Mapping[str, str] = {"traceparent": given[0], "tracestate": ",".join(headers.getall("tracestate", ()))}
    context = TraceContextTextMapPropagator().extract(carrier, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _method(method: str) -> str:
    return method if method in _METHODS else "HTTP"


def _name(exchange: Exchange) -> str:
    route = _route(exchange)
    return f"{_method(exchange.method)} {route}" if route else _method(exchange.method)


def _route(exchange: Exchange) -> str:
    """Return the operation's path with its placeholders: a real path holds ids."""
    operation = exchange.target.operation if exchange.target else None
    return operation.template if operation else ""


def _of_request(exchange: Exchange) -> Attributes:
    """Return a request's attributes; there is no path, query, id or token among them."""
    found: Attributes = {
        "http.request.method": exchange.method if exchange.method in _METHODS else "_OTHER",
        "http.response.status_code": exchange.status,
        "spapi.account": exchange.account,
        "spapi.region": exchange.region,
        "spapi.operation": exchange.operation,
        "spapi.token": exchange.token,
        "spapi.attempts": exchange.attempts,
    }
    if route := _route(exchange):
        found["http.route"] = route
    if exchange.caller:
        found["spapi.caller"] = exchange.caller
    if exchange.hint:
        found["spapi.hint"] = exchange.hint
    if exchange.error:
        found["error.type"] = exchange.error
    elif exchange.status >= 500:
        found["error.type"] = str(exchange.status)
    if exchange.fault:
        found["spapi.fault"] = exchange.fault
    return found


def _of_call(exchange: Exchange, step: Step, before: int) -> Attributes:
    """Return the attributes of one call to Amazon, `before` of which went out already."""
    found: Attributes = {"http.request.method": exchange.method if exchange.method in _METHODS else "_OTHER"}
    if exchange.target is not None:
        parts = urlsplit(exchange.target.endpoint)
        found["server.address"] = parts.hostname or ""
        found["server.port"] = parts.port or (443 if parts.scheme == "https" else 80)
        found["url.scheme"] = parts.scheme
    if before:
        found["http.request.resend_count"] = before
    if step.status:
        found["http.response.status_code"] = step.status
    if step.status >= 400:
        found["error.type"] = str(step.status)
    elif not step.status:
        found["error.type"] = exchange.error or "no answer"
    return found
