"""Traces: one span for each request, and below it one for each wait and each call to Amazon.

The spans are created when the request has ended, from what its context recorded. A thread of OpenTelemetry's SDK
exports them, so a slow or absent collector costs spans, never a request. No trace header is forwarded to Amazon.

OpenTelemetry is an optional extra: import this module only where tracing is configured.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple
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

FLUSH_TIMEOUT = 3.0  # seconds to export the last spans at shutdown
MAX_PHASES = 32  # phases of one request that become spans
MIN_WAIT = 0.0005  # seconds; a shorter wait, such as that for a cached token, becomes no span

# By OpenTelemetry's semantic conventions for HTTP, any other method is recorded as `_OTHER`.
_METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})

Attributes = dict[str, str | int | bool]

_FAILED, _UNSET = Status(StatusCode.ERROR), Status()


class Phase(NamedTuple):
    """A wait, or a call to Amazon, between two moments on the monotonic clock; `status` is 0 without a response."""

    name: str
    began: float
    ended: float
    status: int = 0


class TracedContext(RequestContext):
    """The context of a traced request: it also records when waits and calls to Amazon began and ended."""

    def __init__(self, method: str, started: float, now: Callable[[], float]) -> None:
        super().__init__(method, started)
        self.phases: list[Phase] = []
        self._now = now
        self._sent: float | None = None  # when the call began that has no response yet

    def add_rate_limit_wait(self, seconds: float) -> None:
        """Record a wait for a usage plan that ends now."""
        super().add_rate_limit_wait(seconds)
        self._add_wait("usage plan", seconds)

    def add_token_wait(self, seconds: float) -> None:
        """Record a wait for a token that ends now."""
        super().add_token_wait(seconds)
        self._add_wait("token", seconds)

    def begin_attempt(self) -> None:
        """Record that a call to Amazon begins; the one before it, if it had no response, failed."""
        super().begin_attempt()
        now = self._now()
        self.close(now)
        self._sent = now

    def end_attempt(self, status: int, duration: float) -> None:
        """Record the head of Amazon's response."""
        super().end_attempt(status, duration)
        if self._sent is not None:
            self._add_phase(Phase("call", self._sent, self._now(), status))
            self._sent = None

    def close(self, ended: float) -> None:
        """Record the end of a call without a response."""
        if self._sent is not None:
            self._add_phase(Phase("call", self._sent, ended))
            self._sent = None

    def _add_wait(self, name: str, seconds: float) -> None:
        if seconds >= MIN_WAIT:
            ended = self._now()
            self._add_phase(Phase(name, ended - seconds, ended))

    def _add_phase(self, phase: Phase) -> None:
        if len(self.phases) < MAX_PHASES:
            self.phases.append(phase)


class LoggingExporter(SpanExporter):
    """Exports spans to the collector; counts those lost, logs when exports begin to fail and when they work again."""

    def __init__(self, exporter: SpanExporter, host: str, metrics: Metrics) -> None:
        self._exporter = exporter
        self._host = host
        self._metrics = metrics
        self._is_accepting = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans; runs in the SDK's thread."""
        result = self._exporter.export(spans)
        is_accepting = result is SpanExportResult.SUCCESS
        if not is_accepting:
            self._metrics.dropped_spans.inc(len(spans))
        if is_accepting != self._is_accepting:
            self._is_accepting = is_accepting
            level = logging.INFO if is_accepting else logging.WARNING
            text = "the collector accepts spans again"
            if not is_accepting:
                text = "the collector accepts no spans: they are lost"
            LOGGER.log(level, text, extra=extra(collector=self._host))
        return result

    def shutdown(self) -> None:
        """Stop the exporter."""
        self._exporter.shutdown()


