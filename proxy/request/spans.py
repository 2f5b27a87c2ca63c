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
from collections.abc import Callable, Sequence
from contextlib import suppress
from urllib.parse import unquote, urlsplit

from multidict import CIMultiDictProxy
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy.config import Tracing
from proxy.observability.logging import LOGGER, extra
from proxy.observability.metrics import Metrics
from proxy.request.context import RequestContext
from proxy.request.tracing import Phase, TracedContext

FLUSH_TIMEOUT = 3.0  # seconds that spans get at the end

# OpenTelemetry's semantic conventions for HTTP: what is not in this list is `_OTHER`.
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})

Attributes = dict[str, str | int | bool]

_FAILED, _UNSET = Status(StatusCode.ERROR), Status()


class LoggingExporter(SpanExporter):
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
            self._metrics.dropped_spans.inc(len(spans))
        if arrive != self._arrive:
            self._arrive = arrive
            text = "the collector takes spans again" if arrive else "the collector takes no spans: they are lost"
            LOGGER.log(logging.INFO if arrive else logging.WARNING, text, extra=extra(collector=self._host))
        return result

    def shutdown(self) -> None:
        """Try no more."""
        self._exporter.shutdown()


class Tracer:
    """Makes spans of finished requests; `now` is the monotonic clock of their records, `wall` in nanoseconds."""

    def __init__(
        self,
        processor: SpanProcessor,
        resource: Resource,
        share: float,
        *,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._processor = processor
        self._resource = resource
        self._scope = InstrumentationScope("sp-api-proxy")
        self._ids = RandomIdGenerator()
        self._share = share
        self._now = now
        self._wall = wall

    def begin(self, method: str, started: float) -> TracedContext:
        """Return the record of a request that may be traced."""
        return TracedContext(method, started, self._now)

    def end(self, context: RequestContext, headers: CIMultiDictProxy[str]) -> None:
        """Make the spans of a request that is over; never raise."""
        try:
            parent = _parent(headers) if "traceparent" in headers else None
            if isinstance(context, TracedContext) and self._is_wanted(parent):
                self._make(context, parent)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the request has its answer
            LOGGER.error("a request could not be traced", exc_info=exc)

    def _is_wanted(self, parent: SpanContext | None) -> bool:
        """Return whether to trace: as the app that called decided, else by the share."""
        if parent is None:
            return random.random() < self._share  # noqa: S311 - a sample
        return parent.trace_flags.sampled

    def _make(self, context: TracedContext, parent: SpanContext | None) -> None:
        now, wall = self._now(), self._wall()
        context.close(now)

        def at(moment: float) -> int:
            return wall - round((now - moment) * 1e9)

        whole = self._context(parent)
        calls = 0
        for step in context.phases:
            if step.name == "call":
                name, kind, attributes = _method(context.method), SpanKind.CLIENT, _of_call(context, step, calls)
                calls += 1
            else:
                name, kind, attributes = f"wait for {step.name}", SpanKind.INTERNAL, {}
            # A call that failed, whoever is to blame; of a request only what is not its client's own fault.
            status = _FAILED if "error.type" in attributes else _UNSET
            self._put(name, self._context(whole), whole, kind, status, attributes, at(step.began), at(step.ended))
        status = _FAILED if context.status >= 500 or context.truncated else _UNSET
        attributes = _of_request(context)
        self._put(_name(context), whole, parent, SpanKind.SERVER, status, attributes, at(context.started), wall)

    def _context(self, above: SpanContext | None) -> SpanContext:
        """Return a new span's place: in the trace of the one above it, or in a new one."""
        return SpanContext(
            trace_id=above.trace_id if above else self._ids.generate_trace_id(),
            span_id=self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
            trace_state=above.trace_state if above else None,
        )

    def _put(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        status: Status,
        attributes: Attributes,
        began: int,
        ended: int,
    ) -> None:
        # Not by a Tracer: that makes spans that change, with locks, at ten times the cost.
        span = ReadableSpan(
            name,
            context,
            parent,
            self._resource,
            attributes,
            kind=kind,
            status=status,
            start_time=began,
            end_time=ended,
            instrumentation_scope=self._scope,
        )
        self._processor.on_end(span)

    async def close(self) -> None:
        """Give the spans that are left FLUSH seconds to reach the collector."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._processor.shutdown()
            with suppress(RuntimeError):  # nobody waits any more, and the loop is gone
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="last spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await done.wait()


def open_tracer(settings: Tracing, version: str, metrics: Metrics) -> Tracer:
    """Return what makes spans and brings them to the collector of the settings."""
    endpoint = settings.endpoint or ""
    # Its exporter says the same several times a batch; _Watched says it once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    resource = Resource.create({"service.name": settings.service_name, "service.version": version})
    exporter = OTLPSpanExporter(endpoint=endpoint, headers=_headers(settings))
    processor = BatchSpanProcessor(LoggingExporter(exporter, urlsplit(endpoint).netloc, metrics))
    return Tracer(processor, resource, settings.sample)


def _headers(settings: Tracing) -> dict[str, str]:
    """Return the collector's headers: OTLP percent-encodes the values."""
    if settings.headers is None:
        return {}
    pairs = (part.strip().partition("=") for part in settings.headers.reveal().split(","))
    return {name.lower(): unquote(value) for name, _, value in pairs}


def _parent(headers: CIMultiDictProxy[str]) -> SpanContext | None:
    """Return the app's span; None where its header is not well-formed (W3C Trace Context section 3.2)."""
    given = headers.getall("traceparent")
    if len(given) != 1:
        return None
    carrier = {"traceparent": given[0], "tracestate": ",".join(headers.getall("tracestate", ()))}
    found = get_current_span(TraceContextTextMapPropagator().extract(carrier, Context())).get_span_context()
    return found if found.is_valid else None


def _method(method: str) -> str:
    return method if method in _METHODS else "HTTP"


def _name(context: RequestContext) -> str:
    route = _route(context)
    return f"{_method(context.method)} {route}" if route else _method(context.method)


def _route(context: RequestContext) -> str:
    """Return the operation's path with its placeholders: a real path holds ids."""
    operation = context.target.operation if context.target else None
    return operation.template if operation else ""


def _of_request(context: RequestContext) -> Attributes:
    """Return a request's attributes; there is no path, query, id or token among them."""
    found: Attributes = {
        "http.request.method": context.method if context.method in _METHODS else "_OTHER",
        "http.response.status_code": context.status,
        "spapi.account": context.account,
        "spapi.region": context.region,
        "spapi.operation": context.operation,
        "spapi.token": context.token,
        "spapi.attempts": context.attempts,
    }
    if route := _route(context):
        found["http.route"] = route
    if context.caller:
        found["spapi.caller"] = context.caller
    if context.hint:
        found["spapi.hint"] = context.hint
    if context.error:
        found["error.type"] = context.error
    elif context.truncated:
        found["error.type"] = "cut off"
    elif context.status >= 500:
        found["error.type"] = str(context.status)
    if context.fault:
        found["spapi.fault"] = context.fault
    return found


def _of_call(context: RequestContext, step: Phase, before: int) -> Attributes:
    """Return the attributes of one call to Amazon, `before` of which went out already."""
    found: Attributes = {"http.request.method": context.method if context.method in _METHODS else "_OTHER"}
    if context.target is not None:
        parts = urlsplit(context.target.endpoint)
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
        found["error.type"] = context.error or "no answer"
    return found