class Tracer:
    """Creates spans of finished requests.

    `share` is the fraction of requests to trace where the client does not decide; `now` is the monotonic clock of the
    contexts, in seconds, and `wall` the wall clock in nanoseconds.
    """

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
        """Return the context of a request that may be traced."""
        return TracedContext(method, started, self._now)

    def end(self, context: RequestContext, headers: CIMultiDictProxy[str]) -> None:
        """Create the spans of a finished request; never raise."""
        try:
            parent = _parent(headers) if "traceparent" in headers else None
            if isinstance(context, TracedContext) and self._is_sampled(parent):
                self._create_spans(context, parent)
        except Exception as exc:  # noqa: BLE001 - tracing must not fail a request
            LOGGER.error("a request could not be traced", exc_info=exc)

    def _is_sampled(self, parent: SpanContext | None) -> bool:
        """Return whether to trace: as the client's `traceparent` says, else by the share."""
        if parent is None:
            return random.random() < self._share  # noqa: S311 - a sample
        return parent.trace_flags.sampled

    def _create_spans(self, context: TracedContext, parent: SpanContext | None) -> None:
        now, wall = self._now(), self._wall()
        context.close(now)

        def at(moment: float) -> int:
            return wall - round((now - moment) * 1e9)

        server = self._child_of(parent)
        calls = 0
        for phase in context.phases:
            if phase.name == "call":
                name, kind = _method(context.method), SpanKind.CLIENT
                attributes = _call_attributes(context, phase, calls)
                calls += 1
            else:
                name, kind, attributes = f"wait for {phase.name}", SpanKind.INTERNAL, {}
            # By the semantic conventions a 4xx is an error in a client span, but not in a server span.
            status = _FAILED if "error.type" in attributes else _UNSET
            span = self._child_of(server)
            self._export(name, span, server, kind, status, attributes, at(phase.began), at(phase.ended))
        status = _FAILED if context.status >= 500 or context.truncated else _UNSET
        attributes = _request_attributes(context)
        self._export(_name(context), server, parent, SpanKind.SERVER, status, attributes, at(context.started), wall)

    def _child_of(self, parent: SpanContext | None) -> SpanContext:
        """Return the context of a new span, in its parent's trace or in a new one."""
        return SpanContext(
            trace_id=parent.trace_id if parent else self._ids.generate_trace_id(),
            span_id=self._ids.generate_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED),
            trace_state=parent.trace_state if parent else None,
        )

    def _export(
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
        # Not by OpenTelemetry's Tracer: it makes mutable spans with locks, at ten times the cost.
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
        """Export the remaining spans, for FLUSH_TIMEOUT seconds at most."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def flush() -> None:
            self._processor.shutdown()
            with suppress(RuntimeError):  # after the timeout the loop may be closed
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=flush, name="flush spans", daemon=True).start()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_TIMEOUT):
                await done.wait()


def open_tracer(settings: Tracing, version: str, metrics: Metrics) -> Tracer:
    """Return a tracer that exports to the collector of the settings."""
    endpoint = settings.endpoint or ""
    # OpenTelemetry's exporter logs a failure several times per batch; LoggingExporter logs it once.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
    resource = Resource.create({"service.name": settings.service_name, "service.version": version})
    exporter = OTLPSpanExporter(endpoint=endpoint, headers=_headers(settings))
    processor = BatchSpanProcessor(LoggingExporter(exporter, urlsplit(endpoint).netloc, metrics))
    return Tracer(processor, resource, settings.sample)


def _headers(settings: Tracing) -> dict[str, str]:
    """Return the headers for the collector; their values are percent-encoded (OTEL_EXPORTER_OTLP_HEADERS)."""
    if settings.headers is None:
        return {}
    pairs = (part.strip().partition("=") for part in settings.headers.reveal().split(","))
    return {name.lower(): unquote(value) for name, _, value in pairs}


def _parent(headers: CIMultiDictProxy[str]) -> SpanContext | None:
    """Return the client's span; None for a malformed or repeated `traceparent` (W3C Trace Context section 3.2)."""
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
    """Return the operation's path template: the path itself contains ids."""
    operation = context.route.operation if context.route else None
    return operation.template if operation else ""


def _request_attributes(context: RequestContext) -> Attributes:
    """Return a request's attributes: no path, query, id or token."""
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


def _call_attributes(context: RequestContext, phase: Phase, resend_count: int) -> Attributes:
    """Return the attributes of one call to Amazon, sent after `resend_count` others."""
    found: Attributes = {"http.request.method": context.method if context.method in _METHODS else "_OTHER"}
    if context.route is not None:
        parts = urlsplit(context.route.endpoint)
        found["server.address"] = parts.hostname or ""
        found["server.port"] = parts.port or (443 if parts.scheme == "https" else 80)
        found["url.scheme"] = parts.scheme
    if resend_count:
        found["http.request.resend_count"] = resend_count
    if phase.status:
        found["http.response.status_code"] = phase.status
    if phase.status >= 400:
        found["error.type"] = str(phase.status)
    elif not phase.status:
        found["error.type"] = context.error or "no answer"
    return found
